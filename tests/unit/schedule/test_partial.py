"""Plans are legal, balanced, deterministic, simulated as promised, and near the optimum where it can be enumerated."""

import random
from itertools import chain, pairwise, permutations, product
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.schedule import (
    ComputeCost,
    CostModel,
    NetworkCost,
    Path,
    PathConstraints,
    Plan,
    PlanProblem,
    Schedule,
    Visit,
    list_schedule,
    lower_bound_s,
    plan,
    plan_paths,
    simulate,
    validate,
)
from skippipe_plugin.schedule.play import BACKWARD_FIRST, FORWARD_FIRST, OLDEST_FIRST, dispatch
from skippipe_plugin.schedule.polish import Static, polish
from skippipe_plugin.schedule.problem import Instance, reordered

quick = settings(derandomize=True, deadline=None, max_examples=25)
LITTLE = 40_000


def network(chance: random.Random, num_nodes: int, scale: float = 1.0) -> NetworkCost:
    rows = [[0.0 if a == b else scale * chance.uniform(0.1, 2) for b in range(num_nodes)] for a in range(num_nodes)]
    widths = [[chance.uniform(0.5, 4) / scale for _ in range(num_nodes)] for _ in range(num_nodes)]
    return NetworkCost(tuple(map(tuple, rows)), tuple(map(tuple, widths)))


def random_problem(chance: random.Random, **changes) -> PlanProblem:
    num_stages, num_drivers = chance.randint(2, 6), chance.randint(1, 3)
    sizes = [num_drivers, *(chance.randint(1, 3) for _ in range(num_stages))]
    nodes = list(range(sum(sizes) + chance.randint(0, 1)))
    chance.shuffle(nodes)
    placement = tuple(tuple(nodes.pop() for _ in range(size)) for size in sizes)
    num_nodes = sum(sizes) + len(nodes)
    visits = chance.randint(1, num_stages)
    compute = ComputeCost(
        tuple(chance.random() for _ in sizes),
        tuple(chance.random() for _ in sizes),
        chance.random(),
        rank_factor=tuple(1 + chance.random() for _ in range(num_nodes)),
        gap_s=chance.choice([0.0, 0.1]),
    )
    settings = {
        "placement": placement,
        "microbatches_per_driver": chance.randint(1, 5),
        "cost": CostModel(compute, network(chance, num_nodes), chance.choice([0, 1])),
        "constraints": PathConstraints(
            path_length=visits + 1, max_jump=num_stages, max_swaps=chance.randint(0, 2), max_back=chance.randint(1, 2)
        ),
        "memory_caps": chance.choice([None, (chance.randint(1, 3),) * num_nodes]),
        "placement_mode": chance.choice(["given", "plan"]),
        "links": chance.choice(["free", "queued", "shared"]),
        "allreduce_s": chance.choice([(), tuple(chance.random() for _ in sizes)]),
    }
    return PlanProblem(**settings | changes)


