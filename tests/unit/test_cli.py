"""The command line: plans of cases can be simulated and read back, and bad input is one clear line."""

import json
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from skippipe_plugin.cli import main
from skippipe_plugin.panels import panels_of
from skippipe_plugin.schedule import (
    ComputeCost,
    CostModel,
    NetworkCost,
    Schedule,
    Timeline,
    full_schedule,
    simulate,
    validate,
)
from skippipe_plugin.schedule.casefile import read_case, read_plan

CASE = {
    "nodes": 8,
    "partitions": [[6, 2], [0, 4], [3, 1], [7, 5]],
    "cost_s": [[0.0 if a == b else 0.2 + 0.3 * abs(a % 3 - b % 3) for b in range(8)] for a in range(8)],
    "wm_s": [0.4, 0.5, 0.4, 0.4, 0.6, 0.4, 0.4, 0.4],
    "loss_factor": 0.25,
    "backward_factor": 1.5,
    "gap_s": 0.1,
    "memory": [2, 2, 3, 3, 2, 2, 3, 2],
    "path_length": 3,
    "microbatches_per_home": 3,
    "max_jump_from_frontier": 3,
    "swap_limits": {"total_distance": 2, "furthest": 1, "count": 2},
}
MISSING = object()


@pytest.fixture
def write(tmp_path):
    def write(name: str, data: object) -> str:
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path)

    return write


@pytest.fixture
def planned(write, tmp_path) -> tuple[str, str]:
    """A case and its plan."""
    case, out = write("case.json", CASE), str(tmp_path / "plan.json")
    assert main(["plan", case, "--out", out, "--budget", "0.2"]) == 0
    return case, out


def changed(**changes: object) -> dict[str, object]:
    return {key: value for key, value in (CASE | changes).items() if value is not MISSING}


def replay_s(case: dict, plan: dict) -> float:
    """When a plan file's last task ends, by relaxing start times until nothing changes."""
    wait: dict[tuple[str, int, int], list[tuple[tuple[str, int, int], float]]] = {}
    length: dict[tuple[str, int, int], float] = {}
    for m, path in plan["paths"].items():
        steps = [("F", int(m), n) for n in path] + [("L", int(m), path[0])] + [("B", int(m), n) for n in path[::-1]]
        for step in steps:
            factor = {"F": 1.0, "L": case["loss_factor"], "B": case["backward_factor"]}[step[0]]
            length[step] = factor * case["wm_s"][step[2]]
        for a, b in pairwise(steps):
            wait.setdefault(b, []).append((a, case["cost_s"][a[2]][b[2]] if a[2] != b[2] else 0.0))
    for node, order in plan["orders"].items():
        for a, b in pairwise([(task[-1], int(task[:-1]), int(node)) for task in order]):
            wait.setdefault(b, []).append((a, case["gap_s"]))
    start = dict.fromkeys(length, 0.0)
    for _ in range(len(start)):
        start = {
            step: max((start[a] + length[a] + more for a, more in wait.get(step, ())), default=0.0) for step in start
        }
    return max(start[step] + length[step] for step in start)


def test_a_plan_is_what_it_says(capsys, planned):
    case, out = planned
    plan = json.loads(Path(out).read_text())
    assert plan["makespan_s"] == pytest.approx(replay_s(CASE, plan))
    assert plan["partitions"] == CASE["partitions"]
    promise = f"makespan {plan['makespan_s']:.3f} s"
    assert capsys.readouterr().out.startswith(promise)
    assert main(["simulate", case, out]) == 0
    simulated = capsys.readouterr().out
    assert simulated.startswith(promise)
    assert "rank actions" in simulated


def test_a_plan_reads_back_as_a_schedule(planned):
    case, out = planned
    schedule = Schedule.load(out)
    validate(schedule)
    again, _ = read_plan(out, read_case(case))
    assert (again.placement, again.paths, again.orders) == (schedule.placement, schedule.paths, schedule.orders)


def test_equal_seeds_write_equal_plans(planned, tmp_path):
    case, out = planned
    again = str(tmp_path / "again.json")
    assert main(["plan", case, "--out", again, "--budget", "0.2", "--seed", "0"]) == 0
    assert Path(again).read_text() == Path(out).read_text()


