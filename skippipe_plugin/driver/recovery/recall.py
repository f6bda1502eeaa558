"""What a driver that was started again finds on the workers that have outlived the one before."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

from torch import Tensor

from ...engine.control.answers import State
from ...engine.control.keeping import AskRecord, AskSummary, FinishStep, GetRetained, Kept, OneRecord, Retain, Summary
from ...engine.control.values import Stand, StepOrder
from ...engine.errors import SkipPipeError, StageLostError
from ...engine.handover import unpack_object, unpack_tensors
from ...engine.optimizer import ParameterKey
from ...engine.wire import decode_optimizer_state, tensor_key
from ...recovery import Neighbour, RebuildRule
from ..doors import RECOVERY
from ..links import Link, Links
from .heartbeat import Heartbeat
from .neighbours import Source, neighbour_of, rebuilt_weights, source_of

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_RECORDS: Final = ("base", "tensors", "progress")
_SILENT_S: Final = 10.0
"""How long a worker may give no sign of life while it is asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recalled:
    """The state of the fit that the last driver was in."""

    fit: int
    step: int
    """How many optimizer steps were done."""
    pending: Any  # Any: the outcome that its driver has stored
    """What the last step's batch has led to, if that was not over; it is finished, but not run again."""
    base: Mapping[str, Any]
    tensors: Mapping[str, Any]
    progress: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    """By ``"<block>\\t<name>"``: parameters and buffers of the blocks."""
    optimizer: Mapping[ParameterKey, Mapping[str, Any]]
    living: Sequence[tuple[Sequence[int], float]]
    """Of each stage that was found: its blocks, and the L2 norm of its last gradient, before the common clipping."""
    estimates: frozenset[int] = frozenset()
    """The blocks among these that were rebuilt from others, and have not taken an optimizer step since."""


def recall(links: Sequence[Link]) -> Recalled | None:
    """Gather the state of the last driver, and let the workers retain it; None when there is no whole record of it.

    What a worker holds that stands elsewhere than the record was cut off from the run, and is not used.

    Args:
        links: The idle workers, the survivors among them.
    """
    return _surviving(links, _recall)


def _recall(links: Sequence[Link]) -> Recalled | None:
    summaries = {rank: link.ask(AskSummary(), Summary) for rank, link in enumerate(links)}
    stands = [(stand, rank) for rank, summary in summaries.items() for stand in _stands(summary)]
    if not stands:
        return None
    (fit, step, noted), holder = max(stands)
    tensors, order = _record(links[holder], "tensors")
    now = Stand(fit, step)
    if order is not None:
        for link in links:
            link.ask(FinishStep(order, fit, tensors["hyperparameters"]), Kept)
    base, progress = _record(links[holder], "base")[0], _record(links[holder], "progress")[0]
    weights: dict[str, Tensor] = {}
    optimizer: dict[ParameterKey, Mapping[str, Any]] = {}
    found: set[int] = set()
    living: list[tuple[Sequence[int], float]] = []
    estimates: set[int] = set()
    for rank, summary in summaries.items():
        for part, held in enumerate(summary.parts):
            is_current = held.stand == now or (order is not None and held.whole == now)
            if held.blocks and not is_current:
                log.warning(
                    "blocks %s on a worker are of optimizer step %d of fit %d, and the last driver was at step %d of "
                    "fit %d: the worker was cut off from it, and they are not used",
                    *(sorted(held.blocks), held.stand.step, held.stand.fit, step, fit),
                )
            blocks = sorted(set(held.blocks) - found) if is_current else []
            found |= set(blocks)
            if blocks:
                state = links[rank].ask(GetRetained(part, "weights", blocks), State)
                weights |= unpack_tensors(state.tensors, state.blobs)
                living += _living(state, blocks)
                estimates |= set(state.estimates).intersection(blocks)
                state = links[rank].ask(GetRetained(part, "optimizer", blocks), State)
                optimizer |= decode_optimizer_state(state.tensors, state.blobs)
    for link in links:
        link.ask(Retain(), Kept)
    return Recalled(
        fit=fit,
        step=step,
        pending=tensors["outcome"] if step > noted else None,
        base=base,
        tensors=tensors,
        progress=progress,
        weights=weights,
        optimizer=optimizer,
        living=living,
        estimates=frozenset(estimates),
    )


