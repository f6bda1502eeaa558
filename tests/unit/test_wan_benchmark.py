"""What of benchmarks/partial_wan.py needs no root: reading the links, the emulator's arithmetic, the predictions."""

import json
import sys
from pathlib import Path

import pytest

from skippipe_plugin.schedule import ComputeCost, CostModel, NetworkCost, PathConstraints, simulate, validate
from skippipe_plugin.schedule.problem import reordered

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("wan", "partial_plans"):
        sys.modules.pop(name, None)


@pytest.fixture
def matrix():
    from wan import Matrix

    return Matrix.load(BENCHMARKS / "geo7.json")


@pytest.fixture
def cost(matrix) -> CostModel:
    wide = tuple(tuple(value or 1.0 for value in row) for row in matrix.bandwidth_Bps)  # diagonals do not matter
    compute = ComputeCost((0.0, *[0.005] * 6), (0.0, *[0.01] * 6), 0.0)
    return CostModel(compute, NetworkCost(matrix.latency_s, wide), 262_144)


def test_links_are_read_in_seconds_and_bytes(matrix):
    assert matrix.num_nodes == 7
    belgium, japan = matrix.names.index("Belgium"), matrix.names.index("Japan")
    assert matrix.message_s(belgium, japan, 1_258_300) == pytest.approx(0.112 + 1.0)


def test_packets_leave_at_the_bandwidth_of_their_link_and_arrive_a_latency_later(monkeypatch):
    import wan

    links = wan.Matrix(("a", "b"), ((0.0, 0.5), (0.25, 0.0)), ((1.0, 1000.0), (100.0, 1.0)))
    monkeypatch.setattr(wan.time, "monotonic", lambda: 10.0)
    router = wan.Router(links, [3, 4])
    for source, destination, size in ((0, 1, 1000), (0, 1, 500), (1, 0, 100)):
        router._admit(source, destination, bytes(size))
    due = sorted((at, node) for at, _, node, _ in router._queue)
    assert due == [(10.0 + 1.0 + 0.25, 0), (10.0 + 1.0 + 0.5, 1), (10.0 + 1.0 + 0.5 + 0.5, 1)]


def test_a_packet_too_many_is_dropped(monkeypatch):
    import wan

    links = wan.Matrix(("a", "b"), ((0.0, 0.0), (0.0, 0.0)), ((1.0, 1e6), (1e6, 1.0)))
    monkeypatch.setattr(wan.time, "monotonic", lambda: 0.0)
    router = wan.Router(links, [3, 4])
    for _ in range(40):
        router._admit(0, 1, bytes(wan._MTU))
    assert router.stats()["packets"] + router.dropped == 40
    assert router.dropped > 0


def test_every_row_of_the_benchmark_is_predicted_and_none_below_its_bound(cost):
    from partial_plans import at_random, exact, planned

    entries = [exact("1f1b", cost, 12), exact("gpipe", cost, 12), planned(cost, 12, 0.0)]
    skipping = [planned(cost, 12, 1 / 3), planned(cost, 12, 1 / 3, place=True), at_random(cost, 12, 1 / 3, 0)]
    rules = PathConstraints(skip_ratio=1 / 3)
    for entry in (*entries, *skipping):
        validate(entry.schedule)
        assert entry.bound_s <= entry.predicted_s
        assert sorted(entry.nodes) == list(range(7))
        assert entry.schedule.placement == tuple((stage,) for stage in range(7))
        there = simulate(entry.schedule, reordered(cost, entry.nodes), links="queued")
        assert there.makespan_s == pytest.approx(entry.predicted_s)
    for entry in skipping:
        assert {len(path.visits) for path in entry.schedule.paths} == {4}
        assert not any(rules.why_illegal(path.stages, 6) for path in entry.schedule.paths)
    assert skipping[0].predicted_s < 0.5 * min(entries[0].predicted_s, skipping[2].predicted_s)


@pytest.mark.parametrize("missing", ["names", "latency_ms", "megabytes_per_s"])
def test_a_matrix_without_an_entry_is_refused(missing, tmp_path):
    from wan import LabError, Matrix

    data = {"names": ["a"], "latency_ms": [[0]], "megabytes_per_s": [[0]]}
    del data[missing]
    (tmp_path / "m.json").write_text(json.dumps(data))
    with pytest.raises(LabError, match=missing):
        Matrix.load(tmp_path / "m.json")


@pytest.mark.parametrize("entry", ["latency_ms", "megabytes_per_s"])
def test_a_matrix_that_is_not_square_or_not_positive_is_refused(entry, tmp_path):
    from wan import LabError, Matrix

    good = {"names": ["a", "b"], "latency_ms": [[0, 1], [1, 0]], "megabytes_per_s": [[0, 1], [1, 0]]}
    for bad in ([[0, 1]], [[0, 1], [1]], [[0, -1], [1, 0]], "nonsense"):
        (tmp_path / "m.json").write_text(json.dumps(good | {entry: bad}))
        with pytest.raises(LabError, match=entry):
            Matrix.load(tmp_path / "m.json")
