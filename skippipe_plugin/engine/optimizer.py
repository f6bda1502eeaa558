"""The optimizer of a stage's parameters: the user's class with the user's groups, on the rank that holds them.

A step takes everything but the parameters from the driver's optimizer as it was before its own step
(:class:`Settings`): hyperparameters, and whatever else the class keeps in its groups or on itself, such as a count
of steps.
"""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import cloudpickle
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .channel import Buffer
from .device_errors import is_of_device
from .errors import SkipPipeError

ParameterKey = tuple[int, str]
"""A remote parameter's name: the number of its block in the stack, and its name in the block."""

Hyperparameters = dict[str, Any]  # Any: the optimizer class defines them

_NOT_SENT: Final = ("params", "param_names")
_FROM_SCHEDULERS: Final = ("initial_lr", "max_lr", "min_lr")
"""What schedulers add to groups; the constructors of some optimizers refuse groups with keys that they do not know."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a step depends on beside parameters, gradients and their state."""

    groups: tuple[Hyperparameters, ...]
    attributes: Hyperparameters = field(default_factory=dict)
    """What the optimizer keeps on itself, by name."""
    closure: bool = False
    """Whether the step is given a closure: only when that has run are gradients there."""
    default_dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    """What optimizers make numbers of their own in; blocks may have another around them."""

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Let the process have what an optimizer looks at beside itself."""
        before = torch.get_default_dtype()
        if before == self.default_dtype:
            yield
            return
        torch.set_default_dtype(self.default_dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    def dumps(self) -> bytes:
        """Return the settings as they travel."""
        plain = (
            self.groups,
            self.attributes,
            self.closure,
            self.default_dtype,
        )  # objects of classes take longer, and this is for every step
        try:
            return pickle.dumps(plain)
        except (pickle.PicklingError, AttributeError, TypeError):
            return cloudpickle.dumps(plain)  # type: ignore[no-any-return]

    @classmethod
    def loads(cls, packed: Buffer) -> Settings:
        """Invert :meth:`dumps`."""
        return cls(*pickle.loads(packed))


@dataclass(frozen=True, slots=True)
class OptimizerPlan:
    """How to build a remote part of the driver's optimizer."""

    cls: type[Optimizer]
    defaults: Hyperparameters
    groups: tuple[tuple[ParameterKey, ...], ...]
    """By parameter group of the driver's optimizer: its remote parameters, of all stages."""
    settings: Settings


class StageOptimizer:
    """The part of the user's optimizer that steps the parameters of one rank's stages."""

    def __init__(self, plan: OptimizerPlan, parameters: Mapping[ParameterKey, nn.Parameter]) -> None:
        self._members = [[key for key in group if key in parameters] for group in plan.groups]
        self._parameters = parameters
        groups = [[parameters[key] for key in members] for members in self._members]
        self._optimizer = build(plan, groups) if any(groups) else None
        self._leaves_settings = type(self._optimizer).__module__.startswith("torch.optim.")
        """Whether steps are sure to leave its settings as they are."""
        self._packed = b""
        """The settings that it has, and so have all steps that follow with the same."""
        self._settings = plan.settings

    def step(self, packed: Buffer, lr_factor: float = 1.0) -> None:
        """Take one step with the driver's settings (see :meth:`Settings.dumps`), the learning rates times a factor."""
        if self._optimizer is None:
            return
        if packed != self._packed or lr_factor != 1.0:
            self._settings, self._packed = Settings.loads(packed), b""
            apply_settings(self._optimizer, self._settings)
            if lr_factor == 1.0 and self._leaves_settings:
                self._packed = bytes(packed)
        for group in self._optimizer.param_groups:
            if lr_factor != 1.0 and "lr" in group:
                group["lr"] = group["lr"] * lr_factor  # of the driver's rate, so it never compounds
        settings = self._settings
        with settings.in_force():
            if settings.closure:
                step_with_closure(self._optimizer)
            else:
                self._optimizer.step()

    def switch(self, method: str, packed: Buffer) -> None:
        """Call ``train`` or ``eval`` of an optimizer that has them."""
        if self._optimizer is not None:
            self._packed = b""
            apply_settings(self._optimizer, Settings.loads(packed))
            getattr(self._optimizer, method)()

    def parameters(self) -> list[nn.Parameter]:
        """List what is stepped."""
        return [self._parameters[key] for members in self._members for key in members]

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
        self._packed = b""
        self._optimizer.load_state_dict(own)


