"""A broken connection is seen before its cause is known: the cause is what must be raised."""

import threading

import pytest

from skippipe_plugin.driver import links
from skippipe_plugin.driver.links import Link, Links
from skippipe_plugin.engine.channel import ChannelClosed, Message
from skippipe_plugin.engine.errors import ConnectionsBroken, StageLostError


class Peer:
    """A channel that breaks when it is told to."""

    peer, is_local = "127.0.0.1:5", True

    def __init__(self) -> None:
        self.broken = threading.Event()
        self.heard_s = 0.0

    def receive(self) -> Message:
        self.broken.wait()
        raise ChannelClosed("closed")

    def send(self, *_: object, **__: object) -> None:
        """Take a farewell."""

    def send_if_free(self, *_: object) -> bool:
        """Take a sign of life."""
        return True

    def close(self) -> None:
        self.broken.set()


def test_a_cause_that_comes_later_is_waited_for() -> None:
    peer, board = Peer(), Links()
    board.add(1, [1], Link(peer))
    threading.Timer(0.1, peer.broken.set).start()
    with pytest.raises(StageLostError, match="worker rank 1 "):
        board.raise_cause()


def test_a_cause_that_never_comes_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "_CAUSE_S", 0.05)
    with pytest.raises(ConnectionsBroken, match="a connection of the driver and driver 3 broke"):
        Links().raise_cause((3,))
