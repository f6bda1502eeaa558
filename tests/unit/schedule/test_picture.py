"""Pictures are files that hold what they should, at any size of the pipeline, and say what is missing."""

import re
import struct
import sys
from pathlib import Path

import pytest

from skippipe_plugin.schedule import (
    Action,
    CostModel,
    Event,
    Schedule,
    Timeline,
    draw,
    full_schedule,
    list_schedule,
    simulate,
)
from skippipe_plugin.schedule import Path as Way

pytest.importorskip("matplotlib")


def timeline(num_stages: int = 3, num_microbatches: int = 4, latency_s: float = 0.2) -> Timeline:
    cost = CostModel.uniform(num_stages, num_stages + 1, loss_s=0.5, driver_s=0.1, latency_s=latency_s)
    return simulate(full_schedule("1f1b", num_stages=num_stages, num_microbatches=num_microbatches), cost)


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def words(path: Path) -> list[str]:
    return [
        re.sub(r"<[^>]*>", "", text).strip() for text in re.findall(r"<text[^>]*>.*?</text>", path.read_text(), re.S)
    ]


def test_a_png_has_the_size_that_was_asked_for(tmp_path: Path) -> None:
    draw(timeline(), tmp_path / "one.png", width_in=10, dpi=50)
    draw([timeline(), timeline()], tmp_path / "two.png", width_in=10, dpi=50)
    one, two = png_size(tmp_path / "one.png"), png_size(tmp_path / "two.png")
    assert one[0] == two[0] == 500
    assert one[1] < two[1] < 2 * one[1]


def test_an_svg_names_every_rank_and_every_kind_of_thing(tmp_path: Path) -> None:
    draw([timeline(), timeline(latency_s=0.0)], tmp_path / "a.svg", title="A title")
    found = words(tmp_path / "a.svg")
    for rank in ("driver 0", "worker 1: stage 1", "worker 2: stage 2", "worker 3: stage 3"):
        assert found.count(rank) == 2
    assert {"A title", "waiting", "B  backward", "L  head and loss", "way of microbatch 0"} <= set(found)
    assert any("on its way" in text for text in found)
    assert any(re.fullmatch(r"1f1b: +makespan [0-9.]+ s, +workers idle [0-9]+% of it", text) for text in found)
    assert {"F0", "F3", "B0", "B3"} <= set(found)


def test_equal_timelines_make_equal_pictures(tmp_path: Path) -> None:
    draw(timeline(), tmp_path / "a.svg")
    draw(timeline(), tmp_path / "b.svg")
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_large_pipeline_leaves_out_what_does_not_fit(tmp_path: Path) -> None:
    draw(timeline(19, 64), tmp_path / "large.svg")
    found = set(words(tmp_path / "large.svg"))
    assert "worker 19: stage 19" in found
    assert "F0" not in found


def test_halves_and_several_stages_on_a_rank(tmp_path: Path) -> None:
    orders = ("0F0 0L0 0B0", "1F0 2F0 2I0 2W0 1I0 1W0")
    schedule = Schedule(
        ((0,), (1,), (1,)),
        (Way.parse("0: 1@1 2@1"),),
        tuple(tuple(map(Action.parse, order.split())) for order in orders),
    )
    draw(simulate(schedule, CostModel.uniform(2, 2)), tmp_path / "a.svg")
    found = words(tmp_path / "a.svg")
    assert {"worker 1: stages 1, 2", "I  backward, input half", "W  backward, weight half", "W0"} <= set(found)
    assert "B  backward" in found  # the driver's


def test_the_microbatches_that_are_traced(tmp_path: Path) -> None:
    paths = [Way.parse(text) for text in ("0: 1@1 2@2", "0: 1@1 2@2", "0: 2@2 1@1")]
    partial = simulate(list_schedule([[0], [1], [2]], paths), CostModel.uniform(2, 3))

    def traced(**options: list[int]) -> set[str]:
        draw(partial, tmp_path / "a.svg", trace=options.get("trace"))
        return {text for text in words(tmp_path / "a.svg") if text.startswith("way of")}

    assert traced() == {"way of microbatch 0", "way of microbatch 2"}
    assert traced(trace=[1]) == {"way of microbatch 1"}
    assert traced(trace=[]) == set()
    with pytest.raises(ValueError, match="microbatch 7 cannot be traced; the timelines hold 0 to 2"):
        traced(trace=[0, 7])


def test_measured_timelines_may_lack_ranks_and_transfers(tmp_path: Path) -> None:
    whole = timeline()
    measured = Timeline(tuple(event for event in whole.events if event.rank != 2), (), "measured")
    draw([measured, whole], tmp_path / "a.svg")
    assert words(tmp_path / "a.svg").count("worker 2: stage 2") == 2


def test_tiny_and_long_steps_have_readable_units(tmp_path: Path) -> None:
    for seconds, unit in ((3e-5, "µs"), (0.5, "ms"), (300.0, "s")):
        draw(Timeline((Event(0, Action.parse("0F0"), 1.0, 1.0 + seconds),)), tmp_path / "a.svg")
        assert f"time in the step ({unit})" in words(tmp_path / "a.svg")


@pytest.mark.parametrize("empty", [Timeline(()), []])
def test_nothing_to_draw(empty: Timeline | list[Timeline], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to draw"):
        draw(empty, tmp_path / "a.png")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "skippipe-plugin\[plot\]"'):
        draw(timeline(), tmp_path / "a.png")
