"""What becomes of the shell commands of a document: ours run, those of our scripts are parsed, others must be known."""

from __future__ import annotations

import argparse
import contextlib
import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from unittest.mock import patch

from packaging.requirements import Requirement

from skippipe_plugin.cli import main

ROOT = Path(__file__).parents[2]
OTHERS = {".ci/run", "pytest", "ruff", "mypy", "accelerate", "torchrun", "srun", "sbatch", "ssh", "scp", "cd", "curl"}
OTHERS |= {"chmod", "echo", "export", "git", "ip", "kill", "sleep", "source"}
"""Programs that are not ours, or that tests of their own start."""
SERVICES = frozenset({"run", "worker"})
"""Commands of skippipe that last: their arguments are parsed, tests of their own start them."""


class _Parsed(Exception):
    """The arguments of a script are understood."""


def commands(source: str, *, prompts: bool) -> list[str]:
    """List the commands of a block; with prompts the other lines are output."""
    lines = source.replace("\\\n", " ").splitlines()
    if prompts:
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def check(command: str) -> None:
    """Run or check one command line; AssertionError says what is wrong with it."""
    words = shlex.split(command, comments=True)
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in ("sudo", "exec", "time", "&")):
        words.pop(0)
    for part in _split(words):
        program, *arguments = part
        handler = _HANDLERS.get(program)
        assert handler or program in OTHERS, f"{program!r} is unknown to the tests of the documents: {command}"
        if handler:
            handler(arguments)


def _split(words: Iterable[str]) -> list[list[str]]:
    """Split at ``&&``, ``|``, ``;`` and ``&``; leave redirections out."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in ("&&", "|", ";", "&"):
            parts.append([])
        elif not re.match(r"\d*[<>]", word):
            parts[-1].append(word)
    return [part for part in parts if part]


def _skippipe(arguments: list[str]) -> None:
    if arguments[0] in SERVICES:
        _parse(lambda: main(arguments))
        return
    assert main(arguments) == 0, f"skippipe {shlex.join(arguments)} failed"


def _python(arguments: list[str]) -> None:
    script, *options = arguments
    if script.startswith("-") or not script.startswith(("examples/", "benchmarks/")):
        return  # a module, or the reader's own script
    path = ROOT / script
    assert path.is_file(), f"there is no {script}"
    if "ArgumentParser" not in path.read_text():
        files = [option for option in options if option.startswith(("examples/", "benchmarks/"))]
        assert all((ROOT / file).exists() for file in files), f"{shlex.join(arguments)} names no file of ours"
        return
    with (
        contextlib.chdir(ROOT),
        patch("sys.argv", [script, *options]),
        patch("sys.path", [str(path.parent), str(ROOT), *sys.path]),
    ):
        _parse(lambda: runpy.run_path(script, run_name="__main__"))


def _parse(run: Callable[[], object]) -> None:
    """Let a program parse its arguments, and stop there."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(*args: object, **keywords: object) -> object:
        original(*args, **keywords)  # type: ignore[call-overload]
        raise _Parsed

    with patch.object(argparse.ArgumentParser, "parse_args", parse_args):
        try:
            run()
        except _Parsed:
            return
        except SystemExit as end:
            if end.code == 0:
                return
            raise AssertionError("the program refuses its arguments") from end
    raise AssertionError("the program ended without reading its arguments")


def _pip(arguments: list[str]) -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments:
        name = argument.replace(".[", "skippipe-plugin[")
        if name.startswith("skippipe-plugin"):
            assert Requirement(name).extras <= known.keys(), f"unknown extras: {argument}"


_HANDLERS: dict[str, Callable[[list[str]], None]] = {
    "skippipe": _skippipe,
    "python": _python,
    "pip": _pip,
}
