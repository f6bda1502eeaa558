"""Ctrl-C while the weights come back: the model is whole first, and then the run is interrupted."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

log = logging.getLogger(__name__)

_WAIT: Final = (
    "the weights are coming back from the workers; Ctrl-C once more gives them up, and leaves NaN in their place"
)


@contextmanager
def interrupts_follow() -> Iterator[None]:
    """Let a first Ctrl-C wait until the block has ended; a second one interrupts it as it always does."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    waiting: list[FrameType | None] = []

    def wait(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, usual)
        waiting.append(frame)
        log.warning(_WAIT)

    signal.signal(signal.SIGINT, wait)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGINT) is wait:
            signal.signal(signal.SIGINT, usual)
    if waiting:
        usual(signal.SIGINT, waiting[0])
