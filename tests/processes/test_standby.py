"""The driver's host is lost, with the supervisor: the run goes on on another one, as if nothing had happened."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.processes import mortal
from tests.processes.support import start
from tests.processes.test_driver_recovery import SCRIPT, assert_like, events
from tests.processes.test_join import free_port

CLI = [sys.executable, "-m", "skippipe_plugin.cli"]
FIRST, SECOND = "127.0.0.1", "127.0.0.2"
NUM_WORKERS = 2
pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


class Hosts:
    """Two hosts, as far as addresses go, and workers on others."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store_port, self.driver_port = folder, free_port(), free_port()
        self.secret = folder / "job.secret"
        self.processes: list[subprocess.Popen[str]] = []

    def begin(self, moment: str) -> subprocess.Popen[str]:
        """Start the run on the first host; the driver waits for workers."""
        return self._run(moment, "--port", str(self.store_port))

    def stand_by(self) -> subprocess.Popen[str]:
        """Start a supervisor on the second host, as soon as there is what it stands by for."""
        process = self._run("", "--host", SECOND, "--standby-for", f"{FIRST}:{self.store_port}")
        assert process.stderr is not None
        for line in process.stderr:
            if "standing by for the job at" in line:
                return process
        raise AssertionError("it does not stand by")

    def join(self) -> list[subprocess.Popen[str]]:
        """Let workers join the first host's driver by hand."""
        command = [*CLI, "worker", "--join", f"{FIRST}:{self.driver_port}", "--secret-file", str(self.secret)]
        workers = [start(command) for _ in range(NUM_WORKERS)]
        self.processes += workers
        return workers

    def _run(self, moment: str, *options: str) -> subprocess.Popen[str]:
        network = {"port": self.driver_port, "local_workers": 0}
        settings = json.dumps({"devices": 1 + NUM_WORKERS, "network": network})
        command = [*CLI, "run", *options, "--", sys.executable, str(SCRIPT), str(self.folder), moment, settings]
        self.processes.append(start(command, self.secret))
        return self.processes[-1]

    def wait_for_secret(self) -> None:
        """The first host writes it; a person would copy it."""
        mortal.wait_for(self.secret.exists)

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path)
    yield hosts
    hosts.close()


def test_the_run_goes_on_on_the_host_that_stood_by(hosts: Hosts, tmp_path_factory: pytest.TempPathFactory) -> None:
    undisturbed = tmp_path_factory.mktemp("undisturbed")
    mortal.fit(undisturbed)
    first = hosts.begin("on_before_optimizer_step:4:host")
    hosts.wait_for_secret()
    second = hosts.stand_by()
    workers = hosts.join()
    assert first.wait(150) == -signal.SIGKILL
    _, errors = second.communicate(timeout=150)
    assert second.returncode == 0, errors[-4000:]
    assert f"is lost; it goes on here, with {NUM_WORKERS} of {NUM_WORKERS} workers" in errors
    assert "goes on from memory at epoch 0, batch 3, after 3 optimizer steps" in errors
    assert_like(hosts.folder, undisturbed)
    assert [worker.wait(30) for worker in workers] == [0] * NUM_WORKERS


def test_a_run_that_ends_by_itself_is_not_begun_again(hosts: Hosts) -> None:
    first = hosts.begin("")
    hosts.wait_for_secret()
    second = hosts.stand_by()
    hosts.join()
    _, errors = first.communicate(timeout=150)
    assert first.returncode == 0, errors[-4000:]
    assert second.wait(30) == 0
    num_steps = mortal.EPOCHS * mortal.BATCHES
    assert [event["step"] for event in events(hosts.folder) if "batch" in event][-1] == num_steps
