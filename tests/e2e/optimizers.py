"""Optimizers as users write them; workers import this module, so it imports torch only."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

Closure = Callable[[], Any]


class Own(Optimizer):
    """Calls the closure and steps parameter by parameter, as most optimizers do."""

    def step(self, closure: Closure | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self.prepare()
            for group in self.param_groups:
                self.begin(group)
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.move(parameter, parameter.grad, group)
        return loss

    def prepare(self) -> None: ...

    def begin(self, group: dict[str, Any]) -> None: ...

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(gradient, alpha=group["lr"])


class Counting(Own):
    """Its rate decays with a count in the group, a number or a tensor that may be made late."""

    def __init__(self, params: Any, lr: float = 0.02, tensor: bool = False, late: bool = True) -> None:
        super().__init__(params, {"lr": lr, "tensor": tensor})
        if not late:
            for group in self.param_groups:
                group["step"] = torch.zeros(())

    def begin(self, group: dict[str, Any]) -> None:
        if "step" not in group:
            group["step"] = torch.zeros(()) if group["tensor"] else 0
        group["step"] += 1

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(gradient, alpha=group["lr"] / float(group["step"]) ** 0.5)


class CountingItself(Own):
    """Keeps its count, a power, a rule and a warmed-up rate on itself; the defaults know nothing of them."""

    def __init__(self, params: Any, lr: float = 0.02, power: float = 0.0, rule: Callable[[float], float] = abs) -> None:
        super().__init__(params, {"lr": lr})
        self.count, self.power, self.rule, self.rates = 0, power, rule, [0.0]

    def prepare(self) -> None:
        self.count += 1
        self.rates.append(self.count**-self.power)

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(gradient, alpha=group["lr"] * self.rule(self.rates[-1]))


def halved(value: float) -> float:
    return value / 2


class Anchored(Own):
    """Is pulled to where the parameters were when it was made."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["start"] = parameter.detach().clone()

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        start = self.state[parameter]["start"]
        parameter.sub_(gradient + 0.2 * (parameter - start), alpha=group["lr"])


class Trusting(Own):
    """Scales each parameter's step by its own norm, as LARS and LAMB do."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        ratio = float(parameter.norm() / (gradient.norm() + 1e-3))
        parameter.sub_(gradient, alpha=group["lr"] * min(ratio, 1.0))


class LookingAhead(Own):
    """Goes half of the way back every third step."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(slow=parameter.clone(), step=0)
        state["step"] += 1
        parameter.sub_(gradient, alpha=group["lr"])
        if state["step"] % 3 == 0:
            parameter.copy_(state["slow"].lerp_(parameter, 0.5))


class ScheduleFree(Own):
    """Trains on one set of weights and evaluates on their average; ``train`` and ``eval`` change between them."""

    def __init__(self, params: Any, lr: float = 0.02, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "k": 0, "train_mode": False})

    def _swap(self, weight: Callable[[float], float], mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] is not mode:
                for parameter in group["params"]:
                    state = self.state[parameter]
                    if "z" in state:
                        parameter.data.lerp_(state["z"], weight(group["beta"]))
                group["train_mode"] = mode

    def eval(self) -> None:
        self._swap(lambda beta: 1 - 1 / beta, False)

    def train(self) -> None:
        self._swap(lambda beta: 1 - beta, True)

    def begin(self, group: dict[str, Any]) -> None:
        if not group["train_mode"]:
            raise RuntimeError("call train() first")
        group["k"] += 1

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        z = self.state[parameter].setdefault("z", parameter.clone())
        share = 1 / group["k"]
        parameter.lerp_(z, share)
        parameter.sub_(gradient, alpha=group["lr"] * (1 - group["beta"] * (1 - share)))
        z.sub_(gradient, alpha=group["lr"])


# ------------------------------------------------------------------ refused


class GlobalNorm(Own):
    """Every step has the same length, over all parameters."""

    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})
        self.scale = 1.0

    def prepare(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self.scale = float(torch.stack([gradient.norm() for gradient in grads]).norm()) if grads else 1.0

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(gradient, alpha=group["lr"] / self.scale)


class ClippingLate(GlobalNorm):
    """Clips by the norm of each group, where that is large."""

    def begin(self, group: dict[str, Any]) -> None:
        grads = [p.grad for p in group["params"] if p.grad is not None]
        self.scale = max(1.0, float(torch.stack([each.norm() for each in grads]).norm()) / 20) if grads else 1.0

    def prepare(self) -> None: ...


class OneRate(Own):
    """Finds one rate for all from how far the parameters have gone, as D-Adaptation and Prodigy do."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, "d": 1e-3})

    def prepare(self) -> None:
        moved = 0.0
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    start = self.state[parameter].setdefault("start", parameter.clone())
                    moved += float((parameter.grad * (start - parameter)).sum())
        for group in self.param_groups:
            group["d"] = max(group["d"], min(0.05, 0.01 * moved))

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(gradient, alpha=group["lr"] * group["d"])


class Noisy(Own):
    def __init__(self, params: Any, lr: float = 0.02) -> None:
        super().__init__(params, {"lr": lr})

    def move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        parameter.sub_(gradient + 0.1 * torch.randn_like(parameter), alpha=group["lr"])


class Sharp(SGD):
    """Sharpness-aware minimization."""

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        assert closure is not None, "sharpness-aware minimization needs a closure"
        with torch.enable_grad():
            loss = closure()
            closure()
        return loss


class TwiceIfAsked(SGD):
    """Calls a closure twice, and does without one."""

    def step(self, closure: Closure | None = None) -> Any:
        if closure is not None:
            closure()
        return super().step(closure)


class Wrapping(Optimizer):
    """Holds another optimizer."""

    def __init__(self, optimizer: Optimizer, k: int = 3) -> None:
        self.inner = optimizer
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.param_groups = optimizer.param_groups

    def step(self, closure: Closure | None = None) -> Any:
        return self.inner.step(closure)


class NeedsMore(Own):
    def __init__(self, params: Any, total_steps: int) -> None:
        super().__init__(params, {"lr": 0.02})


class NeverZero(Own):
    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.02})

    def zero_grad(self, set_to_none: bool = True) -> None: ...


class CountingGradients(Counting):
    """Counts in a group only where there is a gradient."""

    def begin(self, group: dict[str, Any]) -> None:
        if any(parameter.grad is not None for parameter in group["params"]):
            super().begin(group)


class HoldingModule(Own):
    """Keeps a module on itself, which nobody else can make."""

    def __init__(self, params: Any, net: Any = None) -> None:
        super().__init__(params, {"lr": 0.02})
        self.net = net
