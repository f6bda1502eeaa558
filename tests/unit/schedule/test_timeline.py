"""A timeline is data with views: shares, peaks, table, trace."""

import json
from dataclasses import replace

import pytest

from skippipe_plugin.schedule import Action, CostModel, Event, Mark, Timeline, Transfer, full_schedule, simulate


def timeline() -> Timeline:
    return simulate(full_schedule("1f1b", num_stages=3, num_microbatches=4), CostModel.uniform(3, 4, latency_s=0.5))


def test_shares():
    events = (Event(0, Action.parse("0F0"), 1.0, 2.0), Event(1, Action.parse("1F0"), 2.0, 5.0))
    got = Timeline(events)
    assert got.makespan_s == 4.0
    assert (got.busy_s(1), got.busy_share(1), got.idle_share(0)) == (3.0, 0.75, 0.75)
    assert got.ranks == (0, 1)


def test_an_empty_timeline_has_no_time():
    empty = Timeline(())
    assert (empty.makespan_s, empty.busy_share(0), empty.peak_activations(0)) == (0.0, 0.0, 0)
    assert str(empty).startswith("timeline: 0 s")


def test_touching_activations_do_not_overlap():
    spans = [("1F0", 0, 1), ("1F1", 1, 2), ("1B0", 2, 4), ("1F2", 4, 5), ("1B1", 5, 7), ("1B2", 7, 9)]
    events = tuple(Event(1, Action.parse(text), float(start), float(end)) for text, start, end in spans)
    assert Timeline(events).peak_activations(1) == 2


def test_json_round_trip():
    assert Timeline.from_json(timeline().to_json()) == timeline()


def test_marks_are_kept_and_shown_in_the_trace():
    marked = replace(timeline(), marks=(Mark(2, 0.5, "replica, 0.21 s"),))
    assert Timeline.from_json(marked.to_json()) == marked
    (instant,) = [event for event in marked.chrome_trace()["traceEvents"] if event["ph"] == "i"]
    assert (instant["name"], instant["pid"], instant["ts"]) == ("replica, 0.21 s", 2, 0.5e6)
    older = json.loads(timeline().to_json())
    del older["marks"]
    assert Timeline.from_json(json.dumps(older)) == timeline()


def test_a_trace_reads_back_without_its_messages():
    again = Timeline.from_chrome_trace(json.loads(json.dumps(timeline().chrome_trace())))
    assert again.label == timeline().label
    assert [(e.rank, e.action) for e in again.events] == [(e.rank, e.action) for e in timeline().events]
    assert [e.start_s for e in again.events] == pytest.approx([e.start_s for e in timeline().events])
    assert again.transfers == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "not a skippipe-timeline of version 1"),
        ('{"format": "skippipe-timeline", "version": 1}', "another form: KeyError"),
        ('{"format": "skippipe-timeline", "version": 1, "events": [[0, "0F"]]}', "another form"),
    ],
)
def test_unreadable_json_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        Timeline.from_json(text)


def test_every_message_of_the_trace_joins_two_slices():
    trace = timeline().chrome_trace()
    json.dumps(trace, allow_nan=False)
    slices = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert len(slices) == len(timeline().events)
    starts = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "s"}
    ends = {event["id"]: event for event in trace["traceEvents"] if event["ph"] == "f"}
    assert starts.keys() == ends.keys() == set(range(len(timeline().transfers)))
    for number, transfer in enumerate(timeline().transfers):
        for arrow, rank in ((starts[number], transfer.source), (ends[number], transfer.destination)):
            assert arrow["pid"] == rank
            assert any(s["pid"] == rank and s["ts"] <= arrow["ts"] <= s["ts"] + s["dur"] for s in slices)


def test_the_arrow_ends_at_the_action_that_takes_the_message():
    """The weight half of an earlier stage may run in between; it took nothing."""
    events = (("0L0", 0, 0.0, 1.0), ("3W0", 1, 2.0, 3.0), ("2I0", 1, 4.0, 5.0))
    got = Timeline(
        tuple(Event(rank, Action.parse(text), start, end) for text, rank, start, end in events),
        (Transfer(0, 1, Action.parse("0L0"), 1.0, 1.5),),
    )
    assert [event["ts"] for event in got.chrome_trace()["traceEvents"] if event["ph"] == "f"] == [4.5e6]


def test_table_and_gantt():
    lines = (
        simulate(full_schedule("gpipe", num_stages=2, num_microbatches=2), CostModel.uniform(2, 3)).table().split("\n")
    )
    assert lines[0] == "gpipe: 9 s"
    assert lines[3].split() == ["1", "4", "6", "66.7%", "33.3%", "2"]
    gantt = simulate(full_schedule("gpipe", num_stages=2, num_microbatches=2), CostModel.uniform(2, 3)).gantt(width=9)
    assert gantt.split("\n")[1:] == ["  1 FF...BBBB", "  2 .FFBBBB.."]
