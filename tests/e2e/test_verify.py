"""A step compared with one process: it passes for ordinary modules, and finds what is planted, by name."""

import copy
import logging
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.gradients import GradientWindow
from skippipe_plugin.strategies import SkipPipeStrategy
from tests.grids import all_slow_but

from .models import Transformer, tokens
from .modules import BATCH, Classifier, LanguageModel, Pretrained, loader, momentum, points, two_groups
from .support import assert_same_run, train, trainer_for
from .zoo import gpt2, language

DEPTH = 4


def _language_model(**options: Any) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(Transformer(depth=DEPTH, **options), options.pop("optimizer", None))


def _check(module: Any, batch: Any, strategy: dict[str, Any] | None = None, **options: Any) -> Any:
    trainer = trainer_for(3, {"num_microbatches": 4, **(strategy or {})})
    assert isinstance(trainer.strategy, SkipPipeStrategy)
    return trainer.strategy.check(module, batch, **options)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embedding(x)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


MODULES: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "transformer": (_language_model, lambda: tokens(BATCH)),
    "dropout": (lambda: _language_model(dropout=0.3), lambda: tokens(BATCH)),
    "tied": (lambda: _language_model(tied=True), lambda: tokens(BATCH)),
    "classifier": (lambda: Classifier(Residual(), momentum), lambda: points(BATCH)),
    "groups": (lambda: Classifier(Residual(), two_groups), lambda: points(7)),
    "gpt2": (lambda: Pretrained(gpt2(resid_pdrop=0.1, attn_pdrop=0.1)), lambda: _first(language(BATCH))),
}


def _first(data: Any) -> Any:
    return next(iter(loader(data)))


@pytest.mark.parametrize("case", all_slow_but(MODULES, "transformer", "dropout", "tied", "classifier", "groups"))
def test_ordinary_modules_agree(case: str) -> None:
    make, batch = MODULES[case]
    agreement = _check(make(), batch())
    assert agreement.largest < 1e-7  # in double precision
    assert agreement.num_weights >= DEPTH


@pytest.mark.parametrize("strategy", [{"driver_stage": True}, {"replicas": 2}, {"schedule": "gpipe"}])
def test_settings_agree(strategy: dict[str, Any]) -> None:
    assert _check(_language_model(), tokens(BATCH), strategy, gradient_clip_val=0.1).largest < 1e-7


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_mixed_precision_is_no_difference(precision: str) -> None:
    """It rounds otherwise for a microbatch than for a batch; the step is compared without."""
    assert _check(_language_model(), tokens(BATCH), precision=precision).largest < 1e-7


def test_the_module_and_the_random_state_stay_as_they_are() -> None:
    module = _language_model(dropout=0.3)
    state, draws = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    _check(module, tokens(BATCH))
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), draws)
    assert module.model.drop.p == 0.3
    assert module._trainer is None


def test_a_module_that_no_process_can_train_is_no_difference() -> None:
    class Failing(LanguageModel):
        def training_step(self, batch: Tensor) -> Tensor:
            raise KeyError("my own")

    with pytest.raises(SkipPipeError, match="one process cannot take it: KeyError: 'my own'"):
        _check(Failing(Transformer(depth=DEPTH)), tokens(BATCH))


# ------------------------------------------------------------- planted wrongs


def _lose_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    merge = GradientWindow.merge
    monkeypatch.setattr(GradientWindow, "merge", lambda self, scale: merge(self, scale * 0.5))


