"""Workers that are tasks of a real SLURM of several nodes on this machine, one of which is lost."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from lightning.pytorch import Trainer

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import NetworkConfig, stop_workers

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .slurm_lab import Cluster, cluster, is_installed
from .support import assert_same_losses, assert_same_run, train
from .test_recovery import At, await_spare

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(not is_installed(), reason="SLURM is not installed"),
]
ROOT = Path(__file__).parents[2]
REPLACED_WITHIN_S = 20.0


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    stop_workers()
    with cluster(tmp_path, num_nodes=4) as found:
        for name, value in found.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("SBATCH_OUTPUT", str(tmp_path / "worker-%A_%a.out"))
        monkeypatch.setenv("SKIPPIPE_WORKERS", "slurm")
        yield found
        stop_workers()


def make() -> LanguageModel:
    return LanguageModel(Transformer())


def node_of(pid: int) -> str:
    return psutil.Process(pid).environ()["SLURMD_NODENAME"]


def test_tasks_compute_what_one_process_does_and_leave_nothing(slurm: Cluster) -> None:
    nodes: list[str] = []

    def look(trainer: Trainer) -> None:
        nodes.extend(node_of(pid) for pid in trainer.strategy.worker_pids.values())

    data = loader(tokens(24))
    found = train(make, data, 4, callbacks=[At("on_train_batch_start", 2, look)])
    assert_same_run(found, train(make, data, 1))
    assert len(nodes) == len(set(nodes)) == 3
    stop_workers()
    assert not slurm.ask("squeue", "--noheader")


@pytest.mark.parametrize(("replicas", "spares"), [(1, 0), (1, 1), (2, 1)])  # (2, 0): paths go around it meanwhile
def test_a_node_is_lost_and_its_stage_stands_on_another(slurm: Cluster, replicas: int, spares: int) -> None:
    nodes: dict[str, list[str]] = {}
    lost_s: list[float] = []

    def lose(trainer: Trainer) -> None:
        if spares:
            await_spare(trainer)
        pids = trainer.strategy.worker_pids
        nodes["before"] = [node_of(pid) for pid in pids.values()]
        lost_s.append(time.monotonic())
        slurm.lose(node_of(pids[2]))

    def look(trainer: Trainer) -> None:
        lost_s.append(time.monotonic())
        nodes["after"] = [node_of(pid) for pid in trainer.strategy.worker_pids.values()]

    recovery, data = StageRecovery(spares=spares), loader(tokens(24))
    happenings = [At("on_train_batch_start", 4, lose), At("on_train_batch_start", 5, look)]
    found = train(make, data, 3, {"replicas": replicas}, callbacks=[recovery, *happenings])
    (event,) = recovery.events
    print(f"replicas={replicas} spares={spares}: the next step was over {lost_s[1] - lost_s[0]:.2f} s later; {event}")
    assert lost_s[1] - lost_s[0] < REPLACED_WITHIN_S
    expected = train(make, data, 1).losses
    if replicas == 2:
        assert event.source == "replica"
        assert_same_losses(found.losses, expected, rtol=1e-4)
    else:
        assert event.source == "copy"
        assert nodes["after"][0] == nodes["before"][0]
        assert nodes["after"][1] not in nodes["before"]
        assert_same_losses(found.losses[:3], expected[:3], rtol=1e-4)
        assert len(found.losses) == len(expected)


def test_a_task_that_the_user_cancels_is_replaced(slurm: Cluster) -> None:
    def cancel(trainer: Trainer) -> None:
        worker = psutil.Process(trainer.strategy.worker_pids[2])
        job = worker.environ()["SLURM_JOB_ID"]
        slurm.ask("scancel", "--signal=KILL", "--full", job)
        worker.wait(10)

    recovery, data = StageRecovery(), loader(tokens(24))
    found = train(make, data, 3, {"replicas": 2}, callbacks=[recovery, At("on_train_batch_start", 4, cancel)])
    assert [event.source for event in recovery.events] == ["replica"]
    assert_same_losses(found.losses, train(make, data, 1).losses, rtol=1e-4)


def test_a_driver_inside_of_a_job_submits_workers_of_its_own(slurm: Cluster, tmp_path: Path) -> None:
    """As a batch script of one task, which is how a site runs everything."""
    script, printed = tmp_path / "job.sh", tmp_path / "job.out"
    train_lm = f"{ROOT}/examples/train_lm.py --steps 6 --layers 3 --width 32 --batch-size 8 --devices 3"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {train_lm}\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["sbatch", "--wait", "--ntasks=1", f"--output={printed}", str(script)]
    ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150)
    assert ran.returncode == 0, printed.read_text()[-3000:]
    by_slurm = [float(loss) for loss in re.findall(r"loss:? +([0-9.]+)", printed.read_text())]
    local = subprocess.run(
        [sys.executable, *train_lm.split()],
        env=environment | {"SKIPPIPE_WORKERS": "local"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert by_slurm
    assert by_slurm == pytest.approx([float(loss) for loss in re.findall(r"loss:? +([0-9.]+)", local.stdout)], abs=2e-3)


def test_a_killed_driver_leaves_no_task(slurm: Cluster, tmp_path: Path) -> None:
    command = [sys.executable, f"{ROOT}/examples/train_lm.py", "--steps", "2000", "--layers", "3", "--width", "32"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen([*command, "--devices", "3"], env=environment, cwd=tmp_path, stdout=subprocess.DEVNULL)

    def states() -> list[str]:
        return slurm.ask("squeue", "--noheader", "--array", "--format=%T").split()

    deadline = time.monotonic() + 60
    while states() != ["RUNNING"] * 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    time.sleep(8)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 15
    while states() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not states()


def test_what_sbatch_refuses_is_an_error_that_quotes_it(slurm: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "gpu")
    with pytest.raises(SkipPipeError, match=r"workers='slurm': sbatch refuses a job array of workers: .*partition"):
        train(make, loader(tokens(24)), 3, {"network": NetworkConfig(workers="slurm")})
