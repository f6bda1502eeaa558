"""Random states are brought back, those of the generators that loaders hold among them."""

import random

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from skippipe_plugin.strategies.replay import random_state, set_random_state


class Noisy(TensorDataset):
    """A data set with generators of its own."""

    def __init__(self) -> None:
        super().__init__(torch.arange(12))
        self.numpy, self.python = np.random.default_rng(1), random.Random(1)

    def __getitem__(self, index: int) -> tuple[float, ...]:
        return (index, self.numpy.random(), self.python.random(), random.random(), np.random.rand())


def loader() -> DataLoader[tuple[torch.Tensor, ...]]:
    data = Noisy()
    sampler = RandomSampler(data, generator=torch.Generator().manual_seed(5))
    return DataLoader(data, batch_size=4, sampler=sampler)


def epoch(batches: DataLoader[tuple[torch.Tensor, ...]]) -> list[list[float]]:
    return [torch.stack([part.double() for part in batch]).flatten().tolist() for batch in batches]


def test_an_epoch_is_the_same_again_in_another_process() -> None:
    first = loader()
    epoch(first)
    state = random_state([first])
    expected = epoch(first)
    assert epoch(first) != expected
    other = loader()
    set_random_state(state, [other])
    assert epoch(other) == expected