def rebuilt(recalled: Recalled, rule: RebuildRule | None) -> tuple[Recalled, dict[range, Source]]:
    """Rebuild the blocks that died with the driver from those that did not, with fresh optimizers.

    Neighbouring stages that were lost count as one. What the driver itself held is no neighbour.

    Args:
        recalled: What was found.
        rule: How two neighbours are weighted; None when nothing may be rebuilt.

    Returns:
        All of the state, and by rebuilt blocks where their weights came from.

    Raises:
        SkipPipeError: Something must be rebuilt and may not be, or there is nothing left to do it from.
    """
    lost = sorted(set(recalled.base["blocks"]) - {tensor_key(key)[0] for key in recalled.weights})
    if not lost:
        return recalled, {}
    if rule is None or not recalled.living:
        raise SkipPipeError(
            f"the driver was lost together with every worker that held the blocks {lost}, so the run cannot go on from "
            f"memory; start it again from the last checkpoint. {RECOVERY} rebuilds such blocks from the stages around "
            "them, and replicas (replicas=2) make such a loss less likely"
        )
    weights, sources = dict(recalled.weights), {}
    for run in _runs(lost):
        before, after = _neighbour(recalled, run, -1), _neighbour(recalled, run, 1)
        weights |= rebuilt_weights(run, before, after, rule)
        sources[run] = source_of(before, after, rule)
    return replace(recalled, weights=weights), sources


def _runs(blocks: Sequence[int]) -> list[range]:
    """Return the runs of consecutive numbers in an ascending sequence."""
    firsts = [block for block in blocks if block - 1 not in blocks]
    lasts = [block for block in blocks if block + 1 not in blocks]
    return [range(first, last + 1) for first, last in zip(firsts, lasts, strict=True)]


def _neighbour(recalled: Recalled, run: range, step: int) -> Neighbour | None:
    """Return the nearest living stage before (step -1) or after (1) a run of lost blocks.

    One that was rebuilt itself counts only if there is no other.
    """
    whole = [each for each in recalled.living if not recalled.estimates.intersection(each[0])]
    stages = [(blocks, norm) for blocks, norm in whole or recalled.living if (blocks[0] - run.start) * step > 0]
    if not stages:
        return None
    blocks, norm = min(stages, key=lambda stage: abs(stage[0][0] - run.start))
    return neighbour_of(blocks, recalled.weights, norm)


def _living(state: State, blocks: Sequence[int]) -> list[tuple[Sequence[int], float]]:
    """Return blocks and gradient norm of each stage that a worker has handed out, or the part of it that it has."""
    norms = dict(state.norms)
    parts = [([block for block in own if block in blocks], norms.get(stage, 0.0)) for stage, own in state.stages]
    return [(own, norm) for own, norm in parts if own]


def recall_result(links: Sequence[Link], fit: int) -> Any | None:  # Any: what the fit was finished with
    """Return what an earlier fit ended with, if a worker has kept it."""

    def find(links: Sequence[Link]) -> Any | None:
        for link in links:
            if fit in link.ask(AskSummary(), Summary).results:
                return _record(link, f"result{fit}")[0]
        return None

    return _surviving(links, find)


def _surviving(links: Sequence[Link], ask: Callable[[Sequence[Link]], _T]) -> _T:
    """Ask idle workers, and those that are left once more when one is lost meanwhile."""
    while True:
        board, present = Links(), [link for link in links if not link.gone]
        for rank, link in enumerate(present):
            link.forget_answers()
            board.add(rank, (), link)
        heartbeat = Heartbeat(board, _SILENT_S)
        try:
            return ask(present)
        except StageLostError:
            log.warning("a worker was lost while what the last driver has left was gathered; looking at the others")
        finally:
            heartbeat.close()


def _stands(summary: Summary) -> list[tuple[int, int, int]]:
    """Return fit, optimizer step, and the step that the progress was noted after, if there are all records of a fit."""
    records = summary.records
    if set(_RECORDS) - set(records) or len({records[name][0] for name in _RECORDS}) > 1:
        return []
    return [(records["base"][0], records["tensors"][1], records["progress"][1])]


def _record(link: Link, name: str) -> tuple[Any, StepOrder | None]:  # Any: what was stored
    """Return what was stored under a name, and the optimizer step that was to follow."""
    kept = link.ask(AskRecord(name), OneRecord)
    return unpack_object(kept.record.entries, kept.blobs), kept.record.optimizer_step
