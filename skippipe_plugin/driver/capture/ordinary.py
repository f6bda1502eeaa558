"""Copies and pickles of the blocks' proxies: ordinary blocks, with the values that the workers have."""

from __future__ import annotations

import copy
import copyreg
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_OURS = "_skippipe_"


def copied(cls: type[nn.Module]) -> Callable[[nn.Module, dict[int, Any]], nn.Module]:
    """Return ``__deepcopy__`` for the proxies of blocks of class ``cls``."""

    def deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
        with _as_ordinary(self, cls):
            return copy.deepcopy(self, memo)

    return deepcopy


def reduced(cls: type[nn.Module]) -> Callable[[nn.Module, Any], Any]:
    """Return ``__reduce_ex__`` for the proxies of blocks of class ``cls``."""

    def reduce_ex(self: nn.Module, protocol: Any) -> Any:
        with _as_ordinary(self, cls):
            result = self.__reduce_ex__(protocol)
            if isinstance(result, tuple) and len(result) > 2 and isinstance(result[2], dict):
                made, how = result[:2]
                if made is copyreg.__newobj__:  # type: ignore[attr-defined]
                    made, how = copyreg._reconstructor, (cls, object, None)  # type: ignore[attr-defined]
                return (made, how, dict(result[2]), *result[3:])  # what it is now, whatever comes back into it
            return result

    return reduce_ex


class StandIn:
    """A method of ours on a user's object, which copies and pickles of the object have as their class has it.

    Args:
        module: The user's, such as a module.
        name: Of the method.
        function: What is called in its place.
    """

    def __init__(self, module: object, name: str, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, getattr(module, name))
        self._function = function
        self._module = module
        self._name = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return functools.partial(getattr(type(self._module), self._name), memo[id(self._module)])

    def __reduce__(self) -> Any:
        return functools.partial, (getattr(type(self._module), self._name), self._module)


@contextmanager
def _as_ordinary(block: nn.Module, cls: type[nn.Module]) -> Iterator[None]:
    """Let a proxy be, for a moment, what it is in one process."""
    proxy, ours = type(block), {key: value for key, value in block.__dict__.items() if key.startswith(_OURS)}
    for key in ours:
        del block.__dict__[key]
    block.__class__ = cls
    try:
        yield
    finally:
        block.__class__ = proxy
        block.__dict__.update(ours)
