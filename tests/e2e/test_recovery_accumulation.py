"""A stage is lost in the middle of an accumulation: what it had accumulated is computed again, and nothing twice.

With blocks that are alike, the average of two neighbours is what the lost stage was until the first optimizer step. So
the first window of a run that has lost one must end as that of the undisturbed run, to the last digits.
"""

import copy
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.accelerate import RecoveryPolicy, SkipPipe, SkipPipeConfig
from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.driver.accumulation import Accumulation
from skippipe_plugin.engine.errors import SkipPipeError

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import Run, assert_same_losses, train
from .test_recovery import At, Ready, kill

BATCH, WINDOW = 4, 4


class Logged(LanguageModel):
    """Logs, and counts what it was trained on."""

    def __init__(self, net: nn.Module, optimizer: Callable[[Any], Optimizer]) -> None:
        super().__init__(net)
        self.make_optimizer = optimizer
        self.norm = nn.BatchNorm1d(1)
        self.register_buffer("samples", torch.zeros(()))

    def training_step(self, batch: Tensor, batch_idx: int = 0) -> Tensor:
        self.samples += len(batch)
        self.log("samples", float(len(batch)), reduce_fx="sum", on_step=False, on_epoch=True)
        return super().training_step(batch)

    def configure_optimizers(self) -> Optimizer:
        return self.make_optimizer(self.parameters())


def alike(**options: Any) -> nn.Module:
    net = Transformer(depth=6, **options)
    for block in net.blocks[1:]:
        block.load_state_dict(net.blocks[0].state_dict())
    return net


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=1e-2, eps=1e-3)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1)


def run(
    *happenings: Callback,
    recovery: StageRecovery | None = None,
    devices: int = 4,
    optimizer: Callable[[Any], Optimizer] = sgd,
    net: Callable[[], nn.Module] = alike,
    module: type[Logged] = Logged,
    strategy: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    spares = recovery.policy.spares if recovery is not None else 0
    callbacks = [*([recovery] if recovery is not None else []), *happenings, *([Ready(spares)] if spares else [])]
    return train(
        lambda: module(net(), optimizer),
        loader(tokens(3 * WINDOW * BATCH), BATCH),
        devices,
        {"num_microbatches": 4, **(strategy or {})},
        callbacks=callbacks,
        **{"max_steps": 1, "accumulate_grad_batches": WINDOW, **options},
    )


def assert_equal(found: Run, expected: Run, atol: float = 1e-6) -> None:
    assert_same_losses(found.losses, expected.losses, 1e-5)
    assert list(found.weights) == list(expected.weights)
    for name, tensor in expected.weights.items():
        torch.testing.assert_close(
            found.weights[name], tensor, rtol=0.0, atol=atol, msg=lambda text, n=name: f"{n}: {text}"
        )


def disturbed(rank: int, batch: int, hook: str = "on_train_batch_start", **options: Any) -> tuple[Run, StageRecovery]:
    recovery = StageRecovery(rule="mean", lr_factor=1.0)
    return run(At(hook, batch, kill(rank)), recovery=recovery, **options), recovery


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "adamw, clipped": {"optimizer": adamw, "gradient_clip_val": 0.05},
    "dropout": {"net": lambda: alike(dropout=0.2)},
    "whole": {"strategy": {"microbatches": "stack"}},
    "driver stage": {"strategy": {"driver_stage": True}, "devices": 3},
    "bfloat16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize(
    ("settings", "rank", "hook"),
    [
        ("plain", 2, "on_train_batch_start"),
        pytest.param("plain", 1, "on_after_backward", marks=pytest.mark.slow),
        pytest.param("plain", 3, "on_before_zero_grad", marks=pytest.mark.slow),
        pytest.param("plain", 2, "on_train_batch_end", marks=pytest.mark.slow),
        pytest.param("adamw, clipped", 2, "on_train_batch_start", marks=pytest.mark.slow),
        pytest.param("adamw, clipped", 2, "on_before_backward", marks=pytest.mark.slow),
        pytest.param("dropout", 2, "on_train_batch_start", marks=pytest.mark.slow),
        pytest.param("whole", 2, "on_train_batch_start", marks=pytest.mark.slow),
        pytest.param("driver stage", 1, "on_train_batch_start", marks=pytest.mark.slow),
        pytest.param("bfloat16", 2, "on_train_batch_start", marks=pytest.mark.slow),
    ],
)
def test_the_window_is_repeated(settings: str, rank: int, hook: str) -> None:
    expected = run(**SETTINGS[settings])
    found, recovery = disturbed(rank, 1 if hook == "on_before_zero_grad" else 3, hook, **SETTINGS[settings])
    (event,) = recovery.events
    assert event.source in ("neighbours", "copy")
    assert event.batches_repeated == (1 if "zero" in hook else 2 if hook == "on_train_batch_start" else 3)
    # What a lost stage computes in bfloat16 is computed by others again: the same.
    assert_equal(found, expected)
    assert float(found.module.samples) == WINDOW * BATCH
    assert float(found.trainer.callback_metrics["samples"]) == WINDOW * BATCH


