"""Hooks on the gradients of leaves: of one backward's whole gradient, which comes in parts, one per microbatch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class _Quiet:
    """Stands in the place of a hook, and notes that it would have been called."""

    __slots__ = ("_note", "hook")

    def __init__(self, hook: Any, note: Callable[[], object]) -> None:  # Any: whatever was registered
        self.hook = hook
        self._note = note

    def __call__(self, *_: Any) -> None:
        self._note()


class GradientHooks:
    """Keeps the hooks of leaves quiet for the time in which gradients come in parts.

    Their places in torch's tables stay, so that the user may remove them meanwhile, and register others.
    """

    def __init__(self) -> None:
        self._tables: list[dict[int, Any]] = []  # Any: the user's functions
        self._next = -1
        self._order: dict[int, None] = {}
        """The ids of leaves with hooks, as parts have come to them."""

    def quiet(self, leaves: Iterable[Tensor]) -> None:
        """Keep them quiet."""
        self.release()
        self._order = {}
        self._next = RemovableHandle.next_id
        self.quiet_more(leaves)

    def quiet_more(self, leaves: Iterable[Tensor]) -> None:
        """Keep those of further leaves quiet, too, or further ones."""
        for leaf in leaves:
            for table in tables_of(leaf):
                loud = [(number, hook) for number, hook in (table or {}).items() if type(hook) is not _Quiet]
                if table is not None and loud:
                    self._tables.append(table)
                    note = functools.partial(self._order.setdefault, id(leaf))
                    table.update({number: _Quiet(hook, note) for number, hook in loud})

    def may_be_more(self) -> bool:
        """Whether hooks were registered since this was asked last, perhaps on others: torch counts them all."""
        before, self._next = self._next, RemovableHandle.next_id
        return self._next != before

    def release(self) -> None:
        """Let them be called again."""
        tables, self._tables = self._tables, []
        for table in tables:
            table.update({number: hook.hook for number, hook in table.items() if type(hook) is _Quiet})

    def deliver(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add leaves' whole gradients as one backward does, which comes to the leaves in the order of the parts."""
        places = {leaf: place for place, leaf in enumerate(self._order)}
        ordered = sorted(gradients, key=lambda pair: places.get(id(pair[0]), -1), reverse=True)
        with torch.inference_mode(False), torch.enable_grad():
            ends = [
                _End.apply(leaf)  # type: ignore[no-untyped-call]
                for leaf, _ in ordered
            ]  # autograd begins with what was made last
        torch.autograd.backward(ends, [gradient for _, gradient in ordered])


class _End(torch.autograd.Function):
    """Where a gradient goes on to its leaf; unlike a view's it may be sparse."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.view_as(leaf)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


def tables_of(leaf: Tensor) -> tuple[dict[int, Any] | None, dict[int, Any] | None]:
    """Return where torch keeps a leaf's hooks: for each gradient that comes, and for what has accumulated."""
    return leaf._backward_hooks, leaf._post_accumulate_grad_hooks


def has_hooks(leaf: Tensor) -> bool:
    """Whether there are hooks that are not quiet."""
    return any(type(hook) is not _Quiet for table in tables_of(leaf) if table for hook in table.values())


@contextmanager
def no_gradient_hooks(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Keep the hooks quiet while gradients are made up, which are nobody's business."""
    hooks = GradientHooks()
    hooks.quiet(list(parameters))
    try:
        yield
    finally:
        hooks.release()
