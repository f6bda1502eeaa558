"""Who is in a generation, and what its workers are told; without processes."""

import itertools
from typing import Any, cast

import pytest
import torch

from skippipe_plugin.driver import forming as forming_module
from skippipe_plugin.driver.devices import Devices
from skippipe_plugin.driver.formation import Formation
from skippipe_plugin.driver.forming import Forming
from skippipe_plugin.driver.layout import Layout
from skippipe_plugin.driver.rendezvous import Rendezvous
from skippipe_plugin.engine.control.answers import Ready
from skippipe_plugin.engine.control.codec import Control
from skippipe_plugin.engine.control.commands import Abort, Configure, UseSchedule
from skippipe_plugin.engine.device import Place
from skippipe_plugin.engine.waiting import Waiting
from skippipe_plugin.schedule import ScheduleError, full_schedule

LAYOUT = Layout(1, (range(2), range(2, 4)), ((0,), (1, 3), (2, 4)))


def test_replicas_that_are_missing_are_in_no_group() -> None:
    assert Formation(LAYOUT, {}, (0, 1, 2, 3, 4)).replica_groups == [(1, [1, 3]), (2, [2, 4])]
    assert Formation(LAYOUT, {}, (0, 1, 2, 4)).replica_groups == [(2, [2, 4])]
    assert Formation(LAYOUT, {}).replica_groups == []


def test_experts_need_all_of_their_holders() -> None:
    layout = Layout(1, LAYOUT.stage_blocks, LAYOUT.placement, expert_parallel=2)
    assert [stage for stage, _ in Formation(layout, {}, (0, 1, 2, 3, 4)).expert_sets] == [1, 2]
    assert [stage for stage, _ in Formation(layout, {}, (0, 1, 2, 3)).expert_sets] == [1]


class FakeLink:
    def __init__(self, rank: int) -> None:
        self.rank, self.device = rank, ""
        self.place = Place("a", kind="cuda", num_devices=8)
        self.said: list[Control] = []

    def compute_on(self, device: str) -> None:
        self.device = device

    def send(self, body: Control) -> None:
        self.said.append(body)


class FakeLinks(list[FakeLink]):
    """Workers that do as they are told."""

    waiting = Waiting()

    def start_generation(self, generation: int) -> None: ...

    def check(self) -> None: ...

    def expect_all(self, kind: type[Control]) -> None:
        assert kind is Ready

    def broadcast(self, body: Control) -> None:
        for link in self:
            link.send(body)

    tell_survivors = broadcast


class FakeTransport:
    def __init__(self, *_: Any, generation: int, **__: Any) -> None:
        self.generation, self.poisoned = generation, False

    def form(self) -> None: ...

    def connect(self, _: Any) -> None: ...

    def leave_store(self) -> None: ...

    def poison(self) -> None:
        self.poisoned = True


@pytest.fixture
def formed(monkeypatch: pytest.MonkeyPatch) -> tuple[Forming, FakeLinks]:
    monkeypatch.setattr(forming_module, "transport_for", FakeTransport)
    schedule = full_schedule("1f1b", num_stages=2, num_microbatches=4, replicas=2)
    layout = Layout(1, (range(2), range(2, 4)), schedule.placement)
    links = FakeLinks(map(FakeLink, layout.workers))
    return (
        Forming(
            layout,
            {"training": schedule},
            links=cast("Any", links),
            store=cast("Any", object()),
            generations=itertools.count(5),
            rendezvous=Rendezvous("here", "there", 1234),
            rank=0,
            devices=Devices(torch.device("cuda:0"), Place("a"), tuple(torch.device("cuda", i) for i in (0, 3, 1))),
        ),
        links,
    )


def test_workers_are_told_who_is_there(formed: tuple[Forming, FakeLinks]) -> None:
    forming, links = formed
    before = forming.formation
    forming.form(may_leave=True, step=7)
    assert (before.generation, before.members) == (-1, ())  # a value: who has it sees no other
    assert (forming.formation.generation, forming.formation.members) == (5, (0, 1, 2, 3, 4))
    told = [link.said[0] for link in links]
    assert all(isinstance(each, Configure) for each in told)
    assert [(each.rank, each.device, each.generation) for each in told if isinstance(each, Configure)] == [
        (1, "cuda:3", 5),
        (2, "cuda:1", 5),
        (3, "cuda:2", 5),
        (4, "cuda:4", 5),
    ]
    links[:] = links[:3]
    forming.form(may_leave=True, step=8)
    assert forming.formation.members == (0, 1, 2, 3)
    last = links[0].said[-1]
    assert isinstance(last, Configure)
    assert len(last.replica_groups) == 1


def test_paths_go_around_who_is_missing(formed: tuple[Forming, FakeLinks]) -> None:
    forming, _ = formed
    whole = forming.formation.schedules["training"]
    forming.go_around([4])
    around = forming.formation.schedules["training"]
    assert around != whole
    assert not any(visit.rank == 4 for path in around.paths for visit in path.visits)
    with pytest.raises(ScheduleError):
        forming.go_around([1, 2, 3, 4])
    assert forming.formation.schedules["training"] == around
    forming.go_around(())
    assert forming.formation.schedules["training"] == whole


def test_a_generation_that_is_given_up_is_told_to_all(formed: tuple[Forming, FakeLinks]) -> None:
    forming, links = formed
    forming.give_up()
    assert not links[0].said
    forming.form(may_leave=False, step=0)
    transport = cast("Any", forming.transport)
    forming.use_schedule("training", forming.formation.schedules["training"])
    forming.give_up()
    assert [type(body) for body in links[0].said] == [Configure, UseSchedule, Abort]
    assert transport.poisoned
    assert forming.transport is None


def test_workers_stay_on_their_devices_in_another_layout(formed: tuple[Forming, FakeLinks]) -> None:
    forming, links = formed
    schedule = full_schedule("1f1b", num_stages=1, num_microbatches=4, replicas=2)
    forming.relayout(Layout(1, (range(4),), schedule.placement), {"training": schedule})
    forming.form(may_leave=False, step=0)
    links[:] = [links[1], links[0]]
    forming.form(may_leave=False, step=0)
    told = [link.said[-1] for link in links]
    assert [each.device for each in told if isinstance(each, Configure)] == ["cuda:1", "cuda:3"]
    assert forming.layout.placement == schedule.placement
