"""Batches without a dimension of the samples in all of their tensors: the step runs once, and what can be cut is."""

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import rnn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.engine.errors import SkipPipeError
from tests.grids import all_slow_but, slow

from ..support import DEVICE, Run, assert_same_run, train
from .plain_loops import assert_same
from .test_whole import Visits

ONCE = "runs once, on the whole batch"
WHOLE = "the blocks get whole batches"
PIPELINE = {"num_microbatches": 4, "verbose": False}
Batch = dict[str, Any]


class Rowwise(nn.Module):
    """Takes what the others get, and needs none of it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor, *_: Any) -> Tensor:
        return h + torch.tanh(self.linear(h)) / 2


class Attending(Rowwise):
    """Attends within each sequence of a row of sequences."""

    def forward(self, h: Tensor, bounds: Tensor) -> Tensor:
        ends = bounds.tolist()
        parts = [h[start:end] for start, end in itertools.pairwise(ends)]
        return super().forward(torch.cat([(part @ part.T / 3).softmax(-1) @ part for part in parts]))


class AttendingByNumber(Rowwise):
    """The same, told which sequence each row is of."""

    def forward(self, h: Tensor, owner: Tensor) -> Tensor:
        scores = (h @ h.T / 3).masked_fill(owner[:, None] != owner, -torch.inf)
        return super().forward(scores.softmax(-1) @ h)


class Convolving(Rowwise):
    """Passes messages along the edges of graphs."""

    def forward(self, h: Tensor, edges: Tensor) -> Tensor:
        return super().forward(torch.zeros_like(h).index_add(0, edges[1], h[edges[0]]) + h)


class Packed(LightningModule):
    """Rows of samples, pooled behind the blocks or in front of them."""

    def __init__(self, block: Callable[[], nn.Module], argument: str = "", *, pooled_first: bool = False) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(block() for _ in range(4))
        self.argument, self.pooled_first = argument, pooled_first

    def forward(self, batch: Batch) -> Tensor:
        h = self.embed(batch["x"])
        h = self.pooled(h, batch) if self.pooled_first else h
        for block in self.blocks:
            h = block(h, batch[self.argument]) if self.argument else block(h)
        return self.head(h if self.pooled_first else self.pooled(h, batch)).squeeze(-1)

    def pooled(self, h: Tensor, batch: Batch) -> Tensor:
        return h.new_zeros(len(batch["y"]), 8).index_add(0, batch["owner"], h)

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self(batch), batch["y"])

    def training_step(self, batch: Batch, _: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Batch, _: int) -> None:
        self.log("val", self.loss(batch), batch_size=len(batch["y"]))

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.parameters(), lr=1e-2, eps=1e-4)


class Detector(Packed):
    """Has the targets of all samples in one tensor, with the number of each one's sample."""

    def __init__(self) -> None:
        super().__init__(Rowwise)

    def forward(self, batch: Batch) -> Tensor:
        h = self.embed(batch["x"])
        for block in self.blocks:
            h = block(h)
        return self.head(h).squeeze(-1)

    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self(batch)[batch["owner"]], batch["targets"])


def packed(lengths: Sequence[int]) -> Batch:
    """Put samples with so many rows into one row."""
    drawn = torch.Generator().manual_seed(sum(length * 7**place for place, length in enumerate(lengths)))
    x = torch.randn(sum(lengths), 4, generator=drawn)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    after = torch.arange(len(x) - 1)[owner[1:] == owner[:-1]]
    edges = torch.stack([after, after + 1]) if len(after) else torch.zeros(2, 0, dtype=torch.long)
    y = torch.zeros(len(lengths)).index_add(0, owner, x.sum(1))
    return {"x": x, "owner": owner, "bounds": bounds, "edges": edges, "y": y}


def detected(lengths: Sequence[int]) -> Batch:
    batch = packed(lengths)
    return {
        "x": torch.stack([batch["x"][batch["owner"] == each].sum(0) for each in range(len(lengths))]),
        "owner": batch["owner"],
        "targets": batch["x"].sum(1),
        "y": batch["y"],
    }


def held(make: Callable[[Sequence[int]], Batch], lengths: Sequence[Sequence[int]], *names: str) -> DataLoader[Any]:
    batches = [make(each) for each in lengths]
    wanted = [{name: each[name] for name in names} if names else each for each in batches]
    return DataLoader(wanted, batch_size=1, collate_fn=lambda items: items[0])


