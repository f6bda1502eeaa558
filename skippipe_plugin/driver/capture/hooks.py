"""The forward hooks on blocks that live elsewhere: found before each call, run on the driver with the stack's result.

See :mod:`skippipe_plugin.engine.taps` for which hooks these are.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ...engine.arguments import versions
from ...engine.errors import SkipPipeError
from ...engine.gradients import collector
from ...engine.taps import HookList, TapEvent, is_capturing, is_librarys, own_hooks
from ..doors import BEFORE_HANDOVER
from .suspend import current_thread

_GLOBAL: Final[tuple[dict[int, Any], ...]] = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
WATCHED_LATE: Final = (
    "the step has registered a forward hook on a module of the blocks, which is to see the whole batch, but the batch "
    "is cut already, since no step did so before. Register it before the step (in on_train_batch_start, ...; in a loop "
    "of your own: before the model is called), or let the step run once, on the whole batch, with microbatches='stack'"
)
_WATCHED: Final = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


@dataclass(frozen=True, slots=True)
class Running:
    """A hook that runs on the driver."""

    hook: Any  # Any: whatever was registered
    pre: bool
    takes_kwargs: bool


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one form hold the same, NaN included."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


class BlockHooks:
    """The forward hooks of one block's modules.

    Args:
        name: The block's name in the model.
        block: The block.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name = name
        self._modules = list(block.modules())
        self._names = list(dict(block.named_modules()))
        self._block = block
        self._here = {number for number, hook in own_hooks(block).items() if not _is_computation(hook)}
        """Those at the hand-over that run on the driver."""
        # By module and whether before: torch's numbers of those that travel.
        self._travelled = {
            (index, pre): [
                n for n, hook in hooks.items() if (index, pre, n) not in self._here and not is_capturing(hook)
            ]
            for index, module in enumerate(self._modules)
            for pre, hooks in ((True, module._forward_pre_hooks), (False, module._forward_hooks))
        }
        self._touched: set[tuple[int, bool]] = {(index, pre) for index, pre, _ in self._here}
        self.lists: tuple[HookList, ...] = ()
        self.running: dict[tuple[int, int], Running] = {}
        """The hooks that run on the driver, by module and by number among the module's; numbers are used again."""
        self.look()

    def look(self) -> None:
        """Find out which hooks there are."""
        lists, self.running = [], {}
        for index, module in enumerate(self._modules):
            if module._backward_hooks or module._backward_pre_hooks:
                self._refuse_backward(module, index)
            for pre, hooks in ((True, module._forward_pre_hooks), (False, module._forward_hooks)):
                travelled = self._travelled[index, pre]
                own = [number for number, hook in hooks.items() if number in travelled or not is_capturing(hook)]
                if (index, pre) in self._touched or own != travelled:
                    self._touched.add((index, pre))
                    lists.append(HookList(index, pre, tuple(self._listed(index, pre, hooks))))
        self.lists = tuple(lists)

    def let_run_here(self, idle: Sequence[tuple[int, bool, int]]) -> None:
        """Run hooks on the driver that turned out to return nothing: by module, whether before, and place there."""
        for index, pre, place in idle:
            travelled = self._travelled[index, pre]
            self._here.add((index, pre, travelled[place]))
            self._touched.add((index, pre))
        if idle:
            self.look()

    def run(self, event: TapEvent, hooks: Mapping[tuple[int, int], Running], tensors: Sequence[Tensor]) -> None:
        """Call the hook that an event is for.

        Raises:
            SkipPipeError: It wants to change what the blocks compute.
        """
        running, module = hooks[event.module, event.hook], self._modules[event.module]
        hook = running.hook
        inputs = (event.args, event.kwargs) if running.takes_kwargs else (event.args,)
        counts, uncounted = versions(tensors), [(each, each.clone()) for each in tensors if each.is_inference()]
        given = event.args if running.pre else event.output
        result = hook(module, *inputs) if running.pre else hook(module, *inputs, event.output)
        if result is given:
            result = None  # what it was given, as torch's profiler does: nothing changes
        written = versions(tensors) != counts or not all(same_values(now, before) for now, before in uncounted)
        if result is not None or written:
            raise SkipPipeError(
                f"the forward hook {_called(hook)} on {self._full_name(event.module)} "
                f"{'returns a value' if result is not None else 'writes into a tensor'}, but hooks that keep something "
                "outside of the block, or were registered after the blocks went to their workers, run on the driver, "
                "where that changes nothing. Let one hook, registered in __init__ and without variables of its own, "
                "change the result, and another one look at it"
            )

    @contextmanager
    def taken_out(self) -> Iterator[None]:
        """Leave the hooks that run on the driver behind, for as long as the block is packed."""
        kept = [(getattr(module, name), dict(getattr(module, name))) for module in self._modules for name in _WATCHED]
        for index, pre, number in self._here:
            module = self._modules[index]
            (module._forward_pre_hooks if pre else module._forward_hooks).pop(number, None)  # in several blocks, maybe
        for module in self._modules:
            for number in [n for n, hook in module._forward_hooks.items() if is_capturing(hook)]:
                del module._forward_hooks[number]
        try:
            yield
        finally:
            for hooks, before in kept:
                hooks.clear()
                hooks.update(before)

    def watched(self) -> list[Any]:
        """Return the dictionaries of hooks that have any."""
        dicts = (getattr(module, name) for module in self._modules for name in _WATCHED)
        return [hooks for hooks in dicts if hooks]

    def _listed(self, index: int, pre: bool, hooks: Mapping[int, Any]) -> Iterator[tuple[bool, int]]:
        travelled, module = self._travelled[index, pre], self._modules[index]
        with_kwargs = module._forward_pre_hooks_with_kwargs if pre else module._forward_hooks_with_kwargs
        for place, (number_of_torch, hook) in enumerate(hooks.items()):
            if number_of_torch in travelled and (index, pre, number_of_torch) not in self._here:
                yield False, travelled.index(number_of_torch)
                continue
            if is_capturing(hook):
                continue  # of transformers' own, which find tokens
            if is_librarys(hook):
                raise SkipPipeError(
                    f"the hook {_called(hook)} was registered on {self._full_name(index)} after the blocks went to "
                    f"their workers; it is part of the module's computation. Register it {BEFORE_HANDOVER}"
                )
            number = 2 * place + pre
            self.running[index, number] = Running(hook, pre, number_of_torch in with_kwargs)
            yield True, number

    def _full_name(self, index: int) -> str:
        return ".".join(part for part in (self.name, self._names[index]) if part)

    def _refuse_backward(self, module: nn.Module, index: int) -> None:
        hook = next(iter((*module._backward_hooks.values(), *module._backward_pre_hooks.values())))
        raise SkipPipeError(
            f"{self._full_name(index)} has a backward hook ({_called(hook)}), which would run on a worker, with a copy "
            "of what it keeps. Look at gradients where they reach the driver (the input of the first block, the output "
            "of the last), or train without the pipeline"
        )


