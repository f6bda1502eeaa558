"""What a source of workers does, and what its workers must know to join."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ..engine.handover import import_paths
from ..engine.secret import SECRET_VARIABLE


@dataclass(frozen=True, slots=True)
class Door:
    """Where the workers of a job join, and by what they prove that they may."""

    host: str
    port: int
    secret: str = field(repr=False)
    """In hexadecimal. Who knows it can run code in the job: never put it on a command line."""
    paths: tuple[str, ...] = field(default_factory=lambda: tuple(import_paths()), repr=False)
    """Where the driver imports from; a worker that shares its file system finds the same modules there."""

    def command(self, ticket: str, python: str = sys.executable) -> list[str]:
        """Return the command of a worker that counts as ``ticket``; run it with :meth:`environment` added to its own.

        >>> Door("10.0.0.5", 29400, "00" * 32).command("7", python="python")
        ['python', '-m', 'skippipe_plugin.worker', '10.0.0.5:29400', '7']
        """
        return [python, "-m", "skippipe_plugin.worker", f"{self.host}:{self.port}", ticket]

    def environment(self) -> dict[str, str]:
        """Return the variables that :meth:`command` needs beside those of its host."""
        return {SECRET_VARIABLE: self.secret, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(self.paths)}


class WorkerSource(Protocol):
    """Gives workers on this or other hosts, tells when one is gone, takes them back.

    Each worker has a *ticket*, a text that the source chooses and that no two of its workers share. Methods are called
    by the driver's process only: ``open`` first, ``close`` last, ``gone`` also from another thread.
    """

    def open(self) -> tuple[str, int]:
        """Begin; return the address and the port at which the driver is to listen where its settings name none.

        It must be an address that the workers reach; port 0 is any free one.

        Raises:
            SkipPipeError: There is nothing that could give workers.
        """

    def give(self, count: int, door: Door) -> Sequence[str]:
        """Have ``count`` more workers come to ``door``; return their tickets at once, wherever they are on their way.

        A replacement should not come to the host that the last worker was lost with, if there is another.

        Raises:
            SkipPipeError: None will come.
        """

    def gone(self) -> Mapping[str, str]:
        """Return, by ticket, how each worker ended that has not been taken back; called often: answer from memory."""

    def take_back(self, ticket: str) -> None:
        """End a worker at once if it is there still: others have its stages."""

    def close(self) -> None:
        """Take all back: the driver has told its workers to leave."""
