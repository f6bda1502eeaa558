"""Forward hooks of user code on blocks that live elsewhere: their modules are tapped, and the hooks run on the driver.

What a hook does outside of its block (it collects features, counts, logs) belongs to the driver, so what it would be
called with travels there. What belongs to the block's computation runs with the block: torch's own hooks and ours, and
hooks that return a value and keep nothing.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cloudpickle
import torch
from torch import Tensor, nn

from .errors import SkipPipeError


@dataclass(frozen=True, slots=True)
class HookList:
    """The hooks of one module of a block, in their order."""

    module: int
    """Its number in the order of ``modules()``."""
    pre: bool
    """Whether they run before its forward."""
    hooks: tuple[tuple[bool, int], ...]
    """By hook: whether it runs on the driver, with its number there; otherwise which of those that came along it is."""

    @property
    def is_tapped(self) -> bool:
        """Whether one of them runs on the driver."""
        return any(on_driver for on_driver, _ in self.hooks)


@dataclass(slots=True)
class TapEvent:
    """One call of a module, as one hook of the driver's is to see it."""

    block: int
    module: int
    hook: int
    args: Any  # Any: what the module was called with
    kwargs: Any
    output: Any


@dataclass(frozen=True, slots=True)
class Tapped:
    """What a stage's forward of one microbatch has to show the driver's hooks."""

    events: bytes
    tensors: tuple[Tensor, ...]
    requires_grad: tuple[bool, ...]


class Recorder:
    """Collects what tapped modules are called with, while a forward is under way."""

    def __init__(self) -> None:
        self._events: list[TapEvent] | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._originals: dict[tuple[int, int, bool], list[Any]] = {}

    def begin(self) -> None:
        """Begin a forward."""
        self._events = []

    def end(self) -> None:
        """End it; what runs the blocks again for a backward is not recorded."""
        self._events = None
        self._versions = []

    def record(self, event: TapEvent) -> None:
        """Note one call of a module."""
        if self._events is not None:
            self._events.append(event)
            tensors = pack_events([event])[1]
            self._versions += [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def pack(self, name: str) -> tuple[bytes, list[Tensor]]:
        """Return all events of the forward under way, and the tensors in them.

        Raises:
            SkipPipeError: One of them was written to after its hook had seen it, or cannot be sent.
        """
        assert self._events is not None
        if any(tensor._version != version for tensor, version in self._versions):
            raise SkipPipeError(
                f"a forward hook on a module of {name} sees a tensor that is written to in place afterwards, and hooks "
                "of blocks run after the whole stack: use the form of the operation that is not in place"
            )
        try:
            return pack_events(self._events)
        except Exception as error:
            raise SkipPipeError(
                f"what a forward hook on a module of {name} would see cannot be sent to the driver: {error}"
            ) from error

    def apply(self, block: int, module: nn.Module, lists: Sequence[HookList]) -> None:
        """Let the modules of a block have the hooks that the driver says."""
        modules = list(module.modules())
        for each in lists:
            owner = modules[each.module]
            name = "_forward_pre_hooks" if each.pre else "_forward_hooks"
            hooks, takes_kwargs = getattr(owner, name), getattr(owner, f"{name}_with_kwargs")
            known = self._originals.setdefault((block, each.module, each.pre), list(hooks.items()))
            hooks.clear()
            for place, (on_driver, number) in enumerate(each.hooks):
                if on_driver:
                    hooks[-1 - place] = Tap(self, block, each.module, number)
                    takes_kwargs[-1 - place] = True
                else:
                    hooks.update(known[number : number + 1])


class Tap:
    """Stands on a worker for a hook that runs on the driver."""

    def __init__(self, recorder: Recorder, block: int, module: int, hook: int) -> None:
        self._recorder = recorder
        self._event = (block, module, hook)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any = None) -> None:
        self._recorder.record(TapEvent(*self._event, args, kwargs, output))


def pack_events(events: Sequence[TapEvent]) -> tuple[bytes, list[Tensor]]:
    """Return events pickled without their tensors, and those, each once."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump([(e.block, e.module, e.hook, e.args, e.kwargs, e.output) for e in events])
    return buffer.getvalue(), pickler.tensors


def unpack_events(packed: bytes, tensors: Sequence[Tensor]) -> list[TapEvent]:
    """Invert :func:`pack_events`."""
    return [TapEvent(*each) for each in _Unpickler(io.BytesIO(packed), tensors).load()]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: object) -> object:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        return self._index[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, pid: int) -> Tensor:
        return self._tensors[pid]


# --------------------------------------------------- hooks that came along


def own_hooks(module: nn.Module) -> OrderedDict[tuple[int, bool, int], Any]:
    """Return the forward hooks of a block's modules but torch's and ours: by module, whether before, and number."""
    found: OrderedDict[tuple[int, bool, int], Any] = OrderedDict()
    for index, each in enumerate(module.modules()):
        for pre, hooks in ((True, each._forward_pre_hooks), (False, each._forward_hooks)):
            found.update({(index, pre, number): hook for number, hook in hooks.items() if not is_librarys(hook)})
    return found


def is_librarys(hook: Any) -> bool:  # Any: whatever was registered
    """Whether a hook is part of a module's computation by where it comes from."""
    hook = getattr(hook, "func", hook)  # of functools.partial
    source = str(getattr(hook, "__module__", None) or type(hook).__module__)
    return source.partition(".")[0] in ("torch", "skippipe_plugin") or is_capturing(hook)


def is_capturing(hook: Any) -> bool:  # Any: whatever was registered
    """Whether a hook is one of those by which transformers keeps what layers return."""
    return getattr(hook, "__module__", "") == CAPTURING


CAPTURING: Final = "transformers.utils.output_capturing"
"""Whose hooks keep what layers return while someone asks for that: nobody on a worker."""


class Returns:
    """Watches in a probe whether the hooks that came along return anything: those that do not run on the driver."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._returned: dict[tuple[int, bool, int], bool] = {}

    def __enter__(self) -> Returns:
        self._hooks = [hook for hook in own_hooks(self._module).items() if not isinstance(hook[1], Tap)]
        for key, hook in self._hooks:
            self._place(key, self._watched(key, hook))
        return self

    def __exit__(self, *_: object) -> None:
        for key, hook in self._hooks:
            self._place(key, hook)

    def idle(self) -> tuple[tuple[int, bool, int], ...]:
        """Return those that ran and returned nothing: by module, whether before, and their place among its hooks."""
        modules = list(self._module.modules())
        return tuple(
            (index, pre, list(self._dict(modules[index], pre)).index(number))
            for (index, pre, number), returned in self._returned.items()
            if not returned
        )

    def _watched(self, key: tuple[int, bool, int], hook: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            result = hook(*args)
            self._returned[key] = self._returned.get(key, False) or result is not None
            return result

        return watched

    def _place(self, key: tuple[int, bool, int], hook: Any) -> None:
        index, pre, number = key
        self._dict(list(self._module.modules())[index], pre)[number] = hook

    def _dict(self, module: nn.Module, pre: bool) -> Any:
        return module._forward_pre_hooks if pre else module._forward_hooks


def gradients_of(leaves: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return by index the gradients that have come to what hooks have seen."""
    with torch._C.DisableTorchFunctionSubclass():
        return {index: leaf.grad for index, leaf in enumerate(leaves) if leaf.requires_grad and leaf.grad is not None}
