"""Draw what runs where: the picture of the concepts page.

python docs/draw_pipeline.py                   # writes docs/pipeline.svg
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

INK, PAPER, QUIET = "#22303c", "#f4f6f8", "#6b7a88"
WORKERS = ((44, 20.5), (68, 20.5), (44, 5), (68, 5))
"""The lower left corners of the workers' boxes, by stage from 1."""
WIDTH, HEIGHT = 17, 11
BLUE, RED = "#0072b2", "#d55e00"
"""Two microbatches, each of which leaves out one stage of four."""
DRIVER = """your script, the Trainer, data,
callbacks, loggers, checkpoints


embedding, head and loss


your training_step: suspended
at the blocks, resumed with
their result"""


def box(axes: Axes, left: float, bottom: float, width: float, height: float, title: str, lines: str) -> None:
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom), width, height, boxstyle="round,pad=0,rounding_size=1.2", facecolor=PAPER, edgecolor=INK
        )
    )
    axes.text(left + width / 2, bottom + height - 1.1, title, ha="center", va="top", weight="bold", color=INK, size=10)
    axes.text(
        left + width / 2, bottom + height - 3.9, lines, ha="center", va="top", color=INK, size=8, linespacing=1.45
    )


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, linewidth=1.8, color=color))


def center(stage: int) -> tuple[float, float]:
    left, bottom = WORKERS[stage - 1]
    return left + WIDTH / 2, bottom + HEIGHT / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "pipeline.svg")
    arguments = parser.parse_args()
    figure = Figure(figsize=(9.2, 4.0))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 92), ylim=(0, 40))
    axes.set_axis_off()
    box(axes, 3, 5, 27, 26.5, "driver", DRIVER)
    for stage, (left, bottom) in enumerate(WORKERS, start=1):
        blocks = f"blocks {3 * stage - 3} to {3 * stage - 1}\ntheir gradients and\noptimizer state"
        box(axes, left, bottom, WIDTH, HEIGHT, f"worker {stage}: stage {stage}", blocks)
    (x1, y1), (x2, y2), (x3, y3), (x4, y4) = map(center, range(1, 5))
    half, tall = WIDTH / 2, HEIGHT / 2
    for color, up in ((BLUE, 2.2), (RED, 0.0)):
        arrow(axes, (30, y1 + up), (x1 - half, y1 + up), color)
    arrow(axes, (x1 + half, y1 + 2.2), (x2 - half, y2 + 2.2), BLUE)
    arrow(axes, (x2 + 1, y2 - tall), (x4 + 1, y4 + tall), BLUE)
    arrow(axes, (x1, y1 - tall), (x3, y3 + tall), RED)
    arrow(axes, (x3 + half, y3), (x4 - half, y4), RED)
    for color, x, depth in ((BLUE, x4 + 2, 2.6), (RED, x4 - 2, 3.7)):
        axes.plot([x, x, 18 - (x - x4), 18 - (x - x4)], [5, 5 - depth, 5 - depth, 4], color=color, linewidth=1.8)
        arrow(axes, (18 - (x - x4), 5 - depth), (18 - (x - x4), 5.2), color)
    axes.text(44, 36.4, "microbatch 0: stages 1, 2, 4", color=BLUE, size=9, va="center")
    axes.text(44, 34.2, "microbatch 1: stages 1, 3, 4", color=RED, size=9, va="center")
    axes.text(
        3, 35.3, "hidden states forward; gradients the same way back", color=QUIET, size=9, va="center", style="italic"
    )
    figure.savefig(arguments.output)


if __name__ == "__main__":
    main()