RAGGED = [(3, 1, 4, 2), (2, 5, 1, 3, 2), (1, 2, 6, 3), (4, 4, 1)]
EVEN_FIRST = [(3, 3, 3, 3), (1, 5, 4, 2), (2, 6, 1, 3), (5, 1, 1, 5), (3, 3, 3, 3)]
"""Of as many rows each, in the first batch; later ones have as many rows in all."""
ONES = [(2, 1, 3, 2), (1, 1, 1, 1), (0, 2, 1, 1), (3, 1, 0, 0)]
"""Later ones have as many rows as samples."""
ONES_FIRST = [(1, 1, 1, 1), (0, 2, 1, 1), (3, 1, 0, 0), (2, 1, 3, 2)]
COLUMNS = ("x", "owner", "y")

CASES: dict[str, tuple[Callable[[], LightningModule], Callable[..., DataLoader[Any]]]] = {
    "pooled before": (partial(Packed, Rowwise, pooled_first=True), partial(held, packed)),
    "pooled behind": (partial(Packed, Rowwise), partial(held, packed)),
    "sequences by bounds": (partial(Packed, Attending, "bounds"), partial(held, packed)),
    "sequences by number": (partial(Packed, AttendingByNumber, "owner"), partial(held, packed)),
    "graphs": (partial(Packed, Convolving, "edges"), partial(held, packed)),
    "targets": (Detector, partial(held, detected)),
}
LENGTHS = {"ragged": RAGGED, "even first": EVEN_FIRST, "ones": ONES, "ones first": ONES_FIRST}
FIRST, *OTHERS = LENGTHS


def fit(make: Callable[[], LightningModule], data: DataLoader[Any], devices: int, **settings: Any) -> Run:
    options = {name: settings.pop(name) for name in ("callbacks", "max_steps") if name in settings}
    strategy = {**PIPELINE, **settings} if devices > 1 else None
    return train(make, data, devices, strategy, val_data=data, **{"max_steps": 8, "max_epochs": 2, **options})


@pytest.mark.parametrize("lengths", all_slow_but(LENGTHS, "ragged", "ones first"))
@pytest.mark.parametrize(
    "name", all_slow_but(CASES, "pooled behind", "sequences by bounds", "sequences by number", "targets")
)
def test_they_give_what_one_process_gives(name: str, lengths: str) -> None:
    make, data = CASES[name]
    found, expected = (fit(make, data(LENGTHS[lengths]), devices) for devices in (3, 1))
    assert_same_run(found, expected)
    for key in ("val", "loss"):
        torch.testing.assert_close(found.trainer.callback_metrics[key], expected.trainer.callback_metrics[key])


@pytest.mark.parametrize(("name", "is_cut"), [("pooled before", True), ("targets", True), ("graphs", False)])
def test_it_is_said_once_that_the_step_runs_once(name: str, is_cut: bool, caplog: pytest.LogCaptureFixture) -> None:
    make, data = CASES[name]
    visits = Visits()
    with caplog.at_level(logging.WARNING):
        fit(make, data(RAGGED), 3, callbacks=[visits])
    assert visits.counts[:2] == ([4, 4] if is_cut else [1, 1])
    said = [each.message for each in caplog.records]
    assert len([each for each in said if ONCE in each and "must share their first dimension" in each]) == 1
    assert len([each for each in said if WHOLE in each]) == (not is_cut)


@pytest.mark.parametrize("lengths", [FIRST, *(pytest.param(each, marks=pytest.mark.slow) for each in OTHERS)])
@pytest.mark.parametrize("name", all_slow_but(CASES, "pooled before", "sequences by bounds", "graphs"))
def test_so_they_do_with_stack(name: str, lengths: str) -> None:
    make, data = CASES[name]
    loader = data(LENGTHS[lengths])
    assert_same_run(fit(make, loader, 3, microbatches="stack"), fit(make, loader, 1))


