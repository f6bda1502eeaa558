"""Step threads that are greenlets: coroutines in the caller's own thread, with stacks of their own.

What belongs to a thread (connections of sqlite, ``threading.local``, signal handlers, reentrant locks, random states of
devices) is therefore as in one process, and a hand-over takes 0.4 us where threads take 12. A function that waits for
what a suspended one holds blocks the whole thread: :class:`Alarm` interrupts it by a signal that nobody else uses.
"""

from __future__ import annotations

import contextvars
import functools
import operator
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import torch

from ...engine.call import Ambient
from ...engine.errors import SkipPipeError, none_swallowed
from ...engine.process_switches import flushes_denormal
from .patience import Patience, StepBlocked, blocked, cpu_seconds, is_blocked
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
from .switches import Changes, Snapshot, getsignal, profiler_is_on, switch_on

try:
    import greenlet
except ImportError:  # pragma: no cover - the package needs it, an environment made by hand may lack it
    greenlet = None  # type: ignore[assignment,unused-ignore]

AVAILABLE: Final = greenlet is not None and hasattr(signal, "pthread_kill") and hasattr(signal, "SIGURG")
_CALL: Final[Callable[..., Any]] = operator.call
_CUSHION: Final = (_CALL,) * 80
"""C frames at the bottom of every greenlet's stack, more of them than torch notes with each of its errors (64). What a
greenlet was started from is gone when it is resumed, so that who unwinds its stack must not come to its end."""
_LOOKS_EVERY_S: Final = 0.5
_STAYS_S: Final = 60.0


class GreenletStep(StepThread):
    """One function at a time, one after the other in the same greenlet; see :class:`StepThread`."""

    def __init__(self, label: int = 0, others_wait: Callable[[], bool] = lambda: False) -> None:
        super().__init__(label, others_wait)
        self._child: Any = None  # Any: greenlet, which may be missing
        self._outcome: Outcome | BaseException | None = None
        """What the greenlet has come to; nothing of it stays there."""
        self._context = contextvars.Context()
        self._changes: Changes = ()

    def start(self, function: Callable[[], Any], ambient: Ambient) -> Outcome:
        self._context, self.profiled = contextvars.copy_context(), profiler_is_on()
        if self._child is None or self._child.dead:  # each one maps memory for its frames
            self._child = greenlet.greenlet(functools.partial(_CALL, *_CUSHION, _serve))
            self._child.switch()  # what it begins with, it keeps
        self._child.gr_context = self._context
        return self._hand_over((self, function, ambient, flushes_denormal()), Snapshot())

    def resume(self, answer: Any, *, last: bool = False) -> Outcome:
        before = None if last else Snapshot()
        changes, self._changes = self._changes, ()
        switch_on(changes)
        return self._hand_over(answer, before)

    def suspend(self, request: Any) -> Any:
        self.suspended = True
        self._outcome = Suspended(request)
        answer = self._child.parent.switch()
        self.suspended = False
        if isinstance(answer, StepAbandoned):
            raise answer
        return answer

    def close(self) -> None:
        self.abandon()
        child, self._child = self._child, None
        if child is not None and not child.dead and not self.suspended:
            child.parent = greenlet.getcurrent()
            child.throw()  # it waits for the next function: this ends it

    def run(self, function: Callable[[], Any], ambient: Ambient, flushes: bool) -> None:
        """Run a function to its end. Inside only."""
        enter_context(self)
        adopt_denormals(flushes)
        try:
            with ambient.entered(), none_swallowed():
                self._outcome = Returned(function())
        except BaseException as error:
            self._outcome = error
        self._flushes = flushes_denormal()

    def _hand_over(self, item: Any, before: Snapshot | None) -> Outcome:
        child, outer = self._child, ALARM.running
        child.parent = greenlet.getcurrent()
        turn = ALARM.begin(self)
        try:
            child.switch(item)
        finally:
            ALARM.running = outer
        outcome, self._outcome = self._outcome, None
        torch.clear_autocast_cache()  # casts belong to the graph of the function that made them
        is_given_up = isinstance(item, StepAbandoned) or isinstance(outcome, SkipPipeError)
        if before is not None and (is_given_up or isinstance(outcome, Suspended)):
            changes = before.take_back()  # of what was given up nothing stays, even where it does not clean up
            self._changes = () if is_given_up else changes
        if not isinstance(outcome, Suspended):
            child.gr_context = None
            if not isinstance(item, StepAbandoned):  # it runs again, and is to find what it found
                adopt_context(self._context)
                adopt_denormals(self._flushes)
        if turn.error is not None and not isinstance(outcome, StepBlocked):  # user code has swallowed it
            self.abandon()
            raise turn.error
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None, "it suspends, returns or raises"
        return outcome


def _serve() -> None:
    """Run one function after the other, in a greenlet that keeps nothing of them while it waits for the next."""
    while True:
        step, function, ambient, flushes = greenlet.getcurrent().parent.switch()
        step.run(function, ambient, flushes)
        del step, function, ambient


class Turn:
    """One stretch between two hand-overs."""

    __slots__ = ("error", "step")

    def __init__(self, step: GreenletStep) -> None:
        self.step = step
        self.error: StepBlocked | None = None


class Alarm:
    """Interrupts a function that has waited for too long.

    A daemon thread looks twice a second, as long as step threads are used; it ends a minute after the last one. The
    signal is SIGURG, which is ignored unless somebody handles it, and is sent only to interrupt.
    """

    def __init__(self) -> None:
        self.running: Turn | None = None
        self._due: tuple[Turn, float] | None = None
        self._watcher: threading.Thread | None = None
        self._previous: Any = None  # Any: what signal.getsignal returns

    def begin(self, step: GreenletStep) -> Turn:
        """Follow ``step`` from now on."""
        turn = self.running = Turn(step)
        handler = getsignal(signal.SIGURG)
        if handler != self._on_signal:  # the first time, and after Lightning has restored all handlers
            self._previous = handler
            signal.signal(signal.SIGURG, self._on_signal)
        if self._watcher is None:
            self._start()
        return turn

    def _start(self) -> None:
        self._watcher = threading.Thread(target=self._watch, name="skippipe patience", daemon=True)
        self._watcher.start()

    def _watch(self) -> None:
        main, patience, used_s = threading.main_thread(), Patience(), time.monotonic()
        assert main.ident is not None
        while time.monotonic() - used_s < _STAYS_S:
            time.sleep(_LOOKS_EVERY_S)
            turn, now_s = self.running, time.monotonic()
            if turn is None:
                continue
            used_s = now_s
            watched = turn if turn.error is None and turn.step.others_wait() else None
            waited_s = patience.waited_s(watched, now_s, cpu_seconds(main))
            if watched is not None and is_blocked(waited_s, main):
                self._due = watched, waited_s
                signal.pthread_kill(main.ident, signal.SIGURG)
        self._watcher = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        due, self._due = self._due, None
        if due is None:
            if callable(self._previous):
                self._previous(number, frame)
        elif due[0] is self.running:
            due[0].error = blocked(frame, due[0].step.label, due[1])
            raise due[0].error


ALARM: Final = Alarm()
"""The process has one main thread, one handler of a signal, and one of these."""
