"""Questions about single blocks that a driver asks the worker which holds them."""

from __future__ import annotations

import dataclasses
import pickle

import cloudpickle
import torch

from ..engine.call import Call
from ..engine.control.answers import PartsCompared, Probed
from ..engine.control.commands import CompareParts, Probe
from ..engine.errors import pack_exception
from ..engine.stage import Stage
from .holdings import Holdings


def probe(holdings: Holdings, question: Probe, device: torch.device) -> Probed:
    """Say what form a block gives what it is called with; an error of the block's is an answer, too."""
    call: Call
    block, call, enters = pickle.loads(question.question)
    stage = _stage_of(holdings, block)
    try:
        found = stage.probe(block, call.at(device), enters)
    except Exception as error:
        if stage.company is not None:
            raise  # others wait in the middle of it
        packed, text = pack_exception(error)  # nothing has changed: an answer like another
        return Probed(text, packed)
    return Probed(None, cloudpickle.dumps(found))  # classes of a script, too


def compare_parts(holdings: Holdings, question: CompareParts, device: torch.device) -> PartsCompared:
    """Say whether a block makes of parts of a batch what it makes of all of it."""
    block, call, enters, parts = pickle.loads(question.question)
    parts = dataclasses.replace(parts, calls=tuple(each.at(device) for each in parts.calls))
    return PartsCompared(_stage_of(holdings, block).difference_of_parts(block, call.at(device), enters, parts))


def _stage_of(holdings: Holdings, block: int) -> Stage:
    return next(stage for stage in holdings.stages.values() if block in stage.blocks)