class Manual(Packed):
    """Goes back itself."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, _: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.loss(batch)
        self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": loss.detach()}


class Twice(Packed):
    """Calls the blocks twice."""

    def loss(self, batch: Batch) -> Tensor:
        return super().loss(batch) + 0.1 * self({**batch, "x": batch["x"].flip(1)}).pow(2).mean()


@pytest.mark.parametrize("lengths", [slow("even first"), "ones first"])
@pytest.mark.parametrize("block", [(Attending, "bounds"), (AttendingByNumber, "owner")], ids=["bounds", "number"])
@pytest.mark.parametrize("kind", [Manual, Twice])
def test_so_they_do_where_steps_are_open(kind: type[Packed], block: tuple[Any, str], lengths: str) -> None:
    data = held(packed, LENGTHS[lengths])
    make = partial(kind, *block)
    assert_same_run(fit(make, data, 3), fit(make, data, 1))


class Pooled(nn.Module):
    """The model of a loop; with targets it returns its loss."""

    def __init__(self, block: Callable[[], nn.Module] = Rowwise, argument: str = "") -> None:
        super().__init__()
        self.inner = Packed(block, argument, pooled_first=not argument)

    def forward(self, targets: Tensor | None = None, **batch: Tensor) -> Any:
        made = self.inner({**batch, "y": batch["bounds"][1:]})
        return made if targets is None else {"loss": F.mse_loss(made, targets), "made": made}


@pytest.mark.parametrize("inside", [True, False], ids=["loss of the model", "loss of the loop"])
@pytest.mark.parametrize("make", [Pooled, partial(Pooled, Attending, "bounds")], ids=["pooled", "sequences"])
@pytest.mark.parametrize("lengths", [slow("ragged"), "ones first"])
def test_so_they_do_in_loops(make: Callable[[], nn.Module], inside: bool, lengths: str) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen = []
        for batch in map(packed, LENGTHS[lengths]):
            given = {name: batch[name].to(DEVICE) for name in ("x", "owner", "bounds")}
            targets = batch["y"].to(DEVICE)
            out = model(targets, **given) if inside else model(**given)
            loss = out["loss"] if inside else F.mse_loss(out, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                seen += [float(loss.detach()), float(model(**given).sum())]
            model.train()
        return seen

    assert_same(loop, make, optimizer=lambda model: AdamW(model.parameters(), lr=1e-2, eps=1e-4))


# ------------------------------------------------- what has no dense form


class Recurring(nn.Module):
    """Gets what its model gives it: a packed sequence, a nested tensor, or a padded one with lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(8, 8, batch_first=True)

    def forward(self, h: Any, lengths: Tensor | None = None) -> Any:
        if lengths is None:
            return self.layer(h)[0] if isinstance(h, rnn.PackedSequence) else h * 2
        packed = rnn.pack_padded_sequence(h, lengths.cpu(), batch_first=True, enforce_sorted=False)
        return h + rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=h.shape[1])[0]


class Unpadded(LightningModule):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.embed, self.head = nn.Linear(4, 8), nn.Linear(8, 1)
        self.blocks = nn.ModuleList(Recurring() for _ in range(4))

    def training_step(self, batch: Any, _: int) -> Tensor:
        x, lengths = batch
        h: Any = self.embed(x)
        if self.form == "packed":
            h = rnn.pack_padded_sequence(h, lengths.cpu(), batch_first=True, enforce_sorted=False)
        elif self.form == "nested":
            h = torch.nested.nested_tensor([row[:n] for row, n in zip(h, lengths, strict=True)], layout=torch.jagged)
        for block in self.blocks:
            h = block(h, lengths) if self.form == "padded" else block(h)
        assert self.form == "padded", "it is refused before"
        return self.head(h).square().mean()

    def configure_optimizers(self) -> AdamW:
        return AdamW(self.parameters(), lr=0.01)


def train_unpadded(form: str, devices: int) -> Run:
    x = torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0))
    data = DataLoader(TensorDataset(x, torch.arange(8) % 5 + 1), batch_size=4)
    return train(partial(Unpadded, form), data, devices, PIPELINE if devices > 1 else None, max_steps=2)


@pytest.mark.parametrize(("form", "called"), [("packed", "a PackedSequence"), ("nested", "a nested tensor")])
def test_what_has_no_dense_form_says_so(form: str, called: str) -> None:
    with pytest.raises(SkipPipeError, match=rf"blocks\.0 is called with {called}.* give the blocks the padded tensor"):
        train_unpadded(form, 3)


def test_the_padded_tensor_is_exact() -> None:
    assert_same_run(train_unpadded("padded", 3), train_unpadded("padded", 1))
