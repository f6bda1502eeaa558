"""Each way of launching gives what Lightning gives without the plugin."""

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes.nodes import Node, two_nodes
from tests.processes.support import end_well, half_way, plain, results_in, results_of, run, start, torchrun


def losses(results: list[dict], rank: int = 0) -> list[float]:
    return next(result["losses"] for result in results if result["rank"] == rank)


@pytest.fixture(scope="module")
def alone_said() -> tuple[str, str]:
    """What one process without the plugin writes to its output and to its errors."""
    return end_well([start(plain(0, 1))])[0]


@pytest.fixture(scope="module")
def alone(alone_said: tuple[str, str]) -> dict:
    return results_in(alone_said[0])[0]


@pytest.fixture(scope="module")
def data_parallel() -> list[dict]:
    return run(plain(0, 2))


def test_plain_python_starts_its_workers_which_print_nothing(alone: dict, alone_said: tuple[str, str]) -> None:
    ((output, errors),) = end_well([start(plain(3, 1))])
    (result,) = results_in(output)
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    assert result["validated"] == [pytest.approx(alone["validated"][0], rel=1e-5)]
    said = [line for line in (output + errors).splitlines() if "RESULT" not in line]
    added = [line for line in said if line not in alone_said[1] and "srun" not in line]  # a hint where SLURM is
    assert added[0].startswith("SkipPipe: 2 stages")
    assert added[-1].startswith("Step time and bubble")
    assert len(added) == 6  # the panel, and nothing else


def test_ranks_of_torchrun_become_workers_and_return_the_drivers_results(alone: dict) -> None:
    results = run(torchrun(3, 3, 1))
    assert losses(results) == pytest.approx(alone["losses"], rel=1e-5)
    assert [result["is_global_zero"] for result in results] == [True, False, False]
    assert all(result["validated"] == results[0]["validated"] for result in results)
    assert all(result["metrics"]["val_loss"] == results[0]["metrics"]["val_loss"] for result in results)
    assert results[1]["losses"] == []


@pytest.mark.slow
@pytest.mark.parametrize("launch", [plain, lambda *arguments: torchrun(4, *arguments)], ids=["plain", "torchrun"])
def test_two_drivers_share_the_data_like_ddp(launch, data_parallel: list[dict]) -> None:
    results = run(launch(4, 2))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(data_parallel, rank), rel=1e-5)
    assert results[0]["validated"] == [pytest.approx(data_parallel[0]["validated"][0], rel=1e-5)]


@pytest.mark.slow
def test_drivers_that_hold_a_stage_see_the_accumulated_gradients_in_a_step() -> None:
    expected, results = run(plain(0, 2, "reads")), run(plain(3, 2, "reads", "hosts"))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(expected, rank), rel=1e-5)


@pytest.mark.slow
def test_two_drivers_skip_the_same_steps() -> None:
    expected, results = run(plain(0, 2, "half")), run(plain(3, 2, "half", "hosts"))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(expected, rank), rel=1e-3)
    assert [result["scale"] for result in results[:2]] == [result["scale"] for result in expected]
    assert expected[0]["scale"] < 2.0**20, "steps were skipped"


@pytest.mark.slow
@pytest.mark.parametrize("hosts", [[], ["hosts"]], ids=["", "hosts"])
def test_gradients_of_side_inputs_go_to_the_driver_that_they_come_from(hosts: list[str]) -> None:
    expected, results = run(plain(0, 2, "conditioned")), run(plain(3, 2, "conditioned", *hosts))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(expected, rank), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launch", [(3, 2, "shared", "hosts"), (6, 2, "shared", "balanced")], ids=str)
def test_drivers_have_what_blocks_share_in_common(launch: tuple[object, ...]) -> None:
    expected, results = run(plain(0, 2, "shared")), run(plain(*launch))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(expected, rank), rel=1e-5)
    assert results[0]["validated"] == [pytest.approx(expected[0]["validated"][0], rel=1e-5)]


@pytest.mark.slow
def test_two_drivers_change_their_paths_together(data_parallel: list[dict]) -> None:
    results = run(plain(6, 2, "balanced"))
    for rank in (0, 1):
        assert losses(results, rank) == pytest.approx(losses(data_parallel, rank), rel=1e-5)
    changes = [result["changes"] for result in results]
    assert changes[0] == changes[1] > 0


