"""Whether the blocks make of microbatches what they make of the batch, asked when a step is tried."""

from __future__ import annotations

from collections.abc import Sequence

from ..driver.capture.cutting import CallForm, NotCuttable, find_cut
from ..driver.comparing import bending_block, difference_of_parts
from .fakes import Fakes
from .spread import SpreadModel


def difference_of_blocks(spread: SpreadModel, fakes: Fakes, sizes: Sequence[int]) -> str:
    """Say what the blocks make otherwise of the microbatches that were tried than of the batch; nothing if unknown.

    Args:
        spread: The blocks.
        fakes: What the batch and its microbatches have called them with.
        sizes: The microbatches' samples.
    """
    whole, piece = fakes.whole_call, fakes.calls.get(0)
    if whole is None or piece is None or whole.caches or whole.hooks or spread.attached is not None:
        return ""  # experts count by themselves
    try:
        cut = find_cut(CallForm.of(whole), CallForm.of(piece), sum(sizes), sizes[0])
    except NotCuttable:
        return ""
    return difference_of_parts(spread.pipeline, whole, cut, sum(sizes), in_doubt=False, known_aside=True)


def bend_of_blocks(spread: SpreadModel, fakes: Fakes) -> str:
    """Name a block whose backward is not linear; nothing if unknown."""
    call = fakes.calls.get(0)
    if call is None or call.caches or call.hooks or spread.attached is not None:
        return ""
    return spread.pipeline.surviving(lambda: bending_block(spread.pipeline, call))
