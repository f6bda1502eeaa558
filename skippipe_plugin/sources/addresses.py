"""The address at which workers of other hosts find this one."""

from __future__ import annotations

import ipaddress
import logging
import socket

from ..engine.errors import SkipPipeError

log = logging.getLogger(__name__)


def own_address(workers: str) -> str:
    """Return the address of this host's own name.

    Args:
        workers: The setting that asks, for messages.

    Raises:
        SkipPipeError: The name has none.
    """
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError as error:
        raise SkipPipeError(
            f"workers={workers!r}: this host's name {name!r} has no address ({error.strerror}); name one that the "
            "workers reach by NetworkConfig(host=...)"
        ) from error
    if ipaddress.ip_address(address).is_loopback:
        log.warning(
            "workers=%r: this host's name %r has the address %s, which no other host reaches; name another one by "
            "NetworkConfig(host=...)",
            workers,
            name,
            address,
        )
    return address