def _change_a_remote_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the hand-over, as if what was sent had been altered on its way."""
    from skippipe_plugin.driver.pipeline import Pipeline

    form = Pipeline.load

    def load(self: Any, *args: Any, **kwargs: Any) -> None:
        form(self, *args, **kwargs)
        weights = self.mirror.fetch("weights", range(self.layout.num_blocks))
        name, value = next((name, value) for name, value in weights.items() if value.ndim > 1)
        self.mirror.put("weights", {name: value * 1.01})

    monkeypatch.setattr(Pipeline, "load", load)


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "gradients": (_lose_gradients, r"the (norm of the gradient of|updated) \S*(embedding|positions)\S* is .* in one"),
    "weight": (_change_a_remote_weight, r"the loss is .* and .* in one process. Likely the blocks compute something"),
}


@pytest.mark.parametrize("case", PLANTED)
def test_planted_wrongs_are_found(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, message = PLANTED[case]
    plant(monkeypatch)
    with pytest.raises(SkipPipeError, match=message):
        _check(Classifier(_named(), momentum), points(BATCH))


def _named() -> nn.Module:
    torch.manual_seed(0)
    return Residual()


class Summed(Classifier):
    """Its loss is a sum over the samples."""

    def training_step(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.model(batch["x"]), batch["y"], reduction="sum")


def test_the_way_out_that_is_named_is_one() -> None:
    cut = {"microbatches": "batch", "microbatch_weight": "samples"}  # which is wrong for a sum
    with pytest.raises(SkipPipeError, match=r"the loss is .* a reduction over the batch.* microbatches='stack'"):
        _check(Summed(_named(), momentum), points(BATCH), cut)
    assert _check(Summed(_named(), momentum), points(BATCH), {"microbatches": "stack"}).largest < 1e-7


def test_a_difference_of_batches_is_named() -> None:
    """What looks at the number of samples it gets, and is not found out when it is tried with a few of them."""

    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (2 if len(x) > 4 else 1)

    torch.manual_seed(0)
    net = Residual()
    net.blocks = nn.ModuleList(Sized() for _ in range(DEPTH))
    with pytest.raises(SkipPipeError, match=r"the loss is .* Likely a reduction over the batch.*num_microbatches=1"):
        _check(Classifier(net, momentum), points(BATCH))
    assert _check(Classifier(net, momentum), points(BATCH), {"num_microbatches": 1}).largest < 1e-7


# ---------------------------------------------------------------- verify="first"


def test_a_verified_fit_is_an_ordinary_one(caplog: pytest.LogCaptureFixture) -> None:
    def make() -> LanguageModel:
        return LanguageModel(Transformer(depth=DEPTH), two_groups)

    data = loader(tokens(40), shuffle=True)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        verified = train(make, data, 3, {"num_microbatches": 4, "verify": "first", "verbose": False})
    assert "verified in" in caplog.text
    assert "updated tensors as in one process" in caplog.text
    assert_same_run(verified, train(make, data, 1))


class Fatal(nn.Module):
    """Ends the process that computes it, unless it is this one."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.home = nn.Linear(16, 16), os.getpid()

    def forward(self, x: Tensor) -> Tensor:
        if os.getpid() != self.home:
            os._exit(1)
        return self.linear(x)


def test_a_worker_that_is_lost_while_a_step_is_compared() -> None:
    net = Residual()
    net.blocks = nn.ModuleList(Fatal() for _ in range(DEPTH))
    with pytest.raises(
        SkipPipeError, match=r"could not be compared: worker rank .* is lost\. Nothing was trained"
    ) as said:
        _check(Classifier(net, momentum), points(8))
    assert "checkpoint" not in str(said.value)


def test_a_verified_fit_stops_before_the_first_step() -> None:
    class Sized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (2 if len(x) > 4 else 1)

    net = Residual()
    net.blocks = nn.ModuleList(Sized() for _ in range(DEPTH))
    module = Classifier(net, momentum)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(SkipPipeError, match="the loss is"):
        train(lambda: module, loader(points(16)), 3, {"num_microbatches": 4, "verify": "first"})
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert module.model(torch.ones(2, 8)).shape == (2, 4)


@pytest.mark.parametrize("settings", [{"skip_ratio": 0.5}, {"drivers": 2}])
def test_what_differs_by_design_cannot_be_compared(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* cannot be compared with one process"):
        _check(_language_model(), tokens(BATCH), settings)


def test_an_unknown_setting() -> None:
    with pytest.raises(ValueError, match="verify='always' is unknown"):
        SkipPipeStrategy(verify="always")  # type: ignore[arg-type]
