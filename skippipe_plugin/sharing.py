"""What a block reaches beside its registered parts: lists of modules, closures, views, references back to the model.

A block travels with all it refers to. What another block or the rest of the model also uses would become a copy there,
which is trained on its own; so it is found before anything travels. Constants may be shared: copies of them are alike.
So may registered parts: of those it is known which are one (:mod:`skippipe_plugin.driver.shared`).
"""

from __future__ import annotations

import io
import types
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import cloudpickle
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm

_HOOKS = frozenset(name for name in vars(nn.Module()) if name.endswith("hooks") or name.startswith("_state_dict"))
_WAY_OUT = (
    "Register it in the block as well (self.name = module or parameter), which may then have it in common with others, "
    'give each its own, or choose a range of blocks without it, as in blocks="model.layers.2:10".'
)


class PartitionError(ValueError):
    """Say why a model cannot be cut into stages, and what to change."""


def check_hidden_references(model: nn.Module, names: Sequence[str], blocks: Sequence[nn.Module]) -> None:
    """Check that no block refers, past its registered parts, to what others train.

    Args:
        model: The root module.
        names: Of the blocks in it.
        blocks: The stack.

    Raises:
        PartitionError: One does; the message says which, by what attribute, and whose it is. Or a block has no
            forward, so that nothing could run it.
    """
    for name, block in zip(names, blocks, strict=True):
        if not has_forward(block):
            raise PartitionError(
                f"{name} ({type(block).__name__}) has no forward, so code calls its parts and never the block, but a "
                "stage can only call whole blocks. Give its class a forward and call the blocks, or name another stack "
                "with blocks=..."
            )
        _check_can_travel(name, block)
    owners = _owners(model, names, blocks)
    seen: dict[int, tuple[int, str]] = {}
    for index, (name, block) in enumerate(zip(names, blocks, strict=True)):
        if any(part is model for part in block.modules()):
            raise _back_reference(name, "")
        own = {id(tensor) for tensor in (*block.parameters(), *block.buffers())} | _made_by_hooks(block)
        for tensor in _reached(block):
            if id(tensor) in own:
                continue
            owner = owners.get(_memory(tensor))
            if owner is not None:
                raise _refusal(model, name, block, tensor, owner)
            if tensor.requires_grad and tensor.is_leaf:
                first, first_name = seen.setdefault(id(tensor), (index, name))
                if first != index:
                    raise _refusal(model, name, block, tensor, f"a tensor of {first_name}")


def _made_by_hooks(block: nn.Module) -> set[int]:
    """Return what torch's old spectral norm makes of a parameter anew before each forward."""
    hooks = ((part, hook) for part in block.modules() for hook in part._forward_pre_hooks.values())
    return {id(getattr(part, hook.name, None)) for part, hook in hooks if isinstance(hook, SpectralNorm)}


