"""Steps that run once, on the whole batch: the result is one process's, whatever the loss, and so are the draws."""

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from skippipe_plugin.callbacks import StageRecovery
from tests.grids import all_slow_but, slow

from .. import loops
from ..support import Run, assert_same_run, train
from ..test_recovery import At, kill
from . import whole_models as models

STACK = {"microbatches": "stack", "num_microbatches": 4, "verbose": False}


class Samples(Dataset[dict[str, Tensor]]):
    """Features, tokens, labels, lengths: what the modules pick from."""

    def __init__(self, count: int = 24, length: int = 6) -> None:
        draws = torch.Generator().manual_seed(1)
        lengths = torch.randint(1, length + 1, (count,), generator=draws)
        labels = torch.randint(0, 4, (count, length), generator=draws)
        self.columns = {
            "x": torch.randn(count, 4, generator=draws),
            "y": torch.randint(0, 4, (count,), generator=draws),
            "tokens": torch.randn(count, length, 4, generator=draws),
            "lengths": lengths,
            "labels": torch.where(torch.arange(length)[None] < lengths[:, None], labels, -100),
            "frames": torch.full((count,), length),
            "targets": torch.randint(1, 4, (count, length), generator=draws),
        }

    def __len__(self) -> int:
        return len(self.columns["x"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}


def batches(count: int = 24, length: int = 6, batch_size: int = 8) -> DataLoader[Any]:
    return DataLoader(Samples(count, length), batch_size=batch_size)


class Visits(Callback):
    """Notes how many microbatches the first stage had in each step."""

    def __init__(self) -> None:
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if hasattr(trainer.strategy, "visit_counts"):
            self.counts.append(trainer.strategy.visit_counts.get(1, 0))


def both(
    make: Any, data: Any = None, strategy: Mapping[str, Any] | None = None, **options: Any
) -> tuple[Run, Run, Visits]:
    visits = Visits()
    usual = {"max_steps": 3, **options}
    plain = train(make, data or batches(), 1, **usual)
    own = [*usual.pop("callbacks", ()), visits]
    piped = train(make, data or batches(), 3, {**STACK, **(strategy or {})}, callbacks=own, **usual)
    return piped, plain, visits


KINDS = [
    models.Contrastive,
    models.Clip,
    models.Normed,
    models.Tokens,
    models.Ctc,
    models.CtcSum,
    models.PerSample,
    models.Dropped,
    models.Diffusion,
    models.Quantile,
    models.Mixup,
    models.InPlace,
    models.Attending,
    models.Longest,
    models.Causal,
    models.Rotary,
    models.Positions,
    models.SequenceFirst,
]


@pytest.mark.parametrize(
    "make",
    all_slow_but(
        KINDS,
        models.Contrastive,
        models.Normed,
        models.Ctc,
        models.PerSample,
        models.Diffusion,
        models.Quantile,
        models.Attending,
        models.Causal,
        models.SequenceFirst,
    ),
)
def test_the_result_is_that_of_one_process(make: Any) -> None:
    piped, plain, visits = both(make)
    assert_same_run(piped, plain)
    assert visits.counts == [4, 4, 4]
    assert piped.trainer.callback_metrics.keys() == plain.trainer.callback_metrics.keys()
    for name, value in plain.trainer.callback_metrics.items():
        torch.testing.assert_close(piped.trainer.callback_metrics[name], value)


@pytest.mark.parametrize("make", [models.Contrastive, models.Normed, models.Diffusion, models.Packed, models.Counted])
def test_one_microbatch_is_a_whole_step(make: Any) -> None:
    piped, plain, visits = both(make, strategy={"microbatches": "auto", "num_microbatches": 1})
    assert_same_run(piped, plain)
    assert visits.counts == [1, 1, 1]


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_random_numbers_go_on_as_in_one_process(num_microbatches: int) -> None:
    ends = []
    for devices, strategy in ((1, None), (3, STACK | {"num_microbatches": num_microbatches})):
        train(models.Mixup, batches(), devices, strategy, max_steps=3)
        ends.append(torch.rand(4))
    assert torch.equal(*ends)


@pytest.mark.parametrize(
    "make", [models.Causal, models.Longest, slow(models.Positions), models.SequenceFirst, slow(models.Rotary)]
)
def test_as_many_tokens_as_samples(make: Any) -> None:
    piped, plain, visits = both(make, batches(length=8))
    assert_same_run(piped, plain)
    assert visits.counts == [4, 4, 4]


@pytest.mark.parametrize("make", [models.Contrastive, models.Attending])
def test_batches_of_any_size(make: Any) -> None:
    piped, plain, visits = both(make, batches(11 + 8), max_steps=-1, max_epochs=2)
    assert_same_run(piped, plain)
    assert visits.counts == [4, 4, 3] * 2
    piped, plain, visits = both(models.Attending, batches(5, batch_size=1))
    assert_same_run(piped, plain)
    assert visits.counts == [1, 1, 1]


def weighted(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]} | {"weights": torch.arange(1.0, 5.0)}


