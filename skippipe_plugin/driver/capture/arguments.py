"""What a block is called with, as the driver's code made it: taken when the block is called, or refused by name.

Tensors are looked for everywhere: in containers, in objects, in closures. A value is what it was at the call; what is
changed before it has travelled is refused.
"""

from __future__ import annotations

import io
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from ...engine.arguments import (
    ATOMS,
    ArrayInput,
    CacheRef,
    Earlier,
    HiddenAgain,
    Packed,
    Packer,
    SideInput,
    Template,
    array_of,
    settled,
    versions,
)
from ...engine.call import Made
from ...engine.computed import Computed
from ...engine.errors import SkipPipeError
from .caches import CacheLedger, is_cache
from .graphs import carries, root_of
from .remote import is_remote
from .token import HiddenToken, named_parts
from .unavailable import Recording, Unavailable

_IN_PLACE: Final = (
    "{what} was changed in place between the call of {block} and the end of the blocks. Blocks of a pipeline run after "
    "the code around them, so {block} would get the changed value; make a new tensor instead (x = x + 1 in place of "
    "x += 1)"
)

PADDED: Final = (
    "{name} is called with {kind}, which cannot be sent to a worker: give the blocks the padded tensor ({pad}) and the "
    "lengths or a mask, and pack inside of the block"
)

Part = SideInput | ArrayInput | HiddenAgain | Earlier | Computed
"""What stands for a tensor or an array in an object."""


@dataclass(slots=True)
class SideInputs:
    """The tensors beside the hidden states of one call of the stack, each once."""

    tensors: list[Tensor] = field(default_factory=list)
    arrays: dict[int, tuple[int, Any]] = field(default_factory=dict)  # Any: numpy's array
    """By id of an array: its slot, and the array itself, which keeps the id from being given again."""
    objects: dict[int, tuple[Any, Any, Packed]] = field(default_factory=dict)  # Any: the user's
    """By id of an object: itself, a picture of what it held, and how it travels."""
    carrying: list[int] = field(init=False)
    """The slots of those that require a gradient."""
    roots: list[GradientEdge | None] = field(init=False)
    """Where the gradients of all go."""
    _versions: list[int] = field(init=False)
    _blocks: list[str] = field(init=False)

    def __post_init__(self) -> None:
        """Watch what is given from the start."""
        self.carrying = [slot for slot, tensor in enumerate(self.tensors) if carries(tensor)]
        self.roots = list(map(root_of, self.tensors))
        self._versions = list(versions(self.tensors))
        self._blocks = ["the blocks"] * len(self.tensors)

    def slot(self, tensor: Tensor, block: str) -> int:
        """Return the slot of ``tensor``, an argument of ``block``."""
        (version,) = versions([tensor])
        for index, known in enumerate(self.tensors):
            if known is tensor:
                if version != self._versions[index]:
                    raise self._changed(index)
                return index
        if carries(tensor):
            self.carrying.append(len(self.tensors))
        self.tensors.append(tensor)
        self.roots.append(root_of(tensor))
        self._versions.append(version)
        self._blocks.append(block)
        return len(self.tensors) - 1

    def check(self) -> None:
        """Raise when one of them was changed in place since its block was called."""
        if self.tensors and versions(self.tensors) != tuple(self._versions):
            pairs = enumerate(zip(versions(self.tensors), self._versions, strict=True))
            raise self._changed(next(index for index, (now, before) in pairs if now != before))

    def _changed(self, index: int) -> SkipPipeError:
        what = f"a tensor among the arguments of {self._blocks[index]} (shape {tuple(self.tensors[index].shape)})"
        return SkipPipeError(_IN_PLACE.format(what=what, block=self._blocks[index]))


