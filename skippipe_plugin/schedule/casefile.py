"""Planning cases and plans as JSON files.

A case describes nodes, partitions, costs and limits of a SkipPipe experiment; `read_case` turns it into a
`PlanProblem`. A plan file holds the path of each microbatch and the order of tasks on each node, in the case's node
numbers (``paths``, ``orders``, ``partitions``), and beside them the same as a schedule in rank numbers (``schedule``,
with ``nodes`` from rank to node), which `load_schedule` and `Schedule.load` read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path as FilePath
from typing import Any, Literal, TypeVar

from skippipe_plugin.schedule.cost import ComputeCost, CostModel, Links, NetworkCost
from skippipe_plugin.schedule.ir import Action, Op, Path, Schedule, ScheduleError, Visit
from skippipe_plugin.schedule.jsontext import parse
from skippipe_plugin.schedule.partial import Plan
from skippipe_plugin.schedule.problem import PlanProblem
from skippipe_plugin.schedule.routes import PathConstraints

_T = TypeVar("_T")
_FORMAT = "skippipe-plan"
_VERSION = 1


class CaseError(ValueError):
    """A case or plan file that cannot be used; the message names the file's entry."""


def read_case(
    path: str | PathLike[str],
    *,
    placement_mode: Literal["given", "plan"] = "given",
    links: Links = "free",
) -> PlanProblem:
    """Read a case.

    Required: ``partitions`` (nodes per stage, the drivers first), ``cost_s[a][b]`` (seconds of a message; null for a
    link that does not exist), ``wm_s`` (seconds of a forward, by node), ``loss_factor`` and ``backward_factor``
    (relative to the forward), ``path_length`` (driver included), ``microbatches_per_home``. Optional: ``nodes`` (their
    number), ``memory`` (one cap or one per node), ``gap_s``, ``max_jump_from_frontier``, and ``swap_limits`` with
    ``count``, ``furthest``, ``total_distance``. Other keys are ignored.

    Raises:
        CaseError: An entry is missing, negative, not a number or out of range; or links are to be queued.
        ValueError: The case is complete, but no plan can exist.
        OSError: The file cannot be read.
    """
    if links == "queued":
        raise CaseError("a case says what a message costs, not which part of it is bandwidth; use links free or shared")
    data = read_json(path)
    partitions = tuple(
        tuple(_whole(f"partitions[{i}]", node) for node in _list(f"partitions[{i}]", nodes))
        for i, nodes in enumerate(_list("partitions", _get(data, "partitions")))
    )
    forward_s = tuple(_seconds(f"wm_s[{i}]", value) for i, value in enumerate(_list("wm_s", _get(data, "wm_s"))))
    num_nodes = _whole("nodes", data.get("nodes", len(forward_s)))
    if len(forward_s) != num_nodes:
        raise CaseError(f"wm_s has {len(forward_s)} entries for {num_nodes} nodes")
    _check_partitions(partitions, num_nodes)
    latency_s, unreachable = _links(_list("cost_s", _get(data, "cost_s")), num_nodes)
    compute = ComputeCost(
        forward_s=(1.0,) * len(partitions),
        backward_s=(_seconds("backward_factor", _get(data, "backward_factor")),) * len(partitions),
        loss_s=_seconds("loss_factor", _get(data, "loss_factor")),
        rank_factor=forward_s,
        gap_s=_seconds("gap_s", data.get("gap_s", 0.0)),
    )
    network = NetworkCost(latency_s, ((math.inf,) * num_nodes,) * num_nodes)
    return PlanProblem(
        placement=partitions,
        microbatches_per_driver=_whole("microbatches_per_home", _get(data, "microbatches_per_home")),
        cost=CostModel(compute, network, 0),
        constraints=_constraints(data),
        memory_caps=_caps(data.get("memory"), num_nodes),
        placement_mode=placement_mode,
        links=links,
        unreachable=unreachable,
    )


def plan_data(plan: Plan) -> dict[str, object]:
    """Return what a plan file holds."""
    schedule, nodes = plan.schedule, plan.nodes
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "paths": {str(m): [nodes[rank] for rank in path.hops()[:-1]] for m, path in enumerate(schedule.paths)},
        "orders": {
            str(nodes[rank]): [f"{action.microbatch}{action.op}" for action in order]
            for rank, order in enumerate(schedule.orders)
            if order
        },
        "partitions": [[nodes[rank] for rank in ranks] for ranks in schedule.placement],
        "makespan_s": plan.makespan_s,
        "lower_bound_s": plan.lower_bound_s,
        "idle_share": {str(node): round(share, 6) for node, share in zip(nodes, plan.idle_share, strict=True)},
        "nodes": nodes,
        "schedule": json.loads(schedule.to_json()),
    }


