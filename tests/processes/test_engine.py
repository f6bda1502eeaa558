"""Whatever `validate` accepts runs on the engine: every rank a thread with a group of its own; autograd judges."""

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from skippipe_plugin.engine.arguments import SideInput, Template
from skippipe_plugin.engine.c10d import TCPStore, host_store
from skippipe_plugin.engine.call import Ambient, BlockMode, Call, CallSpec, Hop
from skippipe_plugin.engine.errors import GenerationAborted
from skippipe_plugin.engine.executor import Executor
from skippipe_plugin.engine.pairs import PairTransport
from skippipe_plugin.engine.ping import LinkCost, measure_links, rounds
from skippipe_plugin.engine.program import Plan, compile_program, directed_links
from skippipe_plugin.engine.stage import Stage
from skippipe_plugin.engine.transport import PendingTensor, TensorSpec, Transport
from skippipe_plugin.schedule import (
    Action,
    Op,
    Path,
    Schedule,
    Visit,
    full_schedule,
    list_schedule,
    validate,
)
from tests.grids import slow

WIDTH = 3
HOST = "127.0.0.1"
CPU = torch.device("cpu")


class Feed:
    """Calls as they arrive from the driver."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._calls: list[tuple[int, Call]] = []

    def put(self, microbatch: int, call: Call) -> None:
        with self._condition:
            self._calls.append((microbatch, call))
            self._condition.notify_all()

    def poll(self) -> list[tuple[int, Call]]:
        with self._condition:
            calls, self._calls = self._calls, []
            return calls

    def wait(self) -> list[tuple[int, Call]]:
        with self._condition:
            assert self._condition.wait_for(lambda: self._calls, timeout=20), "no call came"
        return self.poll()


class Driver:
    """A model around the blocks: the inputs are leaves, the loss is the mean square of the outputs.

    All blocks get the sum of the input's rows as well, with a gradient.
    """

    def __init__(self, schedule: Schedule, inputs: Sequence[Tensor], feeds: Sequence[Feed]) -> None:
        self.schedule, self.inputs, self.feeds = schedule, inputs, feeds
        self.losses: dict[int, Tensor] = {}
        self.gradients: dict[int, Tensor] = {}
        self._given: dict[tuple[int, int], Mapping[int, Tensor]] = {}
        self._condition = threading.Condition()

    def send_gradients(self, stage: int, microbatch: int, gradients: Mapping[int, Tensor]) -> None:
        """Take what a stage sends, in its rank's thread."""
        with self._condition:
            self._given[microbatch, stage] = gradients
            self._condition.notify_all()

    def embed(self, microbatch: int) -> tuple[Call, Tensor]:
        hidden = self.inputs[microbatch]
        visits = self.schedule.paths[microbatch].visits
        hops = (Hop(TensorSpec.of(hidden), self.schedule.backward),) * (len(visits) + 1)
        mode = BlockMode((True,), (True, True))
        ambient = Ambient(self.schedule.backward, False, ())
        carried = ((0,),) * 16 if self.schedule.backward else ()
        template = Template((None, SideInput(0)), {}, 0)
        spec = CallSpec(hops, (template,), (0,) * 16, (mode,) * 16, ambient, carried=carried)
        call = Call(spec, (hidden.sum(0),), seed=microbatch)
        for rank in {visit.rank for visit in visits} - {self.schedule.paths[microbatch].driver}:
            self.feeds[rank].put(microbatch, call)
        return call, hidden

    loss_is_outside = False

    def gradients_from_outside(self) -> dict[int, Tensor | None]:
        raise AssertionError("no loss is outside")

    def announce_due(self) -> None:
        pass

    def announce(self) -> None:
        pass

    def loss(self, microbatch: int, hidden: Tensor) -> Tensor | None:
        leaf = hidden.detach().requires_grad_()
        loss = leaf.pow(2).mean()
        self.losses[microbatch] = loss.detach()
        return torch.autograd.grad(loss, leaf)[0]

    def backward(self, microbatch: int, gradient: Tensor | None) -> None:
        assert gradient is not None
        stages = self.schedule.paths[microbatch].stages
        with self._condition:
            came = self._condition.wait_for(lambda: all((microbatch, s) in self._given for s in stages), timeout=20)
            assert came, "a stage has not sent the gradient of its side input"
        self.gradients[microbatch] = gradient + sum(self._given[microbatch, stage][0] for stage in stages)


