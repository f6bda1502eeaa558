"""Blocks on their way to another process: structure as cloudpickle, tensors as raw bytes.

A receiver needs importable block classes only; classes of the driver's own script travel by value.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils import swap_tensors

from .channel import Buffer
from .control.values import PackedBlocks, TensorEntry
from .device import HOST
from .errors import SkipPipeError
from .memory_order import order_of
from .transport import TensorSpec, as_bytes, from_bytes

_INDICES: Final = " indices"
_VALUES: Final = " values"


def import_paths() -> list[str]:
    """Return where this process imports from, so that a worker finds the same modules."""
    return [path or os.getcwd() for path in sys.path]  # noqa: PTH109 - sys.path holds strings


def also_import_from(paths: Iterable[str]) -> None:
    """Let this process import from another one's places, too."""
    sys.path += [path for path in paths if path not in sys.path]


def pack_tensors(tensors: Mapping[str, Tensor]) -> tuple[list[TensorEntry], list[Buffer]]:
    """Return entries (name, shape, dtype, order in memory) and one blob for each tensor."""
    return [_entry(name, tensor) for name, tensor in tensors.items()], [*map(tensor_blob, tensors.values())]


def _entry(name: str, tensor: Tensor) -> TensorEntry:
    return name, list(tensor.shape), str(tensor.dtype).removeprefix("torch."), list(order_of(tensor))


def unpack_tensors(entries: Sequence[TensorEntry], blobs: Sequence[Buffer]) -> dict[str, Tensor]:
    """Invert :func:`pack_tensors`; the tensors own their memory."""
    return {name: tensor_from_blob(_spec(rest), blob) for (name, *rest), blob in zip(entries, blobs, strict=True)}


def _spec(entry: Sequence[Any]) -> TensorSpec:  # Any: an entry but its name
    shape, dtype, order = entry
    return TensorSpec(tuple(shape), getattr(torch, dtype), tuple(order))


def pack_gradients(gradients: Mapping[str, Tensor]) -> tuple[list[TensorEntry], list[Buffer]]:
    """Do what :func:`pack_tensors` does for gradients, which may be sparse, as those of embeddings."""
    parts: dict[str, Tensor] = {}
    for name, gradient in gradients.items():
        if gradient.layout is torch.strided:
            parts[name] = gradient
        else:
            whole = gradient.coalesce()
            shape = torch.tensor(gradient.shape)
            parts |= {name: shape, f"{name}{_INDICES}": whole.indices(), f"{name}{_VALUES}": whole.values()}
    return pack_tensors(parts)


def unpack_gradients(entries: Sequence[TensorEntry], blobs: Sequence[Buffer]) -> dict[str, Tensor]:
    """Invert :func:`pack_gradients`."""
    parts = unpack_tensors(entries, blobs)
    found: dict[str, Tensor] = {}
    for name in (name for name in parts if not name.endswith((_INDICES, _VALUES))):
        indices, tensor = parts.get(f"{name}{_INDICES}"), parts[name]
        if indices is None:
            found[name] = tensor
        else:
            found[name] = torch.sparse_coo_tensor(indices, parts[f"{name}{_VALUES}"], tensor.tolist())
    return found


def tensor_blob(tensor: Tensor) -> Buffer:
    """Return the bytes of ``tensor`` as they lie, without copying when it is dense in host memory."""
    return as_bytes(tensor).numpy().data


def tensor_from_blob(spec: TensorSpec, blob: Buffer) -> Tensor:
    """Read a tensor; what :mod:`skippipe_plugin.engine.sealed` has received is used in place."""
    if spec.num_bytes == 0:
        return spec.empty(HOST)
    data = blob if isinstance(blob, (bytearray, mmap.mmap)) else bytearray(blob)
    return from_bytes(torch.frombuffer(data, dtype=torch.uint8), spec)


