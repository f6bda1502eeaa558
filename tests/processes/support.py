"""Run the training script in processes of its own and read what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

SCRIPT = Path(__file__).with_name("script.py")
ROOT = Path(__file__).parents[2]


def start(command: list[str], secret: Path | None = None, **variables: str) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, with this checkout importable, and perhaps a job's secret."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **variables}
    environment |= {"SKIPPIPE_SECRET_FILE": str(secret)} if secret is not None else {}
    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def run(command: list[str], timeout_s: float = 150) -> list[dict[str, Any]]:
    """Run a command to its end and return the results its processes printed, by rank."""
    return results_of([start(command)], timeout_s)


def results_of(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 150) -> list[dict[str, Any]]:
    """Wait for commands to end well and return the results that their processes printed, by rank."""
    return results_in("\n".join(output for output, _ in end_well(processes, timeout_s)))


def end_well(processes: Sequence[subprocess.Popen[str]], timeout_s: float = 150) -> list[tuple[str, str]]:
    """Wait for commands to end well; return what each wrote to its output and to its errors."""
    deadline = time.monotonic() + timeout_s
    texts = []
    try:
        for process in processes:
            texts.append(process.communicate(timeout=max(1.0, deadline - time.monotonic())))
            assert process.returncode == 0, texts[-1][1][-4000:]
    finally:
        for process in processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
    return texts


def results_in(output: str) -> list[dict[str, Any]]:
    """Return the results in a command's output, by rank."""
    results = [json.loads(line) for line in output.replace("RESULT ", "\n").splitlines() if line.startswith("{")]
    return sorted(results, key=lambda result: result["rank"])


def plain(*arguments: object) -> list[str]:
    """The command line of the script, started by hand."""
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def torchrun(num_processes: int, *arguments: object) -> list[str]:
    """The command line of the script under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [*launcher, str(SCRIPT), *map(str, arguments)]


def half_way(process: subprocess.Popen[str]) -> bool:
    """Wait until a script that was started with ``pause`` is between two of its steps; return whether it got there."""
    assert process.stdout is not None
    return any(line == "half way\n" for line in process.stdout)


def workers_of(pid: int) -> list[psutil.Process]:
    """The worker processes below ``pid``."""
    children = psutil.Process(pid).children(recursive=True)
    return [child for child in children if "skippipe_plugin.worker" in " ".join(child.cmdline())]


def wait_until(condition: Any, timeout_s: float = 60.0) -> bool:
    """Poll ``condition`` until it holds; return whether it did."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
