"""Settings drawn at random, in double precision: whatever the combination, a pipeline trains as one process does."""

import random
from typing import Any

import pytest
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW
from torch.optim.lr_scheduler import CosineAnnealingLR

from skippipe_plugin.schedule import FULL_SCHEDULES

from .models import Transformer, tokens
from .modules import LanguageModel, loader
from .support import assert_same_losses, assert_same_weights, train

MAX_WORKERS = 4
OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda groups: AdamW(groups, lr=1e-2),
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9),
    # From zero, Adagrad makes full steps of gradients that are zero but for rounding.
    "adagrad": lambda groups: Adagrad(groups, lr=0.05, initial_accumulator_value=0.1),
}
CLIPPING: list[dict[str, Any]] = [
    {},
    {"gradient_clip_val": 0.1},
    {"gradient_clip_val": 1.0},
    {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
]


class Drawn(LanguageModel):
    """Freezes some parameters, decays some, and skips some batches, before or after the blocks."""

    def __init__(self, net: nn.Module, optimizer: str, frozen: set[int], skips: str) -> None:
        super().__init__(net)
        self.optimizer = optimizer
        self.skips = skips
        for number, parameter in enumerate(self.parameters()):
            parameter.requires_grad_(number not in frozen)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        skipped = batch_idx % 3 == 1
        if skipped and self.skips == "early":
            return None
        loss = super().training_step(batch)
        return None if skipped and self.skips == "late" else loss

    def configure_optimizers(self) -> Any:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        parts = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        groups = [
            {"params": part, "weight_decay": decay} for part, decay in zip(parts, (0.1, 0.0), strict=True) if part
        ]
        optimizer = OPTIMIZERS[self.optimizer](groups)
        scheduler = {"scheduler": CosineAnnealingLR(optimizer, T_max=20), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def _layout(draw: random.Random, depth: int) -> tuple[int, dict[str, Any]]:
    stages, driver_stage = draw.randint(1, min(3, depth)), draw.random() < 0.3
    replicas = draw.randint(1, MAX_WORKERS // max(1, stages - driver_stage))
    strategy = {"schedule": draw.choice(list(FULL_SCHEDULES)), "num_microbatches": draw.randint(1, 9)}
    return 1 + (stages - driver_stage) * replicas, {**strategy, "replicas": replicas, "driver_stage": driver_stage}


def _frozen(draw: random.Random, num_parameters: int) -> set[int]:
    return set(draw.sample(range(num_parameters - 1), draw.choice([0, 0, num_parameters // 4, num_parameters // 2])))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_settings_at_random(seed: int) -> None:
    draw = random.Random(seed)
    depth, tied = draw.randint(3, 7), draw.random() < 0.3
    devices, strategy = _layout(draw, depth)
    batch_size = draw.randint(1, 11)
    data = loader(tokens(draw.randint(batch_size, 5 * batch_size + 3)), batch_size)
    optimizer, frozen = draw.choice(list(OPTIMIZERS)), _frozen(draw, 4 + 12 * depth)
    clipping = draw.choice(CLIPPING)
    # torch refuses to clip by value when a skipped batch left no gradient at all.
    skips = draw.choice(["never", "never", "early", "late"]) if "gradient_clip_algorithm" not in clipping else "never"
    options = {**clipping, "accumulate_grad_batches": draw.randint(1, 3), "precision": "64-true"}
    options |= {"max_epochs": 2, "max_steps": -1}

    def make() -> Drawn:
        return Drawn(Transformer(depth=depth, tied=tied), optimizer, frozen, skips)

    pipeline, plain = train(make, data, devices, strategy, **options), train(make, data, 1, **options)
    assert_same_losses(pipeline.losses, plain.losses, rtol=1e-9)
    assert_same_weights(pipeline.weights, plain.weights, rtol=1e-7, atol=1e-9)
