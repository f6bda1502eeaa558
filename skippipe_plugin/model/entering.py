"""Whether what enters the blocks is each sample's own: microbatches must bring them the batch's rows of it.

The made-up hidden states behind the blocks say nothing of what their arguments are, so these are compared themselves.
"""

from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..driver.capture.stack_call import StackCall
from ..engine.arguments import ATOMS, ArrayInput, CacheRef, Earlier, HiddenAgain, Packed, SideInput, Template
from ..engine.computed import Computed

_LEAVES: Final = ATOMS | {SideInput, ArrayInput, CacheRef, HiddenAgain, Earlier, Packed, Computed}
_TOLD: Final = ATOMS | {SideInput}
"""What is compared of attributes: objects may change in any way between two runs."""
_COPIED_ELEMENTS: Final = 1 << 20
"""Larger tensors are not copied: what a step changes in place later is small."""
_ROUNDING: Final = {torch.float16: 5e-3, torch.bfloat16: 4e-2, torch.float32: 2e-5}
Filled = tuple[Template, Sequence[Tensor]]
"""Arguments of a block, and the side inputs that stand in them."""
HIDDEN: Final = "what enters the blocks"
_OF_SEVERAL: Final = "{what} is another there than for the batch, computed over samples"


@dataclass(frozen=True, slots=True)
class Entered:
    """What one call of the stack brought, as it was then."""

    hidden: Tensor
    sides: tuple[Tensor, ...]
    templates: tuple[Template, ...]
    block_template: tuple[int, ...]
    attributes: tuple[tuple[bytes, tuple[int, ...]], ...]
    rounding: float
    """How far values may be apart because of the precision that the driver's code computes in."""
    call: StackCall | None = None
    """The call itself."""

    @classmethod
    def of(cls, call: StackCall) -> Entered:
        """Note what ``call`` brings."""
        return cls(
            _kept(call.hidden),
            tuple(map(_kept, call.side_inputs)),
            tuple(call.templates),
            tuple(call.block_template),
            tuple((mode.attributes, mode.tensors) for mode in call.modes),
            max((_ROUNDING.get(dtype, 0.0) for _, dtype in call.ambient.autocast), default=0.0),
            call,
        )


