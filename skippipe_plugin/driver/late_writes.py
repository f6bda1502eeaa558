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
        SkipPipeError: A buffer that checkpoints have was written for the first time in a batch that is cut, or by one
            replica of several.
    """
    attributes = [each for report in writes for each in proxies.note_all_writes(report.attributes)]
    replicated = {block for stage, _ in layout.replica_groups for block in layout.blocks(stage)}
    if count == 1 and not replicated:
        return
    where = f"once for each of {count} microbatches" if count > 1 else "on one replica only"
    settings = {"num_microbatches=1": count > 1, "replicas=1": bool(replicated)}
    instead = " and ".join(name for name, helps in settings.items() if helps)
    for block, name in (each for report in writes for each in report.buffers):
        if (count > 1 or block in replicated) and name not in proxies.book.written(block):
            raise SkipPipeError(_BUFFER.format(block=proxies.names[block], name=name, where=where, instead=instead))
    if attributes:
        more = f" and {len(attributes) - _SHOWN} more" if attributes[_SHOWN:] else ""
        log.warning(_ATTRIBUTES, ", ".join(attributes[:_SHOWN]) + more, where, instead)
