"""Experts: what a paper takes over the whole step is that of one process, on however many workers."""

import functools
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from skippipe_plugin.callbacks import ExpertConfig, LoadBalancer, StageRecovery
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.moe import GShard, MoEConfig, MoELayer, NullExperts
from tests.e2e import optimizers
from tests.e2e.models import tokens
from tests.e2e.modules import Pretrained, loader
from tests.e2e.support import train
from tests.grids import all_slow_but, slow
from tests.unit.moe.families import build

WIDTH, EXPERTS, MICROBATCHES, COEFFICIENT = 8, 4, 4, 1.0


class Block(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.norm, self.moe = nn.LayerNorm(WIDTH), MoELayer(WIDTH, 12, EXPERTS, **options)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.moe(self.norm(hidden))


class Model(LightningModule):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 3)
        self.blocks = nn.ModuleList([Block(**options) for _ in range(4)])

    def training_step(self, batch: Any, _: int) -> Tensor:
        hidden = functools.reduce(lambda h, block: block(h), self.blocks, self.embed(batch["x"]))
        return F.cross_entropy(self.head(hidden).flatten(0, 1), batch["y"].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def data(batches: int) -> dict[str, Tensor]:
    """Samples that differ along the batch, so that microbatches choose different experts."""
    generator = torch.Generator().manual_seed(5)
    ramp = torch.arange(8.0).view(8, 1, 1).repeat(batches, 1, 1) * torch.tensor([0.8, -0.8, 0.4, 0])
    x = torch.randn(8 * batches, 6, 4, generator=generator) + ramp
    return {"x": x, "y": torch.randint(0, 3, (8 * batches, 6), generator=generator)}


def fit(batches: int, devices: int, options: dict[str, Any], accumulate: int = 1, **strategy: Any) -> dict[str, Tensor]:
    given = {"num_microbatches": MICROBATCHES, "verbose": False, "moe": MoEConfig(auxiliary_loss=COEFFICIENT)}
    run = train(
        lambda: Model(**options),
        loader(data(batches)),
        devices,
        {**given, **strategy},
        max_steps=-1,
        max_epochs=1,
        accumulate_grad_batches=accumulate,
    )
    return run.weights


def reference(
    batches: int, options: dict[str, Any], accumulate: int = 1, together: int = 1, null: int = 0
) -> dict[str, Tensor]:
    """The papers' loss in one process: f over all microbatches so far in the optimizer step, P of each."""
    model = Model(**options)
    optimizer, columns = torch.optim.SGD(model.parameters(), 0.1), data(batches)
    outputs: dict[int, Any] = {}
    for number, block in enumerate(model.blocks):
        block.moe.routers[0].register_forward_hook(lambda _, a, o, n=number: outputs.__setitem__(n, o))
    for first in range(0, batches, accumulate):
        optimizer.zero_grad()
        counts: list[Tensor] = []  # of all layers, by microbatch
        for batch in range(first, min(first + accumulate, batches)):
            pieces = [
                {k: v[8 * batch : 8 * batch + 8].chunk(MICROBATCHES)[i] for k, v in columns.items()}
                for i in range(MICROBATCHES)
            ]
            for bundle in range(0, MICROBATCHES, together):
                losses, means = [], []
                for piece in pieces[bundle : bundle + together]:
                    losses.append(model.training_step(piece, 0))
                    counts.append(torch.stack([_visits(outputs[n][2], null) for n in range(4)]))
                    means.append([outputs[n][0].softmax(-1).mean(0) for n in range(4)])
                shares = torch.stack(counts).sum(0)
                shares = shares / shares.sum(1, keepdim=True)
                for loss, each in zip(losses, means, strict=True):
                    balance = sum((shares[n] * each[n]).sum() * (EXPERTS + null) for n in range(4))
                    ((loss + COEFFICIENT * balance) / MICROBATCHES / accumulate).backward()
        optimizer.step()
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _visits(index: Tensor, null: int) -> Tensor:
    counted = torch.bincount(index.flatten(), minlength=EXPERTS + 1).double()
    return torch.cat([counted[:EXPERTS], (counted[EXPERTS:] / max(1, null)).expand(null)])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 2},
    "one": {"top_k": 1},
    "sigmoid": {"router": "sigmoid", "top_k": 3},
    "gshard": {"router": GShard(capacity_factor=4.0), "top_k": 2, "causal": False},
}
SPREAD: dict[str, tuple[int, dict[str, Any]]] = {
    "one replica": (3, {}),
    "two replicas": (5, {"replicas": 2}),
    "three replicas": (4, {"replicas": 3}),
    "gpipe": (5, {"replicas": 2, "schedule": "gpipe"}),
    "driver stage": (3, {"replicas": 2, "driver_stage": True}),
}


@pytest.mark.parametrize("accumulate", [slow(1), 2])
@pytest.mark.parametrize("spread", all_slow_but(SPREAD, "two replicas", "gpipe", "driver stage"))
def test_the_balancing_loss_counts_the_whole_step(spread: str, accumulate: int) -> None:
    devices, strategy = SPREAD[spread]
    found = fit(4, devices, ROUTERS["softmax"], accumulate, **strategy)
    assert_close(found, reference(4, ROUTERS["softmax"], accumulate))


