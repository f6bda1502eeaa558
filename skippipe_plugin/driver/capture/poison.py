"""Attributes that a block's forward writes where it runs: on the driver they cannot be read, set or deleted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

from torch import nn

from ...engine.errors import SkipPipeError

_NOTHING: Final = object()


class _Elsewhere:
    """Comes before the entry of the same name in an object's ``__dict__``.

    Args:
        message: What to say.
        below: What the class itself has under this name.
    """

    def __init__(self, message: str, below: object) -> None:
        self._message = message
        self._below = below

    def __get__(self, instance: object, owner: type) -> Any:  # Any: whatever the class has
        if instance is not None:
            self._refuse()
        if self._below is _NOTHING:
            raise AttributeError("an attribute of objects, not of the class")
        return self._below

    def __set__(self, instance: object, value: object) -> None:
        self._refuse()

    def __delete__(self, instance: object) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SkipPipeError(self._message)


class Poison:
    """The attributes of a model's blocks that are closed to the driver's code."""

    def __init__(self) -> None:
        self._original: list[tuple[nn.Module, type[nn.Module]]] = []

    def close(self, module: nn.Module, name: str, message: str) -> None:
        """Let whoever touches the attribute read ``message``."""
        cls = type(module)
        if not any(known is module for known, _ in self._original):
            self._original.append((module, cls))
            module.__class__ = cls = _own_class(cls)
        setattr(cls, name, _Elsewhere(message, getattr(cls, name, _NOTHING)))

    def lift(self) -> None:
        """Open everything again."""
        while self._original:
            module, cls = self._original.pop()
            module.__class__ = cls


def _own_class(cls: type[nn.Module]) -> type[nn.Module]:
    """Return a class for one object, whose copies are of the class that it comes from."""

    def reduce(self: Any, protocol: Any) -> Any:  # Any: pickle's protocol
        reduced: tuple[Any, ...] = cls.__reduce_ex__(self, protocol)  # type: ignore[assignment]
        function, arguments, *rest = reduced
        if arguments == (own,):
            function, arguments = object.__new__, (cls,)  # pickle would compare the usual one's class with the object's
        return function, arguments, *rest

    names: dict[str, Callable[..., Any] | str | None] = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": reduce,
    }
    own = type(cls.__name__, (cls,), names)
    return own
