"""A run of the fuzzer in a process of its own, and a journal from which a new one goes on after a crash."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from skippipe_plugin.worker.parent import death_with_parent

from .grammar import BY_NAME
from .run import Program, Tally, Verdict, judge, programs, shrink


def names_of(features: Program) -> str:
    """Return a program's name: its features, joined by ``+``."""
    return "+".join(feature.name for feature in features)


def program_of(names: str) -> Program:
    """Invert :func:`names_of`."""
    return tuple(BY_NAME[name] for name in names.split("+") if name)


def read(journal: Path) -> Tally:
    """Return what a journal holds; a program that was begun and has no verdict ended its process."""
    tally, begun = Tally(), ""
    lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
    for line in lines:
        if "begin" in line:
            if begun:
                _note(tally, begun, begun, Verdict("WRONG", "the process died"))
            begun = line["begin"] or "-"
        else:
            begun = ""
            _note(tally, line["end"], line["minimal"], Verdict(line["kind"], line["text"]))
    if begun:
        _note(tally, begun, begun, Verdict("WRONG", "the process died"))
    return tally


def _note(tally: Tally, names: str, minimal: str, verdict: Verdict) -> None:
    tally.note(program_of(names.strip("-")), program_of(minimal.strip("-")), verdict)


def work(journal: Path, seed: int, end_s: float, *, singles: bool) -> None:
    """Judge programs that the journal does not hold yet until ``end_s``, and write them into it."""
    tally = read(journal)
    with journal.open("a", buffering=1) as file:
        for program in programs(seed + 1000 * tally.num_programs, tally):
            if time.time() > end_s or (singles and len(program) > 1):
                return
            if len(program) <= 1 and names_of(program) in tally.seen:
                continue
            file.write(json.dumps({"begin": names_of(program)}) + "\n")
            verdict, minimal = judge(program), program
            if verdict.kind == "WRONG":
                minimal = shrink(program, lambda smaller: judge(smaller).kind == "WRONG")
                verdict = judge(minimal) if len(minimal) < len(program) else verdict
                print("WRONG", names_of(minimal), "|", verdict.text, flush=True)
            entry = {"end": names_of(program), "minimal": names_of(minimal), "kind": verdict.kind, "text": verdict.text}
            file.write(json.dumps(entry) + "\n")
            tally.note(program, minimal, verdict)


def supervise(journal: Path, arguments: list[str], end_s: float) -> None:
    """Run workers of the fuzzer, one after the other, until the time is over or one has ended by itself."""
    while time.time() < end_s:
        command = [sys.executable, "-m", "tests.fuzz", *arguments, "--work", str(end_s)]
        done = subprocess.run(command, check=False, preexec_fn=death_with_parent())
        if done.returncode == 0:
            return
        print(f"the fuzzer's process ended with {done.returncode}", flush=True)
