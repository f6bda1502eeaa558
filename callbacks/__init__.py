"""Lightning callbacks of skippipe: monitoring, recovery and load balance."""

from .balancer import LoadBalancer
from .experts import ExpertConfig, draw_loads
from .monitor import PipelineMonitor
from .recovery import StageRecovery

__all__ = ["ExpertConfig", "LoadBalancer", "PipelineMonitor", "StageRecovery", "draw_loads"]
