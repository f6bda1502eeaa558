"""Make ``Trainer(strategy="skippipe")`` work after ``import skippipe_plugin``.

Lightning has no entry point for strategies, and importing it takes seconds that a worker, the command line and the
pure-Python planner do not need. So the name is registered when Lightning is there, or as soon as it is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, Final

_LIGHTNING: Final = "lightning.pytorch"
_NAME: Final = "skippipe"


def register_when_lightning_is_there() -> None:
    """Register the strategy now, or when ``lightning.pytorch`` has been imported."""
    if hasattr(sys.modules.get(_LIGHTNING), "Trainer"):
        _register()
    else:
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    from lightning.pytorch.strategies import StrategyRegistry

    if _NAME not in StrategyRegistry:
        StrategyRegistry.register(_NAME, _strategy, description="Pipelines over unequal, unreliable machines")


def _strategy(**settings: Any) -> Any:  # Any: SkipPipeStrategy and its settings, imported when asked for
    from .strategies import SkipPipeStrategy

    return SkipPipeStrategy(**settings)


class _Finder(MetaPathFinder):
    """Finds Lightning like everybody else, once, with a loader that registers afterwards."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LIGHTNING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()
