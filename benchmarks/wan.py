"""A wide-area network inside one Linux machine: network namespaces, and a router between them in user space.

Each node is a namespace with one TUN device. A router process reads every packet, lets it queue for the bandwidth of
its (source, destination) pair, holds it for the latency of the pair, and delivers it. TCP above that is the kernel's
own. Needs root, ``ip`` (iproute2) and /dev/net/tun; standard library only.

python benchmarks/wan.py MATRIX.json    # build it, measure round trips and bandwidths against the matrix, remove it
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import heapq
import json
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_DEVICE = "wan0"
_SUBNET = "10.78.0"
_MTU = 65000
_QUEUE_S = 0.25
_QUEUE_PACKETS = 24
"""A packet is dropped when it would queue longer than _QUEUE_S and behind more than this many full packets."""
_PROBE_PORT = 7000
_SETTINGS = {
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv4/tcp_wmem": "4096 1048576 134217728",
    "ipv4/tcp_rmem": "4096 1048576 134217728",
    "ipv4/tcp_slow_start_after_idle": "0",
    "ipv4/tcp_no_metrics_save": "1",
}


class LabError(RuntimeError):
    """This machine or user cannot emulate a network."""


@dataclass(frozen=True)
class Matrix:
    """One-way latency and bandwidth from each node to each other."""

    names: tuple[str, ...]
    latency_s: tuple[tuple[float, ...], ...]
    bandwidth_Bps: tuple[tuple[float, ...], ...]

    @classmethod
    def load(cls, path: Path) -> Matrix:
        """Read ``{"names": ..., "latency_ms": [[...]], "megabytes_per_s": [[...]]}``; the diagonals do not matter.

        Raises:
            LabError: An entry is missing or has the wrong size, a latency is negative, or a bandwidth is not positive.
        """
        data = json.loads(path.read_text())
        for key in ("names", "latency_ms", "megabytes_per_s"):
            if key not in data:
                raise LabError(f"{path} lacks {key!r}")
        names = tuple(data["names"])
        latency_s = _square(path, data, "latency_ms", len(names), 1e-3, lambda value: value >= 0)
        return cls(names, latency_s, _square(path, data, "megabytes_per_s", len(names), 1e6, lambda value: value > 0))

    @property
    def num_nodes(self) -> int:
        """The number of nodes."""
        return len(self.names)

    def message_s(self, source: int, destination: int, num_bytes: int) -> float:
        """Seconds of a message that has its link for itself."""
        return self.latency_s[source][destination] + num_bytes / self.bandwidth_Bps[source][destination]


def _square(
    path: Path, data: dict[str, Any], key: str, size: int, scale: float, is_good: Callable[[float], bool]
) -> tuple[tuple[float, ...], ...]:
    rows = data[key]
    if not isinstance(rows, list) or [len(row) for row in rows] != [size] * size:
        raise LabError(f"{path}: {key} is not a matrix of {size} x {size}, one row and column for each name")
    for a, row in enumerate(rows):
        for b, value in enumerate(row):
            if a != b and not is_good(value):
                raise LabError(f"{path}: {key}[{a}][{b}] is {value}, which no link can have")
    return tuple(tuple(value * scale for value in row) for row in rows)


class Lab:
    """The namespaces of a matrix and their router, while the ``with`` statement runs.

    Raises:
        LabError: On entering, when this machine or user cannot do it.
    """

    def __init__(self, name: str, matrix: Matrix) -> None:
        self.name, self.matrix = name, matrix
        self._router: subprocess.Popen[str] | None = None

    def __enter__(self) -> Lab:
        check_permitted()
        for node in range(self.matrix.num_nodes):
            self._remove(node)  # what an earlier lab may have left when it was killed
        try:
            devices = [self._build(node) for node in range(self.matrix.num_nodes)]
            self._router = _start_router(self.matrix, devices)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._router is not None:
            assert self._router.stdin is not None
            self._router.stdin.close()
            self._router.wait(10)
        for node in range(self.matrix.num_nodes):
            self._remove(node)

    def address(self, node: int) -> str:
        """The address of a node."""
        return f"{_SUBNET}.{node + 1}"

    def command(self, node: int) -> tuple[str, ...]:
        """What to start a process under that shall run on a node."""
        return ("ip", "netns", "exec", self._namespace(node), "env", f"GLOO_SOCKET_IFNAME={_DEVICE}")

    def stats(self) -> dict[str, Any]:
        """What the router has done so far, and how late it was."""
        assert self._router is not None
        assert self._router.stdin is not None
        assert self._router.stdout is not None
        self._router.stdin.write("stats\n")
        self._router.stdin.flush()
        answer: dict[str, Any] = json.loads(self._router.stdout.readline())
        return answer

    def _namespace(self, node: int) -> str:
        return f"{self.name}-{node}"

    def _build(self, node: int) -> int:
        """Make a node; return the router's end of its device."""
        namespace = self._namespace(node)
        _run("ip", "netns", "add", namespace)
        hosts = Path("/etc/netns", namespace, "hosts")  # what its processes see as /etc/hosts
        hosts.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{self.address(other)} {self._namespace(other)}\n" for other in range(self.matrix.num_nodes)]
        hosts.write_text("".join(["127.0.0.1 localhost\n", *lines]))
        with inside(namespace):
            device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            tunsetiff, iff_tun_no_pi = 0x400454CA, 0x1001
            fcntl.ioctl(device, tunsetiff, struct.pack("16sH22x", _DEVICE.encode(), iff_tun_no_pi))
            _run("ip", "link", "set", "lo", "up")
            _run("ip", "addr", "add", f"{self.address(node)}/24", "dev", _DEVICE)
            _run("ip", "link", "set", _DEVICE, "mtu", str(_MTU), "txqueuelen", "4000", "up")
            for key, value in _SETTINGS.items():
                with suppress(OSError):  # not every kernel has every setting per namespace
                    Path("/proc/sys/net", key).write_text(value)
        return device

    def _remove(self, node: int) -> None:
        namespace = self._namespace(node)
        if Path("/run/netns", namespace).exists():
            _run("ip", "netns", "del", namespace)
        shutil.rmtree(f"/etc/netns/{namespace}", ignore_errors=True)