class ArgumentTaker:
    """Turns the arguments of one block's call into a template.

    Args:
        names: Of all blocks of the stack.
        block: Which one is called.
        hidden: The hidden states that it gets.
        entered: What entered the first block.
        side_inputs: Of this call of the stack; what is found is put here.
        grad: Whether gradients are on.
        cache_slot: Gives a key-value cache its slot.
        recording: The call of the stack, to tell its tokens from others.
        find: Is told what of what blocks have returned is passed on, where nothing had asked for its form.
        leave: Gets a cache that is not sent, since gradients are on.
    """

    def __init__(
        self,
        names: Sequence[str],
        block: int,
        hidden: Tensor,
        side_inputs: SideInputs,
        *,
        grad: bool,
        cache_slot: Callable[[Any], int],
        recording: Recording | None = None,
        find: Callable[[Made], None] = lambda _: None,
        leave: Callable[[Any], None] = lambda _: None,
    ) -> None:
        self._names = names
        self._block = block
        self._hidden = hidden
        self._side_inputs = side_inputs
        self._grad = grad
        self._cache_slot = cache_slot
        self._leave = leave
        self._recording = recording
        self._find = find
        self.has_met_tokens = False
        """Whether anything of what blocks before have returned was among the arguments."""
        self._argument = ""

    def template(self, position: int | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Template:
        """Take the arguments; the hidden states stand at ``position``, or inside of one."""
        taken_args = [None if index == position else self._argument_of(index, each) for index, each in enumerate(args)]
        taken_kwargs = {name: self._argument_of(name, each) for name, each in kwargs.items() if name != position}
        return Template(tuple(taken_args), taken_kwargs, position)

    def _argument_of(self, position: int | str, value: Any) -> Any:
        if type(value) in ATOMS:
            return value
        self._argument = repr(position) if isinstance(position, str) else f"number {position}"
        return self._take(value)

    def _take(self, value: Any) -> Any:
        kind = type(value)
        if kind in ATOMS:
            return value
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind is tuple or kind is list:
            return kind([self._take(item) for item in value])
        if kind is dict:
            return {key: self._take(item) for key, item in value.items()}
        if is_cache(value):
            return self._cache(value)
        if isinstance(value, PackedSequence):
            raise SkipPipeError(
                PADDED.format(name=self._name, kind="a PackedSequence", pad="torch.nn.utils.rnn.pad_packed_sequence")
            )
        if pytree._get_node_type(value) in pytree.SUPPORTED_NODES:
            return pytree.tree_map(self._take, value, is_leaf=is_cache)
        if isinstance(value, Unavailable):
            return self._unavailable(value)
        return self._array(value) if isinstance(value, np.ndarray) else self._object(value)

    @property
    def _name(self) -> str:
        return self._names[self._block]

    def _computed(self, token: HiddenToken) -> Computed:
        deferral = token.deferral
        args, kwargs = self._take(deferral.args), self._take(deferral.kwargs)
        item = None if deferral.is_single else token.number
        return Computed(deferral.function, args, kwargs, item, deferral.ambient)

    def _tensor(self, value: Tensor) -> SideInput | HiddenAgain | Earlier | Computed:
        if value is self._hidden:
            self.has_met_tokens = True
            return HiddenAgain()
        if isinstance(value, HiddenToken) and (made := value.made_in(self._recording)) is not None:
            self.has_met_tokens = True
            return Earlier(self._block - made.block, made.number)
        if isinstance(value, HiddenToken) and value.is_of(self._recording):
            return self._computed(value)
        self._check_tensor(value)
        return SideInput(self._side_inputs.slot(value, self._name))

    def _unavailable(self, value: Unavailable) -> Earlier:
        self.has_met_tokens = True
        if (made := value.made_in(self._recording)) is not None:
            self._find(made)
            return Earlier(self._block - made.block, made.number)
        value.check_wanted(f"argument {self._argument} of {self._name}")
        raise SkipPipeError(
            f"argument {self._argument} of {self._name} is {value!r}: blocks of a pipeline exchange tensors only, "
            "within one call. Keys and values that a block is to find again in the next call can be kept in a "
            "transformers.DynamicCache() that all blocks get and update(keys, values, layer), under "
            "torch.no_grad(): each worker keeps its blocks' part of it"
        )

    def _check_tensor(self, value: Tensor) -> None:
        if isinstance(value, HiddenToken):
            value.check_wanted(f"as argument {self._argument} of {self._name}")
            raise self._earlier_output(value)
        if value.is_meta or is_remote(value):
            raise SkipPipeError(
                f"argument {self._argument} of {self._name} has no values here (it is on the meta device, or a weight "
                "of a block that is on a worker); pass a tensor of the driver's (weight.detach().clone(), made before "
                "the blocks are called), or let the block use a weight of its own"
            )
        if value.is_nested:
            raise SkipPipeError(
                PADDED.format(name=self._name, kind="a nested tensor", pad="torch.nested.to_padded_tensor")
            )
        if value.layout is not torch.strided or value.is_quantized:
            raise SkipPipeError(
                f"argument {self._argument} of {self._name} is a tensor of layout {value.layout}, which cannot be sent "
                "to a worker; pass a dense one"
            )

    def _cache(self, value: Any) -> CacheRef | None:
        if not self._grad:
            return CacheRef(self._cache_slot(value))
        if CacheLedger.is_filled(value):
            raise SkipPipeError(
                f"argument {self._argument} of {self._name} is a key-value cache that is filled already (prefix tuning "
                "does that): keys and values that carry a gradient into every block cannot be sent to the workers. Use "
                "a method whose weights are inside the blocks, such as LoRA, or train without the pipeline. To go on "
                "writing from a cache, call the model under torch.no_grad()"
            )
        self._leave(value)
        return None

    def _array(self, value: Any) -> Any:
        known = self._side_inputs.arrays.get(id(value))
        if known is not None and known[1] is value:
            copy = array_of(self._side_inputs.tensors[known[0]])
            if (copy.dtype, copy.shape, copy.tobytes()) == (value.dtype, value.shape, value.tobytes()):
                return ArrayInput(known[0])
        try:
            tensor = torch.from_numpy(np.array(value, copy=True, order="K"))
        except TypeError:  # strings, objects
            return self._object(value)
        slot = self._side_inputs.slot(tensor, self._name)
        self._side_inputs.arrays[id(value)] = slot, value
        return ArrayInput(slot)

    # -------------------------------------------------------------- objects

    def _object(self, value: Any) -> Packed:
        picture = _picture(value)
        known = self._side_inputs.objects.get(id(value))
        if known is not None and known[0] is value and picture is not None and _alike(known[1], picture):
            self._side_inputs.check()
            return known[2]
        parts: list[Part] = []
        buffer = io.BytesIO()
        try:
            Packer(buffer, lambda part: self._aside(part, parts)).dump(value)
        except SkipPipeError:
            raise
        except Exception as error:
            raise SkipPipeError(
                f"argument {self._argument} of {self._name} ({type(value).__name__}) cannot be sent to a worker: "
                f"{error}; pass tensors, numbers, strings, or objects and containers of them"
            ) from error
        packed = settled(buffer.getvalue(), tuple(parts))
        if not packed.is_passed_on:  # of blocks before it is named by how far they are
            self._side_inputs.objects[id(value)] = value, picture, packed
        return packed

    def _aside(self, part: Any, parts: list[Part]) -> object | None:
        """Take what is no plain data out of an object, or refuse it."""
        if isinstance(part, Tensor):
            return _index(parts, self._tensor(part))
        if isinstance(part, Unavailable):
            return _index(parts, self._unavailable(part))
        if isinstance(part, np.ndarray):
            taken = self._array(part) if part.dtype.kind in "biufc" else None
            return _index(parts, taken) if isinstance(taken, ArrayInput) else None
        if isinstance(part, nn.Module) and any(True for _ in part.parameters()):
            raise SkipPipeError(
                f"argument {self._argument} of {self._name} is or holds a module with parameters "
                f"({type(part).__name__}), which would be a copy on every worker, never trained. Make it a submodule "
                "of each block, or call it before the blocks and pass on what it returns"
            )
        if isinstance(part, types.GeneratorType):
            raise SkipPipeError(
                f"argument {self._argument} of {self._name} is or holds a generator, which cannot be sent to a worker; "
                "pass a list"
            )
        return None

    # ------------------------------------------------------------- refusals

    def _earlier_output(self, token: HiddenToken) -> SkipPipeError:
        names, earlier = self._names, token.origin()
        first = names.index(earlier) if earlier in names else self._block
        parts = named_parts(names, first, self._block)
        instead = f" Pipeline a part of the stack that no such connection enters or leaves: {parts}." if parts else ""
        return SkipPipeError(
            f"{self._name} takes the output of {earlier} beside its hidden states (argument {self._argument}), but "
            f"that stays on a worker, and belongs to another call of the blocks, which is not over.{instead}"
        )


def _index(parts: list[Part], part: Part) -> int:
    if part not in parts:
        parts.append(part)
    return parts.index(part)


# Pictures -----------------------------------------------------------------------------------------


def is_settled(value: Any) -> bool:
    """Whether nothing but a tensor's values can change in ``value``: the same object means the same argument."""
    if type(value) is tuple:
        return all(is_settled(item) for item in value)
    return type(value) in ATOMS or isinstance(value, Tensor) or is_cache(value)


def _picture(value: Any) -> dict[str, Any] | None:
    """Return what a plain object holds, for a comparison by identity; None when that is not so easily told."""
    kind: Any = type(value)  # Any: mypy takes a method of a class for that of an object
    if kind.__reduce_ex__ is not object.__reduce_ex__ or hasattr(kind, "__slots__") or not hasattr(value, "__dict__"):
        return None
    if isinstance(value, (type, types.FunctionType, types.MethodType, nn.Module, dict, list, set)):
        return None
    held = dict(vars(value))
    return held if all(is_settled(item) and not is_cache(item) for item in held.values()) else None


def _alike(before: dict[str, Any] | None, now: dict[str, Any]) -> bool:
    return before is not None and before.keys() == now.keys() and all(before[name] is now[name] for name in now)
