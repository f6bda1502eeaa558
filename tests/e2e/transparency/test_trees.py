"""Blocks that pass on more than one tensor, and code that uses what single blocks return: as in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin import SkipPipeError
from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.testing import At, Injector, Kill, Phase
from tests.e2e.emulation import Watch
from tests.e2e.support import DEVICE, assert_same_run, train
from tests.e2e.transparency import plain_loops
from tests.grids import all_slow_but

WIDTH = 8


def data(count: int = 24) -> DataLoader[Any]:
    draw = torch.Generator().manual_seed(0)
    x, y = torch.randn(count, 4, generator=draw), torch.randn(count, 1, generator=draw)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Model(LightningModule):
    """Blocks between two layers; ``block`` makes one by its number."""

    block: Any = None
    depth = 4

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 1)
        self.blocks = nn.ModuleList(type(self).block(index) for index in range(self.depth))

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        return (self(x) - y).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        self.log("val_loss", (self(x) - y).square().mean())

    def predict_step(self, batch: Any, index: int) -> Any:
        return self(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Block(nn.Module):
    """One tensor in, one out, and perhaps another beside it."""

    def __init__(self, index: int = 0) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        h = h + torch.tanh(self.linear(self.norm(h)))
        return h if skip is None else h + 0.5 * skip


class ResidualBlock(Block):
    def forward(self, h: Tensor, r: Tensor | None = None) -> Any:
        r = h if r is None else h + r
        return torch.tanh(self.linear(self.norm(r))), r


class Streams(Model):
    """Two residual streams; the code after the blocks uses both."""

    block = ResidualBlock

    def forward(self, x: Tensor) -> Tensor:
        h, r = self.stem(x), None
        for block in self.blocks:
            h, r = block(h, r)
        return self.head(h + r)


class BiasBlock(Block):
    """The first one makes a bias of positions, which all others get, and hand on."""

    def __init__(self, index: int) -> None:
        super().__init__()
        if index == 0:
            self.table = nn.Embedding(5, WIDTH)

    def forward(self, h: Tensor, bias: Tensor | None = None) -> Any:
        if bias is None:
            bias = self.table(torch.arange(5, device=h.device)).mean(0, keepdim=True)
        return h + torch.tanh(self.linear(self.norm(h) + bias)), None, bias


class Bias(Model):
    block = BiasBlock

    def forward(self, x: Tensor) -> Tensor:
        h, bias = self.stem(x), None
        for block in self.blocks:
            out = block(h, bias)
            h, bias = out[0], out[2]
        return self.head(h)


class MappingBlock(Block):
    def forward(self, state: dict[str, Any]) -> Any:  # type: ignore[override]
        h = state["h"] + torch.tanh(self.linear(self.norm(state["h"]) + state["r"]))
        return {"count": state["count"], "h": h, "r": 0.9 * state["r"] + 0.1 * h, "odd": state["odd"] + 1}


class Mappings(Model):
    """A dict of tensors, one of which is of whole numbers, and of a number."""

    block = MappingBlock

    def forward(self, x: Tensor) -> Tensor:
        ones, odd = torch.ones(len(x), WIDTH, device=x.device), torch.arange(len(x), device=x.device)
        state = {"count": 3, "h": self.stem(x), "r": ones, "odd": odd}
        for block in self.blocks:
            state = block(state)
        return self.head(state["h"] + state["r"]) * state["count"] + 0 * state["odd"][:, None]


@dataclass
class State:
    h: Tensor
    r: Tensor


class StateBlock(Block):
    def forward(self, state: State) -> State:  # type: ignore[override]
        return State(state.h + torch.tanh(self.linear(self.norm(state.h) + state.r)), 0.9 * state.r + 0.1 * state.h)


class Records(Model):
    block = StateBlock

    def forward(self, x: Tensor) -> Tensor:
        state = State(self.stem(x), 2 * self.stem(x))
        for block in self.blocks:
            state = block(state)
        return self.head(state.h)


class Pair(NamedTuple):
    r: Tensor
    h: Tensor


class PairBlock(Block):
    def forward(self, h: Tensor, pair: Pair | None = None) -> Pair:  # type: ignore[override]
        r = h if pair is None else pair.r + h
        return Pair(r, torch.tanh(self.linear(self.norm(r))))


class Pairs(Model):
    """What goes from block to block is not what stands first."""

    block = PairBlock

    def forward(self, x: Tensor) -> Tensor:
        h, pair = self.stem(x), None
        for block in self.blocks:
            pair = block(h, pair)
            h = pair.h
        return self.head(h)


class Skips(Model):
    """The second half gets what the first half has made, the last first."""

    block, depth = Block, 6

    def forward(self, x: Tensor) -> Tensor:
        h, skips = self.stem(x), []
        for block in self.blocks[:3]:
            h = block(h)
            skips.append(h)
        for block in self.blocks[3:]:
            h = block(h, skips.pop())
        return self.head(h)


class Heads(Model):
    """A loss on what every block returns."""

    block = Block

    def layers(self, x: Tensor) -> list[Tensor]:
        h, outputs = self.stem(x), []
        for block in self.blocks:
            h = block(h)
            outputs.append(h)
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.stack(self.layers(x))).mean(0)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        losses = [(self.head(h) - y).square().mean() for h in self.layers(x)]
        return torch.stack([0.5**number * loss for number, loss in enumerate(reversed(losses))]).sum()


class Early(Heads):
    """One of them is a part of the loss, another one without a gradient; the last is not used."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        outputs = self.layers(x)
        return (self.head(outputs[1]) - y).square().mean() + (outputs[2] - outputs[0].detach()).abs().mean()


