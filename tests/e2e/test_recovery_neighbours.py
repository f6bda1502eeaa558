"""From which stages lost ones are rebuilt, and what is said of it: with a learning rate of 0 the weights tell."""

from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import SGD

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver.recovery.neighbours import Origin, _Standing, chosen
from skippipe_plugin.recovery import Neighbour, rebuild_stage

from .models import Transformer
from .support import Run, assert_same_weights
from .test_recovery import At, _block, kill, run

STILL: dict[str, Any] = {
    "optimizer": lambda parameters: SGD(parameters, lr=0.0),
    "net": lambda: Transformer(depth=5),
    "stages": 5,
}


@pytest.fixture(scope="module")
def start() -> Run:
    return run(**STILL)[0]


def mean(start: Run, *stages: int) -> dict[str, Any]:
    before, after = (Neighbour([_block(start, stage - 1)], 0.0) for stage in (stages * 2)[:2])
    return rebuild_stage(1, before, after, "mean")[0]


def assert_rebuilt(found: Run, start: Run, sources: dict[int, tuple[int, ...]]) -> None:
    expected = dict(start.weights)
    for stage, from_ in sources.items():
        expected |= {f"model.blocks.{stage - 1}.{name}": tensor for name, tensor in mean(start, *from_).items()}
    assert_same_weights(found.weights, expected, rtol=0.0, atol=1e-7)


@pytest.mark.parametrize(
    ("lost", "sources"),
    [
        ((2, 3), {2: (1, 4), 3: (1, 4)}),
        pytest.param((2, 3, 4), {2: (1, 5), 3: (1, 5), 4: (1, 5)}, marks=pytest.mark.slow),
        pytest.param((1, 2), {1: (3,), 2: (3,)}, marks=pytest.mark.slow),
        pytest.param((1, 2, 3, 4), {1: (5,), 2: (5,), 3: (5,), 4: (5,)}, marks=pytest.mark.slow),
    ],
)
def test_stages_that_are_lost_together_come_from_the_nearest_that_live(
    lost: tuple[int, ...], sources: dict[int, tuple[int, ...]], start: Run
) -> None:
    recovery = StageRecovery(rule="mean", spares=len(lost))
    found, _ = run(At("on_train_batch_start", 3, kill(*lost)), recovery=recovery, **STILL)
    assert {event.stages: event.origins for event in recovery.events} == {
        (stage,): (Origin(stage, sources[stage]),) for stage in lost
    }
    assert {event.source for event in recovery.events} == {"neighbours" if len(sources[lost[0]]) == 2 else "copy"}
    assert_rebuilt(found, start, sources)


class _Twice(Callback):
    """Loses a stage, and its neighbour as soon as it is rebuilt, before or after an optimizer step."""

    def __init__(self, first: int, second: int, *, after_a_step: bool) -> None:
        self.left = [first, second]
        self.hooks = ("on_train_batch_start", "on_train_batch_start" if after_a_step else "on_after_backward")

    def _reached(self, hook: str, trainer: Trainer) -> None:
        if self.left and trainer.global_step >= 3 and self.hooks[-len(self.left)] == hook:
            kill(self.left.pop(0))(trainer)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self._reached("on_train_batch_start", trainer)

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self._reached("on_after_backward", trainer)


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "shares"), [("norm", (0.02, 0.98)), ("mean", (0.49, 0.51))])
def test_an_estimate_is_no_neighbour_before_it_has_taken_a_step(
    rule: Any, shares: tuple[float, float], start: Run
) -> None:
    """Stage 3 is lost in an accumulation, in which stage 2 was rebuilt: it is rebuilt from 1 and 4."""

    class InOneWindow(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
            if index in (5, 6):
                kill(index - 3)(trainer)

    recovery = StageRecovery(rule=rule, spares=2)
    found, _ = run(InOneWindow(), recovery=recovery, **STILL, accumulate_grad_batches=4, max_steps=2)
    assert [event.origins for event in recovery.events] == [(Origin(2, (1, 3)),), (Origin(3, (1, 4)),)]
    first, fourth = _block(start, 0)["mlp.0.weight"], _block(start, 3)["mlp.0.weight"]
    rebuilt = found.weights["model.blocks.2.mlp.0.weight"]
    share = float(((rebuilt - fourth) * (first - fourth)).sum() / (first - fourth).square().sum())
    assert shares[0] < share < shares[1]


@pytest.mark.slow
def test_an_estimate_is_whole_after_a_step() -> None:
    recovery = StageRecovery(rule="mean")
    run(_Twice(2, 3, after_a_step=True), recovery=recovery, **STILL)
    assert [event.origins for event in recovery.events] == [(Origin(2, (1, 3)),), (Origin(3, (2, 4)),)]


@pytest.mark.slow
def test_a_copy_of_a_rebuilt_replica_is_not_called_exact() -> None:
    recovery = StageRecovery(rule="mean", spares=2)
    settings = {**STILL, "net": lambda: Transformer(depth=3), "stages": 3}
    run(At("on_train_batch_start", 3, kill(3, 4)), recovery=recovery, replicas=2, **settings)
    assert [event.source for event in recovery.events] == ["neighbours", "estimate"]
    assert "exact" not in str(recovery.events[1])


def test_who_is_chosen() -> None:
    whole, estimate = (_Standing(stage, None, 1.0, is_estimate=stage == 2) for stage in (1, 2))
    assert chosen([estimate, whole], [], "norm") == (whole, None)
    assert chosen([estimate], [whole], "norm") == (None, whole)
    assert chosen([estimate], [], "norm") == (estimate, None)
    assert chosen([whole], [whole], "copy") == (whole, None)
    assert chosen([], [whole], "copy") == (None, whole)
    assert chosen([], [], "mean") == (None, None)


def test_the_text_names_estimates() -> None:
    assert str(Origin(3, (1, 4))) == "stage 3 from stages 1 and 4"
    assert str(Origin(3, (2, 4), (2,))) == "stage 3 from stages 2 and 4 (2 itself an estimate)"
