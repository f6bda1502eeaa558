"""Mixtures of experts in a pipeline, against the plain Trainer with the same hooks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.optim import AdamW

from skippipe_plugin.moe import BIAS_RULES, Attached, MoEConfig, RouterStatistics, attach
from skippipe_plugin.strategies import PathConfig, SkipPipeStrategy
from tests.unit.moe.families import build

from .experts import Own
from .models import tokens
from .modules import BATCH, LanguageModel, Pretrained, loader
from .support import Run, assert_same_run, train

STEPS = 4
LENGTH = 8


class Watch(Callback):
    """Take the statistics of every step, and move the biases by them if a rule says so."""

    def __init__(self, rule: str | None = None, config: MoEConfig | None = None) -> None:
        self.rule, self.config = rule, config or MoEConfig()
        self.steps: list[dict[str, RouterStatistics]] = []
        self.biases: dict[str, list[float]] = {}
        self._plain: Attached | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(trainer.strategy, SkipPipeStrategy):
            self._plain = attach(pl_module, self.config)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._plain is None:
            routers = trainer.strategy.routers
            self.steps.append(routers.take())
            if self.rule is not None:
                loads = {name: each.loads.tolist() for name, each in self.steps[-1].items()}
                self.biases = routers.update_biases(loads, self.rule, 0.05)
            return
        self.steps.append({name: hook.take() for name, hook in self._plain.hooks.items()})
        for name, hook in self._plain.hooks.items() if self.rule is not None else ():
            router = self._plain.routers[name]
            before = hook.bias(router)
            before = torch.zeros(hook.num_experts) if before is None else before
            hook.set_bias(router, BIAS_RULES[self.rule](before, self.steps[-1][name].loads, 0.05))
            self.biases[name] = hook.bias(router).tolist()

    def loads(self) -> list[dict[str, list[int]]]:
        return [{name: each.loads.tolist() for name, each in sorted(step.items())} for step in self.steps]


def calm(module: nn.Module) -> AdamW:
    """Experts that few tokens reach have gradients near rounding, of which Adam with a smaller eps makes full steps."""
    return AdamW([parameter for parameter in module.parameters() if parameter.requires_grad], lr=1e-2, eps=1e-3)


def make(case: str) -> LightningModule:
    if case == "own":
        return LanguageModel(Own())
    return Pretrained(build(case, num_hidden_layers=4, experts_implementation="eager"), calm)


def run(case: str, devices: int, watch: Watch, strategy: Mapping[str, Any] | None = None, **options: Any) -> Run:
    ids = tokens(BATCH * STEPS, LENGTH)
    data = loader(ids if case == "own" else {"input_ids": ids, "labels": ids})
    given = None if devices == 1 else {"num_microbatches": 4, "moe": watch.config, **(strategy or {})}
    return train(lambda: make(case), data, devices, given, callbacks=[watch], **{"max_steps": STEPS, **options})


@functools.cache
def plain(case: str, rule: str | None = None) -> tuple[Run, Watch]:
    watch = Watch(rule)
    return run(case, 1, watch), watch


def check(case: str, devices: int, rule: str | None = None, **strategy: Any) -> Watch:
    """Compare losses, weights, loads and biases with the plain Trainer's."""
    expected, counted = plain(case, rule)
    watch = Watch(rule)
    assert_same_run(run(case, devices, watch, strategy), expected)
    assert watch.loads() == counted.loads()
    assert counted.loads()[0]
    for name, bias in watch.biases.items():
        assert bias == pytest.approx(counted.biases[name], abs=1e-6)
    return watch


@pytest.mark.parametrize("case", ["mixtral", "own"])
def test_a_pipeline_trains_and_counts_as_one_process(case: str) -> None:
    check(case, 3)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe"])
def test_every_family_trains_and_counts_as_one_process(case: str) -> None:
    check(case, 3)


@pytest.mark.parametrize("strategy", [{"replicas": 2}, {"driver_stage": True}], ids=str)
def test_biases_follow_the_loads_of_all_replicas_and_of_the_driver(strategy: dict[str, Any]) -> None:
    """The biases change which experts are chosen, so equal losses mean equal biases everywhere."""
    watch = check("mixtral", 3, "sign", **strategy)
    assert plain("mixtral", "sign")[0].losses != plain("mixtral")[0].losses
    assert len(watch.biases) == 4


def test_a_models_own_bias_is_updated_and_saved() -> None:
    watch = check("own", 3, "proportional")
    assert watch.biases == {}  # nothing that the model does not save itself
    weights = plain("own", "proportional")[0].weights
    assert any(weights[f"model.blocks.{block}.moe.routers.0.selection_bias"].any() for block in range(4))


def test_biases_of_a_run_can_be_set_in_another() -> None:
    """Only the last batch is trained on by both; before it one of them gets the other's biases."""

    class Given(Watch):
        def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.strategy.routers.set_biases({name: [3.0, 2.0, 0.0, 0.0] for name in names})

    names = list(plain("mixtral")[1].steps[0])
    watch = Given()
    run("mixtral", 3, watch)
    slots = BATCH * LENGTH
    assert watch.loads() == [{name: [slots, slots, 0, 0] for name in names}] * STEPS


