"""What both ends of a job must have in common: they exchange pickled blocks, and each runs its half of a protocol."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata

import torch


def own_versions() -> dict[str, str]:
    """Return the versions that matter, by name; the patch level of python and torch does not."""
    try:
        plugin = metadata.version("skippipe-plugin")
    except metadata.PackageNotFoundError:  # imported from a checkout that is not installed
        plugin = "checkout"
    return {
        "skippipe-plugin": plugin,
        "python": _minor(platform.python_version()),
        "torch": _minor(torch.__version__),
    }


def mismatch(theirs: object) -> str:
    """Say how another process's versions differ from this one's; empty when they do not."""
    if not isinstance(theirs, Mapping):
        return "it does not say which versions it has"
    return "; ".join(
        f"it has {name} {theirs.get(name, 'of unknown version')}, and the driver has {version}"
        for name, version in own_versions().items()
        if theirs.get(name) != version
    )


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
