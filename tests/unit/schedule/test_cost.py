"""The cost model answers in seconds and refuses numbers that are no cost."""

import json
import math

import pytest

from skippipe_plugin.schedule import Action, ComputeCost, CostModel, NetworkCost


def model() -> CostModel:
    compute = ComputeCost((0.5, 1.0, 3.0), (0.25, 2.0, 4.0), 0.75, input_share=0.6, rank_factor=(1.0, 2.0, 0.5))
    latency = ((0.0, 0.1, 0.2), (0.3, 0.0, 0.4), (0.5, 0.6, 0.0))
    bandwidth = ((math.inf, 100.0, 50.0), (math.inf,) * 3, (10.0, 10.0, math.inf))
    return CostModel(compute, NetworkCost(latency, bandwidth, overhead_s=0.01), (10, 20, 30))


@pytest.mark.parametrize(
    ("action", "rank", "seconds"),
    [("0F0", 0, 0.5), ("0L3", 0, 0.75), ("0B0", 0, 0.25), ("1F1", 1, 2.0), ("2B0", 2, 2.0), ("1I0", 1, 2.4)],
)
def test_seconds_of_actions(action, rank, seconds):
    assert model().action_s(Action.parse(action), rank) == pytest.approx(seconds)


def test_halves_add_up_to_the_backward():
    halves = [model().action_s(Action.parse(text), 1) for text in ("2I0", "2W0")]
    assert sum(halves) == pytest.approx(model().action_s(Action.parse("2B0"), 1))


def test_seconds_of_messages():
    cost = model()
    assert cost.message_s(0, 1, 2) == pytest.approx(0.1 + 30 / 100 + 0.01)
    assert cost.message_s(1, 0, 2) == pytest.approx(0.3 + 0.01)
    assert cost.message_s(2, 2, 2) == 0.0


def test_json_round_trip(tmp_path):
    for cost in (model(), CostModel.uniform(3, 4, latency_s=0.1, activation_bytes=7)):
        assert CostModel.from_json(cost.to_json()) == cost
        cost.save(tmp_path / "cost.json")
        assert CostModel.load(tmp_path / "cost.json") == cost


def test_what_has_a_default_may_be_left_out():
    data = json.loads(CostModel.uniform(1, 2).to_json())
    for key in ("input_share", "rank_factor", "gap_s", "overhead_s"):
        del data[key]
    assert CostModel.from_json(json.dumps(data)) == CostModel.uniform(1, 2)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("forward_s", None, "lacks 'forward_s'"),
        ("loss_s", None, "lacks 'loss_s'"),
        ("latency_s", None, "lacks 'latency_s'"),
        ("activation_bytes", None, "lacks 'activation_bytes'"),
        ("forward_s", [0.0, -1.0], r"forward_s\[1\] is -1.0"),
        ("backward_s", [0.0], "forward_s has 2 entries, backward_s 1"),
        ("loss_s", math.nan, "loss_s is nan"),
        ("loss_s", math.inf, "loss_s is inf"),
        ("loss_s", "fast", "loss_s holds 'fast', which is not a number"),
        ("loss_s", True, "which is not a number"),
        ("forward_s", 1.0, "must be a list"),
        ("input_share", 1.5, "a share between 0 and 1"),
        ("rank_factor", [1.0], "rank_factor has 1 entries for 2 ranks"),
        ("latency_s", [[0, 1], [1]], "latency_s is not a square matrix"),
        ("latency_s", [[0, None], [1, 0]], r"latency_s holds None"),
        ("bandwidth_Bps", [[1.0]], "bandwidth_Bps is not a square matrix over the 2 ranks"),
        ("bandwidth_Bps", [[1, 0], [1, 1]], "from rank 0 to rank 1 .*cannot be reached"),
        ("activation_bytes", [1], "activation_bytes has 1 entries for 2 stages"),
        ("activation_bytes", 1.5, "whole numbers"),
        ("activation_bytes", -1, "activation_bytes is -1"),
        ("format", "other", "not a skippipe-cost"),
    ],
)
def test_bad_entries_are_named(key, value, reason):
    data = json.loads(CostModel.uniform(1, 2).to_json())
    data[key] = value
    with pytest.raises(ValueError, match=reason):
        CostModel.from_json(json.dumps(data))


def test_not_json():
    with pytest.raises(ValueError, match="the cost model is not JSON"):
        CostModel.from_json("{")
