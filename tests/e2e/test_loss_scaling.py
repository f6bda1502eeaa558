"""``precision="16-mixed"``: one loss scaler for all stages, whose scale and skipped steps are those of one process.

Lightning makes a bfloat16 run of it on CPUs, so its plugin is given here, as whoever sets the scaler's arguments does.
"""

import copy
import functools
import pickle
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver.links import Link
from skippipe_plugin.engine.control.codec import Control
from skippipe_plugin.engine.control.line import Said
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.moe import MoEConfig
from tests.grids import all_slow_but

from . import test_moe as mixtures
from . import test_recovery_accumulation as window
from .models import Block, Transformer, tokens
from .modules import BATCH, STEPS, LanguageModel, loader, momentum
from .support import DEVICE, Run, assert_same_run, train
from .test_recovery import At, Ready, kill

EDGE = 2.0**20
"""A scale at which gradients of the whole batch overflow in this model, and most of those of microbatches do not."""


class Scales(Callback):
    """Notes the scaler's state after each batch."""

    def __init__(self) -> None:
        self.seen: list[tuple[float, int]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        state = scaler_of(trainer).state_dict()
        self.seen.append((state["scale"], state["_growth_tracker"]) if state else (1.0, 0))


def scaler_of(trainer: Trainer) -> GradScaler:
    plugin: Any = trainer.precision_plugin
    return plugin.scaler


def half(scaler: GradScaler | None = None, **options: Any) -> MixedPrecision:
    return MixedPrecision(
        "16-mixed", DEVICE.type, scaler or GradScaler(DEVICE.type, **{"growth_interval": 3, **options})
    )


def fit(
    devices: int,
    strategy: Mapping[str, Any] | None = None,
    *,
    make: Callable[[], LightningModule] = lambda: LanguageModel(Transformer(), momentum),
    scaler: Mapping[str, Any] | None = None,
    callbacks: tuple[Callback, ...] = (),
    batches: int = STEPS,
    **options: Any,
) -> tuple[Run, list[tuple[float, int]]]:
    scales = Scales()
    usual = {"plugins": half(**(scaler or {})), **options}
    settings = None if devices == 1 and strategy is None else {"num_microbatches": 4, **(strategy or {})}
    run = train(make, loader(tokens(BATCH * batches)), devices, settings, callbacks=[scales, *callbacks], **usual)
    return run, scales.seen


def assert_same(found: tuple[Run, list[tuple[float, int]]], expected: tuple[Run, list[tuple[float, int]]]) -> None:
    """Compare losses, weights and the scaler's history.

    float16 has 11 bits: a weight's gradient is rounded by up to 2**-12 of itself, once for each microbatch before the
    sum, or once for the whole batch.
    """
    assert found[1] == expected[1]
    assert_same_run(found[0], expected[0], rtol=5e-4, weights_rtol=2e-3, weights_atol=5e-4)


class Overflow(torch.autograd.Function):
    """Multiplies on the way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0] * ctx.factor, None


class Delicate(Block):
    """A block with one weight more, whose gradient, and no other, may overflow."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gain = nn.Parameter(torch.ones(width))
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * Overflow.apply(self.gain, self.factor))


class Overflowing(Callback):
    """Lets the gradient of a weight of one block overflow in some batches."""

    def __init__(self, block: int, *batches: int, factor: float = float("inf")) -> None:
        self.block, self.batches, self.factor = block, batches, factor

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        hit = trainer.fit_loop.total_batch_idx in self.batches
        module.model.blocks[self.block].factor = self.factor if hit else 1.0


def adamw(module: nn.Module, **options: Any) -> AdamW:
    # Some gradients are zero but for rounding, here to 11 bits: with a small eps, Adam makes full steps of them.
    return AdamW(module.parameters(), lr=1e-2, eps=1e-2, **options)


def delicate(optimizer: Callable[[nn.Module], Any] = adamw) -> LightningModule:
    net = Transformer(depth=4)
    net.blocks = nn.ModuleList(Delicate(16) for _ in range(4))
    return LanguageModel(net, optimizer)


OPTIONS: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "norm": {"gradient_clip_val": 0.2},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "accumulate": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "max_steps": 7, "max_epochs": -1},
}
STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "one worker": (2, {}),
    "1f1b": (3, {"schedule": "1f1b"}),
    "gpipe": (5, {"schedule": "gpipe"}),
    "driver stage": (3, {"driver_stage": True, "schedule": "gpipe"}),
    "replicas": (5, {"replicas": 2}),
    "stack": (3, {"microbatches": "stack"}),
}
HIT = 3
"""The batch in which the gradient of a weight overflows."""


@functools.cache
def plain(options: str) -> tuple[Run, list[tuple[float, int]]]:
    run, scales = fit(1, make=delicate, callbacks=(Overflowing(3, HIT),), **OPTIONS[options])
    assert sum(after < before for (before, _), (after, _) in pairwise(scales)) == 1
    return run, scales