def test_tokens_are_counted_where_they_visit() -> None:
    """With a skip ratio a layer counts the microbatches that came by, and only those."""
    visits: list[dict[int, int]] = []

    class Counting(Watch):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            super().on_train_batch_end(trainer, *rest)
            visits.append(trainer.strategy.visit_counts)

    watch = Counting()
    run("mixtral", 3, watch, {"skip_ratio": 0.5, "paths": PathConfig(costs="uniform")})
    assert set(visits[-1].values()) == {2}
    for step, visited in zip(watch.steps, visits, strict=True):
        for name, statistics in step.items():
            stage = int(name.split(".")[3]) // 2 + 1
            assert statistics.num_tokens == visited[stage] * (BATCH // 4) * LENGTH
            assert int(statistics.loads.sum()) == 2 * statistics.num_tokens


def test_what_is_not_taken_adds_up_and_evaluation_does_not_count() -> None:
    class Late(Watch):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if trainer.global_step == STEPS:
                super().on_train_batch_end(trainer, *rest)

    watch, counted, ids = Late(), plain("mixtral")[1], tokens(BATCH * STEPS, LENGTH)
    data = loader({"input_ids": ids, "labels": ids})
    strategy = {"num_microbatches": 4, "moe": MoEConfig()}
    train(
        lambda: make("mixtral"),
        data,
        3,
        strategy,
        val_data=data,
        max_steps=STEPS,
        callbacks=[watch],
        val_check_interval=1,
    )
    (taken,) = watch.steps
    for name, statistics in taken.items():
        assert statistics.num_tokens == STEPS * BATCH * LENGTH
        assert torch.equal(statistics.loads, sum(step[name].loads for step in counted.steps))


def test_the_auxiliary_loss_is_added_where_the_routers_are() -> None:
    """With one microbatch the statistics of the step are those of the whole batch, as in one process."""
    config = MoEConfig(auxiliary_loss=0.5)
    expected = run("mixtral", 1, Watch(config=config))
    found = run("mixtral", 3, Watch(config=config), {"num_microbatches": 1})
    assert_same_run(found, expected)
    assert expected.losses[-1] != plain("mixtral")[0].losses[-1]


def test_the_auxiliary_losses_of_microbatches_make_a_mean() -> None:
    """Four equal microbatches, whose running statistics are those of the whole from the first on."""
    config = MoEConfig(auxiliary_loss=0.5)
    ids = tokens(2, LENGTH).repeat(BATCH * STEPS // 2, 1)
    data: Callable[[], Any] = lambda: loader({"input_ids": ids, "labels": ids})  # noqa: E731

    def fit(devices: int, watch: Watch) -> Run:
        given = None if devices == 1 else {"num_microbatches": 4, "moe": config}
        return train(lambda: make("mixtral"), data(), devices, given, max_steps=STEPS, callbacks=[watch])

    assert_same_run(fit(3, Watch(config=config)), fit(1, Watch(config=config)))


def test_routers_stop_learning_when_told() -> None:
    """In a pipeline as in one process, where the callback below does what the strategy does."""

    class Freeze(Watch):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if self._plain is not None:
                self._plain.begin_step(trainer.global_step)

    config = MoEConfig(freeze_after=2)
    expected = run("mixtral", 1, Freeze(config=config))
    found = run("mixtral", 3, Watch(config=config))
    assert_same_run(found, expected)
    router = "model.model.layers.0.mlp.gate.weight"
    early, late = (run("mixtral", 3, Watch(config=config), max_steps=steps).weights for steps in (2, 3))
    assert torch.equal(found.weights[router], early[router])
    assert torch.equal(found.weights[router], late[router])
    assert not torch.equal(plain("mixtral")[0].weights[router], early[router])
    moved = "model.model.layers.0.mlp.experts.down_proj"
    assert not torch.equal(early[moved], late[moved])


def test_a_worker_that_is_new_gets_the_biases_with_the_next_update() -> None:
    """As after a recovery: here the workers' hooks are given other biases behind the driver's back."""

    class Forgetful(Watch):
        def on_train_batch_end(self, trainer: Trainer, *rest: Any) -> None:
            if len(self.steps) == 1:
                routers = trainer.strategy.routers
                known = dict(routers._biases)
                routers.set_biases({name: [9.0, 0.0, 0.0, 0.0] for name in known})
                routers._biases = known
            super().on_train_batch_end(trainer, *rest)

    watch = Forgetful("sign")
    assert_same_run(run("mixtral", 3, watch), plain("mixtral", "sign")[0])


def test_the_model_is_left_as_it_was() -> None:
    found = run("mixtral", 3, Watch())
    assert not any(module._forward_hooks for module in found.module.modules())
    assert found.module.model.config._experts_implementation == "eager"


@pytest.mark.parametrize(
    ("case", "strategy", "message"),
    [
        ("mixtral", {"moe": MoEConfig(top_k=9)}, "top_k=9 is out of range for model.model.layers.0.mlp.gate"),
        ("mixtral", {"moe": MoEConfig(router="null_experts")}, "needs logits of its own for null experts"),
    ],
)
def test_what_does_not_fit_is_an_error_before_work(case: str, strategy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(case, 3, Watch(), strategy)


def test_a_dense_model_has_no_experts_to_configure() -> None:
    from .models import Transformer

    with pytest.raises(ValueError, match="has no mixture of experts of a known family; leave moe out"):
        train(lambda: LanguageModel(Transformer()), loader(tokens(8)), 3, {"moe": MoEConfig()})


def test_several_drivers_with_stages_of_their_own_are_refused() -> None:
    with pytest.raises(ValueError, match="moe with driver_stage=True takes one driver"):
        SkipPipeStrategy(moe=MoEConfig(), driver_stage=True, drivers=2)
    with pytest.raises(
        TypeError, match=r"moe='sigmoid' is of the wrong type \(str\); it is a MoEConfig such as MoEConfig"
    ):
        SkipPipeStrategy(moe="sigmoid")
