"""Parameters and buffers whose values are on a worker: what user code asks them is answered as one process would.

Such a tensor stays the user's own object, of a subclass of its class. Its form is known here; its value is fetched when
code asks for it, and what code writes into that copy goes to the worker before anything runs there. Who fetches and
sends is a :class:`Source`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...engine.errors import SkipPipeError
from ...engine.handover import swap_memory
from .copies import Copied

Function = Callable[..., Any]  # Any: whatever torch's functions take and return
_SLOT: Final = "_skippipe_slot"


class Source(Protocol):
    """Has the values of remote tensors, and their gradients."""

    names_only: bool
    """Whether nothing is fetched at present: the tensors stand for themselves."""

    @property
    def device(self) -> torch.device:
        """Where the driver computes, and where remote tensors seem to be."""

    def value(self, slot: Slot) -> Tensor:
        """Return the copy that user code reads and writes."""

    def overwritten(self, slot: Slot) -> None:
        """Note that all of the copy will be written: what it is now need not be fetched."""

    def set_value(self, slot: Slot, value: Tensor) -> None:
        """Let ``value`` be that copy from now on."""

    def noted(self) -> Copied:
        """Note what all of its tensors are, to bring that back."""

    def gradient(self, slot: Slot) -> Tensor | None:
        """Return the accumulated gradient, or None as one process would."""

    def set_gradient(self, slot: Slot, value: Tensor | None) -> None:
        """Replace the accumulated gradient."""


@dataclass(frozen=True, slots=True, eq=False)
class Slot:
    """What a remote tensor knows of itself."""

    source: Source
    block: int
    name: str
    """In the block."""
    label: str
    """In the model."""
    form: Tensor
    """Of its shape, strides and type, on the meta device."""
    cls: type[Tensor]
    """What it is when its value is here."""


class RemoteTensor(Tensor):
    """A tensor whose value is elsewhere; :func:`detach` makes them."""

    is_remote = True
    """For those who cannot import this class."""

    @classmethod
    def __torch_function__(
        cls,
        func: Function,
        types: Iterable[type],
        args: tuple[Any, ...] = (),  # Any: whatever the torch function takes
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in _OF_THE_OBJECT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _OF_THE_FORM:
            return func(slot_of(args[0]).form, *args[1:], **kwargs)
        if func in _OF_THE_PLACE:
            return _OF_THE_PLACE[func](slot_of(args[0]).source.device)
        if func in _LIKE:
            kwargs.setdefault("device", slot_of(args[0]).source.device)
            return func(slot_of(args[0]).form, *args[1:], **kwargs)
        if func is Tensor.copy_ and is_remote(args[0]):
            slot_of(args[0]).source.overwritten(slot_of(args[0]))
        if func in _DETACH and slot_of(args[0]).source.names_only:
            return args[0]
        return _with_values(func, args, kwargs)

    @property
    def data(self) -> Tensor:
        slot = slot_of(self)
        return slot.source.value(slot).detach()  # shares its count of versions, as the value itself must

    @data.setter
    def data(self, value: Tensor) -> None:
        slot = slot_of(self)
        slot.source.set_value(slot, value)

    def set_(self, source: Any = None, *args: Any, **kwargs: Any) -> Any:  # Any: a tensor, or storage and form
        """Take another tensor's memory; torch asks no subclass about this one of its methods."""
        slot = slot_of(self)
        if isinstance(source, Tensor) and not args and not kwargs:
            slot.source.set_value(slot, source)
        else:
            with torch.no_grad():
                slot.source.value(slot).set_(source, *args, **kwargs)
        return self

    @property
    def grad(self) -> Tensor | None:
        slot = slot_of(self)
        return slot.source.gradient(slot) if self.requires_grad else None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        slot = slot_of(self)
        slot.source.set_gradient(slot, value)

    @grad.deleter
    def grad(self) -> None:
        slot = slot_of(self)
        slot.source.set_gradient(slot, None)

    def register_hook(self, hook: Function) -> Any:
        raise SkipPipeError(_HOOKED.format(name=slot_of(self).label, method="register_hook"))

    def register_post_accumulate_grad_hook(self, hook: Function) -> Any:
        raise SkipPipeError(_HOOKED.format(name=slot_of(self).label, method="register_post_accumulate_grad_hook"))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            memo[id(self)] = _ordinary(self, slot_of(self).source.value(slot_of(self)).clone())
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        slot = slot_of(self)
        ordinary = _ordinary(self, slot.source.value(slot).detach())
        return ordinary.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


_HOOKED: Final = (
    "{name}.{method}(...): this parameter is on a pipeline's worker, where its gradient is computed in parts, one for "
    "each microbatch, so the hook cannot run on the driver. Change the whole gradient instead, {name}.grad in "
    "on_before_optimizer_step (in a loop of your own: between backward and optimizer.step), or keep the block on the "
    "driver with blocks=..., which names the stack without it"
)


def _getters(*names: str) -> set[Function]:
    return {getattr(Tensor, name).__get__ for name in names if hasattr(Tensor, name)}


def _setters(*names: str) -> set[Function]:
    return {getattr(Tensor, name).__set__ for name in names if hasattr(Tensor, name)}


def _functions(*names: str) -> set[Function]:
    """Return methods of tensors, and torch's functions of the same names; some versions of torch lack some."""
    return {getattr(place, name) for place in (Tensor, torch) for name in names if hasattr(place, name)}


