"""LightningModules as users write them: nothing here knows the plugin."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import default_collate

from .networks import VOCABULARY, Generator

Batch = Mapping[str, Tensor]


class Task(LightningModule):
    """A model and the loss of a batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: Batch) -> Tensor:
        return self.model(**batch).loss

    def training_step(self, batch: Batch, index: int) -> Any:
        loss = self.loss(batch)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Some gradients are zero but for rounding: with the usual eps, Adam makes full steps of them.
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2, eps=1e-4)


class Contrastive(Task):
    """Images against texts of the whole batch."""

    def loss(self, batch: Batch) -> Tensor:
        return self.model(**batch, return_loss=True).loss


class Translation(Task):
    """torch's encoder and decoder: each token of the target from those before it."""

    def loss(self, batch: Batch) -> Tensor:
        logits = self.model(batch["source"], batch["target"][:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch["target"][:, 1:].flatten())


class NextToken(Task):
    def loss(self, batch: Batch) -> Tensor:
        logits = self.model(batch["ids"])
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["ids"][:, 1:].flatten())


class Diffusion(Task):
    """The noise that was added to a sample; it comes with the batch."""

    def loss(self, batch: Batch) -> Tensor:
        time = batch["time"]
        noisy = (1 - time)[:, None, None] * batch["x"] + time[:, None, None] * batch["noise"]
        return F.mse_loss(self.model(noisy, time, batch["label"]), batch["noise"] - batch["x"])


class Reconstruction(Task):
    def loss(self, batch: Batch) -> Tensor:
        return F.mse_loss(self.model(batch["x"]), batch["x"].roll(1, -1))


class Detection(Task):
    """The loss of each layer's answer, with the auxiliary ones weighing as much as the last."""

    def loss(self, batch: Batch) -> Tensor:
        answers = self.model(batch["x"])
        return sum(F.cross_entropy(answer.flatten(0, 1), batch["objects"].flatten()) for answer in answers)


def log_likelihood(model: nn.Module, ids: Tensor) -> Tensor:
    scores = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return scores.gather(-1, ids[:, 1:, None]).squeeze(-1).sum(-1)


class Preference(Task):
    """Direct preference optimization with a frozen copy as the reference."""

    def __init__(self, policy: nn.Module) -> None:
        super().__init__(policy)
        self.reference = copy.deepcopy(policy).requires_grad_(False).eval()

    def loss(self, batch: Batch) -> Tensor:
        chosen, rejected = (log_likelihood(self.model, batch[name]) for name in ("chosen", "rejected"))
        with torch.no_grad():
            before = [self.referred(batch[name]) for name in ("chosen", "rejected")]
        return -F.logsigmoid(0.1 * ((chosen - before[0]) - (rejected - before[1]))).mean()

    def referred(self, ids: Tensor) -> Tensor:
        return log_likelihood(self.reference, ids)


class AdapterPreference(Preference):
    """The same with adapters, whose reference is the policy without them."""

    def __init__(self, policy: nn.Module) -> None:
        Task.__init__(self, policy)

    def referred(self, ids: Tensor) -> Tensor:
        with self.model.disable_adapter():
            return log_likelihood(self.model, ids)


class Distillation(Task):
    """A student beside a frozen teacher."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(student)
        self.teacher = teacher.requires_grad_(False).eval()

    def loss(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = self.teacher(input_ids=batch["input_ids"]).logits.softmax(-1)
        scores = self.model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
        return F.kl_div(scores.flatten(0, 1), target.flatten(0, 1), reduction="batchmean")


class Gan(LightningModule):
    """A generator against a discriminator, with two optimizers, as Lightning's documentation has it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator = Generator()
        self.discriminator = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))

    def training_step(self, batch: Batch, index: int) -> Any:
        generators, discriminators = self.optimizers()  # type: ignore[misc]
        noise = torch.randn(len(batch["x"]), 3, device=self.device)
        self.toggle_optimizer(generators)
        g_loss = -F.logsigmoid(self.discriminator(self.generator(noise))).mean()
        generators.zero_grad()
        self.manual_backward(g_loss)
        generators.step()
        self.untoggle_optimizer(generators)
        self.toggle_optimizer(discriminators)
        judged, made = self.discriminator(batch["x"]), self.discriminator(self.generator(noise).detach())
        d_loss = -F.logsigmoid(judged).mean() - F.logsigmoid(-made).mean()
        discriminators.zero_grad()
        self.manual_backward(d_loss)
        discriminators.step()
        self.untoggle_optimizer(discriminators)
        return {"loss": g_loss.detach() + d_loss.detach()}

    def configure_optimizers(self) -> Any:
        parts = (self.generator, self.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=1e-2, betas=(0.5, 0.999), eps=1e-4) for part in parts]