def pack_blocks(
    blocks: Mapping[int, nn.Module], *, values: bool = True, instead: Mapping[int, Tensor] = MappingProxyType({})
) -> tuple[PackedBlocks, list[Buffer]]:
    """Return the entries of the blocks' tensors, and the blobs: the pickled structure first.

    Without ``values`` parameters and buffers travel as on the meta device. ``instead`` maps the ``id`` of a tensor to
    what travels in its place.
    """
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    try:
        pickler.dump(dict(blocks))
    except Exception as error:
        raise SkipPipeError(
            f"the blocks cannot be sent to a worker: {error}. A block must not hold what cannot be pickled, such as "
            "locks, open files or the Trainer; keep such things outside of the block. What the blocks' code reads "
            "and cannot be pickled either, such as a function of torch.jit.script in the script itself, belongs with "
            "the blocks into a module that the script imports"
        ) from error
    tensors = {str(index): tensor for index, tensor in enumerate(pickler.tensors)}
    left_out = set() if values else {id(t) for b in blocks.values() for t in (*b.parameters(), *b.buffers())}
    real = {
        name: instead.get(id(tensor), tensor)
        for name, tensor in tensors.items()
        if not tensor.is_meta and id(tensor) not in left_out
    }
    entries, blobs = pack_tensors(real)
    meta = [_entry(name, tensor) for name, tensor in tensors.items() if name not in real]
    return (entries, meta), [buffer.getvalue(), *blobs]


def unpack_blocks(
    packed: PackedBlocks, blobs: Sequence[Buffer], *, device: torch.device = HOST, by_own_classes: bool = False
) -> dict[int, nn.Module]:
    """Invert :func:`pack_blocks`; blocks that were built on the meta device still are.

    Args:
        packed: The entries of the blocks' tensors.
        blobs: The structure, and the tensors.
        device: Where tensors go that were on a device and are neither parameters nor buffers, such as a table that an
            earlier call has cached; what was on the host stays there, as ``module.to()`` leaves it.
        by_own_classes: Whether this very process has packed them. A script's own classes travel by value, and would be
            made anew in place: with other functions, which read other global names than the script's.
    """
    entries, meta = packed
    tensors = unpack_tensors(entries, blobs[1:])
    tensors |= {name: _spec(rest).empty(torch.device("meta")) for name, *rest in meta}
    kind = _OwnUnpickler if by_own_classes else _Unpickler
    blocks: dict[int, nn.Module] = kind(io.BytesIO(blobs[0]), tensors, device).load()
    return blocks


def pack_object(value: object) -> tuple[list[TensorEntry], list[Buffer]]:
    """Return the entries of the tensors in a picklable object, and the blobs: the pickled structure first."""
    buffer = io.BytesIO()
    pickler = _Pickler(buffer)
    pickler.dump(value)
    entries, blobs = pack_tensors({str(index): tensor for index, tensor in enumerate(pickler.tensors)})
    return entries, [buffer.getvalue(), *blobs]


