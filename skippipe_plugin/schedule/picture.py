"""Timelines as a picture: one row per rank, one panel per timeline, all on the same time axis.

The only module here that needs matplotlib, and it is imported only when something is drawn. What an action is can be
told without colour: by lightness, hatching and letter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from os import PathLike
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, Any, Final

from skippipe_plugin.schedule.ir import DRIVER_STAGE, Action, Op
from skippipe_plugin.schedule.timeline import Event, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class _Look:
    """How one kind of action is drawn and what the legend calls it."""

    name: str
    face: str
    text: str = "#1b1b1b"
    hatch: str = ""
    edge: str = "#444444"
    """Of the box and of its hatching."""


_ORANGE: Final = "#b5702a"
# From light to dark: F, W, B, I, L. Hatches that do not hide a number.
_LOOKS: Final[Mapping[Op, _Look]] = {
    Op.F: _Look("F  forward (driver: embedding)", "#b4d4f1"),
    Op.B: _Look("B  backward", "#e8a04c", hatch="////", edge=_ORANGE),
    Op.I: _Look("I  backward, input half", "#d98536", hatch="\\\\\\\\", edge="#6b3609"),
    Op.W: _Look("W  backward, weight half", "#f9e3bd", hatch="....", edge=_ORANGE),
    Op.L: _Look("L  head and loss", "#3d2b56", text="#ffffff"),
}
_EDGE: Final = "#444444"
_IDLE: Final = "#f7f7f7"
_MESSAGE: Final = "#2a9d8f"
_MARK: Final = "#1b1b1b"
_TRACES: Final[Sequence[tuple[str, Any]]] = (
    ("#c2185b", "-"),
    ("#0d47a1", (0, (4, 1.5))),
    ("#2e7d32", (0, (1, 1.2))),
    ("#000000", (0, (6, 1, 1, 1))),
)
"""Colour and dashes of each traced microbatch."""

_BAR: Final = 0.62
"""Height of an action's box; the row is 1 high and holds the messages in what is left."""
_STRIP: Final = 0.16
_NARROW_IN: Final = 0.05
_GLYPH_EM: Final = 0.66
"""Width of a letter as a share of its size."""


def draw(
    timelines: Sequence[Timeline] | Timeline,
    path: str | PathLike[str],
    *,
    title: str = "",
    trace: Sequence[int] | None = None,
    width_in: float | None = None,
    dpi: int = 110,
) -> None:
    """Write a picture of one timeline, or of several one above the other on the same time axis.

    A row per rank: boxes are actions with their microbatch, thin bars below them are messages on their way to that
    rank, what stays pale is waiting; a thick upright line is a mark. The lines follow the traced microbatches from rank
    to rank. Text is left out where it does not fit.

    Args:
        timelines: What to draw; each panel is named by its timeline's label.
        path: The file; its suffix chooses the format (``.png``, ``.svg``, or another that matplotlib writes).
        title: Written above everything.
        trace: The microbatches whose way is drawn; by default the first, and the first that takes another way.
        width_in: Width in inches; by default as wide as the longest row needs.
        dpi: Dots per inch of a PNG.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: There is no event to draw, or a traced microbatch does not occur.
    """
    panels = (timelines,) if isinstance(timelines, Timeline) else tuple(timelines)
    if not any(timeline.events for timeline in panels):
        raise ValueError("there is nothing to draw: no timeline holds an event")
    traced = _traced(panels, trace)
    require_matplotlib()
    import matplotlib as mpl

    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "skippipe",
        "hatch.linewidth": 0.6,
        "font.family": "DejaVu Sans",
        "font.size": 9,
    }
    with mpl.rc_context(style):
        figure = _figure(panels, title, traced, width_in or _width_in(panels))
        metadata = {"Date": None} if FilePath(path).suffix == ".svg" else None
        figure.savefig(path, dpi=dpi, metadata=metadata)


