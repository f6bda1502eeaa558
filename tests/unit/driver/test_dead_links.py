"""A link is dead where one end waits for what the other has sent and no byte moves: only then, and without more."""

import socket
import sys
from collections.abc import Iterator

import pytest

from skippipe_plugin.driver.breaks import Breaks
from skippipe_plugin.driver.recovery.dead_links import DeadLink, DeadLinks
from skippipe_plugin.engine import traffic as traffic_module
from skippipe_plugin.engine.control.answers import Failed
from skippipe_plugin.engine.control.presence import Progress
from skippipe_plugin.engine.traffic import Traffic, Transfer
from skippipe_plugin.engine.waiting import Waiting

PATIENCE = 3
MESSAGE = Transfer(5, "", 2, 17, 1)
"""From rank 1 to rank 2."""
SUM = Transfer(5, "stage1", -1, -1, 4)


def waits(*ranks: int, turn: int = 7, moved: int = 100, transfer: Transfer = MESSAGE) -> Progress:
    return Progress(turn, transfer, list(ranks), moved)


def begun(*transfers: Transfer) -> Progress:
    return Progress(3, begun=list(transfers))


def test_what_was_sent_and_does_not_come_is_found_with_both_ends() -> None:
    links, said = DeadLinks(PATIENCE), {2: waits(1), 1: begun(MESSAGE)}
    assert [links.look(said) for _ in range(4)] == [None, None, None, DeadLink(waiting=2, sender=1)]
    assert links.transfers_of(1) == [MESSAGE]
    assert not links.transfers_of(2)


@pytest.mark.parametrize(
    "sender",
    [
        {},  # it does not answer, or is another driver, which sees this itself
        {1: begun()},  # it computes still
        {1: begun(Transfer(5, "", 2, 17, 0))},
        {1: begun(Transfer(4, "", 2, 17, 1))},
    ],
)
def test_what_was_not_sent_is_waited_for(sender: dict[int, Progress]) -> None:
    links = DeadLinks(PATIENCE)
    assert not any(links.look({2: waits(1), **sender}) for _ in range(20))


def test_a_slow_link_is_waited_for() -> None:
    links = DeadLinks(PATIENCE)
    assert not any(links.look({2: waits(1, moved=100 + look), 1: begun(MESSAGE)}) for look in range(20))


def test_who_goes_on_is_waited_for() -> None:
    links = DeadLinks(PATIENCE)
    assert not any(links.look({2: waits(1, turn=turn), 1: begun(MESSAGE)}) for turn in range(1, 20))


def test_where_nobody_can_tell_whether_bytes_move_nothing_is_found() -> None:
    links = DeadLinks(PATIENCE)
    assert not any(links.look({2: waits(1, moved=0), 1: begun(MESSAGE)}) for _ in range(20))


def test_answers_that_are_late_count_for_nothing() -> None:
    links = DeadLinks(PATIENCE)
    both, one = {2: waits(1), 1: begun(MESSAGE)}, {1: begun(MESSAGE)}
    assert [links.look(said) for said in (both, one, both, one, both, one)] == [None] * 6
    assert links.look(both) == DeadLink(2, 1)


def test_an_operation_of_several_ranks_is_dead_when_all_have_begun_it() -> None:
    said = {rank: waits(*({1, 2, 3} - {rank}), transfer=SUM) for rank in (1, 2, 3)}
    links = DeadLinks(PATIENCE)
    assert not any(links.look(said) for _ in range(20))
    said = {rank: Progress(each.turn, each.awaited, each.ranks, 100, [SUM]) for rank, each in said.items()}
    assert [found for found in (links.look(said) for _ in range(PATIENCE)) if found] == [DeadLink(1, 2)]


def test_both_ends_count_alike() -> None:
    one, other = Traffic(1, 5), Traffic(2, 5)
    first, second = other.receive(1, 17)(), other.receive(1, 17)()
    assert (first.ranks, second.transfer) == ([1], Transfer(5, "", 2, 17, 2))
    for sent, expected in enumerate([(False, False), (True, False), (True, True)]):
        assert (one.has_begun(first.transfer), one.has_begun(second.transfer)) == expected, sent
        one.send(2, 17)
    assert not Traffic(1, 6).has_begun(first.transfer)
    summed = one.meet("stage1", (1, 2))()
    assert not other.has_begun(summed.transfer)
    other.meet("stage1", (1, 2))
    assert other.has_begun(summed.transfer)


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of one connection, the only one that is looked at."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as one:
        one.connect(server.getsockname())
        other, _ = server.accept()
        with other:
            monkeypatch.setattr(traffic_module, "sockets_among", lambda _: iter([(one.fileno(), one)]))
            yield one, other


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell")
def test_bytes_are_counted_in_both_directions(pair: tuple[socket.socket, socket.socket]) -> None:
    one, other = pair
    before = Traffic(1, 5).num_moved()
    other.sendall(b"word")
    assert one.recv(4) == b"word"
    assert Traffic(1, 5).num_moved() == before + 4
    one.sendall(b"answer")
    assert other.recv(6) == b"answer"
    assert Traffic(1, 5).num_moved() == before + 10


def test_what_a_rank_waits_for_is_said_only_while_it_waits() -> None:
    waiting = Waiting()
    traffic = waiting.traffic = Traffic(2, 5)
    awaited = traffic.receive(1, 17)
    waiting.begin(awaited)
    assert waiting.progress() == Progress(1, awaited().transfer, [1], 0, [])
    waiting.end()
    assert waiting.progress() == Progress(0, begun=[])
    with waiting:  # for a message on the control channel
        assert waiting.progress() == Progress(2, begun=[])


@pytest.mark.parametrize(
    ("reports", "named"),
    [
        ([(3, Failed(True, "")), (1, Failed(True, "", awaited=2))], "a connection of worker 1 and worker 2 broke"),
        ([(3, Failed(True, "", awaited=0))], "a connection of worker 3 and the driver broke"),
        ([(3, Failed(True, "")), (1, Failed(True, ""))], "a connection of worker 3 and worker 1 broke"),
        ([(3, Failed(True, "", given_up_by=0))], "a connection of worker 3 broke"),
        ([(3, Failed(True, "", given_up_by=1))], "driver 1 has given this step up"),
        ([], "a connection of the driver and worker 2 broke"),
    ],
)
def test_who_has_seen_a_break_knows_both_ends(reports: list[tuple[int, Failed]], named: str) -> None:
    breaks = Breaks(Waiting(), lambda rank: f"worker {rank}" if rank else None)
    for rank, failed in reports:
        breaks.note(rank, failed)
    assert str(breaks.error([2])).startswith(named)
