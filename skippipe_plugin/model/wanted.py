"""Steps that use what single blocks return: that they do is found as they run, and they begin again."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final, TypeVar

from ..driver.capture.proxies import BlockProxies
from ..driver.capture.unavailable import OutputWanted

log = logging.getLogger(__name__)

T = TypeVar("T")
_SAID: Final = (
    "code after the blocks uses what single blocks return (%s, for one): that goes from their workers to the driver "
    "with each microbatch, and gradients back"
)


def with_outputs(proxies: BlockProxies, run: Callable[[], T], undo: Callable[[], None] | None = lambda: None) -> T:
    """Return what ``run`` returns, which begins again as long as it asks for more of what blocks return.

    Args:
        proxies: The blocks, which learn what is asked for.
        run: Does something with them.
        undo: Takes back what it has changed until then; None where nothing can.

    Raises:
        OutputWanted: It asks for something that it can not be given.
    """
    while True:
        try:
            return run()
        except OutputWanted as wanted:
            is_first = not proxies.exporting
            if undo is None or not proxies.learn(wanted):
                raise
            if is_first:
                log.info(_SAID, proxies.names[wanted.made.block])
            undo()
