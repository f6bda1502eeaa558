"""Who obeys which message: a table by class, in which the type checker compares each handler with its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ..channel import ChannelError
from .codec import Control

_C = TypeVar("_C", bound=Control)


class Handlers:
    """What is done with each kind of message, and what is said to who has sent it.

    Args:
        whose: Who obeys, for errors.
    """

    def __init__(self, whose: str = "a worker that waits for commands") -> None:
        self._whose = whose
        self._by_kind: dict[type[Control], Callable[[Any], Control | None]] = {}  # Any: a message of that kind

    def on(self, kind: type[_C], handler: Callable[[_C], Control | None]) -> None:
        """Let ``handler`` obey a kind of message; it returns the answer to who has sent it, if that is due now."""
        assert kind not in self._by_kind, f"two handlers for {kind.__name__}"
        self._by_kind[kind] = handler

    def obey(self, command: Control) -> Control | None:
        """Do what is commanded; return the answer.

        Raises:
            ChannelError: Nobody obeys such a message.
        """
        handler = self._by_kind.get(type(command))
        if handler is None:
            raise ChannelError(f"{type(command).__name__!r} is not for {self._whose}")
        return handler(command)

    @property
    def kinds(self) -> frozenset[type[Control]]:
        """What is obeyed."""
        return frozenset(self._by_kind)
