"""Steps that run once, on the whole batch: the result is one process's, whatever the loss, and so are the draws."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..support import Run, assert_same_run, train
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


@pytest.mark.parametrize("make", KINDS)
def test_the_result_is_that_of_one_process(make: Any) -> None:
    piped, plain, visits = both(make)
    assert_same_run(piped, plain)
    assert visits.counts == [4, 4, 4]
    assert piped.trainer.callback_metrics.keys() == plain.trainer.callback_metrics.keys()
    for name, value in plain.trainer.callback_metrics.items():
        torch.testing.assert_close(piped.trainer.callback_metrics[name], value)
