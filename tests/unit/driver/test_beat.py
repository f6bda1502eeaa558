"""Signs of life: who answers is never given up, who does not is, and a question too early or lost does no harm."""

import threading
import time
from collections.abc import Callable

import pytest

from skippipe_plugin.driver.links import Link
from skippipe_plugin.engine.channel import ChannelClosed, Message
from skippipe_plugin.engine.control.commands import Get

PATIENCE = 5


class Peer:
    """A channel whose other end answers as it is told, within the very call that asks."""

    peer, is_local = "127.0.0.1:5", True

    def __init__(self, answers: Callable[[int], bool], free: bool = True) -> None:
        self.answers, self.free = answers, free
        self.asked = 0
        self.heard_s = 0.0
        self.closed = threading.Event()

    def send_if_free(self, kind: str, fields: object) -> bool:
        assert kind == "Beat"
        if not self.free:
            return False
        self.asked += 1
        if self.answers(self.asked):
            self.heard_s = time.monotonic()
        return True

    def receive(self) -> Message:
        self.closed.wait()
        raise ChannelClosed("closed")

    def close(self) -> None:
        self.closed.set()

    def hang_up(self, kind: str, fields: object) -> None:
        assert kind == "Refuse"
        self.close()

    def send(self, *_: object, **__: object) -> None:
        raise ChannelClosed("closed")


def lives_through(peer: Peer, calls: int = 50) -> bool:
    link = Link(peer)
    for _ in range(calls):
        link.beat(PATIENCE)
    alive = not peer.closed.is_set()
    link.close()
    return alive


@pytest.mark.parametrize("every", range(1, PATIENCE + 1))
def test_who_answers_in_time_lives(every: int) -> None:
    assert lives_through(Peer(lambda number: number % every == 0))


def test_who_never_answers_is_given_up_after_that_many_looks() -> None:
    peer = Peer(lambda number: False)
    link = Link(peer)
    for _ in range(PATIENCE):
        link.beat(PATIENCE)
    assert not peer.closed.is_set()
    link.beat(PATIENCE)
    assert peer.closed.is_set()
    link.close()
    assert link.how_lost == "it gave no sign of life"


def test_who_is_gone_already_keeps_its_cause() -> None:
    peer = Peer(lambda number: False)
    link = Link(peer)
    peer.close()
    link.tell(Get("weights"))
    cause = link.how_lost
    for _ in range(2 * PATIENCE):
        link.beat(PATIENCE)
    link.close()
    assert link.how_lost == cause != "it gave no sign of life"


def test_who_was_never_asked_is_not_given_up() -> None:
    assert lives_through(Peer(lambda number: False, free=False))