def outside(model: nn.Module, blocks: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """Yield the modules of a model that are reached without entering a block, each once."""
    seen, left = {id(block) for block in blocks}, [model]
    while left:
        module = left.pop()
        if id(module) not in seen:
            seen.add(id(module))
            yield module
            left += [child for child in module._modules.values() if child is not None]


def parameters_outside(model: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters of a model's modules outside of the blocks, which may have them, too."""
    own = {id(each) for part in outside(model, blocks) for each in part._parameters.values()}
    return [parameter for parameter in model.parameters() if id(parameter) in own]


def has_forward(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, seen through torch.compile's wrapper."""
    inner = original(module)
    if isinstance(inner, torch.jit.ScriptModule):
        return True  # it has one, and none that can be asked of its class
    return type(inner).forward is not nn.Module.forward or "forward" in vars(inner)


def original(module: nn.Module) -> nn.Module:
    """Return the module itself where torch.compile has wrapped it; a scripted module's parts are no dictionary."""
    parts = module._modules
    return (parts.get("_orig_mod") if isinstance(parts, dict) else None) or module


def _check_can_travel(name: str, block: nn.Module) -> None:
    """Raise when a block has parts that cannot be handed over as they are."""
    for path, part in block.named_modules():
        where = f"{name}.{path}" if path else name
        if isinstance(part, torch.jit.ScriptModule):
            raise PartitionError(
                f"{where} is compiled by torch.jit, and such a module cannot be handed over to a worker. Use the "
                "module itself, without torch.jit.script or torch.jit.trace, or choose blocks without it, as in "
                'blocks="model.layers.2:10"'
            )
        if any(map(is_lazy, (*part._parameters.values(), *part._buffers.values()))):
            raise PartitionError(
                f"{where} is lazy and has no weights yet, so nothing can be handed over to a worker. Let the model run "
                "once before, on a small batch: in setup or configure_model of a LightningModule (in a loop of your "
                "own: before the pipeline is opened)"
            )


def _owners(model: nn.Module, names: Sequence[str], blocks: Sequence[nn.Module]) -> dict[object, str]:
    """Return the name of each registered parameter by its memory."""
    found: dict[object, str] = {}
    for name, parameter in model.named_parameters():
        found.setdefault(_memory(parameter), name)
    for name, block in zip(names, blocks, strict=True):
        for local, parameter in block.named_parameters():
            found[_memory(parameter)] = f"{name}.{local}"
    return found


def _memory(tensor: Tensor) -> object:
    """Name the memory of a tensor: views of one share it. What has none is known by itself."""
    if tensor.is_meta or tensor.layout is not torch.strided or type(tensor).__name__ == "UninitializedParameter":
        return id(tensor)
    try:
        return tensor.untyped_storage().data_ptr() or id(tensor)
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _refusal(model: nn.Module, name: str, block: nn.Module, tensor: Tensor, owner: str) -> PartitionError:
    where = _path_to(block, tensor)
    if _reaches(block, model):
        return _back_reference(name, where)
    return PartitionError(
        f"{name}{where} uses {owner}, which a pipeline would put on another machine or make a copy of: the two would "
        f"be one shared parameter no longer. {_WAY_OUT}"
    )


def _back_reference(name: str, where: str) -> PartitionError:
    return PartitionError(
        f"{name}{where} refers back to the whole model, which would travel to a worker with the block. Pass the block "
        "what it needs of the model as an argument, or when it is made; a config object is fine."
    )


def _path_to(block: nn.Module, tensor: Tensor) -> str:
    """Name the attribute of a block by which it reaches ``tensor``."""
    for prefix, part in block.named_modules():
        for attribute, value in vars(part).items():
            if attribute in ("_modules", "_parameters", "_buffers") or attribute in _HOOKS:
                continue
            if any(found is tensor for found in _reached(value)):
                return f".{prefix}.{attribute}" if prefix else f".{attribute}"
    return ""


def _reaches(block: nn.Module, model: nn.Module) -> bool:
    return any(part is model for part in _walk(block).modules)


def _reached(value: Any) -> list[Tensor]:  # Any: a block, or what one holds
    return _walk(value).tensors


def _walk(value: Any) -> _Walker:
    walker = _Walker()
    try:
        walker.dump(value)
    except Exception:
        return walker  # what cannot be pickled is refused, with its reason, when the blocks are sent
    return walker


class _Nothing(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        return len(data)


class _Walker(cloudpickle.Pickler):  # type: ignore[misc, unused-ignore]
    """Goes where a pickler goes, hooks aside, and through weak references; keeps what it meets and writes nothing."""

    def __init__(self) -> None:
        super().__init__(_Nothing())
        self.tensors: list[Tensor] = []
        self.modules: list[nn.Module] = []
        self._met: set[int] = set()

    def persistent_id(self, obj: Any) -> object:
        if isinstance(obj, Tensor):
            if id(obj) not in self._met:
                self._met.add(id(obj))
                self.tensors.append(obj)
            return "tensor"
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, nn.Module):
            self.modules.append(obj)
            state = {key: value for key, value in vars(obj).items() if key not in _HOOKS}
            return _stand_in, (), list(state.values())
        if isinstance(obj, weakref.ref):
            return _stand_in, (obj(),)
        if isinstance(obj, (types.ModuleType, type)):
            return _stand_in, ()
        return super().reducer_override(obj)


def _stand_in(*args: Any) -> None:
    """Never called: nothing is read back."""
