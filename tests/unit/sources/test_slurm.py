"""What the source makes of SLURM's answers, in the forms of SLURM 22.05; ``tests/e2e/test_slurm.py`` asks one."""

import logging
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.sources import Door, make_source
from skippipe_plugin.sources import slurm as slurm_module
from skippipe_plugin.sources.slurm import SlurmSource, read_tasks, script

DOOR = Door("10.0.0.5", 29400, "ab" * 32, paths=("/home/me/project",))
RUNNING = "12_1|RUNNING|None|n2\n12_0|RUNNING|None|n1\n"
ENDED = "12_1|NODE_FAIL|NodeDown|n2\n12_0|RUNNING|None|n1\n"
PENDING = "12_0|PENDING|Resources|\n12_1|PENDING|Priority|\n"


class Queue:
    """Answers as SLURM's commands do."""

    def __init__(self) -> None:
        self.asked: list[Sequence[str]] = []
        self.given: list[tuple[str, Mapping[str, str]]] = []
        self.answers = {"sbatch": (0, "12\n", ""), "squeue": (0, RUNNING, ""), "scancel": (0, "", "")}

    def run(
        self, command: Sequence[str], given: str = "", environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        self.asked.append(command)
        self.given.append((given, environment or {}))
        return subprocess.CompletedProcess(command, *self.answers[command[0]])

    def of(self, command: str) -> list[Sequence[str]]:
        return [each[1:] for each in self.asked if each[0] == command]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Queue:
    found = Queue()
    monkeypatch.setattr(slurm_module, "_run", found.run)
    monkeypatch.setattr(slurm_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(slurm_module, "own_address", lambda _: "10.0.0.5")
    monkeypatch.setattr(slurm_module, "_LOOKS_EVERY_S", 0.01)
    monkeypatch.setattr(slurm_module, "_END_S", 0.3)
    return found


@pytest.fixture
def source(slurm: Queue) -> Iterator[SlurmSource]:
    source = SlurmSource(options=("--partition=gpu",), python="python3.11")
    assert source.open() == ("10.0.0.5", 0)
    yield source
    source.close()


def comes(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_an_array_is_submitted_whose_secret_is_on_no_command_line(source: SlurmSource, slurm: Queue) -> None:
    assert source.give(2, DOOR) == ["12_0", "12_1"]
    (command,) = slurm.of("sbatch")
    assert {"--parsable", "--array=0-1", "--export=ALL"} <= {*command}
    assert command[-1] == "--partition=gpu"
    (given, environment), *_ = slurm.given
    assert environment["SKIPPIPE_SECRET"] == DOOR.secret
    assert environment["PYTHONPATH"] == "/home/me/project"
    assert DOOR.secret not in f"{command} {given}"
    worker = "exec python3.11 -m skippipe_plugin.worker 10.0.0.5:29400"
    assert (
        given
        == f'#!/bin/sh\n{worker} "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"\n'
        == script(DOOR, "python3.11")
    )


def test_the_cluster_behind_the_number_of_a_job_is_no_part_of_it(source: SlurmSource, slurm: Queue) -> None:
    slurm.answers["sbatch"] = (0, "12;alps\n", "")
    assert source.give(1, DOOR) == ["12_0"]


def test_what_sbatch_refuses(source: SlurmSource, slurm: Queue) -> None:
    said = "sbatch: error: invalid partition specified: gpu\nsbatch: error: Batch job submission failed"
    slurm.answers["sbatch"] = (1, "", said)
    with pytest.raises(SkipPipeError, match=r"workers='slurm': sbatch refuses .*invalid partition specified: gpu"):
        source.give(1, DOOR)


@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        ((0, RUNNING, ""), {}),
        ((0, PENDING, ""), {}),
        ((0, ENDED, ""), {"12_1": "SLURM says NODE_FAIL on n2 (NodeDown)"}),
        (
            (0, "12_0|FAILED|NonZeroExitCode|n1\n" + RUNNING[:21], ""),
            {"12_0": "SLURM says FAILED on n1 (NonZeroExitCode)"},
        ),
        ((0, "12_0|RUNNING|None|n1\n", ""), {"12_1": "SLURM says UNKNOWN (its queue has forgotten the task)"}),
        ((1, "", "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"), {}),
    ],
)
def test_who_is_gone(answer: tuple[int, str, str], gone: Mapping[str, str], source: SlurmSource, slurm: Queue) -> None:
    slurm.answers["squeue"] = answer
    source.give(2, DOOR)
    asked = len(slurm.of("squeue"))
    assert comes(lambda: len(slurm.of("squeue")) > asked + 1)
    assert source.gone() == gone


def test_jobs_that_the_queue_has_forgotten_are_over(source: SlurmSource, slurm: Queue) -> None:
    slurm.answers["squeue"] = (1, "", "slurm_load_jobs error: Invalid job id specified")
    source.give(1, DOOR)
    assert comes(lambda: [*source.gone()] == ["12_0"])


def test_a_task_is_taken_back_without_waiting(source: SlurmSource, slurm: Queue) -> None:
    source.give(2, DOOR)
    source.take_back("12_1")
    assert comes(lambda: slurm.of("scancel") == [["12_1"]])
    slurm.answers["squeue"] = (0, ENDED, "")
    asked = len(slurm.of("squeue"))
    assert comes(lambda: len(slurm.of("squeue")) > asked + 1)
    assert not source.gone()


def test_the_end_cancels_what_waits_and_then_what_stays(slurm: Queue) -> None:
    source = SlurmSource()
    source.open()
    slurm.answers["squeue"] = (0, "12_0|RUNNING|None|n1\n12_1|PENDING|Resources|\n", "")
    source.give(2, DOOR)
    assert comes(lambda: bool(slurm.of("squeue")))
    time.sleep(0.1)
    source.close()
    assert slurm.of("scancel")[0] == ["12_1"]
    assert "12_0" in slurm.of("scancel")[-1]
    source.close()  # twice is no harm


def test_who_waits_in_the_queue_is_said_once(
    source: SlurmSource, slurm: Queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slurm_module, "_PENDING_S", 0.05)
    slurm.answers["squeue"] = (0, PENDING, "")
    with caplog.at_level(logging.WARNING):
        source.give(2, DOOR)
        assert comes(lambda: len(caplog.records) == 2)
        time.sleep(0.1)
    said = sorted(record.message for record in caplog.records)
    assert said == [
        "workers='slurm': workers 12_0 wait in the queue: Resources",
        "workers='slurm': workers 12_1 wait in the queue: Priority",
    ]


def test_lines_that_are_none_of_tasks_are_passed_over() -> None:
    assert read_tasks("CLUSTER: alps\n12_0|RUNNING|None|n1\n\n") == read_tasks("12_0|RUNNING|None|n1")


def test_a_host_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SkipPipeError, match="this host has no sbatch; start the driver on a login node or inside of a"):
        make_source("slurm").open()


def test_what_the_job_around_the_driver_has_set_is_not_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_CPU", "1")
    monkeypatch.setenv("SLURM_CONF", "/etc/lab.conf")
    said = slurm_module._run(["env"], environment={"MINE": "1"}).stdout.splitlines()
    assert {"SLURM_CONF=/etc/lab.conf", "MINE=1"} <= {*said}
    assert not [line for line in said if line.startswith("SLURM_MEM")]
    assert slurm_module._run(["no such command"]).returncode
