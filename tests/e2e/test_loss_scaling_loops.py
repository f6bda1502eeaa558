"""Loops that scale their losses, of accelerate (``mixed_precision="fp16"``) and plain ones: as in one process.

accelerate wants a GPU for float16, so what it sets up there is set up here.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.amp import GradScaler
from torch.nn.utils import clip_grad_norm_

from skippipe_plugin import SkipPipeError, TorchPipeline
from skippipe_plugin.accelerate import SkipPipe, SkipPipeConfig
from tests.grids import slow

from . import loops
from .loops import Record
from .models import Transformer, next_token_loss, tokens
from .support import DEVICE
from .test_loss_scaling import Delicate

HIT = 2
"""The batch in which the gradient of one weight overflows."""


def halved(current: Accelerator) -> Accelerator:
    """Let it be one that was made with ``mixed_precision="fp16"``."""
    current.native_amp = True
    current.scaler = GradScaler(DEVICE.type, growth_interval=3)
    current.state._mixed_precision = "fp16"
    return current


def both(loop: Callable[..., Record], *arguments: Any) -> tuple[Record, Record]:
    records = []
    for kind in ("pipeline", "plain"):
        with loops.accelerator(kind) as current:
            torch.manual_seed(0)
            records.append(loop(halved(current), *arguments))
            scaler = current.scaler
            records[-1].metrics += [scaler.get_scale(), float(scaler._get_growth_tracker())]
    return records[0], records[1]


def assert_same(found: Record, expected: Record) -> None:
    """Compare what two loops saw, up to rounding of float16."""
    for name in ("losses", "norms", "metrics"):
        one, other = torch.tensor(getattr(found, name)), torch.tensor(getattr(expected, name))
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-5)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=2e-3, atol=5e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "loop",
    [loops.quicktour, slow(loops.classification), loops.accumulation, slow(loops.by_hand), loops.language],
    ids=lambda loop: loop.__name__,
)
def test_loops_of_accelerate(loop: Callable[..., Record]) -> None:
    assert_same(*both(loop))


class Clamping(loops.Classifier):
    """Clamps what goes back into the blocks or the head, in float16."""

    def __init__(self, in_blocks: bool) -> None:
        super().__init__()
        self.clamp_ = None if in_blocks else Clamped()
        if in_blocks:
            self.blocks = nn.ModuleList(nn.Sequential(block, Clamped()) for block in self.blocks)

    def forward(self, inputs: Any, labels: Any = None) -> Any:
        output = super().forward(inputs, None)
        output = output if self.clamp_ is None else self.clamp_(output)
        return {"loss": nn.functional.cross_entropy(output, labels), "logits": output}


class Clamped(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Clamp.apply(x)


class Clamp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].clamp(-100.0, 100.0)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_a_loss_that_is_multiplied_is_refused_where_its_backward_bends(in_blocks: bool) -> None:
    with loops.accelerator("pipeline") as current:
        torch.manual_seed(0)
        model, inputs = Clamping(in_blocks), loops.samples(8).tensors
        model, _ = halved(current).prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loss = model(*(each.to(DEVICE) for each in inputs))["loss"]
        with pytest.raises(SkipPipeError, match="the loss is multiplied"):
            current.backward(loss / 3)


def overflowing(current: Accelerator) -> Record:
    """The gradient of one weight overflows once; a schedule follows the steps that are taken."""
    record, model = Record(), Transformer(depth=4)
    model.blocks = nn.ModuleList(Delicate(16) for _ in range(4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    model, optimizer, scheduler = current.prepare(model, optimizer, scheduler)
    for index in range(6):
        model.blocks[3].factor = float("inf") if index == HIT else 1.0
        batch = tokens(8, seed=index).to(DEVICE)
        loss = next_token_loss(model(batch), batch)
        current.backward(loss)
        record.norms.append(float(current.clip_grad_norm_(model.parameters(), 0.3).nan_to_num(7.0, 7.0)))
        optimizer.step()
        record.metrics += [float(optimizer.step_was_skipped), scheduler.get_last_lr()[0]]
        scheduler.step()
        optimizer.zero_grad()
        record.losses.append(loss.item())
    record.weights = loops.weights_of(model)
    record.metrics += [float(state["step"]) for state in optimizer.state_dict()["state"].values()]
    return record


def test_a_step_that_is_skipped_is_skipped_by_all() -> None:
    found, expected = both(overflowing)
    assert expected.metrics[:12:2] == [0, 0, 1, 0, 0, 0]
    assert_same(found, expected)


def test_a_saved_state_has_the_scalers(tmp_path: Path) -> None:
    with loops.accelerator("pipeline") as current:
        torch.manual_seed(0)
        loops.checkpointing(halved(current), tmp_path)

    def resumed(current: Accelerator) -> Record:
        return loops.checkpointing(current, tmp_path, resume=tmp_path)

    assert_same(*both(resumed))


def test_an_accelerator_is_an_ordinary_one_again() -> None:
    with loops.accelerator("plain") as current:
        halved(current)
        model = loops.Classifier()
        model, optimizer = current.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        inputs, targets = (each.to(DEVICE) for each in loops.samples(8).tensors)
        losses = []
        for piped in (False, True, False):
            with SkipPipe(current, model, SkipPipeConfig(num_stages=2)) if piped else contextlib.nullcontext():
                loss = model(inputs, labels=targets)["loss"]
                current.backward(loss)
                optimizer.step()
                assert not optimizer.step_was_skipped
                optimizer.zero_grad()
                losses.append(loss.item())
        assert losses == sorted(losses, reverse=True)
        assert optimizer.optimizer.step.__func__ is type(optimizer.optimizer).step


def test_a_scaler_of_another_kind_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with loops.accelerator("plain") as plain:
        monkeypatch.setattr(plain, "scaler", object())
        with pytest.raises(SkipPipeError, match=r"object unscales gradients in a way of its own"):
            SkipPipe(plain)


def in_float16(known: bool, piped: bool) -> tuple[Record, list[str]]:
    torch.manual_seed(0)
    record, model = Record(), Transformer(depth=4)
    model.blocks = nn.ModuleList(Delicate(16) for _ in range(4))
    model.to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2)
    scaler = GradScaler(DEVICE.type, growth_interval=3)
    config = SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False)
    pipeline = TorchPipeline(model, optimizer, config, scaler=scaler if known else None)
    fetched: list[str] = []
    with pipeline if piped else contextlib.nullcontext():
        if piped:
            mirror = pipeline.spread.pipeline.mirror
            put = mirror.put
            mirror.put = lambda what, *args, **kw: (
                fetched.append(what),
                put(what, *args, **kw),
            )
        for index in range(6):
            model.blocks[3].factor = float("inf") if index == HIT else 1.0
            batch = tokens(8, seed=index).to(DEVICE)
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                if known and index % 2 and piped:
                    loss = pipeline.run(lambda ids: next_token_loss(model(ids), ids), batch)
                else:
                    loss = next_token_loss(model(batch), batch)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            clip = (
                (lambda: pipeline.clip_grad_norm_(0.3)) if piped else lambda: clip_grad_norm_(model.parameters(), 0.3)
            )
            record.norms.append(float(clip().nan_to_num(7.0, 7.0)))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            record.losses.append(loss.item())
            record.metrics += [scaler.get_scale(), float(scaler._get_growth_tracker())]
    record.weights = loops.weights_of(model)
    return record, fetched


@pytest.mark.parametrize("known", [True, False])
def test_plain_loops(known: bool) -> None:
    """With a scaler that the pipeline knows, no gradients travel, and a function of the loop may return a loss."""
    (found, fetched), (expected, _) = in_float16(known, piped=True), in_float16(known, piped=False)
    assert min(expected.metrics[::2]) < 2.0**17
    assert_same(found, expected)
    assert ("gradients" in fetched) == (not known)
