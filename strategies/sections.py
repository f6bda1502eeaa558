"""Sections of Lightning's profilers around the call of the blocks: microbatches enter them before others have left.

A section that several microbatches are in is one section, from the first one's start to the last one's stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lightning.pytorch import LightningModule
from lightning.pytorch.profilers import PassThroughProfiler, Profiler

from ..driver.capture.suspend import current_thread


@contextmanager
def shared_sections(module: LightningModule) -> Iterator[None]:
    """Let the microbatches of a step share the sections of the Trainer's profiler and of those that the module has."""
    held = [module.trainer.profiler, *vars(module).values()]  # type: ignore[attr-defined]
    sharing = {*filter(_is_shared, {*map(type, held)})}
    profilers = [each for each in held if type(each) in sharing] if sharing else ()
    for profiler in profilers:
        _share(profiler)
    try:
        yield
    finally:
        for profiler in profilers:
            for name in ("start", "stop"):
                profiler.__dict__.pop(name, None)


def _is_shared(kind: type) -> bool:
    return Profiler in kind.__mro__ and PassThroughProfiler not in kind.__mro__


def _share(profiler: Profiler) -> None:
    inside: dict[str, set[int | None]] = {}
    start, stop = profiler.start, profiler.stop

    def start_first(action_name: str) -> None:
        microbatches, microbatch = inside.setdefault(action_name, set()), _microbatch()
        if not microbatches or microbatch in microbatches:  # the profiler itself refuses the latter
            start(action_name)
        microbatches.add(microbatch)

    def stop_last(action_name: str) -> None:
        microbatches = inside.get(action_name, set())
        microbatches.discard(_microbatch())
        if not microbatches:
            stop(action_name)

    _replace(profiler, start_first, stop_last)


def _replace(profiler: Profiler, start: Callable[[str], None], stop: Callable[[str], None]) -> None:
    profiler.__dict__ |= {"start": start, "stop": stop}


def _microbatch() -> int | None:
    thread = current_thread()
    return thread.label if thread is not None else None
