"""One process that follows the paths of a pipeline's run, in any model: what runs with a skip ratio are compared with.

Each call of the stack is cut into microbatches, and each of these visits its stages in the order of its path. What is
around the blocks, and how often a step calls them, stays the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import Cache

from skippipe_plugin.partition import cut, estimate_costs, find_blocks
from skippipe_plugin.schedule import Path, Schedule


class Following(Callback):
    """Lets the blocks of a module follow the paths of a schedule in each training step.

    Args:
        schedules: Whose paths, by the number of the batch.
        blocks: The name of the stack; None as the strategy finds it.
    """

    def __init__(self, schedules: Sequence[Schedule], blocks: str | None = None) -> None:
        self._schedules, self._name = schedules, blocks

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, index: int) -> None:
        _follow(find_blocks(module, self._name).blocks, self._schedules[index])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        for block in find_blocks(module, self._name).blocks:
            del block.forward


Noted = Callable[[Tensor, slice], Any]
"""A block with its other arguments, which wait for hidden states and for the samples that these are of."""


def _follow(blocks: Sequence[nn.Module], schedule: Schedule) -> None:
    """Let all blocks but the last only note how they are called, and the last one run them all."""
    stages = cut(estimate_costs(blocks), schedule.num_stages)
    calls: list[Noted] = []
    run_all = functools.partial(_run_all, calls, stages, schedule.paths)
    for block in blocks:
        then = run_all if block is blocks[-1] else _unchanged
        block.forward = functools.partial(_note, calls, block.forward, then)


def _note(calls: list[Noted], forward: Callable[..., Any], then: Callable[[Tensor], Any], *args: Any, **kw: Any) -> Any:
    """Note a call, whose first argument is the hidden states."""
    hidden = args[0]
    calls.append(functools.partial(_on_part, forward, len(hidden), args[1:], kw))
    return then(hidden)


def _trains(noted: Any) -> bool:
    return any(parameter.requires_grad for parameter in noted.args[0].__self__.parameters())


def _unchanged(hidden: Tensor) -> Tensor:
    return hidden


def _on_part(forward: Callable[..., Any], size: int, args: Any, kw: Any, hidden: Tensor, part: slice) -> Any:
    """Run a block on a part of the samples; what has them all in its first dimension is cut alike.

    Caches are left out: what is kept for later calls is in nobody's loss.
    """

    def of_part(value: Any) -> Any:
        if isinstance(value, Cache):
            return None
        return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    args, kw = pytree.tree_map(of_part, (args, kw))
    return forward(hidden, *args, **kw)


def _run_all(calls: list[Noted], stages: Sequence[range], paths: Sequence[Path], hidden: Tensor) -> Tensor:
    """Let each microbatch follow its path; none leaves anything out in a call through which no gradient goes back."""
    noted, calls[:] = list(calls), []
    trains = torch.is_grad_enabled() and (hidden.requires_grad or any(map(_trains, noted)))
    outputs, start = [], 0
    for piece, path in zip(hidden.tensor_split(len(paths)), paths, strict=True):
        part = slice(start, start + len(piece))
        visited = path.stages if trains else range(1, len(stages) + 1)
        for block in (block for stage in visited for block in stages[stage - 1]):
            piece = noted[block](piece, part)
        outputs.append(piece)
        start = part.stop
    return torch.cat(outputs)
