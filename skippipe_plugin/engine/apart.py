"""Whether an optimizer steps every parameter by itself, so that processes with some of them each step as one does.

The optimizers of torch do, but for LBFGS. Of any other class it is tried out on two small parameters, together and
apart, over a few steps with gradients of several sizes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .device import HOST, kept_random_states
from .errors import SkipPipeError
from .optimizer import OptimizerPlan, Settings, apply_settings, build, step_with_closure

_NAMES: Final = (
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
    *("RMSprop", "Rprop", "Adagrad", "Adadelta", "ASGD", "Adafactor"),
)
STEP_APART: Final = frozenset(cls for name in _NAMES if (cls := getattr(torch.optim, name, None)) is not None)
"""Those of torch that need no trial: each has a test."""
_MEMBERS: Final = frozenset({"params", "param_names"})
_USUAL: Final = frozenset({"defaults", "state", "param_groups", "_zero_grad_profile_name"})
_MAX_PRINTED: Final = 64
_NUM_STEPS: Final = 12
_MAX_GROUPS: Final = 4
_SHAPES: Final = ((4, 3), (5,))
_OTHERWISE: Final = (
    "use an optimizer whose step needs no closure and looks at one parameter at a time (all of torch.optim but LBFGS "
    "do), or train without the pipeline"
)


def check_steps_apart(plan: OptimizerPlan, device: torch.device) -> None:
    """Raise unless the optimizer of ``plan`` can be stepped in several processes as in one.

    Raises:
        SkipPipeError: It needs a closure, or reads across parameters, or cannot be built from groups and defaults.
    """
    name = plan.cls.__name__
    _check_closure_is_optional(plan.cls)
    if plan.cls in STEP_APART:
        return
    if _unhooked(plan.cls.zero_grad) is not _unhooked(Optimizer.zero_grad):
        raise SkipPipeError(
            f"{name} overrides zero_grad, and what it does there to the gradients on the workers is not known; leave "
            f"zero_grad as torch has it, or train without the pipeline"
        )
    with kept_random_states(device), torch.enable_grad():
        for settings in _representatives(plan.settings):
            trial = _find_trial(replace(plan, settings=settings), device)
            if not trial.is_alike():
                raise SkipPipeError(
                    f"{name} steps a parameter otherwise when it steps another one with it: it looks at all parameters "
                    "(one step size or one norm for all, or no step where any gradient is not finite, for example), "
                    f"or draws random numbers. In a pipeline each process steps the parameters that it holds; "
                    f"{_OTHERWISE}"
                )
            trial.check_closure()
            _check_gathers_nothing(trial)


def _check_gathers_nothing(trial: _Trial) -> None:
    """Raise if the driver's optimizer would keep a sum over its own parameters where one process has that over all."""
    both = trial.kept(((0, 1), ()))
    for members in (((0,), ()), ((1,), ())):
        alone = trial.kept(members)
        other = next((name for name in both | alone if both.get(name) != alone.get(name)), None)
        if other is not None:
            raise SkipPipeError(
                f"{trial.plan.cls.__name__} keeps in {other} what it gathers over the parameters that it steps, and in "
                "a pipeline the driver's optimizer steps those outside of the blocks only. Gather it in "
                "on_before_optimizer_step of the LightningModule, where parameter.grad is whole (in a loop of your "
                "own: before optimizer.step()), keep it by parameter in the optimizer's state, or train without the "
                "pipeline"
            )


def check_steps_rows_apart(plan: OptimizerPlan, device: torch.device) -> None:
    """Raise unless the optimizer steps the rows of a parameter apart, as where experts are spread over ranks.

    Raises:
        SkipPipeError: It looks at a whole parameter.
    """
    if plan.cls in STEP_APART and plan.cls.__name__ != "Adafactor":
        return
    with kept_random_states(device), torch.enable_grad():
        trial = _find_trial(replace(plan, settings=next(_representatives(plan.settings))), device)
        if not trial.steps_rows_apart():
            raise SkipPipeError(
                f"{plan.cls.__name__} looks at whole parameters, and with expert_parallel each rank holds the rows of "
                "some experts only; use an optimizer that steps element by element (SGD, the Adam family, RMSprop), or "
                "leave expert_parallel at 1"
            )


def counts_without_gradients(plan: OptimizerPlan) -> bool:
    """Tell whether what the optimizer keeps in its groups and on itself goes on where no parameter has a gradient.

    The driver's optimizer has groups of which it holds no parameter, and says how they stand.
    """
    if plan.cls in STEP_APART:
        return True
    with kept_random_states(HOST), torch.enable_grad():
        for settings in _representatives(plan.settings):
            trial = _find_trial(replace(plan, settings=settings), torch.device("cpu"))
            if trial.kept(((0,), (1,))) != trial.kept(((), ())):
                return False
    return True


