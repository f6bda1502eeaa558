"""Parameters that blocks share, with each other or with the rest of the model: exact, and one in a checkpoint."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import l1_unstructured
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.moe import MoEConfig, MoELayer
from tests.grids import all_slow_but, slow

from .support import Run, assert_same_run, train

DIM, VOCABULARY, LENGTH = 8, 12, 6


class Block(nn.Module):
    """A mixer of positions and a feed-forward; either may be another block's, too."""

    def __init__(self, feedforward: nn.Module | None = None, positions: nn.Parameter | None = None) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)
        self.feedforward = feedforward or nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))
        self.positions = positions

    def forward(self, h: Tensor) -> Tensor:
        mixed = self.linear(self.norm(h))
        if self.positions is not None:
            mixed = torch.softmax(self.positions, -1) @ mixed
        return h + self.feedforward(mixed)


class Model(LightningModule):
    def __init__(self, blocks: list[nn.Module], optimizer: str = "adamw") -> None:
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCABULARY, DIM), nn.ModuleList(blocks)
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCABULARY)
        self.optimizer = optimizer

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self(x).flatten(0, 1), y.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
        return torch.optim.AdamW(self.parameters(), lr=0.02, weight_decay=0.1)


def one_feedforward() -> Model:
    """All blocks have one: within a stage, and across stages."""
    feedforward = nn.Sequential(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))
    return Model([Block(feedforward) for _ in range(4)])


def one_table() -> Model:
    positions = nn.Parameter(torch.randn(LENGTH, LENGTH))
    return Model([Block(positions=positions) for _ in range(4)])


def first_and_last() -> Model:
    model = Model([Block() for _ in range(4)])
    model.blocks[3].linear.weight = model.blocks[0].linear.weight
    return model


class Looking(Block):
    """Looks the vocabulary up again."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) + torch.softmax(h @ self.embed.weight.T, -1) @ self.embed.weight


def with_the_embedding() -> Model:
    model = Model([])
    model.blocks.extend([Block(), Looking(model.embed), Block(), Looking(model.embed)])
    return model


def with_the_head() -> Model:
    model = Model([Block() for _ in range(4)])
    model.blocks[2].out = nn.Linear(DIM, VOCABULARY)
    model.blocks[2].feedforward = nn.Sequential(model.blocks[2].out, nn.GELU(), nn.Linear(VOCABULARY, DIM))
    model.head.weight = model.blocks[2].out.weight
    return model


def one_layer() -> Model:
    """The same layer at every depth."""
    return Model([Block()] * 4)


def one_pruned_layer() -> Model:
    """Before each forward a hook of torch's makes its weight, an attribute, of a parameter and a mask."""
    block = Block()
    l1_unstructured(block.linear, "weight", amount=0.3)
    return Model([block] * 4)


def two_layers_in_turns() -> Model:
    return Model([Block(), Block()] * 2)


def data(num_batches: int = 4) -> DataLoader[Any]:
    drawn = torch.Generator().manual_seed(1)
    x, y = (torch.randint(VOCABULARY, (8 * num_batches, LENGTH), generator=drawn) for _ in range(2))
    return DataLoader(TensorDataset(x, y), batch_size=8)


def run(make: Callable[[], Model], devices: int, strategy: Any = None, optimizer: str = "adamw", **options: Any) -> Run:
    def made() -> Model:
        model = make()
        model.optimizer = optimizer
        return model

    return train(made, data(), devices, strategy, max_steps=4, **options)


MAKERS = [
    one_feedforward,
    one_table,
    first_and_last,
    with_the_embedding,
    with_the_head,
    one_layer,
    one_pruned_layer,
    two_layers_in_turns,
]
SMALL = {"num_microbatches": 4, "verbose": False}


@pytest.mark.parametrize(("schedule", "optimizer"), [slow("1f1b", "adamw"), ("gpipe", "sgd")])
@pytest.mark.parametrize("make", all_slow_but(MAKERS, first_and_last, with_the_embedding, one_pruned_layer))
def test_a_shared_parameter_is_one_in_all_blocks(make: Callable[[], Model], schedule: str, optimizer: str) -> None:
    options = {"gradient_clip_val": 0.5} if optimizer == "sgd" else {}
    one = run(make, 1, optimizer=optimizer, **options)
    assert_same_run(run(make, 3, {**SMALL, "schedule": schedule}, optimizer, **options), one)