def check_legal(problem: PlanProblem, found: Plan) -> None:
    """A second reading of what a plan must keep, which shares nothing with the planner."""
    schedule, rules = found.schedule, problem.constraints
    placement = [[found.nodes[rank] for rank in ranks] for ranks in schedule.placement]
    assert sorted(found.nodes) == list(range(problem.cost.num_ranks))
    assert [len(nodes) for nodes in placement] == [len(nodes) for nodes in problem.placement]
    assert sorted(chain.from_iterable(placement)) == sorted(chain.from_iterable(problem.placement))
    if problem.placement_mode == "given":
        assert [set(nodes) for nodes in placement] == [set(nodes) for nodes in problem.placement]
    counts = dict.fromkeys((s for s, nodes in enumerate(problem.placement) if s and nodes), 0)
    for path in schedule.paths:
        stages = path.stages
        assert len(stages) == len(set(stages)) == rules.path_length - 1
        furthest = [max((0, *stages[:at])) for at in range(len(stages))]
        assert all(stage - far <= rules.max_jump for stage, far in zip(stages, furthest, strict=True))
        back = [far - stage for stage, far in zip(stages, furthest, strict=True) if stage < far]
        assert len(back) <= rules.max_swaps
        assert all(step <= rules.max_back for step in back)
        for visit in path.visits:
            counts[visit.stage] += 1
            assert found.nodes[visit.rank] in placement[visit.stage]
    assert max(counts.values()) - min(counts.values()) <= 1
    assert found.visits == tuple(counts[stage] for stage in sorted(counts))
    for driver in schedule.drivers:
        assert sum(path.driver == driver for path in schedule.paths) == problem.microbatches_per_driver
    caps = problem.memory_caps or (10**9,) * len(found.nodes)
    for rank, order in enumerate(schedule.orders):
        held = 0
        for action in order:
            held += {"F": 1, "L": 0, "B": -1}[action.op]
            assert held <= caps[found.nodes[rank]]


def makespan_s(problem: PlanProblem, found: Plan) -> float:
    timeline = simulate(found.schedule, reordered(problem.cost, found.nodes), links=problem.links)
    tails = problem.allreduce_s or (0.0,) * len(problem.placement)
    return max(event.end_s + (tails[event.action.stage] if event.action.op == "B" else 0) for event in timeline.events)


@quick
@given(st.integers(0, 10**6))
def test_every_plan_is_legal_and_takes_as_long_as_it_says(seed):
    problem = random_problem(random.Random(seed))
    found = plan(problem, max_iterations=8_000, seed=seed)
    check_legal(problem, found)
    validate(found.schedule)
    assert found.makespan_s == pytest.approx(makespan_s(problem, found))
    assert found.lower_bound_s <= found.makespan_s * (1 + 1e-9)
    assert Schedule.from_json(found.schedule.to_json()) == found.schedule


@quick
@given(st.integers(0, 10**6), st.sampled_from([BACKWARD_FIRST, FORWARD_FIRST, OLDEST_FIRST]))
def test_the_fast_simulator_agrees_with_the_schedule_simulator(seed, rule):
    """The dispatcher, the player of fixed orders and `simulate` give one makespan for the same orders."""
    problem = random_problem(random.Random(seed), allreduce_s=(), memory_caps=None, placement_mode="given")
    found = plan(problem, max_iterations=1, seed=seed)
    instance = Instance(problem)
    chains = [
        instance.chain(found.nodes[path.driver], path.stages, tuple(found.nodes[visit.rank] for visit in path.visits))
        for path in found.schedule.paths
    ]
    played = dispatch(chains, instance.machine, rule)
    static = Static(chains, instance.machine)
    assert static.play(played.orders) == pytest.approx(played.finish_s)
    better = polish(chains, instance.machine, played, plays=50, target_s=0, seed=seed)
    assert better.finish_s <= played.finish_s + 1e-9


@quick
@given(st.integers(0, 10**6))
def test_equal_seeds_give_equal_plans(seed):
    problem = random_problem(random.Random(seed))
    assert plan(problem, max_iterations=4_000, seed=7) == plan(problem, max_iterations=4_000, seed=7)


def best_makespan_s(problem: PlanProblem) -> float:
    """Enumerate all legal, balanced paths and all orders of all nodes that keep the caps."""
    rules, count = problem.constraints, problem.num_microbatches
    visits, best = problem.num_visits, inf
    stages = range(1, problem.num_stages + 1)
    ways = [way for way in permutations(stages, visits) if rules.why_illegal(way, problem.num_stages) is None]
    hosted = [tuple(zip(way, on, strict=True)) for way in ways for on in product(*(problem.placement[s] for s in way))]
    drivers = [driver for driver in problem.drivers for _ in range(problem.microbatches_per_driver)]
    instance = Instance(problem)
    for routes in product(hosted, repeat=count):
        seen = [sum(stage == s for route in routes for s, _ in route) for stage in stages]
        if max(seen) - min(seen) > 1:
            continue
        chains = [
            instance.chain(driver, tuple(s for s, _ in route), tuple(n for _, n in route))
            for driver, route in zip(drivers, routes, strict=True)
        ]
        best = min(best, best_orders_s(Static(chains, instance.machine), instance))
    return best