def unpack_object(entries: Sequence[TensorEntry], blobs: Sequence[Buffer]) -> Any:  # Any: whatever was packed
    """Invert :func:`pack_object`."""
    return _Unpickler(io.BytesIO(blobs[0]), unpack_tensors(entries, blobs[1:])).load()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    """Puts each distinct tensor aside, with what makes it a parameter."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []
        self._index: dict[int, int] = {}

    def persistent_id(self, obj: object) -> object:
        if type(obj) not in (Tensor, nn.Parameter):
            return None
        assert isinstance(obj, Tensor)
        if id(obj) not in self._index:
            self._index[id(obj)] = len(self.tensors)
            self.tensors.append(obj)
        is_on_device = obj.device.type not in ("cpu", "meta")
        return self._index[id(obj)], isinstance(obj, nn.Parameter), obj.requires_grad, is_on_device

    def reducer_override(self, obj: Any) -> Any:  # Any: what pickle takes and gives
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            cls = parametrize.type_before_parametrizations(obj)
            return _parametrized, (cls, dict(obj.__dict__), list(obj.parametrizations))  # type: ignore[arg-type]
        return super().reducer_override(obj)


def _parametrized(cls: type[nn.Module], state: dict[str, Any], names: Sequence[str]) -> nn.Module:
    """Make a module with parametrizations, which torch itself refuses to pickle: each has a class of its own."""
    module: nn.Module = cls.__new__(cls)
    module.__dict__.update(state)
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
    return module


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Mapping[str, Tensor], device: torch.device = HOST) -> None:
        super().__init__(file)
        self._tensors = tensors
        self._device = device
        self._loaded: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:  # Any: what persistent_id returned
        index, is_parameter, requires_grad, is_on_device = pid
        if index not in self._loaded:
            tensor = self._tensors[str(index)]
            if is_on_device and not tensor.is_meta:
                tensor = tensor.to(self._device)
            self._loaded[index] = (
                nn.Parameter(tensor, requires_grad) if is_parameter else tensor.requires_grad_(requires_grad)
            )
        return self._loaded[index]


class _OwnUnpickler(_Unpickler):
    """Leaves classes that are pickled by value as they are: they are this process's."""

    def find_class(self, module: str, name: str) -> Any:  # Any: whatever a pickle names
        found = super().find_class(module, name)
        return _left_alone if found is cloudpickle.cloudpickle._class_setstate else found


def _left_alone(cls: type, state: object) -> type:
    return cls


def materialize(block: nn.Module, device: torch.device) -> None:
    """Give memory and initial values to what was built on the meta device; the rest moves to ``device``.

    Raises:
        SkipPipeError: A module with meta tensors has no ``reset_parameters``.
    """
    recurrent = let_go(block)
    for name, module in block.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        meta = [tensor for tensor in own if tensor.is_meta]
        if not meta:
            continue
        for tensor in meta:
            swap_memory(tensor, torch.empty_like(tensor, device=device))
        reset = getattr(module, "reset_parameters", None)
        if not callable(reset):
            raise SkipPipeError(
                f"{type(module).__name__} at {name!r} was built on the meta device but has no reset_parameters(); "
                "add one, or build the model with real weights"
            )
        reset()
    block.to(device)
    find_again(recurrent)


def allocate(block: nn.Module, device: torch.device) -> None:
    """Give memory without values to what is on the meta device; the rest moves to ``device``."""
    recurrent = let_go(block)
    for tensor in dict.fromkeys((*block.parameters(), *block.buffers())):
        if tensor.is_meta:
            swap_memory(tensor, torch.empty_like(tensor, device=device))
    block.to(device)
    find_again(recurrent)


def let_go(block: nn.Module) -> list[nn.RNNBase]:
    """Drop the weak references of recurrent modules to their weights, which cannot get other memory with any left.

    Returns the modules; :func:`find_again` gives them theirs when the weights have their memory.
    """
    recurrent = [module for module in block.modules() if isinstance(module, nn.RNNBase)]
    for module in recurrent:
        module._flat_weight_refs.clear()  # in place: whoever has the module's attributes, too, has the same list
    return recurrent


def find_again(recurrent: Iterable[nn.RNNBase]) -> None:
    """Let recurrent modules refer to their weights as they are now."""
    for module in recurrent:
        module._init_flat_weights()


def swap_memory(tensor: Tensor, replacement: Tensor) -> None:
    """Give ``tensor`` the memory (and device) of ``replacement``; whoever shares the object sees it, and ties stay."""
    if isinstance(tensor, nn.Parameter):
        replacement = nn.Parameter(replacement.detach(), requires_grad=tensor.requires_grad)
    with torch._C.DisableTorchFunctionSubclass():
        tensor.grad = None
        swap_tensors(tensor, replacement)  # type: ignore[no-untyped-call]