def slurm(num_tasks: int, *arguments: object) -> list:
    """Start the script as srun does, in one process per task."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost"}
    job |= {"SLURM_NTASKS": str(num_tasks), "SLURM_NTASKS_PER_NODE": str(num_tasks), "SLURM_NNODES": "1"}
    tasks = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task), "SLURM_NODEID": "0"} for task in range(num_tasks)]
    return [start(plain(*arguments), **job, **task) for task in tasks]


@pytest.mark.slow
def test_tasks_of_slurm_become_workers_and_leave_its_signals_to_the_driver(alone: dict) -> None:
    driver, *workers = slurm(3, 3, 1, "pause")
    assert half_way(driver)
    for worker in workers:
        worker.send_signal(signal.SIGUSR1)  # SLURM's warning before the time limit, sent to all
        worker.send_signal(signal.SIGTERM)
    results = results_of([driver, *workers])
    assert losses(results) == pytest.approx(alone["losses"], rel=1e-5)
    assert [result["is_global_zero"] for result in results] == [True, False, False]
    assert all(result["validated"] == results[0]["validated"] for result in results)


@pytest.mark.slow
def test_tasks_that_do_not_fit_the_devices_are_an_error() -> None:
    (process,) = slurm(1, 2, 1)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1
    assert "You set `devices=2` in Lightning, but the number of tasks per node configured in SLURM" in errors


@pytest.mark.slow
def test_skippipe_run_gives_the_same(alone: dict) -> None:
    (result,) = run([sys.executable, "-m", "skippipe_plugin.cli", "run", "--", *plain(3, 1)])
    assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)


@pytest.mark.slow
def test_workers_join_a_run_of_torchrun_and_its_ranks_hand_their_stages_over(alone: dict, tmp_path: Path) -> None:
    """A rank that got SIGTERM stays, without stages, until all return: torchrun takes an early end for a failure."""
    results = run(torchrun(3, 3, 1, "moves=+@1,-1@3,-1@4", f"folder={tmp_path}"))
    assert losses(results) == pytest.approx(alone["losses"], rel=1e-5)
    assert (tmp_path / "stages").read_text().split() == ["2", "3", "3", "2", "1"]
    assert len(results) == 3
    assert all(result["validated"] == [pytest.approx(alone["validated"][0], rel=1e-5)] for result in results)


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as pair:
        yield pair


def on_both(nodes: tuple[Node, Node], *arguments: object, folders: tuple[str, ...] = ("", "")) -> list:
    """Start the script by torchrun on two nodes, two processes on each; a folder makes a home of the node's own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2"]
    launcher += [f"--master-addr={nodes[0].address}", "--master-port=29511"]
    script = plain(*arguments)[1:]
    homes = [{"XDG_CACHE_HOME": folder, "TMPDIR": folder} if folder else {} for folder in folders]
    return [
        start([*node.prefix, *launcher, f"--node-rank={rank}", *script], GLOO_SOCKET_IFNAME=node.interface, **home)
        for rank, (node, home) in enumerate(zip(nodes, homes, strict=True))
    ]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces are made by root")


@needs_root
@pytest.mark.slow
@pytest.mark.parametrize("drivers", [1, 3])
def test_two_nodes_of_torchrun_meet_at_their_own_addresses(nodes: tuple[Node, Node], drivers: int, alone: dict) -> None:
    expected = [alone] if drivers == 1 else run(plain(0, drivers))
    results = results_of(on_both(nodes, 2, drivers, "two_nodes"))
    for rank in range(drivers):
        assert losses(results, rank) == pytest.approx(losses(expected, rank), rel=1e-5)
    assert len(results) == 4


@needs_root
@pytest.mark.slow
def test_a_node_without_the_secret_says_how_to_get_it(nodes: tuple[Node, Node], tmp_path: Path) -> None:
    folders = tuple(str(tmp_path / name) for name in "ab")
    for folder in folders:
        Path(folder).mkdir()
    first, second = on_both(nodes, 2, 1, "two_nodes", folders=folders)
    _, errors = second.communicate(timeout=150)
    os.killpg(first.pid, signal.SIGTERM)  # it would wait for the other node for a while
    first.communicate(timeout=60)
    assert "SecretError: the first driver has left its secret in none of" in errors
    assert "give all ranks the same one by SKIPPIPE_SECRET, before the launcher starts" in errors