class StackHooks:
    """The hooks of all blocks, and whether any came or went since they were looked at."""

    def __init__(self, names: Sequence[str], blocks: Sequence[nn.Module]) -> None:
        self.blocks = [BlockHooks(name, block) for name, block in zip(names, blocks, strict=True)]
        self._note()

    @property
    def are_running(self) -> bool:
        """Whether any run on the driver."""
        self._refresh(self._with_hooks)
        return any(block.running for block in self.blocks)

    def of(self, block: int) -> BlockHooks:
        """Return those of one block as they are now."""
        self._refresh((block,) if self._watched[block] else ())
        return self.blocks[block]

    def _refresh(self, blocks: Collection[int]) -> None:
        """Look again if hooks came or went: torch counts their numbers up, by those of tensors too."""
        if RemovableHandle.next_id != self._next or any(
            list(map(len, self._watched[block])) != self._lengths[block] for block in blocks
        ):
            for each in self.blocks:
                each.look()
            self._note()
        if any(_GLOBAL) and current_thread() is not None:
            raise SkipPipeError(
                "a forward or backward hook for all modules is registered (register_module_forward_hook, a counter of "
                "operations, ...), but the blocks are on workers, where it would not run. Remove it, or register a "
                "hook on the modules that it is for"
            )

    def _note(self) -> None:
        self._next = RemovableHandle.next_id
        self._watched = [list(block.watched()) for block in self.blocks]
        self._lengths = [list(map(len, hooks)) for hooks in self._watched]
        self._with_hooks = [block for block, hooks in enumerate(self._watched) if hooks]


class Seen(Tensor):
    """What has a part of its gradient on workers, where something else was computed of it, too.

    Such is what hooks on blocks see, and what blocks return. The driver's part travels there, and theirs never here.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OF_GRADIENTS:
            raise SkipPipeError(
                f"{getattr(func, '__name__', func)} on what a forward hook of a remote block has seen, or the block "
                "has returned: a part of its gradient comes from the blocks, and stays on the workers. Compute with "
                "the tensor, or train without the pipeline"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


_OF_GRADIENTS: Final = (
    Tensor.register_hook,
    Tensor.retain_grad,
    Tensor.register_post_accumulate_grad_hook,
    vars(torch._C.TensorBase)["grad"].__get__,
    Tensor.backward,
    torch.autograd.grad,
)


def seen(tensor: Tensor, requires_grad: bool) -> tuple[Tensor, Tensor]:
    """Return a leaf that collects what comes back, and what the hook sees of it."""
    leaf = collector(tensor.detach().requires_grad_(requires_grad))
    if not requires_grad:
        return leaf, leaf
    with torch.enable_grad():
        return leaf, leaf.clone().as_subclass(Seen)


def _is_computation(hook: Any) -> bool:  # Any: whatever was registered
    """Whether a hook may run on a worker: it keeps nothing that others see, so it can only change the result."""
    if is_librarys(hook):
        return True
    if not isinstance(hook, types.FunctionType):
        return False
    closure = inspect.getclosurevars(hook)
    values = [*closure.nonlocals.values(), *closure.globals.values(), *(hook.__defaults__ or ())]
    return all(map(_is_constant, values))


def _is_constant(value: object) -> bool:
    constants = (int, float, complex, str, bytes, type(None), type, types.ModuleType, types.BuiltinFunctionType)
    return isinstance(value, (*constants, torch.dtype, torch.device)) or (
        isinstance(value, types.FunctionType) and str(value.__module__).partition(".")[0] == "torch"
    )


def _called(hook: Any) -> str:  # Any: whatever was registered
    return str(getattr(hook, "__qualname__", None) or type(hook).__qualname__)
