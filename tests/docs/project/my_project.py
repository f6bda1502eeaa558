"""What the documents import as the reader's own code: a LightningModule and its data, not one line of it ours."""

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 16


class Block(nn.Module):
    """A residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.GELU())

    def forward(self, hidden: Tensor) -> Tensor:
        out: Tensor = hidden + self.inner(hidden)
        return out


class MyLightningModule(LightningModule):
    """An embedding, twelve blocks, a head."""

    def __init__(self, num_layers: int = 12, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(num_layers))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x)
        for layer in self.layers:
            hidden = layer(hidden)
        out: Tensor = self.head(hidden)
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.mse_loss(self(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self(batch[0]), batch[1]))

    def on_train_epoch_end(self) -> None:
        self.trainer.should_stop = True  # the documents need not say how long they train

    def predict_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        out: Tensor = self(batch[0])
        return out

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


class MyData(LightningDataModule):
    """The sum of a row, sixteen rows a batch."""

    def __init__(self, num_batches: int = 6, batch_size: int = 16) -> None:
        super().__init__()
        self.num_batches, self.batch_size = num_batches, batch_size

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        rows = torch.randn(self.num_batches * self.batch_size, WIDTH, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(rows, rows.sum(1, keepdim=True)), batch_size=self.batch_size)

    val_dataloader = predict_dataloader = train_dataloader