def best_orders_s(static: Static, instance: Instance) -> float:
    tasks: list[list[int]] = [[] for _ in range(instance.num_nodes)]
    for task, node in enumerate(static.node):
        tasks[node].append(task)
    choices = []
    for node, own in enumerate(tasks):
        legal = [
            order
            for order in permutations(own)
            if all(
                order.index(a) < order.index(b)
                for a in own
                for b in own
                if a < b and a // static.length == b // static.length
            )
            and static.fits(order, instance.machine.caps[node])
        ]
        choices.append(legal)
    return min(static.play(orders) for orders in product(*choices))


@pytest.mark.parametrize("seed", range(6))
def test_small_instances_are_solved_within_two_percent(seed):
    chance = random.Random(seed)
    placement = [((0,), (1,), (2,), (3,)), ((0,), (1, 2), (3,)), ((0, 1), (2,), (3,))][seed % 3]
    compute = ComputeCost(
        (0.3,) * len(placement), (0.7,) * len(placement), 0.2, rank_factor=tuple(chance.uniform(1, 2) for _ in range(4))
    )
    problem = PlanProblem(
        placement=placement,
        microbatches_per_driver=1 if seed % 3 == 2 else 2,
        cost=CostModel(compute, network(chance, 4, scale=0.5), 0),
        constraints=PathConstraints(path_length=3 if seed % 3 == 0 else 2, max_swaps=1),
        memory_caps=(chance.randint(1, 2), 2, 2, 2),
    )
    found = plan(problem, max_iterations=30_000, seed=seed)
    optimum_s = best_makespan_s(problem)
    assert optimum_s - 1e-9 <= found.makespan_s <= optimum_s * 1.02
    assert found.lower_bound_s <= optimum_s + 1e-9


@pytest.mark.parametrize("with_history", [True, False])
def test_successive_plans_skip_each_stage_equally_often(with_history):
    cost = CostModel.uniform(num_stages=7, num_ranks=8)
    placement = [[rank] for rank in range(8)]
    total = [0] * 7
    for turn in range(100):
        history = total if with_history else ()
        schedule = plan_paths(
            cost,
            placement,
            5,
            constraints=PathConstraints(skip_ratio=0.4),
            history=history,
            turn=turn,
            max_iterations=100,
        )
        for path in schedule.paths:
            for stage in path.stages:
                total[stage - 1] += 1
    skipped = [500 - visits for visits in total]
    mean = sum(skipped) / len(skipped)
    assert all(abs(count - mean) <= 0.05 * mean for count in skipped)


def test_rotated_paths_reach_the_bound_of_equal_workers():
    """P = 6, 30 microbatches, one of five workers skipped: 72 units, which ascending paths miss."""
    cost = CostModel.uniform(5, 6)
    schedule = plan_paths(cost, [[r] for r in range(6)], 30, constraints=PathConstraints.unrestricted(path_length=5))
    assert simulate(schedule, cost).makespan_s == 72
    legal = plan_paths(cost, [[r] for r in range(6)], 30, constraints=PathConstraints(path_length=5))
    assert simulate(legal, cost).makespan_s <= 82


def test_a_full_pipeline_is_as_fast_as_the_closed_form():
    cost = CostModel.uniform(5, 6)
    schedule = plan_paths(cost, [[r] for r in range(6)], 30)
    assert all(path.stages == (1, 2, 3, 4, 5) for path in schedule.paths)
    assert simulate(schedule, cost).makespan_s == lower_bound_s(schedule, cost) == 102