class Block(nn.Linear):
    def __init__(self, index: int) -> None:
        super().__init__(WIDTH, WIDTH)
        generator = torch.Generator().manual_seed(index)
        with torch.no_grad():
            self.weight.copy_(torch.randn(WIDTH, WIDTH, generator=generator) / 2)
            self.bias.zero_()

    def forward(self, hidden: Tensor, side: Tensor) -> Tensor:
        return hidden + torch.tanh(super().forward(hidden) + side)


class Senders:
    """Where a rank's stages send gradients: to the driver of the microbatch."""

    def __init__(self, schedule: Schedule, drivers: Mapping[int, Driver]) -> None:
        self._schedule, self._drivers = schedule, drivers

    def send_gradients(self, stage: int, microbatch: int, gradients: Mapping[int, Tensor]) -> None:
        self._drivers[self._schedule.paths[microbatch].driver].send_gradients(stage, microbatch, gradients)


def tagged(store: TCPStore, **shape: Any) -> Transport:
    return Transport(store, **shape)


def in_pairs(store: TCPStore, **shape: Any) -> Transport:
    return PairTransport(store, **shape, device=CPU, backend="gloo")


def on_threads(size: int, body: Callable[[int, Transport], None], make: Callable[..., Transport] = tagged) -> None:
    """Run ``body`` for each rank of a generation, each in a thread."""
    store = host_store(HOST)
    kept = []  # who has nothing to do must not close its ends while others are still connecting

    def rank_body(rank: int) -> None:
        clone = TCPStore(HOST, store.port, is_master=False)
        transport = make(clone, rank=rank, members=range(size), generation=0, host=HOST)
        kept.append(transport)
        transport.form()
        body(rank, transport)

    with ThreadPoolExecutor(size) as threads:
        for result in [threads.submit(rank_body, rank) for rank in range(size)]:
            result.result(timeout=60)


def run_on_engine(
    schedule: Schedule, inputs: Sequence[Tensor], make: Callable[..., Transport]
) -> tuple[dict[int, Driver], dict[int, dict]]:
    feeds = [Feed() for _ in range(schedule.num_ranks)]
    drivers = {rank: Driver(schedule, inputs, feeds) for rank in schedule.drivers}
    gradients: dict[int, dict] = {}

    def body(rank: int, transport: Transport) -> None:
        transport.connect(directed_links(schedule))
        held = [stage for stage, ranks in enumerate(schedule.placement) if stage and rank in ranks]
        stages = {stage: Stage(stage, {stage: Block(stage)}, CPU) for stage in held}
        for stage in stages.values():
            stage.driver_side = Senders(schedule, drivers)
        executor = Executor(transport, stages, CPU, drivers.get(rank))
        executor.run(Plan(compile_program(schedule, rank), range(schedule.num_microbatches)), feeds[rank])
        gradients[rank] = {stage: stages[stage].blocks[stage].weight.grad for stage in held}

    on_threads(schedule.num_ranks, body, make)
    return drivers, gradients


