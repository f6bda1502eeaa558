"""One process that follows the paths of a pipeline's run, in any model: what runs with a skip ratio are compared with.

Each call of the stack is cut into microbatches, and each of these visits its stages in the order of its path. What is
around the blocks, and how often a step calls them, stays the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
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

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        step: Any = module.training_step

        @functools.wraps(step)
        def following(batch: Any, index: int) -> Any:
            places = self._let_follow(module, self._schedules[index])
            try:
                return step(batch, index)
            finally:
                for container, key, block in places:
                    container._modules[key] = block

        module.training_step = following  # type: ignore[method-assign]

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        del module.training_step

    def _let_follow(self, module: nn.Module, schedule: Schedule) -> list[Place]:
        """Put stand-ins in the place of the blocks."""
        blocks = find_blocks(module, self._name).blocks
        stages, calls = cut(estimate_costs(blocks), schedule.num_stages), list[Noted]()

        def answer(hidden: Tensor) -> Tensor:
            return hidden if len(calls) < len(blocks) else _run_all(calls, stages, schedule.paths, hidden)

        places = list(_places(module, blocks))
        for container, key, block in places:
            container._modules[key] = StandIn(block, calls, answer)
        return places


Noted = Callable[[Tensor, slice], Any]
"""A block with its other arguments, which wait for hidden states and for the samples that these are of."""


Place = tuple[nn.Module, str, nn.Module]


def _places(module: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[Place]:
    """Yield where the blocks are."""
    known = set(map(id, blocks))
    for container in list(module.modules()):
        for key, child in list(container._modules.items()):
            if child is not None and id(child) in known:
                yield container, key, child


class StandIn(nn.Module):
    """Notes how a block is called, and goes on with the hidden states as they are, but for the last one's."""

    def __init__(self, block: nn.Module, calls: list[Noted], answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.block, self._calls, self._answer = block, calls, answer

    def __getattr__(self, name: str) -> Any:
        return self._modules["block"] if name == "block" else getattr(self.block, name)

    def forward(self, hidden: Tensor, *args: Any, **kw: Any) -> Any:
        self._calls.append(functools.partial(_on_part, self.block, len(hidden), args, kw))
        return self._answer(hidden)


def _on_part(block: nn.Module, size: int, args: Any, kw: Any, hidden: Tensor, part: slice) -> Any:
    """Run a block on a part of the samples; what has them all in its first dimension is cut alike.

    Caches are left out: what is kept for later calls is in nobody's loss.
    """

    def of_part(value: Any) -> Any:
        if isinstance(value, Cache):
            return None
        return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == size else value

    args, kw = pytree.tree_map(of_part, (args, kw))
    return block(hidden, *args, **kw)


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


def _trains(noted: Any) -> bool:
    return any(parameter.requires_grad for parameter in noted.args[0].parameters())