def test_paths_avoid_a_hole():
    cost = CostModel.uniform(4, 5)
    schedule = plan_paths(
        cost, [[0], [1], [2], [], [4]], 6, constraints=PathConstraints(skip_ratio=0.5), max_iterations=2_000
    )
    assert all(3 not in path.stages and len(path.visits) == 2 for path in schedule.paths)


def test_required_stages_are_in_every_path_and_in_their_place():
    cost = CostModel.uniform(5, 6)
    rules = PathConstraints(skip_ratio=0.4, required=(2, 5))
    for path in plan_paths(cost, [[r] for r in range(6)], 10, constraints=rules, max_iterations=4_000).paths:
        assert {2, 5} <= set(path.stages)
        assert path.stages[-1] == 5
        before = path.stages.index(2)
        assert all((stage < 2) == (at < before) for at, stage in enumerate(path.stages) if stage != 2)


def test_a_slow_link_is_avoided():
    """Two replicas of each stage; one of each pair is far away and never needed."""
    far = {2, 4}
    latency = tuple(tuple(50.0 if {a, b} & far and a != b else 0.1 for b in range(5)) for a in range(5))
    equal = CostModel.uniform(2, 5)
    cost = CostModel(equal.compute, NetworkCost(latency, equal.network.bandwidth_Bps), 0)
    schedule = plan_paths(cost, [[0], [1, 2], [3, 4]], 6, max_iterations=LITTLE)
    assert {visit.rank for path in schedule.paths for visit in path.visits} == {1, 3}


def test_planning_the_placement_puts_neighbours_together():
    """Two towns of three nodes, placed across: planned, every path stays in its town."""
    town = [0, 1, 0, 1, 0, 1]
    latency = tuple(tuple(0.1 if town[a] == town[b] else 5.0 for b in range(6)) for a in range(6))
    equal = CostModel.uniform(2, 6)
    cost = CostModel(equal.compute, NetworkCost(latency, equal.network.bandwidth_Bps), 0)
    given = PlanProblem(
        placement=((0, 2), (1, 3), (4, 5)), microbatches_per_driver=4, cost=cost, constraints=PathConstraints()
    )
    free = PlanProblem(
        placement=given.placement,
        microbatches_per_driver=4,
        cost=cost,
        constraints=PathConstraints(),
        placement_mode="plan",
    )
    found = plan(free, max_iterations=LITTLE)
    assert found.makespan_s < plan(given, max_iterations=LITTLE).makespan_s / 2
    for path in found.schedule.paths:
        assert len({town[found.nodes[rank]] for rank in path.hops()}) == 1


def test_shared_links_are_charged_one_message_at_a_time():
    cost = CostModel.uniform(1, 2, latency_s=10.0)
    schedule = list_schedule([[0], [1]], [Path(0, (Visit(1, 1),))] * 3)
    free, shared = (simulate(schedule, cost, links=links) for links in ("free", "shared"))
    assert free.makespan_s < shared.makespan_s
    sent = sorted((t.start_s, t.end_s) for t in shared.transfers if t.source == 0)
    assert all(a[1] <= b[0] for a, b in pairwise(sent))


def test_queued_messages_wait_for_their_request_and_the_bytes_before_them():
    compute = ComputeCost((0.0, 1.0), (0.0, 1.0), 0.0)
    network = NetworkCost(((0.0, 10.0), (5.0, 0.0)), ((inf, 2.0), (4.0, inf)))
    schedule = list_schedule([[0], [1]], [Path(0, (Visit(1, 1),))] * 3)
    timeline = simulate(schedule, CostModel(compute, network, 8), links="queued")
    arrivals = [(t.start_s, t.end_s) for t in timeline.transfers if str(t.action).startswith("0F")]
    # 10 s until the worker is told, 5 s until its request is back; then 4 s of bytes each, and 10 s of latency.
    assert arrivals == [(15.0, 29.0), (19.0, 33.0), (23.0, 37.0)]


