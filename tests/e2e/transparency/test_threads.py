"""What a step enters before the blocks and leaves after them, and what it holds meanwhile, is as in one process."""

import asyncio
import contextlib
import contextvars
import io
import signal
import sqlite3
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import AdvancedProfiler, PyTorchProfiler, SimpleProfiler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from skippipe_plugin.driver.capture import greenlets, os_threads, patience
from skippipe_plugin.engine.errors import SkipPipeError
from tests.e2e.modules import loader, points
from tests.e2e.support import Run, assert_same_run, train, trainer_for
from tests.grids import all_slow_but, slow

pytest.importorskip("greenlet")

PIPELINE = {"num_microbatches": 4, "verbose": False}
DEPTH: contextvars.ContextVar[int] = contextvars.ContextVar("depth", default=0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, h: Tensor) -> Tensor:
        return h + torch.tanh(self.linear(h))


class Within(LightningModule):
    """Calls its blocks within a context."""

    def __init__(self, context: Callable[["Within"], AbstractContextManager[Any]]) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.context = context
        self.seen: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h)

    def loss(self, batch: Any) -> Tensor:
        with self.context(self):
            logits = self(batch["x"])
        return F.cross_entropy(logits.float(), batch["y"])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, _: int) -> None:
        self.log("val", self.loss(batch))

    def configure_optimizers(self) -> SGD:
        return SGD(self.parameters(), lr=0.1)


def run(context: Callable[[Within], AbstractContextManager[Any]], devices: int, **options: Any) -> Run:
    strategy = PIPELINE | options.pop("strategy", {}) if devices > 1 else None
    data = loader(points(24))
    return train(partial(Within, context), data, devices, strategy, max_steps=3, val_data=data, **options)


@contextlib.contextmanager
def keeps(value: Callable[[], Any], inside: AbstractContextManager[Any]) -> Iterator[None]:
    """What ``value`` says within ``inside`` does not change while others run, and is what it was afterwards."""
    before = value()
    with inside:
        within = value()
        yield
        assert value() == within != before
    assert value() == before


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    previous = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.alarm(20)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


@contextlib.contextmanager
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@contextlib.contextmanager
def matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def depth(_: Within) -> Iterator[None]:
    token = DEPTH.set(DEPTH.get() + 1)
    assert DEPTH.get() == 1
    yield
    DEPTH.reset(token)


@contextlib.contextmanager
def local(module: Within) -> Iterator[None]:
    """Only the thread that has made the module knows the value."""
    if not module.seen:
        module.seen.append(threading.local())
        module.seen[0].count = 0
    module.seen[0].count += 1
    yield
    module.seen[0].count -= 1


@contextlib.contextmanager
def database(module: Within) -> Iterator[None]:
    if not module.seen:
        module.seen.append(sqlite3.connect(":memory:"))
        module.seen[0].execute("create table steps (number integer)")
    module.seen[0].execute("insert into steps values (1)")
    yield
    assert module.seen[0].execute("select count(*) from steps").fetchone()[0] > 0


class Functions(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def sizes() -> tuple[int, int]:
    return torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack()


def hooks() -> Any:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def sdp() -> tuple[Any, ...]:
    return torch.backends.cuda.flash_sdp_enabled(), tuple(torch._C._get_sdp_priority_order())


def kernel(**options: Any) -> AbstractContextManager[Any]:
    return torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH], **options)


LOCKS: dict[str, Any] = {"reentrant": threading.RLock()}
CONTEXTS: dict[str, Callable[[Within], AbstractContextManager[Any]]] = {
    "reentrant_lock": lambda _: LOCKS["reentrant"],
    "sqlite": database,
    "thread_local": local,
    "alarm": lambda _: keeps(lambda: signal.getsignal(signal.SIGALRM), alarm()),
    "context_variable": depth,
    "sdpa_kernel": lambda _: keeps(sdp, kernel()),
    "sdpa_kernel_with_priority": lambda _: keeps(sdp, kernel(set_priority=True)),
    "sdp_kernel": lambda _: keeps(sdp, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)),
    "default_dtype": lambda _: keeps(torch.get_default_dtype, default_dtype()),
    "matmul_precision": lambda _: keeps(torch.get_float32_matmul_precision, matmul_precision()),
    "default_device": lambda _: keeps(sizes, torch.device("cpu")),
    "anomaly": lambda _: keeps(torch.is_anomaly_enabled, torch.autograd.detect_anomaly()),
    "record_function": lambda _: torch.profiler.record_function("forward"),
    "catch_warnings": lambda _: keeps(lambda: id(warnings.filters), warnings.catch_warnings()),
    "stdout": lambda _: keeps(lambda: id(__import__("sys").stdout), contextlib.redirect_stdout(io.StringIO())),
    "save_on_cpu": lambda _: keeps(hooks, torch.autograd.graph.save_on_cpu()),
    "fork_rng": lambda _: torch.random.fork_rng(),
    "deterministic": lambda _: torch.backends.mkldnn.flags(enabled=False),
}
"""Each differs when microbatches leave it in another order than they entered it, or do so in another thread."""


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(
    "name",
    all_slow_but(CONTEXTS, "reentrant_lock", "sqlite", "context_variable", "default_dtype", "save_on_cpu"),
)
def test_what_is_entered_around_the_blocks_is_kept(name: str) -> None:
    assert_same_run(run(CONTEXTS[name], 3), run(CONTEXTS[name], 1))


