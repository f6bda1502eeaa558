"""Who keeps the driver's own state: brute force over places, by what the loss of any one host leaves."""

import itertools
from dataclasses import dataclass

import pytest

from skippipe_plugin.driver.keepers import keepers_among


@dataclass(frozen=True)
class Worker:
    rank: int
    host: str

    @property
    def is_local(self) -> bool:
        return self.host == "driver"


@pytest.mark.parametrize("num_workers", [1, 2, 3, 4])
def test_the_driver_is_never_lost_with_all_copies_if_that_can_be_helped(num_workers: int) -> None:
    for hosts in itertools.product(["driver", "b", "c"], repeat=num_workers):
        workers = [Worker(rank, host) for rank, host in enumerate(hosts, 1)]
        chosen = keepers_among(workers)
        assert len(chosen) == len({worker.rank for worker in chosen}) == min(2, num_workers)
        num_away = sum(not worker.is_local for worker in workers)
        assert sum(not worker.is_local for worker in chosen) == min(2, num_away), (hosts, chosen)
        if {"b", "c"} <= set(hosts):
            assert {worker.host for worker in chosen} == {"b", "c"}, (hosts, chosen)


def test_on_one_host_they_are_the_first_and_the_last_rank() -> None:
    workers = [Worker(rank, "driver") for rank in (3, 1, 4, 2)]
    assert [worker.rank for worker in keepers_among(workers)] == [1, 4]
    assert keepers_among([]) == []
