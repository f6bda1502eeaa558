"""What code between the blocks computes of their outputs: it travels, and runs where its result is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch.utils import _pytree as pytree

if TYPE_CHECKING:
    from .call import Ambient


@dataclass(frozen=True, slots=True)
class Computed:
    """Stands for the result of a function of torch; what it is called with stands as the arguments of a block do."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    item: int | None
    """Which of several results; None where there is one."""
    ambient: Ambient
    """In what it is computed."""

    def leaves(self) -> Iterator[Any]:  # Any: what stands for an argument, or a constant
        """Yield what it is called with, and what that is computed of, if it is."""
        for leaf in pytree.tree_leaves((self.args, self.kwargs)):
            if isinstance(leaf, Computed):
                yield from leaf.leaves()
            else:
                yield leaf

    def mapped(self, change: Callable[[Any], Any]) -> Computed:
        """Return the same with ``change`` applied to all of :meth:`leaves`."""

        def changed(leaf: Any) -> Any:  # Any: a leaf
            return leaf.mapped(change) if isinstance(leaf, Computed) else change(leaf)

        return replace(self, args=pytree.tree_map(changed, self.args), kwargs=pytree.tree_map(changed, self.kwargs))

    def value(self, leaf: Callable[[Any], Any]) -> Any:  # Any: a tensor
        """Compute it; ``leaf`` makes each of what it is called with."""
        args, kwargs = pytree.tree_map(leaf, (self.args, self.kwargs))
        with self.ambient.entered():
            result = self.function(*args, **kwargs)
        return result if self.item is None else result[self.item]
