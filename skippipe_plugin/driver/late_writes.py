"""What forwards of blocks have begun to write after the step was tried: by then its batches are cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ..engine.control.values import Writes
from ..engine.errors import SkipPipeError

if TYPE_CHECKING:
    from .capture.proxies import BlockProxies
    from .layout import Layout

_BUFFER: Final = (
    "the forward of {block} has written {name}, {where}, and did not when the step was tried: nobody could ask whether "
    "that comes to the same as in one process, which writes it once for each batch. Go on from the last checkpoint "
    "with {instead}, or let it be written from the first batch on"
)
_ATTRIBUTES: Final = (
    "the blocks' forwards have begun to write attributes (%s), %s, and did not when the step was tried: where forwards "
    "read them, results are not those of one process any more. With %s they are"
)
_SHOWN: Final = 3

log = logging.getLogger(__name__)


def note_writes(proxies: BlockProxies, layout: Layout, writes: Sequence[Writes], count: int) -> None:
    """Note what forwards have written in a step; say so, or raise, where that was not known and not all of it is there.

    Args:
        proxies: Of the blocks.
        layout: Where they are.
        writes: What has been reported.
        count: The number of microbatches.

    Raises:
        SkipPipeError: A buffer that checkpoints have was written for the first time in a batch that is cut, by one
            replica of several, or for each of several drivers.
    """
    attributes = [each for report in writes for each in proxies.note_all_writes(report.attributes)]
    buffers = [each for report in writes for each in report.buffers]
    if not attributes and not buffers:
        return
    drivers, replicated = layout.num_drivers, layout.replicated_blocks
    reasons = [
        (count > 1, f"once for each of {count} microbatches", "num_microbatches=1"),
        (drivers > 1, f"once for each of {drivers} drivers", "drivers=1"),
        (bool(replicated), "on one replica only", "replicas=1"),
    ]
    reasons = [each for each in reasons if each[0]]
    if not reasons:
        return
    where, instead = reasons[0][1], " and ".join(setting for *_, setting in reasons)
    for block, name in buffers:
        if (count > 1 or drivers > 1 or block in replicated) and name not in proxies.book.written(block):
            raise SkipPipeError(_BUFFER.format(block=proxies.names[block], name=name, where=where, instead=instead))
    if attributes:
        more = f" and {len(attributes) - _SHOWN} more" if attributes[_SHOWN:] else ""
        log.warning(_ATTRIBUTES, ", ".join(attributes[:_SHOWN]) + more, where, instead)
