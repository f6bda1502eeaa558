"""``python -m tests.fuzz --seconds 3600 --seed 0``: look for programs that are neither exact nor refused."""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch

from tests.device import build

from .journal import program_of, read, supervise, work
from .program import render
from .report import report
from .run import judge

_CACHE = Path(".pytest_cache/d/sim-device")
"""Where pytest keeps the simulated device, too."""


def main() -> int:
    """Run programs for a while; the exit status says whether any was wrong."""
    arguments = _parse()
    if arguments.device == "sim":
        build.load(build.installed(_CACHE))
    if arguments.program is not None:
        _quiet()
        verdict = judge(program_of(arguments.program))
        print(render(program_of(arguments.program)), verdict, sep="\n")
        return int(verdict.kind == "WRONG")
    if arguments.work:
        _quiet()
        work(arguments.journal, arguments.seed, arguments.work, singles=arguments.singles)
        return 0
    journal = arguments.journal or Path(tempfile.mkdtemp()) / "journal.jsonl"
    journal.unlink(missing_ok=True)
    start_s = time.time()
    options = ["--seed", str(arguments.seed), "--journal", str(journal), *(["--singles"] if arguments.singles else [])]
    supervise(journal, options, start_s + arguments.seconds)
    tally = read(journal)
    tally.seconds = time.time() - start_s
    if arguments.report:
        arguments.report.write_text(report(tally, arguments.head))
    print(tally.summary())
    return int(bool(tally.failures))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--singles", action="store_true", help="only every feature alone")
    parser.add_argument("--program", help="features joined by +: print that program and its verdict")
    parser.add_argument("--report", type=Path, help="write what was found to this file")
    parser.add_argument("--head", default="", help="the report's first words")
    parser.add_argument("--journal", type=Path, help="where programs are noted one by one")
    parser.add_argument("--device", choices=("cpu", "sim"), default="cpu", help="sim: train on simulated devices")
    parser.add_argument("--work", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def _quiet() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
