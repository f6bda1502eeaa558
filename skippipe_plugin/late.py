"""Packages whose names are imported when they are asked for, since what holds them takes seconds to import."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def late_names(package: str, where: Mapping[str, str]) -> Callable[[str], Any]:  # Any: what modules hold
    """Return a package's ``__getattr__``.

    Args:
        package: Its name.
        where: By name, the module of the package that holds it.
    """

    def get(name: str) -> Any:
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{where[name]}"), name)

    return get
