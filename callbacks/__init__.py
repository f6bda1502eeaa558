"""Lightning callbacks of skippipe: monitoring and load balance so far; recovery is to come."""

from .balancer import LoadBalancer
from .monitor import PipelineMonitor

__all__ = ["LoadBalancer", "PipelineMonitor"]
