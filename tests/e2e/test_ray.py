"""Workers on the nodes of a real Ray cluster of several raylets on this machine, of which some are killed."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies import NetworkConfig, stop_workers

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import assert_same_losses, assert_same_run, train
from .test_recovery import At

ray = pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
REPLACED_WITHIN_S = 20.0
TOLD_WITHIN_S = 10.0


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head, and four more nodes, of which each has room for one worker."""
    from ray.cluster_utils import Cluster

    stop_workers()
    # Ray's client is connected to the raylet of the head: it must not be the one that a test kills.
    started = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(4):
        started.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", started.address)
    monkeypatch.setenv("SKIPPIPE_WORKERS", "ray")
    yield started
    stop_workers()
    started.shutdown()


def make() -> LanguageModel:
    return LanguageModel(Transformer())


def raylet_of(pid: int) -> psutil.Process:
    return psutil.Process(int(psutil.Process(pid).environ()["RAY_RAYLET_PID"]))


class Clock(Callback):
    """Notes when each batch was over."""

    def __init__(self) -> None:
        self.over_s: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        self.over_s.append(time.monotonic())


def test_workers_stand_on_nodes_of_their_own_and_compute_what_one_process_does(cluster: Any) -> None:
    seen: list[int] = []

    def look(trainer: Trainer) -> None:
        seen.extend(raylet_of(pid).pid for pid in trainer.strategy.worker_pids.values())

    data = loader(tokens(24))
    found = train(make, data, 4, callbacks=[At("on_train_batch_start", 2, look)])
    assert_same_run(found, train(make, data, 1))
    assert len(seen) == len(set(seen)) == 3


@pytest.mark.parametrize(("replicas", "spares"), [(1, 0), (1, 1), (2, 1)])  # (2, 0): paths go around it meanwhile
def test_a_raylet_is_killed_and_the_stage_stands_on_another(cluster: Any, replicas: int, spares: int) -> None:
    """With a replica the losses are those of one process; without, the neighbours' average is a report."""
    killed: list[float] = []
    ended: list[float] = []
    raylets: dict[str, list[int]] = {"before": [], "after": []}

    def lose(trainer: Trainer) -> None:
        pids = trainer.strategy.worker_pids
        raylets["before"] = [raylet_of(pid).pid for pid in pids.values()]
        killed.append(time.monotonic())
        worker = psutil.Process(pids[2])
        raylet_of(worker.pid).kill()
        worker.wait(REPLACED_WITHIN_S)  # until Ray has ended what was on the node, training goes on with it
        ended.append(time.monotonic() - killed[0])

    def look(trainer: Trainer) -> None:
        raylets["after"] = [raylet_of(pid).pid for pid in trainer.strategy.worker_pids.values()]

    clock, recovery, data = Clock(), StageRecovery(spares=spares), loader(tokens(24))
    happenings = [At("on_train_batch_start", 4, lose), At("on_train_batch_start", 6, look)]
    found = train(make, data, 3, {"replicas": replicas}, callbacks=[recovery, clock, *happenings])
    (event,) = recovery.events
    seconds = next(each for each in clock.over_s if each > killed[0]) - killed[0]
    print(
        f"replicas={replicas} spares={spares}: the worker ended {ended[0]:.2f} s, and the next step was over "
        f"{seconds:.2f} s after the raylet was killed; {event}"
    )
    assert seconds < REPLACED_WITHIN_S
    assert raylets["after"][0] == raylets["before"][0]
    assert raylets["after"][1] not in raylets["before"]
    expected = train(make, data, 1).losses
    if replicas == 2:
        assert event.source == "replica"
        assert_same_losses(found.losses, expected, rtol=1e-4)
    else:
        assert event.source == "copy"
        assert_same_losses(found.losses[:3], expected[:3], rtol=1e-4)
        assert len(found.losses) == len(expected)


SMALL = ("--steps", "6", "--layers", "3", "--width", "32")
EXAMPLES = {
    "train_lm.py": (*SMALL, "--batch-size", "8", "--devices", "3"),
    "cli.py": ("fit", "--config", "cli.yaml", "--trainer.max_steps=6", "--trainer.val_check_interval=6"),
    "accelerate_lm.py": (*SMALL, "--num-stages", "2"),
    "plain_loop.py": (),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_unchanged(name: str, cluster: Any, tmp_path: Path) -> None:
    """The environment chooses the source; what is printed as losses is what local workers compute."""
    losses = []
    for workers in ("local", "ray"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "SKIPPIPE_WORKERS": workers}
        arguments = [str(ROOT / "examples" / each) if each.endswith(".yaml") else each for each in EXAMPLES[name]]
        command = [sys.executable, str(ROOT / "examples" / name), *arguments]
        ran = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=150)
        assert ran.returncode == 0, ran.stderr[-3000:]
        losses.append([float(loss) for loss in re.findall(r"loss:? +([0-9.]+)", ran.stdout)])
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_the_end_of_the_head_is_an_error_that_says_so(cluster: Any) -> None:
    lost: list[float] = []

    def lose(trainer: Trainer) -> None:
        lost.append(time.monotonic())
        gcs = cluster.head_node.all_processes["gcs_server"][0].process
        gcs.send_signal(signal.SIGKILL)

    slow = At("on_train_batch_start", 3, lose)
    pause = At("on_train_batch_start", 4, lambda _: time.sleep(6))
    with pytest.raises(SkipPipeError, match=r"the head of the Ray cluster at .* does not answer any more"):
        train(make, loader(tokens(24)), 3, callbacks=[StageRecovery(spares=0), slow, pause])
    assert time.monotonic() - lost[0] < TOLD_WITHIN_S


def test_no_cluster_is_an_error_that_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(SkipPipeError, match=r"there is no Ray cluster at address '127.0.0.1:1'.*ray start --head"):
        train(make, loader(tokens(24)), 3, {"network": NetworkConfig(workers="ray")})


def test_the_end_of_the_drivers_own_node_is_an_error_that_says_so(cluster: Any) -> None:
    """Ray ends all that a client has asked for when it misses the client; the other nodes are fine until then."""
    lost: list[float] = []

    def lose(trainer: Trainer) -> None:
        lost.append(time.monotonic())
        cluster.head_node.all_processes["raylet"][0].process.kill()

    slow = At("on_train_batch_start", 3, lose)
    pause = At("on_train_batch_start", 4, lambda _: time.sleep(8))
    with pytest.raises(SkipPipeError, match=r"this machine's Ray node .*(is gone|does not answer any more)"):
        train(make, loader(tokens(24)), 3, callbacks=[StageRecovery(spares=0), slow, pause])
    assert time.monotonic() - lost[0] < TOLD_WITHIN_S
