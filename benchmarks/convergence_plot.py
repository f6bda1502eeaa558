"""The curves of `convergence.py` as a picture."""

from collections.abc import Mapping, Sequence
from os import PathLike

LOOKS = {
    "exact": ("#000000", "-", "o"),
    "exact, time of skip 0.25": ("#777777", (0, (1, 1)), "o"),
    "exact, time of skip 0.33": ("#777777", "--", "s"),
    "skip 0.25": ("#0d47a1", "-", "^"),
    "skip 0.33": ("#c2185b", "-", "D"),
    "skip 0.33, no swaps": ("#2e7d32", "-", "v"),
    "skip 0.33, scale 'visit'": ("#e0862a", "--", "P"),
    "skip 0.33, exact last 1/4": ("#7b1fa2", (0, (4, 1, 1, 1)), "*"),
}
PANELS = (
    ("tokens", 1e3, "thousand tokens"),
    ("simulated_s", 60, "simulated minutes, 13 nodes in five cities"),
    ("measured_s", 1, "measured seconds, 13 emulated devices on one host"),
)


def draw(curves: Mapping[str, Sequence[Mapping[str, float]]], path: str | PathLike[str]) -> None:
    """Draw the loss against tokens, simulated time and measured time, without the steep beginning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.8), layout="constrained")
    axes = figure.subplots(1, len(PANELS), sharey=True)
    for panel, (key, unit, label) in zip(axes, PANELS, strict=True):
        for name, points in curves.items():
            color, dashes, marker = LOOKS[name]
            xs, ys = [point[key] / unit for point in points], [point["loss"] for point in points]
            panel.plot(xs, ys, color=color, linestyle=dashes, linewidth=1.3, label=name)
            panel.plot(xs[-1:], ys[-1:], color=color, marker=marker, markersize=7, markeredgecolor="white")
        panel.set_xlabel(label)
        panel.grid(color="#e4e4e4")
        panel.set_axisbelow(True)
    lowest = min(points[-1]["loss"] for points in curves.values())
    axes[0].set_ylim(lowest - 0.05, max(points[1]["loss"] for points in curves.values()) + 0.05)
    axes[0].set_ylabel("validation loss (nats per byte), every block in place")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=90)
