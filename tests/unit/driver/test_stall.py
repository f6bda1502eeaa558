"""All wait for each other and nothing is on its way: only then a message is lost."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from skippipe_plugin.driver.recovery import heartbeat
from skippipe_plugin.driver.recovery.heartbeat import Stall


@dataclass
class Worker:
    turn: int

    def waits(self) -> int:
        return self.turn


@dataclass
class Driver:
    turn: int


@dataclass
class Links:
    waiting: Driver
    workers: list[Worker] = field(default_factory=list)
    generation: int = 3

    def __iter__(self) -> Any:
        return iter(self.workers)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    answer = [True]
    monkeypatch.setattr(heartbeat, "nothing_is_under_way", lambda: answer[0])
    return answer


def looks(links: Links, stall: Stall, times: int = 6) -> list[bool]:
    return [stall.lasts(links, 3) for _ in range(times)]


def test_it_is_told_once_when_it_has_lasted(quiet: list[bool]) -> None:
    links, stall = Links(Driver(5), [Worker(1), Worker(7)]), Stall()
    assert looks(links, stall) == [False, False, False, True, False, False]


@pytest.mark.parametrize("links", [Links(Driver(0), [Worker(1)]), Links(Driver(4), [Worker(1), Worker(0)])])
def test_who_computes_is_waited_for(links: Links, quiet: list[bool]) -> None:
    assert not any(looks(links, Stall(), 20))


def test_a_message_on_its_way_is_waited_for(quiet: list[bool]) -> None:
    quiet[0] = False
    assert not any(looks(Links(Driver(5), [Worker(1)]), Stall(), 20))


def test_whoever_goes_on_ends_it(quiet: list[bool]) -> None:
    links, stall = Links(Driver(5), [Worker(1), Worker(7)]), Stall()
    for turn in range(1, 20):
        links.workers[0].turn = turn
        assert looks(links, stall, 3) == [False] * 3


def test_another_generation_begins_anew(quiet: list[bool]) -> None:
    links, stall = Links(Driver(5), [Worker(1)]), Stall()
    assert looks(links, stall, 3) == [False] * 3
    links.generation += 1
    assert looks(links, stall, 4) == [False, False, False, True]


def test_a_driver_without_workers_waits_for_nobody(quiet: list[bool]) -> None:
    assert not any(looks(Links(Driver(5)), Stall(), 20))
