"""A run that ends before it has begun leaves workers that are free; one that ends as it ends leaves a whole model."""

import os
import signal
import time
from collections.abc import Iterator

import pytest
from torch import nn

from skippipe_plugin.engine import phases
from skippipe_plugin.engine.control.commands import Warm
from skippipe_plugin.engine.handover import pack_blocks
from skippipe_plugin.engine.phases import Moment, Phase
from skippipe_plugin.job.job import driver_jobs
from skippipe_plugin.model.interrupts import interrupts_follow

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import assert_same_weights, train


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal: what a shell starts in the background ignores it, and so would this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class StopError(Exception):
    """What stops a run, as Ctrl-C does."""


def stop(moment: Moment) -> None:
    if moment.phase is Phase.FORMING:
        raise StopError


def test_workers_do_not_wait_for_a_driver_that_has_stopped_as_it_connected() -> None:
    """They would for minutes, and the next run of the process for them, as long as somebody keeps the error."""
    with phases.watching(stop), pytest.raises(StopError) as raised:
        train(lambda: LanguageModel(Transformer()), loader(tokens(8)), 3)
    (job,) = driver_jobs()
    links = job.idle()
    assert len(links) >= 2
    blocks, blobs = pack_blocks({0: nn.Linear(1, 1)})
    for link in links:
        link.warm = False
        link.tell(Warm([], blocks, blobs))
    deadline = time.monotonic() + 15
    while not all(link.warm for link in links):
        assert time.monotonic() < deadline, "a worker is at something else"
        time.sleep(0.02)
    assert raised.tb is not None, "what the run had is there still"


def test_ctrl_c_as_the_weights_come_back_leaves_the_model_whole() -> None:
    """The run ends as Lightning lets an interrupted one end, by ``SystemExit``."""
    expected = train(lambda: LanguageModel(Transformer()), loader(tokens(8)), 1).weights
    made: list[LanguageModel] = []

    def make() -> LanguageModel:
        made.append(LanguageModel(Transformer()))
        return made[-1]

    def press(moment: Moment) -> None:
        if moment.phase is Phase.ENDING:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    try:
        with phases.watching(press), pytest.raises((KeyboardInterrupt, SystemExit)):
            train(make, loader(tokens(8)), 3)
    finally:
        signal.signal(signal.SIGINT, before)  # Lightning ignores it from then on
    assert_same_weights(made[-1].state_dict(), expected)
    assert train(lambda: made[-1], loader(tokens(8)), 3).losses, "it can be trained again"


def test_a_second_ctrl_c_does_not_wait() -> None:
    done = []

    def press_twice() -> None:
        with interrupts_follow():
            os.kill(os.getpid(), signal.SIGINT)
            done.append("first")
            os.kill(os.getpid(), signal.SIGINT)
            done.append("second")

    with pytest.raises(KeyboardInterrupt):
        press_twice()
    assert done == ["first"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
