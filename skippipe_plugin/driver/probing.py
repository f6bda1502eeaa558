"""Questions about single blocks, answered where they live."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

from ..engine import phases
from ..engine.call import Call
from ..engine.control.answers import Probed
from ..engine.control.commands import Probe as Question
from ..engine.errors import StageLostError, unpack_exception
from ..engine.probes import Probe
from ..engine.stage import Stage
from ..engine.transport import TensorSpec
from .capture.side_inputs import dump_probe
from .links import Link

if TYPE_CHECKING:
    from .pipeline import Pipeline


def probe(pipeline: Pipeline, block: int, call: Call, enters: TensorSpec) -> Probe:
    """Ask what a block does to its input; raise what it raises, of which no rank takes harm."""
    phases.reach(phases.Phase.PROBING)
    asked, holder = holder_of(pipeline, block)
    if isinstance(holder, Stage):
        return _checked(pipeline, asked, holder.probe(asked, call, enters))
    probed = holder.ask(Question(dump_probe(asked, call, enters)), Probed)
    if probed.traceback is not None:
        raise unpack_exception(bytes(probed.result), probed.traceback, str(holder))
    return _checked(pipeline, asked, pickle.loads(probed.result))


def _checked(pipeline: Pipeline, block: int, found: Probe) -> Probe:
    pipeline.mirror.shared.check_kept(pipeline.proxies.book.alike(block), found.buffers)
    return found


def holder_of(pipeline: Pipeline, block: int) -> tuple[int, Stage | Link]:
    """Return who holds ``block``; where paths go around all who do, a block of its kind and who holds that."""
    for each in dict.fromkeys([block, *pipeline.proxies.book.alike(block)]):
        stage = pipeline.layout.stage_of_block(each)
        hosted = pipeline.hosted_stage(stage)
        if hosted is not None:
            return each, hosted
        for rank in pipeline.layout.placement[stage]:
            if rank in pipeline.links:
                return each, pipeline.links[rank]
    raise StageLostError(
        f"what {pipeline.proxies.names[block]} makes of its input must be asked where it runs, but its worker is lost "
        "and was not replaced yet, and no other block is like it",
        "Let training wait for the replacement (while_missing='wait'), or keep a spare",
    )