def check(schedule: Schedule, make: Callable[..., Transport] = tagged) -> None:
    """Compare losses, input gradients and summed weight gradients with one process."""
    validate(schedule)
    generator = torch.Generator().manual_seed(0)
    sizes = [1 + microbatch % 2 for microbatch in range(schedule.num_microbatches)]
    inputs = [torch.randn(size, WIDTH, generator=generator) for size in sizes]
    drivers, gradients = run_on_engine(schedule, inputs, make)
    blocks = {stage: Block(stage) for stage in range(1, schedule.num_stages + 1)}
    for microbatch, path in enumerate(schedule.paths):
        leaf = inputs[microbatch].clone().requires_grad_()
        hidden = leaf
        for stage in path.stages:
            hidden = blocks[stage](hidden, leaf.sum(0))
        loss = hidden.pow(2).mean()
        torch.testing.assert_close(drivers[path.driver].losses[microbatch], loss.detach())
        if schedule.backward:
            loss.backward()
            torch.testing.assert_close(drivers[path.driver].gradients[microbatch], leaf.grad)
    for stage, block in blocks.items():
        parts = [held[stage] for held in gradients.values() if held.get(stage) is not None]
        if block.weight.grad is None:
            assert not parts
        else:
            torch.testing.assert_close(sum(parts), block.weight.grad)


@pytest.mark.parametrize("name", [slow("gpipe"), "1f1b"])
@pytest.mark.parametrize("driver_stage", [False, True])
@pytest.mark.parametrize(
    ("num_stages", "replicas", "drivers"), [(1, 1, 1), (3, 1, 1), slow(2, 2, 1), slow(2, 1, 2), (2, 2, 2)]
)
def test_full_schedules(name: str, driver_stage: bool, num_stages: int, replicas: int, drivers: int) -> None:
    shape = {"num_stages": num_stages, "replicas": replicas, "drivers": drivers, "driver_stage": driver_stage}
    if driver_stage and num_stages == 1:
        return  # nothing is remote
    for make in (tagged, in_pairs):
        check(full_schedule(name, num_microbatches=5, **shape), make)
        check(full_schedule(name, num_microbatches=3, backward=False, **shape), make)


def split_backward(schedule: Schedule) -> Schedule:
    """Replace every B of a block stage by I, with its W as late as possible."""
    orders = []
    for order in schedule.orders:
        halves = [Action(a.stage, Op.I, a.microbatch) if a.op is Op.B and a.stage else a for a in order]
        late = [Action(a.stage, Op.W, a.microbatch) for a in halves if a.op is Op.I]
        orders.append((*halves, *late))
    return Schedule(schedule.placement, schedule.paths, tuple(orders), schedule.backward, "split")


def test_backward_in_halves() -> None:
    check(split_backward(full_schedule("1f1b", num_stages=3, num_microbatches=4)))


@st.composite
def partial_schedules(draw: st.DrawFn) -> Schedule:
    """Paths that skip and swap stages and choose replicas, ordered by the list scheduler."""
    num_stages, replicas = draw(st.integers(1, 4)), draw(st.integers(1, 2))
    placement = [(0,), *(tuple(1 + stage * replicas + r for r in range(replicas)) for stage in range(num_stages))]
    paths = []
    for _ in range(draw(st.integers(1, 6))):
        stages = draw(st.lists(st.integers(1, num_stages), min_size=1, max_size=num_stages, unique=True))
        paths.append(Path(0, tuple(Visit(stage, draw(st.sampled_from(placement[stage]))) for stage in stages)))
    return list_schedule(tuple(placement), tuple(paths), driver_in_flight=draw(st.integers(1, 6)))


@given(partial_schedules(), st.booleans(), st.sampled_from([tagged, in_pairs]))
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_skipped_swapped_and_replicated_stages(
    schedule: Schedule, halves: bool, make: Callable[..., Transport]
) -> None:
    check(split_backward(schedule) if halves else schedule, make)


def test_links_in_pairs_take_up_new_links_and_give_up() -> None:
    """A receive of a link that was added later is woken too."""

    def body(rank: int, transport: Transport) -> None:
        transport.connect({(0, 1)})
        transport.connect({(0, 1), (2, 0), (1, 2)})
        if rank == 0:
            pending = transport.receive(TensorSpec((4,), torch.float32), 2, 1, CPU)
            threading.Timer(0.2, transport.poison).start()
            with pytest.raises(GenerationAborted):
                pending.wait()

    on_threads(3, body, in_pairs)


