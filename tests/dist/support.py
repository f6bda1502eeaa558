"""Run the training script in processes of its own and read what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

SCRIPT = Path(__file__).with_name("script.py")
ROOT = Path(__file__).parents[2]


def start(command: list[str], secret: Path | None = None) -> subprocess.Popen[str]:
    """Start a command in a process group of its own, with this checkout importable, and perhaps a job's secret."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
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
    process = start(command)
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, errors[-4000:]
    results = [json.loads(line) for line in output.replace("RESULT ", "\n").splitlines() if line.startswith("{")]
    return sorted(results, key=lambda result: result["rank"])


def plain(*arguments: object) -> list[str]:
    """The command line of the script, started by hand."""
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def torchrun(num_processes: int, *arguments: object) -> list[str]:
    """The command line of the script under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    return [*launcher, str(SCRIPT), *map(str, arguments)]


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
