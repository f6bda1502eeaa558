"""Lightning callbacks of skippipe: monitoring so far; recovery and balance are to come."""

from .monitor import PipelineMonitor

__all__ = ["PipelineMonitor"]
