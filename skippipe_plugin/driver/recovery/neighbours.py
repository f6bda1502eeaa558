"""From which living stages a lost one is rebuilt, and what is said of it.

A stage that was rebuilt itself and has not taken an optimizer step since tells nothing that its sources do not tell. So
the nearest stage that is whole counts, on either side; estimates count only where nothing else is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from torch import Tensor

from ...engine.control.answers import State
from ...engine.control.commands import Get
from ...engine.errors import SkipPipeError
from ...engine.handover import unpack_tensors
from ...engine.wire import block_tensors, tensor_key, tensor_name
from ...recovery import Neighbour, RebuildRule, rebuild_stage
from ..links import Link

if TYPE_CHECKING:
    from ..pipeline import Pipeline

Source = Literal["driver", "relieved", "replica", "estimate", "neighbours", "copy"]
"""Where a stage's new weights came from."""

EXPLAINED: Final[Mapping[Source, str]] = {
    "driver": "handed over once more by the driver, exact",
    "relieved": "handed over by the worker that left, exact",
    "replica": "copied from another replica, exact",
    "estimate": "copied from another replica that was rebuilt itself, with a fresh optimizer",
    "neighbours": "average of the neighbouring stages, with a fresh optimizer",
    "copy": "copy of the neighbouring stage, with a fresh optimizer",
}


@dataclass(frozen=True, slots=True)
class Origin:
    """What one stage was rebuilt from.

    >>> str(Origin(3, (1, 4))), str(Origin(1, (2,), (2,)))
    ('stage 3 from stages 1 and 4', 'stage 1 from stage 2 (itself an estimate)')
    """

    stage: int
    sources: tuple[int, ...]
    """The stages that it was averaged or copied from."""
    estimates: tuple[int, ...] = ()
    """Which of these were rebuilt themselves and had not taken an optimizer step since."""

    def __str__(self) -> str:
        text = f"stage {self.stage} from stage{'s' * (len(self.sources) > 1)} {' and '.join(map(str, self.sources))}"
        if not self.estimates:
            return text
        if len(self.sources) == 1:
            return f"{text} (itself an estimate)"
        return f"{text} ({' and '.join(map(str, self.estimates))} itself an estimate)"


@dataclass(frozen=True, slots=True)
class _Standing:
    """A stage that lives."""

    stage: int
    link: Link | None
    """Who holds it; None: the driver."""
    norm: float
    is_estimate: bool


def rebuilt_stage(
    pipeline: Pipeline, stage: int, missing: Collection[int], rule: RebuildRule
) -> tuple[dict[str, Tensor], Source, Origin]:
    """Rebuild a lost stage from the nearest ones.

    Args:
        pipeline: Whose.
        stage: The lost one.
        missing: The ranks whose workers hold nothing yet.
        rule: How two are weighted.

    Returns:
        Its tensors by their names on the wire, where they came from, and what exactly.

    Raises:
        SkipPipeError: No stage is left.
    """
    before, after = chosen(
        list(_living(pipeline, stage, -1, missing)), list(_living(pipeline, stage, 1, missing)), rule
    )
    used = [each for each in (before, after) if each is not None]
    if not used:
        raise SkipPipeError(
            f"stage {stage} is lost, and no other stage is left to rebuild it from; "
            "start again from the last checkpoint"
        )
    one, other = (None if each is None else _neighbour(pipeline, each) for each in (before, after))
    weights = rebuilt_weights(pipeline.layout.blocks(stage), one, other, rule)
    origin = Origin(stage, tuple(e.stage for e in used), tuple(e.stage for e in used if e.is_estimate))
    return weights, source_of(one, other, rule), origin


def chosen(
    before: Sequence[_Standing], after: Sequence[_Standing], rule: RebuildRule
) -> tuple[_Standing | None, _Standing | None]:
    """Choose one of each side, nearest first: whole ones, or estimates where there is none at all."""
    sides = [next((each for each in side if not each.is_estimate), None) for side in (before, after)]
    if sides == [None, None]:
        sides = [next(iter(side), None) for side in (before, after)]
    if rule == "copy" and sides[0] is not None:
        sides[1] = None
    return sides[0], sides[1]


def _living(pipeline: Pipeline, stage: int, step: int, missing: Collection[int]) -> Iterator[_Standing]:
    """Yield the living stages before (step -1) or after (1) a lost one, nearest first, up to the first whole one."""
    layout, other = pipeline.layout, stage + step
    while 1 <= other <= len(layout.stage_blocks):
        found = _standing(pipeline, other, missing)
        if found is not None:
            yield found
            if not found.is_estimate:
                return
        other += step


def _standing(pipeline: Pipeline, stage: int, missing: Collection[int]) -> _Standing | None:
    if pipeline.hosted_stage(stage) is not None:
        return _Standing(stage, None, pipeline.gradients.hosted_norms.get(stage, 0.0), False)
    for rank in pipeline.layout.placement[stage]:
        if rank in pipeline.links and rank not in missing:
            link = pipeline.links[rank]
            state = link.ask(Get("standing"), State)
            is_estimate = bool(set(state.estimates).intersection(pipeline.layout.blocks(stage)))
            return _Standing(stage, link, dict(state.norms).get(stage, 0.0), is_estimate)
    return None


def _neighbour(pipeline: Pipeline, standing: _Standing) -> Neighbour:
    blocks = pipeline.layout.blocks(standing.stage)
    if standing.link is None:
        hosted = pipeline.hosted_stage(standing.stage)
        assert hosted is not None, "the driver held it a moment ago"
        return neighbour_of(blocks, block_tensors(hosted.blocks), standing.norm)
    state = standing.link.ask(Get("weights", list(blocks)), State)
    return neighbour_of(blocks, unpack_tensors(state.tensors, state.blobs), standing.norm)


def neighbour_of(blocks: Sequence[int], tensors: Mapping[str, Tensor], norm: float) -> Neighbour:
    """Return the stage of some blocks as a neighbour of lost ones, from tensors by their names on the wire."""
    states: dict[int, dict[str, Tensor]] = {block: {} for block in blocks}
    for key, tensor in tensors.items():
        block, name = tensor_key(key)
        if block in states:
            states[block][name] = tensor.detach().cpu()  # as others come, whose they are averaged with
    return Neighbour(list(states.values()), norm)


def rebuilt_weights(
    blocks: Sequence[int], before: Neighbour | None, after: Neighbour | None, rule: RebuildRule
) -> dict[str, Tensor]:
    """Rebuild lost blocks from their neighbours; return their tensors by their names on the wire."""
    return {
        tensor_name(block, name): tensor
        for block, state in zip(blocks, rebuild_stage(len(blocks), before, after, rule), strict=True)
        for name, tensor in state.items()
    }


def source_of(before: Neighbour | None, after: Neighbour | None, rule: RebuildRule) -> Source:
    """Return what a stage's weights come from that are rebuilt from these neighbours."""
    return "neighbours" if before is not None and after is not None and rule != "copy" else "copy"