class Twice(Heads):
    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        first, second = self(x), self(0.5 * x)
        return (first - y).square().mean() + 0.3 * (first - second).square().mean()


class TwiceBias(Bias):
    training_step = Twice.training_step


class ByHand(Heads):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        loss = (self(x) - y).square().mean()
        self.manual_backward(loss)
        optimizer.step()
        return loss.detach()


MODELS = {cls.__name__: cls for cls in (Streams, Bias, Mappings, Records, Pairs, Skips, Heads, Early)}
OPEN = {cls.__name__: cls for cls in (Twice, TwiceBias, ByHand)}


def run(cls: type[Model], workers: int, *callbacks: Any, **strategy: Any) -> Any:
    settings = {"num_microbatches": 4, **strategy} if workers else None
    return train(cls, data(), 1 + workers, settings, callbacks=list(callbacks))


@pytest.mark.parametrize("name", all_slow_but([*MODELS, *OPEN], "Mappings", "Pairs", "Skips", "Early", "TwiceBias"))
def test_each_is_exact(name: str) -> None:
    cls = (MODELS | OPEN)[name]
    assert_same_run(run(cls, 2), run(cls, 0))


SETTINGS: dict[str, dict[str, Any]] = {
    "gpipe": {"schedule": "gpipe"},
    "driver stage": {"driver_stage": True},
    "one microbatch": {"num_microbatches": 1},
    "stack": {"microbatches": "stack"},
}


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_each_is_exact_with(name: str, settings: dict[str, Any]) -> None:
    assert_same_run(run(MODELS[name], 2, **settings), run(MODELS[name], 0))


@pytest.mark.parametrize("name", ["Skips", "Heads"])
def test_a_batch_that_is_cut_behind_the_step_is_put_together_again(name: str, caplog: pytest.LogCaptureFixture) -> None:
    piped = run(MODELS[name], 2, microbatches="stack")
    assert_same_run(piped, run(MODELS[name], 0))
    assert "whole batches" not in caplog.text


class MixedBeside(Block):
    def forward(self, h: Tensor, mean: Tensor | None = None) -> Any:
        return h + torch.tanh(self.linear(self.norm(h))) + (0 if mean is None else mean), h.mean().expand(len(h), 1)


