"""Plain torch loops, with neither Lightning nor accelerate: as a pipeline they give what they give in one process."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

from skippipe_plugin import RecoveryPolicy, SkipPipeConfig, SkipPipeError, TorchPipeline
from tests.e2e.models import Transformer, next_token_loss, tokens
from tests.e2e.support import DEVICE
from tests.grids import all_slow_but, slow

CONFIG = SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False)
BATCHES = [tokens(size, seed=seed).to(DEVICE) for seed, size in enumerate([8, 8, 7, 5, 8, 3])]


@dataclass
class Record:
    """What a loop saw, and what it left."""

    losses: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


class OneProcess:
    """The same words, without a pipeline."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        return function(*args)

    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        return clip_grad_norm_(self._model.parameters(), max_norm, norm_type)


Loop = Callable[[nn.Module, torch.optim.Optimizer, Any, Record], None]


def run(
    loop: Loop,
    piped: bool,
    make: Callable[[], nn.Module] = Transformer,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    config: SkipPipeConfig = CONFIG,
) -> Record:
    torch.manual_seed(0)
    record, model = Record(), make().to(DEVICE)
    made = optimizer(model) if optimizer else torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    opened: AbstractContextManager[Any] = (
        TorchPipeline(model, made, config) if piped else contextlib.nullcontext(OneProcess(model))
    )
    with opened as pipeline:
        loop(model, made, pipeline, record)
    record.weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    record.state = made.state_dict()
    for parameter in model.parameters():
        assert not parameter.is_meta
        assert type(parameter) is nn.Parameter
    return record


def assert_same(loop: Loop, **options: Any) -> Record:
    found, expected = run(loop, True, **options), run(loop, False, **options)
    assert len(set(expected.losses)) > 1
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(torch.tensor(found.seen), torch.tensor(expected.seen), rtol=1e-4, atol=1e-6)
    assert list(found.weights) == list(expected.weights)
    for name, weight in expected.weights.items():
        torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert found.state["param_groups"] == expected.state["param_groups"]
    for number, state in expected.state["state"].items():
        torch.testing.assert_close(found.state["state"][number], state, rtol=1e-3, atol=1e-5)
    return found


# ------------------------------------------------------------------ loops, as torch's tutorials write them


