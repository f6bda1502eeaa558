"""What a driver says of a step, and how far it runs ahead of the schedule to say it in few messages."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from skippipe_plugin.driver.capture.entered import EnteredStack
from skippipe_plugin.driver.capture.graphs import AroundTheBlocks
from skippipe_plugin.driver.capture.side_inputs import PreparedCall
from skippipe_plugin.driver.capture.stack_call import StackCall
from skippipe_plugin.driver.capture.suspend import StepThreads, current_thread
from skippipe_plugin.driver.steps import StepRun, StepTask
from skippipe_plugin.engine.call import Ambient
from skippipe_plugin.engine.errors import SkipPipeError

AMBIENT = Ambient(grad=True, inference=False, autocast=())


class Writer:
    """Keeps what is announced."""

    round_trip_s = 0.0

    def __init__(self) -> None:
        self.announced: list[list[int]] = []

    def prepare(self, microbatch: int, *_: Any) -> PreparedCall:
        return PreparedCall(microbatch, SimpleNamespace(microbatch=microbatch, spec=SimpleNamespace(carried=())), 0, ())

    def send(self, step: int, calls: list[PreparedCall], *_: Any) -> None:
        self.announced.append([call.microbatch for call in calls])


class Proxies:
    """Blocks of which nothing is asked."""

    names = ("blocks.0",)

    def begin_step(self) -> None:
        pass

    def check_complete(self, thread: object) -> None:
        pass

    def explaining(self, function: Callable[[], Any]) -> Callable[[], Any]:
        return function

    def note_announced(self) -> None:
        """Nothing is asked of workers here."""


class Clock:
    """Time that passes only when somebody works."""

    now_s = 0.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("skippipe_plugin.driver.steps.time", clock)
    return clock


@pytest.fixture
def threads() -> Iterator[StepThreads]:
    threads = StepThreads()
    yield threads
    threads.close()


class Steps:
    """A step of eight microbatches whose functions only call the blocks."""

    def __init__(
        self,
        threads: StepThreads,
        clock: Clock,
        first: int = 0,
        embedding_s: float = 0.0001,
        took_s: Sequence[float] = (),
        size: int = 1 << 16,
    ) -> None:
        self.started: list[int] = []
        self.clock, self.first, self.embedding_s, self.size = clock, first, embedding_s, size
        self.writer = Writer()
        task = StepTask([lambda i=i: self.step(i) for i in range(8)], [1 / 8] * 8, lambda loss: loss, 0, training=True)
        self.run = StepRun(
            task,
            first=first,
            threads=threads,
            proxies=Proxies(),
            writer=self.writer,
            device=torch.device("cpu"),
            ambient=AMBIENT,
            took_s=deque(took_s),
            around=AroundTheBlocks(),
        )

    def step(self, index: int) -> torch.Tensor | None:
        self.started.append(index)
        self.clock.now_s += self.embedding_s
        return current_thread().suspend(StackCall(EnteredStack(torch.full((self.size,), float(index))), AMBIENT))

    def open(self, ahead: bool = True) -> None:
        coming = range(self.first, self.first + 8) if ahead else ()
        self.run.open(1, [None] * (self.first + 8), {"program": "training"}, coming, most_ahead=3)

    def embed(self, *indices: int) -> None:
        for index in indices:
            call, hidden = self.run.embed(self.first + index)
            assert call.microbatch == self.first + index
            assert hidden.shape == (self.size,)
            assert (hidden == index).all()


def test_calls_are_made_ahead_of_their_turns_when_all_that_were_ahead_have_had_theirs(
    threads: StepThreads, clock: Clock
) -> None:
    steps = Steps(threads, clock)
    steps.open()
    steps.embed(0)
    assert steps.started == [0, 1, 2, 3]
    steps.embed(1, 2)
    steps.run.announce()
    assert steps.writer.announced == [[0, 1, 2, 3]]
    steps.run.backward(0, None)
    steps.embed(3)
    steps.run.announce()
    assert steps.writer.announced == [[0, 1, 2, 3], [4, 5, 6]]
    steps.embed(4, 5, 6, 7)
    steps.run.announce()
    assert steps.writer.announced == [[0, 1, 2, 3], [4, 5, 6], [7]]


def test_twice_as_many_are_ahead_where_they_are_little(threads: StepThreads, clock: Clock) -> None:
    steps = Steps(threads, clock, size=2)
    steps.open()
    steps.embed(0, 1, 2, 3)
    steps.run.announce()
    assert steps.writer.announced == [[0, 1, 2, 3, 4, 5, 6]]


def test_an_embedding_that_takes_its_time_keeps_its_turn(threads: StepThreads, clock: Clock) -> None:
    steps = Steps(threads, clock, embedding_s=0.005)
    steps.open()
    for index in range(3):
        steps.embed(index)
        steps.run.announce()
        assert steps.started == list(range(index + 1))


def test_a_busy_machine_does_not_make_an_embedding_slow(threads: StepThreads, clock: Clock) -> None:
    steps = Steps(threads, clock, embedding_s=0.005, took_s=[0.0001])
    steps.open()
    steps.embed(0)
    assert steps.started == [0, 1, 2, 3]


def test_a_step_that_is_measured_embeds_each_microbatch_in_its_turn(threads: StepThreads, clock: Clock) -> None:
    steps = Steps(threads, clock)
    steps.open(ahead=False)
    steps.embed(0, 1, 2)
    steps.run.announce()
    assert steps.started == [0, 1, 2]


def test_a_further_driver_looks_ahead_among_its_own(threads: StepThreads, clock: Clock) -> None:
    steps = Steps(threads, clock, first=8)
    steps.open()
    steps.embed(0, 1)
    steps.run.announce()
    assert steps.writer.announced == [[8, 9, 10, 11]]


def test_a_function_without_a_loss_is_found_ahead_too(threads: StepThreads, clock: Clock) -> None:
    steps = Steps(threads, clock)
    steps.step = lambda index: None if index == 3 else Steps.step(steps, index)
    steps.open()
    with pytest.raises(SkipPipeError, match="a loss for some microbatches and None for others"):
        steps.embed(0)
