"""Run-time faults of a pipeline, as users see them, and how a worker's exception travels to the driver."""

from __future__ import annotations

import contextlib
import contextvars
import pickle
import traceback
from typing import ClassVar

_made: contextvars.ContextVar[list[SkipPipeError] | None] = contextvars.ContextVar("skippipe_refusals", default=None)


class SkipPipeError(RuntimeError):
    """A pipeline cannot go on; the message names the rank, the stage and the way out."""

    is_refusal: ClassVar[bool] = True
    """Whether it answers the user's code. Subclasses have to say so: most name a fault, of which a driver recovers."""

    def __init_subclass__(cls, *, is_refusal: bool = False) -> None:
        super().__init_subclass__()
        cls.is_refusal = is_refusal

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        made = _made.get()
        if made is not None and self.is_refusal:
            made.append(self)


class StageLostError(SkipPipeError):
    """A worker is gone: its process ended or its link broke.

    Args:
        loss: What was lost and how.
        advice: What to do now; another one where nothing is trained.
    """

    def __init__(self, loss: str, advice: str) -> None:
        super().__init__(loss, advice)
        self.loss = loss

    def __str__(self) -> str:
        return ". ".join(map(str, self.args))


class GenerationAborted(SkipPipeError):
    """The groups of this generation were closed under a running operation; the cause is raised by their owner.

    Args:
        text: What is known here.
        ranks: Who was waited for.
    """

    def __init__(self, text: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.ranks = ranks


class ConnectionsBroken(SkipPipeError):
    """Connections between ranks broke, though all of them live: others may be made.

    Args:
        text: What happened.
        ends: The two ranks, where they are known.
    """

    def __init__(self, text: str, ends: tuple[int, ...] = ()) -> None:
        super().__init__(text)
        self.ends = ends


class StartRefused(SkipPipeError):
    """A process cannot be started now: its host has none left, or no memory. A moment later it may."""


class RemoteTraceback(Exception):
    """Carries the traceback text of another process as the ``__cause__`` of the exception it belongs to."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


class none_swallowed:
    """Raise a refusal also where user code inside has caught it: what it went on with is not one process's."""

    def __enter__(self) -> None:
        self._refusals: list[SkipPipeError] = []
        self._token = _made.set(self._refusals)

    def __exit__(self, _: object, error: BaseException | None, traceback: object) -> None:
        _made.reset(self._token)
        refusals, self._refusals = self._refusals, []
        if refusals and (error is None or (isinstance(error, Exception) and not isinstance(error, SkipPipeError))):
            raise refusals[0] from error


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
    error: BaseException | None = None
    with contextlib.suppress(Exception):  # its class may be importable only over there
        error = pickle.loads(packed) if packed else None
    if not isinstance(error, BaseException):  # a class may also pickle as something else
        error = SkipPipeError((text.strip().splitlines() or ["it failed without a word"])[-1])
    error.__cause__ = RemoteTraceback(text)
    error.add_note(f"This exception was raised on {where}; its traceback there stands above.")
    return error
