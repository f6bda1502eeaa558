"""The driver's own step of an optimizer whose other parts are on workers: what its code sees, and when it is over.

While the optimizer's code runs, its groups hold what is on this driver and no more, as they do on a worker. Whatever
is the user's, the closure and the hooks, runs with all of it, and hooks after a step run when the workers have
stepped too.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Protocol, cast

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from ..engine.errors import SkipPipeError
from .capture.remote import is_remote

REGISTRARS: Final = ("register_step_pre_hook", "register_step_post_hook")


class Rest(Protocol):
    """What goes with the driver's own step."""

    def begin(self) -> None:
        """Note that a step begins."""

    def ready(self, *, closure: bool) -> None:
        """Note that all has run that may change gradients and settings: a closure runs the user's hooks."""

    def show(self, *, everything: bool) -> None:
        """Let all be seen, or only what is here."""

    def finish(self) -> None:
        """Step what is elsewhere."""


class OwnStep:
    """Tells ``rest`` of the steps of ``optimizer``, and lets its own code see only what is here."""

    def __init__(self, optimizer: Optimizer, rest: Rest) -> None:
        self._optimizer = optimizer
        self._rest = rest
        self._depth = 0
        """How many of the steps of its classes are under way: torch calls the hooks for each, if it has wrapped it."""
        self._is_running = False
        self._whole: list[tuple[dict[str, Any], list[Tensor]]] = []
        """The groups that lack something at present, with all of their parameters."""
        self._local: dict[int, tuple[list[Tensor], int, list[Tensor]]] = {}
        """By group: its parameters, how many they were, and those of them that are here."""
        self._pre = cast("OrderedDict[int, Any]", optimizer._optimizer_step_pre_hooks)
        self._post = cast("OrderedDict[int, Any]", optimizer._optimizer_step_post_hooks)
        self._handles = [
            optimizer.register_step_pre_hook(lambda *_: self._enter()),
            optimizer.register_step_pre_hook(lambda _, args, kwargs: self._before(args, kwargs)),
            optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        self._order()
        for name in REGISTRARS:
            optimizer.__dict__[name] = functools.partial(self._register, getattr(optimizer, name))
        self._former = optimizer.__dict__.get("step")
        self._step = optimizer.step = self._guarded(optimizer.step)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Let the optimizer's step be an ordinary one again."""
        for handle in self._handles:
            handle.remove()
        for name in REGISTRARS:
            self._optimizer.__dict__.pop(name, None)
        if self._optimizer.__dict__.get("step") is self._step:  # else a scheduler has wrapped it
            del self._optimizer.__dict__["step"]
            if self._former is not None:
                self._optimizer.__dict__["step"] = self._former
        del self._step, self._former, self._rest  # they refer to this object, and it to the optimizer

    def forget_members(self) -> None:
        """Note that parameters may have come, gone or moved."""
        self._local.clear()

    @contextmanager
    def reduced(self) -> Iterator[None]:
        """Let the body, the optimizer's own code, see only what is here."""
        self._reduce()
        try:
            yield
        finally:
            self._restore()

    # ---------------------------------------------------------------- hooks

    def _register(self, register: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        handle = register(*args, **kwargs)
        self._order()
        return handle

    def _order(self) -> None:
        """Let the user's hooks run outside of the step of all parts: before it, and after it."""
        entering, before, after = self._handles
        self._pre.move_to_end(entering.id, last=False)
        self._pre.move_to_end(before.id)
        self._post.move_to_end(after.id, last=False)

    def _guarded(self, original: Callable[..., Any]) -> Any:
        """Return ``optimizer.step``, which leaves nothing behind where it fails."""

        @functools.wraps(original)
        def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if self._is_running:
                return original(*args, **kwargs)
            self._is_running, self._depth = True, 0
            try:
                return original(*args, **kwargs)
            except BaseException:
                self._restore()
                raise
            finally:
                self._is_running, self._depth = False, 0

        return types.MethodType(step, self._optimizer)  # schedulers wrap the function of a method

    def _enter(self) -> None:
        self._depth += 1
        if self._depth > 1:
            self._check_no_hooks()

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._depth > 1:
            return args, kwargs
        self._rest.begin()
        if args and callable(args[-1]):
            args = (*args[:-1], self._whole_during(args[-1]))
        elif callable(kwargs.get("closure")):
            kwargs = {**kwargs, "closure": self._whole_during(kwargs["closure"])}
        else:
            self._rest.ready(closure=False)
        self._reduce()
        return args, kwargs

    def _whole_during(self, closure: Callable[[], Any]) -> Callable[[], Any]:
        def whole() -> Any:  # Any: the loss
            self._restore()
            result = closure()
            self._rest.ready(closure=True)
            self._reduce()
            return result

        return whole

    def _after(self) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        self._restore()
        self._rest.finish()

    def _check_no_hooks(self) -> None:
        """Raise if the user's hooks run in the middle of a step, as where a class's step calls that of its base."""
        own = {handle.id for handle in self._handles}
        hooks = [hook for each in (self._pre, self._post) for number, hook in each.items() if number not in own]
        hooks += [*_global_optimizer_pre_hooks.values(), *_global_optimizer_post_hooks.values()]
        hooks = [hook for hook in hooks if not str(getattr(hook, "__module__", "")).startswith("torch.")]
        if hooks:
            raise SkipPipeError(
                f"the step of {type(self._optimizer).__name__} calls that of its base class, for which torch runs the "
                "hooks of the optimizer once more, in the middle of a step, when the workers have not stepped "
                f"({getattr(hooks[0], '__qualname__', hooks[0])}). Do what the hooks do in on_before_optimizer_step "
                "and on_before_zero_grad or on_train_batch_end of the LightningModule (in a loop of your own: before "
                "and after optimizer.step())"
            )

    # --------------------------------------------------------------- groups

    def _reduce(self) -> None:
        self._rest.show(everything=False)
        for group in self._optimizer.param_groups:
            members, known = group["params"], self._local.get(id(group))
            if known is None or known[0] is not members or known[1] != len(members):
                known = members, len(members), [parameter for parameter in members if not is_remote(parameter)]
                self._local[id(group)] = known
            if len(known[2]) != len(members):
                self._whole.append((group, members))
                group["params"] = known[2]

    def _restore(self) -> None:
        for group, members in self._whole:
            group["params"] = members
        self._whole = []
        self._rest.show(everything=True)
