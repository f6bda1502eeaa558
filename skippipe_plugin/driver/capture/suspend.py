"""Suspend a user's step function where it calls the blocks, and resume it with their result.

Each microbatch's function runs in a coroutine of its own, a :class:`StepThread`, and only one runs at a time: control
is handed over and back. On the main thread they are greenlets (:mod:`.greenlets`), so that whatever belongs to a thread
is as in one process; elsewhere, and without the greenlet package, threads (:mod:`.os_threads`). What a function
switches on for itself is its own (:mod:`.switches`), and one that waits for another is found (:mod:`.patience`).
"""

from __future__ import annotations

import contextvars
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.utils.hooks import RemovableHandle

from ...engine.call import Ambient
from ...engine.process_switches import flushes_denormal


class StepAbandoned(BaseException):
    """Unwinds a suspended function whose step is given up; user code must not catch it."""


@dataclass(frozen=True, slots=True)
class Suspended:
    """The function waits for an answer to ``request``."""

    request: Any  # Any: what the caller of suspend() passed


@dataclass(frozen=True, slots=True)
class Returned:
    """The function is over."""

    value: Any  # Any: what the user's function returned


Outcome = Suspended | Returned

_running: contextvars.ContextVar[StepThread | None] = contextvars.ContextVar("skippipe_step_thread", default=None)


current_thread: Final[Callable[[], StepThread | None]] = _running.get
"""Returns the step thread this code runs in, or None outside of a step."""


def suspend_here(request: Any) -> Any:  # Any: see StepThread.suspend
    """Hand ``request`` over from the step thread that this code runs in; return its answer."""
    thread = current_thread()
    assert thread is not None
    return thread.suspend(request)


class StepThread(ABC):
    """One suspended function at a time, in a coroutine that outlives it.

    Args:
        label: Which microbatch it works for.
        others_wait: Whether functions of other microbatches are suspended, which this one could wait for in vain.
    """

    def __init__(self, label: int = 0, others_wait: Callable[[], bool] = lambda: False) -> None:
        self.suspended = False
        self.profiled = False
        """Whether torch's profiler was on when the function was started."""
        self.label = label
        self.others_wait = others_wait
        self._num_handles = 0
        self._flushes = False
        """Whether the last function, when it was over, took numbers that are no normal ones for zeros."""

    def count_hooks(self) -> None:
        """Note how many hooks torch has registered so far, of whatever kind."""
        self._num_handles = RemovableHandle.next_id

    @property
    def has_hooked(self) -> bool:
        """Whether any was registered since, maybe on a gradient."""
        return RemovableHandle.next_id != self._num_handles

    @abstractmethod
    def start(self, function: Callable[[], Any], ambient: Ambient) -> Outcome:
        """Run ``function`` until it suspends or returns; its exceptions are raised here with their own traceback."""

    @abstractmethod
    def resume(self, answer: Any, *, last: bool = False) -> Outcome:
        """Answer the request under which the function waits, and run it on.

        Args:
            answer: To the request.
            last: That the function suspends once more is an error: what it has switched on need not be found then.
        """

    @abstractmethod
    def suspend(self, request: Any) -> Any:
        """Hand ``request`` to the caller of :meth:`start` or :meth:`resume`; return its answer. Inside only."""

    @abstractmethod
    def close(self) -> None:
        """Unwind what is suspended and free what it ran in."""

    def abandon(self) -> None:
        """Unwind a suspended function."""
        for _ in range(100):  # a function that swallows BaseException and calls on gets it again
            if not self.suspended:
                return
            try:
                self.resume(StepAbandoned())
            except BaseException:
                return


def enter_context(thread: StepThread) -> None:
    """Let :func:`current_thread` return ``thread`` in this context."""
    _running.set(thread)
    thread.count_hooks()


def adopt_denormals(flushes: bool) -> None:
    """Take numbers that are no normal ones for zeros, or not, as is done elsewhere: each thread has its own way."""
    if flushes_denormal() != flushes:
        torch.set_flush_denormal(flushes)


def adopt_context(context: contextvars.Context) -> None:
    """Keep what a function has set in its context and left so, as if it had run in this one."""
    for variable, value in context.items():
        if variable is not _running and variable.get(None) is not value:
            variable.set(value)


def new_step_thread(label: int = 0, others_wait: Callable[[], bool] = lambda: False) -> StepThread:
    """Return what suits the calling thread; only that thread may use it."""
    from . import greenlets, os_threads  # both build on this module

    if greenlets.AVAILABLE and threading.current_thread() is threading.main_thread():
        return greenlets.GreenletStep(label, others_wait)
    return os_threads.ThreadStep(label, others_wait)


class StepThreads:
    """The step threads of a driver, by microbatch; they are made when first needed."""

    def __init__(self) -> None:
        self._threads: list[StepThread] = []

    def __getitem__(self, index: int) -> StepThread:
        while len(self._threads) <= index:
            self._threads.append(new_step_thread(len(self._threads), self._anybody_waits))
        return self._threads[index]

    def part_with(self, index: int) -> StepThread:
        """Return one of them, which is the caller's from now on."""
        thread, self._threads[index] = self[index], new_step_thread(index, self._anybody_waits)
        return thread

    def abandon(self) -> None:
        """Unwind whatever is suspended, and then what was waiting for it."""
        for thread in [*filter(lambda thread: thread.suspended, self._threads), *self._threads]:
            thread.abandon()

    def close(self) -> None:
        """End all of them."""
        for thread in self._threads:
            thread.close()
        self._threads.clear()

    def _anybody_waits(self) -> bool:
        return any(thread.suspended for thread in list(self._threads))
