"""Several stacks on workers: ``blocks=[...]`` lists them in the order in which every forward calls them."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.partition import cut, estimate_costs, find_blocks
from skippipe_plugin.schedule import Path
from skippipe_plugin.strategies import PathConfig
from tests.grids import all_slow_but
from tests.zoo.entries import ZOO

from .emulation import Watch
from .models import TanhBlock
from .modules import loader
from .support import DEVICE, assert_same_losses, assert_same_run, train
from .test_recovery import At, await_spare, kill
from .transparency.plain_loops import assert_same

BOTH = ["source.layers", "target.layers"]


class Layers(nn.Module):
    """A tower; each layer may take what another tower has made."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(depth))
        self.norm = nn.LayerNorm(8)

    def forward(self, h: Tensor, other: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            h = layer(h, other)
        return self.norm(h)  # type: ignore[no-any-return]


class Layer(TanhBlock):
    def forward(self, h: Tensor, other: Tensor | None = None) -> Tensor:
        return super().forward(h if other is None else h + 0.5 * other)


class Translator(LightningModule):
    """An encoder and a decoder whose layers all look at what the encoder has made."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.source, self.target = Layers(), Layers()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.target(self.embed(y), self.source(self.embed(x))))  # type: ignore[no-any-return]

    def loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        x, y = batch["x"], batch["y"]
        return F.mse_loss(self(x, y), x.sum(-1, keepdim=True))

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Mapping[str, Tensor]) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Towers(Translator):
    """Two towers that have nothing to do with each other before their results are compared."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        one, other = self.source(self.embed(x)), self.target(self.embed(y))
        return self.head(one * other)  # type: ignore[no-any-return]


MODELS = {"translator": Translator, "towers": Towers}
DATA = {name: torch.randn(24, 4, generator=torch.Generator().manual_seed(seed)) for seed, name in enumerate("xy")}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def spread(make: Callable[[], LightningModule], devices: int = 4, **settings: Any) -> Any:
    callbacks = settings.pop("callbacks", [])
    return train(
        make, loader(DATA, 8), devices, {"blocks": BOTH, "num_microbatches": 4, **settings}, callbacks=callbacks
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"schedule": "gpipe"}, marks=pytest.mark.slow),
        {"driver_stage": True},
        {"microbatches": "stack"},
        pytest.param({"num_microbatches": 1}, marks=pytest.mark.slow),
        pytest.param({"devices": 9}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_both_on_workers(name: str, settings: dict[str, Any]) -> None:
    make = MODELS[name]
    assert_same_run(spread(make, **settings), train(make, loader(DATA, 8), 1))


def test_stages_are_cut_over_all_of_them() -> None:
    stack = find_blocks(Translator(), BOTH)
    assert len(stack) == 8
    assert cut(estimate_costs(stack.blocks), 3) == (range(3), range(3, 6), range(6, 8))


@pytest.mark.parametrize("name", MODELS)
def test_evaluation(name: str) -> None:
    seen: list[list[float]] = []
    for devices, strategy in ((1, None), (3, {"blocks": BOTH})):
        module = MODELS[name]()
        torch.nn.init.constant_(module.head.weight, 0.3)
        trainer = Trainer(
            accelerator="cpu", devices=devices, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            **({"strategy": _strategy(**strategy)} if strategy else {}),
        )  # fmt: skip
        torch.manual_seed(1)
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        seen.append([found["val"] for found in trainer.validate(module, loader(DATA, 8), verbose=False)])
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)


def _strategy(**settings: Any) -> Any:
    from skippipe_plugin.strategies import SkipPipeStrategy

    return SkipPipeStrategy(verbose=False, **settings)


class Net(nn.Module):
    def __init__(self, make: Callable[[], Translator]) -> None:
        super().__init__()
        made = make()
        self.embed, self.head, self.source, self.target = made.embed, made.head, made.source, made.target
        self._forward = functools.partial(type(made).forward, self)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        return {"loss": F.mse_loss(self._forward(x, y), x.sum(-1, keepdim=True))}


