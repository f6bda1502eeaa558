"""Whether blocks make the same of microbatches as of the batch, and leave the same: answered where they live."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from ..engine import independence
from ..engine.arguments import Template
from ..engine.call import Call, CallSpec
from ..engine.control.answers import PartsCompared
from ..engine.control.commands import CompareParts
from ..engine.device import HOST
from ..engine.independence import Parts
from ..engine.stage import Stage
from ..engine.transport import TensorSpec
from .capture.cutting import Cut, Turns, parts_of
from .capture.microbatch import split_sizes
from .capture.side_inputs import dump_probe
from .capture.stack_call import StackCall, passed_to, with_sides
from .probing import holder_of

if TYPE_CHECKING:
    from .pipeline import Pipeline

_FEW: Final = 2
"""The most samples in a part that is tried first."""
_MIXES: Final = (
    "a block ({name}) computes something else for a part of the batch than for all of it, as BatchNorm and attention "
    "between samples do"
)
_FAILS: Final = "a block ({name}) fails when it is asked what it makes of a part of the batch"
_KEEPS: Final = (
    "a block ({name}) keeps something from one forward to the next: {what} is another when it has run once for each "
    "part of the batch than when it has run once for all of it"
)


def difference_of_parts(
    pipeline: Pipeline, call: StackCall, cut: Cut, num_samples: int, *, in_doubt: bool = True, known_aside: bool = False
) -> str:
    """Ask one block of each kind whether parts of the batch come to the same as all of it; say what does not.

    Args:
        pipeline: Knows who holds the blocks.
        call: The call of the stack with the whole batch.
        cut: Where it is cut.
        num_samples: The samples of its batch.
        in_doubt: Whether a block counts that cannot be asked, and numbers that may name samples, if not in this batch.
        known_aside: Whether BatchNorm, which is known to look at its batch, is left out.
    """
    proxies, sizes = pipeline.proxies, split_sizes(num_samples, len(pipeline.microbatches))
    few = [min(_FEW, *sizes)] * 2
    for block in proxies.one_of_each(call):
        found = _ask(pipeline, call, cut, few, block, known_aside)
        if found and few != list(sizes):  # whether it is so in this batch, and not by where its parts begin
            found = _ask(pipeline, call, cut, sizes, block, known_aside)
            found = found or _ask(pipeline, call, cut, _shifted(sizes), block, known_aside)
        if not found and in_doubt:  # numbers of this batch need not name other samples, and those of others may
            asked = (
                _ask(pipeline, call, cut, parts, block, known_aside, turned=turned)
                for parts, turned in _ways_by_numbers(call, cut, few, sizes)
            )
            found = next((each for each in asked if each not in ("", independence.FAILS)), "")
        if not found or (found == independence.FAILS and not in_doubt):
            continue
        text = {independence.MIXES: _MIXES, independence.FAILS: _FAILS}.get(found, _KEEPS)
        return text.format(name=proxies.names[block], what=found)
    return ""


def _shifted(sizes: Sequence[int]) -> list[int]:
    """Return parts of the same batch that begin elsewhere."""
    return [sizes[0] + 1, *sizes[1:-1], *([sizes[-1] - 1] if sizes[-1] > 1 else [])]


def _ways_by_numbers(
    call: StackCall, cut: Cut, few: Sequence[int], sizes: Sequence[int]
) -> Iterator[tuple[Sequence[int], Turns]]:
    """Yield in what parts, and by which whole numbers, blocks may turn out to look at samples that numbers name."""
    if cut.has_numbers(call):
        yield few, "two"
        yield few, "one"
    if cut.has_bounds(call):
        yield sizes, "one"


def difference_of_arguments(
    pipeline: Pipeline, call: StackCall, others: Sequence[tuple[Template, Sequence[Tensor]]]
) -> int | None:
    """Ask one block of each kind whether other arguments come to the same; return which block says that they do not.

    Args:
        pipeline: Knows who holds the blocks.
        call: A call of the stack.
        others: By block: the other arguments, and the side inputs that stand in them.
    """
    proxies = pipeline.proxies
    kinds: dict[tuple[int, int, int], int] = {}
    for block, (template, _) in enumerate(others):
        kinds.setdefault((proxies.book.alike(block)[0], call.block_template[block], id(template)), block)
    for block in kinds.values():
        alone = call.alone(block)
        question = dataclasses.replace(proxies.question_about(alone, block), carried=())  # of other slots, maybe
        spec, enters = _precise(call, question, call.specs[block])
        template, sides = others[block]
        template, sides = _alone(template, sides, alone)
        other = Call(dataclasses.replace(spec, templates=(template,)), _own(sides), 0)
        parts = Parts((other,), (enters.shape[0],), 0, 0, known_aside=True)
        if _answer(pipeline, Call(spec, _own(alone.side_inputs), 0), enters, parts, block):
            return block
    return None


def _alone(template: Template, sides: Sequence[Tensor], alone: StackCall) -> tuple[Template, Sequence[Tensor]]:
    """Return other arguments of a block with what it gets of others among its side inputs, too."""
    passed = passed_to(template)
    if not passed:
        return template, sides
    return with_sides(template, len(sides)), [*sides, *alone.side_inputs[len(alone.side_inputs) - len(passed) :]]


def _own(sides: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(side.detach().clone() for side in sides)


def _precise(call: StackCall, spec: CallSpec, enters: TensorSpec) -> tuple[CallSpec, TensorSpec]:
    """Return a question in full precision, where differences can be told from rounding."""
    if call.ambient.autocast and enters.dtype in (torch.bfloat16, torch.float16):
        enters = dataclasses.replace(enters, dtype=torch.float32)
    return dataclasses.replace(spec, ambient=dataclasses.replace(spec.ambient, autocast=())), enters


def bending_block(pipeline: Pipeline, call: StackCall) -> str:
    """Ask one block of each kind whether its backward is linear; name one whose is not, and nothing otherwise."""
    proxies = pipeline.proxies
    for block in proxies.one_of_each(call):
        alone = call.alone(block)
        whole = Call(proxies.question_about(alone, block), tuple(side.detach() for side in alone.side_inputs), 0)
        beside = tuple((made.number, None) for made in call.used() if made.block == block)
        if _answer(pipeline, whole, call.specs[block], Parts((), (), 0, 0, beside), block) == independence.BENDS:
            return f"a block ({proxies.names[block]})"
    return ""


def _ask(
    pipeline: Pipeline,
    call: StackCall,
    cut: Cut,
    sizes: Sequence[int],
    block: int,
    known_aside: bool,
    *,
    turned: Turns | None = None,
) -> str:
    call, cut = call.alone(block), cut.alone(call, block)
    spec = pipeline.proxies.question_about(call, block)
    if known_aside:
        spec, _ = _precise(call, spec, call.specs[block])
    whole, enters, parts = parts_of(call, cut, sizes, block, spec, turned=turned)
    if known_aside:
        _, enters = _precise(call, spec, enters)
    parts = dataclasses.replace(parts, known_aside=known_aside)
    return _answer(pipeline, whole, enters, parts, block)


def _answer(pipeline: Pipeline, whole: Call, enters: TensorSpec, parts: Parts, block: int) -> str:
    asked, holder = holder_of(pipeline, block)
    if isinstance(holder, Stage):
        return holder.difference_of_parts(asked, whole, enters, parts)
    parts = dataclasses.replace(parts, calls=tuple(each.at(HOST) for each in parts.calls))
    return holder.ask(CompareParts(dump_probe(asked, whole, enters, parts)), PartsCompared).difference
