"""Changes of the blocks' classes, and of what their code reads, after the hand-over: workers have them as they were."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable
from typing import Any

from torch import nn

from ...engine.errors import SkipPipeError
from ...engine.outer_names import OuterName, contents, counts, outer_names, readable_names
from ..doors import BEFORE_HANDOVER


class ClassWatch:
    """Tells whether somebody has changed a class of the blocks' modules.

    Args:
        blocks: The blocks, before any of them is of another class.
    """

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        modules = (module for block in blocks for module in block.modules())
        classes = dict.fromkeys(cls for module in modules for cls in type(module).__mro__)
        self._classes = [cls for cls in classes if cls not in (nn.Module, object)]
        self._read = readable_names(classes)
        self._before = [dict(vars(cls)) for cls in self._classes]
        self._flat = self._values()
        self._outer = outer_names(self._classes)
        self._outer_values = [each.value() for each in self._outer]
        texts = ((each, contents(each.value())) for each in self._outer)
        self._containers = [(each, text) for each, text in texts if text]

    def watch(self, blocks: Iterable[nn.Module]) -> None:
        """Look at the classes that the blocks have while they are elsewhere, too: ``type(block)`` is of those."""
        self._classes = list(dict.fromkeys([*self._classes, *map(type, blocks)]))
        self._before, self._flat = [dict(vars(cls)) for cls in self._classes], self._values()

    def check(self) -> None:
        """Look again.

        Raises:
            SkipPipeError: A class is not what it was.
        """
        now = self._values()
        if len(now) != len(self._flat) or not all(map(operator.is_, now, self._flat)):
            self._refuse()
        if not all(map(operator.is_, [each.namespace.get(each.name) for each in self._outer], self._outer_values)):
            self._refuse_outer()
        for each, text in self._containers:
            if contents(each.value()) != text:
                raise _changed(each)

    def _values(self) -> list[Any]:
        return [*itertools.chain.from_iterable([vars(cls).values() for cls in self._classes])]

    def _refuse_outer(self) -> None:
        for each, before in zip(self._outer, self._outer_values, strict=True):
            now = each.value()
            if now is not before and not (
                type(now) is type(before) and isinstance(now, (int, float, str)) and now == before
            ):
                raise _changed(each)

    def _refuse(self) -> None:
        for cls, before in zip(self._classes, self._before, strict=True):
            now = dict(vars(cls))
            for name in (name for name in {**before, **now} if now.get(name) is not before.get(name)):
                if not counts(self._read, name, now.get(name)):
                    continue
                raise SkipPipeError(
                    f"{cls.__qualname__}.{name} was changed on the class after the blocks went to their workers, which "
                    f"have the class as it was. Change it {BEFORE_HANDOVER}, or set an attribute on each block instead"
                )
        self._before, self._flat = [dict(vars(cls)) for cls in self._classes], self._values()


def _changed(outer: OuterName) -> SkipPipeError:
    where = "of the script" if outer.module == "__main__" else f"of the module {outer.module}"
    return SkipPipeError(
        f"the global name {outer.name!r} {where}, which the code of {outer.reader} reads, was changed after the blocks "
        f"went to their workers, which have it as it was. Change it {BEFORE_HANDOVER}, or set an attribute on each "
        "block instead"
    )
