"""Where workers come from: this host, a launcher, people, Ray, SLURM, Kubernetes, or a user's own source.

``NetworkConfig(workers=...)`` chooses. :class:`WorkerSource` is all that the driver knows of it; the module of a source
is imported only when that is chosen.
"""

from .choose import SOURCE_NAMES, Workers, make_source, workers_of
from .interface import Door, WorkerSource

__all__ = ["SOURCE_NAMES", "Door", "WorkerSource", "Workers", "make_source", "workers_of"]
