"""Step threads that are threads: for drivers that do not run on the main thread, or without the greenlet package.

Connections of sqlite, ``threading.local`` and the like are then another thread's. A function that waits for what a
suspended one holds leaves the caller free to say so, and to unwind the others.
"""

from __future__ import annotations

import contextvars
import queue
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from ...engine.call import Ambient
from ...engine.device import current, make_current
from ...engine.errors import SkipPipeError, none_swallowed
from ...engine.process_switches import flushes_denormal
from .patience import Patience, blocked, cpu_seconds, is_blocked, stack_of
from .suspend import (
    Outcome,
    Returned,
    StepAbandoned,
    StepThread,
    Suspended,
    adopt_context,
    adopt_denormals,
    enter_context,
)
from .switches import Changes, Snapshot, switch_on

_LOOKS_EVERY_S: Final = 0.5
_UNWINDS_WITHIN_S: Final = 10.0


class ThreadStep(StepThread):
    """One function at a time, in a thread that is kept for the next one; see :class:`StepThread`."""

    def __init__(self, label: int = 0, others_wait: Callable[[], bool] = lambda: False) -> None:
        super().__init__(label, others_wait)
        self._context = contextvars.Context()
        self._changes: Changes = ()
        self._blocked = False
        self._begin()

    def start(self, function: Callable[[], Any], ambient: Ambient) -> Outcome:
        context = self._context = contextvars.copy_context()
        where = current()  # each thread has its own; a new one begins with the first
        flushes = flushes_denormal()
        return self._hand_over(lambda: context.run(self._run, function, ambient, where, flushes))

    def resume(self, answer: Any, *, last: bool = False) -> Outcome:
        changes, self._changes = self._changes, ()
        return self._hand_over(answer, changes)

    def suspend(self, request: Any) -> Any:
        if self._blocked:
            raise StepAbandoned
        self.suspended = True
        self._to_caller.put(Suspended(request))
        answer = self._to_thread.get()
        self.suspended = False
        if isinstance(answer, StepAbandoned):
            raise answer
        return answer

    def abandon(self) -> None:
        super().abandon()
        if self._blocked:
            self._forget()

    def close(self) -> None:
        self.abandon()
        self._to_thread.put(None)
        self._thread.join(timeout=_UNWINDS_WITHIN_S)

    def _begin(self) -> None:
        self._to_thread: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_caller: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        channels = self._to_thread, self._to_caller
        self._thread = threading.Thread(target=_loop, args=channels, name="skippipe step", daemon=True)
        self._thread.start()

    def _forget(self) -> None:
        """Wait for a function that was blocked, now that others are unwound; take another thread if it still is."""
        try:
            self._to_caller.get(timeout=_UNWINDS_WITHIN_S)
        except queue.Empty:
            self._to_thread.put(None)
            self._begin()
        self._blocked = False

    def _hand_over(self, item: Any, changes: Changes = ()) -> Outcome:
        before = Snapshot(of_process=True)
        switch_on(changes)
        self._to_thread.put(item)
        outcome = self._wait()
        is_given_up = isinstance(item, StepAbandoned) or isinstance(outcome, SkipPipeError)
        if is_given_up or isinstance(outcome, Suspended):
            changes = before.take_back()  # of what was given up nothing stays, even where it does not clean up
            self._changes = () if is_given_up else changes
        # What is abandoned runs again, and is to find what it found.
        if not isinstance(outcome, Suspended) and not isinstance(item, StepAbandoned):
            adopt_context(self._context)
            adopt_denormals(self._flushes)
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _wait(self) -> Outcome | BaseException:
        patience, thread = Patience(), self._thread
        while True:
            try:
                return self._to_caller.get(timeout=_LOOKS_EVERY_S)
            except queue.Empty:
                turn = self if self.others_wait() else None
            waited_s = patience.waited_s(turn, time.monotonic(), cpu_seconds(thread))
            if turn is not None and is_blocked(waited_s, thread):
                self._blocked = True
                raise blocked(stack_of(thread), self.label, waited_s)

    def _run(self, function: Callable[[], Any], ambient: Ambient, where: torch.device, flushes: bool) -> Any:
        enter_context(self)
        make_current(where)
        adopt_denormals(flushes)
        try:
            with ambient.entered(), none_swallowed():
                return function()
        finally:
            self._flushes = flushes_denormal()


def _loop(to_thread: queue.SimpleQueue[Any], to_caller: queue.SimpleQueue[Outcome | BaseException]) -> None:
    while True:
        job = to_thread.get()
        if job is None:
            return
        try:
            outcome: Outcome | BaseException = Returned(job())
        except BaseException as error:
            outcome = error
        to_caller.put(outcome)
        del job, outcome  # keep no graph alive until the next step
