"""What a fault does in each phase of a run: the cells of the table in the guide are the tests."""

import functools
import re
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import stop_workers
from skippipe_plugin.testing import At, Cut, Fault, FillDisk, Injector, Kill, Phase, RefuseStart, Reset, Stop

from .models import tokens
from .modules import loader
from .support import Run, assert_same_losses, assert_same_run, assert_same_weights
from .test_recovery import BATCH, assert_counted, kill, run
from .test_recovery import At as Do

GUIDE = Path(__file__).parents[2] / "docs/guide/recovery.md"
EXACT = {"driver", "relieved", "replica"}
ESTIMATES = {"neighbours", "copy", "estimate"}

PHASES: dict[str, At] = {
    "starting": At(Phase.STARTING),
    "meeting": At(Phase.MEETING),
    "forming": At(Phase.FORMING),
    "handing over": At(Phase.HANDING_OVER, nth=2),
    "probing": At(Phase.PROBING),
    "planning": At(Phase.PLANNING, nth=3),
    "training, as a step begins": At(Phase.TRAINING, step=3),
    "training, forward": At(Phase.TRAINING, step=3, action="0F2"),
    "training, loss": At(Phase.TRAINING, step=3, action="0L1"),
    "training, backward": At(Phase.TRAINING, step=3, action="0B1"),
    "merging": At(Phase.MERGING, nth=4),
    "stepping": At(Phase.STEPPING, nth=4),
    "validating": At(Phase.VALIDATING),
    "saving": At(Phase.SAVING),
    "taking over": At(Phase.TAKING_OVER),
    "moving": At(Phase.MOVING),
    "ending": At(Phase.ENDING),
    "between": At(Phase.BETWEEN),
}
IDLE = {"meeting", "between"}
"""When no worker is used: the victims are idle ones."""
FAULTS: dict[str, Callable[[At, bool], list[Fault]]] = {
    "killed": lambda at, idle: [Kill(at, "spare" if idle else 2)],
    "stopped for 1 s": lambda at, idle: [Stop(at, "spare" if idle else 2, 1.0)],
    "stopped": lambda at, idle: [Stop(at, "spare" if idle else 2)],
    "cut for 1 s": lambda at, idle: [Cut(at, (1, 2), 1.0)],
    "cut": lambda at, idle: [Cut(at, (1, 2))],
    "reset": lambda at, idle: [Reset(at, (1, 2))],
    "killed, start refused": lambda at, idle: [Kill(at, "spare" if idle else 2), RefuseStart(at)],
    "no start at all": lambda at, idle: [RefuseStart(at, count=1000), *([] if idle else [Kill(at, 2)])],
    "disk full": lambda at, idle: [FillDisk(at)],
}
ORDINARY = {
    ("training, backward", "reset"),
    ("saving", "disk full"),
}
"""What the ordinary run tries."""


def cells() -> Iterator[object]:
    """Read the table of the guide."""
    lines = GUIDE.read_text().partition("## What happens when")[2].splitlines()
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines if line.startswith("| ")]
    (_, *faults), _, *rows = rows
    assert set(faults) == set(FAULTS)
    assert {phase for phase, *_ in rows} == {*PHASES, "exporting"}
    for phase, *outcomes in rows:
        for fault, outcome in zip(faults, outcomes, strict=True):
            if outcome != "-" and phase != "exporting":
                marks = [] if (phase, fault) in ORDINARY else [pytest.mark.slow]
                yield pytest.param(phase, fault, outcome, marks=marks, id=f"{phase}-{fault}")


def attempt(phase: str, fault: str) -> tuple[Run, StageRecovery, Injector]:
    """Train with a fault, or with none."""
    before: list[Fault] = []
    settings = {"heartbeat_s": 3.0 if fault == "stopped" else 30.0, "lr_factor": 1.0}
    settings["spares"] = 0 if "start" in fault else 1
    leave: list[Do] = []
    if phase == "taking over":
        before, settings["spares"] = [Kill(At(Phase.TRAINING, step=3), 2)], 2
    if phase == "moving":
        settings.update(spares=0, elastic=True)
        leave = [Do("on_train_batch_start", 3, kill(3, how=signal.SIGTERM))]
    if settings["spares"] == 0:
        stop_workers()  # idle ones of before would take the place
    if phase == "meeting":
        run()  # whose workers are there then
    recovery = StageRecovery(**settings)
    faults = FAULTS[fault](PHASES[phase], phase in IDLE) if fault else []
    with tempfile.TemporaryDirectory() as folder, Injector(*before, *faults) as injector:
        for _ in range(2 if phase == "between" else 1):
            result, _ = run(
                *leave,
                recovery=recovery,
                val_data=loader(tokens(2 * BATCH), BATCH),
                val_check_interval=4,
                enable_checkpointing=True,
                default_root_dir=folder,
            )
    return result, recovery, injector


@functools.cache
def undisturbed() -> Run:
    return run(val_data=loader(tokens(2 * BATCH), BATCH), val_check_interval=4)[0]


@pytest.mark.parametrize(("phase", "fault", "outcome"), list(cells()))
def test_a_cell_of_the_table(phase: str, fault: str, outcome: str) -> None:
    if outcome == "error":
        expected = {"disk full": (OSError, RuntimeError)}.get(fault, (SkipPipeError,))
        with pytest.raises(expected) as raised:
            attempt(phase, fault)
        assert re.search(
            r"cannot be started|ended before they joined|File too large|file write failed", str(raised.value)
        )
        return
    result, recovery, injector = attempt(phase, fault)
    assert not injector.pending
    assert all(injected.done for injected in injector.report), injector.report
    assert_counted(result)
    sources = {event.source for event in recovery.events}
    if outcome == "estimate":
        assert sources & ESTIMATES
        return
    assert sources <= (EXACT if outcome == "exact" else set())
    assert bool(sources) == (outcome == "exact")
    assert_same_losses(result.losses, undisturbed().losses)
    assert_same_weights(result.weights, undisturbed().weights)


@pytest.mark.timeout(180)
def test_messages_that_break_as_they_are_written_hang_nobody() -> None:
    """A connection is gone when its next message is written: gloo forgets such a message, and wakes nobody."""
    moments = [(2, "0B1"), (3, "0L2"), (4, "0B2"), (5, "0B3"), (6, "0L1")]
    faults = [Reset(At(Phase.TRAINING, step=step, action=action), (1, 2)) for step, action in moments]
    recovery = StageRecovery(spares=0, lr_factor=1.0)
    with Injector(*faults) as injector:
        result, _ = run(recovery=recovery)
    assert [each.done for each in injector.report] == [True] * len(moments)
    expected, _ = run()
    assert_same_run(result, expected)
    assert_counted(result)