def minds_early_gradients(plan: OptimizerPlan, device: torch.device) -> bool:
    """Tell whether a step depends on gradients that are there before its closure has run."""
    with kept_random_states(device), torch.enable_grad():
        return any(
            _find_trial(replace(plan, settings=settings), device).minds_early_gradients()
            for settings in _representatives(plan.settings)
        )


def _check_closure_is_optional(cls: type[Optimizer]) -> None:
    parameters = list(inspect.signature(_unhooked(cls.step)).parameters.values())[1:]
    if any(
        each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters
    ):
        raise SkipPipeError(
            f"{cls.__name__}.step needs a closure, which it may call several times; a pipeline runs forward and "
            f"backward once per step. {_OTHERWISE[0].upper()}{_OTHERWISE[1:]}"
        )


def _unhooked(function: Callable[..., Any]) -> Callable[..., Any]:
    raw: Callable[..., Any] = inspect.unwrap(function)
    return raw


def _representatives(settings: Settings) -> Iterator[Settings]:
    """Yield pairs of groups: each that differs in more than its rate, with itself and with the first."""
    kinds = {repr(sorted((k, v) for k, v in group.items() if "lr" not in k)): group for group in settings.groups}
    groups = list(islice(kinds.values(), _MAX_GROUPS))
    for group in groups:
        yield Settings((_moving(group), _moving(group)), settings.attributes)
    for group in groups[1:]:
        yield Settings((_moving(groups[0]), _moving(group)), settings.attributes)


def _moving(group: dict[str, Any]) -> dict[str, Any]:
    """Return a group whose parameters move, though a schedule may begin with a rate of 0."""
    return group if "lr" not in group or float(group["lr"]) != 0 else {**group, "lr": 1e-3}


def _find_trial(plan: OptimizerPlan, device: torch.device) -> _Trial:
    """Return a trial on what the optimizer takes: some want matrices, some no float64."""
    errors: list[Exception] = []
    trials: list[_Trial] = []
    for shape in _SHAPES:
        for dtype in (torch.float64, torch.float32):
            trial = _Trial(plan, shape, dtype, device)
            try:
                trial.run(((0, 1), ()))
            except Exception as error:
                errors.append(error)
                continue
            trials.append(trial)
            break
    if not trials and isinstance(errors[0], SkipPipeError):
        raise errors[0]
    if not trials:
        raise SkipPipeError(
            f"{plan.cls.__name__}.step() fails without a closure, or on small parameters: {type(errors[0]).__name__}: "
            f"{errors[0]}. A pipeline runs forward and backward once per step, and each process steps the parameters "
            f"that it holds without a closure; {_OTHERWISE}"
        )
    return _Trial(plan, trials[0].shape, trials[0].dtype, device, more=trials[1:])


_Members = tuple[tuple[int, ...], tuple[int, ...]]
"""By group: the numbers of the parameters in it."""
_TOGETHER: Final[tuple[_Members, ...]] = (((0, 1), ()), ((), (0, 1)), ((0,), (1,)))


