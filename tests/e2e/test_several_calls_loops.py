"""Loops of plain torch and of accelerate that call the blocks several times before a backward: as in one process."""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skippipe_plugin import PathConfig, RecoveryPolicy, SkipPipeConfig, TorchPipeline
from skippipe_plugin.driver.pipeline import TRAINING
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.model.spread import SpreadModel
from skippipe_plugin.testing import At, Injector, Kill, Phase
from tests.e2e import loops
from tests.e2e.support import DEVICE
from tests.e2e.test_several_calls import Net
from tests.e2e.transparency.plain_loops import assert_same, run
from tests.grids import all_slow_but, slow

BATCHES = [torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).to(DEVICE) for seed in range(4)]
Losses = Callable[[Any, Tensor], Tensor]
SAID = "are called several times before a backward"


class Model(Net):
    """With targets it returns its loss; it draws and counts on the driver."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.num_calls = 0

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        self.num_calls += 1
        made = self.head(self.encoded(self.norm(x) + 0.01 * self.num_calls))
        return made if targets is None else {"loss": F.mse_loss(made, targets), "made": made}


class Plain(Net):
    """Calls its blocks once, in microbatches."""

    num_calls = 0

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        made = super().forward(x)
        return made if targets is None else {"loss": F.mse_loss(made, targets), "made": made}


class Twice(Model):
    """Calls its blocks twice in a call."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        self.num_calls += 1
        made = self.head(self.encoded(self.norm(x)) + self.encoded(x.flip(1)))
        return made if targets is None else {"loss": F.mse_loss(made, targets), "made": made}


def goal(x: Tensor) -> Tensor:
    return x.sum(1, keepdim=True)


def contrastive(model: Any, x: Tensor) -> Tensor:
    one, other = model(x), model(x.flip(1))
    return F.mse_loss(one, goal(x)) + (one * other).mean()


def own_losses(model: Any, x: Tensor) -> Tensor:
    return model(x, targets=goal(x))["loss"] + 0.5 * model(x.flip(1), targets=goal(x) / 2)["loss"]


def own_and_other(model: Any, x: Tensor) -> Tensor:
    return model(x, targets=goal(x))["loss"] + 0.1 * model(x.flip(1)).pow(2).mean()


def triplet(model: Any, x: Tensor) -> Tensor:
    anchor, near, far = model(x[:4]), model(x[:4] + 0.1), model(x[4:])
    return F.triplet_margin_loss(anchor, near, far, margin=3.0)


def fed_back(model: Any, x: Tensor) -> Tensor:
    first = model(x)
    return F.mse_loss(model(x + first), goal(x)) + first.pow(2).mean()


def bootstrapped(model: Any, x: Tensor) -> Tensor:
    made = model(x)
    with torch.no_grad():
        targets = model(x.flip(1)) + goal(x)
    return F.mse_loss(made, targets)


def evaluated_between(model: Any, x: Tensor) -> Tensor:
    made = model(x)
    model.eval()
    with torch.no_grad():
        targets = model(x.flip(1)) + goal(x)
    model.train()
    return F.mse_loss(made, targets)


def unused(model: Any, x: Tensor) -> Tensor:
    first = model(x)
    return F.mse_loss(model(x.flip(1)), goal(x)) + 0 * first.detach().mean()


def noisy(model: Any, x: Tensor) -> Tensor:
    first = model(x + 0.1 * torch.randn_like(x))
    return F.mse_loss(model(x + 0.1 * torch.randn_like(x)), goal(x)) + first.pow(2).mean()


LOSSES = [
    contrastive,
    own_losses,
    own_and_other,
    triplet,
    fed_back,
    bootstrapped,
    evaluated_between,
    unused,
    noisy,
]
SETTINGS: list[dict[str, Any]] = [{}, {"microbatches": "stack"}, {"num_microbatches": 1}]


def looped(losses: Losses, backward: Callable[[Tensor], object] = Tensor.backward) -> Callable[..., list[float]]:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        seen: list[float] = []
        for x in BATCHES:
            optimizer.zero_grad()
            loss = losses(model, x)
            backward(loss)
            optimizer.step()
            seen.append(float(loss.detach()))
        return [*seen, float(model.num_calls), float(torch.rand(()))]

    return loop


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


