"""Microbatches take turns at the blocks: what a step leaves for itself before them it finds behind them."""

import collections
import contextlib
import random
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.utils.data import DataLoader, Dataset

from skippipe_plugin.engine.errors import SkipPipeError
from tests.grids import all_slow_but, slow

from .. import loops
from ..support import Run, assert_same_run, train

PIPELINE = {"num_microbatches": 4, "verbose": False}
NOTICE = "what one leaves in an attribute, a global name or a random state, the others find there"
KEPT: dict[str, Tensor] = {}
QUEUE: collections.deque[Tensor] = collections.deque()
DEPTH: list[int] = []
CALLS = 0


class Samples(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(1)
        self.x = torch.randn(24, 4, generator=draws)
        self.y = self.x.sum(1, keepdim=True)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"x": self.x[index], "y": self.y[index]}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Stepping(LightningModule):
    """Does something before its blocks, and something behind them with the output; ``seen`` is its own to use."""

    def __init__(self, before: Callable[[Any, Any], None], behind: Callable[[Any, Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.before, self.behind = before, behind
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.seen: list[Any] = []
        self.calls = 0
        self.draws = np.random.default_rng(3)

    def loss(self, batch: Any) -> Tensor:
        h = self.embed(batch["x"])
        self.before(self, batch)
        for block in self.blocks:
            h = block(h)
        return self.behind(self, self.head(h), batch)

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.01)


def count(module: Any, _: Any) -> None:
    module.calls += 1


def count_globally(*_: Any) -> None:
    global CALLS
    CALLS += 1


def enter(*_: Any) -> None:
    DEPTH.append(1)


def leave(_: Any, out: Tensor, batch: Any) -> Tensor:
    assert len(DEPTH) == 1
    DEPTH.pop()
    return F.mse_loss(out, batch["y"])


def keep_mean(module: Any, batch: Any) -> None:
    module.blocks[2].mean = batch["x"].mean(1, keepdim=True)


def scaled(factor: Callable[[Any], float]) -> Callable[[Any, Tensor, Any], Tensor]:
    return lambda module, out, batch: F.mse_loss(out, batch["y"]) * (1 + 0.1 * factor(module))


def nothing(*_: Any) -> None:
    pass


KINDS: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Tensor, Any], Tensor]]] = {
    "attribute": (
        lambda module, batch: setattr(module, "target", batch["y"]),
        lambda module, out, _: F.mse_loss(out, module.target),
    ),
    "attribute of a block": (
        keep_mean,
        lambda module, out, batch: F.mse_loss(out * module.blocks[2].mean, batch["y"]),
    ),
    "list": (
        lambda module, batch: module.seen.append(batch["y"]),
        lambda module, out, _: F.mse_loss(out, module.seen.pop()),
    ),
    "global dictionary": (
        lambda _, batch: KEPT.update(y=batch["y"]),
        lambda _, out, __: F.mse_loss(out, KEPT["y"]),
    ),
    "class": (
        lambda module, batch: setattr(Stepping, "target", batch["y"]),
        lambda module, out, _: F.mse_loss(out, Stepping.target),
    ),
    "depth": (enter, leave),
    "counter": (count, scaled(lambda module: module.calls)),
    "global counter": (count_globally, scaled(lambda _: CALLS)),
    "numbers of Python": (nothing, scaled(lambda _: random.random())),
    "numbers of numpy": (nothing, scaled(lambda _: np.random.rand())),
    "generator of numpy": (nothing, scaled(lambda module: module.draws.random())),
}
"""What a step does before its blocks and behind them, wrong when other microbatches do the same in between."""


def fit(kind: str, devices: int, **settings: Any) -> Run:
    global CALLS
    CALLS = 0
    for each in (KEPT, QUEUE, DEPTH):
        each.clear()
    make = partial(Stepping, *KINDS[kind])
    data = DataLoader(Samples(), batch_size=8)
    strategy = {**PIPELINE, **settings} if devices > 1 else None
    return train(make, data, devices, strategy, val_data=data, max_steps=3)


