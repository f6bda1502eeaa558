"""Parity under what users change: optimizers, clipping, accumulation, frozen and tied weights, precision, layout."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader

from skippipe_plugin.strategies import NetworkConfig
from tests.grids import all_slow_but, slow

from .models import SignMomentum, Transformer, tokens
from .modules import BATCH, OPTIMIZERS, STEPS, LanguageModel, Pretrained, adamw, cosine, loader, momentum, two_groups
from .support import Run, assert_same_run, train
from .zoo import gpt2, language

TWO_WORKERS: dict[str, Any] = {"schedule": "1f1b", "num_microbatches": 4}


def both(
    make: Callable[[], LanguageModel],
    data: Any = None,
    *,
    devices: int = 3,
    strategy: Mapping[str, Any] = TWO_WORKERS,
    **options: Any,
) -> tuple[Run, Run]:
    """Train as a pipeline and in one process."""
    data = data if data is not None else loader(tokens(BATCH * STEPS))
    return train(make, data, devices, strategy, **options), train(make, data, 1, **options)


MORE_OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "fused": lambda module: AdamW(module.parameters(), lr=1e-2, eps=1e-5, fused=True),
    "named": lambda module: AdamW(module.named_parameters(), lr=1e-2, eps=1e-5),
    "tensor_lr": lambda module: AdamW(module.parameters(), lr=torch.tensor(1e-2), eps=1e-5, foreach=False),
    "of_ones_own": lambda module: SignMomentum(module.parameters(), lr=3e-3),
}


@pytest.mark.parametrize(
    "name", all_slow_but([*OPTIMIZERS, *MORE_OPTIMIZERS], "groups", "cosine", "amsgrad", "of_ones_own")
)
def test_optimizers_and_schedulers(name: str) -> None:
    optimizer = (OPTIMIZERS | MORE_OPTIMIZERS)[name]
    assert_same_run(*both(lambda: LanguageModel(Transformer(), optimizer)))


class Stepping(LanguageModel):
    """Steps, clips and warms up by hand, in the hooks that Lightning has for it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (self.trainer.global_step + 1)
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")


def test_hooks_that_step_and_clip() -> None:
    assert_same_run(*both(lambda: Stepping(Transformer(), momentum), max_steps=5))


TRAINER_OPTIONS: dict[str, dict[str, Any]] = {
    "norm": {"gradient_clip_val": 0.2},
    "value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    # 10 batches to an epoch: its last window has one batch.
    "accumulate": {"accumulate_grad_batches": 3, "max_steps": 7, "max_epochs": -1},
    "accumulate_clip": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.2, "max_steps": 5},
    "double": {"precision": "64-true"},
}


@pytest.mark.parametrize("name", all_slow_but(TRAINER_OPTIONS, "value", "accumulate", "accumulate_clip"))
def test_trainer_options(name: str) -> None:
    assert_same_run(*both(lambda: LanguageModel(Transformer(), momentum), **TRAINER_OPTIONS[name]))


def test_bfloat16_autocast() -> None:
    pipeline, plain = both(lambda: LanguageModel(Transformer(), momentum), precision="bf16-mixed")
    # bfloat16 has 8 bits: a weight's gradient is rounded by up to 2**-9 of itself, once for each microbatch before the
    # sum, or once for the whole batch. Measured: 2e-4 (losses) and 6e-4 (weights, absolute) after ten steps.
    assert_same_run(pipeline, plain, rtol=2e-3, weights_rtol=1e-2, weights_atol=5e-3)
    exact = train(lambda: LanguageModel(Transformer(), momentum), loader(tokens(BATCH * STEPS)), 1)
    assert exact.losses != plain.losses  # autocast did something


def frozen(*prefixes: str) -> Callable[[], LanguageModel]:
    def make() -> LanguageModel:
        net = Transformer()
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(not name.startswith(prefixes))
        return LanguageModel(net, two_groups)

    return make


FROZEN = {
    "embedding": ("embedding", "positions"),
    "first_blocks": ("embedding", "positions", "blocks.0", "blocks.1", "blocks.2"),
    "blocks_in_the_middle": ("blocks.1", "blocks.3"),
    "all_blocks": ("blocks",),
    "biases": ("blocks.0.norm1.bias", "blocks.4.attention.qkv.bias"),
    "all_but_the_head": ("embedding", "positions", "blocks", "norm"),
}


@pytest.mark.parametrize("name", all_slow_but(FROZEN, "blocks_in_the_middle", "all_blocks"))
def test_frozen_parameters(name: str) -> None:
    assert_same_run(*both(frozen(*FROZEN[name])))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_where_a_worker_trains_nothing(algorithm: str) -> None:
    clip = {"gradient_clip_val": 0.01, "gradient_clip_algorithm": algorithm}
    assert_same_run(*both(frozen("blocks"), **clip))


