"""Faults are values, and connections can be silenced and reset from outside."""

import os
import socket
import subprocess
import sys
import threading

import pytest

from skippipe_plugin.engine import phases
from skippipe_plugin.engine.silence import silence_ends_after
from skippipe_plugin.testing import (
    At,
    Delay,
    FillDisk,
    Injector,
    Kill,
    Moment,
    Phase,
    RefuseStart,
    random_faults,
    sockets,
)

CHILD = """
import socket, sys
link = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
while data := link.recv(100):
    link.sendall(data)
"""


class Echo:
    """A process that sends back what it is sent."""

    def __init__(self, silence_s: float = 60.0) -> None:
        self.silence_s = silence_s

    def __enter__(self) -> "Echo":
        with silence_ends_after(self.silence_s), socket.create_server(("127.0.0.1", 0)) as server:
            self.process = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(server.getsockname()[1])], stderr=subprocess.DEVNULL
            )
            self.link, _ = server.accept()
        self.link.settimeout(10)
        return self

    def ends(self) -> list[tuple[socket.socket, socket.socket]]:
        return sockets.connections(os.getpid(), self.process.pid)

    def __exit__(self, *_: object) -> None:
        self.link.close()
        self.process.kill()
        self.process.wait()


def test_a_connection_that_is_silenced_brings_what_was_sent_when_it_is_repaired() -> None:
    with Echo() as echo:
        ((ours, theirs),) = echo.ends()
        for end in (ours, theirs):
            sockets.silence(end)
        echo.link.sendall(b"hello")
        echo.link.settimeout(0.5)
        with pytest.raises(TimeoutError):
            echo.link.recv(100)
        for end in (ours, theirs):
            sockets.unsilence(end)
            end.close()
        echo.link.settimeout(10)
        assert echo.link.recv(100) == b"hello"


def test_a_connection_that_stays_silent_breaks() -> None:
    with Echo(silence_s=0.5) as echo:
        ((ours, theirs),) = echo.ends()
        for end in (ours, theirs):
            sockets.silence(end)
            end.close()
        echo.link.sendall(b"hello")
        with pytest.raises(TimeoutError, match="Connection timed out"):
            echo.link.recv(100)


@pytest.mark.parametrize("index", [0, 1])
def test_a_connection_is_reset_from_either_end(index: int) -> None:
    with Echo() as echo:
        ((ours, theirs),) = echo.ends()
        sockets.reset((ours, theirs)[index])
        ours.close()
        theirs.close()
        with pytest.raises(OSError, match=r"reset|not connected"):
            assert echo.link.recv(100) == b"never"
        assert echo.process.wait(10) != 0 or index == 1


def test_faults_happen_once_at_their_moments() -> None:
    faults = [
        Delay(At(Phase.TRAINING, step=2, action="0F1"), 0.0),
        Delay(At(Phase.PROBING, nth=2), 0.0),
        Delay(At(Phase.MEETING), 0.0),
        Kill(At(Phase.FORMING), 3),
    ]
    with Injector(*faults) as injector:
        for step in range(4):
            phases.reach(Phase.TRAINING, step)
            phases.act("0F1")
            phases.reach(Phase.PROBING)
        phases.reach(Phase.FORMING)
    phases.reach(Phase.MEETING)
    found = [(str(each.moment), each.done) for each in injector.report]
    assert found == [("probing", True), ("training step 2 0F1", True), ("forming", False)]
    assert "there is no worker of rank 3" in str(injector.report[-1])
    assert injector.pending == (faults[2],)
    assert injector.moments[:2] == [Moment(Phase.TRAINING, 0), Moment(Phase.PROBING)]


def test_starts_are_refused_as_by_the_system() -> None:
    with Injector(RefuseStart(count=2)):
        for _ in range(2):
            with pytest.raises(OSError, match="temporarily unavailable"):
                phases.reach(Phase.STARTING)
        phases.reach(Phase.STARTING)


def test_a_full_disk_is_emptied_when_the_pipeline_has_ended(tmp_path) -> None:
    path = tmp_path / "file"
    with Injector(FillDisk(num_bytes=100)):
        phases.reach(Phase.SAVING)
        with pytest.raises(OSError, match="File too large"):
            path.write_bytes(bytes(101))
        phases.reach(Phase.BETWEEN)
        path.write_bytes(bytes(101))


def test_timers_end_with_the_injector() -> None:
    before = threading.active_count()
    with Injector(Delay(At(Phase.MEETING, delay_s=60))) as injector:
        phases.reach(Phase.MEETING)
    assert threading.active_count() == before
    assert not injector.report


def test_faults_are_drawn_from_their_seed() -> None:
    drawn = [random_faults(seed, range(5), num_workers=3) for seed in range(20)]
    assert drawn == [random_faults(seed, range(5), num_workers=3) for seed in range(20)]
    assert len(set(drawn)) == 20
    assert {type(fault).__name__ for faults in drawn for fault in faults} == {
        "Kill",
        "Stop",
        "Cut",
        "Reset",
        "RefuseStart",
    }
