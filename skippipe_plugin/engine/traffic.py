"""What a rank exchanges with others in one generation: what it has begun, what it waits for, whether bytes move.

Nobody tells the ends of a cable that it was cut, and gloo forgets messages whose connection breaks as they are written.
Both show in the same way: one rank waits for what another has sent, and no byte moves.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from .own_files import OpenFile, open_files, sockets_among

_ACKED_AT: Final = 120
"""Where Linux keeps tcpi_bytes_acked in struct tcp_info, with tcpi_bytes_received behind it."""
_ONE: Final = 8
"""Bytes of each."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """A message, or an operation of several ranks: the how-many-eth of its kind in its generation."""

    generation: int
    group: str
    """Whose operation it is; empty for a message."""
    destination: int
    tag: int
    nth: int


@dataclass(frozen=True, slots=True)
class Awaited:
    """What a rank waits for."""

    transfer: Transfer
    ranks: Sequence[int]
    """Who has to begin it too."""


class Traffic:
    """The transfers of one rank in one generation.

    Args:
        rank: This rank.
        generation: The number of the generation.
    """

    def __init__(self, rank: int, generation: int) -> None:
        self.rank = rank
        self._generation = generation
        self._begun: dict[tuple[str, int, int], int] = {}
        """How often, by group, destination and tag."""
        self._expected: dict[tuple[int, int], int] = {}
        """How often, by source and tag."""
        self.connections: set[OpenFile] = set()
        """What carries them."""

    def send(self, destination: int, tag: int) -> None:
        """Note a message that was sent."""
        key = ("", destination, tag)
        self._begun[key] = self._begun.get(key, 0) + 1

    def receive(self, source: int, tag: int) -> Callable[[], Awaited]:
        """Note a message that was asked for, and return what names it.

        Messages of one link and tag come in the order in which they are sent.
        """
        nth = self._expected[source, tag] = self._expected.get((source, tag), 0) + 1
        return functools.partial(self._awaited, "", self.rank, tag, nth, (source,))

    def meet(self, group: str, ranks: Sequence[int]) -> Callable[[], Awaited]:
        """Note that an operation of several ranks was begun here, and return what names it."""
        key = (group, -1, -1)
        nth = self._begun[key] = self._begun.get(key, 0) + 1
        return functools.partial(self._awaited, *key, nth, ranks)

    def _awaited(self, group: str, destination: int, tag: int, nth: int, ranks: Sequence[int]) -> Awaited:
        others = [rank for rank in ranks if rank != self.rank]
        return Awaited(Transfer(self._generation, group, destination, tag, nth), others)

    def has_begun(self, transfer: Transfer) -> bool:
        """Whether this rank has done its part in what another one waits for."""
        key = (transfer.group, transfer.destination, transfer.tag)
        return transfer.generation == self._generation and self._begun.get(key, 0) >= transfer.nth

    def num_moved(self) -> int:
        """How many bytes have come or were taken by others so far; 0 where nobody can tell."""
        if not sys.platform.startswith("linux"):
            return 0
        return sum(map(_moved_by, (copy for _, copy in sockets_among(self.connections & open_files()))))


def _moved_by(connection: socket.socket) -> int:
    with contextlib.suppress(OSError):  # closed by now
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _ACKED_AT + 2 * _ONE)
        acked, received = info[_ACKED_AT : _ACKED_AT + _ONE], info[_ACKED_AT + _ONE :]
        return int.from_bytes(acked, sys.byteorder) + int.from_bytes(received, sys.byteorder)
    return 0
