"""What a run of a program leaves, and whether two runs left the same."""

from __future__ import annotations

import dataclasses
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from skippipe_plugin.driver.capture.batches import BatchError
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.partition import PartitionError
from tests.e2e.support import trainer_for

HANG_S = 60
OURS = (SkipPipeError, BatchError, PartitionError)
MIN_TEXT = 40
"""A refusal shorter than this says neither why not nor what to do."""

MAX_LOSS = 1e5
ROUNDING = {torch.float32: 2e-6}
"""What is single in a double program is held to its own precision."""


class Hang(BaseException):
    """A run made no progress."""


@dataclass
class Left:
    """What a run leaves: values by name, and the objects themselves."""

    values: dict[str, Any] = field(default_factory=dict)
    module: LightningModule | None = None
    trainer: Trainer | None = None
    error: BaseException | None = None


class Watch(Callback):
    """Notes losses and logged values of every batch."""

    def __init__(self) -> None:
        self.losses: list[Any] = []
        self.logged: list[dict[str, Tensor]] = []

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]) if outputs else None)
        self.logged.append(metrics_of(trainer))


def metrics_of(trainer: Trainer) -> dict[str, Tensor]:
    """Return what was logged so far, of its own type: torchmetrics count in float32 whatever they get."""
    return {name: value.detach().clone() for name, value in trainer.callback_metrics.items()}


def run(program: Mapping[str, Any], devices: int, *, jitter: float = 0.0) -> Left:
    """Train a program's module, with a pipeline if ``devices`` is more than one.

    Args:
        program: Its names.
        devices: How many.
        jitter: By what part of themselves its weights begin higher or lower, each by chance.
    """
    left, watch = Left(), Watch()
    strategy = {**program["STRATEGY"], "verbose": False} if devices > 1 else None
    try:
        seed_everything(0, verbose=False)
        left.module = program["Model"]()
        if jitter:
            _shake(left.module, jitter)
        options = {"num_sanity_val_steps": 0, **program["TRAINER"]}
        left.trainer = trainer_for(devices, strategy, callbacks=[watch], **options)
        with limit(HANG_S):
            left.trainer.fit(left.module, program["loader"]())
            note = program["after"](left.trainer, left.module)
        metrics = metrics_of(left.trainer)
        weights = {name: tensor.detach().clone() for name, tensor in left.module.state_dict().items()}
        left.values = {
            "loss": watch.losses,
            "logged": watch.logged,
            "metrics": metrics,
            "note": note,
            "weights": weights,
        }
    except (Exception, Hang) as error:
        left.error = error
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)
    return left


def _shake(module: nn.Module, jitter: float) -> None:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            if not is_lazy(parameter):
                parameter.mul_(1 + jitter * (2 * torch.randint(2, parameter.shape, generator=draw) - 1))


@contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise :class:`Hang` in the main thread after so many seconds, and again until it is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def alarm(*_: object) -> None:
        raise Hang(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds, 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def difference(found: Any, expected: Any, rtol: float, atol: float, at: str = "") -> str:
    """Return where and how two values differ; nothing when they are equal."""
    if isinstance(expected, (Tensor, np.ndarray)):
        return _difference_of_tensors(found, expected, rtol, atol, at)
    if isinstance(expected, bool) or expected is None or isinstance(expected, str):
        return "" if found == expected and type(found) is type(expected) else f"{at}: {found!r} instead of {expected!r}"
    if isinstance(expected, (int, float)):
        same = isinstance(found, (int, float)) and np.isclose(found, expected, rtol, atol, equal_nan=True)
        return "" if same else f"{at}: {found!r} instead of {expected!r}"
    if isinstance(expected, Mapping):
        if not isinstance(found, Mapping) or list(found) != list(expected):
            return (
                f"{at}: the keys {list(found) if isinstance(found, Mapping) else found!r} instead of {list(expected)}"
            )
        parts = (difference(found[key], expected[key], rtol, atol, f"{at}.{key}") for key in expected)
        return next(filter(None, parts), "")
    if isinstance(expected, (list, tuple)):
        if not isinstance(found, (list, tuple)) or len(found) != len(expected):
            return f"{at}: {str(found)[:80]} instead of {str(expected)[:80]} (length)"
        pairs = enumerate(zip(found, expected, strict=True))
        return next(filter(None, (difference(a, b, rtol, atol, f"{at}[{n}]") for n, (a, b) in pairs)), "")
    if dataclasses.is_dataclass(expected):
        return difference(vars(found), vars(expected), rtol, atol, at)
    return "" if type(found) is type(expected) else f"{at}: {type(found).__name__} instead of {type(expected).__name__}"


def _difference_of_tensors(found: Any, expected: Any, rtol: float, atol: float, at: str) -> str:
    if isinstance(found, np.ndarray) != isinstance(expected, np.ndarray) or not isinstance(found, (Tensor, np.ndarray)):
        return f"{at}: {type(found).__name__} instead of {type(expected).__name__}"
    if isinstance(found, Tensor) and found.is_meta:
        return f"{at}: a meta tensor"
    one, other = torch.as_tensor(found), torch.as_tensor(expected)
    if one.device.type != other.device.type:
        return f"{at}: on {one.device} instead of {other.device}"
    one, other = one.cpu(), other.cpu()
    if one.shape != other.shape or one.dtype != other.dtype:
        return f"{at}: {tuple(one.shape)} {one.dtype} instead of {tuple(other.shape)} {other.dtype}"
    rtol = max(rtol, ROUNDING.get(one.dtype, 0.0))
    if torch.allclose(one.double(), other.double(), rtol, atol, equal_nan=True):
        return ""
    worst = (one.double() - other.double()).abs().argmax()
    return f"{at}: {one.flatten()[worst]:.7g} instead of {other.flatten()[worst]:.7g}"


def diverges(left: Left) -> bool:
    """Whether a run's losses grow until they say nothing any more."""
    return any(loss is not None and not abs(loss) < MAX_LOSS for loss in left.values["loss"])


def refusal(left: Left, program: Mapping[str, Any]) -> str:
    """Return what is wrong with how a run ended in an error; nothing when it is a clear refusal."""
    error = left.error
    assert error is not None
    if isinstance(error, Hang):
        return f"hang: {error}"
    own = isinstance(error, OURS)
    if not own:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"raw {type(error).__name__}: {str(error)[:200]} ({where.filename.rsplit('/', 2)[-1]}:{where.lineno})"
    if len(str(error)) < MIN_TEXT:
        return f"an error without a way out: {error}"
    return f"after the refusal {remains}" if (remains := unusable(left, program)) else ""


def unusable(left: Left, program: Mapping[str, Any]) -> str:
    """Return what a failed run left of the model that no user expects: it must be whole and compute."""
    module = left.module
    if module is None:
        return ""
    meta = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if meta:
        return f"{meta[0]} has no values"
    strange = [name for name, part in module.named_modules() if type(part).__module__.startswith("skippipe_plugin")]
    if strange:
        return f"{strange[0]} is still a stand-in"
    try:
        with torch.no_grad(), limit(HANG_S):
            if isinstance(module, LightningModule):
                module._trainer = None  # attached, it could not log here in one process either
            weight = next(each for each in module.parameters() if each.ndim > 1)  # others may have come later
            torch.set_default_dtype(weight.dtype)  # as in its steps
            ids = torch.ones(2, 5, dtype=torch.long, device=weight.device)
            module.eval()(torch.ones(2, 5, 4, dtype=weight.dtype, device=weight.device), ids)
    except (Exception, Hang) as failure:
        if left.trainer is not None and not _fresh_computes(program):
            return ""
        return f"the model does not compute: {type(failure).__name__}: {str(failure)[:150]}"
    finally:
        torch.set_default_dtype(torch.float32)
    return ""


def _fresh_computes(program: Mapping[str, Any]) -> bool:
    """Whether a module that was never trained computes in this way at all."""
    try:
        with torch.no_grad():
            program["Model"]().eval()(torch.ones(2, 5, 4), torch.ones(2, 5, dtype=torch.long))
    except Exception:
        return False
    return True


def leftover(found: nn.Module, expected: nn.Module) -> str:
    """Return what a pipeline left in a module that one process does not leave."""
    for (name, one), (_, other) in zip(found.named_modules(), expected.named_modules(), strict=False):
        if type(one).__name__ != type(other).__name__:
            return f"{name or 'the module'} is a {type(one).__name__} instead of a {type(other).__name__}"
        if extra := sorted(vars(one).keys() - vars(other).keys()):
            return f"{name or 'the module'} has new attributes {extra}"
        for hooks in ("_forward_hooks", "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks"):
            count, right = len(getattr(one, hooks)), len(getattr(other, hooks))
            if count != right:
                return f"{name or 'the module'} has {count} of {hooks} instead of {right}"
        for parameter in one.parameters(recurse=False):
            if type(parameter) is not nn.Parameter:
                return f"a parameter of {name} is a {type(parameter).__name__}"
    return ""