@pytest.mark.parametrize(
    "kind",
    all_slow_but(KINDS, "attribute of a block", "list", "global dictionary", "class", "depth", "numbers of numpy"),
)
def test_a_step_finds_what_it_has_left_itself(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    plain = fit(kind, 1)
    piped = fit(kind, 3)
    assert_same_run(piped, plain)
    assert NOTICE in caplog.text
    torch.testing.assert_close(piped.trainer.callback_metrics["val"], plain.trainer.callback_metrics["val"])


@pytest.mark.parametrize(
    "settings", [{"driver_stage": True}, slow({"num_microbatches": 2}), {"num_microbatches": 3}], ids=str
)
@pytest.mark.parametrize("kind", [slow("attribute"), "list", "depth"])
def test_it_does_in_other_pipelines(kind: str, settings: dict[str, Any]) -> None:
    assert_same_run(fit(kind, 3, **settings), fit(kind, 1))


@pytest.mark.parametrize("way_out", [{"microbatches": "stack"}, {"num_microbatches": 1}], ids=str)
@pytest.mark.parametrize("kind", [slow("attribute"), "depth", "counter", slow("numbers of Python")])
def test_who_wants_the_batch_cut_reads_why_not_and_a_way_out(kind: str, way_out: dict[str, Any]) -> None:
    with pytest.raises(SkipPipeError, match=f"several of which wait for the blocks at a time, and {NOTICE}"):
        fit(kind, 3, microbatches="batch")
    assert_same_run(fit(kind, 3, **way_out), fit(kind, 1))


ALONE: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any, Tensor, Any], Tensor]]] = {
    "variables": (nothing, lambda _, out, batch: F.mse_loss(out, batch["y"])),
    "the same every time": (
        lambda module, _: (setattr(module, "width", 8), module.seen.append(1)),
        lambda module, out, batch: F.mse_loss(out, batch["y"]) * module.seen.pop(),
    ),
    "another every time": (
        lambda module, _: setattr(module, "now_s", time.perf_counter()),
        lambda _, out, batch: F.mse_loss(out, batch["y"]),
    ),
    "dropout": (nothing, lambda _, out, batch: F.mse_loss(F.dropout(out, 1e-9), batch["y"])),
}


