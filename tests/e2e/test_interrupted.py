"""A run that ends before it has begun leaves workers that are free."""

import time

import pytest
from torch import nn

from skippipe_plugin.engine import phases
from skippipe_plugin.engine.control.commands import Warm
from skippipe_plugin.engine.handover import pack_blocks
from skippipe_plugin.engine.phases import Moment, Phase
from skippipe_plugin.job.job import driver_jobs

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import train


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
