"""Suspend a user's step function where it calls the blocks, and resume it with their result.

Each microbatch's function runs in a thread of its own, so that grad mode, autocast and device contexts stay apart,
but only one runs at a time: control is handed over and back like between coroutines. The threads are kept for the
next step and joined by :meth:`StepThreads.close`.
"""

from __future__ import annotations

import contextvars
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...engine.call import Ambient


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


def current_thread() -> StepThread | None:
    """Return the step thread this code runs in, or None outside of a step."""
    return _running.get()


class StepThread:
    """One suspended function at a time, in a thread that outlives it."""

    def __init__(self) -> None:
        self._to_thread: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._to_caller: queue.SimpleQueue[Outcome | BaseException] = queue.SimpleQueue()
        self.suspended = False
        self.label = 0
        """Which microbatch it works for; set by whoever starts it."""
        self._thread = threading.Thread(target=self._loop, name="skippipe step", daemon=True)
        self._thread.start()

    def start(self, function: Callable[[], Any], ambient: Ambient) -> Outcome:
        """Run ``function`` until it suspends or returns; its exceptions are raised here with their own traceback."""
        context = contextvars.copy_context()
        return self._hand_over(lambda: context.run(self._run, function, ambient))

    def resume(self, answer: Any) -> Outcome:
        """Answer the request under which the function waits, and run it on."""
        return self._hand_over(answer)

    def abandon(self) -> None:
        """Unwind a suspended function."""
        for _ in range(100):  # a function that swallows BaseException and calls on gets it again
            if not self.suspended:
                return
            try:
                self._hand_over(StepAbandoned())
            except BaseException:
                return

    def suspend(self, request: Any) -> Any:
        """Hand ``request`` to the caller of :meth:`start` or :meth:`resume`; return its answer. In-thread only."""
        self.suspended = True
        self._to_caller.put(Suspended(request))
        answer = self._to_thread.get()
        self.suspended = False
        if isinstance(answer, StepAbandoned):
            raise answer
        return answer

    def close(self) -> None:
        """End and join the thread."""
        self.abandon()
        self._to_thread.put(None)
        self._thread.join(timeout=10)

    def _hand_over(self, item: Any) -> Outcome:
        self._to_thread.put(item)
        outcome = self._to_caller.get()
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def _run(self, function: Callable[[], Any], ambient: Ambient) -> Any:
        _running.set(self)
        with ambient.entered():
            return function()

    def _loop(self) -> None:
        while True:
            job = self._to_thread.get()
            if job is None:
                return
            try:
                outcome: Outcome | BaseException = Returned(job())
            except BaseException as error:
                outcome = error
            self._to_caller.put(outcome)
            del job, outcome  # keep no graph alive until the next step


class StepThreads:
    """The step threads of a driver, by microbatch; they are made when first needed."""

    def __init__(self) -> None:
        self._threads: list[StepThread] = []

    def __getitem__(self, index: int) -> StepThread:
        while len(self._threads) <= index:
            self._threads.append(StepThread())
        return self._threads[index]

    def abandon(self) -> None:
        """Unwind whatever is suspended."""
        for thread in self._threads:
            thread.abandon()

    def close(self) -> None:
        """End and join all threads."""
        for thread in self._threads:
            thread.close()
        self._threads.clear()
