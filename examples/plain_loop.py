"""A plain torch loop whose model runs as a pipeline: a driver and three workers, or one process with --plain."""

import contextlib
import sys

import torch
from torch import Tensor, nn

from skippipe_plugin import SkipPipeConfig, TorchPipeline


class Speller(nn.Module):
    """Guesses the next byte from those before it."""

    def __init__(self, width: int = 64, depth: int = 6) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 256)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, mask = self.embedding(ids), nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        for layer in self.layers:
            hidden = layer(hidden, src_mask=mask, is_causal=True)
        return self.head(hidden)


torch.manual_seed(0)
text = torch.frombuffer(bytearray(b"the quick brown fox jumps over the lazy dog. " * 200), dtype=torch.uint8).long()
model = Speller()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
pipeline = TorchPipeline(model, optimizer, SkipPipeConfig(num_stages=3, num_microbatches=8))

with contextlib.nullcontext() if "--plain" in sys.argv else pipeline:
    for step in range(40):
        ids = torch.stack([text[start : start + 33] for start in torch.randint(len(text) - 33, (16,))])
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).transpose(1, 2), ids[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9:
            print(f"step {step + 1:3d}  loss {loss.item():.4f}")
torch.save(model.state_dict(), "speller.pt")
