"""Cut one call of the block stack, made with a whole batch, into calls with microbatches.

Which dimension of which tensor is the batch's is *known*, not guessed: the user's code makes the same call once more
with a few samples more, and the dimension that has grown in proportion is the one (:func:`find_cut`). A mask [T, T]
stays what it was, even where T happens to equal the number of samples. Nothing here knows a process.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...engine.arguments import Earlier, SideInput
from ...engine.call import Call, CallSpec, Made
from ...engine.independence import Parts
from ...engine.memory_order import Order, joined
from ...engine.transport import TensorSpec
from .arguments import SideInputs
from .entered import EnteredStack
from .stack_call import StackCall, passed_to

_MOST_WAYS: Final = 16
"""Of how many ways to cut the arguments beside the hidden states one is looked for."""


NO_DIMENSION: Final = "no dimension of the hidden states {shape} is that of the {count} samples"
Turns = Literal["two", "one"]
"""What stands in the place of whole numbers, when a block is asked whether they name others' rows: two that take turns,
which are rows of another sample in each part; or a single one, which all samples have as that of their group, and as
bounds makes them one."""


class NotCuttable(Exception):
    """A call that can only be made with the whole batch at once; the text says why."""


@dataclass(frozen=True, slots=True)
class Axis:
    """The dimension of a tensor that belongs to the batch."""

    dim: int
    rows: int
    """How many rows in it each sample has."""

    def fits(self, shape: Sequence[int], num_samples: int) -> bool:
        """Whether a tensor of this shape has so many samples."""
        return len(shape) > self.dim and shape[self.dim] == self.rows * num_samples

    def split(self, tensor: Tensor, sizes: Sequence[int]) -> list[Tensor]:
        """Cut a tensor into pieces with so many samples each."""
        return list(torch.split(tensor, [size * self.rows for size in sizes], self.dim))

    def join(self, pieces: Sequence[Tensor], order: Order) -> Tensor:
        """Put the pieces of a tensor together, which lies in that order in memory."""
        return pieces[0] if len(pieces) == 1 else joined(pieces, self.dim, order)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a call of the stack may be cut."""

    forms: tuple[Axis, ...]
    """Of what enters each block, and of what leaves the last one."""
    side_inputs: tuple[Axis | None, ...]
    """By slot; None for what all samples share."""
    beside: tuple[tuple[Made, Axis | None], ...] = ()
    """The same of what else blocks return that is used."""

    def alone(self, call: StackCall, block: int) -> Cut:
        """Return the cut of :meth:`StackCall.alone`."""
        known = self._axes
        passed = passed_to(call.templates[call.block_template[block]])
        axes = [known[Made(block - each.distance, each.number)] for each in passed]
        return dataclasses.replace(self, side_inputs=(*self.side_inputs, *axes))

    def of_block(self, block: int) -> tuple[tuple[int, int | None], ...]:
        """Return which tensors of those that ``block`` returns are used beside its result, and their dimensions."""
        own = ((made.number, axis) for made, axis in self.beside if made.block == block)
        return tuple((number, None if axis is None else axis.dim) for number, axis in own)

    def join_exported(self, call: StackCall, pieces: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Return what the code after the blocks gets of what they return, from that of the microbatches."""
        known = self._axes
        joined: list[Tensor] = []
        for made, *own in zip(call.exported, *pieces, strict=True):
            axis = known[made]
            whole = own[0] if axis is None else axis.join(own, _spec_of(call, made).order)
            joined.append(whole.as_subclass(type(own[0])))
        return joined

    @property
    def _axes(self) -> dict[Made, Axis | None]:
        """The dimensions of all that blocks return and that is used."""
        return {**{Made(block, 0): axis for block, axis in enumerate(self.forms[1:])}, **dict(self.beside)}

    @property
    def hidden(self) -> Axis:
        """Of what enters the stack."""
        return self.forms[0]

    @property
    def result(self) -> Axis:
        """Of what leaves the stack."""
        return self.forms[-1]

    def has_numbers(self, call: StackCall) -> bool:
        """Whether the blocks get whole numbers of each sample's own, which may be those of other samples."""
        sides = zip(self.side_inputs, call.side_inputs, strict=True)
        return any(axis is not None and are_numbers(side) for axis, side in sides)

    def has_bounds(self, call: StackCall) -> bool:
        """Whether the blocks share whole numbers that may say which rows belong together."""
        sides = zip(self.side_inputs, call.side_inputs, strict=True)
        return any(axis is None and are_bounds(side) for axis, side in sides)

    def fits(self, call: StackCall, num_samples: int) -> bool:
        """Whether a call has so many samples where this says that they are."""
        tensors = [(axis, spec.shape) for axis, spec in zip(self.forms, call.specs, strict=True)]
        tensors += [
            (axis, tuple(side.shape))
            for axis, side in zip(self.side_inputs, call.side_inputs, strict=True)
            if axis is not None
        ]
        tensors += [(axis, _spec_of(call, made).shape) for made, axis in self.beside if axis is not None]
        return all(axis.fits(shape, num_samples) for axis, shape in tensors)


@dataclass(frozen=True, slots=True)
class CallForm:
    """All that a call says about its form; keeps no tensor of it."""

    forms: tuple[tuple[int, ...], ...]
    """Of what enters each block, and of what leaves the last one."""
    side_inputs: tuple[tuple[int, ...], ...]
    arguments: tuple[Any, ...]  # Any: constants of the user's
    """The blocks' other arguments."""
    attributes: tuple[Any, ...]
    """What the user's code has set on the blocks, packed."""
    beside: tuple[tuple[Made, tuple[int, ...]], ...] = ()
    """What else of what blocks return is used, and its form."""

    def may_have(self, num_samples: int) -> bool:
        """Whether what enters the blocks may have the rows of so many samples."""
        return any(size and not size % num_samples for size in self.forms[0])

    @classmethod
    def of(cls, call: StackCall) -> CallForm:
        """Describe ``call``."""
        sides = tuple(tuple(side.shape) for side in call.side_inputs)
        attributes = tuple((mode.attributes, mode.tensors) for mode in call.modes)
        beside = tuple((made, _spec_of(call, made).shape) for made in call.used())
        return cls(tuple(spec.shape for spec in call.specs), sides, tuple(_constants(call)), attributes, beside)


def find_cut(whole: CallForm, other: CallForm, num_samples: int, num_others: int) -> Cut:
    """Compare a call with one of another number of samples, and say where it may be cut.

    Raises:
        NotCuttable: It may not be, or the comparison does not tell.
    """
    assert num_samples != num_others
    if len(whole.side_inputs) != len(other.side_inputs) or len(whole.arguments) != len(other.arguments):
        raise NotCuttable("how the blocks are called depends on the number of samples")
    for mine, theirs in zip(whole.arguments, other.arguments, strict=True):
        if not _same_constant(mine, theirs):
            raise NotCuttable(
                f"the blocks are called with the value {mine!r}, which {num_others} samples make {theirs!r}"
            )
    if whole.attributes != other.attributes:
        raise NotCuttable("an attribute that the step sets on the blocks depends on the number of samples")
    sizes = (num_samples, num_others)
    forms = [_axis("what enters the blocks", *each, *sizes) for each in zip(whole.forms, other.forms, strict=True)]
    found = [axis for axis in forms if axis is not None]
    if len(found) < len(forms):
        shape = list(whole.forms[forms.index(None)])
        raise NotCuttable(NO_DIMENSION.format(shape=shape, count=num_samples))
    sides = [
        _axis(f"an argument of the blocks beside the hidden states {list(whole.forms[0])}", *each, *sizes)
        for each in zip(whole.side_inputs, other.side_inputs, strict=True)
    ]
    if [made for made, _ in whole.beside] != [made for made, _ in other.beside]:
        raise NotCuttable("what blocks pass on to others depends on the number of samples")
    pairs = zip(whole.beside, other.beside, strict=True)
    beside = [(made, _axis("what a block returns", mine, theirs, *sizes)) for (made, mine), (_, theirs) in pairs]
    axes, shapes = [axis for _, axis in beside], [shape for _, shape in whole.beside]
    for axis, form in zip((*found, *sides, *axes), (*whole.forms, *whole.side_inputs, *shapes), strict=True):
        if axis is not None and axis.rows != found[0].rows:
            raise NotCuttable(
                f"each sample has {found[0].rows} rows in the hidden states {list(whole.forms[0])}, but {axis.rows} in "
                f"another tensor of the blocks {list(form)}"
            )
    return Cut(tuple(found), tuple(sides), tuple(beside))


def _spec_of(call: StackCall, made: Made) -> TensorSpec:
    return call.spec_of(made.block + 1, Earlier(1, made.number))


def _axis(name: str, mine: Sequence[int], theirs: Sequence[int], size: int, other: int) -> Axis | None:
    """Return the dimension that grew with the samples; None when nothing did."""
    if len(mine) != len(theirs):
        raise NotCuttable(f"{name} has {len(mine)} or {len(theirs)} dimensions, depending on the number of samples")
    changed = [dim for dim, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b]
    if not changed:
        return None
    found = [dim for dim in changed if not mine[dim] % size and theirs[dim] == mine[dim] // size * other]
    if len(found) != 1 or len(changed) != 1:
        raise NotCuttable(f"{name} {list(mine)} becomes {list(theirs)} when {size} samples become {other}")
    return Axis(found[0], mine[found[0]] // size)


def likely_cuts(whole: CallForm, counts: Sequence[int]) -> list[tuple[int, Cut]]:
    """Return where a call looks as if it may be cut, the likeliest first; whether it may be is still to be tried.

    Args:
        whole: The call with the whole batch.
        counts: How many samples that may have.

    Raises:
        NotCuttable: Nowhere.
    """
    found: list[tuple[int, Cut]] = []
    for count in counts:
        for dim in range(min(map(len, whole.forms))):
            if count > 1 and all(form[dim] == count for form in whole.forms):
                axes = (Axis(dim, 1),) * len(whole.forms)
                sides = [_likely_axes(side, dim, count) for side in whole.side_inputs]
                beside = tuple((made, _likely_axes(shape, dim, count)[0]) for made, shape in whole.beside)
                found += [
                    (count, Cut(axes, way, beside)) for way in itertools.islice(_by_likelihood(sides), _MOST_WAYS)
                ]
    if not found:
        shape = list(whole.forms[0])
        raise NotCuttable(NO_DIMENSION.format(shape=shape, count=counts[0]))
    return found


def _likely_axes(shape: Sequence[int], dim: int, count: int) -> list[Axis | None]:
    own = [Axis(dim, 1)] if len(shape) > dim and shape[dim] == count else []
    return [*own, None, *(Axis(each, 1) for each, size in enumerate(shape) if size == count and each != dim)]


def _by_likelihood(sides: Sequence[Sequence[Axis | None]]) -> Iterator[tuple[Axis | None, ...]]:
    """Yield the combinations of one axis for each side input, first those in which few are unlikely."""
    ranks = [range(len(axes)) for axes in sides]
    for total in range(sum(map(len, ranks)) + 1):
        for chosen in _with_sum(ranks, total):
            yield tuple(axes[rank] for axes, rank in zip(sides, chosen, strict=True))


def _with_sum(ranks: Sequence[range], total: int) -> Iterator[tuple[int, ...]]:
    """Yield what adds up to ``total``, one number of each range."""
    if not ranks:
        if total == 0:
            yield ()
        return
    for first in ranks[0]:
        if first <= total:
            yield from ((first, *rest) for rest in _with_sum(ranks[1:], total - first))


def cut_call(call: StackCall, cut: Cut, sizes: Sequence[int]) -> list[StackCall]:
    """Return the calls of the microbatches; their forms (``specs``) are still to be found."""
    hidden = cut.hidden.split(call.hidden.detach(), sizes)
    sides = [
        [side] * len(sizes) if axis is None else _pieces(axis, side, sizes)
        for axis, side in zip(cut.side_inputs, call.side_inputs, strict=True)
    ]
    return [
        StackCall(
            EnteredStack(piece.requires_grad_() if call.ambient.grad and call.hidden.requires_grad else piece),
            call.ambient,
            SideInputs([pieces[index] for pieces in sides]),
            templates=call.templates,
            block_template=call.block_template,
            modes=list(call.modes),
            unkept=call.unkept,
            asked_in=call.asked_in,
            specs=[TensorSpec.of(piece)],
            exported=call.exported,
            passes_on=call.passes_on,
        )
        for index, piece in enumerate(hidden)
    ]


def _pieces(axis: Axis, side: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Cut a side input; its pieces carry a gradient if it does."""
    return [piece.requires_grad_(side.requires_grad) for piece in axis.split(side.detach(), sizes)]


def are_numbers(side: Tensor) -> bool:
    """Whether a tensor's values may be numbers of rows."""
    return not (side.is_floating_point() or side.is_complex() or side.dtype == torch.bool) and side.numel() > 0


def _turned(side: Tensor, whole: Tensor, dim: int, turns: Turns) -> Tensor:
    """Return other numbers of the samples in a tensor's place."""
    low, high = (int(each) for each in whole.aminmax())
    least = max(low, min(0, high))
    if turns == "one":
        return torch.full_like(side, least)
    numbers = least + (torch.arange(side.shape[dim], device=side.device) + 1) % (1 + (least < high))
    shape = [-1 if each == dim else 1 for each in range(side.ndim)]
    return numbers.reshape(shape).expand(side.shape).to(side.dtype).clone()


def are_bounds(side: Tensor) -> bool:
    """Whether what all samples share may say where each one's rows begin and end."""
    return are_numbers(side) and side.numel() > 2 and bool((side.reshape(-1).diff() >= 0).all())


def _one_group(bounds: Tensor) -> Tensor:
    """Return the bounds of the same rows as those of one sample, beside empty ones."""
    turned = torch.full_like(bounds, int(bounds.reshape(-1)[0]))
    turned.view(-1)[-1] = bounds.reshape(-1)[-1]
    return turned


def parts_of(
    call: StackCall, cut: Cut, sizes: Sequence[int], block: int, spec: CallSpec, *, turned: Turns | None = None
) -> tuple[Call, TensorSpec, Parts]:
    """Return a call of one block with the first samples of a batch, what enters it, and the same in parts.

    Args:
        call: The call of the stack.
        cut: How it is cut.
        sizes: How many samples the parts have.
        block: Which block is asked.
        spec: How it is called.
        turned: Which whole numbers stand in the place of the batch's, which need not name other samples.
    """
    enters, leaves = cut.forms[block : block + 2]
    shape = list(call.specs[block].shape)
    shape[enters.dim] = enters.rows * sum(sizes)
    sides = [
        side.detach() if axis is None else side.detach().narrow(axis.dim, 0, axis.rows * sum(sizes)).clone()
        for axis, side in zip(cut.side_inputs, call.side_inputs, strict=True)
    ]
    if turned:
        sides = [
            _turned(side, whole, axis.dim, turned) if axis is not None and are_numbers(side) else side
            for axis, side, whole in zip(cut.side_inputs, sides, call.side_inputs, strict=True)
        ]
    if turned == "one":
        sides = [
            _one_group(side) if axis is None and are_bounds(side) else side
            for axis, side in zip(cut.side_inputs, sides, strict=True)
        ]
    pieces = [
        [side] * len(sizes) if axis is None else [piece.clone() for piece in axis.split(side, sizes)]
        for axis, side in zip(cut.side_inputs, sides, strict=True)
    ]
    calls = tuple(Call(spec, tuple(each[index] for each in pieces), 0) for index in range(len(sizes)))
    rows = tuple(size * enters.rows for size in sizes)
    parts = Parts(calls, rows, enters.dim, leaves.dim, cut.of_block(block))
    return Call(spec, tuple(sides), 0), dataclasses.replace(call.specs[block], shape=tuple(shape)), parts


def kind_of(call: StackCall, counts: Sequence[int]) -> Hashable:
    """Return what calls have in common that are cut alike: which sizes are equal to which, not what they are.

    A longest sample of another length makes no new kind, but one that is as long as there are samples does. So does a
    block that is put into another mode: a BatchNorm that was frozen looks at other samples from then on.

    Args:
        call: The call.
        counts: How many samples the batch may have.
    """
    labels = {count: index + 2 for index, count in enumerate(counts)}

    def label(size: int) -> int:
        return size if size < 2 else labels.setdefault(size, len(labels) + 2)

    shapes = [*dict.fromkeys(spec.shape for spec in call.specs), *(side.shape for side in call.side_inputs)]
    constants = [label(value) if type(value) is int else _name(value) for value in _constants(call)]
    return (
        tuple(tuple(map(label, shape)) for shape in shapes),
        tuple(side.dtype for side in call.side_inputs),
        tuple(constants),
        tuple((bool(mode.attributes), mode.tensors) for mode in call.modes if mode.attributes),
        tuple(mode.training for mode in call.modes),
        call.ambient.grad,
    )


def _name(value: Any) -> Any:  # Any: a constant of the user's; what is returned has a hash
    return value if isinstance(value, (SideInput, str, bool, type(None))) else type(value)


def _constants(call: StackCall) -> Iterator[Any]:
    """All that the blocks are called with, tensors replaced by their slots."""
    yield len(call.block_template)
    yield str(call.block_template)
    for template in call.templates:
        yield str(template.hidden)
        yield from template.kwargs
        yield from pytree.tree_leaves((template.args, template.kwargs))


def _same_constant(mine: Any, theirs: Any) -> bool:
    try:
        return type(mine) is type(theirs) and bool(mine == theirs or (mine != mine and theirs != theirs))
    except Exception:  # a comparison that gives no truth value: values of the user's
        return mine is theirs
