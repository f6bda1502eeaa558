"""Each way of launching gives what Lightning gives without the plugin."""

import pytest

from tests.dist.support import plain, run, torchrun


def losses(results: list[dict], rank: int = 0) -> list[float]:
    return next(result["losses"] for result in results if result["rank"] == rank)


@pytest.fixture(scope="module")
def alone() -> dict:
    return run(plain(0, 1))[0]


@pytest.fixture(scope="module")
def data_parallel() -> list[dict]:
    return run(plain(0, 2))


def test_plain_python_starts_its_workers(alone: dict) -> None:
    (result,) = run(plain(3, 1))
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert result["validated"] == [pytest.approx(alone["validated"][0], rel=1e-5)]


def test_ranks_of_torchrun_become_workers_and_return_the_drivers_results(alone: dict) -> None:
    results = run(torchrun(3, 3, 1))
    assert losses(results) == pytest.approx(alone["losses"], rel=1e-5)
    assert [result["is_global_zero"] for result in results] == [True, False, False]
    assert all(result["validated"] == results[0]["validated"] for result in results)
    assert all(result["metrics"]["val_loss"] == results[0]["metrics"]["val_loss"] for result in results)
    assert results[1]["losses"] == []


@pytest.mark.parametrize("launch", [plain, lambda *arguments: torchrun(4, *arguments)], ids=["plain", "torchrun"])
def test_two_drivers_share_the_data_like_ddp(launch, data_parallel: list[dict]) -> None:
    results = run(launch(4, 2))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(data_parallel, rank), rel=1e-5)
    assert results[0]["validated"] == [pytest.approx(data_parallel[0]["validated"][0], rel=1e-5)]


@pytest.mark.slow
def test_two_drivers_change_their_paths_together(data_parallel: list[dict]) -> None:
    results = run(plain(6, 2, "balanced"))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(data_parallel, rank), rel=1e-5)
    changes = [result["changes"] for result in results]
    assert changes[0] == changes[1] > 0