@dataclass(frozen=True, slots=True)
class Entrance:
    """The calls that stand at one place in the batch's step and in those of its microbatches."""

    whole: Entered
    parts: Sequence[Entered]
    sizes: Sequence[int]
    rounding: float

    def differs(self, blocks: Sequence[Any]) -> str:
        """Say which argument of the blocks is no sample's own; nothing when all are.

        Args:
            blocks: The blocks, for the names of their arguments.
        """
        seen = set()
        for block, index in enumerate(self.whole.block_template):
            numbers = index, *(part.block_template[block] for part in self.parts)
            if numbers in seen:
                continue
            seen.add(numbers)
            templates = [part.templates[number] for part, number in zip(self.parts, numbers[1:], strict=True)]
            if name := self._differing(self.whole.templates[index], templates, getattr(blocks[block], "forward", None)):
                return _OF_SEVERAL.format(what=f"the blocks' argument {name}")
        if not all(self._attributes_follow(block) for block in range(len(self.whole.attributes))):
            return _OF_SEVERAL.format(what="an attribute that the step sets on the blocks")
        return ""

    @property
    def is_of_samples(self) -> bool:
        """Whether the hidden states are each sample's own."""
        return self._follows(self.whole.hidden, [part.hidden for part in self.parts])

    def lacking(self, blocks: Sequence[Any]) -> Iterator[tuple[StackCall, str, list[Filled]]]:
        """Yield calls of microbatches that have None where the batch has a tensor, each kind of them once.

        With each comes the name of an argument that is None, and by block what it would be called with otherwise.
        """
        seen: set[frozenset[int]] = set()
        for number, part in enumerate(self.parts):
            filled = [self._filled(number, *each) for each in enumerate(blocks)]
            slots = frozenset(slot for _, _, lacks in filled for slot in lacks)
            if not slots or slots in seen or part.call is None:
                continue
            seen.add(slots)
            name = next(name for _, _, lacks in filled for name in lacks.values())
            yield part.call, name, [(template, sides) for template, sides, _ in filled]

    def _filled(self, number: int, block: int, module: Any) -> tuple[Template, list[Tensor], dict[int, str]]:
        """Return what a microbatch calls a block with when the batch's rows take the place of None; and those slots."""
        part = self.parts[number]
        whole, own = (each.templates[each.block_template[block]] for each in (self.whole, part))
        sides, lacks, arguments = list(self.whole.sides), dict[int, str](), dict(_arguments(own))
        forward = getattr(module, "forward", None)
        for position, value in _arguments(whole):
            pairs = zip(_leaves(value), _leaves(arguments.get(position)), strict=False)
            for slot, other in itertools.chain.from_iterable(itertools.starmap(_pairs, pairs)):
                if other is None:
                    sides[slot], lacks[slot] = _rows(sides[slot], self.sizes)[number], whole.name_of(position, forward)
                else:
                    sides[slot] = part.sides[other]
        return whole, sides, lacks

    def _differing(self, whole: Template, parts: Sequence[Template], forward: Callable[..., Any] | None) -> str:
        if any(part.hidden != whole.hidden for part in parts):
            return whole.name_of(whole.hidden, forward)
        all_arguments = [dict(_arguments(template)) for template in (whole, *parts)]
        for position in dict.fromkeys(itertools.chain(*all_arguments)):
            values = [pytree.tree_flatten(each.get(position), is_leaf=_is_leaf) for each in all_arguments]
            forms = [form for _, form in values]
            leaves = [leaves for leaves, _ in values]
            if any(form != forms[0] for form in forms[1:]) or not all(
                self._leaf_follows(first, rest) for first, *rest in zip(*leaves, strict=True)
            ):
                return whole.name_of(position, forward)
        return ""

    def _leaf_follows(self, whole: Any, parts: Sequence[Any]) -> bool:
        if isinstance(whole, (SideInput, ArrayInput)):
            if any(type(part) is not type(whole) and part is not None for part in parts):
                return False
            return self._slots_follow(whole.slot, [None if part is None else part.slot for part in parts])
        if any(type(part) is not type(whole) for part in parts):
            return False
        if isinstance(whole, Packed):
            kinds = [type(each) for each in whole.parts]
            if any(part.data != whole.data or [type(each) for each in part.parts] != kinds for part in parts):
                return False
            slots = zip(whole.slots, *(part.slots for part in parts), strict=True)
            return all(self._slots_follow(first, rest) for first, *rest in slots)
        if isinstance(whole, Computed):
            return self._computed_follows(whole, parts)
        if isinstance(whole, float):
            return all(_are_close(torch.tensor(part), torch.tensor(whole), 2e-5) for part in parts)
        try:
            return all(part is whole or bool(part == whole) for part in parts)
        except Exception:  # a comparison of the user's that gives no truth value
            return True

    def _computed_follows(self, whole: Computed, parts: Sequence[Computed]) -> bool:
        """Whether code between the blocks computes the same of microbatches; numbers of samples may be their own."""
        flat = [pytree.tree_flatten((each.args, each.kwargs), is_leaf=_is_leaf) for each in (whole, *parts)]
        same = all(
            (each.function, each.item, each.ambient) == (whole.function, whole.item, whole.ambient) for each in parts
        )
        if not same or any(form != flat[0][1] for _, form in flat):
            return False
        return all(
            self._leaf_follows(first, rest) or self._counts_samples(first, rest)
            for first, *rest in zip(*(leaves for leaves, _ in flat), strict=True)
        )

    def _counts_samples(self, whole: Any, parts: Sequence[Any]) -> bool:
        total = sum(self.sizes)
        if type(whole) is not int or whole % total or any(type(part) is not int for part in parts):
            return False
        return all(part == whole // total * size for part, size in zip(parts, self.sizes, strict=True))

    def _slots_follow(self, whole: int, parts: Sequence[int | None]) -> bool:
        sides = [None if slot is None else part.sides[slot] for slot, part in zip(parts, self.parts, strict=True)]
        return self._follows(self.whole.sides[whole], sides)

    def _attributes_follow(self, block: int) -> bool:
        packed = [each.attributes[block] for each in (self.whole, *self.parts)]
        if not any(data for data, _ in packed):
            return True
        whole, *parts = [_Unpickler(*each).load() if each[0] else {} for each in packed]
        for key in whole.keys() & set.intersection(*(set(part) for part in parts)):
            values = [pytree.tree_flatten(each[key], is_leaf=_is_leaf) for each in (whole, *parts)]
            if any(form != values[0][1] for _, form in values[1:]):
                return False
            for first, *rest in zip(*(leaves for leaves, _ in values), strict=True):
                lacks = type(first) is SideInput and None in rest
                if lacks or (type(first) in _TOLD and not self._leaf_follows(first, rest)):
                    return False
        return True

    def _follows(self, whole: Tensor, parts: Sequence[Tensor | None]) -> bool:
        given = [part for part in parts if part is not None]
        if any(not _is_comparable(each) for each in (whole, *given)):
            return True
        if any(part.dtype != whole.dtype or part.ndim != whole.ndim for part in given):
            return False
        tolerance = max(self.rounding, self.whole.rounding, _ROUNDING.get(whole.dtype, 0.0))
        if len(given) < len(parts):
            filled = _with_masks(whole, parts, self.sizes)
            if filled is None:
                return False
            given = filled
        if all(part.shape == whole.shape for part in given):
            return all(_are_close(part, whole, tolerance) for part in given)
        joined = (*_joined(whole, given, self.sizes), *_added_up(whole, given))
        return any(_are_close(each, whole, tolerance) for each in joined)


class _Unpickler(pickle.Unpickler):
    """Reads attributes of a block, where a side input stands for each tensor."""

    def __init__(self, data: bytes, slots: Sequence[int]) -> None:
        super().__init__(io.BytesIO(data))
        self._slots = slots

    def persistent_load(self, pid: Any) -> Any:  # Any: a tensor's number, or the name of a weight
        return SideInput(self._slots[pid]) if isinstance(pid, int) else pid


def _arguments(template: Template) -> Iterator[tuple[int | str, Any]]:
    values: list[tuple[int | str, Any]] = [*enumerate(template.args), *template.kwargs.items()]
    return ((position, value) for position, value in values if position != template.hidden)


def _is_leaf(value: Any) -> bool:
    return type(value) in _LEAVES


def _leaves(value: Any) -> list[Any]:
    return pytree.tree_leaves(value, is_leaf=_is_leaf)


def _pairs(whole: Any, part: Any) -> Iterator[tuple[int, int | None]]:
    """Yield the slots in a leaf of the batch's argument, with those in a microbatch's."""
    if isinstance(whole, Packed) and isinstance(part, Packed):
        yield from zip(whole.slots, part.slots, strict=True)
    elif isinstance(whole, (SideInput, ArrayInput)):
        yield whole.slot, None if part is None else part.slot


def _kept(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.clone() if _is_comparable(tensor) and tensor.numel() <= _COPIED_ELEMENTS else tensor


def _is_comparable(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_meta and not tensor.is_nested


def _are_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if one.shape != other.shape:
        return False
    if one.is_complex():
        one, other = torch.view_as_real(one.resolve_conj()), torch.view_as_real(other.resolve_conj())
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    one, other = one.double(), other.double()
    finite = other[torch.isfinite(other)]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    if scale > 1e4:  # a mask's large numbers are no measure of the others
        small = finite[finite.abs() <= 1e4]
        scale = float(small.abs().max()) if small.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)


def _joined(whole: Tensor, parts: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[Tensor]:
    """Yield what the parts are together, one after the other in a dimension that may be the batch's."""
    total = sum(sizes)
    for dim in range(whole.ndim):
        rest = (*whole.shape[:dim], *whole.shape[dim + 1 :])
        if any((*part.shape[:dim], *part.shape[dim + 1 :]) != rest for part in parts):
            continue
        if whole.shape[dim] == total:  # what all samples of a part share may stand there once
            parts = [
                part.expand(*part.shape[:dim], size, *part.shape[dim + 1 :]) if part.shape[dim] == 1 else part
                for part, size in zip(parts, sizes, strict=True)
            ]
        if sum(part.shape[dim] for part in parts) != whole.shape[dim]:
            continue
        yield torch.cat(list(parts), dim)
        rows = whole.shape[dim] // total
        if rows > 1 and all(part.shape[dim] == rows * size for part, size in zip(parts, sizes, strict=True)):
            apart = [torch.unflatten(part, dim, (rows, size)) for part, size in zip(parts, sizes, strict=True)]
            yield torch.cat(apart, dim + 1).flatten(dim, dim + 1)  # the samples of one row stand together


def _added_up(whole: Tensor, parts: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield what the parts are together where they say at which row each sequence begins, as ``cu_seqlens`` do."""
    if whole.ndim != 1 or whole.is_floating_point() or whole.is_complex() or whole.dtype == torch.bool:
        return
    if any(not part.numel() or int(part[0]) or bool((part.diff() < 0).any()) for part in parts):
        return
    starts = list(itertools.accumulate((int(part[-1]) for part in parts), initial=0))
    yield torch.cat([parts[0][:1], *(part[1:] + start for part, start in zip(parts, starts[:-1], strict=True))])


def _rows(whole: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    return torch.split(whole, [size * (whole.shape[0] // sum(sizes)) for size in sizes])


def _with_masks(whole: Tensor, parts: Sequence[Tensor | None], sizes: Sequence[int]) -> list[Tensor] | None:
    """Return the parts, with the batch's rows where there is none: a mask that hides the same in all of them.

    Models pass no mask when no sample of the batch is padded. Whether that is the same to the blocks they are asked.
    """
    total = sum(sizes)
    if whole.ndim < 2 or whole.shape[0] % total:
        return None
    rows = _rows(whole, sizes)
    unmasked = [row for row, part in zip(rows, parts, strict=True) if part is None]
    if not all(torch.equal(row, unmasked[0][:1].expand_as(row)) for row in unmasked):
        return None
    return [row if part is None else part for row, part in zip(rows, parts, strict=True)]