@pytest.mark.slow
def test_two_stages_are_lost_and_one_more_while_the_window_is_repeated(caplog: pytest.LogCaptureFixture) -> None:
    """Each is rebuilt, and each gets every batch once."""
    expected = run(devices=7)

    class WhileRepeated(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
            if index == 3:
                pipeline = trainer.strategy._running().pipeline
                repeat, victims = pipeline.repeat, [5]

                def repeated(*args: Any, **kwargs: Any) -> None:
                    repeat(*args, **kwargs)
                    for rank in victims:
                        victims.remove(rank)
                        os.kill(trainer.strategy.worker_pids[rank], signal.SIGKILL)

                pipeline.repeat = repeated
                kill(2, 3)(trainer)

    recovery = StageRecovery(rule="mean", lr_factor=1.0, spares=3)
    found = run(WhileRepeated(), recovery=recovery, devices=7)
    assert sorted(event.rank for event in recovery.events) == [2, 3, 5]
    assert_equal(found, expected)


@pytest.mark.parametrize("hook", ["on_train_batch_start", pytest.param("on_after_backward", marks=pytest.mark.slow)])
def test_a_replica_gives_the_gradients_too(hook: str) -> None:
    """In the second window, where no average would do."""
    settings = {"devices": 7, "strategy": {"replicas": 2}, "max_steps": 2, "net": lambda: Transformer(depth=6)}
    expected = run(**settings)
    found, recovery = disturbed(3, 7, hook, **settings)
    assert [(event.source, event.batches_repeated) for event in recovery.events] == [("replica", 0)]
    assert_equal(found, expected)


@pytest.mark.slow
def test_a_reader_of_gradients_sees_those_of_the_window() -> None:
    """The loss is met when they are read, in the hook before the step."""

    class Reads(Logged):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.norms = [float(p.grad.norm()) for name, p in self.named_parameters() if "blocks" in name]

    expected = run(module=Reads)
    found, recovery = disturbed(2, WINDOW, "on_after_backward", module=Reads)
    assert [event.batches_repeated for event in recovery.events] == [WINDOW]
    torch.testing.assert_close(torch.tensor(found.module.norms), torch.tensor(expected.module.norms))
    assert_equal(found, expected)


@pytest.mark.slow
def test_gradients_that_user_code_has_written_are_not_made_up() -> None:
    class Writes(Logged):
        def on_after_backward(self) -> None:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 0.5

    with pytest.raises(SkipPipeError, match="cannot be computed again: they were written by user code"):
        disturbed(2, 3, module=Writes)


@pytest.mark.slow
def test_gradients_written_before_the_step_only_are_fine() -> None:
    """What the refusal advises."""

    class Writes(Logged):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 0.5

    expected = run(module=Writes)
    assert_equal(disturbed(2, 3, module=Writes)[0], expected)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False], ids=["loss inside", "loss outside"])
@pytest.mark.parametrize("by_hand", [True, False], ids=["by hand", "accumulate"])
def test_a_loop_that_accumulates(inside: bool, by_hand: bool) -> None:
    """accelerate's ``accumulate``, and loops that step every n-th batch."""
    expected = _loop(inside, by_hand, killed_at=None)
    found = _loop(inside, by_hand, killed_at=2)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.0, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


class _WithLoss(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.net, self.inside = alike(), inside

    def forward(self, batch: Tensor) -> Any:
        logits = self.net(batch)
        return {"loss": _loss(logits, batch), "logits": logits} if self.inside else logits


def _loss(logits: Tensor, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def _loop(inside: bool, by_hand: bool, killed_at: int | None) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = _WithLoss(inside)
    optimizer = sgd(model.parameters())
    batches = DataLoader(TensorDataset(tokens(WINDOW * BATCH)), BATCH)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1 if by_hand else WINDOW)
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    policy = RecoveryPolicy(rule="mean", lr_factor=1.0) if killed_at is not None else None
    with SkipPipe(accelerator, model, SkipPipeConfig(num_stages=3, recovery=policy, verbose=False)) as pipe:
        for index, (batch,) in enumerate(batches):
            if index == killed_at:
                os.kill(pipe.worker_pids[2], signal.SIGKILL)
            with accelerator.accumulate(model):
                output = model(batch)
                loss = output["loss"] if inside else _loss(output, batch)
                accelerator.backward(loss / WINDOW if by_hand else loss)
                if not by_hand or index == WINDOW - 1:
                    optimizer.step()
                    optimizer.zero_grad()
        if killed_at is not None:
            assert [event.batches_repeated for event in pipe.events] == [killed_at]
    return {name: copy.deepcopy(tensor.detach()) for name, tensor in model.state_dict().items()}


def test_nothing_is_kept_where_nobody_recovers() -> None:
    accumulation = Accumulation()
    accumulation.added(1.0, [])
    accumulation.lack(1)
    accumulation.require()
    assert accumulation.num_batches == 0


class _Normed(nn.Module):
    """Counts its samples, as BatchNorm does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            self.seen.add_(float(len(hidden)))
        return self.block(hidden)


def _counting() -> nn.Module:
    net = alike()
    net.blocks = nn.ModuleList(_Normed(block) for block in net.blocks)
    return net


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward"])
def test_buffers_of_blocks_count_each_sample_once(hook: str) -> None:
    """In the batch that is interrupted and in those that are repeated, on survivors as on the rebuilt stage."""
    found, recovery = disturbed(2, 3, hook, net=_counting)
    assert recovery.events[0].batches_repeated >= 2
    seen = {name: float(tensor) for name, tensor in found.weights.items() if name.endswith("seen")}
    assert seen == dict.fromkeys(seen, float(WINDOW * BATCH))