@pytest.mark.parametrize("make", [slow(one_feedforward), with_the_embedding])
@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (3, {"driver_stage": True}),
        (5, {"replicas": 2}),
        (3, {"microbatches": "stack"}),
    ],
    ids=["driver_stage", "replicas", "stack"],
)
def test_other_places_and_ways(make: Callable[[], Model], devices: int, strategy: dict[str, Any]) -> None:
    assert_same_run(run(make, devices, {**SMALL, **strategy}), run(make, 1))


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=["sums", "bf16"])
def test_options_of_the_trainer(options: dict[str, Any]) -> None:
    one = run(one_feedforward, 1, **options)
    tolerance = {"rtol": 1e-2, "weights_rtol": 0.1, "weights_atol": 0.05} if "precision" in options else {}
    assert_same_run(run(one_feedforward, 3, SMALL, **options), one, **tolerance)


class Deep(Block):
    """Knows its depth by an attribute that the model sets before each call."""

    depth = 0

    def forward(self, h: Tensor) -> Tensor:
        return super().forward(h) * (1 + 0.1 * self.depth)


class SetsDepth(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for depth, block in enumerate(self.blocks):
            block.depth = depth
            h = block(h)
        return self.head(self.norm(h))


def test_one_layer_has_at_each_depth_what_was_set_for_it() -> None:
    def make() -> Model:
        return SetsDepth([Deep()] * 4)

    assert_same_run(run(make, 3, SMALL), run(make, 1))


class Counting(Block):
    calls = 0

    def forward(self, h: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(h) * (1 + 0.1 * self.calls)


class Writing(Block):
    def forward(self, h: Tensor) -> Tensor:
        self.linear.weight.data.clamp_(-0.1, 0.1)
        return super().forward(h)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Model([Counting()] * 4), r"writes the attribute blocks\.\d\.calls of a module that other blocks have"),
        (lambda: Model([Block(nn.BatchNorm1d(LENGTH))] * 4), r"writes blocks\.\d\.feedforward\.running_mean, which"),
        (lambda: Model([Writing()] * 4), r"writes linear\.weight, which other blocks"),
    ],
    ids=["attribute", "buffer", "parameter"],
)
def test_what_copies_would_not_see_is_refused(make: Callable[[], Model], message: str) -> None:
    with pytest.raises(SkipPipeError, match=message):
        run(make, 3, SMALL)


class Universal(Model):
    """Calls one layer in a loop, and has no list of it."""

    def __init__(self) -> None:
        super().__init__([])
        self.layer, self.num_times = Block(), 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for _ in range(self.num_times):
            h = self.layer(h)
        return self.head(self.norm(h))


@pytest.mark.parametrize(("driver_stage", "devices"), [(False, 3), (True, 2)])
def test_one_layer_that_is_called_in_a_loop(driver_stage: bool, devices: int) -> None:
    settings = {**SMALL, "blocks": "layer*4", "driver_stage": driver_stage}
    assert_same_run(run(Universal, devices, settings), run(Universal, 1))


@pytest.mark.parametrize("said", [3, 5])
def test_a_number_of_times_that_is_wrong_is_refused(said: int) -> None:
    with pytest.raises(SkipPipeError, match=f"how often layer is called .{said} times were expected"):
        run(Universal, 3, {**SMALL, "blocks": f"layer*{said}"})


class Mixture(Block):
    def __init__(self) -> None:
        super().__init__(MoELayer(DIM, 8, num_experts=4))


def test_a_mixture_of_experts_at_every_depth_trains_without_balance() -> None:
    def make() -> Model:
        return Model([Mixture()] * 4, "sgd")

    assert_same_run(run(make, 3, SMALL), run(make, 1))
    with pytest.raises(SkipPipeError, match=r"the router blocks\.0\.feedforward.* is part of several blocks"):
        run(make, 3, {**SMALL, "moe": MoEConfig()})
