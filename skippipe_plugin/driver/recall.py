"""What a driver that was started again finds on the workers that have outlived the one before."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from torch import Tensor

from ..engine.channel import Buffer, Message
from ..engine.errors import SkipPipeError
from ..engine.handover import unpack_object, unpack_tensors
from ..engine.optimizer import ParameterKey
from ..engine.wire import decode_optimizer_state, tensor_key
from .links import Link, Links

log = logging.getLogger(__name__)

_RECORDS: Final = ("base", "tensors", "progress")


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


def recall(links: Sequence[Link]) -> Recalled | None:
    """Gather the state of the last driver, and let the workers retain it; None when there is no whole record of it.

    Args:
        links: The idle workers, the survivors among them.

    Raises:
        SkipPipeError: Some blocks died with the driver.
    """
    _listen_to(links)
    summaries = {rank: fields for rank, link in enumerate(links) if (fields := _ask(link, "summary").fields)}
    stands = [(stand, rank) for rank, summary in summaries.items() for stand in _stands(summary)]
    if not stands:
        return None
    (fit, step, noted), holder = max(stands)
    tensors, fields = _record(links[holder], "tensors")
    if step > noted and "optimizer_step" in fields:
        for rank in summaries:
            _ask(links[rank], "finish", optimizer_step=fields["optimizer_step"], blobs=[tensors["hyperparameters"]])
    base, progress = _record(links[holder], "base")[0], _record(links[holder], "progress")[0]
    weights: dict[str, Tensor] = {}
    optimizer: dict[ParameterKey, Mapping[str, Any]] = {}
    found: set[int] = set()
    for rank, summary in summaries.items():
        for part, held in enumerate(summary["blocks"]):
            blocks = sorted(set(held) - found)
            found |= set(blocks)
            if blocks:
                message = _ask(links[rank], "state", what="weights", part=part, blocks=blocks)
                weights |= unpack_tensors(message.fields["tensors"], message.blobs)
                message = _ask(links[rank], "state", what="optimizer", part=part, blocks=blocks)
                optimizer |= decode_optimizer_state(message.fields, message.blobs)
    _check_complete(base, weights)
    for rank in summaries:
        _ask(links[rank], "retain")
    return Recalled(
        fit=fit,
        step=step,
        pending=tensors["outcome"] if step > noted else None,
        base=base,
        tensors=tensors,
        progress=progress,
        weights=weights,
        optimizer=optimizer,
    )


def recall_result(links: Sequence[Link], fit: int) -> Any | None:  # Any: what the fit was finished with
    """Return what an earlier fit ended with, if a worker has kept it."""
    _listen_to(links)
    for link in links:
        if fit in _ask(link, "summary").fields.get("results", ()):
            return _record(link, f"result{fit}")[0]
    return None


def _listen_to(links: Sequence[Link]) -> None:
    """Hear the answers of idle workers, of which some may be lost meanwhile."""
    board = Links()
    board.recovering = True
    for rank, link in enumerate(links):
        board.add(rank, (), link)


def _stands(summary: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    """Return fit, optimizer step, and the step that the progress was noted after, if there are all records of a fit."""
    records = summary["records"]
    if set(_RECORDS) - set(records) or len({records[name][0] for name in _RECORDS}) > 1:
        return []
    return [(records["base"][0], records["tensors"][1], records["progress"][1])]


def _check_complete(base: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    lost = set(base["blocks"]) - {tensor_key(name)[0] for name in weights}
    if lost:
        raise SkipPipeError(
            f"the driver was lost together with every worker that held the blocks {sorted(lost)}, so the run cannot go "
            "on from memory; start it again from the last checkpoint. Replicas (replicas=2) make that less likely"
        )


def _record(link: Link, name: str) -> tuple[Any, Mapping[str, Any]]:
    message = _ask(link, "record", name=name)
    fields = message.fields["record"]
    return unpack_object(fields["entries"], message.blobs), fields


def _ask(link: Link, do: str, *, blobs: Sequence[Buffer] = (), **fields: Any) -> Message:
    link.tell("keep", {"do": do, **fields}, blobs)
    message = link.expect_or_lose("kept")
    return message if message is not None else Message("kept")