def assert_same_state(found: Run, expected: Run) -> None:
    """Compare the optimizers' counts of steps: a skipped one counts nowhere."""
    states = [run.trainer.optimizers[0].state_dict()["state"] for run in (found, expected)]
    steps = [{number: float(state["step"]) for number, state in each.items()} for each in states]
    assert steps[0] == steps[1]
    assert max(steps[0].values()) < expected.trainer.global_step


@pytest.mark.parametrize("strategy", all_slow_but(STRATEGIES, "1f1b", "driver stage", "replicas"))
@pytest.mark.parametrize("options", [pytest.param("ordinary", marks=pytest.mark.slow), "norm"])
def test_one_weight_that_overflows_skips_the_step_of_all(strategy: str, options: str) -> None:
    devices, settings = STRATEGIES[strategy]
    found = fit(devices, settings, make=delicate, callbacks=(Overflowing(3, HIT),), **OPTIONS[options])
    assert_same(found, plain(options))
    assert_same_state(found[0], plain(options)[0])


@pytest.mark.parametrize("options", ["value", "accumulate"])
def test_clipped_by_value_and_accumulated(options: str) -> None:
    found = fit(3, {"schedule": "1f1b"}, make=delicate, callbacks=(Overflowing(3, HIT),), **OPTIONS[options])
    assert_same(found, plain(options))


@functools.cache
def on_the_edge(accumulated: int, devices: int = 1, strategy: str = "") -> tuple[Run, list[tuple[float, int]]]:
    settings = {**STRATEGIES[strategy][1], "num_microbatches": 1 if accumulated == 3 else 4} if strategy else None
    options: dict[str, Any] = {"accumulate_grad_batches": accumulated, "max_epochs": -1, "gradient_clip_val": 0.2}
    return fit(devices, settings, scaler={"init_scale": EDGE, "growth_interval": 2}, **options)


@pytest.mark.parametrize(
    ("strategy", "accumulated"),
    [
        ("1f1b", 1),
        ("stack", 1),
        ("1f1b", 2),
        *(pytest.param(each, 1, marks=pytest.mark.slow) for each in STRATEGIES if each not in ("1f1b", "stack")),
        pytest.param("1f1b", 3, marks=pytest.mark.slow),
    ],
)
def test_the_scale_follows_what_overflows_in_the_whole_batch(strategy: str, accumulated: int) -> None:
    expected = on_the_edge(accumulated)
    assert len({scale for scale, _ in expected[1]}) > 1
    assert min(after / before for (before, _), (after, _) in pairwise(expected[1])) == 0.5, "steps were skipped"
    assert_same(on_the_edge(accumulated, STRATEGIES[strategy][0], strategy), expected)


SCALERS: dict[str, dict[str, Any]] = {
    "grows oddly": {"init_scale": 1000.0, "growth_factor": 1.7, "backoff_factor": 0.3, "growth_interval": 2},
    "disabled": {"enabled": False},
}


@pytest.mark.parametrize("scaler", SCALERS)
def test_arguments_of_the_scaler(scaler: str) -> None:
    hit = Overflowing(1, *([] if scaler == "disabled" else [HIT]))
    runs = [fit(devices, scaler=SCALERS[scaler], make=delicate, callbacks=(hit,)) for devices in (3, 1)]
    assert_same(*runs)


