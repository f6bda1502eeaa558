"""Idle workers that sleep are not taken, and connections that break between the living are no deaths."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from skippipe_plugin.driver import links as links_module
from skippipe_plugin.driver import pool as pool_module
from skippipe_plugin.driver.links import Link, Links
from skippipe_plugin.driver.pool import WorkerPool
from skippipe_plugin.driver.recovery import heartbeat as heartbeat_module
from skippipe_plugin.driver.recovery.heartbeat import Heartbeat
from skippipe_plugin.driver.recovery.losses import MAX_LOSSES, Losses
from skippipe_plugin.engine.channel import Channel, ChannelError, connect
from skippipe_plugin.engine.control.answers import Failed
from skippipe_plugin.engine.control.line import to_driver
from skippipe_plugin.engine.control.presence import Beat, Hello
from skippipe_plugin.engine.errors import ConnectionsBroken, SkipPipeError, StageLostError
from skippipe_plugin.engine.versions import own_versions

pytestmark = pytest.mark.alone


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    pool = WorkerPool("127.0.0.1", join_timeout_s=5)
    yield pool
    pool.close()


@pytest.fixture
def join(pool: WorkerPool) -> Iterator[Callable[[bool], Channel]]:
    """Lets a worker join that is awake (answers), or not."""
    channels: list[Channel] = []

    def serve(channel: Channel, awake: bool) -> None:
        line = to_driver(channel)
        try:
            while True:
                if isinstance(line.receive().body, Beat) and awake:
                    line.send_if_free(Beat())
        except ChannelError:
            pass

    def start(awake: bool) -> Channel:
        before = len(pool.links)
        channel = connect(*pool.address, bytes.fromhex(pool.secret))
        channels.append(channel)
        to_driver(channel).send(Hello(own_versions()))
        deadline = time.monotonic() + 5
        while len(pool.links) == before and time.monotonic() < deadline:
            time.sleep(0.01)
        threading.Thread(target=serve, args=(channel, awake), daemon=True).start()
        return channel

    yield start
    for channel in channels:
        channel.close()


def test_who_sleeps_is_not_idle(
    pool: WorkerPool, join: Callable[[bool], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_AWAKE_S", 0.3)
    join(False)
    join(True)
    pool.rouse(2)
    assert len(pool.resting()) == 2
    assert len(pool.idle()) == pool.num_idle == 1
    assert pool.acquire(1)[0].is_awake
    with pytest.raises(SkipPipeError, match=r"0 of 1 workers joined"):
        pool.acquire(1)


def test_a_question_that_found_the_line_busy_is_asked_again(
    pool: WorkerPool, join: Callable[[bool], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever was being told something else is awake, and nobody needs to take its place."""
    usual, asked = Channel.send_if_free, list[Channel]()

    def busy_at_first(channel: Channel, *message: Any) -> bool:
        asked.append(channel)
        return asked.count(channel) > 1 and usual(channel, *message)

    join(True)
    monkeypatch.setattr(Channel, "send_if_free", busy_at_first)
    pool.rouse(1)
    assert pool.num_idle == 1


def test_nobody_is_waited_for_where_enough_are_awake(pool: WorkerPool, join: Callable[[bool], Channel]) -> None:
    for awake in (False, True, True):
        join(awake)
    begun_s = time.monotonic()
    pool.rouse(2)
    assert time.monotonic() - begun_s < 1.0
    assert len(pool.idle()) == 2


def test_an_idle_worker_that_is_silent_is_given_up(pool: WorkerPool, join: Callable[[bool], Channel]) -> None:
    join(False)
    join(True)
    ended: list[Link] = []
    heartbeat = Heartbeat(Links(), 0.5, pool.resting, ended.append)
    deadline = time.monotonic() + 10
    while not ended and time.monotonic() < deadline:
        time.sleep(0.05)
    heartbeat.close()
    assert len(ended) == 1
    assert ended[0].how_lost == "it gave no sign of life"
    while len(pool.resting()) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)  # the reader sees that its connection is closed
    assert len(pool.resting()) == 1


