"""Questions about single blocks, answered where they live."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from ..engine import phases
from ..engine.call import Call, CallSpec
from ..engine.control.answers import PartsCompared, Probed
from ..engine.control.commands import CompareParts
from ..engine.control.commands import Probe as Question
from ..engine.errors import unpack_exception
from ..engine.stage import Probe
from ..engine.transport import TensorSpec
from .capture.cutting import Cut, parts_of
from .capture.proxies import StackCall
from .capture.side_inputs import dump_probe

if TYPE_CHECKING:
    from .pipeline import Pipeline


def probe(pipeline: Pipeline, block: int, spec: CallSpec, side_inputs: Sequence[Tensor], enters: TensorSpec) -> Probe:
    """Ask what a block does to its input; raise what it raises, of which no rank takes harm."""
    phases.reach(phases.Phase.PROBING)
    stage, call = pipeline.layout.stage_of_block(block), Call(spec, tuple(side_inputs), 0)
    hosted = pipeline.hosted_stage(stage)
    if hosted is not None:
        return hosted.probe(block, call, enters)
    link = pipeline.links[pipeline.layout.placement[stage][0]]
    probed = link.ask(Question(dump_probe(block, call, enters)), Probed)
    if probed.traceback is not None:
        raise unpack_exception(bytes(probed.result), probed.traceback, str(link))
    return pickle.loads(probed.result)  # type: ignore[no-any-return]


def computes_parts_alike(pipeline: Pipeline, call: StackCall, cut: Cut, num_samples: int) -> bool:
    """Ask one block of each kind whether it makes the same of parts of the batch as of all of it."""
    proxies = pipeline.proxies
    for block in proxies.one_of_each(call):
        spec, count = proxies.question_about(call, block), len(pipeline.microbatches)
        whole, parts = parts_of(call, cut, num_samples, block, spec, count)
        stage, enters = pipeline.layout.stage_of_block(block), call.specs[block]
        hosted = pipeline.hosted_stage(stage)
        if hosted is not None:
            alike = hosted.computes_parts_alike(block, whole, enters, parts)
        else:
            link = pipeline.links[pipeline.layout.placement[stage][0]]
            alike = link.ask(CompareParts(dump_probe(block, whole, enters, parts)), PartsCompared).alike
        if not alike:
            return False
    return True
