"""One microbatch at a time, where hooks of user code watch the blocks: what they keep belongs to one of them then."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from ..engine.errors import SkipPipeError
from ..schedule import Schedule, list_schedule

_IN_TURNS: Final = "one microbatch at a time"


class Turns:
    """Chooses between the usual training schedule and one that lets a microbatch begin after the loss of the last."""

    def __init__(self) -> None:
        self._usual: Schedule | None = None

    def choose(self, schedule: Schedule, *, watched: bool, loss_is_outside: bool) -> Schedule | None:
        """Return the schedule to use from now on in place of ``schedule``; None to go on with it.

        Raises:
            SkipPipeError: Hooks watch microbatches whose loss is that of the whole batch.
        """
        if watched and loss_is_outside:
            raise SkipPipeError(
                "forward hooks of yours watch modules of the blocks, and the loss is computed outside of the model, "
                "from the whole batch: the hooks would see it in microbatches. Use one microbatch "
                "(num_microbatches=1), or let the model return the loss"
            )
        if watched and schedule.name != _IN_TURNS:
            self._usual = schedule
            in_turns = list_schedule(schedule.placement, schedule.paths, driver_in_flight=1, name=_IN_TURNS)
            return replace(in_turns, coupled=schedule.coupled)
        return self._usual if not watched and schedule.name == _IN_TURNS else None