@pytest.mark.parametrize("options", [["--placement", "plan"], ["--links", "shared"]])
def test_the_planner_has_two_freedoms(write, tmp_path, options, capsys):
    case, out = write("case.json", CASE), str(tmp_path / "plan.json")
    assert main(["plan", case, "--out", out, "--budget", "0.2", *options]) == 0
    plan = json.loads(Path(out).read_text())
    assert [len(nodes) for nodes in plan["partitions"]] == [2, 2, 2, 2]
    assert sorted(node for nodes in plan["partitions"] for node in nodes) == list(range(8))
    links = options if "--links" in options else []
    assert main(["simulate", case, out, *links]) == 0
    assert f"makespan {plan['makespan_s']:.3f} s" in capsys.readouterr().out.splitlines()[1]


def test_a_schedule_is_shown_and_simulated(write, capsys):
    schedule = full_schedule("1f1b", num_stages=2, num_microbatches=3)
    path, cost = write("schedule.json", schedule.to_json()), write("cost.json", CostModel.uniform(2, 3).to_json())
    assert main(["schedule", "show", path]) == 0
    assert Schedule.parse(capsys.readouterr().out) == schedule
    assert main(["simulate", path, cost]) == 0
    assert "makespan 12.000 s" in capsys.readouterr().out
    assert main(["simulate", write("schedule.txt", str(schedule)), cost]) == 0


def test_the_schedule_of_a_plan_is_shown(planned, capsys):
    capsys.readouterr()
    assert main(["schedule", "show", planned[1]]) == 0
    assert Schedule.parse(capsys.readouterr().out) == Schedule.load(planned[1])


@pytest.fixture
def step(write) -> dict[str, str]:
    """A schedule, its costs, and one measured step as timeline and as trace."""
    schedule, cost = full_schedule("1f1b", num_stages=3, num_microbatches=4), CostModel.uniform(3, 4, latency_s=0.25)
    timeline = simulate(schedule, cost)
    return {
        "schedule": write("schedule.json", schedule.to_json()),
        "text": write("schedule.txt", str(schedule)),
        "cost": write("cost.json", cost.to_json()),
        "timeline": write("timeline.json", timeline.to_json()),
        "trace": write("step.trace.json", timeline.chrome_trace()),
        "other": write("other.json", full_schedule("gpipe", num_stages=3, num_microbatches=5).to_json()),
    }


@pytest.mark.parametrize(
    ("files", "labels"),
    [
        (["schedule", "cost"], ["simulated: 1f1b on cost"]),
        (["text"], ["simulated: 1f1b, all costs alike"]),
        (["trace"], ["1f1b"]),
        (["timeline", "trace"], ["1f1b", "1f1b"]),
        (["schedule", "trace"], ["1f1b", "predicted from the measured median costs"]),
        (["cost", "timeline", "other"], ["1f1b", "simulated: gpipe on cost"]),
    ],
)
def test_timelines_are_drawn_from_what_is_at_hand(step, tmp_path, capsys, files, labels):
    out = tmp_path / "step.svg"
    assert main(["timeline", *(step[file] for file in files), "--out", str(out), "--trace", "0,2"]) == 0
    printed, picture = capsys.readouterr().out, out.read_text()
    for label in labels:
        assert f"{label}: " in printed
        assert f"{label}:  makespan" in picture
    assert picture.count("makespan") == len(labels)
    assert "way of microbatch 2" in picture


def test_a_prediction_from_a_measured_step_is_that_step(step):
    measured, predicted = panels_of([step["trace"], step["schedule"]])
    whole = Timeline.from_json(Path(step["timeline"]).read_text())
    assert {event.action for event in measured.events} == {event.action for event in predicted.events}
    assert predicted.makespan_s == pytest.approx(whole.makespan_s)
    assert len(measured.transfers) == len(whole.transfers)


