"""One end of a channel between a driver and a worker, for typed messages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ..channel import Buffer, Channel, as_text
from .codec import Control, Received, Vocabulary
from .messages import TO_DRIVER, TO_WORKER


class Said(NamedTuple):
    """A message and how it is sent, for several ends."""

    body: Control
    kind: str
    text: bytes
    blobs: Sequence[Buffer]


def to_all_workers(body: Control) -> Said:
    """Put into its form once what every worker is told."""
    kind, fields, blobs = TO_WORKER.encode(body)
    return Said(body, kind, as_text(kind, fields), blobs)


class Line:
    """Sends what one end says, and receives what the other one may say.

    Args:
        channel: Connected.
        says: What this end may say.
        hears: What the other end may say.
    """

    def __init__(self, channel: Channel, says: Vocabulary, hears: Vocabulary) -> None:
        self.channel = channel
        self._says = says
        self._hears = hears

    def send(
        self, body: Control | Said, *, answers: int | None = None, generation: int = -1, more: bool = False
    ) -> int:
        """Send one message, and return its number; see :meth:`skippipe_plugin.engine.channel.Channel.send`.

        Args:
            body: What is said.
            answers: The number of the message that it answers, -1 for none; by default the last one received. What
                several ends are told answers none.
            generation: That of who answers; -1 for none.
            more: Whether another one follows at once, with which this one may go out.
        """
        if isinstance(body, Said):
            return self.channel.send_text(body.kind, body.text, body.blobs, more=more)
        kind, fields, blobs = self._says.encode(body, generation)
        return self.channel.send(kind, fields, blobs, answers=answers, more=more)

    def send_if_free(self, body: Control) -> bool:
        """Send a message without blobs unless another thread is sending one; return whether it was sent."""
        kind, fields, _ = self._says.encode(body)
        return self.channel.send_if_free(kind, fields)

    def hang_up(self, body: Control) -> None:
        """Close, with a last message (without blobs) if it can be sent without waiting for anybody."""
        kind, fields, _ = self._says.encode(body)
        self.channel.hang_up(kind, fields)

    def receive(self) -> Received:
        """Wait for the next message.

        Raises:
            ChannelClosed: The other end is gone.
            ChannelError: What came was altered on its way, or is nothing that the other end may say.
        """
        return self._hears.decode(self.channel.receive())


def to_worker(channel: Channel) -> Line:
    """Return a driver's end."""
    return Line(channel, TO_WORKER, TO_DRIVER)


def to_driver(channel: Channel) -> Line:
    """Return a worker's end."""
    return Line(channel, TO_DRIVER, TO_WORKER)
