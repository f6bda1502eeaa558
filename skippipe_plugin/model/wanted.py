"""Steps that use what single blocks return: that they do is found as they run, and they begin again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

from ..driver.capture.proxies import BlockProxies
from ..driver.capture.unavailable import OutputWanted
from ..engine.errors import SkipPipeError
from .spread import SpreadModel

log = logging.getLogger(__name__)

T = TypeVar("T")
Undo = Callable[[], None]
_SAID: Final = (
    "code after the blocks uses what single blocks return (%s, for one): that goes from their workers to the driver "
    "with each microbatch, and gradients back"
)
_COUNTED: Final = (
    "a step of evaluation that runs once on the whole batch uses what single blocks return, while they train and some "
    "keep something in buffers (BatchNorm), which they have done already when that was found. Let the last block "
    "return what is used, put the blocks into eval mode, or let the batch be cut (several microbatches, "
    "microbatches='auto')"
)


class FirstRuns:
    """Knows which steps may have to begin again: the first of each kind."""

    def __init__(self) -> None:
        self._seen: set[object] = set()

    def undo(self, kind: object, note_state: Callable[[], Undo]) -> Undo | None:
        """Return what takes back what a step of a kind changes; None where one has run before."""
        is_first = kind not in self._seen
        self._seen.add(kind)
        return note_state() if is_first else None


def _nothing() -> None:
    """Nothing to take back: what runs is only tried."""


def _counts(proxies: BlockProxies) -> bool:
    """Whether a block trains, and forwards of some write buffers, as far as was asked."""
    return proxies.book.writes_buffers and any(block.training for block in proxies.blocks)


def with_outputs(
    spread: SpreadModel, run: Callable[[], T], undo: Undo | None = _nothing, *, is_noted: bool = False
) -> T:
    """Return what ``run`` returns, which begins again as long as it asks for more of what blocks return.

    Args:
        spread: The blocks, which learn what is asked for.
        run: Does something with them.
        undo: Takes back what it has changed until then; None where nothing can.
        is_noted: Whether blocks then take back what they have counted.

    Raises:
        OutputWanted: It asks for something that it can not be given.
    """
    while True:
        try:
            return run()
        except OutputWanted as wanted:
            proxies = spread.pipeline.proxies
            is_first = not proxies.exporting
            if undo is None or not proxies.learn(wanted):
                raise
            if undo is not _nothing and not is_noted and _counts(proxies):
                raise SkipPipeError(_COUNTED) from wanted
            if is_first:
                log.info(_SAID, proxies.names[min(wanted.made).block])
            undo()