class Mixed(Model):
    """What blocks pass on beside their hidden states is of the whole batch."""

    block = MixedBeside

    def forward(self, x: Tensor) -> Tensor:
        h, mean = self.stem(x), None
        for block in self.blocks:
            h, mean = block(h, mean)
        return self.head(h)


def test_what_is_passed_on_must_be_of_the_samples_to_be_cut(caplog: pytest.LogCaptureFixture) -> None:
    piped = run(Mixed, 2)
    assert_same_run(piped, run(Mixed, 0))
    assert "computes something else for a part of the batch" in caplog.text


def test_evaluation() -> None:
    outcomes = []
    for devices in (3, 1):
        done = run(Heads, devices - 1)
        [scores] = done.trainer.validate(done.module, data(), verbose=False)
        outcomes.append((scores["val_loss"], torch.cat(done.trainer.predict(done.module, data()))))
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs)


class Validating(Heads):
    """Uses what every block returns in validation only."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self.head(self.layers(batch[0])[-1]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val", torch.stack(self.layers(batch[0])).pow(2).mean())


@pytest.mark.parametrize("where", ["batch", "stack"])
def test_evaluation_that_is_the_first_to_use_them_logs_once(where: str) -> None:
    """The step begins again when they are asked for, and what it logged then is forgotten."""
    found = []
    for devices in (3, 1):
        settings = {"num_microbatches": 2, "microbatches": where} if devices > 1 else None
        done = train(Validating, data(), devices, settings)
        found += done.trainer.validate(done.module, data(), verbose=False)
    assert found[0] == pytest.approx(found[1], rel=1e-5)


class Returning(Heads):
    def predict_step(self, batch: Any, index: int) -> Any:
        return self.layers(batch[0])


@pytest.mark.parametrize("where", ["batch", "stack"])
def test_a_step_may_return_them(where: str) -> None:
    settings = {"num_microbatches": 2, "microbatches": where}
    piped, alone = (train(Returning, data(), n, settings if n > 1 else None) for n in (3, 1))
    found = [each.trainer.predict(each.module, data()) for each in (piped, alone)]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("nth", [2, 5, 9])
@pytest.mark.parametrize("name", ["Streams", "Skips", "Heads"])
def test_a_lost_worker_changes_nothing(name: str, nth: int) -> None:
    recovery = StageRecovery(spares=1)
    with Injector(Kill(At(Phase.TRAINING, nth=nth), who=2)) as injector:
        piped = run(MODELS[name], 4, recovery, replicas=2)
    assert [each.done for each in injector.report] == [True]
    assert_same_run(piped, run(MODELS[name], 0))


class First(Heads):
    depth = 6

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        outputs = self.layers(x)
        return (self.head(outputs[0] + outputs[-1]) - y).square().mean()


def test_a_stage_whose_output_is_used_is_in_every_path() -> None:
    watch = Watch()
    run(First, 3, watch, skip_ratio=1 / 3)
    paths = [path.stages for schedule in watch.schedules for path in schedule.paths]
    assert all(1 in path for path in paths)
    assert any(len(path) == 2 for path in paths)


class Changing(Block):
    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        h.mul_(1.1)
        return h + torch.tanh(self.linear(self.norm(h)))


class Changed(Heads):
    block = Changing


def test_what_a_block_behind_changes_in_place_is_refused() -> None:
    with pytest.raises(SkipPipeError, match="changes its input in place"):
        run(Changed, 2)


class LayersOfTransformers(LightningModule):
    """A loss on the hidden states of layers, as transformers returns them."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.net = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(n_layer=4, n_head=2, n_embd=8, vocab_size=16, n_positions=8, **dropout)
        )

    def training_step(self, batch: Any, index: int) -> Tensor:
        out = self.net(input_ids=batch[0], labels=batch[0], output_hidden_states=True)
        _, first, _, third, last = out.hidden_states
        return out.loss + (first - third.detach()).square().mean() + 0.1 * last.square().mean()

    def predict_step(self, batch: Any, index: int) -> Any:
        return self.net(input_ids=batch[0], output_hidden_states=True).hidden_states

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_hidden_states_that_transformers_returns() -> None:
    ids = torch.randint(0, 16, (16, 6), generator=torch.Generator().manual_seed(0))
    batches = DataLoader(TensorDataset(ids), batch_size=8)
    runs = [train(LayersOfTransformers, batches, n, {"num_microbatches": 4} if n > 1 else None) for n in (3, 1)]
    assert_same_run(*runs)
    found = [each.trainer.predict(each.module, batches) for each in runs]
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