def require_matplotlib() -> None:
    """Raise ImportError, with the way out, when pictures cannot be drawn here."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('pictures need matplotlib: pip install "skippipe-plugin[plot]"') from error


def _traced(panels: Sequence[Timeline], trace: Sequence[int] | None) -> list[int]:
    ways: dict[int, tuple[int, ...]] = {}
    for panel in reversed(panels):
        ways |= {microbatch: _way(panel, microbatch) for microbatch in _microbatches(panel)}
    if trace is None:
        first = min(ways)
        others = (microbatch for microbatch in sorted(ways) if ways[microbatch] != ways[first])
        return [first, *list(others)[:1]]
    if missing := sorted(set(trace) - ways.keys()):
        raise ValueError(f"microbatch {missing[0]} cannot be traced; the timelines hold {min(ways)} to {max(ways)}")
    return list(trace)


def _microbatches(timeline: Timeline) -> set[int]:
    return {event.action.microbatch for event in timeline.events}


def _way(timeline: Timeline, microbatch: int) -> tuple[int, ...]:
    return tuple(event.rank for event in _chain(timeline, microbatch) if event.action.op in (Op.F, Op.L))


def _chain(timeline: Timeline, microbatch: int) -> list[Event]:
    """What a microbatch passes through, in order; W is not on its way."""
    events = [e for e in timeline.events if e.action.microbatch == microbatch and e.action.op is not Op.W]
    return sorted(events, key=lambda event: (event.start_s, event.end_s))


def _width_in(panels: Sequence[Timeline]) -> float:
    """As wide as is needed for numbers in the boxes of the busiest row, within what a page bears."""
    busiest = max(len(panel.of_rank(rank)) for panel in panels for rank in panel.ranks)
    return min(20.0, max(11.0, 4.0 + 0.3 * busiest))


def _figure(panels: Sequence[Timeline], title: str, traced: Sequence[int], width_in: float) -> Figure:
    from matplotlib.figure import Figure

    ranks = sorted({rank for panel in panels for rank in panel.ranks})
    end_s = max(panel.makespan_s for panel in panels) or 1.0
    unit, scale = _unit(end_s)
    row_in = 0.42 if len(ranks) <= 8 else 0.3
    panel_in = 0.5 + row_in * len(ranks)
    top_in, bottom_in = (0.3 if title else 0.0), 0.95
    height_in = top_in + bottom_in + panel_in * len(panels)
    figure = Figure(figsize=(width_in, height_in))
    for index, panel in enumerate(panels):
        bottom = bottom_in + panel_in * (len(panels) - 1 - index)
        left_in, right_in = 1.55, 0.75
        box = (
            left_in / width_in,
            bottom / height_in,
            1 - (left_in + right_in) / width_in,
            row_in * len(ranks) / height_in,
        )
        axes = figure.add_axes(box)
        axes.set_xlim(0, end_s * scale * 1.005)
        inch = (width_in - left_in - right_in) / (end_s * scale)
        _Panel(axes, panel, ranks, scale, inch, row_in).draw(panels, traced, unit)
        last = index == len(panels) - 1
        axes.tick_params(axis="x", labelbottom=last, length=3 if last else 0)
        if last:
            axes.set_xlabel(f"time in the step ({unit})")
    if title:
        figure.text(1.55 / width_in, 1 - 0.18 / height_in, title, fontsize=12, fontweight="bold", va="center")
    _legend(figure, panels, traced)
    return figure


def _unit(seconds: float) -> tuple[str, float]:
    for unit, scale in (("s", 1.0), ("ms", 1e3)):
        if seconds * scale >= 2:
            return unit, scale
    return "µs", 1e6


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


class _Panel:
    """Draws one timeline into its axes."""

    def __init__(
        self, axes: Axes, timeline: Timeline, ranks: Sequence[int], scale: float, inch: float, row_in: float
    ) -> None:
        self._axes = axes
        self._timeline = timeline
        self._ranks = ranks
        self._row = {rank: index for index, rank in enumerate(ranks)}
        self._origin = min((event.start_s for event in timeline.events), default=0.0)
        self._scale = scale
        self._inch = inch
        """Inches per unit of the time axis."""
        self._size = min(8.5, _BAR * row_in * 72 * 0.62)
        """Points of the text in a box."""

    def draw(self, panels: Sequence[Timeline], traced: Sequence[int], unit: str) -> None:
        self._frame(panels, unit)
        self._boxes()
        self._messages()
        self._marks()
        for number, microbatch in enumerate(traced):
            self._trace(microbatch, *_TRACES[number % len(_TRACES)])

    def _x(self, seconds: float) -> float:
        return (seconds - self._origin) * self._scale

    def _frame(self, panels: Sequence[Timeline], unit: str) -> None:
        axes, timeline = self._axes, self._timeline
        end = timeline.makespan_s * self._scale
        axes.set_ylim(len(self._ranks) - 0.5, -0.5)
        axes.set_yticks(range(len(self._ranks)), [_label(panels, rank) for rank in self._ranks])
        axes.tick_params(axis="y", length=0)
        for side in ("top", "right", "left", "bottom"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.barh(range(len(self._ranks)), end, height=_BAR, color=_IDLE, edgecolor="#cccccc", linewidth=0.4, zorder=1)
        axes.axvline(end, color=_EDGE, linewidth=1, linestyle="--", zorder=2)
        axes.set_title(self._heading(unit), loc="left", fontsize=9.5, pad=5)
        axes.text(1.008, 1.0, "idle", transform=axes.transAxes, fontsize=8, color="#555555", va="bottom")
        for rank in timeline.ranks:
            share = f"{timeline.idle_share(rank):.0%}"
            axes.text(1.008, self._row[rank], share, transform=axes.get_yaxis_transform(), fontsize=8, va="center")

    def _heading(self, unit: str) -> str:
        timeline = self._timeline
        workers = sorted(set(timeline.ranks) - _drivers((timeline,)))
        text = f"{timeline.label or 'timeline'}:  makespan {_short(timeline.makespan_s * self._scale)} {unit}"
        if workers:
            idle = sum(map(timeline.idle_share, workers)) / len(workers)
            text += f",  workers idle {idle:.0%} of it"
        return text

    def _boxes(self) -> None:
        for op, look in _LOOKS.items():
            events = [event for event in self._timeline.events if event.action.op is op]
            wide = [event for event in events if self._inches(event) >= _NARROW_IN]
            narrow = [event for event in events if self._inches(event) < _NARROW_IN]
            # In a box that is all edge the hatching and the edge would hide the colour.
            self._bars(wide, zorder=3, facecolor=look.face, edgecolor=look.edge, linewidth=0.6, hatch=look.hatch)
            self._bars(narrow, zorder=3, facecolor=look.face, edgecolor=look.face, linewidth=0.3)
            for event in wide:
                self._write(event, look)

    def _inches(self, event: Event) -> float:
        return event.duration_s * self._scale * self._inch

    def _bars(self, events: Sequence[Event], **style: Any) -> None:  # Any: matplotlib's keywords
        bars = [(self._row[e.rank], _BAR, self._x(e.start_s), self._x(e.end_s)) for e in events]
        self._rectangles([(row - height / 2, row + height / 2, x, end) for row, height, x, end in bars], **style)

    def _rectangles(self, boxes: Sequence[tuple[float, float, float, float]], **style: Any) -> None:
        """Draw (top, bottom, left, right) boxes of one look: one artist for all is many times faster than one each."""
        from matplotlib.patches import PathPatch
        from matplotlib.path import Path

        if boxes:
            corners = [[(x, top), (end, top), (end, low), (x, low), (x, top)] for top, low, x, end in boxes]
            codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(boxes)
            outline = Path([point for box in corners for point in box], codes)
            self._axes.add_artist(PathPatch(outline, **style))

    def _write(self, event: Event, look: _Look) -> None:
        text = self._text(event.action, self._inches(event))
        if text:
            self._axes.text(
                self._x((event.start_s + event.end_s) / 2),
                self._row[event.rank],
                text,
                ha="center",
                va="center",
                fontsize=self._size,
                color=look.text,
                zorder=6,
                bbox={"facecolor": look.face, "edgecolor": "none", "pad": 0.8} if look.hatch else None,
            )

    def _text(self, action: Action, inches: float) -> str:
        """The longest text that fits: letter and microbatch, the microbatch alone, or nothing."""
        number = str(action.microbatch)
        for text in (f"{action.op}{number}", number):
            if (len(text) * _GLYPH_EM + 0.5) * self._size / 72 <= inches:
                return text
        return ""

    def _messages(self) -> None:
        boxes = []
        for transfer in self._timeline.transfers:
            if transfer.destination in self._row and transfer.end_s > transfer.start_s:
                top = self._row[transfer.destination] + _BAR / 2 + 0.03
                boxes.append((top, top + _STRIP, self._x(transfer.start_s), self._x(transfer.end_s)))
        self._rectangles(boxes, zorder=3, facecolor=_MESSAGE, alpha=0.55, linewidth=0)

    def _marks(self) -> None:
        for mark in self._timeline.marks:
            if mark.rank in self._row:
                x, row = self._x(mark.at_s), self._row[mark.rank]
                self._axes.plot([x, x], [row - 0.5, row + 0.5], color=_MARK, linewidth=3, zorder=8, clip_on=False)
                self._axes.annotate(
                    mark.text,
                    (x, row - 0.5),
                    xytext=(4, -1),
                    textcoords="offset points",
                    va="top",
                    fontsize=self._size,
                    color=_MARK,
                    zorder=9,
                )

    def _trace(self, microbatch: int, color: str, dashes: Any) -> None:  # Any: matplotlib's dash pattern
        chain = _chain(self._timeline, microbatch)
        self._bars(chain, zorder=5, facecolor="none", edgecolor=color, linewidth=1.6, linestyle=dashes)
        for before, after in pairwise(chain):
            if before.rank != after.rank:
                xs, ys = (
                    [self._x(before.end_s), self._x(after.start_s)],
                    [self._row[before.rank], self._row[after.rank]],
                )
                self._axes.plot(xs, ys, color=color, linewidth=1.3, linestyle=dashes, zorder=5)
                self._axes.plot(xs[1:], ys[1:], color=color, marker="o", markersize=2.6, zorder=7)


def _drivers(panels: Sequence[Timeline]) -> set[int]:
    return {event.rank for panel in panels for event in panel.events if event.action.stage == DRIVER_STAGE}


def _label(panels: Sequence[Timeline], rank: int) -> str:
    stages = sorted({e.action.stage for panel in panels for e in panel.of_rank(rank)} - {DRIVER_STAGE})
    name = f"driver {rank}" if rank in _drivers(panels) else f"worker {rank}"
    if not stages:
        return name
    return f"{name}: stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"


def _legend(figure: Figure, panels: Sequence[Timeline], traced: Sequence[int]) -> None:
    handles = list(_handles(panels, traced))
    figure.legend(
        handles=handles,
        loc="lower center",
        ncols=min(len(handles), max(3, int(figure.get_figwidth() / 2.4))),
        frameon=False,
        fontsize=8.5,
        handlelength=2.4,
        handleheight=1.2,
        columnspacing=1.6,
    )


def _handles(panels: Sequence[Timeline], traced: Sequence[int]) -> Iterator[Any]:  # Any: matplotlib's artists
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    used = {event.action.op for panel in panels for event in panel.events}
    for op, look in _LOOKS.items():
        if op in used:
            yield Patch(facecolor=look.face, edgecolor=look.edge, hatch=look.hatch, linewidth=0.6, label=look.name)
    yield Patch(facecolor=_IDLE, edgecolor="#cccccc", label="waiting")
    if any(transfer.end_s > transfer.start_s for panel in panels for transfer in panel.transfers):
        yield Line2D(
            [],
            [],
            color=_MESSAGE,
            alpha=0.55,
            linewidth=4,
            solid_capstyle="butt",
            label="message on its way to the rank above",
        )
    if any(panel.marks for panel in panels):
        yield Line2D([], [], color=_MARK, linewidth=3, label="a new worker took over")
    for number, microbatch in enumerate(traced):
        color, dashes = _TRACES[number % len(_TRACES)]
        yield Line2D(
            [],
            [],
            color=color,
            linestyle=dashes,
            linewidth=1.5,
            marker="o",
            markersize=3,
            label=f"way of microbatch {microbatch}",
        )
