"""Training in one process that loses stages: what rebuilding, restoring and nothing at all do to learning.

The byte-level model of the examples, six stages of one block. A lost stage is rebuilt by the very rules of
`skippipe_plugin.recovery`, its optimizer starts afresh and its learning rate is multiplied, as StageRecovery does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from emulation import ByteDataset, ByteLM, default_text, follow
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader

from skippipe_plugin.recovery import Neighbour, RebuildRule, rebuild_stage

NUM_STAGES = 6
SIZE = {"width": 64, "num_layers": NUM_STAGES, "context": 64}
BATCH = 16
LR = 3e-3
LR_FACTOR = 1.1
WARMUP = 20
MICROBATCHES = 2
SWAPPED = ((1, 2, 3, 4, 5, 6), (2, 1, 3, 4, 6, 5))
"""The paths of CheckFree+: every second microbatch meets the first two and the last two stages in the other order."""
IN_ORDER = (SWAPPED[0],) * MICROBATCHES


class Training:
    """A model in the middle of its training; its own copies go on independently."""

    def __init__(self, seed: int, *, swap_ends: bool = False) -> None:
        torch.manual_seed(seed)
        self.model = ByteLM(**SIZE)
        self.paths = SWAPPED if swap_ends else IN_ORDER
        self.step = 0
        self.norms = [0.0] * NUM_STAGES
        self._factors = [1.0] * NUM_STAGES
        rest = [p for name, p in self.model.named_parameters() if not name.startswith("blocks.")]
        self._optimizers = [*(_adamw(block.parameters()) for block in self.model.blocks), _adamw(rest)]

    def copy(self) -> Training:
        """Return the same training, to be continued in another way."""
        return copy.deepcopy(self)

    def run(self, batches: Iterable[Tensor]) -> Training:
        """Take a step for each batch."""
        for batch in batches:
            self._train(batch)
        return self

    def _train(self, batch: Tensor) -> None:
        loss = functional.cross_entropy(self._logits(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        self.norms = [_norm(block) for block in self.model.blocks]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.step += 1
        for optimizer, factor in zip(self._optimizers, [*self._factors, 1.0], strict=True):
            for group in optimizer.param_groups:
                group["lr"] = LR * factor * min(1.0, self.step / WARMUP)
            optimizer.step()
            optimizer.zero_grad()

    def _logits(self, tokens: Tensor) -> Tensor:
        model = self.model
        hidden = model.embed(tokens) + model.position.weight[: tokens.shape[1]]
        logits: Tensor = model.head(model.norm(follow(model.blocks, hidden, self.paths)))
        return logits

    @torch.no_grad()
    def loss_on(self, text: Tensor) -> float:
        """Return the loss on ``text`` [windows, context + 1], all stages in order."""
        return float(functional.cross_entropy(self.model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()))

    # ------------------------------------------------------------- a loss

    def lose(self, stage: int, how: RebuildRule | Literal["random"] = "norm") -> None:
        """Lose a stage, 0 to 5, and rebuild it by a rule; ``"random"`` initialises it anew."""
        blocks = self.model.blocks
        if how == "random":
            blocks[stage].load_state_dict(ByteLM(**SIZE).blocks[stage].state_dict())
        else:
            (state,) = rebuild_stage(1, self._neighbour(stage - 1), self._neighbour(stage + 1), how)
            blocks[stage].load_state_dict(state)
        self._optimizers[stage] = _adamw(blocks[stage].parameters())
        self._factors[stage] = LR_FACTOR

    def _neighbour(self, stage: int) -> Neighbour | None:
        if not 0 <= stage < NUM_STAGES:
            return None
        return Neighbour([self.model.blocks[stage].state_dict()], self.norms[stage])


def _adamw(parameters: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.95))


def _norm(block: torch.nn.Module) -> float:
    return sum(float(p.grad.square().sum()) for p in block.parameters() if p.grad is not None) ** 0.5


def batches_of(seed: int) -> Iterator[Tensor]:
    """Yield the training batches of a seed, epoch after epoch."""
    data = ByteDataset(default_text()[: len(default_text()) * 9 // 10], SIZE["context"])
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from DataLoader(data, BATCH, shuffle=True, drop_last=True, generator=generator)


def held_out() -> Tensor:
    """Return windows of the last tenth of the text, some 200 that are spread evenly."""
    text = default_text()
    data = ByteDataset(text[len(text) * 9 // 10 :], SIZE["context"])
    return torch.stack([data[index] for index in range(0, len(data), len(data) // 200)])