def test_poison_wakes_a_blocked_receive() -> None:
    waiting = threading.Event()

    def body(rank: int, transport: Transport) -> None:
        if rank == 2:
            return  # sends nothing, ever
        pending = transport.receive(TensorSpec((4,), torch.float32), 2, 1, CPU)
        if rank == 0:
            waiting.wait(20)
            threading.Timer(0.2, transport.poison).start()
        else:
            waiting.set()
            threading.Timer(0.4, transport.poison).start()
        with pytest.raises(GenerationAborted):
            pending.wait()

    on_threads(3, body)


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_every_link_is_measured_once(size: int) -> None:
    costs: list[LinkCost] = []
    on_threads(size, lambda rank, transport: costs.extend(measure_links(transport, 100_000)))
    assert sorted((cost.first, cost.second) for cost in costs) == list(combinations(range(size), 2))
    assert all(0 < cost.latency_s < 1 and cost.bandwidth_Bps > 0 for cost in costs)


@pytest.mark.parametrize("size", range(1, 9))
def test_rounds_are_disjoint_and_complete(size: int) -> None:
    everything = [pair for pairs in rounds(size) for pair in pairs]
    assert sorted(everything) == list(combinations(range(size), 2))
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds(size))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_links_that_are_only_measured_are_given_back(size: int) -> None:
    """NCCL keeps buffers for each link; those of a schedule stay, and one that comes later is formed anew."""
    most, left = [0] * size, [0] * size

    def body(rank: int, transport: Transport) -> None:
        assert isinstance(transport, PairTransport)
        connect = transport.connect

        def noted(links: Collection[tuple[int, int]]) -> list[tuple[int, int]]:
            fresh = connect(links)
            most[rank] = max(most[rank], len(transport._groups))
            return fresh

        transport.connect = noted  # type: ignore[method-assign]
        transport.connect({(0, 1)})
        for _ in range(2):
            measure_links(transport, 1000)
        transport.connect({(0, 1), (1, 0)})
        left[rank] = len(transport._groups)
        if rank == 0:
            transport.send(torch.ones(2), 1, 0)
        elif rank == 1:
            assert transport.receive(TensorSpec((2,), torch.float32), 0, 0, CPU).wait().tolist() == [1, 1]

    on_threads(size, body, in_pairs)
    assert left == [3, 3, *[1] * (size - 2)]  # that of all, and the two links
    assert max(most) <= 4


class Garbled(Transport):
    """A transport whose waits are over when the generation is given up, as NCCL's are: what came is anything."""

    def receive(self, spec: TensorSpec, source: int, tag: int, device: torch.device) -> PendingTensor:
        transport = self

        class Cut(PendingTensor):
            def wait(self) -> Tensor:
                transport.poison()
                return torch.full(spec.shape, torch.nan)

        return Cut(None, torch.empty(0), device, self._waiting)


def test_nobody_sees_what_comes_when_a_generation_is_given_up() -> None:
    schedule = full_schedule("gpipe", num_stages=1, num_microbatches=1)
    seen = []

    class Looking(Driver):
        def loss(self, microbatch: int, hidden: Tensor) -> Tensor | None:
            seen.append(hidden)
            return None

    class Failing(Block):
        def forward(self, hidden: Tensor) -> Tensor:
            raise ValueError("garbage")

    def body(rank: int, transport: Transport) -> None:
        feeds = [Feed(), Feed()]
        driver = Looking(schedule, [torch.ones(2, WIDTH)], feeds)
        program = compile_program(schedule, rank)
        if rank == 0:
            executor = Executor(transport, {}, CPU, driver=driver)
        else:
            driver.embed(0)
            executor = Executor(transport, {1: Stage(1, {0: Failing(0)}, CPU)}, CPU)
        with pytest.raises(GenerationAborted):
            executor.run(Plan(program, {0}), feeds[rank])

    on_threads(2, body, lambda store, **shape: Garbled(store, **shape))
    assert not seen
