"""Which source of workers a driver has: its settings', the environment's, or what its way of starting makes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final, Literal, get_args

from ..checked import check
from ..engine.errors import SkipPipeError
from .interface import WorkerSource

SourceName = Literal["local", "launched", "ray", "slurm", "kubernetes"]
Workers = SourceName | Callable[[], WorkerSource]
SOURCE_NAMES: Final = get_args(SourceName)
WORKERS_VARIABLE: Final = "SKIPPIPE_WORKERS"
_MAKERS: Final[Mapping[str, tuple[str, str]]] = {
    "local": ("local", "LocalSource"),
    "launched": ("launched", "LaunchedSource"),
    "ray": ("ray", "RaySource"),
    "slurm": ("slurm", "SlurmSource"),
    "kubernetes": ("kubernetes", "KubernetesSource"),
}
"""By name: the module and the class."""
_METHODS: Final = ("open", "give", "gone", "take_back", "close")


def workers_of(setting: Workers | None, environment: Mapping[str, str] = os.environ) -> Workers | None:
    """Return what was chosen: the setting, else what ``SKIPPIPE_WORKERS`` names; None when nothing was.

    >>> workers_of(None, {"SKIPPIPE_WORKERS": "ray"})
    'ray'

    Raises:
        SettingError: The variable names none.
    """
    name: Any = environment.get(WORKERS_VARIABLE)  # Any: which name is checked here
    if setting is not None or name is None:
        return setting
    check(WORKERS_VARIABLE, name, SourceName)
    return name  # type: ignore[no-any-return]


def make_source(workers: Workers) -> WorkerSource:
    """Return a source that is not open yet.

    Raises:
        SkipPipeError: A package is missing, or a user's function returned something else.
    """
    if callable(workers):
        return _checked(workers())
    module, name = _MAKERS[workers]
    try:
        source: WorkerSource = getattr(import_module(f".{module}", __package__), name)()
    except ModuleNotFoundError as error:
        raise SkipPipeError(
            f"workers={workers!r} needs the package {error.name}, which is not installed here; "
            f"pip install 'skippipe-plugin[{workers}]', on every machine of the job"
        ) from error
    return source


def _checked(source: WorkerSource) -> WorkerSource:
    missing = [name for name in _METHODS if not callable(getattr(source, name, None))]
    if missing or isinstance(source, type):
        lacks = f"without {', '.join(missing)}" if missing else "which is a class, not an instance"
        raise SkipPipeError(
            "workers=... is a function that must return a source of workers (skippipe_plugin.sources.WorkerSource); "
            f"it returned a {type(source).__name__} {lacks}"
        )
    return source