def save_plan(plan: Plan, path: str | PathLike[str]) -> None:
    """Write a plan file."""
    FilePath(path).write_text(json.dumps(plan_data(plan)) + "\n", encoding="utf-8")


def read_plan(path: str | PathLike[str], problem: PlanProblem) -> tuple[Schedule, tuple[int, ...]]:
    """Read the paths, orders and partitions of a plan file as a schedule, and the problem's node of each rank.

    The plan may be any tool's: only ``paths`` and ``orders`` are needed, ``partitions`` where they differ from the
    problem's.

    Raises:
        CaseError: An entry is missing or wrong, the plan is for other nodes than the problem's, or of another version.
    """
    data = read_json(path)
    _check_version(data, path)
    partitions = problem.placement
    if "partitions" in data:
        rows = _list("partitions", data["partitions"])
        partitions = tuple(tuple(_whole("partitions", node) for node in _list("partitions", row)) for row in rows)
        if sorted(map(len, partitions)) != sorted(map(len, problem.placement)) or len(partitions) < 2:
            raise CaseError(
                f"the plan's partitions have sizes {[*map(len, partitions)]}, the case's "
                f"{[*map(len, problem.placement)]}; the plan is for another case"
            )
    num_nodes = problem.cost.num_ranks
    stage_of = {node: stage for stage, nodes in enumerate(partitions) for node in nodes}
    nodes = (*partitions[0], *(node for node in range(num_nodes) if node not in partitions[0]))
    rank = {node: at for at, node in enumerate(nodes)}
    paths = tuple(_path(m, row, stage_of, rank) for m, row in _numbered("paths", data))
    orders: list[tuple[Action, ...]] = [()] * num_nodes
    for node, order in _numbered("orders", data, consecutive=False):
        if node not in rank:
            raise CaseError(f"orders names node {node}, but the case has {num_nodes} nodes; the plan is for another")
        orders[rank[node]] = tuple(_action(task, stage_of.get(node, 0)) for task in order)
    placement = tuple(tuple(rank[_known(node, rank)] for node in row) for row in partitions)
    return Schedule(placement, paths, tuple(orders), name="plan"), nodes


def load_schedule(path: str | PathLike[str]) -> Schedule:
    """Read a schedule from a schedule file or from a plan file.

    Raises:
        ScheduleError: The file holds neither.
    """
    text = FilePath(path).read_text(encoding="utf-8")
    if text.lstrip().startswith("schedule "):
        return Schedule.parse(text)
    data = read_json(path)
    _check_version(data, path)
    if data.get("format") in (None, _FORMAT) and "paths" in data and "schedule" not in data:
        raise ScheduleError(f"{path} is a plan without its 'schedule'; simulate it with its case instead")
    return Schedule.from_json(text)


