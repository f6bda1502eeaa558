"""Modules whose steps need the whole batch, for the tests; workers import the blocks."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..modules import Task

WIDTH = 8


class Block(nn.Module):
    """Rows and columns of its input are independent."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(self.norm(h)))


class Attention(nn.Module):
    """Attends within each sample, with whatever mask and positions it is given."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, 2, batch_first=batch_first)

    def forward(self, h: Tensor, positions: Any = None, **masks: Any) -> Tensor:
        if isinstance(positions, tuple):  # rotary tables
            cos, sin = positions
            h = h * cos + h.roll(1, -1) * sin
        elif positions is not None:
            h = h + positions[..., None] / 10
        return h + self.inner(h, h, h, need_weights=False, **masks)[0]


class Whole(Task):
    """Features in, one number out."""

    block: Any = Block

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, WIDTH))
        self.blocks = nn.ModuleList([self.block() for _ in range(4)])
        self.head = nn.Linear(WIDTH, 4)

    def run(self, h: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self.blocks:
            h = block(h, *args, **kwargs)
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.run(self.model(x)))


class Contrastive(Whole):
    """SimCLR: both views of all samples in one batch, each against all others."""

    def training_step(self, batch: Any) -> Tensor:
        x = batch["x"]
        z = functional.normalize(self(torch.cat([x, x + 0.1 * torch.randn_like(x)])), dim=-1)
        scores = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool), float("-inf"))
        self.log("highest", scores.max())
        return functional.cross_entropy(scores, torch.arange(len(z)).roll(len(x)))


class Clip(Whole):
    """Two towers, of which one has the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.temperature = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: Any) -> Tensor:
        scores = self(batch["x"]) @ self.other(batch["x"].flip(1)).T * self.temperature.exp()
        target = torch.arange(len(scores))
        return (functional.cross_entropy(scores, target) + functional.cross_entropy(scores.T, target)) / 2


class Normed(Whole):
    """BatchNorm before and after the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(self.model, nn.BatchNorm1d(WIDTH))
        self.head = nn.Sequential(nn.BatchNorm1d(WIDTH), self.head)

    def training_step(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self(batch["x"]), batch["y"])


class Tokens(Whole):
    """One label for each token; some are ignored."""

    def training_step(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


class Ctc(Whole):
    """Connectionist temporal classification, whose mean is over target lengths."""

    reduction = "mean"

    def training_step(self, batch: Any) -> Tensor:
        log_probs = self(batch["tokens"]).log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(
            log_probs, batch["targets"], batch["frames"], batch["lengths"], reduction=self.reduction, zero_infinity=True
        )


class CtcSum(Ctc):
    reduction = "sum"


class PerSample(Whole):
    """The mean over samples of means over their own tokens."""

    def training_step(self, batch: Any) -> Tensor:
        kept = (batch["labels"] >= 0).float()
        losses = functional.cross_entropy(self(batch["tokens"]).transpose(1, 2), batch["labels"], reduction="none")
        return ((losses * kept).sum(1) / kept.sum(1).clamp(min=1)).mean()


class Dropped(Whole):
    """Random numbers before and after the blocks, which draw none."""

    def training_step(self, batch: Any) -> Tensor:
        h = self.run(functional.dropout(self.model(batch["x"]), 0.3))
        return functional.cross_entropy(self.head(functional.dropout(h, 0.3)), batch["y"])


class Diffusion(Whole):
    """Noise and times are drawn in the step."""

    def training_step(self, batch: Any) -> Tensor:
        noise, time = torch.randn_like(batch["x"]), torch.rand(len(batch["x"]), 1)
        return functional.mse_loss(self(batch["x"] * (1 - time) + noise * time), noise)


class Quantile(Whole):
    """A loss of the batch's order statistics."""

    def training_step(self, batch: Any) -> Tensor:
        out = self(batch["x"])
        classes, counts = torch.unique(batch["y"], return_counts=True)
        weight = torch.ones(4).index_put((classes,), 1 / counts)
        losses = functional.cross_entropy(out, batch["y"], weight=weight, reduction="none")
        return losses[losses >= losses.quantile(0.5)].mean() * len(classes)


class Mixup(Whole):
    """Every sample is mixed with another one of the batch."""

    def training_step(self, batch: Any) -> Tensor:
        order, share = torch.randperm(len(batch["x"])), float(torch.rand(()))
        out = self(share * batch["x"] + (1 - share) * batch["x"][order])
        losses = [functional.cross_entropy(out, y) for y in (batch["y"], batch["y"][order])]
        return share * losses[0] + (1 - share) * losses[1]


class InPlace(Whole):
    """Changes what comes back from the blocks, and returns more than a loss."""

    def training_step(self, batch: Any) -> dict[str, Any]:
        h = self.model(batch["x"])
        out = self.run(h)
        out += h
        out.mul_(2)
        return {"loss": functional.cross_entropy(self.head(out), batch["y"]), "features": out.detach(), "count": 7}


class Attending(Whole):
    """Blocks that see all tokens of a sample."""

    block = Attention

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (), {}

    def training_step(self, batch: Any) -> Tensor:
        args, kwargs = self.arguments(batch)
        out = self.head(self.run(self.model(batch["tokens"]), *args, **kwargs))
        return functional.cross_entropy(out.mean(1), batch["y"])


class Longest(Attending):
    """The mask is as long as the longest sample of the batch."""

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        longest = int(batch["lengths"].max())
        batch["tokens"] = batch["tokens"][:, :longest]
        return (), {"key_padding_mask": torch.arange(longest)[None] >= batch["lengths"][:, None]}


class Causal(Attending):
    """One mask [T, T] for all samples."""

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        length = batch["tokens"].shape[1]
        return (), {"attn_mask": torch.ones(length, length, dtype=torch.bool).triu(1)}


class Rotary(Attending):
    """Tables of sines and cosines, the same for all samples."""

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        angle = torch.arange(batch["tokens"].shape[1])[:, None] * torch.ones(WIDTH) / 5
        return ((angle.cos(), angle.sin()),), {}


class Positions(Attending):
    """Positions of its own for each sample."""

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["lengths"][:, None] - torch.arange(batch["tokens"].shape[1])[None],), {}


class SequenceFirst(Whole):
    """Hidden states [T, B, D], as torch's own layers like them, and a padding mask [B, T]."""

    def block(self) -> nn.Module:  # type: ignore[override]
        return Attention(batch_first=False)

    def training_step(self, batch: Any) -> Tensor:
        padding = torch.arange(batch["tokens"].shape[1])[None] >= batch["lengths"][:, None]
        out = self.head(self.run(self.model(batch["tokens"].transpose(0, 1)), key_padding_mask=padding))
        return functional.cross_entropy(out.mean(0), batch["y"])