@pytest.mark.parametrize("settings", [{"driver_stage": True}, {"num_microbatches": 1}, slow({"schedule": "gpipe"})])
@pytest.mark.parametrize("name", ["sqlite", "save_on_cpu", slow("catch_warnings")])
def test_it_is_kept_in_other_pipelines(name: str, settings: dict[str, Any]) -> None:
    assert_same_run(run(CONTEXTS[name], 3, strategy=settings), run(CONTEXTS[name], 1))


def kept(tensor: Tensor) -> Tensor:
    return tensor


ON_EVERY_OPERATION: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "Functions": Functions,
    "Dispatches": Dispatches,
    "saved_tensors_hooks": lambda: torch.autograd.graph.saved_tensors_hooks(kept, kept),
    "FlopCounterMode": lambda: FlopCounterMode(display=False),
}


@pytest.mark.parametrize("name", ON_EVERY_OPERATION)
def test_what_would_act_on_every_operation_of_the_blocks_is_refused(name: str) -> None:
    with pytest.raises(SkipPipeError, match=f"{name} is switched on where the blocks from blocks.0 on are called"):
        run(lambda _: ON_EVERY_OPERATION[name](), 3)


@pytest.mark.parametrize("name", ON_EVERY_OPERATION)
def test_it_may_be_entered_before_or_after_the_blocks(name: str) -> None:
    class After(Within):
        def training_step(self, batch: Any, _: int) -> Tensor:
            with ON_EVERY_OPERATION[name]():
                x = batch["x"] * 2
            logits = self(x)
            with ON_EVERY_OPERATION[name]():
                return F.cross_entropy(logits * 2, batch["y"])

    plain, piped = (
        train(lambda: After(lambda _: contextlib.nullcontext()), loader(points(24)), devices, settings, max_steps=3)
        for devices, settings in ((1, None), (3, PIPELINE))
    )
    assert_same_run(piped, plain)


def test_autocast_around_the_blocks_is_kept() -> None:
    def mixed(_: Within) -> AbstractContextManager[Any]:
        return keeps(lambda: torch.is_autocast_enabled("cpu"), torch.autocast("cpu", torch.bfloat16))

    assert_same_run(run(mixed, 3), run(mixed, 1), rtol=0.03, weights_rtol=0.1, weights_atol=0.01)


class Loops(Within):
    """Calls the model in an event loop of its own."""

    async def ask(self, x: Tensor) -> Tensor:
        await asyncio.sleep(0)
        return self(x)

    def training_step(self, batch: Any, _: int) -> Tensor:
        return F.cross_entropy(asyncio.run(self.ask(batch["x"])), batch["y"])


def test_an_event_loop_around_the_blocks() -> None:
    data = loader(points(24))
    plain, piped = (
        train(partial(Loops, contextlib.nullcontext), data, devices, PIPELINE if devices > 1 else None, max_steps=3)
        for devices in (1, 3)
    )
    assert_same_run(piped, plain)


class Counted(Within):
    """Leaves a context variable set."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        self.seen.append(DEPTH.get())
        DEPTH.set(index + 1)
        return self.loss(batch)


def test_what_a_step_leaves_set_is_found_by_the_next() -> None:
    def fit() -> Run:
        return train(partial(Counted, lambda _: contextlib.nullcontext()), loader(points(24)), 3, PIPELINE, max_steps=3)

    assert contextvars.copy_context().run(fit).module.seen == [0, 1, 2]


class LogsIndex(Within):
    """Logs a number, which gets the default dtype, after what does not clean up when it ends in an error."""

    def __init__(self) -> None:
        super().__init__(lambda _: default_dtype())

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = self.loss(batch)
        self.log("index", index)
        return loss

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.trainer.callback_metrics["index"].dtype)


class FailsOnParts(LogsIndex):
    """Takes no part of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        assert len(x) == 8
        return out