def test_the_timeline_of_a_plan(planned, tmp_path, capsys):
    out = tmp_path / "plan.png"
    assert main(["timeline", *planned, "--out", str(out), "--title", "A plan"]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    makespan_s = json.loads(Path(planned[1]).read_text())["makespan_s"]
    assert f"simulated: plan: {makespan_s:.6g} s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["cost"], "nothing to draw in"),
        (["trace", "cost"], "is of no use without a plan or a schedule"),
        (["schedule", "text"], "are both a schedule; give one"),
        (["schedule", "cost", "cost"], "are both a cost model; give one"),
        (["trace", "timeline", "schedule"], "one measured step"),
        (["trace", "other"], "did not run this schedule"),
        (["case"], "nothing to draw in"),
        (["case", "schedule"], "a case belongs to a plan"),
        (["neither"], "is no case, plan, schedule, cost model, timeline or trace"),
        (["browser"], "a trace of something else"),
        (["missing"], "No such file"),
    ],
)
def test_files_that_make_no_timeline(step, write, tmp_path, capsys, files, reason):
    step |= {
        "case": write("case.json", CASE),
        "neither": write("neither.json", {"a": 1}),
        "browser": write("browser.json", {"traceEvents": [{"ph": "X", "name": "paint", "pid": 1, "ts": 0, "dur": 1}]}),
        "missing": str(tmp_path / "missing.json"),
    }
    assert main(["timeline", *(step[file] for file in files), "--out", str(tmp_path / "step.svg")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert reason in error
    assert not (tmp_path / "step.svg").exists()


def test_pictures_that_cannot_be_written(step, tmp_path, capsys):
    for options, reason in [
        (["--out", str(tmp_path / "step.txt")], "name it .png or .svg"),
        (["--out", str(tmp_path / "none" / "step.png")], "no such folder"),
        (["--out", str(tmp_path / "step.png"), "--trace", "9"], "microbatch 9 cannot be traced"),
    ]:
        assert main(["timeline", step["trace"], *options]) == 2
        assert reason in capsys.readouterr().err


BAD_CASES = [
    (changed(cost_s=MISSING), "lacks 'cost_s'"),
    (changed(path_length=MISSING), "lacks 'path_length'"),
    (changed(partitions=MISSING), "lacks 'partitions'"),
    (changed(wm_s=[0.4, -0.5, *CASE["wm_s"][2:]]), "wm_s[1] is -0.5"),
    (changed(wm_s=[0.4, "x", *CASE["wm_s"][2:]]), "wm_s[1] is 'x'"),
    (changed(wm_s=CASE["wm_s"][1:]), "wm_s has 7 entries for 8 nodes"),
    (changed(cost_s=[[-1.0] * 8, *CASE["cost_s"][1:]]), "cost_s[0][0] is -1.0"),
    (changed(cost_s=[[float("nan")] * 8, *CASE["cost_s"][1:]]), "cost_s[0][0] is nan"),
    (changed(cost_s=CASE["cost_s"][1:]), "cost_s has 7 rows"),
    (changed(cost_s=[[0.1], *CASE["cost_s"][1:]]), "cost_s[0] has 1 entries"),
    (changed(cost_s=[[None] * 8 for _ in range(8)]), "unreachable links"),
    (changed(loss_factor=True), "loss_factor is True"),
    (changed(backward_factor=-1), "backward_factor is -1"),
    (changed(gap_s=-0.1), "gap_s is -0.1"),
    (changed(memory=0), "caps too small"),
    (changed(memory=[2, 2]), "2 memory caps for 8 nodes"),
    (changed(memory=1.5), "memory is 1.5"),
    (changed(path_length=9), "stages too few"),
    (changed(path_length=1), "path_length=1 is out of range"),
    (changed(max_jump_from_frontier=1), "max_jump=1 is too short"),
    (changed(microbatches_per_home=0), "at least 1"),
    (changed(partitions=[[6, 9], [0, 4], [3, 1], [7, 5]]), "names node 9"),
    (changed(partitions=[[6, 2]]), "at least one stage"),
    (changed(partitions=3), "partitions is 3"),
    (changed(swap_limits=3), "swap_limits is 3"),
    ([], "does not hold a JSON object"),
    ("{", "is not JSON"),
]


@pytest.mark.parametrize(("case", "reason"), BAD_CASES, ids=[reason for _, reason in BAD_CASES])
def test_a_bad_case_is_one_clear_line(write, tmp_path, capsys, case, reason):
    status = main(["plan", write("case.json", case), "--out", str(tmp_path / "plan.json"), "--budget", "0.1"])
    error = capsys.readouterr().err
    assert (status, error.count("\n")) == (2, 1)
    assert reason in error
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"paths": {"0": [6, 99]}}, "names node 99"),
        ({"paths": {"0": [0, 3]}}, "starts at a driver"),
        ({"paths": {"1": [6, 0, 3]}}, "number its entries 0, 1"),
        ({"paths": None}, "lacks 'paths'"),
        ({"orders": {"99": []}}, "names node 99"),
        ({"orders": {"6": ["0X"]}}, "'0X' is not a task"),
        ({"orders": {}}, "never runs 0F0"),
        ({"partitions": [[6, 2], [0, 4], [3, 1]]}, "for another case"),
    ],
)
def test_a_plan_for_something_else_is_refused(planned, write, capsys, change, reason):
    case, out = planned
    wrong = write("wrong.json", json.loads(Path(out).read_text()) | change)
    assert main(["simulate", case, wrong]) == 2
    assert reason in capsys.readouterr().err


