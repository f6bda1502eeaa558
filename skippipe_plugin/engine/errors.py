"""Run-time faults of a pipeline, as users see them, and how a worker's exception travels to the driver."""

from __future__ import annotations

import pickle
import traceback


class SkipPipeError(RuntimeError):
    """A pipeline cannot go on; the message names the rank, the stage and the way out."""


class StageLostError(SkipPipeError):
    """A worker is gone: its process ended or its link broke."""


class GenerationAborted(SkipPipeError):
    """The groups of this generation were closed under a running operation; the cause is raised by their owner."""


class ConnectionsBroken(SkipPipeError):
    """Connections between ranks broke, though all of them live: others may be made."""


class RemoteTraceback(Exception):
    """Carries the traceback text of another process as the ``__cause__`` of the exception it belongs to."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def pack_exception(error: BaseException) -> tuple[bytes, str]:
    """Return the pickled exception (empty when it cannot be pickled) and its traceback as text."""
    text = "".join(traceback.format_exception(error))
    try:
        packed = pickle.dumps(error)
        pickle.loads(packed)
    except Exception:  # an exception class with its own __init__ often cannot be rebuilt
        return b"", text
    return packed, text


def unpack_exception(packed: bytes, text: str, where: str) -> BaseException:
    """Rebuild a remote exception; ``where`` (rank and stage) becomes a note on it, ``text`` its cause."""
    error: BaseException
    try:
        error = pickle.loads(packed) if packed else SkipPipeError(text.strip().splitlines()[-1])
    except Exception:  # its class is importable only over there
        error = SkipPipeError(text.strip().splitlines()[-1])
    error.__cause__ = RemoteTraceback(text)
    error.add_note(f"This exception was raised on {where}; its traceback there stands above.")
    return error
