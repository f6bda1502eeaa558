"""Optimizers whose step calls that of a base class, or does more to weights; workers import this: torch only."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .optimizers import Own

Closure = Callable[[], Any]


class Trivial(SGD):
    def step(self, closure: Closure | None = None) -> Any:
        return super().step(closure)


class TrivialTwice(Trivial):
    def step(self, closure: Closure | None = None) -> Any:
        return super().step(closure)


class Decoupled(SGD):
    """Decays all weights after the step, those without gradients too."""

    def step(self, closure: Closure | None = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(1 - 0.1 * group["lr"])
        return loss


class Clamping(Adam):
    """Calls the closure itself, and clamps weights through ``data``."""

    def step(self, closure: Closure | None = None) -> Any:
        loss = closure() if closure is not None else None
        super().step()
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.clamp_(-0.3, 0.3)
        return loss


class Decaying(Own):
    """Decays before it looks for gradients."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    def begin(self, group: dict[str, Any]) -> None:
        for parameter in group["params"]:
            parameter.mul_(1 - group["lr"] * 0.5)


class Centralising(SGD):
    """Changes gradients after the closure, each by itself."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim > 1:
                    parameter.grad.sub_(parameter.grad.mean(1, keepdim=True))
        super().step()
        return loss


class ClampingTooEarly(AdamW):
    """Clamps what gradients there are before the closure: with a Trainer those of the step before."""

    def step(self, closure: Closure | None = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.data.clamp_(-0.1, 0.1)
        return super().step(closure)


class Restarting(SGD):
    """Forgets its momentum in every third step."""

    def __init__(self, params: Any, lr: float = 0.02, momentum: float = 0.9, cleared: bool = True) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        self.defaults["cleared"] = cleared
        self.num_steps = 0
        for group in self.param_groups:
            group["cleared"] = cleared

    def step(self, closure: Closure | None = None) -> Any:
        loss = closure() if closure is not None else None
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            if self.param_groups[0]["cleared"]:
                self.state.clear()
            else:
                self.state = defaultdict(dict)
        super().step()
        return loss


class Summing(Own):
    """Sums gradients into an attribute."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})
        self.total = 0.0

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        super().move(parameter, gradient, group)
        self.total += float(gradient.abs().sum())


class SummingLate(Own):
    """Makes the attribute in a step."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    def prepare(self) -> None:
        self.norms = [
            float(p.grad.norm()) for group in self.param_groups for p in group["params"] if p.grad is not None
        ]


class SummingInGroups(Own):
    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr, "seen": 0})

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        super().move(parameter, gradient, group)
        group["seen"] += parameter.numel()


class Guarded(SGD):
    """Takes no step where any gradient is not finite."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            super().step()
        return loss


class ByLoss(Own):
    """Steps as far as the loss is large."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Closure | None = None) -> Any:
        if closure is None:
            return super().step()
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            group["lr"] = 0.001 * float(loss)
        super().step()
        return loss


class HoldingParameters(Own):
    """Decays the parameters that it was made with."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})
        self.held = [parameter for group in self.param_groups for parameter in group["params"]]

    def prepare(self) -> None:
        for parameter in self.held:
            parameter.mul_(0.99)


def hooked(base: type[Optimizer]) -> None:
    """Have torch wrap the step of a class, as it does when one is made."""
    base([torch.zeros(1, requires_grad=True)], lr=0.1)  # type: ignore[call-arg]
