"""The process beside the driver that is Ray's client: places seats on nodes, and tells what becomes of them.

Ray ends its clients when it thinks fit, and holds threads that no fork survives; so it is kept out of the user's
process. The driver writes one JSON object per line: ``give`` (tickets, command and environment of each worker),
``take_back`` (ticket); the end of the input is the end of the job. Answers are lines too: ``ready`` (this node's
address), ``gone`` (ticket, how), ``say`` (to the log), ``failed`` (why no worker will come any more).

A seat is an actor that holds one worker, an ordinary process of its node. Each group of seats that is asked for is one
placement group: on nodes of their own where the cluster has enough, else spread. Nothing of the package is imported, so
that nodes need no more than Ray to make an actor.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Final

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

_LOOK_S: Final = 0.05
_WATCH_S: Final = 0.2
_PROBE_S: Final = 1.0
_PROBES: Final = 3
"""How often in a row the head may leave a connection unanswered."""
_AVOID_S: Final = 60.0
"""For how long a node with which a worker was lost is passed over; Ray itself needs up to 20 s to miss a node."""
_PATIENCE_S: Final = 3.0
"""How long a group may wait for free resources before one that asks for less takes its place."""
_SAY_S: Final = 5.0
_PR_SET_PDEATHSIG: Final = 1
_NODE: Final = "ray.io/node-id"
"""The label by which Ray knows its nodes."""


class Seat:
    """Holds one worker process of its node, which dies with it."""

    def start(self, command: list[str], environment: dict[str, str]) -> str:
        """Start the worker; return the node."""
        libc = ctypes.CDLL(None)
        die_with_me = (lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)) if sys.platform == "linux" else None
        paths = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), environment["PYTHONPATH"])))
        variables = {**os.environ, **environment, "PYTHONPATH": paths}
        self._process = subprocess.Popen(
            [sys.executable, *command], env=variables, stdin=subprocess.DEVNULL, preexec_fn=die_with_me
        )
        return str(ray.get_runtime_context().get_node_id())

    def hold(self) -> str:
        """Wait for the end of the worker, and say how it ended.

        Ray takes a quarter of a minute to miss a raylet, and lets its actors live as long; this one does not.
        """
        raylet = _process(os.environ.get("RAY_RAYLET_PID", ""))
        while (status := self._process.poll()) is None:
            if raylet is None:
                time.sleep(_WATCH_S)
            elif select.select([raylet], [], [], _WATCH_S)[0]:
                self._process.kill()
                os._exit(1)
        return f"its process ended with exit status {status}"


def _process(pid: str) -> int | None:
    """Return what tells the end of a process, where the system has such a thing."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.pidfd_open(int(pid))
    return None


@dataclass(slots=True)
class Worker:
    """A worker that was asked for."""

    ticket: str
    command: list[str]
    environment: dict[str, str]
    actor: Any = None  # Any: Ray's handles and references
    started: Any = None
    held: Any = None
    node: str = ""


@dataclass(slots=True)
class Group:
    """Workers that are placed together."""

    workers: list[Worker]
    level: int = 0
    placement: PlacementGroup | None = None
    asked_s: float = 0.0
    since_s: float = field(default_factory=time.monotonic)
    told: bool = False


