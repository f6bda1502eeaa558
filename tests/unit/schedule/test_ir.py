"""Schedules are values: they print, parse back, compare and say what needs what."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.schedule import (
    Action,
    Message,
    Op,
    Path,
    Schedule,
    ScheduleError,
    Visit,
    dependencies,
    forward_only,
    full_schedule,
    messages,
    rank_of,
    validate,
)

small = st.integers(0, 40)
actions = st.builds(Action, small, st.sampled_from(Op), small)
paths = st.builds(Path, small, st.lists(st.builds(Visit, small, small), max_size=5).map(tuple))
schedules = st.builds(
    Schedule,
    placement=st.lists(st.lists(small, max_size=3).map(tuple), max_size=4).map(tuple),
    paths=st.lists(paths, max_size=4).map(tuple),
    orders=st.lists(st.lists(actions, max_size=6).map(tuple), max_size=4).map(tuple),
    backward=st.booleans(),
    name=st.text(max_size=12),
)
quick = settings(derandomize=True, deadline=None, max_examples=80)


@quick
@given(schedules)
def test_text_and_json_round_trip(schedule):
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule


@quick
@given(actions, paths)
def test_action_and_path_round_trip(action, path):
    assert Action.parse(str(action)) == action
    assert Path.parse(str(path)) == path


def test_file_round_trip(tmp_path):
    schedule = full_schedule("1f1b", num_stages=3, num_microbatches=4, replicas=2)
    schedule.save(tmp_path / "schedule.json")
    assert Schedule.load(tmp_path / "schedule.json") == schedule


@pytest.mark.parametrize("text", ["", "F0", "1F", "1X0", "1F0>2", "1F0 ", "-1F0", "01F0", "1f0", "1F0\n", "١F0"])
def test_nonsense_is_no_action(text):
    with pytest.raises(ScheduleError, match="is not an action"):
        Action.parse(text)


@pytest.mark.parametrize("text", ["", "0", "0: 1", "0: 1@", "0: 1@2x", "a: 1@2", "0: 1@1,2@2"])
def test_nonsense_is_no_path(text):
    with pytest.raises(ScheduleError, match=r"is not a (path|visit)"):
        Path.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "starts with the line"),
        ("schedule gpipe training", "starts with the line"),
        ('schedule "" sometimes', "starts with the line"),
        ('schedule "" training\nrank 1 = 0F0', "expected rank 0 next"),
        ('schedule "" training\nstage 0 = 0 x', "'x' in a placement"),
        ('schedule "" training\nrank 0 = 0F0 1F0>2', "'1F0>2' is not an action"),
        ('schedule "" training\nnode 0 = 0F0', "cannot read the line 'node 0 = 0F0'"),
        ('schedule "\\x" training', "not JSON"),
    ],
)
def test_unreadable_text_is_quoted(text, reason):
    with pytest.raises(ScheduleError, match=reason):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "expected a JSON dict, got list"),
        ("{}", "not a skippipe-schedule of version 1"),
        ('{"format": "skippipe-schedule", "version": 1}', "the key 'placement' must hold a list"),
        ('{"format": "skippipe-schedule", "version": 1, "placement": [[true]]}', "expected a int in a list"),
    ],
)
def test_unreadable_json_says_why(text, reason):
    with pytest.raises(ScheduleError, match=reason):
        Schedule.from_json(text)


def test_comments_and_blank_lines_are_skipped():
    schedule = full_schedule("gpipe", num_stages=1, num_microbatches=1)
    assert Schedule.parse("# by hand\n\n" + str(schedule).replace("\n", "\n\n  # next\n")) == schedule


def two_hosts() -> Schedule:
    """One microbatch: stage 1 on the driver, stage 2 split into halves on a worker."""
    orders = ("0F0 1F0 0L0 1B0 0B0", "2F0 2I0 2W0")
    return Schedule(
        placement=((0,), (0,), (1,)),
        paths=(Path.parse("0: 1@0 2@1"),),
        orders=tuple(tuple(map(Action.parse, order.split())) for order in orders),
    )


def test_what_needs_what():
    schedule = two_hosts()
    validate(schedule)
    got = {str(action): " ".join(map(str, inputs)) for action, inputs in dependencies(schedule).items()}
    assert got == {
        "0F0": "",
        "1F0": "0F0",
        "2F0": "1F0",
        "0L0": "2F0",
        "2I0": "0L0",
        "2W0": "2I0",
        "1B0": "2I0",
        "0B0": "1B0",
    }
    assert {str(action) for action, rank in rank_of(schedule).items() if rank == 1} == {"2F0", "2I0", "2W0"}


def test_only_hops_between_ranks_are_messages():
    want = [("1F0", "2F0", 0, 1, "forward"), ("2F0", "0L0", 1, 0, "forward"), ("0L0", "2I0", 0, 1, "backward")]
    want.append(("2I0", "1B0", 1, 0, "backward"))
    got = messages(two_hosts())
    assert got == [Message(Action.parse(a), Action.parse(b), *rest) for a, b, *rest in want]
    assert [message.activation_stage for message in got] == [1, 2, 2, 1]


def test_counts_and_hops():
    schedule = full_schedule("gpipe", num_stages=3, num_microbatches=4, replicas=2, drivers=2)
    assert (schedule.num_stages, schedule.num_ranks, schedule.num_microbatches) == (3, 8, 8)
    assert schedule.drivers == (0, 1)
    assert schedule.paths[5].hops() == (1, 2, 4, 6, 1)  # i = 1 of driver 1: replica (1 + 1) mod 2
    assert schedule.paths[5].stages == (1, 2, 3)


def test_forward_only_leaves_a_valid_schedule():
    training = full_schedule("1f1b", num_stages=3, num_microbatches=5, drivers=2, driver_stage=True)
    validate(forward_only(training))
