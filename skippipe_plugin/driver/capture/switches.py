"""What a step's code may switch on around its call of the blocks: process-wide settings, and those of the thread.

Microbatches take turns, so what one has switched on when it is suspended is taken back, and switched on again when it
is resumed. Only what it has changed is touched, and what it has changed when it is over stays, as in one process.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import asyncio
import functools
import operator
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.utils._device as torch_device
from torch import overrides
from torch.utils import _python_dispatch as dispatch

from ...engine.errors import SkipPipeError
from ...engine.process_switches import QUICK
from .suspend import current_thread

getsignal: Final[Callable[[int], Any]] = _signal.getsignal
"""What ``signal.getsignal`` asks, without an enum made of each answer: this is asked at every hand-over."""
_autograd: Any = torch._C._autograd
_eval_frame: Any = torch._C._dynamo.eval_frame


@dataclass(frozen=True, slots=True)
class Switch:
    """Something that has one value at a time; values are compared by identity, lists and strings by content."""

    get: Callable[[], Any]
    set: Callable[[Any], object]


@dataclass(frozen=True, slots=True)
class Stack:
    """Something that has several, the last of which counts first."""

    size: Callable[[], Any]
    """How many there are, or the last one: what changes when one is added."""
    pop: Callable[[], Any]
    push: Callable[[Any], object]


_BY_CONTENT: Final = (str, list, tuple)
Changes = tuple[tuple[Any, Any], ...]
"""Switches with their values, and stacks with what was added to them."""


class Snapshot:
    """What is switched on now.

    Args:
        of_process: Leave out what each thread has for itself.
        stacks: Whether what is stacked belongs to it.
    """

    __slots__ = ("_getters", "_sizes", "_stacks", "_switches", "_values")

    def __init__(self, *, of_process: bool = False, stacks: bool = True) -> None:
        self._switches: Sequence[Switch] = PROCESS if of_process else EVERY
        self._stacks: Sequence[Stack] = STACKS if stacks and not of_process else ()
        self._getters = _GETTERS_OF_PROCESS if of_process else _GETTERS
        self._values = [*map(operator.call, self._getters)]
        self._sizes = [*map(operator.call, _SIZES)] if self._stacks else []

    def take_back(self) -> Changes:
        """Bring everything back to what it was; return what was different."""
        changes: list[tuple[Any, Any]] = []
        stacks = self._stacks if self._stacks and [*map(operator.call, _SIZES)] != self._sizes else ()
        for stack, size in zip(stacks, self._sizes, strict=False):
            added: list[Any] = []
            while not _same(stack.size(), size) and len(added) < 1000:
                added.append(stack.pop())
            if added:
                changes.append((stack, added))
        now = [*map(operator.call, self._getters)]
        if now != self._values:  # what is the same object is not compared
            for switch, value, before in zip(self._switches, now, self._values, strict=True):
                if value is not before and not (type(value) in _BY_CONTENT and value == before):
                    changes.append((switch, value))
                    switch.set(before)
        return tuple(changes)


def switch_on(changes: Changes) -> None:
    """Switch on again what :meth:`Snapshot.take_back` has returned."""
    for what, value in changes:
        if isinstance(what, Switch):
            what.set(value)
        else:
            for item in reversed(value):
                what.push(item)


def _same(a: Any, b: Any) -> bool:
    """Compare two sizes; torch makes a new pair of hooks each time it is asked."""
    if isinstance(a, tuple) and isinstance(b, tuple):
        return all(x is y for x, y in zip(a, b, strict=True))
    return a is b or (isinstance(a, int) and a == b)


def _leave_inference_mode() -> Any:
    """Turn inference mode the other way, grad mode left alone; return what undoes it."""
    grad = torch.is_grad_enabled()
    guard: Any = torch._C._InferenceMode(not torch.is_inference_mode_enabled())
    guard.__enter__()
    torch._C._set_grad_enabled(grad)
    return guard


_top_hooks: Final = functools.partial(_autograd._top_saved_tensors_default_hooks, False)


def _pop_hooks() -> Any:
    hooks = _top_hooks()
    _autograd._pop_saved_tensors_default_hooks()
    return hooks


def _attribute(owner: Any, name: str) -> Switch:
    return Switch(functools.partial(getattr, owner, name), functools.partial(setattr, owner, name))


def _set_filters(filters: Any) -> None:
    warnings.filters = filters
    mutated = getattr(warnings, "_filters_mutated", None) or getattr(warnings, "_filters_mutated_lock_held", None)
    if mutated is not None:
        mutated()


def _autocast(kind: str) -> tuple[Switch, ...]:
    return (
        Switch(functools.partial(torch.is_autocast_enabled, kind), functools.partial(torch.set_autocast_enabled, kind)),
        Switch(functools.partial(torch.get_autocast_dtype, kind), functools.partial(torch.set_autocast_dtype, kind)),
    )


def _accelerators() -> tuple[Switch, ...]:
    """What the thread has for the host's accelerator, if there is one."""
    if not torch.accelerator.is_available():
        return ()
    device = torch.accelerator.current_accelerator()
    assert device is not None
    streams = Switch(
        lambda: (torch.accelerator.current_stream(),),
        lambda stream: torch.accelerator.set_stream(stream[0]),
    )
    index = Switch(torch.accelerator.current_device_index, torch.accelerator.set_device_index)
    return (*_autocast(device.type), index, streams)


