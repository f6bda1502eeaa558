"""Code between the blocks that computes with their outputs: calls of torch are noted, and run when values are there.

A block that gets the result computes it where it runs; the code after the blocks gets it from the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...engine.arguments import versions
from ...engine.call import Ambient, Made
from ...engine.device import kept_random_states
from ...engine.errors import SkipPipeError
from ...engine.memory_order import laid
from ...engine.stage import inner
from ...engine.transport import TensorSpec
from .token import HiddenToken, function_name

_OPERATORS: Final = "add sub mul truediv floordiv mod pow matmul and or xor lshift rshift"
_IN_PLACE: Final = frozenset(["__setitem__", *(f"__i{name}__" for name in _OPERATORS.split())])
"""Methods that change what they are called on."""


@dataclass(slots=True, eq=False)
class Deferral:
    """One call of a function with tokens among its arguments."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    ambient: Ambient
    bases: frozenset[Made]
    """The tensors of blocks that it follows from."""
    results: list[HiddenToken] = field(default_factory=list)
    is_single: bool = True
    given: list[Tensor] = field(default_factory=list)
    """The driver's own tensors among the arguments."""
    given_versions: tuple[int, ...] = ()

    def check_unchanged(self) -> None:
        """Raise when one of the driver's tensors was changed in place since."""
        if versions(self.given) != self.given_versions:
            name = function_name(self.function)
            raise SkipPipeError(
                f"a tensor was changed in place after code between the blocks had called {name} "
                "with it; what that computes, it computes when the blocks have run. Make a new tensor instead (x = x + "
                "1 in place of x += 1)"
            )

    def settle(self) -> None:
        """Compute it, now that the tokens among its arguments have become tensors."""
        self.check_unchanged()
        specs = [token.spec for token in self.results]
        with self.ambient.entered():
            found = self.function(*self.args, **self.kwargs)
        given = {id(leaf) for leaf in pytree.tree_leaves((self.args, self.kwargs))}
        for token, value, spec in zip(self.results, [found] if self.is_single else found, specs, strict=True):
            if not TensorSpec.of(value).is_like(spec):
                raise SkipPipeError(
                    f"{function_name(self.function)}, called by code between the blocks, has made "
                    f"{TensorSpec.of(value)}, not {spec}: its form depends on values, which are on workers. Move that "
                    "code into a block, or behind the last one"
                )
            token.becomes(value.view_as(value) if id(value) in given else value)


class Forms:
    """Knows what functions make of tensors of given forms; tries them on made-up ones."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: dict[Any, tuple[list[tuple[TensorSpec, bool, torch.device]], bool]] = {}

    def of(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], ambient: Ambient
    ) -> tuple[list[tuple[TensorSpec, bool, torch.device]], bool] | None:
        """Return form, gradient and place of each result, and whether it is one.

        None: They depend on values, or the function changes what it is called with.
        """
        key = _key(function, args, kwargs, ambient)
        if key is None or key not in self._known:
            found = self._try(function, args, kwargs)
            if found is None or key is None:
                return found
            self._known[key] = found
        return self._known[key]

    def _try(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[TensorSpec, bool, torch.device]], bool] | None:
        seen: list[Any] = []
        with kept_random_states(self._device), torch._C.DisableTorchFunction():
            for draw in (torch.zeros, torch.randn):
                own_args, own_kwargs = pytree.tree_map(lambda leaf, draw=draw: _made_up(leaf, draw), (args, kwargs))
                given = [leaf for leaf in pytree.tree_leaves((own_args, own_kwargs)) if isinstance(leaf, Tensor)]
                before = [leaf.detach().clone() for leaf in given]
                result = function(*own_args, **own_kwargs)
                if not all(map(_is_same, given, before)):  # BatchNorm's statistics: torch counts no write of those
                    return None
                results = [result] if isinstance(result, Tensor) else result
                if not isinstance(results, (tuple, list)) or not all(isinstance(each, Tensor) for each in results):
                    return None
                own = [(TensorSpec.of(each), each.requires_grad, each.device) for each in results]
                seen.append((own, isinstance(result, Tensor)))
        return seen[0] if seen[0] == seen[1] else None


def _is_same(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=0.0, atol=0.0, equal_nan=True)


def _made_up(leaf: Any, draw: Callable[..., Tensor]) -> Any:  # Any: an argument
    """Return what stands for an argument; flags and whole numbers are drawn, too, for a form may follow from them."""
    if isinstance(leaf, HiddenToken):
        spec = leaf.spec
        made = laid(draw(spec.shape, device=leaf.device).to(spec.dtype), spec.order)
        return inner(made.requires_grad_(leaf.requires_grad and made.is_floating_point()))
    if isinstance(leaf, Tensor):
        return inner(leaf.detach().clone().requires_grad_(leaf.requires_grad))
    return leaf


def _key(function: Any, args: Any, kwargs: Any, ambient: Ambient) -> Any:
    """Return what the form of a result depends on; None where that is not to be seen."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    found: list[Any] = []
    for leaf in leaves:
        if isinstance(leaf, HiddenToken):
            found.append((HiddenToken, leaf.spec, leaf.requires_grad))
        elif isinstance(leaf, Tensor):
            if not leaf.is_floating_point():
                return None  # may say what is taken
            found.append((Tensor, TensorSpec.of(leaf), leaf.requires_grad))
        else:
            found.append((type(leaf), repr(leaf)))
    return function, str(structure), tuple(found), ambient, torch.get_default_dtype()


def defer(
    forms: Forms,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    ambient: Ambient,
    tokens: Sequence[HiddenToken],
) -> Deferral | None:
    """Note a call of a function with ``tokens`` among its arguments.

    Returns:
        It, with tokens for its results; None where it cannot wait: its result is no tensor, or changes one.

    Raises:
        Exception: What the function raises of made-up values of the same form, as it may of the real ones.
    """
    name = function_name(function)
    if (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE or kwargs.get("out") is not None:
        return None
    found = forms.of(function, args, kwargs, ambient)
    if found is None:
        return None
    results, is_single = found
    given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    own = [leaf for leaf in given if not isinstance(leaf, HiddenToken)]
    bases = frozenset().union(*(token.bases for token in tokens))
    deferral = Deferral(function, args, kwargs, ambient, bases, [], is_single, own, versions(own))
    deferral.results += [
        tokens[0].computed(deferral, number, max(bases), spec, device, requires_grad)
        for number, (spec, requires_grad, device) in enumerate(results)
    ]
    return deferral