def test_tied_embeddings() -> None:
    # The larger logits round more, and so do the gradients that are zero but for rounding: a larger eps than elsewhere.
    def calm(module: nn.Module) -> AdamW:
        return AdamW(module.parameters(), lr=1e-2, eps=1e-4)

    assert_same_run(*both(lambda: LanguageModel(Transformer(tied=True), calm)))


@pytest.mark.parametrize("batch_size", [7, 3])
def test_batches_that_do_not_divide(batch_size: int) -> None:
    """Microbatches of unequal sizes, fewer than planned, and a smaller last batch."""
    assert_same_run(*both(lambda: LanguageModel(Transformer()), loader(tokens(40), batch_size), max_epochs=2))


def test_sequences_of_changing_length() -> None:
    batches = [tokens(8, length) for length in (8, 5, 12, 8, 16, 3, 8, 5, 9, 12)]
    assert_same_run(*both(lambda: LanguageModel(Transformer()), DataLoader(batches, batch_size=None)))


def test_the_driver_holds_the_first_stage() -> None:
    strategy = {**TWO_WORKERS, "driver_stage": True}
    assert_same_run(*both(lambda: LanguageModel(Transformer(), cosine), strategy=strategy, gradient_clip_val=0.2))


@pytest.mark.parametrize("devices", [1, 2])
def test_the_driver_holds_a_stage_alone_or_with_one_worker(devices: int) -> None:
    data = loader(tokens(BATCH * STEPS))
    pipeline = train(lambda: LanguageModel(Transformer()), data, devices, {"driver_stage": True, "num_microbatches": 4})
    assert_same_run(pipeline, train(lambda: LanguageModel(Transformer()), data, 1))


@pytest.mark.parametrize("replicas", [slow(2), 3])
def test_replicas(replicas: int) -> None:
    strategy = {**TWO_WORKERS, "replicas": replicas}
    devices = {2: 5, 3: 4}[replicas]
    pipeline, plain = both(
        lambda: LanguageModel(Transformer(), cosine), devices=devices, strategy=strategy, gradient_clip_val=0.2
    )
    assert_same_run(pipeline, plain)


@pytest.mark.slow
def test_links_in_pairs() -> None:
    """What NCCL will need: a group for each link, and receives in the sender's order."""
    strategy = {**TWO_WORKERS, "replicas": 2, "network": NetworkConfig(backend="gloo-pairs")}
    data = loader(tokens(2 * BATCH))
    pipeline, plain = both(
        lambda: LanguageModel(Transformer(), cosine), data, devices=5, strategy=strategy, val_data=data, max_steps=4
    )
    assert_same_run(pipeline, plain)


def test_fewer_microbatches_than_replicas() -> None:
    strategy = {"num_microbatches": 4, "replicas": 2}
    assert_same_run(*both(lambda: LanguageModel(Transformer()), loader(tokens(10), 1), strategy=strategy))


class Skipping(LanguageModel):
    """Returns no loss for some batches."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        return None if batch_idx % 3 == 1 else super().training_step(batch)


class SkippingLate(LanguageModel):
    """Decides after the forward."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:  # type: ignore[override]
        loss = super().training_step(batch)
        return None if batch_idx % 3 == 1 else loss


@pytest.mark.parametrize("cls", [Skipping, SkippingLate])
@pytest.mark.parametrize("accumulate", [slow(1), 2])
@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_steps_without_a_loss(cls: type[LanguageModel], accumulate: int) -> None:
    options = {"max_steps": -1, "max_epochs": 1, "accumulate_grad_batches": accumulate}
    assert_same_run(*both(lambda: cls(Transformer(), momentum), **options))


def test_two_models_side_by_side_and_more_parameters_outside() -> None:
    """Parameters that are no part of the pipelined model train along."""

    class Scaled(LanguageModel):
        def __init__(self) -> None:
            super().__init__(Transformer(), two_groups)
            self.scale = nn.Parameter(torch.ones(()))
            self.unused = nn.Linear(2, 2)

        def loss(self, batch: Tensor) -> Tensor:
            return super().loss(batch) * self.scale.exp()

    assert_same_run(*both(Scaled, gradient_clip_val=0.5))


def test_gradient_checkpointing_of_transformers() -> None:
    def make() -> Pretrained:
        net = gpt2()
        net.gradient_checkpointing_enable()
        return Pretrained(net, adamw)

    assert_same_run(*both(make, loader(language(BATCH * STEPS))))
