"""Exact schedules: closed forms, and torch's own generators as the oracle."""

from itertools import product

import pytest

from skippipe_plugin.schedule import CostModel, Op, full_schedule, lower_bound_s, peak_activations, simulate

SIZES = list(product((1, 2, 3, 4, 8), (1, 2, 3, 5, 8, 16)))


@pytest.mark.parametrize(("name", "limit"), [("gpipe", False), ("1f1b", True)])
@pytest.mark.parametrize(("p", "m"), SIZES)
def test_closed_forms(name, limit, p, m):
    schedule = full_schedule(name, num_stages=p, num_microbatches=m)
    cost = CostModel.uniform(p, p + 1, forward_s=1.5, backward_s=2.5)
    timeline = simulate(schedule, cost)
    assert timeline.makespan_s == pytest.approx((m + p - 1) * 4.0)
    assert lower_bound_s(schedule, cost) == pytest.approx(timeline.makespan_s)
    want = tuple(min(m, p + 1 - i) if limit else m for i in range(p))  # 1F1B over p + 1: the loss is the last stage
    assert peak_activations(schedule)[1:] == want
    assert tuple(timeline.peak_activations(rank) for rank in range(1, p + 1)) == want


@pytest.mark.parametrize(("p", "m"), SIZES)
@pytest.mark.parametrize("c", [0.25, 1.0, 3.0])
def test_gpipe_on_slow_links(p, m, c):
    """Out over p hops and back over p; the last stage waits for the round trip of the loss, or for its own work.

    Its backward j begins after all m forwards, and after forward j, the hop to the driver and the hop back. What is
    longest is the end at j = 0 or j = m - 1 of: p hops, p - 1 stages before, j + 1 forwards, 2 hops, m - j backwards,
    p - 1 stages after, p hops; or the same without the 2 hops, all forwards and all backwards.
    """
    f, b = 1.0, 2.0
    cost = CostModel.uniform(p, p + 1, forward_s=f, backward_s=b, latency_s=c)
    last = max(m * (f + b), f + 2 * c + m * b, m * f + 2 * c + b)
    want = 2 * p * c + (p - 1) * (f + b) + last
    assert simulate(full_schedule("gpipe", num_stages=p, num_microbatches=m), cost).makespan_s == pytest.approx(want)


def test_a_stage_on_the_driver_saves_its_hops():
    """With a stage on the driver nothing leaves for it: torch's pipeline of p ranks plus the way back to the loss."""
    p, m, c = 4, 8, 0.5
    cost = CostModel.uniform(p, p, latency_s=c)
    schedule = full_schedule("gpipe", num_stages=p, num_microbatches=m, driver_stage=True)
    assert simulate(schedule, cost).makespan_s == pytest.approx((m + p - 1) * 3 + 2 * (p - 1) * c)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("p", "m"), [(p, m) for p, m in SIZES if m > p])  # torch's 1F1B refuses fewer than stages
def test_torch_orders_alike(name, p, m):
    """Torch's orders of one stage more, whose last is the loss on our driver."""
    visualizer = pytest.importorskip("torch.distributed.pipelining._schedule_visualizer")
    oracle = visualizer.get_schedule_ops({"gpipe": "GPipe", "1f1b": "1F1B"}[name], p + 1, m)
    schedule = full_schedule(name, num_stages=p, num_microbatches=m)
    for stage in range(p):
        want = [str(action) for action in oracle[stage] if action is not None and "REDUCE" not in str(action)]
        assert [f"{a.stage - 1}{a.op}{a.microbatch}" for a in schedule.orders[stage + 1]] == want


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_the_last_stage_does_not_wait_for_the_loss(p):
    """It computes on while the driver computes a head as heavy as its own forward."""
    schedule = full_schedule("1f1b", num_stages=p, num_microbatches=16)
    timeline = simulate(schedule, CostModel.uniform(p, p + 1, loss_s=1.0))
    assert timeline.makespan_s == pytest.approx((16 + p - 1) * 3.0)


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_driver_and_replica_of_each_microbatch(name):
    schedule = full_schedule(name, num_stages=2, num_microbatches=3, replicas=2, drivers=2, driver_stage=True)
    assert schedule.placement == ((0, 1), (0, 1), (2, 3))
    want = ["0: 1@0 2@2", "0: 1@0 2@3", "0: 1@0 2@2", "1: 1@1 2@3", "1: 1@1 2@2", "1: 1@1 2@3"]
    assert list(map(str, schedule.paths)) == want


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_drivers_take_turns(name):
    schedule = full_schedule(name, num_stages=2, num_microbatches=3, drivers=2)
    forwards = [action.microbatch for action in schedule.orders[2] if action.op is Op.F]
    assert forwards == [0, 3, 1, 4, 2, 5]


def test_every_driver_stage_stays_near_the_bound():
    for p, m, replicas, drivers in product((1, 2, 3, 5), (8, 16), (1, 2, 3), (1, 2)):
        schedule = full_schedule(
            "1f1b", num_stages=p, num_microbatches=m, replicas=replicas, drivers=drivers, driver_stage=True
        )
        cost = CostModel.uniform(p, schedule.num_ranks)
        assert simulate(schedule, cost).makespan_s <= 1.3 * lower_bound_s(schedule, cost)


def test_evaluation_takes_forwards_only():
    for name in ("gpipe", "1f1b"):
        schedule = full_schedule(name, num_stages=3, num_microbatches=4, backward=False)
        assert simulate(schedule, CostModel.uniform(3, 4)).makespan_s == 4 + 3 - 1
        assert {action.op for order in schedule.orders for action in order} == {Op.F, Op.L}


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="there is no schedule 'zigzag'; choose one of gpipe, 1f1b"):
        full_schedule("zigzag", num_stages=1, num_microbatches=1)
    with pytest.raises(ValueError, match="num_microbatches is 0"):
        full_schedule("gpipe", num_stages=1, num_microbatches=0)