def check_permitted() -> None:
    """Raise LabError with the reason when no network can be emulated here."""
    if sys.platform != "linux":
        raise LabError("network namespaces exist on Linux only")
    if os.geteuid() != 0:
        raise LabError("network namespaces need root")
    if shutil.which("ip") is None:
        raise LabError("there is no 'ip' command (install iproute2)")
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        raise LabError(f"/dev/net/tun cannot be opened ({error.strerror})") from error


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Put this thread into a network namespace for a while."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    target = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        _set_namespace(target)
        yield
    finally:
        _set_namespace(home)
        os.close(home)
        os.close(target)


def _set_namespace(descriptor: int) -> None:
    clone_newnet = 0x40000000
    if ctypes.CDLL(None, use_errno=True).setns(descriptor, clone_newnet):
        number = ctypes.get_errno()
        raise LabError(f"cannot enter a network namespace ({os.strerror(number)})")


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise LabError(f"{' '.join(command)}: {result.stderr.strip()}")


# ----------------------------------------------------------------------- router


def _start_router(matrix: Matrix, devices: Sequence[int]) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--route", *map(str, devices)]
    router = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=devices)
    for device in devices:
        os.close(device)
    assert router.stdin is not None
    assert router.stdout is not None
    router.stdin.write(json.dumps(asdict(matrix)) + "\n")
    router.stdin.flush()
    if router.stdout.readline() != "ready\n":
        raise LabError("the router did not start")
    return router


