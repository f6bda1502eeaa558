"""What an optimizer keeps on itself, beside groups and state: workers' optimizers must have the same."""

from __future__ import annotations

import inspect
import types
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine.apart import STEP_APART
from ..engine.errors import SkipPipeError
from ..engine.optimizer import OptimizerPlan, build
from .own_step import REGISTRARS

_VALUES: Final = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_CODE: Final = (types.FunctionType, types.BuiltinFunctionType, type)
_ADDED: Final = frozenset({"step", "zero_grad", "train", "eval", "_opt_called", "_step_count", *REGISTRARS})
"""What schedulers and this package put on an optimizer."""


class _Bare(Optimizer):
    """Has what all have; made of one of torch's classes, it would have torch wrap the step of that one too."""


def own_values(optimizer: Optimizer) -> tuple[str, ...]:
    """Name the attributes that a class beyond torch's has made, and that are plain values: they may change."""
    return tuple(name for name, value in _own(optimizer).items() if _is_plain(value))


def own_code(optimizer: Optimizer) -> tuple[str, ...]:
    """Name the attributes that hold functions or classes, which stay what they are."""
    return tuple(name for name, value in _own(optimizer).items() if isinstance(value, _CODE))


def check_attributes(optimizer: Optimizer, plan: OptimizerPlan) -> None:
    """Raise unless an optimizer that is built from ``plan`` makes by itself what cannot be sent.

    Raises:
        SkipPipeError: It lacks such an attribute.
    """
    rest = {
        name: value for name, value in _own(optimizer).items() if not _is_plain(value) and not isinstance(value, _CODE)
    }
    if not rest:
        return
    built = build(plan, [[nn.Parameter(torch.zeros(2, 2))] for _ in plan.groups])
    for name, value in rest.items():
        if type(built.__dict__.get(name)) is not type(value):
            raise SkipPipeError(
                f"{type(optimizer).__name__} keeps {name!r} on itself, a {type(value).__name__}, which a worker's part "
                "of the optimizer would lack; let the constructor make it from parameter groups and defaults, keep it "
                "in the parameter groups, or train without the pipeline"
            )


def check_step_is_of_class(optimizer: Optimizer) -> None:
    """Raise if ``optimizer.step`` was replaced on the instance: workers call that of the class.

    Raises:
        SkipPipeError: It was.
    """
    step: Any = inspect.unwrap(optimizer.step)
    if getattr(step, "__func__", step) is not inspect.unwrap(type(optimizer).step):
        raise SkipPipeError(
            f"the step of this {type(optimizer).__name__} was replaced on the object, and the workers' parts of the "
            "optimizer have that of the class; override step in a class of your own, or wrap it with functools.wraps"
        )


def _own(optimizer: Optimizer) -> dict[str, Any]:
    if type(optimizer) in STEP_APART:
        return {}
    usual = _Bare([torch.zeros(1, requires_grad=True)], {}).__dict__.keys() | _ADDED
    return {name: value for name, value in optimizer.__dict__.items() if name not in usual}


def _is_plain(value: Any) -> bool:  # Any: whatever the class keeps
    if type(value) in (list, tuple, set):
        return all(_is_plain(each) for each in value)
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(each) for key, each in value.items())
    if isinstance(value, Tensor):
        return not value.is_meta and not isinstance(value, nn.Parameter)
    return isinstance(value, _VALUES)
