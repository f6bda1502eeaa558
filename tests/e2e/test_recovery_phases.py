"""Workers are lost again and again as they take over: the run goes on, or ends and says why."""

import pytest

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver.recovery import losses
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import stop_workers
from skippipe_plugin.testing import At, Delay, Injector, Kill, Phase, Stop

from .support import Run, assert_same_weights
from .test_recovery import assert_counted, run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def undisturbed() -> Run:
    return run()[0]


def test_two_die_one_after_the_other_while_blocks_are_handed_out(
    undisturbed: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each before it has its blocks: one that has them may die unnoticed until the first step."""
    monkeypatch.setattr(losses, "_MAX_JOIN_DEATHS", 3)
    deaths = [Kill(At(Phase.HANDING_OVER, nth=nth), who) for nth, who in ((3, 3), (6, 3), (7, 1))]
    with Injector(*deaths) as injector:
        found, recovery = run(recovery=StageRecovery(spares=2))
    assert injector.num_done == len(deaths)
    assert {event.source for event in recovery.events} == {"driver"}
    assert_same_weights(found.weights, undisturbed.weights)


def test_replacements_that_die_as_they_take_over_end_the_run() -> None:
    """Neither at the first nor never, and the story is told; nobody tries once more to bring the model back."""
    deaths = [Kill(At(Phase.TRAINING, step=3), 2), *(Kill(At(Phase.TAKING_OVER, nth=nth), 2) for nth in (1, 2, 3))]
    with (
        Injector(*deaths) as injector,
        pytest.raises(
            SkipPipeError, match=r"2 replacements of worker rank 2 \(stage 2\) died before they had taken over"
        ),
    ):
        run(recovery=StageRecovery(spares=2))
    assert injector.pending == (deaths[-1],)


def test_a_worker_that_dies_again_and_again_ends_the_run() -> None:
    """Each one takes over and dies in the step."""
    deaths = [Kill(At(Phase.TRAINING, step=3, action="0F0", nth=nth), 2) for nth in range(1, 8)]
    with (
        Injector(*deaths) as injector,
        pytest.raises(
            SkipPipeError, match=r"6 workers of worker rank 2 .* were lost one after the other, and nothing was"
        ),
    ):
        run(recovery=StageRecovery(spares=1))
    assert injector.pending == (deaths[-1],)


@pytest.mark.parametrize("delay_s", [0.0, 5.0], ids=["now", "given up"])
def test_paused_spares_are_not_taken(delay_s: float) -> None:
    """Two are paused at the same moment as a worker dies, or long before."""
    stop_workers()
    faults = [
        Stop(At(Phase.TRAINING, step=4, action="0F0"), "spare"),
        Stop(At(Phase.TRAINING, step=4, action="0F1"), "spare"),
    ]
    recovery = StageRecovery(spares=2, heartbeat_s=2.0)
    with Injector(*faults, Delay(At(Phase.TRAINING, step=5), delay_s), Kill(At(Phase.TRAINING, step=5), 2)) as injector:
        found, _ = run(recovery=recovery)
    assert injector.num_done == 4
    assert_counted(found)
    assert len(recovery.events) == 1
