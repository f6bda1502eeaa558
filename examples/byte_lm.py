"""A small GPT over bytes, as an ordinary LightningModule.

Nothing in this file knows about pipelines: it imports torch and Lightning only. The transformer
blocks stand in one `nn.ModuleList` and are called one after the other; that is all that
`SkipPipeStrategy` needs in order to spread them over processes or machines (see `train_lm.py`).
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset


class ByteDataset(Dataset[Tensor]):
    """Windows of `context + 1` bytes: a model reads all but the last and predicts all but the first."""

    def __init__(self, text: bytes, context: int) -> None:
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.context = context

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.context

    def __getitem__(self, index: int) -> Tensor:
        start = index * self.context
        return self.bytes[start : start + self.context + 1]


class ByteData(LightningDataModule):
    """A text file, or Python's own language reference; the last tenth is for validation."""

    def __init__(self, path: str | None = None, context: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.path, self.context, self.batch_size = path, context, batch_size

    def setup(self, stage: str) -> None:
        text = Path(self.path).read_bytes() if self.path else default_text()
        split = len(text) * 9 // 10
        self.train = ByteDataset(text[:split], self.context)
        self.val = ByteDataset(text[split:], self.context)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(self.val, self.batch_size, drop_last=True)


class Block(nn.Module):
    """Attention to the past, then a two-layer network; each adds to its input."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def attend(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (batch, head, length, width per head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.proj(y.transpose(1, 2).reshape(batch, length, width))
        return out

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ByteLM(LightningModule):
    """Predict the next byte."""

    def __init__(self, width: int = 96, num_layers: int = 6, context: int = 64, lr: float = 5e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.context, self.lr = context, lr
        self.embed = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, num_heads=width // 32) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 256)
        nn.init.normal_(self.embed.weight, std=0.1)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        others = [p for p in self.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.95))
        steps = self.trainer.estimated_stepping_batches

        def scale(step: int) -> float:  # warm up over 50 steps, then follow half a cosine down to zero
            return min((step + 1) / 50, (1 + math.cos(math.pi * min(step / steps, 1))) / 2)

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, scale)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @torch.no_grad()
    def generate_text(self, prompt: str, length: int = 200, temperature: float = 0.7) -> str:
        """Continue `prompt` by `length` bytes."""
        tokens = torch.tensor([list(prompt.encode())], device=self.device)
        for _ in range(length):
            logits = self(tokens[:, -self.context :])[:, -1] / temperature
            tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], dim=1)
        return bytes(tokens[0].tolist()).decode(errors="replace")


def default_text() -> bytes:
    """Return a text that every Python installation has: the help topics of its language reference."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values()).encode()