def test_a_source_that_fails_stops_neither_heartbeat_nor_door(
    pool: WorkerPool, join: Callable[[bool], Channel], caplog: pytest.LogCaptureFixture
) -> None:
    class Door:
        looked = 0

        def greet(self, link: Link) -> None: ...

        def look(self, links: object) -> None:
            self.looked += 1
            raise OSError("no scheduler answers")

    door, asked = Door(), []

    def fence(link: Link) -> None:
        asked.append(link)
        raise OSError("no scheduler answers")

    pool._doorkeeper = door
    join(False)
    join(False)
    heartbeat, deadline = Heartbeat(Links(), 0.5, pool.resting, fence), time.monotonic() + 10
    while (len(asked) < 2 or door.looked < 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    heartbeat.close()
    assert len({id(link) for link in asked}) == 2
    join(True)  # still lets in
    said = [record.message for record in caplog.records]
    assert sum("does not say who is gone: OSError: no scheduler answers" in each for each in said) == 1
    assert sum("could not be ended: OSError" in each for each in said) == 2


def board_of_two(pool: WorkerPool, join: Callable[[bool], Channel]) -> Links:
    """Links to two workers that answer nothing."""
    board = Links()
    for _ in range(2):
        join(False)
    for rank, link in enumerate(pool.resting()):
        board.add(rank, [rank + 1], link)
    return board


def test_everybody_at_once_is_not_everybody_dead(
    pool: WorkerPool, join: Callable[[bool], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver's own link is away; after a while longer it is everybody after all."""
    monkeypatch.setattr(heartbeat_module, "ALL_SILENT_S", 1.0)
    board = board_of_two(pool, join)
    heartbeat, begun_s = Heartbeat(board, 0.5), time.monotonic()
    while not board.lost and time.monotonic() - begun_s < 10:
        time.sleep(0.05)
    heartbeat.close()
    assert 1.4 < time.monotonic() - begun_s < 9


def test_who_is_heard_first_when_the_link_is_back_condemns_nobody(
    pool: WorkerPool, join: Callable[[bool], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat_module, "ALL_SILENT_S", 30.0)
    board = board_of_two(pool, join)
    heartbeat, begun_s = Heartbeat(board, 0.5), time.monotonic()
    while time.monotonic() - begun_s < 3:
        if time.monotonic() - begun_s > 1.5:
            board[0]._channel.heard_s = time.monotonic()
        time.sleep(0.01)
    heartbeat.close()
    assert board[1].num_unanswered > 5
    assert not board.lost


def test_who_is_silent_when_a_connection_breaks_is_the_cause(
    pool: WorkerPool, join: Callable[[bool], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that was cut off: the others' connections to it break before the driver's own, which had less to say."""
    monkeypatch.setattr(links_module, "_CAUSE_S", 0.4)
    channels = [join(awake) for awake in (True, True, False)]
    board = Links()
    for rank, link in enumerate(pool.resting()):
        board.add(rank, [rank + 1], link)
    for channel in channels[:2]:
        to_driver(channel).send(Failed(True, ""), answers=-1, generation=0)
    with pytest.raises(StageLostError, match=r"\(stage 3\) is gone: it gave no sign of life when a connection broke"):
        board.raise_cause()


def test_a_driver_that_nobody_answers_blames_nobody(
    pool: WorkerPool, join: Callable[[bool], Channel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links_module, "_CAUSE_S", 0.2)
    monkeypatch.setattr(links_module, "ALL_SILENT_S", 1.0)
    channels = [join(False) for _ in range(2)]
    board = Links()
    for rank, link in enumerate(pool.resting()):
        board.add(rank, [rank + 1], link)
    to_driver(channels[0]).send(Failed(True, ""), answers=-1, generation=0)
    begun_s = time.monotonic()
    while not board.failed and time.monotonic() - begun_s < 5:
        time.sleep(0.01)  # what it says later would be a sign of life
    with pytest.raises(ConnectionsBroken):
        board.raise_cause()
    assert time.monotonic() - begun_s > 1.0
    assert not any(link.gone for link in pool.links)


def test_a_break_between_the_living_is_found_at_once(pool: WorkerPool, join: Callable[[bool], Channel]) -> None:
    channels = [join(True) for _ in range(3)]
    board = Links()
    board.recovering = True
    for rank, link in enumerate(pool.acquire(3)):
        board.add(rank, [rank + 1], link)
    for channel in channels[:2]:
        to_driver(channel).send(Failed(True, ""), answers=-1, generation=0)
    begun_s = time.monotonic()
    with pytest.raises(ConnectionsBroken, match=r"worker rank \d .* and worker rank \d .* broke, but no worker ended"):
        board.raise_cause()
    assert time.monotonic() - begun_s < 3


def test_a_break_is_a_death_where_somebody_died(pool: WorkerPool, join: Callable[[bool], Channel]) -> None:
    channels = [join(True), join(False)]
    board = Links()
    board.recovering = True
    for rank, link in enumerate(pool.resting()):
        board.add(rank, [rank + 1], link)
    to_driver(channels[0]).send(Failed(True, ""), answers=-1, generation=0)
    threading.Timer(0.4, channels[1].close).start()
    with pytest.raises(StageLostError, match="is gone"):
        board.raise_cause()


def test_breaks_have_an_end() -> None:
    losses = Losses()
    for _ in range(MAX_LOSSES):
        losses.note_break(ConnectionsBroken("once more"))
    with pytest.raises(ConnectionsBroken, match="broke 6 times, and nothing was finished in between"):
        losses.note_break(ConnectionsBroken("once more"))
    losses.forget()
    losses.note_break(ConnectionsBroken("much later"))


def test_two_that_break_apart_again_and_again_are_no_pair() -> None:
    losses, of_pair, of_others = Losses(), ConnectionsBroken("once more", (2, 1)), ConnectionsBroken("too", (1, 3))
    found = []
    for error in (of_pair, of_others, ConnectionsBroken("by whom?"), of_pair, ConnectionsBroken("again", (1, 2))):
        losses.note_break(error)
        found.append(losses.parted())
    assert found == [(), (), (), (), (1, 2)]
    for _ in range(2):
        losses.note_break(of_pair)
        assert not losses.parted()
    losses.forget()
    losses.note_break(of_pair)
    assert not losses.parted()


def test_who_cannot_be_greeted_closes_the_door_to_nobody(
    pool: WorkerPool, join: Callable[[bool], Channel], caplog: pytest.LogCaptureFixture
) -> None:
    class Door:
        greeted = 0

        def greet(self, link: Link) -> None:
            self.greeted += 1
            if self.greeted == 1:
                raise OSError("no record of it")

        def look(self, links: object) -> None: ...

    pool._doorkeeper = Door()
    refused = connect(*pool.address, bytes.fromhex(pool.secret))
    to_driver(refused).send(Hello(own_versions()))
    with pytest.raises(ChannelError):
        to_driver(refused).receive()
    join(True)
    assert pool.num_idle == 1
    assert "could not be let in" in caplog.text