# Data -------------------------------------------------------------------------------------------------------------


def drawn(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(samples: int, length: int, seed: int = 0, start: int = 3, stop: int = 28) -> Tensor:
    """Draw tokens without the special ones."""
    return torch.randint(start, min(stop, VOCABULARY), (samples, length), generator=drawn(seed))


def unequal(labels: Tensor) -> Tensor:
    """Leave labels out, in unequal numbers."""
    kept = torch.arange(len(labels)) * 3 % labels.shape[1] + 1
    return torch.where(torch.arange(labels.shape[1]) < kept[:, None], labels, -100)


def values(samples: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(samples, *shape, generator=drawn(seed))


def translations(samples: int) -> Batch:
    mask = (torch.arange(7) < (torch.arange(samples) % 5 + 3)[:, None]).long()
    return {"input_ids": ids(samples, 7), "attention_mask": mask, "labels": unequal(ids(samples, 8, 1))}


def speech(samples: int) -> Batch:
    return {"input_features": values(samples, 8, 22), "labels": unequal(ids(samples, 8, 1))}


def pairs(samples: int) -> Batch:
    return {"source": ids(samples, 7), "target": ids(samples, 9, 1)}


def captions(samples: int) -> Batch:
    texts = torch.cat([ids(samples, 7), torch.ones(samples, 1, dtype=torch.long)], 1)  # the end of a text is looked up
    return {"input_ids": texts, "pixel_values": values(samples, 3, 8, 8)}


def conversations(samples: int) -> Batch:
    return _with_images(samples, {"pixel_values": values(samples, 3, 8, 8)})


def grids(samples: int) -> Batch:
    """Have the patches of each image as its processor makes them; every four become a token."""
    grid = torch.tensor([1, 4, 4]).expand(samples, -1).contiguous()
    batch = _with_images(samples, {"pixel_values": values(samples, 16, 3 * 2 * 4 * 4), "image_grid_thw": grid})
    return {**batch, "mm_token_type_ids": (batch["input_ids"] == 31).int()}


def in_one_row(samples: Sequence[Batch]) -> Batch:
    """Collate as that model wants it: the patches of all images in one row, without a dimension of the samples."""
    batch = default_collate(list(samples))
    return {**batch, "pixel_values": batch["pixel_values"].flatten(0, 1)}


def _with_images(samples: int, images: Batch) -> Batch:
    words = ids(samples, 7)
    image = torch.tensor([30, 31, 31, 31, 31, 29]).expand(samples, -1)
    asked = torch.cat([image, words], 1)
    labels = torch.cat([torch.full_like(image, -100), unequal(words)], 1)
    return {"input_ids": asked, "attention_mask": torch.ones_like(asked), "labels": labels, **images}


def masked(samples: int) -> Batch:
    return {"input_ids": ids(samples, 8), "labels": unequal(ids(samples, 8, 1))}


def text(samples: int) -> Batch:
    return {"ids": ids(samples, 8)}


def prompts(samples: int) -> Batch:
    return {"input_ids": ids(samples, 8)}


def answers(samples: int) -> Batch:
    return {"chosen": ids(samples, 8), "rejected": ids(samples, 8, 1)}


def patches(samples: int) -> Batch:
    x, noise = values(samples, 7, 4), values(samples, 7, 4, seed=1)
    time = torch.rand(samples, generator=drawn(2))
    return {"x": x, "noise": noise, "time": time, "label": torch.arange(samples) % 5}


def images(samples: int) -> Batch:
    return {"x": values(samples, 3, 8, 8)}


def rows(samples: int) -> Batch:
    return {"x": values(samples, 7, 4)}


def objects(samples: int) -> Batch:
    x = values(samples, 7, 4)
    return {"x": x, "objects": (x[:, :5].sum(-1) > 0).long() + (x[:, :5, 0] > 1).long()}


def points(samples: int) -> Batch:
    return {"x": values(samples, 4)}


Data = Callable[[int], Batch]
