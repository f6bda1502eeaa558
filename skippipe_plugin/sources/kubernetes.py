"""Workers that are pods of a Kubernetes cluster: a controller keeps their number, the driver only opens the door.

The manifests are in ``deploy/kubernetes``. Pods join by hand (``skippipe worker``) through a Service; when one is lost,
the cluster makes another, on another node if that one is gone, and it joins as a spare. Nothing here calls the
cluster's API, so the driver needs no rights in it.
"""

from __future__ import annotations

import socket
from typing import Final

from ..engine.errors import SkipPipeError
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
        name = socket.gethostname()
        try:
            return socket.gethostbyname(name), PORT
        except OSError as error:
            raise SkipPipeError(
                f"workers='kubernetes': this host's name {name!r} has no address ({error.strerror}), as a pod's has; "
                "name one by NetworkConfig(host=...)"
            ) from error
