"""Forms generations: this driver's end of the groups, and what the workers are told for theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Final

from torch import Tensor

from ..engine.c10d import Store, host_store
from ..engine.control.answers import Ready
from ..engine.control.commands import Abort, Configure, UseSchedule
from ..engine.errors import ConnectionsBroken, GenerationAborted
from ..engine.handover import import_paths
from ..engine.pairs import transport_for
from ..engine.program import directed_links
from ..engine.transport import Transport
from ..schedule import Schedule
from .devices import Devices
from .formation import Formation
from .layout import Layout
from .links import Link, Links
from .programs import Programs
from .rendezvous import Rendezvous

_DRIVERS: Final = "drivers"
_PAIR: Final = 2


class Forming:
    """The formation that counts, and the groups of the generation that was formed with it.

    Args:
        layout: Which blocks and ranks make which stage.
        schedules: What steps run, by name.
        links: The control channels to the workers.
        store: The store from which the groups of every generation are formed; None: each has one of its own, whose port
            is shut as soon as the groups are formed.
        generations: Numbers generations; shared by all pipelines that use the store one after another.
        rendezvous: The addresses the workers need.
        rank: This driver's rank; the first one commands the workers.
        devices: What the processes of the run compute on.
    """

    def __init__(
        self,
        layout: Layout,
        schedules: Mapping[str, Schedule],
        *,
        links: Links,
        store: Store | None,
        generations: Iterator[int],
        rendezvous: Rendezvous,
        rank: int,
        devices: Devices,
    ) -> None:
        self.programs = Programs(schedules, rank)
        self.formation = Formation(layout, dict(self.programs.schedules))
        self.transport: Transport | None = None
        """This rank's end of the groups; None until they are formed, and when a step was given up."""
        self._links = links
        self._store = store
        self._generations = generations
        self._rendezvous = rendezvous
        self._rank = rank
        self._devices = devices

    @property
    def layout(self) -> Layout:
        """Which blocks and ranks make which stage at present."""
        return self.formation.layout

    # ---------------------------------------------------------- generation

    def form(self, *, may_leave: bool, step: int) -> None:
        """Start a generation: form the groups anew with every worker that is there.

        Args:
            may_leave: Whether somebody takes over what workers hold that leave.
            step: The number of the last step.
        """
        members = sorted([*self.layout.drivers, *(link.rank for link in self._links)])
        self.formation = replace(self.formation, members=tuple(members), generation=next(self._generations))
        self._links.start_generation(self.formation.generation)
        store, store_host, store_port = self._meet()
        transport = self.transport = transport_for(
            self._rendezvous.backend,
            store,
            rank=self._rank,
            members=members,
            generation=self.formation.generation,
            host=self._rendezvous.host,
            device=str(self._devices.own),
            waiting=self._links.waiting,
        )
        self._links.check()  # a failure from now on finds this transport and wakes it
        try:
            if self._rank == 0:
                self._choose_devices()
                for link in self._links:
                    link.send(self._command(link, store_host, store_port, may_leave=may_leave, step=step))
            self._connect(transport)
        except ConnectionsBroken as error:
            apart = transport.unreached()
            self.give_up()
            if len(apart) == _PAIR:
                raise self._links.breaks.apart(apart) from error
            raise
        except BaseException:
            self.give_up()  # whoever has heard of it would wait for this driver, and the next run for them
            raise
        transport.leave_store()

    def _connect(self, transport: Transport) -> None:
        try:
            transport.form()
            if self.layout.num_drivers > 1:
                transport.form_subgroup(_DRIVERS, self.layout.drivers)
            transport.connect(directed_links(*self.formation.schedules.values()))
        except GenerationAborted as error:
            self._links.raise_cause(error.ranks)
            raise
        self._links.expect_all(Ready)

    def _meet(self) -> tuple[Store, str, int]:
        """Return the store from which a generation's groups are formed, and where it is."""
        if self._store is not None:
            return self._store, self._rendezvous.store_host, self._rendezvous.store_port
        own = host_store(self._rendezvous.host)
        return own, self._rendezvous.host, own.port

    def _choose_devices(self) -> None:
        for link in self._links:
            if not link.device:
                others = [(each.place, each.device) for each in self._links if each.device]
                link.compute_on(self._devices.assign(others, link.place))

    def _command(self, link: Link, store_host: str, store_port: int, *, may_leave: bool, step: int) -> Configure:
        rendezvous, formation = self._rendezvous, self.formation
        return Configure(
            generation=formation.generation,
            rank=link.rank,
            members=formation.members,
            store_host=store_host,
            store_port=store_port,
            other_drivers=rendezvous.other_drivers,
            may_leave=may_leave,
            sys_path=import_paths(),
            num_threads=1,
            device=link.device,
            backend=rendezvous.backend,
            replica_groups=formation.replica_groups,
            expert_sets=formation.expert_sets,
            schedules={name: schedule.to_json() for name, schedule in formation.schedules.items()},
            step=step,
        )

    def give_up(self, *, counts: bool = False) -> None:
        """End the generation everywhere, if there is one; what its last step has left in the blocks may count."""
        transport, self.transport = self.transport, None
        if transport is not None:
            self._links.tell_survivors(Abort(transport.generation, counts))
            transport.poison()

    def wake(self) -> None:
        """Wake this rank out of any operation of the groups."""
        transport = self.transport
        if transport is not None:
            transport.poison()

    def sum_over_drivers(self, tensor: Tensor) -> None:
        """Add up a tensor of each driver's, in place."""
        assert self.transport is not None, "drivers meet in a generation"
        try:
            self.transport.all_reduce(tensor, _DRIVERS)
        except GenerationAborted as error:
            self._links.raise_cause(error.ranks)
            raise

    # ------------------------------------------------------ the next formation

    def use_schedule(self, name: str, schedule: Schedule) -> None:
        """Run the following steps by another schedule with the same placement; every driver calls this alike."""
        assert schedule.placement == self.layout.placement, "blocks do not move with a schedule"
        self.programs.use(name, schedule)
        self._schedules_changed()
        around = self.formation.schedules[name]
        if self.transport is not None:
            if self._rank == 0:
                self._links.broadcast(UseSchedule(name, around.to_json()))
            self.transport.connect(directed_links(around))

    def go_around(self, missing: Collection[int]) -> None:
        """Let the next generation's paths avoid some ranks; none: undo it.

        Raises:
            ScheduleError: A path would have no stage left.
        """
        self.programs.go_around(missing)
        self._schedules_changed()

    def relayout(self, layout: Layout, schedules: Mapping[str, Schedule]) -> None:
        """Let the next generation have other stages; see :meth:`skippipe_plugin.driver.pipeline.Pipeline.relayout`."""
        self.programs = Programs(schedules, self._rank)
        self.formation = replace(self.formation, layout=layout, schedules=dict(self.programs.schedules))

    def _schedules_changed(self) -> None:
        self.formation = replace(self.formation, schedules=dict(self.programs.schedules))
