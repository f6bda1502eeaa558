"""A worker's part in one generation: its links to others, its groups, and what it does of each schedule."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping

from ..engine.control.answers import LinkCosts
from ..engine.control.commands import Configure
from ..engine.pairs import transport_for
from ..engine.ping import measure_links
from ..engine.program import Plan, Plans, compile_program, directed_links
from ..engine.rendezvous import DistantStore
from ..engine.stage import Stage
from ..engine.transport import Transport
from ..engine.waiting import Waiting
from ..schedule import Schedule
from .experts import SpreadExperts


class Membership:
    """What stands from one formation to the next.

    Args:
        command: The driver's.
        host: The address to bind to.
        waiting: Told while this worker waits for others.
    """

    def __init__(self, command: Configure, host: str, waiting: Waiting) -> None:
        self.rank = command.rank
        self.transport: Transport = transport_for(
            command.backend,
            DistantStore(command.store_host, command.store_port),
            rank=command.rank,
            members=command.members,
            generation=command.generation,
            host=host,
            device=command.device,
            waiting=waiting,
        )
        self._command = command
        self._programs: dict[str, Plans] = {}
        self._schedules: dict[str, Schedule] = {}

    def form(self, experts: SpreadExperts, stages: Mapping[int, Stage]) -> None:
        """Meet the others; every rank forms its groups in the same order."""
        self.transport.form()
        for stage, ranks in self._groups():
            self.transport.form_subgroup(_group(stage), ranks)
        experts.form(self.transport, self._command.expert_sets)
        experts.bind(self.transport, stages)
        self._use({name: Schedule.from_json(text) for name, text in self._command.schedules.items()})
        self.transport.leave_store()

    def use_schedule(self, name: str, text: str) -> None:
        """Know one more schedule."""
        self._use({name: Schedule.from_json(text)})

    def plan(self, name: str, live: Collection[int]) -> Plan:
        """Return what this worker does of a schedule in a step with these microbatches."""
        return self._programs[name].of(live)

    def schedule(self, name: str) -> Schedule:
        """Return a schedule."""
        return self._schedules[name]

    def sum_over_replicas(self, experts: SpreadExperts, stages: Mapping[int, Stage]) -> None:
        """Add the gradients of those who hold the same stages."""
        for stage, _ in self._groups():
            over_replicas = functools.partial(self.transport.all_reduce, name=_group(stage))
            experts.sum_gradients(stages[stage], over_replicas, self.transport)

    @property
    def followed(self) -> set[int]:
        """The stages here that a replica with a lower rank holds, too: what all have, that one tells."""
        return {stage for stage, ranks in self._groups() if min(ranks) != self.rank}

    def measure_links(self, num_bytes: int) -> LinkCosts:
        """Measure this worker's links while the others measure theirs."""
        costs = measure_links(self.transport, num_bytes)
        return LinkCosts([(c.first, c.second, c.latency_s, c.bandwidth_Bps) for c in costs])

    def _use(self, schedules: Mapping[str, Schedule]) -> None:
        self.transport.connect(directed_links(*schedules.values()))
        self._programs |= {name: Plans(compile_program(schedule, self.rank)) for name, schedule in schedules.items()}
        self._schedules |= schedules

    def _groups(self) -> list[tuple[int, list[int]]]:
        return [(stage, list(ranks)) for stage, ranks in self._command.replica_groups if self.rank in ranks]


def _group(stage: int) -> str:
    return f"stage{stage}"
