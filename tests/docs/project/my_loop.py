"""What the documents import as the reader's own code around a loop of accelerate, not one line of it ours."""

import tempfile

import torch
from my_project import WIDTH, Block
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


class MyModel(nn.Module):
    """Six blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(6))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        out: Tensor = self.head(hidden)
        return out


def make_loader() -> DataLoader[tuple[Tensor, ...]]:
    """The sum of a row, sixteen rows a batch."""
    rows = torch.randn(48, WIDTH, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=16)


def make_trainer() -> Trainer:
    """A small language model and two steps."""
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0}
    tokens = torch.randint(0, 32, (16, 8), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    folder = tempfile.mkdtemp()
    arguments = TrainingArguments(folder, max_steps=2, report_to=[], save_strategy="no", use_cpu=True)
    return Trainer(GPT2LMHeadModel(GPT2Config(**sizes)), arguments, train_dataset=data)