_OF_THE_OBJECT: Final = frozenset(
    _getters("requires_grad", "is_leaf", "grad_fn", "retains_grad", "output_nr", "names", "_version")
    | _getters("_backward_hooks", "_post_accumulate_grad_hooks")
    | _functions("requires_grad_", "is_inference", "has_names")
    | _setters("requires_grad", "_backward_hooks")
)
"""What the object itself has: asked of it as of any other."""
_OF_THE_FORM: Final = frozenset(
    _getters("shape", "dtype", "layout", "ndim", "itemsize", "nbytes", "is_sparse", "is_quantized", "is_nested")
    | _functions("size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset")
    | _functions("is_contiguous", "is_floating_point", "is_complex", "is_signed", "__len__", "is_conj", "is_neg")
)
"""What follows from shape, strides and type."""
_LIKE: Final = frozenset(
    _functions("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like")
    | _functions("new_zeros", "new_ones", "new_empty", "new_full")
)
"""What makes a tensor of the same form, and reads no value."""
_DETACH: Final = frozenset({Tensor.detach, torch.detach})
_OF_THE_PLACE: Final[dict[Function, Callable[[torch.device], Any]]] = {
    Tensor.device.__get__: lambda device: device,
    **dict.fromkeys(_getters("is_meta"), lambda device: False),
    **dict.fromkeys(_getters("is_cpu"), lambda device: device.type == "cpu"),
    **dict.fromkeys(_getters("is_cuda"), lambda device: device.type == "cuda"),
    Tensor.get_device: lambda device: -1 if device.index is None else device.index,
}


def is_remote(tensor: object) -> TypeGuard[RemoteTensor]:
    """Whether ``tensor`` has its value on a worker."""
    return isinstance(tensor, RemoteTensor)


def check_is_here(model: nn.Module) -> None:
    """Raise when a part of ``model`` is on the workers of another pipeline."""
    remote = next((name for name, parameter in model.named_parameters() if is_remote(parameter)), None)
    if remote is not None:
        raise SkipPipeError(
            f'{remote} is on the workers of another pipeline, whose blocks stay there between runs (gather="never"). '
            "Go on with that strategy, Trainer(devices=..., strategy=trainer.strategy), or bring the blocks into the "
            "model first: trainer.strategy.gather()"
        )


@contextmanager
def unread(module: nn.Module) -> Iterator[None]:
    """Let remote tensors stand for themselves in a ``state_dict`` of which only the names count; nothing is fetched."""
    sources = {slot_of(parameter).source for parameter in module.parameters() if is_remote(parameter)}
    for source in sources:
        source.names_only = True
    try:
        yield
    finally:
        for source in sources:
            source.names_only = False


def slot_of(tensor: Tensor) -> Slot:
    """Return what a remote tensor knows of itself."""
    return tensor.__dict__[_SLOT]  # type: ignore[no-any-return]


def _with_values(func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a function on the values of remote tensors; what it has written into and returns is the user's object."""
    own: dict[int, Tensor] = {}

    def value_of(tensor: Any) -> Any:
        if not is_remote(tensor):
            return tensor
        value = slot_of(tensor).source.value(slot_of(tensor))
        if torch.is_grad_enabled() and tensor.requires_grad:
            value = value.detach().requires_grad_()
            value.register_hook(  # type: ignore[no-untyped-call]
                functools.partial(_no_way_back, slot_of(tensor).label)
            )
        own[id(value)] = tensor
        return value

    args, kwargs = pytree.tree_map(value_of, (args, kwargs))
    result = func(*args, **kwargs)
    if isinstance(result, (list, tuple)) and type(result) in (list, tuple):
        return type(result)(own.get(id(item), item) for item in result)
    return own.get(id(result), result)


def _no_way_back(label: str, gradient: Tensor) -> None:
    raise SkipPipeError(
        f"the loss depends on the value of {label} itself, which is on a pipeline's worker: the gradient of such a "
        "term does not reach it. Use weight_decay=... of the optimizer for a penalty on weights, read the value under "
        "torch.no_grad() if it shall not be trained by this, or keep its block on the driver with blocks=..., which "
        "names the stack without it"
    )


def detach(tensor: Tensor, source: Source, block: int, name: str, label: str) -> None:
    """Give up a tensor's memory, keeping the object: its value is at ``source`` from now on."""
    form = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")
    slot = Slot(source, block, name, label, form, type(tensor))
    if not tensor.is_meta:
        tensor.grad = None
        tensor.data = _placeholder(tensor)
    tensor.__dict__[_SLOT] = slot
    tensor.__class__ = _remote_class(type(tensor))


def reattach(tensor: Tensor, value: Tensor) -> None:
    """Give a remote tensor memory again."""
    slot: Slot = tensor.__dict__.pop(_SLOT)
    tensor.__class__ = slot.cls
    if tensor.is_meta:
        swap_memory(tensor, value.detach())
    else:
        tensor.data = value.detach()


def _placeholder(tensor: Tensor) -> Tensor:
    """One element in the place of all: NaN where there is one, should a library look below what Python sees."""
    fill = float("nan") if tensor.is_floating_point() or tensor.is_complex() else 0
    return torch.full((), fill, dtype=tensor.dtype, device=tensor.device).expand(tensor.shape)


@functools.cache
def _remote_class(cls: type[Tensor]) -> type[Tensor]:
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (RemoteTensor,) if cls is Tensor else (RemoteTensor, cls), names)


def _ordinary(tensor: Tensor, value: Tensor) -> Tensor:
    """Return a tensor of the class that ``tensor`` has in one process, with what else stands on it."""
    slot = slot_of(tensor)
    if issubclass(slot.cls, nn.Parameter):
        result: Tensor = slot.cls(value, tensor.requires_grad)
    else:
        result = value.requires_grad_(tensor.requires_grad)
    extra = {key: kept for key, kept in tensor.__dict__.items() if key != _SLOT}
    result.__dict__.update(copy.copy(extra))
    return result
