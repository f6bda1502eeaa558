"""Workers that are pods of a Kubernetes cluster: a controller keeps their number, the driver only opens the door.

The manifests are in ``deploy/kubernetes``. Pods join by hand (``skippipe worker``) through a Service; when one is lost,
the cluster makes another, on another node if that one is gone, and it joins as a spare. Nothing here calls the
cluster's API, so the driver needs no rights in it.
"""

from __future__ import annotations

from typing import Final

from .addresses import own_address
from .launched import LaunchedSource

PORT: Final = 29400
"""Where the driver listens, and where the Service leads to."""


class KubernetesSource(LaunchedSource):
    """Listens on the address of the driver's pod; workers come by themselves."""

    def open(self) -> tuple[str, int]:
        """Return the pod's address, and the port that the Service leads to.

        Raises:
            SkipPipeError: This host's own name has no address.
        """
        return own_address("kubernetes"), PORT