class Seats:
    """Everything that this process has been asked for."""

    def __init__(self, resources: dict[str, float], answers: Answers) -> None:
        self._resources = resources
        self._answers = answers
        self._waiting: list[Group] = []
        self._placed: list[Group] = []
        self._bad: dict[str, float] = {}

    def give(self, workers: list[dict[str, Any]]) -> None:
        """Ask Ray for a group of seats."""
        group = Group([Worker(**each) for each in workers])
        self._waiting.append(group)
        self._ask(group)

    def take_back(self, ticket: str) -> None:
        """End a worker, and avoid its node for a while: it is lost, or slow."""
        for group in (*self._waiting, *self._placed):
            for worker in [each for each in group.workers if each.ticket == ticket]:
                if worker.node:
                    self._bad[worker.node] = time.monotonic()
                self._end(group, worker)

    def look(self) -> None:
        """Seat who has a place, and tell who is gone."""
        for group in list(self._waiting):
            if group.placement is not None and _state(group.placement) == "CREATED":
                self._waiting.remove(group)
                self._placed.append(group)
                self._seat(group)
            elif time.monotonic() - group.asked_s > _PATIENCE_S and group.level < 2:
                group.level += 1
                self._ask(group)
            self._tell(group)
        for group in list(self._placed):
            for worker in list(group.workers):
                self._look_at(group, worker)

    # ------------------------------------------------------------------ places

    def _ask(self, group: Group) -> None:
        """Ask for places: first on nodes of their own, then on nodes that have workers, then on suspected ones too."""
        if group.placement is not None:
            remove_placement_group(group.placement)
        count, nodes = len(group.workers), self._nodes()
        bad = {node for node, since_s in self._bad.items() if time.monotonic() - since_s < _AVOID_S}
        taken = {worker.node for each in self._placed for worker in each.workers}
        for level, avoided in enumerate((bad | taken, bad, set())):
            group.level = max(group.level, level)
            fresh = nodes - avoided
            if level == group.level and (len(fresh) >= count or (level > 0 and fresh) or level == 2):
                break
        strategy = "STRICT_SPREAD" if len(nodes - avoided) >= count else "SPREAD"
        labels = {_NODE: f"!in({','.join(sorted(avoided & nodes))})"} if avoided & nodes else {}
        group.placement = placement_group(
            [dict(self._resources)] * count, strategy=strategy, bundle_label_selector=[labels] * count
        )
        group.asked_s = time.monotonic()

    def _nodes(self) -> set[str]:
        """Return the nodes that live, as Ray knows, and are large enough for a worker."""
        return {
            node["NodeID"]
            for node in ray.nodes()  # type: ignore[no-untyped-call, unused-ignore]
            if node["Alive"] and all(node["Resources"].get(name, 0) >= least for name, least in self._resources.items())
        }

    def _tell(self, group: Group) -> None:
        waited_s = time.monotonic() - group.since_s
        if group in self._waiting and waited_s > _SAY_S and not group.told:
            group.told = True
            self._answers.say(
                f"waiting for Ray to place {len(group.workers)} workers, {self._resources} each; the cluster has "
                f"{len(self._nodes())} nodes that are large enough, and its free resources are "
                f"{ {name: n for name, n in ray.available_resources().items() if name in self._resources} }"  # type: ignore[no-untyped-call, unused-ignore]
            )

    # ------------------------------------------------------------------ workers

    def _seat(self, group: Group) -> None:
        assert group.placement is not None
        nodes = placement_group_table(group.placement)["bundles_to_node_id"]
        amounts = dict(self._resources)
        options = {"num_cpus": amounts.pop("CPU", 0), "num_gpus": amounts.pop("GPU", 0), "resources": amounts}
        for index, worker in enumerate(group.workers):
            where = PlacementGroupSchedulingStrategy(group.placement, placement_group_bundle_index=index)
            worker.node = nodes[index]
            worker.actor = ray.remote(Seat).options(scheduling_strategy=where, **options).remote()
            worker.started = worker.actor.start.remote(worker.command, worker.environment)
            worker.held = worker.actor.hold.remote()

    def _look_at(self, group: Group, worker: Worker) -> None:
        """Tell what has become of a worker, if it is over."""
        for reference in (worker.started, worker.held):
            if not ray.wait([reference], timeout=0)[0]:
                return
            try:
                how = ray.get(reference)
            except ray.exceptions.RayError as error:
                how = f"Ray: {str(error).strip().splitlines()[0]}"
                break
        self._answers.send(gone=worker.ticket, how=how)
        self._bad[worker.node] = time.monotonic()
        self._end(group, worker)

    def _end(self, group: Group, worker: Worker) -> None:
        """End a worker and give its place back, with the last of a group."""
        if worker.actor is not None:
            ray.kill(worker.actor)
        group.workers.remove(worker)
        if not group.workers and group.placement is not None:
            remove_placement_group(group.placement)
            for groups in (self._waiting, self._placed):
                if group in groups:
                    groups.remove(group)


class Answers:
    """What the driver is told, from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # what others print is no answer

    def send(self, **fields: Any) -> None:
        """Write one line."""
        with self._lock:
            self._out.write(json.dumps(fields) + "\n")
            self._out.flush()

    def say(self, text: str) -> None:
        """Have the driver log something."""
        self.send(say=text)


def _state(placement: PlacementGroup) -> str:
    return str(placement_group_table(placement).get("state"))


def _knock(address: str) -> None:
    host, port = address.rsplit(":", 1)
    socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()


def _own_node() -> str:
    """Return where this machine's Ray node (its raylet) listens."""
    own = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == own]  # type: ignore[no-untyped-call, unused-ignore]
    return f"{node['NodeManagerAddress']}:{node['NodeManagerPort']}"


def _probe(whom: str, address: str, answers: Answers) -> None:
    """Tell when somebody is gone without whom nothing goes on.

    Ray's own client waits a minute for the head, and then ends this process; its node it misses after 10 to 20 s, and
    then ends every actor.
    """
    failed = 0
    while failed < _PROBES:
        try:
            _knock(address)
            failed = 0
        except OSError:
            failed += 1
        time.sleep(_PROBE_S)
    answers.send(failed=f"{whom} does not answer any more")


def _read(orders: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in sys.stdin:
        orders.put(json.loads(line))
    orders.put(None)


def _obey(seats: Seats, orders: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """Do what the driver says until it says no more."""
    while True:
        with contextlib.suppress(queue.Empty):
            order = orders.get(timeout=_LOOK_S)
            if order is None:
                return
            if "give" in order:
                seats.give(order["give"])
            else:
                seats.take_back(order["take_back"])
        seats.look()


def main(arguments: list[str]) -> int:
    """Serve one driver."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, whose end this process sees
    address, resources = arguments
    answers = Answers()
    try:
        if re.fullmatch(r"[^/]+:\d+", address):
            _knock(address)  # Ray's client takes a minute to give up
        ray.init(address=address, log_to_driver=False, logging_level="error", namespace="skippipe")  # type: ignore[arg-type, unused-ignore]
    except Exception as error:
        answers.send(failed=f"there is no Ray cluster at address {address!r} ({str(error).strip().splitlines()[0]})")
        return 1
    head = ray.get_runtime_context().gcs_address
    answers.send(ready=ray.util.get_node_ip_address())  # type: ignore[no-untyped-call, unused-ignore]
    needed = {
        f"the head of the Ray cluster at {head}": head,
        "this machine's Ray node (its raylet)": _own_node(),
    }
    for whom, where in needed.items():
        threading.Thread(target=_probe, args=(whom, where, answers), name=whom, daemon=True).start()
    orders: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(orders,), name="orders", daemon=True).start()
    _obey(Seats(json.loads(resources), answers), orders)
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