def sequences(rows: list[dict[str, Tensor]]) -> list[Tensor]:
    return [row["tokens"] for row in rows]


@pytest.mark.parametrize(
    ("make", "collate", "counts"),
    [(models.Weighted, weighted, [4] * 3), (models.Flattened, None, [4] * 3), (models.Listed, sequences, None)],
)
def test_batches_of_any_form(make: Any, collate: Any, counts: Any) -> None:
    data = DataLoader(Samples(), batch_size=8, collate_fn=collate)
    piped, plain, visits = both(make, data)
    assert_same_run(piped, plain)
    assert counts is None or visits.counts == counts


@pytest.mark.parametrize(("make", "why"), [(models.Packed, "becomes"), (models.Counted, "with the value 8")])
def test_what_cannot_be_cut_goes_whole_and_says_so(make: Any, why: str, caplog: pytest.LogCaptureFixture) -> None:
    piped, plain, visits = both(make)
    assert_same_run(piped, plain)
    assert visits.counts == [1, 1, 1]
    assert [
        each.message
        for each in caplog.records
        if "the blocks get whole batches" in each.message and why in each.message
    ]


@pytest.mark.parametrize(
    "strategy", [{}, slow({"num_microbatches": 1}), {"driver_stage": True}, slow({"schedule": "gpipe"})], ids=str
)
def test_what_the_step_changes_and_logs_is_that_of_one_run(strategy: dict[str, Any]) -> None:
    piped, plain, _ = both(models.Stateful, max_steps=-1, max_epochs=2, strategy=strategy)
    assert_same_run(piped, plain)
    for name in ("calls", "kept", "sums"):
        assert getattr(piped.module, name) == getattr(plain.module, name)
    assert piped.trainer.callback_metrics.keys() == plain.trainer.callback_metrics.keys()
    for name, value in plain.trainer.callback_metrics.items():
        torch.testing.assert_close(piped.trainer.callback_metrics[name], value)


def test_evaluation_has_the_whole_batch() -> None:
    found = []
    for devices, strategy in ((1, None), (3, STACK)):
        run = train(models.Evaluated, batches(20), devices, strategy, val_data=batches(20), max_steps=3)
        metric = run.trainer.callback_metrics["val"]
        found.append((metric, run.trainer.predict(run.module, batches(20))))
    torch.testing.assert_close(*[value for value, _ in found])
    for ours, theirs in zip(found[1][1], found[0][1], strict=True):
        assert ours.keys() == theirs.keys()
        torch.testing.assert_close(ours, theirs)


def test_steps_without_a_loss_are_left_out() -> None:
    class Sometimes(models.Contrastive):
        def training_step(self, batch: Any) -> Any:
            self.calls = getattr(self, "calls", 0) + 1
            return None if self.calls == 2 else super().training_step(batch)

    piped, plain, visits = both(Sometimes)
    assert_same_run(piped, plain)
    assert visits.counts == [4, 0, 4]


@pytest.mark.parametrize("value", ["whole", None, 4])
def test_the_setting_is_checked(value: Any) -> None:
    with pytest.raises(ValueError, match=r"microbatches=.*; it is one of 'auto', 'batch', 'stack'"):
        train(models.Mixup, batches(), 3, {"microbatches": value})


