"""What a run says about itself when it starts: who holds what, how it is stepped, how long a step should take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..driver.layout import Layout
from ..driver.pipeline import TRAINING
from ..schedule import CostModel, Schedule, simulate
from ..schedule.timeline import utilisation
from .settings import PipelineSettings
from .skipping import SkipRatio, skips

if TYPE_CHECKING:
    from .spread import SpreadModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A rank of the pipeline, as people know it."""

    where: str
    """What it is, and on which host."""
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPanel:
    """One text for the terminal.

    >>> blocks = tuple(nn.Linear(9, 10) for _ in range(4))
    >>> layout = Layout(1, (range(3), range(3, 4)), ((0,), (1,), (2,)))
    >>> print(StartPanel(layout=layout, stack="layers: 4 x Linear", blocks=blocks, schedule="1f1b, 8 microbatches",
    ...                  rest_parameters=1500, seats=[Seat(where="driver")] + 2 * [Seat(where="worker")]))
    SkipPipe: 2 stages of layers: 4 x Linear; 1f1b, 8 microbatches
      rank  where   device  stage  blocks        parameters
         0  driver  cpu     -      all the rest       1.5 K
         1  worker  cpu     1      0 to 2               300
         2  worker  cpu     2      3                    100
    Step time and bubble: unknown
    """

    layout: Layout
    stack: str
    """What the block stack is, in words."""
    blocks: Sequence[nn.Module]
    """The block stack."""
    schedule: str
    """What steps run, in words."""
    rest_parameters: int
    """How many parameters the driver has beside the blocks."""
    seats: Sequence[Seat]
    """By rank."""
    prediction: str = "unknown"
    others: Sequence[str] = ()
    """Other stacks of the model."""

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("rank", "where", "device", "stage", "blocks", "parameters")]
        rows += [row for rank in range(self.layout.size) for row in self._rows(rank)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = [_line(row, widths) for row in rows]
        others = f"On the driver: {', '.join(self.others)} (blocks=[...] spreads several stacks)"
        lines = [self._title(), *table, f"Step time and bubble: {self.prediction}"]
        return "\n".join([*lines, others] if self.others else lines)

    def _title(self) -> str:
        drivers = f", {self.layout.num_drivers} drivers" if self.layout.num_drivers > 1 else ""
        return f"SkipPipe: {len(self.layout.stage_blocks)} stages of {self.stack}; {self.schedule}{drivers}"

    def _rows(self, rank: int) -> list[tuple[str, ...]]:
        seat = self.seats[rank]
        own = [self._row(rank, seat, stage) for stage in self.layout.stages_of(rank)]
        if rank in self.layout.drivers:
            own.insert(0, (str(rank), seat.where, seat.device, "-", "all the rest", shorten(self.rest_parameters)))
        return own

    def _row(self, rank: int, seat: Seat, stage: int) -> tuple[str, ...]:
        held = self.layout.blocks(stage)
        count = num_parameters(nn.ModuleList(self.blocks[block] for block in held))
        span = str(held.start) if len(held) == 1 else f"{held.start} to {held.stop - 1}"
        return str(rank), seat.where, seat.device, str(stage), span, shorten(count)


def start_panel(spread: SpreadModel, model: nn.Module, blocks: Sequence[nn.Module], stack: str) -> StartPanel:
    """Describe a model that has just been spread, and whose block stack was ``stack``, in words."""
    settings, pipeline = spread.settings, spread.pipeline
    schedule = pipeline.schedules[TRAINING]
    name = settings.schedule if isinstance(settings.schedule, str) else "a schedule of your own"
    name = "1f1b" if name == "auto" else name
    where = ""
    if settings.microbatches == "stack":  # all forwards come before the loss
        name, where = "gpipe", " cut where the stack begins"
    return StartPanel(
        layout=pipeline.layout,
        stack=stack,
        blocks=blocks,
        schedule=f"{name}, {schedule.num_microbatches} microbatches{where}{_skipping(settings.skip_ratio)}",
        rest_parameters=num_parameters(model) - num_parameters(nn.ModuleList(blocks)),
        seats=[_seat(spread, rank) for rank in range(pipeline.layout.size)],
        others=pipeline.proxies.other_stacks,
        prediction=_prediction(settings, schedule, spread.planner.cost if spread.planner is not None else None),
    )


def _seat(spread: SpreadModel, rank: int) -> Seat:
    device = spread.device_of(rank)
    if rank not in spread.links:
        return Seat(where="driver", device=device)
    link = spread.links[rank]
    return Seat(where=f"worker at {link.host}" if link.pid is None else f"worker, pid {link.pid}", device=device)


def _skipping(ratio: SkipRatio) -> str:
    if not skips(ratio):
        return ""
    return f", {ratio:.0%} of the stages skipped" if isinstance(ratio, float) else ", skipping stages by step"


def _prediction(settings: PipelineSettings, schedule: Schedule, cost: CostModel | None) -> str:
    if cost is not None and settings.paths.costs != "uniform":
        return predicted(schedule, cost, settings.paths.costs)
    if cost is not None:
        return "not predicted, since uniform costs have no unit"
    if skips(settings.skip_ratio):
        return "not predicted yet, since costs are measured in the second training step"
    return "not predicted, since no costs are known (PathConfig(costs=FILE) takes saved ones)"


def predicted(schedule: Schedule, cost: CostModel, source: str) -> str:
    """Say what a step takes that visits every stage, and which share of it the workers wait on average."""
    timeline = simulate(schedule, cost)
    return (
        f"{timeline.makespan_s:.3g} s and {1 - utilisation(timeline, schedule):.0%} with every stage visited, "
        f"predicted from {source}"
    )


def num_parameters(module: nn.Module) -> int:
    """Count the elements of a module's parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def shorten(count: int) -> str:
    """Write a number of parameters as a model summary does.

    >>> [shorten(count) for count in (999, 1000, 125_440, 7_300_000, 2_000_000_000)]
    ['999', '1.0 K', '125 K', '7.3 M', '2.0 B']
    """
    for unit, size in (("B", 1_000_000_000), ("M", 1_000_000), ("K", 1_000)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count >= 100 * size else f"{count / size:.1f} {unit}"
    return str(count)


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
    cells[0], cells[-1] = row[0].rjust(widths[0]), row[-1].rjust(widths[-1])
    return "  " + "  ".join(cells)