@pytest.mark.parametrize("kind", all_slow_but(ALONE, "another every time", "dropout"))
def test_steps_that_leave_nothing_are_cut(
    kind: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(KINDS, kind, ALONE[kind])
    assert_same_run(fit(kind, 3), fit(kind, 1))
    assert "runs once, on the whole batch" not in caplog.text


# --------------------------------------------- what a step leaves for later


class Leaving(Stepping):
    """Leaves something in its steps, which nothing that it returns shows."""

    total = 0

    def __init__(self, leave: Callable[[Any, Tensor], Any]) -> None:
        super().__init__(lambda *_: None, lambda _, out, batch: self._leave(out, batch))
        self.leave = leave
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("rows", torch.zeros(64))
        self.array, self.box = np.zeros(3), Box()
        self.last: Any = None

    def _leave(self, out: Tensor, batch: Any) -> Tensor:
        self.leave(self, out)
        return F.mse_loss(out, batch["y"])

    def predict_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(batch)


class Box:
    def __init__(self) -> None:
        self.content: list[Tensor] = []
        self.counts = {"training": 0}


def count_in_class(*_: Any) -> None:
    Leaving.total += 1


def count_by_phase(module: Any, _: Tensor) -> None:
    """Under a key that modules have, too."""
    module.box.counts["training"] += 1


def write_rows(module: Any, out: Tensor) -> None:
    """A queue as of contrastive learning."""
    start = module.calls % 64
    module.rows[start : start + 8] = F.pad(out.detach().flatten(), (0, 8 - len(out)))
    module.calls += 8


LEFT: dict[str, tuple[Callable[[Any, Tensor], Any], Callable[[Any], Any]]] = {
    "running mean": (lambda module, out: module.mean.lerp_(out.detach().mean(), 0.1), lambda module: module.mean),
    "queue": (write_rows, lambda module: module.rows),
    "counter": (count, lambda module: module.calls),
    "class": (count_in_class, lambda _: Leaving.total),
    "global name": (count_globally, lambda _: CALLS),
    "global list": (lambda _, out: DEPTH.append(len(out)), lambda _: list(DEPTH)),
    "list": (lambda module, out: module.seen.append(out.detach().mean()), lambda module: module.seen),
    "list of numbers": (lambda module, out: module.seen.append(float(out.mean())), lambda module: module.seen),
    "dictionary": (count_by_phase, lambda module: module.box.counts),
    "list of dictionaries": (lambda module, out: module.seen.append({"out": out.detach()}), lambda module: module.seen),
    "object": (lambda module, out: module.box.content.append(out.detach()), lambda module: module.box.content),
    "array": (lambda module, out: np.add.at(module.array, 1, 1), lambda module: module.array),
    "last output": (lambda module, out: setattr(module, "last", out.detach()), lambda module: module.last),
}


def run_and_leave(kind: str, devices: int, **settings: Any) -> tuple[Run, Any]:
    global CALLS
    CALLS = Leaving.total = 0
    DEPTH.clear()
    leave, left = LEFT[kind]
    data = DataLoader(Samples(), batch_size=8)
    strategy = {**PIPELINE, **settings} if devices > 1 else None
    run = train(partial(Leaving, leave), data, devices, strategy, val_data=data, max_steps=3)
    run.trainer.predict(run.module, data)
    return run, left(run.module)


@pytest.mark.parametrize("kind", all_slow_but(LEFT, "queue", "counter", "global list", "object"))
def test_what_a_step_leaves_is_that_of_one_run(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    """In training, validation and prediction."""
    (plain, expected), (piped, found) = run_and_leave(kind, 1), run_and_leave(kind, 3)
    assert_same_run(piped, plain)
    torch.testing.assert_close(found, expected)
    assert caplog.text.count("is then another than when it has run for the batch") == 3


def test_who_wants_such_a_batch_cut_reads_why_not() -> None:
    with pytest.raises(SkipPipeError, match=r"self\.calls is then another than when it has run for the batch"):
        run_and_leave("counter", 3, microbatches="batch")


# ------------------------------------------------------------- torch's profiler


def profiled(first: int) -> type[LightningModule]:
    class Profiled(Stepping):
        def training_step(self, batch: Any, index: int) -> Tensor:
            with torch.profiler.profile() if index >= first else contextlib.nullcontext():
                return self.loss(batch)

    return Profiled


def fit_profiled(first: int, devices: int, **settings: Any) -> Run:
    make = partial(profiled(first), *ALONE["variables"])
    strategy = {**PIPELINE, **settings} if devices > 1 else None
    return train(make, DataLoader(Samples(), batch_size=8), devices, strategy, max_steps=3)


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("settings", [{}, {"microbatches": "stack"}, {"num_microbatches": 1}], ids=str)
def test_a_profiler_that_a_step_starts_around_the_blocks_is_refused(first: int, settings: dict[str, Any]) -> None:
    """What runs in between has stacks of its own, which torch's profiler may take for one: it has crashed."""
    with pytest.raises(
        SkipPipeError, match=r"the training step starts torch's profiler .* Start it around whole steps"
    ):
        fit_profiled(first, 3, **settings)
    assert not torch._C._autograd._profiler_enabled()


class ProfilesSteps(Callback):
    def on_train_batch_start(self, *_: Any) -> None:
        self.profile = torch.profiler.profile()
        self.profile.start()

    def on_train_batch_end(self, *_: Any) -> None:
        self.profile.stop()


@pytest.mark.parametrize("settings", [{}, {"microbatches": "stack"}, {"num_microbatches": 1}], ids=str)
def test_a_profiler_around_whole_steps_is_exact(settings: dict[str, Any]) -> None:
    make = partial(profiled(99), *ALONE["variables"])
    found, plain = (
        train(make, DataLoader(Samples(), batch_size=8), devices, each, max_steps=3, callbacks=[ProfilesSteps()])
        for devices, each in ((3, {**PIPELINE, **settings}), (1, None))
    )
    assert_same_run(found, plain)


# ----------------------------------------------------------------- accelerate


class Keeping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.scale: Any = None

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        self.scale = x.mean(1, keepdim=True)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        out = self.head(h) * self.scale
        return out if y is None else {"loss": F.mse_loss(out, y), "out": out}


@pytest.mark.parametrize("labels", [True, False], ids=["loss of the model", "loss of the loop"])
def test_loops_of_accelerate(labels: bool) -> None:
    found = []
    for which in ("plain", "pipeline"):
        torch.manual_seed(0)
        with loops.accelerator(which, **({"num_microbatches": 4} if which == "pipeline" else {})) as current:
            model = Keeping()
            optimizer = SGD(model.parameters(), lr=0.1)
            model, optimizer, data = current.prepare(model, optimizer, DataLoader(Samples(), batch_size=8))
            losses = []
            for batch in data:
                optimizer.zero_grad()
                out = model(batch["x"], batch["y"] if labels else None)
                loss = out["loss"] if labels else F.mse_loss(out, batch["y"])
                current.backward(loss)
                optimizer.step()
                losses.append(float(loss))
            found.append((losses, {name: value.clone() for name, value in current.get_state_dict(model).items()}))
    torch.testing.assert_close(*found)
