"""Random faults over random configurations, for a given time or count: what is lost, who waits, what stays behind.

    python benchmarks/soak.py --minutes 60 --out soak.json
    python benchmarks/soak.py --seeds 17        # one run again

A run is drawn from its seed (door, schedule, stages, replicas, accumulation, skip ratio, experts, ...), trained once
undisturbed and once with its faults (``skippipe_plugin.testing``), and judged: every record used exactly once by every
part of the model, in order; validation counted once; weights as in the undisturbed run where that is promised. Several
runs share a process, which takes its workers from one to the next. When it ends, by itself or by SIGKILL in the middle
of its last run, nothing may be left after five seconds: no process, listening port, shared memory or temporary file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

TOKEN: Final = "SOAK_TOKEN"
RUNS_PER_PROCESS: Final = 10
LIMIT_S: Final = 180.0
"""How long a run may take, on a busy machine; longer is a hang."""
GRACE_S: Final = 5.0
LISTEN: Final = "0A"
HERE: Final = Path(__file__).parent


@dataclass(frozen=True)
class Batch:
    """Runs that one process makes."""

    seeds: tuple[int, ...]
    drivers: int = 1
    die_after_s: float | None = None

    def command(self, out: Path) -> list[str]:
        command = [sys.executable, str(HERE / "soak_run.py"), *map(str, self.seeds), "--out", str(out)]
        command += ["--drivers", str(self.drivers)] * (self.drivers > 1)
        return command + ([] if self.die_after_s is None else ["--die-after", f"{self.die_after_s:.3f}"])


@dataclass
class Tally:
    """What came of all runs."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    hangs: int = 0
    leftovers: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    begun_s: float = field(default_factory=time.monotonic)

    @property
    def num_faults(self) -> int:
        return sum(self.faults.values())

    def add(self, result: dict[str, Any], drivers: int) -> None:
        self.runs.append(result)
        self.faults.update(result["faults"])
        for each in result["wrong"]:
            self.wrong[each.partition(":")[0]] += 1
            self.fail(result["seed"], drivers, f"{result['setting']}: {each}")
        if result["error"] and not is_refused(result, drivers):
            self.wrong["error"] += 1
            self.fail(result["seed"], drivers, f"{result['setting']}: {result['error'][:400]}")

    def fail(self, seed: int, drivers: int, what: str) -> None:
        line = f"FAIL seed {seed}{f' (--drivers {drivers})' * (drivers > 1)}: {what}"
        self.failures.append(line)
        print(line, flush=True)


def is_refused(result: dict[str, Any], drivers: int) -> bool:
    """Whether an error is the promised one: nobody replaces workers of several drivers, or all stages were lost."""
    promised = ["no other stage is left to rebuild it from"]
    if drivers > 1:
        promised += ["is lost. Without the StageRecovery callback", "broke, but no worker ended", "driver"]
    return any(each in result["error"] for each in promised)


def batches(first: int, seed: int) -> Iterator[Batch]:
    """Draw what each process does, for ever."""
    rng, seeds = random.Random(seed), itertools.count(first)
    for index in itertools.count():
        if index % 6 == 5:
            yield Batch((next(seeds),), drivers=2)
            continue
        die_after_s = rng.uniform(2.0, 12.0) if index % 3 == 1 else None
        yield Batch(tuple(itertools.islice(seeds, RUNS_PER_PROCESS)), die_after_s=die_after_s)