@pytest.mark.parametrize(
    "settings", [SETTINGS[0], *(slow(each) for each in SETTINGS[1:])], ids=["auto", "stack", "one"]
)
@pytest.mark.parametrize(
    "losses",
    all_slow_but(LOSSES, contrastive, own_and_other, fed_back, evaluated_between, unused, noisy),
    ids=lambda losses: losses.__name__,
)
def test_several_calls_of_the_model(losses: Losses, settings: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert_same(looped(losses), Model, optimizer=adamw, **settings)
    assert caplog.text.count(SAID) == 1


class Drops(Model):
    """Has dropout around the blocks."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Any:
        return super().forward(F.dropout(x, 0.2, self.training), targets)


@pytest.mark.parametrize("settings", SETTINGS[1:], ids=["stack", "one"])
@pytest.mark.parametrize("losses", [contrastive, slow(own_losses)])
def test_what_runs_once_more_draws_the_same(losses: Losses, settings: dict[str, Any]) -> None:
    assert_same(looped(losses), Drops, optimizer=adamw, **settings)


def alone(model: Any, x: Tensor) -> Tensor:
    return F.mse_loss(model(x), goal(x))


def own_loss(model: Any, x: Tensor) -> Tensor:
    return model(x, targets=goal(x))["loss"]


@pytest.mark.parametrize("settings", all_slow_but(SETTINGS, *SETTINGS[:2]), ids=["auto", "stack", "one"])
@pytest.mark.parametrize("losses", [slow(alone), own_loss, contrastive])
def test_several_calls_of_the_blocks(
    losses: Losses, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert_same(looped(losses), Twice, optimizer=adamw, **settings)
    assert caplog.text.count(SAID) == 1


@pytest.mark.parametrize("losses", [alone, own_loss])
def test_of_one_call_nothing_is_said(losses: Losses, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert_same(looped(losses), Plain, optimizer=adamw)
    assert SAID not in caplog.text
    assert "runs once" not in caplog.text


def each_by_itself(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """Two losses that go back one after the other, the first one first, and then both."""
    seen = []
    for x in BATCHES:
        one, other = model(x), model(x.flip(1))
        F.mse_loss(one, goal(x)).backward(retain_graph=False)
        other.pow(2).mean().backward()
        (own_losses(model, x) / 2).backward()
        seen.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
    return seen


def in_front(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """An encoder in front of the model, and inputs whose gradients are read."""
    torch.manual_seed(1)
    encoder = nn.Linear(4, 4).to(DEVICE)
    own = torch.optim.SGD(encoder.parameters(), lr=0.1)
    seen = []
    for x in BATCHES:
        x = x.clone().requires_grad_()
        encoded = encoder(x)
        loss = (model(encoded) * model(x.flip(1), targets=goal(encoded).detach())["loss"]).mean() + encoded.mean()
        loss.backward()
        seen += [float(loss.detach()), float(x.grad.norm()), float(encoder.weight.grad.norm())]
        for each in (optimizer, own):
            each.step()
            each.zero_grad()
    return seen


def with_evaluation(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
    """A validation between batches, and a loss that is dropped."""
    seen = []
    for x in BATCHES:
        loss = contrastive(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            seen.append(float(alone(model, x)))
        model.train()
        model(x)
        seen.append(float(sum(weight.double().sum() for weight in model.state_dict().values())))
    return seen


@pytest.mark.parametrize("settings", all_slow_but(SETTINGS, *SETTINGS[:2]), ids=["auto", "stack", "one"])
@pytest.mark.parametrize("loop", [each_by_itself, in_front, with_evaluation])
def test_what_loops_do_with_them(loop: Callable[..., list[float]], settings: dict[str, Any]) -> None:
    assert_same(loop, Model, optimizer=adamw, **settings)


def test_in_mixed_precision_that_is_left_before_the_backward() -> None:
    def losses(model: Any, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return contrastive(model, x).float()

    found, expected = (run(looped(losses), piped, Model, adamw, num_microbatches=1) for piped in (True, False))
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("schedule", [pytest.param("gpipe", marks=pytest.mark.slow), "1f1b"])
def test_in_any_layout(schedule: str) -> None:
    assert_same(looped(contrastive), Model, optimizer=adamw, schedule=schedule, num_stages=4)
    assert_same(looped(own_losses), Model, optimizer=adamw, driver_stage=True)


@pytest.mark.parametrize("name", ["contrastive", "own_losses", "later"])
def test_loops_of_accelerate(name: str) -> None:
    def fit(kind: str) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(0)
        losses = {"contrastive": contrastive, "own_losses": own_losses, "later": Later(contrastive)}[name]
        with loops.accelerator(kind, gradient_accumulation_steps=2) as current:
            model = Model()
            model, optimizer = current.prepare(model, adamw(model))
            seen = []
            for x in BATCHES:
                with current.accumulate(model):
                    loss = losses(model, x)
                    current.backward(loss)
                    current.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                seen.append(float(loss.detach()))
            return seen, {name: value.clone() for name, value in current.get_state_dict(model).items()}

    (found, weights), (expected, others) = fit("pipeline"), fit("plain")
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


def test_functions_of_the_loop_that_call_the_model_several_times() -> None:
    def fit(*, piped: bool) -> list[float]:
        torch.manual_seed(0)
        model = Model().to(DEVICE)
        optimizer, seen = adamw(model), []
        pipe = TorchPipeline(model, optimizer, SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False))
        with pipe if piped else contextlib.nullcontext():
            for x in BATCHES:
                loss = pipe.run(lambda x: contrastive(model, x), x) if piped else contrastive(model, x)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                seen.append(float(loss.detach()))
        return seen

    torch.testing.assert_close(torch.tensor(fit(piped=True)), torch.tensor(fit(piped=False)), rtol=1e-5, atol=1e-6)


def test_a_worker_that_is_lost_is_replaced() -> None:
    loop = looped(own_losses)
    with Injector(Kill(At(Phase.TRAINING, nth=5), who=2)) as injector:
        found = run(loop, True, Model, adamw, replicas=2, recovery=RecoveryPolicy(spares=1))
    assert [each.done for each in injector.report] == [True]
    expected = run(loop, False, Model, adamw)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_dropped", [True, False], ids=["dropped", "looked at"])
@pytest.mark.parametrize("losses", [alone, own_loss])
def test_what_nothing_goes_back_through_leaves_calls_cut(
    losses: Losses, is_dropped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    train = SpreadModel.train
    monkeypatch.setattr(
        SpreadModel, "train", lambda *a, **k: (sizes.append(len(getattr(a[1], "sizes", ()))), train(*a, **k))[1]
    )

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        kept = loss = losses(model, BATCHES[0])
        seen = [float(kept.detach())]
        for x in BATCHES:
            if is_dropped:
                kept = loss  # of the batch before, until the new one is there
            loss = losses(model, x)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(float(loss.detach()))
        return seen

    assert_same(loop, Plain, optimizer=adamw)
    assert sizes == [4, 0, 4, 4, 4]


def again_and_again(model: Any, x: Tensor) -> Tensor:
    return F.mse_loss(model(x), goal(x)) + sum(model(x * factor).pow(2).mean() for factor in (1.5, 0.5))


LATE = [contrastive, triplet, fed_back, bootstrapped, evaluated_between, unused, again_and_again]


class Later:
    """Calls that only some batches make, beginning with the third one."""

    def __init__(self, losses: Losses, usual: Losses = alone) -> None:
        self.losses, self.usual, self.num = losses, usual, 0

    def __call__(self, model: Any, x: Tensor) -> Tensor:
        self.num += 1
        return self.usual(model, x) if self.num % 3 else self.losses(model, x)


@pytest.mark.parametrize(
    "settings",
    [SETTINGS[0], *(pytest.param(each, marks=pytest.mark.slow) for each in (*SETTINGS[1:], {"driver_stage": True}))],
    ids=["auto", "stack", "one", "driver"],
)
@pytest.mark.parametrize(
    "losses", all_slow_but(LATE, contrastive, fed_back, again_and_again), ids=lambda losses: losses.__name__
)
def test_calls_that_only_a_later_batch_makes(
    losses: Losses, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        return looped(Later(losses))(model, optimizer)

    with caplog.at_level(logging.WARNING):
        assert_same(loop, Model, optimizer=adamw, **settings)
    assert caplog.text.count(SAID) == 1


@pytest.mark.parametrize("settings", SETTINGS[:2], ids=["auto", "stack"])
def test_of_a_model_that_is_cut(settings: dict[str, Any]) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        return looped(Later(contrastive))(model, optimizer)

    assert_same(loop, Plain, optimizer=adamw, **settings)


def test_of_loops_with_an_encoder_in_front() -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        torch.manual_seed(1)
        encoder, later = nn.Linear(4, 4).to(DEVICE), Later(contrastive)
        seen = []
        for x in BATCHES:
            loss = later(model, encoder(x))
            loss.backward()
            seen += [float(loss.detach()), float(encoder.weight.grad.norm())]
            optimizer.step()
            optimizer.zero_grad()
            encoder.zero_grad()
        return seen

    assert_same(loop, Plain, optimizer=adamw)


def test_what_the_blocks_got_may_not_change_until_their_backward() -> None:
    class Keeps(Plain):
        def encoded(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.entered = self.embed(x) * 1
            return functools.reduce(lambda h, block: block(h, mask), self.blocks, self.entered)

    def losses(model: Any, x: Tensor) -> Tensor:
        made = model(x)
        model.entered.detach().add_(1)
        return F.mse_loss(made, goal(x)) + model(x.flip(1)).pow(2).mean()

    with pytest.raises(SkipPipeError, match="was changed in place"):
        run(looped(Later(losses)), True, Keeps, adamw, num_microbatches=1)


@pytest.mark.parametrize("nth", [pytest.param(3, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_worker_that_is_lost_in_such_a_batch_is_replaced(nth: int) -> None:
    """The third batch has its first call twice, and another one in between."""

    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        return looped(Later(contrastive))(model, optimizer)

    with Injector(Kill(At(Phase.TRAINING, nth=nth), who=2)) as injector:
        found = run(loop, True, Plain, adamw, replicas=2, recovery=RecoveryPolicy(spares=1))
    assert [each.done for each in injector.report] == [True]
    expected = run(loop, False, Plain, adamw)
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(expected[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("losses", [own_losses, own_and_other])
def test_those_beside_a_loss_of_the_models_own_are_refused_where_it_is_cut(losses: Losses) -> None:
    """Its step is over, and gradients are there of which nobody knows yet what they are multiplied with."""
    with pytest.raises(SkipPipeError, match="unless the first batch makes several calls already"):
        run(looped(Later(losses, own_loss)), True, Plain, adamw)


@pytest.mark.parametrize("losses", [own_losses, own_and_other])
def test_those_beside_a_loss_of_a_model_that_runs_once(losses: Losses) -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        return looped(Later(losses, own_loss))(model, optimizer)

    assert_same(loop, Model, optimizer=adamw)


def test_microbatches_of_the_batch_are_refused() -> None:
    with pytest.raises(SkipPipeError, match="cannot be cut by microbatches='batch'"):
        run(looped(contrastive), True, Plain, adamw, microbatches="batch")


def test_a_first_loss_whose_weights_have_changed_is_refused() -> None:
    def loop(model: Any, optimizer: torch.optim.Optimizer) -> list[float]:
        early = own_loss(model, BATCHES[0])
        optimizer.step()
        (early + own_loss(model, BATCHES[1])).backward()
        return []

    with pytest.raises(SkipPipeError, match="earlier call of the model"):
        run(loop, True, Plain, adamw)


@pytest.mark.parametrize("losses", [contrastive, slow(own_losses)])
def test_all_calls_of_a_batch_take_the_same_paths_also_when_costs_become_known(
    losses: Losses, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths: list[list[Any]] = [[]]

    def noting(spread: SpreadModel, *args: Any) -> None:
        choose(spread, *args)
        paths[-1].append(spread.pipeline.whole_schedules[TRAINING].paths)

    def noted(model: Any, x: Tensor) -> Tensor:
        paths.append([])
        return losses(model, x)

    choose = SpreadModel._choose_paths
    monkeypatch.setattr(SpreadModel, "_choose_paths", noting)
    settings: dict[str, Any] = {"num_stages": 3, "skip_ratio": 1 / 3, "paths": PathConfig(costs="measure")}
    run(looped(noted), True, Plain, adamw, **settings)
    assert [len(each) for each in paths[1:]] == [3, 3, 3, 3]
    assert all(len(set(each)) == 1 for each in paths[1:])
