"""The executor's view of a worker's inbox."""

from __future__ import annotations

from typing import Protocol

from ..engine.call import Call


class Inbox(Protocol):
    """Has the calls of the step under way."""

    def next_calls(self, *, block: bool) -> list[tuple[int, Call]]:
        """Return those that came, or with ``block`` at least one message's worth."""


class Feed:
    """Gives the executor calls, by microbatch."""

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox

    def poll(self) -> list[tuple[int, Call]]:
        """Return what is there."""
        return self._inbox.next_calls(block=False)

    def wait(self) -> list[tuple[int, Call]]:
        """Wait for something."""
        return self._inbox.next_calls(block=True)