def problem_with(**changes) -> PlanProblem:
    base = {
        "placement": ((0,), (1,), (2,), (3,)),
        "microbatches_per_driver": 3,
        "cost": CostModel.uniform(3, 4),
        "constraints": PathConstraints(path_length=3),
    }
    changes = base | changes
    if isinstance(changes["constraints"], dict):
        changes["constraints"] = PathConstraints(**changes["constraints"])
    return PlanProblem(**changes)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"constraints": {"skip_ratio": 0.9}}, "leaves no stage"),
        ({"constraints": {"skip_ratio": 1.0}}, "out of range"),
        ({"constraints": {"skip_ratio": -0.1}}, "out of range"),
        ({"constraints": {"skip_ratio": 0.5, "path_length": 3}}, "both set the length"),
        ({"constraints": {"path_length": 1}}, "path_length=1 is out of range"),
        ({"constraints": {"path_length": 6}}, "stages too few"),
        ({"constraints": {"path_length": 3, "max_jump": 1}}, "max_jump=1 is too short"),
        ({"constraints": {"path_length": 3, "max_jump": 0}}, "max_jump=0"),
        ({"constraints": {"max_swaps": 2, "max_back": 0}}, "contradicts max_back=0"),
        ({"constraints": {"max_swaps": -1}}, "max_swaps=-1 is out of range"),
        ({"constraints": {"path_length": 2, "required": (1, 2)}}, "2 stages are required"),
        ({"constraints": {"required": (9,)}}, "no node holds it"),
        ({"placement": ((0,), (1,), (), (3,)), "constraints": {}}, "stages too few"),
        ({"placement": ((),)}, "no driver"),
        ({"placement": ((0,), (1, 1), (2,), (3,))}, "name each node once"),
        ({"placement": ((0,), (1,), (2,), (7,))}, "covers 3 block stages and 4 ranks"),
        ({"placement": ((0,), (1,), (1,), (3,)), "placement_mode": "plan"}, "needs one stage on each node"),
        ({"microbatches_per_driver": 0}, "at least 1"),
        ({"memory_caps": (2, 0, 2, 2)}, "caps too small: stage 1"),
        ({"memory_caps": (0, 2, 2, 2)}, "caps too small: stage 0"),
        ({"memory_caps": (2, 2)}, "2 memory caps for 4 nodes"),
        ({"placement": ((0,), (0,), (0,), (0,)), "memory_caps": (2, 0, 0, 0)}, "caps too small"),
        ({"unreachable": frozenset({(0, 1), (0, 2), (0, 3)})}, "unreachable links"),
        ({"unreachable": frozenset({(3, 0), (2, 3), (3, 2)})}, "unreachable links"),
        ({"allreduce_s": (1.0,)}, "1 entries for 4 stages"),
        ({"allreduce_s": (1.0, 1.0, 1.0, inf)}, "finite"),
        ({"links": "some"}, "'free', 'queued' or 'shared'"),
    ],
)
def test_what_cannot_be_planned_names_the_violated_constraint(changes, reason):
    with pytest.raises(ValueError, match=reason):
        plan(problem_with(**changes), max_iterations=2_000)


@pytest.mark.parametrize("arguments", [{"budget_s": 0}, {"budget_s": inf}, {"max_iterations": 0}, {"history": (1,)}])
def test_bad_budgets_and_histories_are_refused(arguments):
    with pytest.raises(ValueError, match=r"budget|history"):
        plan(problem_with(), **arguments)


def test_a_plan_ends_in_time():
    problem = random_problem(random.Random(3), placement_mode="plan")
    found = plan(problem, budget_s=0.2)
    check_legal(problem, found)
    assert found.gap >= 0
    assert all(0 <= share <= 1 for share in found.idle_share)