def test_other_mistakes_are_one_line_too(planned, write, tmp_path, capsys):
    case, out = planned
    schedule = write("schedule.json", full_schedule("gpipe", num_stages=2, num_microbatches=2).to_json())
    four = write("cost.json", CostModel.uniform(2, 4).to_json())
    for arguments, reason in [
        (["plan", str(tmp_path / "none.json"), "--out", out], "No such file"),
        (["plan", case, "--out", str(tmp_path / "none" / "plan.json")], "no such folder"),
        (["plan", case, "--out", out, "--budget", "0"], "budget"),
        (["simulate", schedule, four], "for 3 ranks, the cost model for 4"),
        (["simulate", schedule, write("bad.json", {})], "not a skippipe-cost"),
        (["schedule", "show", case], "skippipe-schedule"),
    ]:
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert reason in error


def test_wrong_options_exit_with_2(capsys):
    for arguments in [
        [],
        ["plan"],
        ["plan", "x", "--out", "y", "--links", "odd"],
        ["export", "x", "y", "--skip-blocks", "a"],
    ]:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_the_commands_start_without_torch():
    script = "import sys, skippipe_plugin.cli; print([m for m in ('torch', 'lightning', 'scipy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_costs_are_shown_as_a_table(tmp_path, capsys):
    file = tmp_path / "costs.json"
    compute = ComputeCost((0.001, 0.5, 0.25), (0.002, 1.0, 0.5), 0.125, rank_factor=(1.0, 1.0, 3.0))
    links = NetworkCost(((0.0, 0.25, 0.5),) * 3, ((1000.0,) * 3,) * 3)
    CostModel(compute, links, (100, 200, 100)).save(file)
    assert main(["costs", str(file)]) == 0
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["stage", "forward", "s", "backward", "s", "bytes"],
        ["driver", "0.001", "0.002", "100"],
        ["1", "0.5", "1", "200"],
        ["2", "0.25", "0.5", "100"],
        ["loss", "0.125"],
        ["pause", "0"],
        ["message", "to", "0", "to", "1", "to", "2", "slower", "by"],
        ["from", "0", "-", "0.35", "0.6", "1x"],
        ["from", "1", "0.1", "-", "0.6", "1x"],
        ["from", "2", "0.1", "0.35", "-", "3x"],
    ]


def test_a_plan_that_the_driver_limits_says_so(write, tmp_path, capsys):
    case = write("case.json", changed(loss_factor=50.0, backward_factor=0.1))
    assert main(["plan", case, "--out", str(tmp_path / "plan.json"), "--budget", "0.2"]) == 0
    assert "the driver's own work (embedding, head, loss" in capsys.readouterr().out.splitlines()[1]


DEEP = "[" * 100_000


@pytest.mark.parametrize("name", ["case", "plan", "schedule", "cost", "timeline", "trace"])
@pytest.mark.parametrize(
    ("value", "text"),
    [
        (DEEP, "nested too deep"),
        ('{"a": ' * 100_000, "nested too deep"),
        ("1e308", "the number 1e308 is larger than any cost or count"),
        ("9" * 5000, "the number 99999999999999999999... is larger than any cost or count"),
    ],
    ids=["lists", "objects", "1e308", "digits"],
)
def test_json_that_nobody_can_reckon_with_is_one_clear_line(write, planned, capsys, name, value, text) -> None:
    """Under a key that nobody reads, for a start: it is refused when it is read."""
    inputs = inputs_of(planned)
    file = write("odd.json", json.dumps({**inputs[name], "odd": "@"}).replace('"@"', value))
    whole = {key: write(f"{key}.json", data) for key, data in inputs.items()}
    out = str(Path(whole["case"]).parent / "out.svg")
    commands = {
        "case": [["plan", file, "--out", out], ["simulate", file, whole["plan"]]],
        "plan": [["simulate", whole["case"], file], ["schedule", "show", file]],
        "schedule": [["simulate", file, whole["cost"]], ["schedule", "show", file]],
        "cost": [["simulate", whole["schedule"], file], ["costs", file]],
        "timeline": [],
        "trace": [],
    }
    for command in (*commands[name], ["timeline", file, "--out", out]):
        assert_one_line(command, capsys, text)


def inputs_of(planned: tuple[str, str]) -> dict[str, dict]:
    """One of each kind of file."""
    schedule, cost = full_schedule("1f1b", num_stages=3, num_microbatches=4), CostModel.uniform(3, 4, latency_s=0.25)
    timeline = simulate(schedule, cost)
    case, plan = (json.loads(Path(file).read_text()) for file in planned)
    texts = {"schedule": schedule.to_json(), "cost": cost.to_json(), "timeline": timeline.to_json()}
    return {"case": case, "plan": plan, "trace": timeline.chrome_trace()} | {k: json.loads(v) for k, v in texts.items()}


