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
        scores = (z @ z.T / 0.5).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), float("-inf"))
        self.log("highest", scores.max())
        return functional.cross_entropy(scores, torch.arange(len(z), device=z.device).roll(len(x)))


class Clip(Whole):
    """Two towers, of which one has the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.temperature = nn.Linear(4, 4), nn.Parameter(torch.tensor(1.0))

    def training_step(self, batch: Any) -> Tensor:
        scores = self(batch["x"]) @ self.other(batch["x"].flip(1)).T * self.temperature.exp()
        target = torch.arange(len(scores), device=scores.device)
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
        noise, time = torch.randn_like(batch["x"]), torch.rand(len(batch["x"]), 1, device=self.device)
        return functional.mse_loss(self(batch["x"] * (1 - time) + noise * time), noise)


class Quantile(Whole):
    """A loss of the batch's order statistics."""

    def training_step(self, batch: Any) -> Tensor:
        out = self(batch["x"])
        classes, counts = torch.unique(batch["y"], return_counts=True)
        weight = torch.ones(4, device=out.device).index_put((classes,), 1 / counts)
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
        return (), {"key_padding_mask": torch.arange(longest, device=self.device)[None] >= batch["lengths"][:, None]}


class Causal(Attending):
    """One mask [T, T] for all samples."""

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        length = batch["tokens"].shape[1]
        return (), {"attn_mask": torch.ones(length, length, dtype=torch.bool, device=self.device).triu(1)}


class Rotary(Attending):
    """Tables of sines and cosines, the same for all samples."""

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        length = batch["tokens"].shape[1]
        angle = torch.arange(length, device=self.device)[:, None] * torch.ones(WIDTH, device=self.device) / 5
        return ((angle.cos(), angle.sin()),), {}


class Positions(Attending):
    """Positions of its own for each sample."""

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batch["lengths"][:, None] - torch.arange(batch["tokens"].shape[1], device=self.device)[None],), {}


class SequenceFirst(Whole):
    """Hidden states [T, B, D], as torch's own layers like them, and a padding mask [B, T]."""

    def block(self) -> nn.Module:  # type: ignore[override]
        return Attention(batch_first=False)

    def training_step(self, batch: Any) -> Tensor:
        padding = torch.arange(batch["tokens"].shape[1], device=self.device)[None] >= batch["lengths"][:, None]
        out = self.head(self.run(self.model(batch["tokens"].transpose(0, 1)), key_padding_mask=padding))
        return functional.cross_entropy(out.mean(0), batch["y"])


class Weighted(Whole):
    """The batch holds one weight for each class beside its samples."""

    def training_step(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self(batch["x"]), batch["y"], weight=batch["weights"])


class Packed(Attending):
    """All tokens of all samples are one sequence."""

    def training_step(self, batch: Any) -> Tensor:
        kept = torch.arange(batch["tokens"].shape[1], device=self.device)[None] < batch["lengths"][:, None]
        packed = self.model(batch["tokens"][kept])[None]
        return functional.cross_entropy(self.head(self.run(packed))[0], batch["labels"][kept])


class Flattened(Whole):
    """Rows [B * T] of which each is for itself, though each sample has several."""

    def training_step(self, batch: Any) -> Tensor:
        out = self.head(self.run(self.model(batch["tokens"]).flatten(0, 1)))
        return functional.cross_entropy(out, batch["labels"].flatten())


class Counted(Whole):
    """The blocks are told the number of samples."""

    class block(Block):
        def forward(self, h: Tensor, count: int) -> Tensor:  # type: ignore[override]
            return super().forward(h) / count

    def training_step(self, batch: Any) -> Tensor:
        return functional.cross_entropy(self.head(self.run(self.model(batch["x"]), len(batch["x"]))), batch["y"])


class Listed(Attending):
    """A batch is a list of sequences."""

    def training_step(self, batch: Any) -> Tensor:
        out = self.head(self.run(self.model(torch.stack(batch))))
        return out.square().mean() + out.mean(1).std()


class Stateful(Whole):
    """Its step counts, keeps and logs, before the blocks and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.kept, self.sums = 0, [], torch.zeros(())
        self.register_buffer("seen", torch.zeros(()))

    def training_step(self, batch: Any) -> Tensor | None:
        self.calls += 1
        self.kept.append(len(batch["x"]))
        self.seen += 1
        self.sums += 1
        self.log("before", float(self.calls), on_step=True, on_epoch=True, reduce_fx="sum")
        out = self(batch["x"] + self.calls / 10)
        self.log("after", out.std(), on_step=False, on_epoch=True, batch_size=3)
        self.log_dict({"a": out.max(), "b": out.quantile(0.3)})
        return functional.cross_entropy(out, batch["y"]) * self.calls


class Evaluated(Stateful):
    """Evaluates with metrics of the whole batch, calling the blocks twice."""

    def validation_step(self, batch: Any) -> None:
        first = self(batch["x"])
        self.log("val", (first - self(batch["x"].flip(0)).flip(0)).norm() + first.quantile(0.7))

    def predict_step(self, batch: Any) -> dict[str, Any]:
        out = self(batch["x"])
        return {"order": out.norm(dim=1).argsort(), "count": len(out), "mean": out.mean(), "rows": list(out)}


def contrast(out: Tensor) -> Tensor:
    """A loss of the whole batch: every sample against all others."""
    z = functional.normalize(out, dim=-1)
    return functional.cross_entropy(z @ z.T, torch.arange(len(z), device=z.device).roll(1))


class Embedder(nn.Module):
    """A model for loops: with labels it returns its loss, which goes past the blocks too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        h = skip = functional.dropout(self.embed(x), 0.2, self.training)
        for block in self.blocks:
            h = block(h)
        out = self.head(self.norm(h) + skip)
        if labels is None:
            return out
        return {"loss": contrast(out) + functional.cross_entropy(out, labels), "logits": out}


class NormedBlock(Block):
    """Its BatchNorm sees all samples; with dropout, what it computes is random."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return self.dropout(super().forward(h))


class NormedBlocks(Contrastive):
    block = NormedBlock


class AmongSamples(Contrastive):
    """Blocks that attend to the other samples of the batch."""

    class block(Attention):
        def forward(self, h: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(h[None])[0]


class TimeFirst(Whole):
    """The batch itself is [T, B]: its first dimension is not that of the samples."""

    block = Attention

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Attention(batch_first=False) for _ in range(4)])

    def training_step(self, batch: Any) -> Tensor:
        return self(batch).square().mean()


class DroppedBlocks(Contrastive):
    """Blocks that draw random numbers, and do not look at other samples."""

    class block(Block):
        def forward(self, h: Tensor) -> Tensor:
            return functional.dropout(super().forward(h), 0.5, self.training)


class Interrupted(Stateful):
    """Draws random numbers on both sides of the blocks."""

    def training_step(self, batch: Any) -> Tensor | None:
        batch["x"] = batch["x"] + 0.1 * torch.randn_like(batch["x"])
        loss = super().training_step(batch)
        return loss * (1 + torch.rand(()))