def _handler(number: int) -> Switch:
    return Switch(functools.partial(getsignal, number), functools.partial(signal.signal, number))


_OF_THREAD: Final[tuple[Switch, ...]] = (
    Switch(torch.is_grad_enabled, torch._C._set_grad_enabled),
    *_autocast("cpu"),
    *_accelerators(),
    Switch(torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
    Switch(_eval_frame.get_eval_frame_callback, _eval_frame.set_eval_frame),
    Switch(asyncio._get_running_loop, asyncio._set_running_loop),
    *((_handler(signal.SIGALRM),) if hasattr(signal, "SIGALRM") else ()),
)
PROCESS: Final[tuple[Switch, ...]] = (
    *(Switch(switch.get, switch.set) for switch in QUICK),
    _attribute(torch_device, "CURRENT_DEVICE"),
    _attribute(sys, "stdout"),
    _attribute(sys, "stderr"),
    Switch(functools.partial(getattr, warnings, "filters"), _set_filters),
    _attribute(warnings, "showwarning"),
    _attribute(warnings, "_showwarnmsg_impl"),
)
EVERY: Final = (*_OF_THREAD, *PROCESS)
_GETTERS: Final = tuple(switch.get for switch in EVERY)
_GETTERS_OF_PROCESS: Final = tuple(switch.get for switch in PROCESS)
STACKS: Final = (
    Stack(torch.is_inference_mode_enabled, _leave_inference_mode, lambda guard: guard.__exit__(None, None, None)),
    Stack(torch._C._len_torch_function_stack, torch._C._pop_torch_function_stack, overrides._push_mode),
    Stack(torch._C._len_torch_dispatch_stack, dispatch._pop_mode, dispatch._push_mode),
    Stack(
        _top_hooks,
        _pop_hooks,
        lambda hooks: _autograd._push_saved_tensors_default_hooks(*hooks),
    ),
)

_SIZES: Final = tuple(stack.size for stack in STACKS)


_function_modes: Final[Callable[[], list[object]]] = overrides._get_current_function_mode_stack


def profiler_is_on() -> bool:
    """Whether torch's profiler is on; a process has one, which nobody can take back and switch on again."""
    return bool(torch._C._autograd._profiler_enabled())


_PROFILER: Final = (
    "the training step starts torch's profiler before the blocks and stops it after them, but a process has one, which "
    "would see the code of other steps in between, and nothing of the blocks. Start it around whole steps (in a "
    "callback, by Trainer(profiler='pytorch') or in a loop of your own), or inside of the block"
)


def check_modes(blocks: str) -> None:
    """Raise when something is switched on that would act on every operation of the blocks, were they here.

    Only inside of a step: the floating-point operations in Lightning's model summary are those of the driver.

    Args:
        blocks: The name of the first one.
    """
    thread = current_thread()
    if profiler_is_on() and thread is not None and not thread.profiled:
        raise SkipPipeError(_PROFILER)
    if not torch._C._len_torch_function_stack() and not torch._C._len_torch_dispatch_stack() and _top_hooks() is None:
        return
    if thread is None:
        return
    modes = [*_function_modes(), *dispatch._get_current_dispatch_mode_stack()]
    modes = [mode for mode in modes if not getattr(mode, "is_for_the_driver", False)]
    names = [type(mode).__name__ for mode in modes if not isinstance(mode, torch_device.DeviceContext)]
    hooks = _top_hooks()
    if hooks is not None and not str(getattr(hooks[0], "__module__", "")).startswith("torch."):
        names.append("saved_tensors_hooks")
    if names:
        raise SkipPipeError(
            f"{', '.join(names)} is switched on where the blocks from {blocks} on are called, but they run on workers, "
            "where it sees nothing. Enter it before or after the blocks only, use it inside of a block, or train "
            "without the pipeline"
        )
