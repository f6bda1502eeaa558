"""LightningModules and their data, as users write them: nothing here knows the plugin."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, Dataset

from .models import Transformer, next_token_loss

BATCH = 8
STEPS = 10


class Rows(Dataset[Any]):
    """The rows of a mapping of tensors, or of one tensor."""

    def __init__(self, columns: Mapping[str, Tensor] | Tensor) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(self.columns if isinstance(self.columns, Tensor) else next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.columns, Tensor):
            return self.columns[index]
        return {name: column[index] for name, column in self.columns.items()}


def loader(columns: Mapping[str, Tensor] | Tensor, batch_size: int = BATCH, **options: Any) -> DataLoader[Any]:
    return DataLoader(Rows(columns), batch_size=batch_size, **options)


def adamw(module: nn.Module) -> Optimizer:
    # Some gradients are zero but for rounding (the bias of a key): with the usual eps, Adam makes full steps of them.
    return AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, eps=1e-5)


def two_groups(module: nn.Module) -> AdamW:
    """Tell the groups apart by name."""
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    plain = [parameter for name, parameter in named if name.endswith("bias") or "norm" in name]
    decayed = [parameter for name, parameter in named if not (name.endswith("bias") or "norm" in name)]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0, "lr": 3e-3}]
    return AdamW(groups, lr=1e-2, eps=1e-5)


def cosine(module: nn.Module) -> dict[str, Any]:
    optimizer = two_groups(module)
    scheduler = {"scheduler": CosineAnnealingLR(optimizer, T_max=STEPS), "interval": "step"}
    return {"optimizer": optimizer, "lr_scheduler": scheduler}


def momentum(module: nn.Module) -> SGD:
    return SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3)


def adagrad(module: nn.Module) -> Adagrad:
    return Adagrad(module.parameters(), lr=0.05, initial_accumulator_value=0.1)


def amsgrad(module: nn.Module) -> AdamW:
    return AdamW(module.parameters(), lr=1e-2, amsgrad=True, eps=1e-5, foreach=True)


OPTIMIZERS = {
    "adamw": adamw,
    "groups": two_groups,
    "cosine": cosine,
    "sgd": momentum,
    "adagrad": adagrad,
    "amsgrad": amsgrad,
}


class Task(LightningModule):
    """What all modules of the tests share: the optimizer, and the name of the network."""

    def __init__(self, net: nn.Module, optimizer: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__()
        self.model = net
        self.make_optimizer = optimizer or adamw

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self)


class LanguageModel(Task):
    """A hand-written network and its loss."""

    def loss(self, batch: Tensor) -> Tensor:
        return next_token_loss(self.model(batch), batch)

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        self.log("val_loss", self.loss(batch), prog_bar=True)

    def test_step(self, batch: Tensor) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.model(batch).argmax(-1)


class Configured(LanguageModel):
    """Can be built from the hyperparameters in a checkpoint."""

    def __init__(self, depth: int = 6, dropout: float = 0.0, optimizer: str = "cosine", tied: bool = False) -> None:
        super().__init__(Transformer(depth=depth, dropout=dropout, tied=tied), OPTIMIZERS[optimizer])
        self.save_hyperparameters()


class Classifier(Task):
    """Features in, classes out."""

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch["x"]), batch["y"])


class Pretrained(Task):
    """A model of transformers, called the way its documentation does."""

    def training_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        return self.model(**batch).loss

    def validation_step(self, batch: Mapping[str, Tensor]) -> None:
        self.log("val_loss", self.model(**batch).loss)


def points(samples: int) -> dict[str, Tensor]:
    x = torch.randn(samples, 8, generator=torch.Generator().manual_seed(0))
    return {"x": x, "y": x.argmax(1) % 4}