@pytest.mark.parametrize("router", ROUTERS)
def test_other_routers_over_replicas(router: str) -> None:
    assert_close(fit(2, 5, ROUTERS[router], replicas=2), reference(2, ROUTERS[router]))


def test_null_experts_over_replicas() -> None:
    options = {"router": NullExperts(num_null=2), "top_k": 3}
    assert_close(fit(2, 5, options, replicas=2), reference(2, options, null=2))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_replicas_that_share_experts_count_what_they_meet_for(accumulate: int) -> None:
    moe = MoEConfig(auxiliary_loss=COEFFICIENT, expert_parallel=2)
    found = fit(4, 5, ROUTERS["softmax"], accumulate, replicas=2, moe=moe)
    assert_close(found, reference(4, ROUTERS["softmax"], accumulate, together=2))


class Own(Model):
    def __init__(self, make: Any) -> None:
        super().__init__(top_k=2)
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


@pytest.mark.parametrize("make", [torch.optim.Adafactor, optimizers.Trusting], ids=["Adafactor", "trust ratios"])
def test_optimizers_of_whole_parameters_are_refused_where_experts_are_spread(make: Any) -> None:
    strategy = {"num_microbatches": 4, "verbose": False, "replicas": 2}
    spread = strategy | {"moe": MoEConfig(expert_parallel=2)}
    with pytest.raises(SkipPipeError, match="looks at whole parameters, and with expert_parallel each rank holds"):
        train(lambda: Own(make), loader(data(2)), 3, spread, max_steps=2)
    expected = train(lambda: Own(make), loader(data(2)), 1, max_steps=2)
    assert_close(train(lambda: Own(make), loader(data(2)), 3, strategy, max_steps=2).weights, expected.weights)
    adam = train(lambda: Own(torch.optim.SGD), loader(data(2)), 1, max_steps=2)
    assert_close(train(lambda: Own(torch.optim.SGD), loader(data(2)), 3, spread, max_steps=2).weights, adam.weights)


# ------------------------------------------------------------------- biases


class Biased(Model):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(router="sigmoid", top_k=1)
        for block in self.blocks:
            block.moe.routers[0].selection_bias[0] = 0.75
        self.dtype_of_data = dtype

    def training_step(self, batch: Any, _: int) -> Tensor:
        return super().training_step({**batch, "x": batch["x"].to(self.embed.weight.dtype)}, 0)


def biases(
    precision: Any, steps: int, devices: int = 3, path: str | None = None, more: Sequence[Any] = (), **options: Any
) -> Tensor:
    balancer = LoadBalancer(stages=False, experts="bias", expert_config=ExpertConfig(rule="sign", rate=1e-3))
    run = train(
        Biased,
        loader(data(20)),
        devices,
        {"num_microbatches": 2, "verbose": False, **options},
        max_steps=steps,
        precision=precision,
        callbacks=[balancer, *more],
        ckpt_path=path,
        enable_checkpointing=bool(more),
    )
    return torch.stack([v for k, v in run.weights.items() if k.endswith("selection_bias")])


@pytest.mark.parametrize("strategy", [{}, {"replicas": 2}], ids=["one", "two replicas"])
def test_a_bias_falls_by_its_rate_in_any_precision(strategy: dict[str, Any]) -> None:
    found = biases("bf16-true", 12, 3 if not strategy else 5, **strategy)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0], torch.full((4,), 0.75 - 12e-3), rtol=0, atol=1e-6)


def test_a_bias_is_saved_and_resumed_in_full(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path, "half", every_n_train_steps=5)
    half = biases("bf16-true", 5, more=[keep])
    state = torch.load(tmp_path / "half.ckpt", "cpu", weights_only=False)["state_dict"]
    saved = torch.stack([v for k, v in state.items() if k.endswith("selection_bias")])
    assert torch.equal(saved, half)
    found = biases("bf16-true", 9, path=str(tmp_path / "half.ckpt"))
    torch.testing.assert_close(found[:, 0], torch.full((4,), 0.75 - 9e-3), rtol=0, atol=1e-6)


class Kill(Callback):
    """Ends a worker when the training step of a batch begins, and a spare is there that replaces it at once.

    Until one is there, steps go around the lost worker to its replica, and a short run may end before.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            deadline = time.monotonic() + 60
            while not trainer.strategy.spare_pids and time.monotonic() < deadline:
                time.sleep(0.02)
            os.kill(max(trainer.strategy.worker_pids.items())[1], signal.SIGKILL)


def test_a_worker_that_replaces_another_has_the_biases() -> None:
    """Those of routers that have none of their own: the step that is run again must choose the same experts."""
    config = ExpertConfig(rule="proportional", rate=0.5)

    def shares(*more: Any) -> Any:
        balancer = LoadBalancer(stages=False, experts="bias", expert_config=config)
        recovery = StageRecovery(spares=1)
        ids = tokens(48, 16)
        strategy = {"num_microbatches": 4, "verbose": False, "replicas": 2}
        make = lambda: Pretrained(build("mixtral", num_hidden_layers=4))  # noqa: E731
        callbacks = [balancer, recovery, *more]
        train(make, loader({"input_ids": ids, "labels": ids}), 5, strategy, max_steps=6, callbacks=callbacks)
        assert len(recovery.events) == len(more)
        return balancer.experts.shares

    assert shares(Kill(4)) == shares()
