"""``skippipe run`` without a pipeline: which ends are ends, how often it starts a command, and that nothing stays."""

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from skippipe_plugin import cli
from skippipe_plugin.supervisor import RunOptions, run
from tests.processes.support import half_way, plain, start, wait_until

CRASH = "import os, pathlib; open('starts', 'a').write('x'); {}"


def supervise(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch, max_restarts: int = 2) -> tuple[int, int]:
    """Run a script; return its exit status and how often it was started."""
    monkeypatch.chdir(folder)
    status = run([sys.executable, "-c", CRASH.format(body)], RunOptions(max_restarts=max_restarts))
    return status, len((folder / "starts").read_text())


@pytest.mark.parametrize(
    ("body", "status", "starts"),
    [
        ("pass", 0, 1),
        ("raise ValueError('of the user')", 1, 1),
        ("raise SystemExit(7)", 7, 1),
        ("os.kill(os.getpid(), 9)", 137, 3),
        ("raise SystemExit(137)", 137, 3),  # as a shell says that its command was killed
        ("len(open('starts').read()) < 2 and os.kill(os.getpid(), 11)", 0, 2),
    ],
)
def test_only_death_by_a_signal_starts_it_again(
    body: str, status: int, starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert supervise(body, tmp_path, monkeypatch) == (status, starts)


def test_the_secret_is_in_the_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = "assert len(os.environ['SKIPPIPE_SECRET']) == 64 and os.environ['SKIPPIPE_ATTEMPT'] == '0'"
    assert supervise(body, tmp_path, monkeypatch) == (0, 1)
    assert "SKIPPIPE_SECRET" not in os.environ


def test_bad_arguments_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run"]) == 2
    assert "there is no command" in capsys.readouterr().err
    assert cli.main(["run", "--max-restarts", "-1", "--", "true"]) == 2
    assert "max_restarts=-1 must be 0 or more" in capsys.readouterr().err
    assert cli.main(["run", "--", "no-such-command"]) == 2
    assert "skippipe: no-such-command: No such file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_for_the_supervisor_is_one_for_the_command(number: signal.Signals, tmp_path: Path) -> None:
    script = "import signal, time; signal.signal(2, signal.SIG_DFL); open('up', 'w'); time.sleep(60)"
    command = [sys.executable, "-m", "skippipe_plugin.cli", "run", "--", sys.executable, "-c", script]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    supervisor = subprocess.Popen(command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL)
    assert wait_until(lambda: (tmp_path / "up").exists())
    supervisor.send_signal(number)
    assert supervisor.wait(timeout=20) == 128 + number


@pytest.mark.slow
def test_nothing_outlives_the_supervisor() -> None:
    supervisor = start([sys.executable, "-m", "skippipe_plugin.cli", "run", "--", *plain(3, 1, "slow", "pause")])
    try:
        assert half_way(supervisor)
        processes = psutil.Process(supervisor.pid).children(recursive=True)
        supervisor.kill()
        _, left = psutil.wait_procs(processes, timeout=15)
        assert not left
    finally:
        supervisor.kill()
        supervisor.communicate()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="terminals")
@pytest.mark.parametrize("redirected", [True, False])
def test_one_interrupt_in_a_terminal_is_one(redirected: bool) -> None:
    """It reaches the whole process group; the supervisor adds none, whatever the standard input is."""
    script = """
import signal, time
got = []
signal.signal(signal.SIGINT, lambda *_: got.append(1))
print("READY", flush=True)
end = time.monotonic() + 60
while not got and time.monotonic() < end: time.sleep(0.02)
time.sleep(1.5)
print("GOT", len(got), flush=True)
"""
    pid, terminal = pty.fork()
    if pid == 0:
        if redirected:
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        command = [sys.executable, "-m", "skippipe_plugin.cli", "run", "--", sys.executable, "-c", script]
        os.execv(sys.executable, command)
    text, pressed = "", False
    try:
        while chunk := os.read(terminal, 1000).decode():
            text += chunk
            if "READY" in text and not pressed:
                pressed = True
                os.write(terminal, b"\x03")
    except OSError:
        pass  # every other end of the terminal is closed
    os.waitpid(pid, 0)
    os.close(terminal)
    assert "GOT 1" in text
