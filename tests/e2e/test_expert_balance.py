"""LoadBalancer(experts=...): the loads it sees, what it does about them, and what it leaves in logs and checkpoints."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from skippipe_plugin.callbacks import ExpertConfig, LoadBalancer, draw_loads
from skippipe_plugin.callbacks.experts import MAX_REMEMBERED, ExpertBalance, load_metrics
from skippipe_plugin.moe import MoEConfig, RouterStatistics
from skippipe_plugin.strategies import SkipPipeStrategy
from tests.unit.moe.families import build

from .experts import Own
from .models import tokens
from .modules import BATCH, LanguageModel, Pretrained, loader
from .support import Run, train

FAST = ExpertConfig(rule="proportional", rate=0.05)


def mixtral() -> LightningModule:
    return Pretrained(build("mixtral", num_hidden_layers=4))


def skewed() -> LightningModule:
    """A model of our layers in which every token chooses the first expert."""
    module = LanguageModel(Own())
    for name, buffer in module.named_buffers():
        if name.endswith("selection_bias"):
            buffer[0] = 1.0
    return module


def fit(
    balancer: LoadBalancer,
    steps: int,
    make: Callable[[], LightningModule] = mixtral,
    more: Sequence[Callback] = (),
    **options: Any,
) -> Run:
    ids = tokens(BATCH * steps, 16)
    data = loader(ids if make is skewed else {"input_ids": ids, "labels": ids})
    return train(
        make,
        data,
        3,
        {"num_microbatches": 4},
        callbacks=[balancer, *more],
        **{"max_steps": steps, **options},
    )


def violations(balancer: LoadBalancer) -> list[float]:
    """The mean MaxVio of every step, from the remembered shares."""
    assert balancer.experts is not None
    return [
        sum(max(each) * len(each) - 1 for each in shares.values()) / len(shares)
        for shares in balancer.experts.shares.values()
    ]


@pytest.mark.parametrize(
    ("config", "steps"), [(FAST, 25), (ExpertConfig(rule="quantile"), 6)], ids=["proportional", "quantile"]
)
def test_biases_even_out_skewed_experts(tmp_path: Path, config: ExpertConfig, steps: int) -> None:
    balancer = LoadBalancer(stages=False, experts="bias", expert_config=config)
    fit(balancer, steps, skewed, logger=CSVLogger(tmp_path))
    values = violations(balancer)
    assert len(values) == steps
    assert values[0] == pytest.approx(1.0)
    # 64 visits per expert and step: chance alone leaves about 0.2.
    assert sum(values[-4:]) / 4 < 0.4
    (log,) = tmp_path.rglob("metrics.csv")
    columns = log.read_text().splitlines()[0].split(",")
    router = "moe/model.blocks.0.moe.routers.0"
    assert {"moe/max_violation", "moe/worst_max_violation", f"{router}/max_violation", f"{router}/entropy"} <= set(
        columns
    )
    assert balancer.experts is not None
    draw_loads(balancer.experts.shares, tmp_path / "loads.png", title="Loads")
    assert (tmp_path / "loads.png").stat().st_size > 10_000


def test_without_a_method_experts_are_watched_and_left_alone() -> None:
    watching = LoadBalancer(stages=False, experts=())
    fit(watching, 6, skewed)
    assert min(violations(watching)) > 0.9


@pytest.mark.slow
def test_the_auxiliary_loss_evens_out_too() -> None:
    config = ExpertConfig(auxiliary_loss=1.0)
    balancer = LoadBalancer(stages=False, experts="loss", expert_config=config)
    fit(balancer, 60)
    values = violations(balancer)
    assert sum(values[-10:]) < 0.6 * sum(values[:10])


def test_a_resumed_run_has_its_biases_again(tmp_path: Path) -> None:
    """Mixtral has no bias of its own to save, so the callback's state has it; the model's keys stay its own."""
    straight, first, second = (LoadBalancer(stages=False, experts="bias", expert_config=FAST) for _ in range(3))
    expected = fit(straight, 3, max_steps=6)  # two epochs
    keep = ModelCheckpoint(tmp_path, "half", every_n_train_steps=3)
    fit(first, 3, more=[keep], enable_checkpointing=True)
    state = torch.load(tmp_path / "half.ckpt", weights_only=False)
    assert list(state["state_dict"]) == list(expected.weights)
    saved = next(value for name, value in state["callbacks"].items() if name.startswith("LoadBalancer"))
    assert len(saved["experts"]["biases"]) == 4
    fit(second, 3, max_steps=6, ckpt_path=str(tmp_path / "half.ckpt"))
    assert straight.experts is not None
    assert second.experts is not None
    assert second.experts.shares == {step: straight.experts.shares[step] for step in (4, 5, 6)}


def test_biases_move_once_per_optimizer_step() -> None:
    balancer = LoadBalancer(stages=False, experts="bias")
    fit(balancer, 4, accumulate_grad_batches=2, max_steps=2)
    assert balancer.experts is not None
    assert list(balancer.experts.shares) == [1, 2]
    whole = LoadBalancer(stages=False, experts=())
    fit(whole, 2)
    assert whole.experts is not None
    assert whole.experts.shares[1] != balancer.experts.shares[1]  # of two batches, not of one


def test_the_strategys_own_settings_stay() -> None:
    strategy = SkipPipeStrategy(moe=MoEConfig(auxiliary_loss=0.5, capacity_factor=2.0))
    ExpertBalance(("loss", "bias")).prepare(strategy)
    assert strategy.settings.moe == MoEConfig(auxiliary_loss=0.5, capacity_factor=2.0, exact_bias=True)
    strategy = SkipPipeStrategy()
    ExpertBalance(("loss",)).prepare(strategy)
    assert strategy.settings.moe == MoEConfig(auxiliary_loss=0.01)


def test_metrics_by_hand() -> None:
    statistics = {
        "a": RouterStatistics(torch.tensor([3, 1]), 4, 0, 2.0),
        "b": RouterStatistics(torch.tensor([2, 2]), 4, 4, 1.0),
    }
    assert load_metrics(statistics) == {
        "moe/a/max_violation": 0.5,
        "moe/a/entropy": 0.5,
        "moe/b/max_violation": 0.0,
        "moe/b/entropy": 0.25,
        "moe/b/empty_share": 0.5,
        "moe/max_violation": 0.25,
        "moe/worst_max_violation": 0.5,
    }
    assert load_metrics({}) == {}


def test_long_runs_are_thinned_out() -> None:
    balance = ExpertBalance(("bias",))
    for step in range(1, 5 * MAX_REMEMBERED):
        balance._remember(step, {"a": [1.0]})
    assert MAX_REMEMBERED / 2 <= len(balance.shares) <= MAX_REMEMBERED
    assert all(step % balance._every == 0 for step in balance.shares)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"experts": "swaps"},
            "experts='swaps' is unknown; it is one of 'bias', 'loss', 'placement', a tuple of these, or None",
        ),
        ({"stages": False}, "stages=False and experts=None leave nothing to balance"),
        ({"expert_config": FAST}, "expert_config has no effect without experts"),
    ],
)
def test_nonsense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoadBalancer(**arguments)
    with pytest.raises(ValueError, match="rule='best' is unknown; choose one of sign, proportional, quantile"):
        ExpertConfig(rule="best")
    with pytest.raises(ValueError, match=r"rate=0\.1 has no effect with rule='quantile'"):
        ExpertConfig(rule="quantile", rate=0.1)
    with pytest.raises(ValueError, match="rate=0 is out of range"):
        ExpertConfig(rate=0)
    with pytest.raises(ValueError, match="there is nothing to draw"):
        draw_loads({}, "nothing.png")
