"""One process that follows the paths of a pipeline's run, in any model: what runs with a skip ratio are compared with.

Each call of the stack is cut into microbatches, and each of these visits its stages in the order of its path. What is
around the blocks, and how often a step calls them, stays the model's own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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
        blocks: The stack, as the strategy takes it.
        trees: Whether blocks return more than a tensor, and get all of that from the one before.
    """

    def __init__(
        self, schedules: Sequence[Schedule], blocks: str | Sequence[str] | None = None, *, trees: bool = False
    ) -> None:
        self._schedules, self._name, self._trees = schedules, blocks, trees

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
        call = StackCall(blocks, cut(estimate_costs(blocks), schedule.num_stages), schedule.paths, self._trees)
        places = list(_places(module, blocks))
        for container, key, block in places:
            container._modules[key] = StandIn(block, call)
        return places


Place = tuple[nn.Module, str, nn.Module]


def _places(module: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[Place]:
    """Yield where the blocks are."""
    known = set(map(id, blocks))
    for container in list(module.modules()):
        for key, child in list(container._modules.items()):
            if child is not None and id(child) in known:
                yield container, key, child


class StandIn(nn.Module):
    """Stands where a block is, and answers as the call of the whole stack does."""

    def __init__(self, block: nn.Module, call: StackCall) -> None:
        super().__init__()
        self.block, self._call = block, call

    def __getattr__(self, name: str) -> Any:
        return self._modules["block"] if name == "block" else getattr(self.block, name)

    def forward(self, *args: Any, **kw: Any) -> Any:
        return self._call.answer(self.block, args, kw)


@dataclass(frozen=True)
class Before:
    """Stands for what the block before has returned: the how-many-eth tensor of it."""

    index: int


@dataclass
class StackCall:
    """Notes how the blocks are called, goes on with what they may get, and lets the last call run them all."""

    blocks: Sequence[nn.Module]
    stages: Sequence[range]
    paths: Sequence[Path]
    trees: bool
    noted: list[tuple[nn.Module, Any]] = field(default_factory=list)
    """Each block with its arguments, of which some stand for what the one before returns."""
    entered: list[Tensor] = field(default_factory=list)
    returned: list[Any] = field(default_factory=list)
    """What the code around the blocks has from the last one."""

    def answer(self, block: nn.Module, args: Any, kw: Any) -> Any:
        """Note a call of a block, and return what the code around it goes on with."""
        if not self.noted:
            self.entered = self.returned = [args[0]]
        places = {id(each): Before(index) for index, each in enumerate(self.returned) if isinstance(each, Tensor)}
        self.noted.append((block, pytree.tree_map(lambda each: places.get(id(each), each), (args, kw))))
        if len(self.noted) < len(self.blocks):
            made = block(*args, **kw) if self.trees else args[0]
            self.returned = pytree.tree_leaves(made)
            return made
        try:
            return self._run()
        finally:
            self.noted = []

    def _run(self) -> Any:
        """Let each microbatch follow its path, which leaves nothing out where no gradient goes back."""
        hidden = self.entered[0]
        weights = (parameter for block in self.blocks for parameter in block.parameters())
        trains = torch.is_grad_enabled() and any(each.requires_grad for each in (hidden, *weights))
        outputs, start = [], 0
        for piece, path in zip(hidden.tensor_split(len(self.paths)), self.paths, strict=True):
            visited = path.stages if trains else range(1, len(self.stages) + 1)
            part = slice(start, start + len(piece))
            outputs.append(self._follow([block for stage in visited for block in self.stages[stage - 1]], piece, part))
            start = part.stop
        leaves, form = zip(*map(pytree.tree_flatten, outputs), strict=True)
        return pytree.tree_unflatten([_joined(each, len(hidden)) for each in zip(*leaves, strict=True)], form[0])

    def _follow(self, visited: Sequence[int], piece: Tensor, part: slice) -> Any:
        made: Any = piece
        for index in visited:
            block, given = self.noted[index]
            state = pytree.tree_leaves(made)
            args, kw = pytree.tree_map(functools.partial(_of_part, len(self.entered[0]), part, state), given)
            made = block(*args, **kw)
        return made


def _of_part(size: int, part: slice, state: Sequence[Any], value: Any) -> Any:
    """Return what a microbatch has of an argument: what has all samples in its first dimension is cut.

    Caches are left out: what is kept for later calls is in nobody's loss.
    """
    if isinstance(value, Before):
        return state[value.index]
    if isinstance(value, Cache):
        return None
    return value[part] if isinstance(value, Tensor) and value.ndim and len(value) == size else value


def _joined(parts: Sequence[Any], size: int) -> Any:
    """Return what microbatches have made, together."""
    if isinstance(parts[0], Tensor) and sum(map(len, parts)) == size:
        return torch.cat(list(parts))
    return parts[0]
