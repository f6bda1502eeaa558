"""Lightning callbacks of skippipe: monitoring and load balance so far; recovery is to come."""

from .balancer import LoadBalancer
from .experts import ExpertConfig, draw_loads
from .monitor import PipelineMonitor

__all__ = ["ExpertConfig", "LoadBalancer", "PipelineMonitor", "draw_loads"]
