"""The optimizer of a stage's parameters: the user's class with the user's groups, on the rank that holds them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .errors import SkipPipeError

ParameterKey = tuple[int, str]
"""A remote parameter's name: the number of its block in the stack, and its name in the block."""

Hyperparameters = dict[str, Any]  # Any: the optimizer class defines them


@dataclass(frozen=True, slots=True)
class OptimizerPlan:
    """How to build a remote part of the driver's optimizer."""

    cls: type[Optimizer]
    defaults: Hyperparameters
    groups: tuple[tuple[ParameterKey, ...], ...]
    """By parameter group of the driver's optimizer: its remote parameters, of all stages."""


class StageOptimizer:
    """The part of the user's optimizer that steps the parameters of one rank's stages."""

    def __init__(self, plan: OptimizerPlan, parameters: Mapping[ParameterKey, nn.Parameter]) -> None:
        self._members = [[key for key in group if key in parameters] for group in plan.groups]
        self._parameters = parameters
        groups = [{"params": [parameters[key] for key in members]} for members in self._members]
        self._optimizer = _build(plan, groups) if any(self._members) else None

    def step(self, hyperparameters: Sequence[Hyperparameters], lr_factor: float = 1.0) -> None:
        """Take one step with the driver's current hyperparameters, by group, the learning rate times a factor."""
        if self._optimizer is None:
            return
        for group, values in zip(self._optimizer.param_groups, hyperparameters, strict=True):
            group.update(values)
            if lr_factor != 1.0 and "lr" in group:
                group["lr"] = group["lr"] * lr_factor  # of the driver's rate, so it never compounds
        self._optimizer.step()

    def state(self) -> dict[ParameterKey, dict[str, Any]]:
        """Return each parameter's optimizer state as the optimizer names it; tensors are not copied."""
        if self._optimizer is None:
            return {}
        state = self._optimizer.state
        keys = [key for members in self._members for key in members]
        return {key: dict(state[self._parameters[key]]) for key in keys if self._parameters[key] in state}

    def load_state(self, state: Mapping[ParameterKey, Mapping[str, Any]]) -> None:
        """Take over optimizer state, with the casts that ``Optimizer.load_state_dict`` makes."""
        if self._optimizer is None:
            return
        keys = [key for members in self._members for key in members]
        own = self._optimizer.state_dict()
        own["state"] = {index: dict(state[key]) for index, key in enumerate(keys) if key in state}
        self._optimizer.load_state_dict(own)


def local_hyperparameters(group: Mapping[str, Any]) -> Hyperparameters:
    """Return what a parameter group of the driver's optimizer holds beside its parameters, ready to send."""
    return {
        key: value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        for key, value in group.items()
        if key not in ("params", "param_names")
    }


def _build(plan: OptimizerPlan, groups: list[dict[str, Any]]) -> Optimizer:
    accepted = inspect.signature(plan.cls.__init__).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    arguments = {key: value for key, value in plan.defaults.items() if takes_any or key in accepted}
    try:
        with torch.no_grad():
            return plan.cls(groups, **arguments)
    except Exception as error:
        raise SkipPipeError(
            f"{plan.cls.__name__} cannot be built on a worker from its parameter groups and defaults "
            f"{sorted(arguments)}: {error}"
        ) from error