def step_with_closure(optimizer: Optimizer) -> None:
    """Step with a closure as where the user's computes gradients: before it there are none."""
    gradients = [(p, p.grad) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

    def closure() -> Tensor:
        while gradients:
            parameter, gradient = gradients.pop()
            parameter.grad = gradient
        return torch.zeros(())

    for parameter, _ in gradients:
        parameter.grad = None
    try:
        optimizer.step(closure)  # type: ignore[arg-type]
    finally:
        if gradients:
            closure()


def settings_of(optimizer: Optimizer, attributes: Sequence[str] = (), *, closure: bool = False) -> Settings:
    """Return the present settings of ``optimizer``, ready to send; later steps of it leave them as they are."""
    groups = tuple(
        {key: _portable(value) for key, value in group.items() if key not in _NOT_SENT}
        for group in optimizer.param_groups
    )
    return Settings(groups, {name: _portable(optimizer.__dict__[name]) for name in attributes}, closure)


def apply_settings(optimizer: Optimizer, settings: Settings) -> None:
    """Let an optimizer with as many groups have the settings, and no others."""
    for group, values in zip(optimizer.param_groups, settings.groups, strict=True):
        device = next((parameter.device for parameter in group["params"]), torch.device("cpu"))
        for key in group.keys() - values.keys() - {*_NOT_SENT}:
            del group[key]
        group.update({key: _arrived(value, device) for key, value in values.items()})
    for name, value in settings.attributes.items():
        optimizer.__dict__[name] = _arrived(value, torch.device("cpu"))


@dataclass(frozen=True, slots=True)
class _OnDevice:
    """A tensor that belongs on the device of the parameters."""

    tensor: Tensor


def _portable(value: Any) -> Any:  # Any: whatever the class keeps
    if type(value) in (list, tuple, set):
        return type(value)(_portable(each) for each in value)
    if type(value) is dict:
        return {key: _portable(each) for key, each in value.items()}
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    copy = value.detach().clone()
    return copy if copy.device.type == "cpu" else _OnDevice(copy.cpu())


def _arrived(value: Any, device: torch.device) -> Any:
    if isinstance(value, _OnDevice):
        return value.tensor.to(device)
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (list, tuple, set):
        return type(value)(_arrived(each, device) for each in value)
    return {key: _arrived(each, device) for key, each in value.items()} if type(value) is dict else value


def build(plan: OptimizerPlan, groups: Sequence[Sequence[nn.Parameter]]) -> Optimizer:
    """Build an optimizer of the plan's class and settings for some parameters, by group.

    Raises:
        SkipPipeError: The class does not take parameter groups and its own defaults.
    """
    accepted = inspect.signature(plan.cls.__init__).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    arguments = {key: value for key, value in plan.defaults.items() if takes_any or key in accepted}
    full = [
        {**{k: v for k, v in values.items() if k not in _FROM_SCHEDULERS}, "params": list(parameters)}
        for values, parameters in zip(plan.settings.groups, groups, strict=True)
    ]
    try:
        with torch.no_grad(), plan.settings.in_force():
            try:
                optimizer = plan.cls(full, **arguments)
            except Exception:  # it may refuse keys that it adds itself
                optimizer = plan.cls([{"params": list(parameters)} for parameters in groups], **arguments)
            apply_settings(optimizer, plan.settings)
    except Exception as error:
        if is_of_device(error):
            raise
        raise SkipPipeError(
            f"{plan.cls.__name__} cannot be built on a worker from its parameter groups and defaults "
            f"{sorted(arguments)}: {type(error).__name__}: {error}. A pipeline builds the optimizer's class anew in "
            "each process, so its constructor must take parameter groups, and no argument beyond them that its "
            "defaults do not have"
        ) from error
    return optimizer