def time_first(rows: list[dict[str, Tensor]]) -> Tensor:
    return torch.stack([row["tokens"] for row in rows], 1)


@pytest.mark.parametrize("make", [models.NormedBlocks, models.AmongSamples, models.TimeFirst])
def test_blocks_that_look_at_other_samples_get_the_whole_batch(make: Any, caplog: pytest.LogCaptureFixture) -> None:
    collate = time_first if make is models.TimeFirst else None
    piped, plain, visits = both(make, DataLoader(Samples(), batch_size=8, collate_fn=collate))
    assert_same_run(piped, plain)
    assert visits.counts == [1, 1, 1]
    assert "computes something else for a part of the batch" in caplog.text


def test_blocks_that_draw_are_cut() -> None:
    _, _, visits = both(models.DroppedBlocks)
    assert visits.counts == [4, 4, 4]


def test_a_lock_and_a_section_around_the_step() -> None:
    lock = threading.Lock()

    class Locked(models.Mixup):
        def training_step(self, batch: Any) -> Tensor:
            with lock, self.trainer.profiler.profile("mine"):
                return super().training_step(batch)

    piped, plain, visits = both(Locked, profiler="simple")
    assert_same_run(piped, plain)
    assert visits.counts == [4, 4, 4]


def test_a_step_that_is_interrupted_is_taken_once() -> None:
    """With a replica left nothing of the blocks is lost, so the run is that of one process, draws and logs included."""
    ends, runs = [], []
    kills = [StageRecovery(), At("on_train_batch_start", 3, kill(2))]
    for devices, strategy, callbacks in ((1, None, []), (3, STACK | {"replicas": 2}, kills)):
        options = {"max_steps": -1, "max_epochs": 2, "callbacks": callbacks}
        runs.append(train(models.Interrupted, batches(), devices, strategy, **options))
        ends.append(torch.rand(3))
    plain, piped = runs
    assert_same_run(piped, plain)
    assert torch.equal(*ends)
    assert (piped.module.calls, piped.module.kept) == (plain.module.calls, plain.module.kept)
    for name, value in plain.trainer.callback_metrics.items():
        torch.testing.assert_close(piped.trainer.callback_metrics[name], value)


def test_the_panel_says_what_is_cut(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    train(models.Mixup, batches(), 3, {**STACK, "verbose": True}, max_steps=1)
    assert "gpipe, 4 microbatches cut where the stack begins" in capfd.readouterr().err + caplog.text


def accelerated(settings: Mapping[str, Any] | None, *, labels: bool) -> tuple[list[float], dict[str, Tensor], Tensor]:
    """Train a contrastive model in a loop of accelerate; it or the loop computes the loss."""
    torch.manual_seed(0)
    context = loops.accelerator("plain") if settings is None else loops.accelerator("pipeline", **settings)
    with context as current:
        model = models.Embedder()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model, optimizer, data = current.prepare(model, optimizer, batches(20))
        losses = []
        for batch in data:
            optimizer.zero_grad()
            out = model(batch["x"], batch["y"] if labels else None)
            loss = out["loss"] if labels else models.contrast(functional.dropout(out, 0.1))
            current.backward(loss)
            optimizer.step()
            losses.append(float(loss))
        draws = torch.rand(3)
        model.eval()
        with torch.no_grad():
            losses.append(float(model(batch["x"]).std()))
        state = {name: value.detach().clone() for name, value in current.get_state_dict(model).items()}
    return losses, state, draws


@pytest.mark.parametrize("labels", [True, False], ids=["loss of the model", "loss of the loop"])
@pytest.mark.parametrize("settings", [{"microbatches": "stack"}, {"num_microbatches": 1}], ids=str)
def test_loops_of_accelerate(labels: bool, settings: dict[str, Any]) -> None:
    losses, state, draws = accelerated(settings, labels=labels)
    expected, weights, numbers = accelerated(None, labels=labels)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected))
    assert torch.equal(draws, numbers)
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)
