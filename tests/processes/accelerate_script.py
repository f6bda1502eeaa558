"""A user's loop for accelerate: ``accelerate_script.py (plain | pipeline) [slow]``. Prints one JSON line."""

import json
import os
import sys
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(self.norm(hidden)))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16) for _ in range(6))
        self.head = nn.Linear(16, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.embedding(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def accelerator() -> Accelerator:
    if sys.argv[1] == "plain":
        return Accelerator(cpu=True)
    from skippipe_plugin.accelerate import SkipPipeAccelerator

    return SkipPipeAccelerator(cpu=True, num_microbatches=4)


def main() -> None:
    current = accelerator()
    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    loader = DataLoader(TensorDataset(torch.randn(40, 8), torch.randint(0, 4, (40,))), batch_size=8, shuffle=True)
    model, optimizer, loader = current.prepare(model, optimizer, loader)
    losses = []
    for _ in range(1000 if "slow" in sys.argv else 2):
        for inputs, targets in loader:
            loss = nn.functional.cross_entropy(model(inputs), targets)
            current.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if "slow" in sys.argv:
                time.sleep(0.05)
    stages = len(current.skippipe.spread.links) if sys.argv[1] == "pipeline" else 0
    result = {
        "rank": int(os.environ.get("RANK", "0")),
        "losses": losses,
        "workers": stages,
        "processes": current.num_processes,
    }
    sys.stdout.write(f"RESULT {json.dumps(result)}\n")


if __name__ == "__main__":
    main()