def assert_one_line(command: list[str], capsys, text: str) -> None:
    capsys.readouterr()
    assert main(command) == 2, command
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("skippipe: ")
    assert text in lines[0]
    assert len(lines[0]) < 600


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"version": 2}, "is not a skippipe-plan of version 1: 'skippipe-plan' 2"),
        ({"version": None}, "is not a skippipe-plan of version 1"),
        ({"format": "other", "version": 1}, "is not a skippipe-plan of version 1: 'other' 1"),
        ({"schedule": {"format": "skippipe-schedule", "version": 7}}, "not a skippipe-schedule of version 1"),
        ({"schedule": {}}, "not a skippipe-schedule of version 1"),
    ],
)
def test_a_plan_of_another_version_is_refused(write, planned, capsys, change, text) -> None:
    case, plan = planned
    file = write("other.json", {**json.loads(Path(plan).read_text()), **change})
    assert_one_line(["simulate", case, file], capsys, text)
    assert_one_line(["schedule", "show", file], capsys, text)


def test_plans_of_other_tools_and_of_earlier_versions_are_read(write, planned, capsys) -> None:
    case, plan = planned
    data = json.loads(Path(plan).read_text())
    del data["format"], data["version"]
    assert main(["simulate", case, write("earlier.json", data)]) == 0
    assert main(["schedule", "show", write("earlier.json", data)]) == 0
    assert (
        main(
            [
                "simulate",
                case,
                write(
                    "bare.json", {key: data[key] for key in ("paths", "orders")} | {"partitions": data["partitions"]}
                ),
            ]
        )
        == 0
    )
    assert "makespan" in capsys.readouterr().out


VALUES = (
    None,
    True,
    -1,
    0,
    2.5,
    1e308,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    {},
    [[]],
    [1],
    {"a": 1},
    2**63,
)


@pytest.mark.parametrize("name", ["case", "plan", "schedule", "cost", "timeline", "trace"])
def test_any_entry_may_be_anything_without_a_traceback(write, planned, capsys, name) -> None:
    chance, inputs = random.Random(0), inputs_of(planned)
    whole = {key: write(f"{key}.json", data) for key, data in inputs.items()}
    out = str(Path(whole["case"]).parent / "out.svg")
    for _ in range(60):
        file = write("odd.json", json.dumps(altered(inputs[name], chance)))
        commands = {
            "case": [["simulate", file, whole["plan"]]],
            "plan": [["simulate", whole["case"], file], ["schedule", "show", file]],
            "schedule": [["simulate", file, whole["cost"]], ["schedule", "show", file]],
            "cost": [["simulate", whole["schedule"], file], ["costs", file]],
            "timeline": [["timeline", file, "--out", out]] if chance.random() < 0.1 else [],
            "trace": [["timeline", file, "--out", out]] if chance.random() < 0.1 else [],
        }
        for command in commands[name]:
            assert main(command) in (0, 1, 2)
            assert len(capsys.readouterr().err.splitlines()) <= 1


def altered(data: dict, chance: random.Random) -> object:
    """Put something else in the place of one entry, at any depth."""
    data = json.loads(json.dumps(data))
    at: object = data
    while True:
        keys = list(at) if isinstance(at, dict) else range(len(at)) if isinstance(at, list) else []
        if not keys:
            return data
        key = chance.choice(list(keys))
        below = at[key]  # type: ignore[index]
        if not isinstance(below, (dict, list)) or not below or chance.random() < 0.3:
            at[key] = chance.choice(VALUES)  # type: ignore[index]
            return data
        at = below


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["plan", "case.json", "--out", "x", "--budget", "nan"], "'nan' is not a finite number of at least 0"),
        (["plan", "case.json", "--out", "x", "--budget", "1e308"], "'1e308' is not a finite number of at least 0"),
        (["plan", "case.json", "--out", "x", "--budget", "soon"], "'soon' is not a finite number of at least 0"),
        (["worker", "--join", "here:1", "--wait", "-1"], "'-1' is not a finite number of at least 0"),
        (["export", "a", "b", "--num-stages", "0"], "'0' is not a whole number of at least 1"),
        (["export", "a", "b", "--num-stages", "2.5"], "'2.5' is not a whole number of at least 1"),
    ],
)
def test_options_say_what_they_may_be(command: list[str], text: str, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command)
    assert text in capsys.readouterr().err
