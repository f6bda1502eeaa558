"""How many stages the workers make, and who sits where: rules that hold for any numbers, and brute force."""

from itertools import permutations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from skippipe_plugin.driver.resizing import Workforce, arrivals, carried_over, num_stages_for, seats
from skippipe_plugin.partition import cut


@st.composite
def situations(draw: st.DrawFn) -> tuple[Workforce, dict[str, int]]:
    replicas, present = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    leaving = draw(st.integers(0, replicas * present))
    ready = draw(st.integers(0, 8))
    workforce = Workforce(
        staying=replicas * present - leaving,
        leaving=leaving,
        ready=ready,
        joined=draw(st.integers(0, ready)),
        coming=draw(st.integers(0, 2)),
    )
    most = draw(st.integers(present, 8))
    return workforce, {"present": present, "replicas": replicas, "spares": draw(st.integers(0, 3)), "most": most}


@given(situations())
def test_there_are_always_enough_workers_and_spares(situation: tuple[Workforce, dict[str, int]]) -> None:
    workforce, rule = situation
    stages, present, replicas = num_stages_for(workforce, **rule), rule["present"], rule["replicas"]
    there = workforce.staying + workforce.ready
    assert 1 <= stages <= rule["most"]
    assert stages == present or stages * replicas <= there
    if stages > present:
        assert there - stages * replicas >= rule["spares"]
        assert (stages - present) * replicas <= workforce.joined
    if stages < present:
        assert workforce.leaving
        assert (stages + 1) * replicas > there  # no more than must be


@given(situations())
def test_without_joining_or_leaving_nothing_changes(situation: tuple[Workforce, dict[str, int]]) -> None:
    workforce, rule = situation
    assume(not workforce.leaving)
    idle = Workforce(staying=workforce.staying, ready=workforce.ready, coming=workforce.coming)
    assert num_stages_for(idle, **rule) == rule["present"]


@given(situations())
def test_a_decision_that_was_carried_out_is_not_revised(situation: tuple[Workforce, dict[str, int]]) -> None:
    workforce, rule = situation
    stages = num_stages_for(workforce, **rule)
    assume(stages != rule["present"])
    used = stages * rule["replicas"]
    left = workforce.staying + workforce.ready - used
    taken = max(0, stages - rule["present"]) * rule["replicas"]
    joined = min(left, workforce.joined - taken)
    new = Workforce(staying=used, ready=left, joined=joined, coming=workforce.coming)
    assert num_stages_for(new, **rule | {"present": stages}) == stages


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_as_little_as_possible_moves(before: int, after: int, data: st.DataObject) -> None:
    num_blocks = 6
    weights = data.draw(st.lists(st.integers(1, 9), min_size=num_blocks, max_size=num_blocks))
    held = [list(blocks) for blocks in cut([1.0] * num_blocks, before)] + [[]] * max(0, after - before)
    held = data.draw(st.permutations(held))
    wanted = [list(blocks) for blocks in cut([1.0] * num_blocks, after)]
    chosen = seats(held, wanted, weights)
    assert len(set(chosen)) == len(wanted)

    def moved(workers: tuple[int, ...] | list[int]) -> int:
        pairs = zip(wanted, workers, strict=True)
        return sum(weights[block] for place, worker in pairs for block in arrivals(held[worker], place))

    assert moved(chosen) == min(map(moved, permutations(range(len(held)), len(wanted))))


@given(st.integers(1, 6), st.integers(1, 6), st.data())
def test_factors_keep_their_mean_over_the_blocks(before: int, after: int, data: st.DataObject) -> None:
    factors = data.draw(st.dictionaries(st.integers(1, before), st.floats(0.5, 2.0)))
    old, new = cut([1.0] * 6, before), cut([1.0] * 6, after)
    carried = carried_over(factors, old, new)

    def total(by_stage: dict[int, float], stages: tuple[range, ...]) -> float:
        return sum(by_stage.get(number, 1.0) * len(blocks) for number, blocks in enumerate(stages, start=1))

    assert total(carried, new) == pytest.approx(total(factors, old))
    if before == after:
        assert carried == pytest.approx({stage: factor for stage, factor in factors.items() if factor != 1.0})