def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    losses = []
    for start in range(0, 24, 8):
        loss = model(**{name: values[start : start + 8].to(DEVICE) for name, values in DATA.items()})["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


@pytest.mark.parametrize("name", MODELS)
def test_a_loop_of_plain_torch(name: str) -> None:
    assert_same(loop, functools.partial(Net, MODELS[name]), optimizer=_sgd, blocks=BOTH)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("rank", range(1, 7))
def test_a_worker_that_is_lost_is_replaced(name: str, rank: int) -> None:
    recovery = StageRecovery(spares=1)
    spare = At("on_train_batch_start", 1, await_spare)
    happenings = [recovery, spare, At("on_train_batch_start", 2, kill(rank))]
    found = spread(MODELS[name], 7, replicas=2, callbacks=happenings)
    assert [event.source for event in recovery.events] == ["replica"]
    assert_same_losses(found.losses, train(MODELS[name], loader(DATA, 8), 1).losses, rtol=1e-4)


class Skipping(Callback):
    """Lets blocks do nothing that the one microbatch of a step skips, in one process."""

    def __init__(self, paths: Sequence[Path], num_stages: int) -> None:
        self._paths, self._num_stages = paths, num_stages
        self._undo: list[Callable[[], None]] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        blocks = find_blocks(module, BOTH).blocks
        for stage, held in enumerate(cut(estimate_costs(blocks), self._num_stages), start=1):
            for block in held if stage not in self._paths[index].stages else ():
                blocks[block].forward = lambda h, *_: h  # type: ignore[method-assign]
                self._undo.append(functools.partial(delattr, blocks[block], "forward"))

    def on_train_batch_end(self, *_: Any) -> None:
        while self._undo:
            self._undo.pop()()


def _skipped(paths: Sequence[Path], num_stages: int) -> Iterator[int]:
    for path in paths:
        yield from set(range(1, num_stages + 1)) - set(path.stages)


@pytest.mark.parametrize("name", all_slow_but(MODELS, "translator"))
def test_what_is_skipped_hands_on_what_it_got(name: str) -> None:
    """The stage with which the second stack begins is never skipped: what it makes enters there."""
    watch, make = Watch(), MODELS[name]
    found = spread(
        make, 9, num_microbatches=1, skip_ratio=0.25, paths=PathConfig(costs="uniform"), callbacks=[watch]
    )  # fmt: skip
    paths = [schedule.paths[0] for schedule in watch.schedules]
    skipped = set(_skipped(paths, 8))
    assert skipped
    assert 5 not in skipped
    assert_same_run(found, train(make, loader(DATA, 8), 1, callbacks=[Skipping(paths, 8)]))


def test_a_stack_that_is_called_first_is_named_first() -> None:
    with pytest.raises(SkipPipeError, match=r"source\.layers\.0 was called where target\.layers\.0 was expected.*List"):
        spread(Translator, blocks=BOTH[::-1])


class Alone(Translator):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(self.source(self.embed(x)))  # type: ignore[no-any-return]


def test_a_stack_that_is_not_called_is_not_to_be_named() -> None:
    with pytest.raises(
        SkipPipeError, match=r"output of source\.layers\.3 .*blocks=\.\.\. only stacks that every forward"
    ):
        spread(Alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5 both", "clip both"])
def test_models_of_transformers_recover(name: str) -> None:
    from tests.zoo.running import run

    recovery = StageRecovery(spares=1)
    spare = At("on_train_batch_start", 1, await_spare)
    found = run(ZOO[name], 4, recovery, spare, At("on_train_batch_start", 2, kill(2)), replicas=2)
    assert [event.source for event in recovery.events] == ["replica"]
    assert_same_losses(found.losses, run(ZOO[name], 0).losses, rtol=1e-4)
