"""Worker processes on the driver's own host: start them, watch for an early end, end them."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NoReturn

from ..engine import phases
from ..engine.errors import SkipPipeError, StartRefused
from ..engine.handover import import_paths
from ..engine.secret import SECRET_VARIABLE
from .parent import end_with_stdin, is_child, of_this_process

_POLITE_S: Final = 5.0


class WorkerProcesses:
    """The processes one driver started. They also end by themselves when the driver is gone, however it went."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, count: int, *, host: str, port: int, secret: str) -> None:
        """Start ``count`` workers that join ``host:port``."""
        command = [sys.executable, "-m", "skippipe_plugin.worker", f"{host}:{port}"]
        environment = worker_environment(secret) | of_this_process()
        for _ in range(count):
            self._processes.append(_popen(command, environment, None, subprocess.DEVNULL))

    def start_bound(self, count: int, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        """Start ``count`` processes in ``folder`` whose stdin ends with this process; see :func:`end_with_stdin`.

        The calling thread must live until :meth:`stop`, or until this process ends.
        """
        environment = {**environment, **of_this_process(thread_stays=True)}
        for _ in range(count):
            self._processes.append(_popen(command, environment, folder, subprocess.PIPE))

    def num_starting(self, joined: Collection[int]) -> int:
        """Return how many are alive and not among the pids that ``joined``."""
        return sum(process.poll() is None and process.pid not in joined for process in self._processes)

    def ended_early(self, joined: Collection[int]) -> dict[int, int]:
        """Return pid and exit status of those that ended without having joined."""
        ended = [process for process in self._processes if process.poll() is not None and process.pid not in joined]
        return {process.pid: process.returncode for process in ended}

    def kill(self, pid: int) -> None:
        """End one of them at once."""
        for process in self._processes:
            if process.pid == pid:
                process.kill()
                _await(process)

    def running(self) -> list[int]:
        """Return the process ids of those that are alive."""
        return [process.pid for process in self._processes if process.poll() is None]

    def known(self) -> list[int]:
        """Return the process ids of those that are alive, or have ended and are not forgotten."""
        return [process.pid for process in self._processes]

    def forget(self, pid: int) -> None:
        """Know nothing more of one that has ended."""
        self._processes = [process for process in self._processes if process.pid != pid]

    def reap(self) -> None:
        """Forget those that served and ended, and those that never came."""
        self._processes = [process for process in self._processes if process.poll() is None]

    def stop(self, patience_s: float = _POLITE_S) -> None:
        """Wait for the workers that were told to leave, end those that do not, and reap all."""
        deadline = time.monotonic() + patience_s
        for process in self._processes:
            _await(process, max(0.0, deadline - time.monotonic()))
        self._processes.clear()


class DriverProcesses:
    """Further drivers on the first driver's host: the user's own script, run once more for each."""

    def __init__(self) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, ranks: range, num_processes: int, host: str, port: int, secret: str) -> None:
        """Start one process for each of ``ranks``, unless that was done before.

        The environment says what torchrun would say, so that the script takes the same way as under it.
        """
        if self._processes:
            return
        for rank in ranks:
            environment = os.environ | {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(num_processes),
                "LOCAL_WORLD_SIZE": str(num_processes),
                "MASTER_ADDR": host,
                "MASTER_PORT": str(port),
                SECRET_VARIABLE: secret,
                "TORCHELASTIC_RUN_ID": "skippipe",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
            environment |= of_this_process()
            self._processes.append(_popen(_script(), environment, None, subprocess.PIPE))

    def ended(self) -> dict[int, int]:
        """Return process id and exit status of those that have ended."""
        return {process.pid: process.returncode for process in self._processes if process.poll() is not None}

    def wait(self) -> None:
        """Wait for their scripts to end; end those that hang."""
        for process in self._processes:
            _await(process)
        self._processes.clear()


def worker_environment(secret: str) -> dict[str, str]:
    """Return the environment of a worker that this process needs."""
    # What the worker imports must be what the driver imported, also when that is not installed.
    paths = os.pathsep.join(import_paths())
    return os.environ | {SECRET_VARIABLE: secret, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}


def end_with_driver() -> None:
    """In a driver that another driver started: end when that one is gone, however it went."""
    if is_child():
        end_with_stdin()


def end_now(status: int) -> NoReturn:
    """End this process without the interpreter's own end, which takes seconds of every core once torch is loaded.

    A worker has nothing left to do by then; what it has printed and logged is written.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or none at all
            stream.flush()
    os._exit(status)


def _await(process: subprocess.Popen[bytes], patience_s: float = _POLITE_S) -> None:
    """Wait for a process to end, and end it if it takes too long."""
    try:
        process.wait(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _popen(
    command: Sequence[str], environment: Mapping[str, str], folder: str | None, stdin: int
) -> subprocess.Popen[bytes]:
    """Start a process.

    Raises:
        StartRefused: The system refuses.
    """
    try:
        phases.reach(phases.Phase.STARTING)
        return subprocess.Popen(command, env=environment, cwd=folder, stdin=stdin)
    except (OSError, MemoryError) as error:
        raise StartRefused(
            f"a process of the run cannot be started: {str(error) or type(error).__name__}. The system's limits on "
            "processes, memory or open files (ulimit -u, -v, -n; the container's) are reached: raise them, or start "
            "fewer workers"
        ) from error


def _script() -> list[str]:
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    file = getattr(main, "__file__", None)
    if file is None or not os.path.isfile(file):  # noqa: PTH113 - what Python calls its scripts
        raise SkipPipeError(
            "drivers above 1 start this script once more for each further driver, but there is no file to start: the "
            "code came from standard input, python -c, an interactive session or a notebook. Save it as a file and run "
            "that (python train.py), or use one driver"
        )
    if spec is not None:
        return [sys.executable, "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:]]
    return [sys.executable, os.path.abspath(sys.argv[0]), *sys.argv[1:]]  # noqa: PTH100 - argv holds strings
