"""Whether the blocks make of microbatches what they make of the batch, asked when a step is tried."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ..driver.capture.cutting import CallForm, NotCuttable, find_cut
from ..driver.comparing import bending_block, difference_of_arguments, difference_of_parts
from .entering import Entrance
from .fakes import Fakes
from .spread import SpreadModel

_LACKS: Final = (
    "the blocks' argument {argument} is None there where the batch's is a tensor, as masks are when nothing is padded, "
    "and a block ({name}) computes something else with that"
)


def difference_of_lacking(spread: SpreadModel, entrance: Entrance) -> str:
    """Say what the blocks make otherwise where a microbatch has None in place of a tensor of the batch's."""
    proxies = spread.pipeline.proxies
    for call, argument, filled in entrance.lacking(proxies.blocks):
        block = difference_of_arguments(spread.pipeline, call, filled)
        if block is not None:
            return _LACKS.format(argument=argument, name=proxies.names[block])
    return ""


def difference_of_blocks(spread: SpreadModel, fakes: Fakes, sizes: Sequence[int]) -> str | None:
    """Say what the blocks make otherwise of the microbatches that were tried than of the batch; None if that is open.

    Args:
        spread: The blocks.
        fakes: What the batch and its microbatches have called them with.
        sizes: The microbatches' samples.
    """
    whole = fakes.whole_call
    if whole is None or not fakes.calls or whole.caches or whole.hooks or spread.attached is not None:
        return ""  # experts count by themselves
    for index, piece in fakes.calls.items():  # one may lack a mask that the others have
        try:
            cut = find_cut(CallForm.of(whole), CallForm.of(piece), sum(sizes), sizes[index])
        except NotCuttable:
            continue
        return difference_of_parts(spread.pipeline, whole, cut, sum(sizes), in_doubt=False, known_aside=True)
    return None


def bend_of_blocks(spread: SpreadModel, fakes: Fakes) -> str:
    """Name a block whose backward is not linear; nothing if unknown."""
    call = fakes.calls.get(0)
    if call is None or call.caches or call.hooks or spread.attached is not None:
        return ""
    return spread.pipeline.surviving(lambda: bending_block(spread.pipeline, call))