class Alternates(LogsIndex):
    """Leaves another default dtype than it finds."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        single = torch.get_default_dtype() == torch.float32
        torch.set_default_dtype(torch.float64 if single else torch.float32)
        return loss


@pytest.mark.parametrize("kind", [LogsIndex, FailsOnParts, Alternates])
def test_runs_that_are_given_up_leave_nothing_switched_on(kind: type[LogsIndex]) -> None:
    """They are asked how the batch can be cut, or tried on parts of it, and only then run for good."""

    def fit(devices: int) -> Run:
        strategy = PIPELINE if devices > 1 else None
        try:
            return train(kind, loader(points(24)), devices, strategy, max_steps=3, precision="32-true")
        finally:
            torch.set_default_dtype(torch.float32)

    plain, piped = fit(1), fit(3)
    assert_same_run(piped, plain)
    assert piped.module.seen == plain.module.seen


PROFILERS: dict[str, Callable[[], Any]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": partial(PyTorchProfiler, emit_nvtx=False, schedule=None),
}


def section(module: Within) -> AbstractContextManager[Any]:
    return module.trainer.profiler.profile("forward")


@pytest.mark.parametrize("kind", all_slow_but(PROFILERS, "advanced", "pytorch"))
def test_a_section_of_the_trainers_profiler_around_the_blocks(kind: str, tmp_path: Any) -> None:
    options = {"default_root_dir": tmp_path}
    found = run(section, 3, profiler=PROFILERS[kind](), **options)
    assert_same_run(found, run(section, 1, profiler=PROFILERS[kind](), **options))
    if kind == "simple":
        assert found.trainer.profiler.recorded_durations["forward"]
    assert "start" not in vars(found.trainer.profiler)


def test_a_section_that_is_entered_twice_is_refused_as_in_one_process() -> None:
    @contextlib.contextmanager
    def twice(module: Within) -> Iterator[None]:
        with section(module), section(module):
            yield

    for devices in (1, 3):
        with pytest.raises(ValueError, match=r"already started|never started"):
            run(twice, devices, profiler="simple")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LOCK_S", 0.5)
    monkeypatch.setattr(patience, "SLEEP_S", 1.0)
    for module in (greenlets, os_threads):
        monkeypatch.setattr(module, "_LOOKS_EVERY_S", 0.1)


@contextlib.contextmanager
def polled(lock: Any) -> Iterator[None]:
    while not lock.acquire(blocking=False):
        time.sleep(0.01)
    try:
        yield
    finally:
        lock.release()


BLOCKING: dict[str, Callable[[], Any]] = {
    "lock": threading.Lock,
    "semaphore": partial(threading.Semaphore, 1),
    "condition": lambda: threading.Condition(threading.Lock()),
    "polled": threading.Lock,
}


def holding(kind: str) -> Callable[[Any], AbstractContextManager[Any]]:
    lock = BLOCKING[kind]()
    return lambda _: polled(lock) if kind == "polled" else lock


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("in_threads", [False, True], ids=["greenlets", "threads"])
@pytest.mark.parametrize("kind", all_slow_but(BLOCKING, "lock", "polled"))
def test_a_step_that_waits_for_another_is_found(kind: str, in_threads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greenlets, "AVAILABLE", not in_threads)
    context = holding(kind)
    with pytest.raises(SkipPipeError, match=r"has waited for \d+ s outside of the blocks(.|\n)*in loss"):
        run(context, 3)
    with context(None):
        pass  # whoever held it was unwound
    assert_same_run(run(context, 3, strategy={"num_microbatches": 1}), run(context, 1))  # the way out


@pytest.mark.slow  # it waits whenever it is asked
@pytest.mark.usefixtures("impatient")
def test_a_step_that_works_or_waits_alone_is_not_disturbed() -> None:
    @contextlib.contextmanager
    def slow(module: Within) -> Iterator[None]:
        if len(module.seen) == 0:
            time.sleep(1.5)  # nobody else waits
        end_s = time.process_time() + 0.8
        while len(module.seen) == 1 and time.process_time() < end_s:
            pass
        module.seen.append(1)
        yield

    assert_same_run(run(slow, 3), run(slow, 1))


def test_after_a_blocked_step_the_model_is_whole(impatient: None) -> None:
    context = holding("lock")
    module = Within(context)
    with pytest.raises(SkipPipeError, match="outside of the blocks"):
        trainer_for(3, PIPELINE, max_steps=1).fit(module, loader(points(24)))
    assert not any(hasattr(parameter, "is_remote") for parameter in module.parameters())
    assert torch.isfinite(module(torch.randn(2, 8))).all()
