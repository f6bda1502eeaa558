"""What is added to an exception of the user's code that ran on a part of the batch: the part may be what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ...engine.errors import SkipPipeError

_ON_MICROBATCHES: Final = (
    "A microbatch may lack what the batch has: its longest sample, all of its classes, more than one sample for a "
    "BatchNorm. num_microbatches=1 runs the step as one process does; microbatches='stack' runs all but the blocks so."
)


class Noted:
    """Says on an exception that the step runs on microbatches of ``sizes``, and on which of them it was raised.

    No generator: it is entered several times for each microbatch.
    """

    __slots__ = ("_microbatch", "_sizes")

    def __init__(self, sizes: Sequence[int], microbatch: int | None = None) -> None:
        self._sizes = sizes
        self._microbatch = microbatch

    def __enter__(self) -> None:
        """Begin."""

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        """Add the note."""
        if not isinstance(error, Exception) or isinstance(error, SkipPipeError):
            return
        if len(self._sizes) > 1 and not any(_ON_MICROBATCHES in note for note in getattr(error, "__notes__", ())):
            error.add_note(f"{_where(self._sizes, self._microbatch)} {_ON_MICROBATCHES}")


def _where(sizes: Sequence[int], microbatch: int | None) -> str:
    count, total = len(sizes), sum(sizes)
    if microbatch is None:
        return f"The step runs on {count} microbatches of {min(sizes)} to {max(sizes)} of {total} samples."
    return f"The step ran on microbatch {microbatch + 1} of {count}, with {sizes[microbatch]} of {total} samples."
