"""Steps that are given up while they wait for gradients: a loop has called its model again before its backward.

The driver's part is done, and its graph is there. So the blocks alone run once more, when the gradients have come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..driver.block_states import NotedCall
from ..driver.capture.graphs import Ends
from ..driver.capture.suspend import suspend_here
from ..driver.steps import StepTask
from ..driver.unfinished import GivenUp, Parked
from ..driver.whole_step import WholeTask
from .entrance import Entrance
from .open_calls import entered, unchanged
from .spread import SpreadModel
from .suspended import Train


def train_again(
    spread: SpreadModel, num_steps: int, batch: object, noted: NotedCall | None, repeats: bool, parked: Parked
) -> Train:
    """Return what runs the blocks of a step once more.

    Args:
        spread: The blocks.
        num_steps: The optimizer steps so far.
        batch: Stands for the step's.
        noted: The step, as blocks have noted it, if they keep something.
        repeats: Whether interrupted steps are repeated.
        parked: The step.
    """
    checks = [unchanged([each.call.hidden, *each.call.side_inputs], each.versions) for each in parked.calls]

    def run(outside: Callable[..., None]) -> None:
        for check in checks:
            check()
        outside(
            parked.values, Ends(parked.sources, is_hooked=any(each.call.entered.is_hooked for each in parked.calls))
        )
        entrance = Entrance(of_model=False)
        task = _task(parked, entrance, repeats=repeats)
        spread.train(task, num_steps, batch, states=None if noted is None else noted.next())
        entrance.go_back(keep_graph=False)

    return run


def _task(parked: Parked, entrance: Entrance, *, repeats: bool) -> StepTask | WholeTask:
    functions = [_function(each, entrance) for each in parked.calls]
    leaves = [each.leaf for each in parked.calls]
    outside = functools.partial(_back_propagate, leaves)
    undo = entrance.undone_with(lambda: None)
    if parked.sizes:
        shares = [size / sum(parked.sizes) for size in parked.sizes]
        return StepTask(
            functions,
            shares,
            lambda _: None,
            parked.seed,
            training=True,
            sizes=parked.sizes,
            rewind=undo,
            outside=outside,
        )
    return WholeTask(
        function=functions[0],
        loss_of=lambda _: None,
        seed=parked.seed,
        training=True,
        name="call",
        cut=parked.cut,
        note_state=lambda: undo,
        repeats=repeats,
        outside=outside,
    )


def _function(given_up: GivenUp, entrance: Entrance) -> Callable[[], Tensor]:
    call = entered(given_up.call, entrance)
    return lambda: suspend_here(call)


def _back_propagate(leaves: list[Tensor], results: Any, *_: Any) -> None:  # Any: as WholeTask.outside has it
    """Go back from what the blocks have returned, with the gradients of what they had returned before."""
    pairs = [(result, leaf.grad) for result, leaf in zip(results, leaves, strict=True) if leaf.grad is not None]
    if pairs:
        torch.autograd.backward([result for result, _ in pairs], [gradient for _, gradient in pairs])
