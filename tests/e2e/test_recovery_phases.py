"""Workers are lost again and again as they take over: the run goes on, or ends and says why."""

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver.recovery import losses
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import stop_workers
from skippipe_plugin.testing import At, Delay, Injector, Kill, Phase, Reset, Stop

from .models import Transformer, tokens
from .modules import loader
from .support import Run, assert_same_weights, train
from .test_recovery import BATCH, STEPS, Counting, assert_counted, run, sgd

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


class Counted(nn.Module):
    """Counts its samples, also in evaluation."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.add_(float(len(hidden)))
        return self.block(hidden)  # type: ignore[no-any-return]


def counting() -> nn.Module:
    net = Transformer(depth=6)
    net.blocks = nn.ModuleList(map(Counted, net.blocks))
    return net


def test_a_step_of_evaluation_that_is_repeated_counts_once_in_blocks() -> None:
    """Also in those stages that had done their part of it when a connection broke."""
    validation = {"val_data": loader(tokens(2 * BATCH), BATCH), "val_check_interval": 4}
    stop = Stop(At(Phase.VALIDATING, 3, action="0F0"), 2, 1.0)
    reset = Reset(At(Phase.VALIDATING, 3, action="0F0", delay_s=0.6), (1, 2))
    with Injector(stop, reset) as injector:
        found, _ = run(recovery=StageRecovery(spares=0), net=counting, **validation)
    assert [each.done for each in injector.report] == [True, True], injector.report
    alone = train(
        lambda: Counting(counting(), sgd), loader(tokens(STEPS * BATCH), BATCH), 1, max_steps=STEPS, **validation
    )
    assert all(float(value) > STEPS * BATCH for name, value in alone.weights.items() if name.endswith(".seen"))
    assert_same_weights(found.weights, alone.weights)