class Router:
    """For each directed pair a first-in-first-out queue served at the pair's bandwidth, then the pair's latency."""

    def __init__(self, matrix: Matrix, devices: Sequence[int]) -> None:
        self.matrix = matrix
        self.devices = list(devices)
        self._free_s = [[0.0] * len(devices) for _ in devices]
        self._queue: list[tuple[float, int, int, bytes]] = []
        self.packets = self.bytes = self.dropped = 0
        self._late_s = self.latest_s = 0.0

    def run(self, control: int) -> None:
        """Route until ``control`` is closed; answer a line on it with the statistics."""
        sources = {device: node for node, device in enumerate(self.devices)}
        while True:
            now = self._deliver(time.monotonic())
            wait_s = max(0.0, self._queue[0][0] - now) if self._queue else None
            for ready in select.select([control, *self.devices], (), (), wait_s)[0]:
                if ready != control:
                    self._take(ready, sources[ready])
                elif os.read(control, 4096):
                    print(json.dumps(self.stats()), flush=True)
                else:
                    return

    def stats(self) -> dict[str, Any]:
        """Packets, bytes and drops so far; the mean and the worst delay of a delivery; processor seconds used."""
        mean_s = self._late_s / max(1, self.packets)
        counts = {"packets": self.packets, "bytes": self.bytes, "dropped": self.dropped}
        return {**counts, "late_ms": mean_s * 1e3, "latest_ms": self.latest_s * 1e3, "cpu_s": time.process_time()}

    def _deliver(self, now: float) -> float:
        while self._queue and self._queue[0][0] <= now:
            due, _, node, packet = heapq.heappop(self._queue)
            self._late_s += now - due
            self.latest_s = max(self.latest_s, now - due)
            with suppress(OSError):  # the node has just been removed
                os.write(self.devices[node], packet)
            now = time.monotonic()
        return now

    def _take(self, device: int, source: int) -> None:
        for _ in range(16):  # then others have their turn
            try:
                packet = os.read(device, _MTU + 64)
            except OSError:
                return
            destination = packet[19] - 1  # the last byte of an IPv4 destination address
            if packet[0] >> 4 == 4 and 0 <= destination < len(self.devices) and destination != source:
                self._admit(source, destination, packet)

    def _admit(self, source: int, destination: int, packet: bytes) -> None:
        now = time.monotonic()
        seconds_per_byte = 1 / self.matrix.bandwidth_Bps[source][destination]
        start = max(now, self._free_s[source][destination])
        if start - now > max(_QUEUE_S, _QUEUE_PACKETS * _MTU * seconds_per_byte):
            self.dropped += 1
            return
        departure = self._free_s[source][destination] = start + len(packet) * seconds_per_byte
        self.packets += 1
        self.bytes += len(packet)
        due = departure + self.matrix.latency_s[source][destination]
        heapq.heappush(self._queue, (due, self.packets, destination, packet))


def _route(devices: Sequence[int]) -> None:
    fields = json.loads(sys.stdin.readline())
    with suppress(OSError):  # busy nodes must not delay packets; without the right to it they may
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(5))
    gc.disable()
    print("ready", flush=True)
    Router(Matrix(**fields), devices).run(sys.stdin.fileno())


# ----------------------------------------------------------------------- verify

_ECHO = f"""
import socket, sys
connection, _ = socket.create_server((sys.argv[1], {_PROBE_PORT})).accept()
connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
while True:
    head = connection.recv(8, socket.MSG_WAITALL)
    if not head:
        break
    left = int.from_bytes(head, "big")
    while left:
        left -= len(connection.recv(min(left, 1 << 20)))
    connection.sendall(b"x")
"""


def verify(lab: Lab, source: int, destination: int, num_bytes: int) -> tuple[float, float]:
    """Measure the median round trip of one byte, and the time of ``num_bytes`` with their answer, warmed up."""
    command = [*lab.command(destination), sys.executable, "-c", _ECHO, lab.address(destination)]
    with subprocess.Popen(command) as echo, inside(lab._namespace(source)), _connect(lab, destination) as probe:

        def exchange(size: int) -> float:
            start = time.monotonic()
            probe.sendall(size.to_bytes(8, "big") + bytes(size))
            probe.recv(1)
            return time.monotonic() - start

        trips = sorted(exchange(1) for _ in range(9))
        bulk = [exchange(num_bytes) for _ in range(3)]
        probe.close()
        echo.wait(10)
    return trips[4], bulk[-1]


def _connect(lab: Lab, node: int) -> socket.socket:
    for _ in range(100):
        with suppress(ConnectionRefusedError):
            probe = socket.create_connection((lab.address(node), _PROBE_PORT), timeout=60)
            probe.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return probe
        time.sleep(0.1)
    raise LabError(f"node {node} does not answer")


def main() -> None:
    if sys.argv[1:2] == ["--route"]:
        _route([int(device) for device in sys.argv[2:]])
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    matrix, num_bytes = Matrix.load(Path(sys.argv[1])), 4_000_000
    with Lab("wan-verify", matrix) as lab:
        for node in range(1, matrix.num_nodes):
            trip_s, bulk_s = verify(lab, node - 1, node, num_bytes)
            expected_s = matrix.latency_s[node - 1][node] + matrix.latency_s[node][node - 1]
            ideal_s = expected_s + num_bytes / matrix.bandwidth_Bps[node - 1][node]
            print(
                f"{matrix.names[node - 1]} -> {matrix.names[node]}: round trip {trip_s * 1e3:.1f} ms "
                f"(matrix {expected_s * 1e3:.1f}); {num_bytes / 1e6:g} MB and an answer {bulk_s:.3f} s "
                f"(ideal {ideal_s:.3f})"
            )
        print(lab.stats())


if __name__ == "__main__":
    main()