def test_a_fused_step_which_unscales_by_itself() -> None:
    hit, fused = Overflowing(1, HIT), functools.partial(adamw, fused=True)
    runs = [fit(devices, make=lambda: delicate(fused), callbacks=(hit,)) for devices in (3, 1)]
    assert_same(*runs)
    assert_same_state(runs[0][0], runs[1][0])


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_said_for_a_step(scaled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm comes with what the workers have found; a run without a scaler says nothing of it."""
    said: Counter[str] = Counter()
    tell = Link.tell

    def counted(link: Link, body: Control | Said, **how: Any) -> int:
        said[type(body.body if isinstance(body, Said) else body).__name__] += link.rank == 1
        return tell(link, body, **how)

    monkeypatch.setattr(Link, "tell", counted)
    plugins = {"plugins": half()} if scaled else {}
    train(delicate, loader(tokens(BATCH * STEPS)), 3, {"num_microbatches": 4}, gradient_clip_val=0.2, **plugins)
    assert said["StepOptimizer"] == said["Merge"] == STEPS
    assert said["Unscale"] == (STEPS if scaled else 0)
    assert said["AskNorm"] == 1, "later ones are asked ahead"


def test_experts_that_are_spread_over_replicas() -> None:
    """Each replica has experts that no other worker looks at."""

    def run(devices: int, strategy: dict[str, Any] | None = None, **watch: Any) -> Run:
        plugin = half(init_scale=EDGE, growth_interval=1)
        return mixtures.run("own", devices, mixtures.Watch(**watch), strategy, plugins=plugin)

    found, expected = run(5, {"replicas": 2}, config=MoEConfig(expert_parallel=2)), run(1)
    assert scaler_of(found.trainer).state_dict() == scaler_of(expected.trainer).state_dict()
    assert scaler_of(expected.trainer).get_scale() < EDGE
    assert_same_run(found, expected, rtol=5e-4, weights_rtol=2e-3, weights_atol=1e-3)


class Looking(Callback):
    """Reads gradients of the workers where they are scaled, and where they are not any more."""

    def __init__(self) -> None:
        self.scaled: list[float] = []
        self.unscaled: list[float] = []

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:
        self.scaled.append(float(module.model.blocks[1].gain.grad.norm()))

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        self.unscaled.append(float(module.model.blocks[1].gain.grad.norm()))


def test_hooks_see_gradients_as_in_one_process() -> None:
    found, expected = Looking(), Looking()
    fit(3, make=delicate, callbacks=(found,))
    fit(1, make=delicate, callbacks=(expected,))
    assert min(expected.scaled) > 1000 * max(expected.unscaled)
    assert found.scaled == pytest.approx(expected.scaled, rel=2e-3)
    assert found.unscaled == pytest.approx(expected.unscaled, rel=2e-3)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_checkpoint_has_the_scalers_state(devices: int, tmp_path: Path) -> None:
    file = str(tmp_path / "half.ckpt")

    class Saving(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 5:
                trainer.save_checkpoint(file)

    _, scales = fit(devices, make=delicate, callbacks=(Overflowing(3, HIT), Saving()), max_steps=5)
    state = torch.load(file, weights_only=False)["MixedPrecision"]
    assert (state["scale"], state["_growth_tracker"]) == scales[4] == (2.0**16, 1)
    resumed = [fit(n, make=delicate, scaler={"growth_interval": 9}, ckpt_path=file) for n in (3, 1)]
    assert_same(*resumed)
    assert resumed[0][1][:2] == [(2.0**16, 2), (2.0**17, 0)]


@pytest.mark.parametrize(
    ("hook", "batch"),
    [
        ("on_train_batch_start", HIT + 1),
        pytest.param("on_before_backward", 2, marks=pytest.mark.slow),
        pytest.param("on_before_backward", HIT + 1, marks=pytest.mark.slow),
        pytest.param("on_after_backward", HIT + 1, marks=pytest.mark.slow),
        pytest.param("on_before_optimizer_step", 2, marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_changes_nothing(hook: str, batch: int) -> None:
    recovery = StageRecovery(spares=1)
    callbacks = (recovery, Overflowing(3, HIT), At(hook, batch, kill(2)), Ready(1))
    found = fit(5, {"replicas": 2}, make=delicate, callbacks=callbacks, **OPTIONS["norm"])
    assert len(recovery.events) == 1
    assert_same(found, plain("norm"))


class Reading(Callback):
    """Reads weights of a block before a step: where its worker was lost by then, it is replaced there."""

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Any) -> None:
        module.model.blocks[2].norm1.weight.sum().item()


@pytest.mark.parametrize(
    "hook",
    [
        pytest.param("on_before_backward", marks=pytest.mark.slow),
        pytest.param("on_train_batch_start", marks=pytest.mark.slow),
        "on_before_optimizer_step",
    ],
)
def test_what_a_lost_stage_had_accumulated_is_scaled_and_unscaled_again(hook: str) -> None:
    """Blocks are alike, so that the average of two is what the lost stage was."""
    recovery = StageRecovery(rule="mean", lr_factor=1.0)
    at = At(hook, 1 if hook == "on_before_optimizer_step" else window.WINDOW, kill(2))
    options: dict[str, Any] = {"optimizer": window.adamw, "gradient_clip_val": 0.05}
    found = window.run(at, Reading(), recovery=recovery, plugins=half(init_scale=2.0**12), **options)
    expected = window.run(plugins=half(init_scale=2.0**12), **options)
    assert recovery.events[0].batches_repeated >= window.WINDOW - 2
    window.assert_equal(found, expected)
    assert scaler_of(found.trainer).state_dict() == scaler_of(expected.trainer).state_dict()


def test_a_scaler_is_the_users_own_again() -> None:
    plugin = half()
    copies: list[Any] = []

    class Copying(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            copies.extend([copy.deepcopy(plugin.scaler), pickle.loads(pickle.dumps(plugin.scaler))])

    fit(3, make=delicate, callbacks=(Copying(),), max_steps=1, plugins=plugin)
    weight = nn.Parameter(torch.ones(2, device=DEVICE))
    optimizer = SGD([weight], lr=1.0)
    for scaler in (plugin.scaler, *copies):
        optimizer.zero_grad()
        scaler.scale(weight.sum()).backward()
        scaler.unscale_(optimizer)
        assert weight.grad is not None
        assert weight.grad.tolist() == [1.0, 1.0]
        assert all("skippipe" not in repr(value) for value in scaler.__dict__.values()) or scaler is not plugin.scaler


def test_scalers_that_unscale_in_a_way_of_their_own_are_refused() -> None:
    class Own(GradScaler):
        def unscale_(self, optimizer: Any) -> None:
            super().unscale_(optimizer)

    with pytest.raises(SkipPipeError, match=r"Own unscales gradients in a way of its own.*torch\.amp\.GradScaler"):
        fit(3, plugins=half(Own(DEVICE.type)))
