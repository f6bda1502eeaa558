"""From files to the timelines that a picture shows: plans and schedules are simulated, measurements read.

Each file says itself what it is, so their order does not matter. Drawing is in `schedule.picture`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path as FilePath
from typing import Literal

from skippipe_plugin.schedule.casefile import CaseError, load_schedule, read_case, read_json, read_plan
from skippipe_plugin.schedule.cost import CostModel, Links
from skippipe_plugin.schedule.fit import find_transfers, fit_costs
from skippipe_plugin.schedule.ir import Schedule
from skippipe_plugin.schedule.jsontext import parse
from skippipe_plugin.schedule.problem import reordered
from skippipe_plugin.schedule.simulate import simulate
from skippipe_plugin.schedule.timeline import Timeline
from skippipe_plugin.schedule.validate import validate

__all__ = ["panels_of"]

Kind = Literal["case", "plan", "schedule", "cost model", "timeline"]


def panels_of(files: Sequence[str | PathLike[str]], *, links: Links = "free") -> list[Timeline]:
    """Return the timelines of some files, measured before predicted.

    Understood are: a plan with its case; a plan or schedule with a cost model, or without one, all costs alike then;
    measured timelines (`Timeline.to_json`, or the Chrome traces of `PipelineMonitor`); and one of these with the
    schedule that ran, which is predicted from the measured median costs unless a cost model is given.

    Raises:
        ValueError: A file is none of these, or they do not belong together.
        OSError: A file cannot be read.
    """
    found = _sorted(files)
    measured = [_measured(file) for file in found["timeline"]]
    for kind in ("case", "plan", "schedule", "cost model"):
        if len(found[kind]) > 1:
            raise ValueError(f"{' and '.join(map(str, found[kind]))} are both a {kind}; give one")
    schedules = found["plan"] + found["schedule"]
    if len(schedules) > 1:
        raise ValueError(f"{schedules[0]} and {schedules[1]} are both a schedule; give one")
    if not schedules:
        return _only_measured(measured, found)
    if len(measured) > 1:
        raise ValueError("one measured step can stand above a predicted one; give one timeline with a schedule")
    if found["case"] and (found["cost model"] or not found["plan"]):
        other = [*found["cost model"], *found["schedule"]][0]
        raise ValueError(f"a case belongs to a plan and has costs of its own; leave out {found['case'][0]} or {other}")
    if found["case"]:
        return [*measured, _of_case(found["case"][0], schedules[0], links)]
    return _above_predicted(measured, load_schedule(schedules[0]), found["cost model"], links)


def _sorted(files: Sequence[str | PathLike[str]]) -> dict[Kind, list[FilePath]]:
    found: dict[Kind, list[FilePath]] = {"case": [], "plan": [], "schedule": [], "cost model": [], "timeline": []}
    for file in map(FilePath, files):
        found[_kind(file)].append(file)
    return found


def _kind(file: FilePath) -> Kind:
    if file.read_text(encoding="utf-8").lstrip().startswith("schedule "):
        return "schedule"
    data = read_json(file)
    formats: dict[object, Kind] = {
        "skippipe-schedule": "schedule",
        "skippipe-cost": "cost model",
        "skippipe-timeline": "timeline",
        "skippipe-plan": "plan",
    }
    if isinstance(data.get("format"), str) and data["format"] in formats:
        return formats[data["format"]]
    keys: dict[str, Kind] = {"traceEvents": "timeline", "paths": "plan", "cost_s": "case"}
    for key, kind in keys.items():
        if key in data:
            return kind
    raise CaseError(f"{file} is no case, plan, schedule, cost model, timeline or trace")


def _measured(file: FilePath) -> Timeline:
    text = file.read_text(encoding="utf-8")
    data = parse(text)
    timeline = Timeline.from_chrome_trace(data) if "traceEvents" in data else Timeline.from_json(text)
    return replace(timeline, label=timeline.label or file.stem)


def _only_measured(measured: list[Timeline], found: Mapping[Kind, list[FilePath]]) -> list[Timeline]:
    if not measured:
        given = ", ".join(str(file) for files in found.values() for file in files)
        raise ValueError(f"nothing to draw in {given}; add a plan, a schedule or a measured timeline")
    if left := [*found["case"], *found["cost model"]]:
        raise ValueError(f"{left[0]} is of no use without a plan or a schedule; add it")
    return measured


def _of_case(case: FilePath, plan: FilePath, links: Links) -> Timeline:
    problem = read_case(case, links=links)
    schedule, nodes = read_plan(plan, problem)
    validate(schedule)
    return replace(simulate(schedule, reordered(problem.cost, nodes), links=links), label=f"simulated: {plan.stem}")


def _above_predicted(
    measured: list[Timeline], schedule: Schedule, costs: Sequence[FilePath], links: Links
) -> list[Timeline]:
    validate(schedule)
    if costs:
        cost, label = CostModel.load(costs[0]), f"simulated: {schedule.name or 'schedule'} on {costs[0].stem}"
    elif measured:
        _check_ran(measured[0], schedule)
        cost, label = fit_costs(measured[0], schedule), "predicted from the measured median costs"
    else:
        cost = CostModel.uniform(schedule.num_stages, schedule.num_ranks)
        label = f"simulated: {schedule.name or 'schedule'}, all costs alike"
    if measured:
        measured = [replace(measured[0], transfers=find_transfers(schedule, measured[0].events))]
    return [*measured, replace(simulate(schedule, cost, links=links), label=label)]


def _check_ran(measured: Timeline, schedule: Schedule) -> None:
    ranks = set(measured.ranks)
    ran = {(event.rank, event.action) for event in measured.events}
    wanted = {(rank, action) for rank, order in enumerate(schedule.orders) if rank in ranks for action in order}
    if other := sorted(ran ^ wanted, key=str):
        rank, action = other[0]
        raise ValueError(
            f"the measured step did not run this schedule: {action} on rank {rank} is in one of them only; give the "
            "schedule that ran, or a cost model too"
        )