class Returned(nn.Module):
    """Returns what its blocks return, or what follows from that: the loop has the loss."""

    def __init__(self, cls: type[Model], *, layers: bool) -> None:
        super().__init__()
        self.net, self.layers = cls(), layers

    def forward(self, x: Tensor) -> Any:
        return self.net.layers(x) if self.layers else self.net(x)


def gently(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def of_outputs(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for x, y in data():
        out = model(x.to(DEVICE))
        outputs = out if isinstance(out, list) else [out]
        loss = torch.stack([(each.mean(-1, keepdim=True) - y.to(DEVICE)).square().mean() for each in outputs]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("where", ["batch", "stack"])
@pytest.mark.parametrize(
    ("cls", "layers"), [(Heads, True), (Streams, False), (Skips, False)], ids=["layers", "streams", "skips"]
)
def test_plain_loops(cls: type[Model], layers: bool, where: str) -> None:
    plain_loops.assert_same(of_outputs, lambda: Returned(cls, layers=layers), optimizer=gently, microbatches=where)


class Counting(Block):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, h: Tensor, skip: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(h, skip)


class Counted(Early):
    block = Counting


class CountedTwice(Twice):
    block = Counting


def test_blocks_that_count_have_counted_once() -> None:
    """The first step begins again when they have done so."""
    for cls, settings in ((Counted, {"microbatches": "stack"}), (CountedTwice, {})):
        assert_same_run(run(cls, 2, **settings), run(cls, 0))


class Catching(Heads):
    """Goes on without what it has asked for, where that fails."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layers(x)
        try:
            h = outputs[-1] + outputs[1]
        except Exception:
            h = outputs[-1]
        return self.head(h)

    training_step = Model.training_step


def test_what_is_asked_for_is_given_also_where_user_code_catches_errors() -> None:
    assert_same_run(run(Catching, 2), run(Catching, 0))


class ByParameter(Heads):
    """Code between the blocks uses a parameter of the driver's, in validation, too."""

    def layers(self, x: Tensor) -> list[Tensor]:
        h = self.stem(x)
        for block in self.blocks:
            h = block(h) * (1 + self.head.weight[0])
        return [h]


def test_parameters_between_blocks_under_inference_mode() -> None:
    done = [run(ByParameter, workers) for workers in (2, 0)]
    assert_same_run(*done)
    scores = [each.trainer.validate(each.module, data(), verbose=False)[0]["val_loss"] for each in done]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)


class Skipping(Model):
    """Blocks get what has entered one before them, too; half of the loss is of a call without gradients."""

    block = Block

    def forward(self, x: Tensor) -> Tensor:
        h, before = self.stem(x), None
        for index, block in enumerate(self.blocks):
            before = h if index % 2 else before
            h = block(h, before)
        return self.head(h)

    def training_step(self, batch: Any, index: int) -> Tensor:
        x, y = batch
        out = self(x)
        with torch.no_grad():
            target = self(2 * x)
        return (out - y).square().mean() + (out - target).square().mean()


def test_a_call_without_gradients_while_another_is_to_go_back() -> None:
    """Workers that wait for gradients cannot be asked what blocks make of the last batch, which is smaller."""
    strategies: Any = ((3, {"num_microbatches": 4}), (1, None))
    assert_same_run(*(train(Skipping, data(20), devices, strategy, max_steps=4) for devices, strategy in strategies))
