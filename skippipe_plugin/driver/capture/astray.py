"""What is said of a step that leaves a block out, or calls one where another is due."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ...engine.errors import SkipPipeError
from .stack_call import StackCall


def out_of_order(due: int, block: int, names: Sequence[str], entrances: Collection[int]) -> SkipPipeError:
    """Return what is said where ``block`` is called and not the one that is due."""
    instead = "Name another stack with blocks=..., or train without the pipeline"
    if block > due:
        instead = f"Leave out no block by chance (layerdrop=0.0). {instead}"
    if entrances:
        instead = "List the stacks of blocks=[...] in that order, and only those that every forward calls once"
    return SkipPipeError(
        f"{names[block]} was called where {names[due]} was expected: the blocks of a pipeline are called once each, in "
        f"order. {instead}"
    )


def left_early(call: StackCall, names: Sequence[str], entrances: Collection[int]) -> SkipPipeError:
    """Return what is said of a call that was left before its last block."""
    instead = "layer drop and early exits must be switched off"
    if call.due in entrances:
        instead = "name the stacks only that every forward calls with blocks=..."
    return SkipPipeError(f"{_only_first(call, names)}: {instead}")


def failed_early(call: StackCall, names: Sequence[str], error: Exception) -> SkipPipeError:
    """Return what is said of an error of user code in a call with hooks that was not at its last block."""
    watched = ", ".join(names[block] for block in sorted(call.hooks))
    return SkipPipeError(
        f"the step ended with {error!r} when {_only_first(call, names)}. Hooks on {watched} run on the driver once the "
        "last block has been called: if the error comes of what they have not kept by then, call all blocks (no layer "
        "drop, no early exit)"
    )


def _only_first(call: StackCall, names: Sequence[str]) -> str:
    return f"only the first {call.due} of {len(names)} blocks were called ({names[call.due]} was not)"