def ordinary(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    for batch in BATCHES:
        optimizer.zero_grad()
        loss = next_token_loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        record.losses.append(loss.item())


def with_function(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    for batch in BATCHES:
        loss = pipeline.run(lambda ids: next_token_loss(model(ids), ids), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(loss.item())


def with_dict(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    def step(ids: Tensor) -> dict[str, Tensor]:
        logits = model(ids)
        return {"loss": next_token_loss(logits, ids), "hits": (logits.argmax(-1) == ids).sum(), "logits": logits}

    for batch in BATCHES:
        result = pipeline.run(step, batch)
        result["loss"].backward()
        record.seen += [float(result["hits"]), float(result["logits"].detach().abs().sum())]
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(result["loss"].item())


def clipped(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    for batch in BATCHES:
        loss = next_token_loss(model(batch), batch)
        loss.backward()
        record.seen.append(float(pipeline.clip_grad_norm_(0.3)))
        optimizer.step()
        model.zero_grad()
        record.losses.append(loss.item())


def clipped_by_torch(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    for index, batch in enumerate(BATCHES):
        loss = next_token_loss(model(batch), batch)
        loss.backward()
        record.seen.append(float(clip_grad_norm_(model.parameters(), 0.3)))
        if index % 2:
            clip_grad_value_(model.parameters(), 0.01)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        record.losses.append(loss.item())


def accumulated(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    for index, batch in enumerate(BATCHES):
        loss = pipeline.run(lambda ids: next_token_loss(model(ids), ids), batch) / 3
        loss.backward()
        if index % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        record.losses.append(loss.item())


def looked_at(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    """Gradients are there as soon as ``backward`` has returned, here and in the blocks."""
    for batch in BATCHES:
        loss = next_token_loss(model(batch), batch)
        loss.backward()
        for name in ("embedding.weight", "blocks.4.mlp.0.weight", "head.weight"):
            record.seen.append(float(model.get_parameter(name).grad.norm()))
        optimizer.step()
        assert model.embedding.weight.grad is not None
        optimizer.zero_grad()
        assert model.embedding.weight.grad is None
        assert model.blocks[4].mlp[0].weight.grad is None
        record.losses.append(loss.item())


def evaluated(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for batch in BATCHES:
        model.train()
        loss = next_token_loss(model(batch), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        record.losses.append(loss.item())
        model.eval()
        with torch.no_grad():
            record.seen.append(float(next_token_loss(model(batch), batch)))
            record.seen.append(float(pipeline.run(lambda ids: next_token_loss(model(ids), ids), batch)))
        with torch.inference_mode():
            record.seen.append(float(model(batch).sum()))


def by_closure(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    for batch in BATCHES:

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = next_token_loss(model(batch), batch)
            loss.backward()
            return loss

        record.losses.append(optimizer.step(closure).item())


def compared(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    """A loss that compares the samples of the batch, and a batch whose loss is dropped."""
    for batch in BATCHES:
        logits = model(batch)
        vectors = functional.normalize(logits.mean(1), dim=-1)
        loss = functional.cross_entropy(vectors @ vectors.T * 5, torch.arange(len(batch), device=DEVICE))
        if len(batch) != 5:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        record.losses.append(loss.item())


def in_bfloat16(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    for batch in BATCHES[:2]:
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = next_token_loss(model(batch), batch)
        loss.backward()
        record.seen.append(float(model.blocks[1].mlp[0].weight.grad.dtype == torch.float32))
        record.losses.append(round(loss.item(), 1))
        optimizer.zero_grad()


def scaled(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
    """``torch.amp``'s loop; unscaling reads all gradients."""
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    for index, batch in enumerate(BATCHES):
        if index % 2:
            loss = pipeline.run(lambda ids: next_token_loss(model(ids), ids), batch)
        else:
            loss = next_token_loss(model(batch), batch)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        record.seen.append(float(clip_grad_norm_(model.parameters(), 0.3)))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        record.losses.append(loss.item())


LOOPS = (
    *(ordinary, with_function, with_dict, clipped, clipped_by_torch, accumulated, looked_at, evaluated, by_closure),
    *(compared, in_bfloat16, scaled),
)


@pytest.mark.parametrize(
    "loop",
    all_slow_but(LOOPS, ordinary, clipped, accumulated, evaluated, scaled),
    ids=lambda loop: loop.__name__,
)
def test_a_loop_gives_what_it_gives_in_one_process(loop: Loop) -> None:
    assert_same(loop)


@pytest.mark.parametrize(
    "settings",
    [
        {"driver_stage": True, "num_stages": 3},
        {"microbatches": "stack"},
        {"num_microbatches": 1},
        {"schedule": "gpipe"},
    ],
    ids=lambda settings: ", ".join(settings),
)
@pytest.mark.parametrize("loop", [slow(ordinary), with_function], ids=lambda loop: loop.__name__)
def test_settings(loop: Loop, settings: dict[str, Any]) -> None:
    assert_same(loop, config=SkipPipeConfig(**{"num_stages": 2, "num_microbatches": 4, "verbose": False, **settings}))


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda model: torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, nesterov=True),
        lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, eps=1e-3),
        lambda model: torch.optim.AdamW(
            [
                {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
                {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0, "lr": 3e-3},
            ],
            lr=1e-2,
            eps=1e-4,
        ),
    ],
    ids=["sgd", "rmsprop", "groups"],
)
def test_optimizers(optimizer: Callable[[nn.Module], torch.optim.Optimizer]) -> None:
    assert_same(ordinary, optimizer=optimizer)


def test_a_state_dict_saved_in_the_middle_resumes_either_way(tmp_path: Path) -> None:
    """Three batches, saved; the other three by a fresh process or pipeline from the file."""

    def first(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        train(model, optimizer, record, BATCHES[:3])
        states = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        if isinstance(pipeline, TorchPipeline):
            states["pipeline"] = pipeline.state_dict()
        torch.save(states, file)

    def second(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        states = torch.load(file)
        model.load_state_dict(states["model"])
        optimizer.load_state_dict(states["optimizer"])
        if isinstance(pipeline, TorchPipeline) and "pipeline" in states:
            pipeline.load_state_dict(states["pipeline"])
            assert pipeline.state_dict()["optimizer_steps"] == 3
        train(model, optimizer, record, BATCHES[3:])

    def train(model: Any, optimizer: Any, record: Record, batches: list[Tensor]) -> None:
        for batch in batches:
            loss = next_token_loss(model(batch), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())

    expected = run(ordinary, False)
    for saves in (True, False):
        file = tmp_path / f"{saves}.pt"
        run(first, saves)
        for resumes in (True, False):
            found = run(second, resumes, config=SkipPipeConfig(num_stages=1, num_microbatches=4, verbose=False))
            torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses[3:]))
            for name, weight in expected.weights.items():
                torch.testing.assert_close(found.weights[name], weight, rtol=1e-4, atol=1e-5)


def test_one_after_the_other_and_the_loop_between_them() -> None:
    """A model may enter a pipeline in the middle of its training, leave it, and enter another."""
    torch.manual_seed(0)
    model, plain = Transformer().to(DEVICE), Transformer().to(DEVICE)
    plain.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(each.parameters(), lr=1e-2, eps=1e-4) for each in (model, plain)]
    records = [Record(), Record()]
    for piped in (False, True, False, True):
        with TorchPipeline(model, optimizers[0], CONFIG) if piped else contextlib.nullcontext():
            ordinary(model, optimizers[0], None, records[0])
        ordinary(plain, optimizers[1], None, records[1])
    torch.testing.assert_close(torch.tensor(records[0].losses), torch.tensor(records[1].losses), rtol=1e-4, atol=1e-6)


def test_an_optimizer_that_the_pipeline_does_not_know_steps_on_what_it_fetches() -> None:
    torch.manual_seed(0)
    model, record = Transformer().to(DEVICE), Record()
    with TorchPipeline(model, None, CONFIG):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        ordinary(model, optimizer, None, record)
    expected = run(ordinary, False)
    torch.testing.assert_close(torch.tensor(record.losses), torch.tensor(expected.losses))
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, expected.weights[name], rtol=1e-4, atol=1e-5)


def test_two_models_at_once() -> None:
    """A loss of both outputs, and each with an optimizer of its own."""

    def train(piped: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        models = [Transformer().to(DEVICE), Transformer().to(DEVICE)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        losses = []
        with contextlib.ExitStack() as stack:
            for model, optimizer in zip(models, optimizers, strict=True):
                if piped:
                    stack.enter_context(TorchPipeline(model, optimizer, CONFIG))
            for batch in BATCHES[:3]:
                loss = next_token_loss(models[0](batch) + models[1](batch), batch)
                loss.backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.item())
        return losses, [weight for model in models for weight in model.state_dict().values()]

    (found, weights), (expected, others) = train(True), train(False)
    assert found == pytest.approx(expected, rel=1e-5)
    torch.testing.assert_close(weights, others, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("in_function", [slow(False), True])
def test_a_worker_that_is_lost_is_replaced(in_function: bool) -> None:
    """Between two steps, and between the forwards of a step and its backward."""

    def loop(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        def lose(rank: int) -> None:
            if isinstance(pipeline, TorchPipeline):
                os.kill(pipeline.worker_pids[rank], signal.SIGKILL)

        for index, batch in enumerate(BATCHES):
            if index == 2:
                lose(1)
            if in_function:
                loss = pipeline.run(lambda ids: next_token_loss(model(ids), ids), batch)
            else:
                loss = next_token_loss(model(batch), batch)
            if index == 4:
                lose(3)  # of the other stage, whatever the first one is up to
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())

    policy = RecoveryPolicy(spares=1)
    assert_same(
        loop, config=SkipPipeConfig(num_stages=2, num_microbatches=4, replicas=2, verbose=False, recovery=policy)
    )


# ------------------------------------------------------------------ what cannot be


@contextlib.contextmanager
def opened(**settings: Any) -> Iterator[tuple[Any, Any, TorchPipeline]]:
    torch.manual_seed(0)
    model = Transformer().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with TorchPipeline(model, optimizer, CONFIG) as pipeline:
        yield model, optimizer, pipeline
        loss = next_token_loss(model(BATCHES[0]), BATCHES[0])  # the next batch trains
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_an_error_in_the_loop_leaves_the_model_whole() -> None:
    model = Transformer().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ZeroDivisionError), TorchPipeline(model, optimizer, CONFIG):
        model(BATCHES[0]).detach().sum().item() / 0
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model(BATCHES[0]).shape == (8, 8, 32)
    assert "forward" not in vars(model)


def test_a_part_of_the_model_is_no_step() -> None:
    with opened() as (model, _, _):
        hidden = model.embedding(BATCHES[0])
        with pytest.raises(SkipPipeError, match=r"in a loop of your own: by calling the whole model"):
            nn.Sequential(*model.blocks)(hidden)


def test_two_backwards_for_one_call_are_refused() -> None:
    with opened() as (model, optimizer, _):
        loss = next_token_loss(model(BATCHES[0]), BATCHES[0])
        loss.backward(retain_graph=True)
        with pytest.raises(SkipPipeError, match="added already"):
            loss.backward()
        optimizer.zero_grad()


def test_a_backward_that_fails_leaves_the_next_one_right() -> None:
    def loop(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        logits = model(BATCHES[1])
        logits.register_hook(lambda gradient: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next_token_loss(logits, BATCHES[1]).backward()
        optimizer.zero_grad()
        ordinary(model, optimizer, pipeline, record)

    assert_same(loop)


def test_a_loss_that_the_batch_alone_has_is_refused_with_a_way_out() -> None:
    def loss_of(model: Any, ids: Tensor) -> Tensor:
        return model(ids).std()

    def in_the_loop(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        for batch in BATCHES[:3]:
            loss = loss_of(model, batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())

    def in_run(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        for batch in BATCHES[:3]:
            loss = pipeline.run(lambda ids: loss_of(model, ids), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())

    cut = SkipPipeConfig(num_stages=2, num_microbatches=4, microbatches="batch", verbose=False)
    with pytest.raises(SkipPipeError, match="does not follow from theirs"):
        run(in_run, True, config=cut)
    assert_same(in_the_loop, config=cut)
    assert_same(in_run)


def test_float16_is_scaled_in_the_loop_or_refused() -> None:
    def loop(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**12)
        for batch in BATCHES[:3]:
            with torch.autocast(DEVICE.type, dtype=torch.float16):
                if isinstance(pipeline, TorchPipeline):
                    with pytest.raises(SkipPipeError, match="goes back before a GradScaler can scale it"):
                        pipeline.run(lambda ids: next_token_loss(model(ids), ids), batch)
                loss = next_token_loss(model(batch), batch)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            record.losses.append(loss.item())

    found, expected = run(loop, True), run(loop, False)
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected.losses), rtol=1e-3, atol=0)


def test_parameters_that_are_no_part_of_the_model() -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.5))

        def forward(self, logits: Tensor, ids: Tensor) -> Tensor:
            return next_token_loss(logits * self.scale, ids)

    criterion: Any = None

    def both(model: nn.Module) -> torch.optim.Optimizer:
        nonlocal criterion
        criterion = Criterion().to(DEVICE)
        return torch.optim.SGD([*model.parameters(), *criterion.parameters()], lr=0.1)

    def loop(model: Any, optimizer: Any, pipeline: Any, record: Record) -> None:
        if isinstance(pipeline, TorchPipeline):
            with pytest.raises(SkipPipeError, match="1 parameters that are no part of the model"):
                pipeline.run(lambda ids: criterion(model(ids), ids), BATCHES[0])
        for batch in BATCHES:
            loss = criterion(model(batch), batch)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())
        record.seen.append(criterion.scale.item())

    assert_same(loop, optimizer=both)


def test_outside_of_the_context() -> None:
    pipeline = TorchPipeline(Transformer(), None, CONFIG)
    for call in (lambda: pipeline.run(print), lambda: pipeline.clip_grad_norm_(1.0), pipeline.state_dict):
        with pytest.raises(SkipPipeError, match="the pipeline is not open"):
            call()
    pipeline.close()


def test_a_wrapped_model() -> None:
    with pytest.raises(SkipPipeError, match=r"wrapped in DataParallel.*model\.module"):
        TorchPipeline(nn.DataParallel(Transformer()))


def test_it_needs_neither_lightning_nor_accelerate() -> None:
    code = (
        "import sys; from skippipe_plugin import RecoveryPolicy, SkipPipeConfig, TorchPipeline;"
        "print([name for name in ('lightning', 'lightning_fabric', 'accelerate') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
