"""Random states and positions of data loaders: what a driver that starts again needs to see the same batches."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from ..engine.device import all_devices, random_states, set_random_states

RandomState = dict[str, Any]
"""What :func:`random_state` returns: states of the global generators, and of those that loaders hold."""


def random_state(loaders: Iterable[Any]) -> RandomState:
    """Return the states of Python's, numpy's and torch's generators, and of those in ``loaders`` and their samplers."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "devices": [random_states(device)[-1] for device in all_devices()],
        "loaders": [_get_state(generator) for generator in _generators(loaders)],
    }


def set_random_state(state: RandomState, loaders: Iterable[Any]) -> None:
    """Bring all generators to ``state``."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    for device, value in zip(all_devices(), state["devices"], strict=False):
        set_random_states(device, [state["torch"], value])
    for generator, value in zip(_generators(loaders), state["loaders"], strict=False):
        _set_state(generator, value)


def _generators(loaders: Iterable[Any]) -> Iterator[Any]:
    """Find the generators that loaders, their samplers and their data sets hold, each once and in a fixed order."""
    seen: set[int] = set()
    for loader in loaders:
        batches = getattr(loader, "batch_sampler", None)
        parts = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
        for holder in (*parts, getattr(loader, "dataset", None)):
            for value in getattr(holder, "__dict__", {}).values():
                if isinstance(value, torch.Generator | np.random.Generator | random.Random) and id(value) not in seen:
                    seen.add(id(value))
                    yield value


def _get_state(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.getstate() if isinstance(generator, random.Random) else generator.bit_generator.state


def _set_state(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    else:
        generator.bit_generator.state = state