def run(batch: Batch, tally: Tally) -> None:
    """Let a process make its runs, bound each of them, and look for what it leaves."""
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        out, log, temporary = Path(folder, "out"), Path(folder, "log"), Path(folder, "tmp")
        temporary.mkdir()
        out.touch()
        before = shared_memory()
        environment = os.environ | {TOKEN: token, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
        with log.open("wb") as said:
            process = subprocess.Popen(
                batch.command(out), env=environment, stdout=said, stderr=said, start_new_session=True
            )
            hung = follow(process, out)
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        begun = [line["begins"] for line in lines if "begins" in line] or [batch.seeds[0]]
        results = [line for line in lines if "begins" not in line]
        for result in results:
            tally.add(result, batch.drivers)
        if hung:
            tally.hangs += 1
            tally.fail(begun[-1], batch.drivers, f"hang: no end after {LIMIT_S:g} s; {stacks(log)}")
            end_all(token)
            return
        died = batch.die_after_s is not None and process.returncode == -signal.SIGKILL
        if died:
            tally.faults["kill of the driver"] += 1
        elif process.returncode != 0:
            tally.wrong["error"] += 1
            said_last = log.read_text(errors="replace").strip().splitlines()[-3:]
            tally.fail(
                begun[-1], batch.drivers, f"process ended with {process.returncode}: {' / '.join(said_last)[-400:]}"
            )
        left = leftovers(token, temporary, before, {port for result in results for port in result["ports"]}, died=died)
        if left:
            tally.leftovers += 1
            tally.fail(begun[-1], batch.drivers, f"left behind {GRACE_S:g} s after the end: {left}")
        end_all(token)


def follow(process: subprocess.Popen[bytes], out: Path) -> bool:
    """Wait for the end of a process whose runs each write a line; return whether it hung."""
    size, moved_s = 0, time.monotonic()
    while process.poll() is None:
        time.sleep(0.1)
        if (now := out.stat().st_size) != size:
            size, moved_s = now, time.monotonic()
        if time.monotonic() - moved_s > LIMIT_S:
            process.send_signal(signal.SIGUSR1)  # it writes its threads' stacks
            time.sleep(2)
            process.kill()
            process.wait()
            return True
    return False


def leftovers(token: str, temporary: Path, before: set[str], ports: set[int], *, died: bool) -> list[str]:
    """Return what is there still, after some seconds at most."""
    deadline = time.monotonic() + GRACE_S
    while (left := look(token, temporary, before, ports, died=died)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def look(token: str, temporary: Path, before: set[str], ports: set[int], *, died: bool) -> list[str]:
    left = [f"process {pid} ({command(pid)})" for pid in processes(token)]
    left += [f"port {port}" for port in sorted(ports & listening())]
    left += [f"/dev/shm/{name}" for name in shared_memory() - before if is_ours(name)]
    # A folder of the script's own stays if the script is killed, as it would without us.
    files = [path for path in temporary.iterdir() if not (died and path.name.startswith("tmp"))]
    return left + [f"file {path.name}" for path in files if not is_of_torch(path)]


def shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def is_ours(name: str) -> bool:
    """Whether shared memory belongs to no living process beside us."""
    numbers = [int(part) for part in name.split("_") if part.isdecimal()]
    return not any(Path(f"/proc/{number}").exists() for number in numbers)


def is_of_torch(path: Path) -> bool:
    return path.name.startswith(("torchinductor_", "pymp-"))


def processes(token: str) -> list[int]:
    wanted, found = f"{TOKEN}={token}".encode(), []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:  # it has ended
                continue
    return found


def command(pid: int) -> str:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return f"{state}, {Path(f'/proc/{pid}/cmdline').read_text()[:120]}".replace("\0", " ")
    except OSError:
        return "ended just now"


def listening() -> set[int]:
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()[1:]]
    return {int(line[1].rpartition(":")[2], 16) for line in lines if line[3] == LISTEN}


def end_all(token: str) -> None:
    for pid in processes(token):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def stacks(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip().startswith("File ")]
    return " < ".join(lines[-40:])[:3000]


def report(tally: Tally) -> str:
    judged = sum(result["weights_judged"] for result in tally.runs)
    refused = sum(bool(result["error"]) for result in tally.runs) - tally.wrong["error"]
    rows = [
        ("runs", f"{len(tally.runs)}"),
        *((f"faults: {name}", f"{count}") for name, count in sorted(tally.faults.items())),
        ("faults in all", f"{tally.num_faults}"),
        ("recoveries", f"{sum(len(result['events']) for result in tally.runs)}"),
        ("hangs", f"{tally.hangs}"),
        ("runs with samples lost or counted twice", f"{tally.wrong['samples'] + tally.wrong['metric']}"),
        ("runs out of order", f"{tally.wrong['order']}"),
        ("validations not counted once", f"{tally.wrong['validation']}"),
        ("weights compared / different", f"{judged} / {tally.wrong['weights']}"),
        ("ended by the promised error", f"{max(0, refused)}"),
        ("ended by another error", f"{tally.wrong['error']}"),
        ("leftovers after 5 s", f"{tally.leftovers}"),
        ("minutes", f"{(time.monotonic() - tally.begun_s) / 60:.1f}"),
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def save(tally: Tally, out: Path | None) -> None:
    if out is not None:
        told = {"table": report(tally), "failures": tally.failures, "runs": tally.runs}
        out.write_text(json.dumps(told, indent=1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing new after so many minutes")
    parser.add_argument("--runs", type=int, default=10**9, help="begin nothing new after so many runs")
    parser.add_argument("--seed", type=int, default=0, help="of the first run, and of which processes are killed")
    parser.add_argument("--seeds", type=int, nargs="+", help="just these runs")
    parser.add_argument("--drivers", type=int, default=1, help="with --seeds: how many drivers they have")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--out", type=Path, help="a file for everything, as JSON")
    given = parser.parse_args()
    tally, lock = Tally(), threading.Lock()
    source = iter([Batch(tuple(given.seeds), given.drivers)]) if given.seeds else batches(given.seed, given.seed)

    def work() -> None:
        while len(tally.runs) < given.runs and time.monotonic() - tally.begun_s < 60 * given.minutes:
            with lock:
                batch = next(source, None)
            if batch is None:
                return
            print(f"seeds {batch.seeds[0]} to {batch.seeds[-1]}: {tally.num_faults} faults so far", flush=True)
            run(batch, tally)
            with lock:
                save(tally, given.out)

    jobs = [threading.Thread(target=work) for _ in range(given.jobs)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    print(report(tally))
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
