"""How much more memory this process may take: what the host has left, its container, and its own limits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import psutil

_CGROUPS: Final = Path("/sys/fs/cgroup")
_GIVES_WAY: Final = ("inactive_file", "active_file")
"""Of what counts as used: copies of files, which the system drops first."""


def available_bytes() -> int:
    """Return how many bytes this process can still take before the host, its control group or a limit says no."""
    of_host: int = psutil.virtual_memory().available
    return max(0, min([of_host, *_left_in_groups(Path("/proc/self/cgroup")), *_left_of_own()]))


def _left_in_groups(own: Path) -> Iterator[int]:
    """Yield what each control group (version 2) around this process leaves, its own and those above it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # no Linux, or a host that does not tell
        return
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), None)
    if path is None:
        return
    group = _CGROUPS / path.lstrip("/")
    for each in (group, *group.parents):
        if each == _CGROUPS.parent:
            return
        if (left := left_in_group(each)) is not None:
            yield left


def left_in_group(group: Path) -> int | None:
    """Return what a control group may still take; None where it has no limit. Cached files give way.

    Args:
        group: Its folder.
    """
    try:
        limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return None if limit == "max" else int(limit) - used + sum(int(stat.get(each, 0)) for each in _GIVES_WAY)


def _left_of_own() -> Iterator[int]:
    """Yield what the limits of this process leave (``ulimit -v``, ``ulimit -d``)."""
    if sys.platform != "linux":
        return
    import resource  # not on Windows

    memory = psutil.Process().memory_info()
    for limit, used in ((resource.RLIMIT_AS, memory.vms), (resource.RLIMIT_DATA, memory.data)):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            yield soft - used
