"""A user's plain torch loop: ``plain_script.py (plain | pipeline)``. Prints one JSON line."""

import contextlib
import json
import sys

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Sequential(*(Block(16) for _ in range(6))), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    inputs = torch.randn(5, 16, 8)
    losses, workers, opened = [], 0, contextlib.nullcontext()
    if sys.argv[1] == "pipeline":
        from skippipe_plugin import SkipPipeConfig, TorchPipeline

        opened = TorchPipeline(model, optimizer, SkipPipeConfig(num_microbatches=4))
    with opened as pipeline:
        for batch in inputs:
            loss = (model(batch) - batch[:, :4]).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        if pipeline is not None:
            workers = len(pipeline.spread.links)
    norm = sum(float(parameter.detach().norm()) for parameter in model.parameters())
    imported = [name for name in ("lightning", "accelerate") if name in sys.modules]
    print(json.dumps({"rank": 0, "losses": losses, "norm": norm, "workers": workers, "imported": imported}))


if __name__ == "__main__":
    main()
