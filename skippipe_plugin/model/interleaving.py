"""Whether microbatches that take turns see each other: in attributes, global names, random numbers, process-wide state.

In a pipeline several microbatches are suspended at the blocks at a time. Each is to find what it has left itself, as
the whole batch does in one process. So before the first step they run once by turns, on the same made-up hidden states
as alone, and what comes out is compared.
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from ..driver.capture.suspend import Outcome, StepThreads, Suspended
from ..driver.capture.unavailable import OutputWanted
from ..engine.call import Ambient
from ..engine.device_errors import is_of_device
from ..engine.errors import SkipPipeError
from .reductions import same

Results = dict[tuple[Any, ...], Any]
_TEXT: Final = "what one leaves in an attribute, a global name or a random state, the others find there: {effect}"
DRAWN: Final = _TEXT.format(effect="each draws other random numbers, by numpy or Python, than the batch")
"""Whatever is made of them: what goes into the blocks shows in nothing that made-up hidden states give."""


def by_turns(
    functions: Sequence[Callable[[], Results]],
    replies: Sequence[Callable[[Any], Tensor]],
    modes: Sequence[AbstractContextManager[Any]],
    ambient: Ambient,
) -> list[Results] | Exception:
    """Run microbatches by turns, each up to its call of the blocks before any goes on; return what they give.

    Args:
        functions: The microbatches' steps.
        replies: By microbatch: makes up what the blocks return.
        modes: By microbatch: what it runs under.
        ambient: How the user's code runs.
    """
    threads = StepThreads()
    try:
        outcomes: dict[int, Outcome] = {}
        for index, (function, mode) in enumerate(zip(functions, modes, strict=True)):
            outcomes[index] = threads[index].start(functools.partial(_under, mode, function), ambient)
        while any(isinstance(outcome, Suspended) for outcome in outcomes.values()):
            for index in _order(len(functions)):
                outcome = outcomes[index]
                if isinstance(outcome, Suspended):
                    with outcome.request.ambient.entered():
                        answer = replies[index](outcome.request)
                    outcomes[index] = threads[index].resume(answer)
        return [outcomes[index].value for index in range(len(functions))]  # type: ignore[union-attr]
    except OutputWanted:
        return LookupError("it uses what blocks have returned for another one")
    except SkipPipeError:
        raise
    except Exception as error:
        if is_of_device(error):
            raise
        return error
    finally:
        threads.abandon()
        threads.close()


def effect(alone: Sequence[Results], together: Sequence[Results] | Exception, tolerance: float) -> str:
    """Say how microbatches affect each other; nothing where they do not.

    Args:
        alone: What each gives when it runs alone.
        together: What they give by turns.
        tolerance: How far equal numbers may be apart.
    """
    if isinstance(together, Exception):
        return _TEXT.format(effect=f"by turns they end in {type(together).__name__}: {together}".rstrip(": "))
    for one, other in zip(alone, together, strict=True):
        for key in dict.fromkeys([*one, *other]):
            if key not in one or key not in other or not alike(one[key], other[key], tolerance):
                return _TEXT.format(effect=f"{_named(key)} is another by turns than alone")
    return ""


def _named(key: tuple[Any, ...]) -> str:
    return {"loss": "the loss", "output": "the output"}.get(key[0]) or f"self.log({key[1]!r})"


def _under(mode: AbstractContextManager[Any], function: Callable[[], Results]) -> Results:
    with mode:
        return function()


def _order(count: int) -> list[int]:
    """Return neither the order in which they came nor its opposite: queues and stacks then give what others left."""
    return [0, 1] if count == 2 else [1, 0, *range(2, count)]


def alike(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two results are the same; objects that are neither numbers nor text nor tensors say nothing."""
    ones, ones_form = pytree.tree_flatten(one)
    others, others_form = pytree.tree_flatten(other)
    if ones_form != others_form:
        return False
    pairs = zip(ones, others, strict=True)
    return all(_says_nothing(a) or same(a, b, tolerance, _scale(a)) for a, b in pairs)


def _says_nothing(value: Any) -> bool:
    return not isinstance(value, (Tensor, np.ndarray, numbers.Number, str, bool))


def _scale(value: Any) -> float:
    if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
        return float(value.detach().nan_to_num(0.0, 0.0, 0.0).abs().max())
    return 0.0