def read_json(path: str | PathLike[str]) -> dict[str, Any]:  # Any: JSON
    """Read a file that holds a JSON object; raises CaseError where it holds anything else."""
    try:
        data = parse(FilePath(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise CaseError(f"{path} is not JSON: {error}") from error
    if not isinstance(data, dict):
        raise CaseError(f"{path} does not hold a JSON object")
    return data


def _check_version(data: Mapping[str, Any], path: str | PathLike[str]) -> None:
    """Refuse the plan of another version; those of other tools, and of before there were versions, name none."""
    inner = data.get("schedule")
    if isinstance(inner, dict):
        Schedule.check_version(inner)
    found = data.get("format"), data.get("version")
    if "paths" in data and isinstance(data["paths"], dict) and found not in ((None, None), (_FORMAT, _VERSION)):
        raise CaseError(f"{path} is not a {_FORMAT} of version {_VERSION}: {found[0]!r} {found[1]!r}")


def _check_partitions(partitions: Sequence[Sequence[int]], num_nodes: int) -> None:
    if len(partitions) < 2:
        raise CaseError(f"partitions has {len(partitions)} entries; give the drivers and at least one stage")
    for stage, nodes in enumerate(partitions):
        for node in nodes:
            if node >= num_nodes:
                raise CaseError(f"partitions[{stage}] names node {node}, but there are {num_nodes} nodes, from 0 on")


def _links(rows: Sequence[object], num_nodes: int) -> tuple[tuple[tuple[float, ...], ...], frozenset[tuple[int, int]]]:
    if len(rows) != num_nodes:
        raise CaseError(f"cost_s has {len(rows)} rows for {num_nodes} nodes")
    missing: set[tuple[int, int]] = set()
    matrix = []
    for a, row in enumerate(rows):
        values = _list(f"cost_s[{a}]", row)
        if len(values) != num_nodes:
            raise CaseError(f"cost_s[{a}] has {len(values)} entries for {num_nodes} nodes")
        missing |= {(a, b) for b, value in enumerate(values) if value is None or value == math.inf}
        matrix.append(
            tuple(0.0 if (a, b) in missing else _seconds(f"cost_s[{a}][{b}]", v) for b, v in enumerate(values))
        )
    return tuple(matrix), frozenset(link for link in missing if link[0] != link[1])


def _constraints(data: Mapping[str, Any]) -> PathConstraints:  # Any: JSON
    limits = data.get("swap_limits", {})
    if not isinstance(limits, dict):
        raise CaseError(f"swap_limits is {limits!r}; it holds count, furthest and total_distance")
    count, back, total = (
        _whole(f"swap_limits.{name}", limits[name]) if name in limits else default
        for name, default in (("count", None), ("furthest", 1), ("total_distance", None))
    )
    return PathConstraints(
        path_length=_whole("path_length", _get(data, "path_length")),
        max_jump=_whole("max_jump_from_frontier", data.get("max_jump_from_frontier", 4)),
        max_swaps=count if back else 0,
        max_back=back or 0,
        max_total_back=total,
    )


def _caps(memory: object, num_nodes: int) -> tuple[int, ...] | None:
    if memory is None:
        return None
    if not isinstance(memory, list):
        return (_whole("memory", memory),) * num_nodes
    return tuple(_whole(f"memory[{i}]", cap) for i, cap in enumerate(memory))


def _path(microbatch: int, row: Sequence[object], stage_of: Mapping[int, int], rank: Mapping[int, int]) -> Path:
    hosts = [_known(_whole(f"paths[{microbatch}]", node), rank) for node in row]
    for node in hosts:
        if node not in stage_of:
            raise CaseError(f"paths[{microbatch}] visits node {node}, which holds no stage")
    if not hosts or stage_of[hosts[0]] != 0 or 0 in map(stage_of.__getitem__, hosts[1:]):
        raise CaseError(f"paths[{microbatch}] is {row}; it starts at a driver and visits no other")
    return Path(rank[hosts[0]], tuple(Visit(stage_of[node], rank[node]) for node in hosts[1:]))


def _known(node: int, rank: Mapping[int, int]) -> int:
    if node not in rank:
        raise CaseError(f"the plan names node {node}, but the case has {len(rank)} nodes; the plan is for another case")
    return node


def _action(task: object, stage: int) -> Action:
    if not isinstance(task, str) or task[-1:] not in ("F", "L", "B") or not task[:-1].isdecimal():
        raise CaseError(f"{task!r} is not a task; write the microbatch and F, L or B, such as '3F'")
    return Action(stage, Op(task[-1]), int(task[:-1]))


def _numbered(
    key: str, data: Mapping[str, Any], *, consecutive: bool = True
) -> list[tuple[int, list[object]]]:  # Any: JSON
    entries = _get(data, key)
    if not isinstance(entries, dict) or not all(name.isdecimal() for name in entries):
        raise CaseError(f"{key} must map numbers to lists")
    rows = sorted((int(name), _list(f"{key}[{name}]", row)) for name, row in entries.items())
    if consecutive and [number for number, _ in rows] != list(range(len(rows))):
        raise CaseError(f"{key} must number its entries 0, 1, ...")
    return rows


def _get(data: Mapping[str, _T], key: str) -> _T:
    if data.get(key) is None:
        raise CaseError(f"the file lacks {key!r}; add it")
    return data[key]


def _list(name: str, value: object) -> list[object]:
    if not isinstance(value, list):
        raise CaseError(f"{name} is {value!r}; it must be a list")
    return value


def _whole(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise CaseError(f"{name} is {value!r}; it must be a whole number from 0 on")
    return value


def _seconds(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value >= 0):
        raise CaseError(f"{name} is {value!r}; it must be a finite number from 0 on")
    return float(value)