@dataclass(frozen=True, slots=True)
class _Trial:
    """Steps of an optimizer on up to two parameters in two groups."""

    plan: OptimizerPlan
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    more: Sequence[_Trial] = ()

    def is_alike(self) -> bool:
        """Tell whether each parameter moves as it does alone."""
        own = all(self._is_alike(members) for members in _TOGETHER) and self._is_alike_beside_others()
        return own and all(each.is_alike() for each in self.more)

    def steps_rows_apart(self) -> bool:
        """Tell whether a parameter moves as its halves do."""
        halves: list[Tensor] = []
        for rows in (slice(0, 2), slice(2, 4)):
            halves.append(self.run(((0,), ()), rows)[0])
        whole, parts = self.run(((0,), ()))[0], torch.cat(halves, 1)
        return bool((whole - parts).abs().max() <= 1e-5 * whole.abs().max())

    def _is_alike(self, members: _Members) -> bool:
        together = self.run(members)
        for number in (0, 1):
            alone = self.run(_only(number, members))
            error = (together[number] - alone[number]).abs().max()
            limit = 1e-5 * alone[number].abs().max() + (0 if self.dtype is torch.float64 else 1e-6)
            if not bool(error <= limit):
                return False
        return True

    def _is_alike_beside_others(self) -> bool:
        """Tell whether a parameter moves as it does alone while another one has gradients that are not finite."""
        try:
            beside = self.run(((0, 1), ()), infinite=1)[0]
        except Exception:  # it wants none, and a worker says so as one process does
            return True
        return bool(torch.allclose(beside, self.run(((0,), ()))[0], rtol=1e-5, atol=1e-6))

    def run(self, members: _Members, rows: slice = slice(None), infinite: int | None = None) -> dict[int, Tensor]:
        """Return by parameter how it moved in each step: [steps, ...]; perhaps one of some rows only.

        Args:
            members: The parameters.
            rows: Of them.
            infinite: The number of one that has gradients without bounds, in a step.
        """
        parameters, optimizer = self._start(members, rows)
        moves: dict[int, list[Tensor]] = {number: [] for number in parameters}
        for step in range(_NUM_STEPS):
            before = {number: parameter.detach().clone() for number, parameter in parameters.items()}
            self._give_gradients(parameters, step, rows)
            if infinite is not None and step == _NUM_STEPS // 2:
                parameters[infinite].grad = torch.full_like(parameters[infinite], torch.inf)
            optimizer.step()
            for number, parameter in parameters.items():
                moves[number].append(parameter.detach() - before[number])
        return {number: torch.stack(each) for number, each in moves.items()}

    def kept(self, members: _Members) -> dict[str, str]:
        """Return what the optimizer keeps outside of states after some steps, by the name of its place."""
        try:
            parameters, optimizer = self._start(members)
            for step in range(4):
                self._give_gradients(parameters, step)
                optimizer.step()
        except Exception as error:
            return {"": f"{type(error).__name__}: {error}"}
        groups = [(number, key, group[key]) for number, group in enumerate(optimizer.param_groups) for key in group]
        kept = {f"{key!r} of group {number}": _printed(value) for number, key, value in groups if key not in _MEMBERS}
        return kept | {
            f"self.{name}": _printed(value) for name, value in optimizer.__dict__.items() if name not in _USUAL
        }

    def check_closure(self) -> None:
        """Raise if the optimizer calls a closure more than once, or depends on what it computes beside gradients."""
        members: _Members = ((0, 1), ())
        parameters, optimizer = self._start(members)
        others, alike = self._start(members)
        for step in range(_NUM_STEPS):
            closure = _Closure(functools.partial(self._give_gradients, parameters, step), loss=1.0 + step)
            try:
                optimizer.step(closure)  # type: ignore[arg-type]
            except TypeError:  # it takes none: whoever passes one is told so in one process too
                return
            if closure.calls > 1:
                raise SkipPipeError(
                    f"{self.plan.cls.__name__}.step called its closure {closure.calls} times on trial, but a pipeline "
                    f"runs forward and backward once per step; {_OTHERWISE}"
                )
            self._give_gradients(others, step)
            step_with_closure(alike)
        if any(not torch.allclose(parameters[number], others[number], rtol=1e-5, atol=1e-6) for number in parameters):
            raise SkipPipeError(
                f"{self.plan.cls.__name__}.step depends on the loss that its closure returns, or on the gradients of "
                "the step before: the workers' parts of the optimizer have neither. Let it depend on the gradients "
                "after the closure, or train without the pipeline"
            )

    def minds_early_gradients(self) -> bool:
        """Tell whether parameters move otherwise when gradients are there before the closure."""
        parameters, early = self._start(((0, 1), ()))
        others, late = self._start(((0, 1), ()))
        for step in range(_NUM_STEPS):
            self._give_gradients(parameters, step)
            early.step(lambda: 1.0)
            self._give_gradients(others, step)
            step_with_closure(late)
        return any(not torch.allclose(parameters[each], others[each], rtol=1e-5, atol=1e-6) for each in parameters)

    def _start(self, members: _Members, rows: slice = slice(None)) -> tuple[dict[int, nn.Parameter], Optimizer]:
        numbers = [number for group in members for number in group]
        parameters = {number: nn.Parameter(self._values(number, -1)[rows].clone()) for number in numbers}
        groups = [[parameters[number] for number in group] for group in members]
        torch.manual_seed(0)
        optimizer = build(self.plan, groups)
        apply_settings(optimizer, self.plan.settings)
        if callable(train := getattr(optimizer, "train", None)):
            train()
        return parameters, optimizer

    def _give_gradients(self, parameters: dict[int, nn.Parameter], step: int, rows: slice = slice(None)) -> None:
        """Let gradients be of several sizes, and keep a direction: some optimizers go faster only then."""
        for number, parameter in parameters.items():
            size = (0.01, 1.0, 30.0)[(step + number) % 3]
            parameter.grad = size * (self._values(number, 0) + 0.3 * self._values(number, step + 1))[rows]

    def _values(self, number: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * number + step + 1)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64).to(self.device, self.dtype)


@dataclass(slots=True)
class _Closure:
    """Gives gradients and returns a loss."""

    give: Callable[[], None]
    loss: float
    calls: int = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        self.give()
        return torch.tensor(self.loss)


def _printed(value: Any) -> str:  # Any: whatever the class keeps
    """Tell plain values apart but for rounding; nothing else."""
    if isinstance(value, Tensor):
        return _printed(value.detach().tolist()) if value.numel() <= _MAX_PRINTED else str(tuple(value.shape))
    if isinstance(value, float | complex):
        return f"{value:.5g}"
    if isinstance(value, dict):
        return str({_printed(key): _printed(each) for key, each in value.items()})
    if isinstance(value, list | tuple | set):
        return str([_printed(each) for each in value if not isinstance(each, nn.Parameter)])
    return repr(value) if isinstance(value, bool | int | str | bytes) else type(value).__name__


def _only(number: int, members: _Members) -> _Members:
    first, second = (tuple(each for each in group if each == number) for group in members)
    return first, second
