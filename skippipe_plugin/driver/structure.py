"""Which tensors and submodules modules hold, noticed when it changes; what of all that is trained is on the driver."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .capture.remote import is_remote


class Structure:
    """What is in the dictionaries of modules: their tensors and submodules.

    Args:
        owns: What each is called, and the dictionary.
    """

    def __init__(self, owns: Iterable[tuple[str, dict[str, Any]]] = ()) -> None:  # Any: tensors, modules, None
        labelled = list(owns)
        self._labels = [label for label, _ in labelled]
        self._owns = [own for _, own in labelled]
        self.look()

    def look(self) -> None:
        """Note what is there."""
        self._known = [tuple(own.values()) for own in self._owns]
        self._lengths = list(map(len, self._owns))
        self._flat = list(itertools.chain.from_iterable(self._known))

    def has_changed(self) -> bool:
        """Whether anything is another than at the last :meth:`look`; this is asked several times a step."""
        present = itertools.chain.from_iterable(map(dict.values, self._owns))
        return [*map(len, self._owns)] != self._lengths or not all(map(operator.is_, present, self._flat))

    def changed(self) -> Iterator[tuple[str, dict[str, Any], tuple[Any, ...]]]:
        """Yield what a dictionary is called that has changed, itself, and what was in it."""
        for label, own, known in zip(self._labels, self._owns, self._known, strict=True):
            if len(own) != len(known) or not all(map(operator.is_, own.values(), known)):
                yield label, own, known


class OwnParameters:
    """What is trained on this driver: the model's parameters, whatever layers it gets, and what optimizers step beside.

    Args:
        model: The whole model.
        elsewhere: Those of its blocks that workers hold.
        optimizers: Returns what steps this driver's part. They may have parameters that no module has.
    """

    def __init__(
        self, model: nn.Module, elsewhere: Iterable[nn.Module], optimizers: Callable[[], Iterable[Optimizer]]
    ) -> None:
        self._model = model
        self._elsewhere = {part for block in elsewhere for part in block.modules()}
        self._optimizers = optimizers
        self._look()

    def now(self) -> list[nn.Parameter]:
        """Return it, the model's first and in its order; the same list for as long as nothing has changed."""
        if self._structure.has_changed() or self._members() != self._known:
            self._look()
        return self._parameters

    def _members(self) -> list[tuple[int, int]]:
        """Return which lists optimizers keep their parameters in, and how long they are."""
        return [(id(each), len(each)) for each in self._groups()]

    def _groups(self) -> list[list[nn.Parameter]]:
        return [group["params"] for optimizer in self._optimizers() for group in optimizer.param_groups]

    def _look(self) -> None:
        parts = [part for part in self._model.modules() if part not in self._elsewhere]
        self._structure = Structure(("", own) for part in parts for own in (part._parameters, part._modules))
        self._known = self._members()
        members = itertools.chain(self._model.parameters(), *self._groups())
        self._parameters = list({id(each): each for each in members if not is_remote(each)}.values())
