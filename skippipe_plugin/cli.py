"""The command line: ``skippipe plan | simulate | costs | schedule show | timeline | export | run | worker``.

Bad input ends with one line on standard error and exit status 2, what fails later with status 1. Only ``run`` starts
processes, and only ``export``, ``run`` and ``worker`` import torch.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path as FilePath
from typing import TYPE_CHECKING, TypeVar, get_args

from skippipe_plugin.checked import COUNT, SECONDS, Range, check, describe, shown
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.panels import panels_of
from skippipe_plugin.schedule.advice import why_no_gain
from skippipe_plugin.schedule.casefile import load_schedule, read_case, read_json, read_plan, save_plan
from skippipe_plugin.schedule.cost import CostModel, Links
from skippipe_plugin.schedule.ir import Schedule
from skippipe_plugin.schedule.partial import Plan, plan
from skippipe_plugin.schedule.picture import draw
from skippipe_plugin.schedule.problem import PlanProblem, reordered
from skippipe_plugin.schedule.routes import PathConstraints
from skippipe_plugin.schedule.simulate import lower_bound_s, simulate
from skippipe_plugin.schedule.validate import peak_activations, validate

_LITTLE = 20_000
"""Iterations for the plan that skips nothing, with which one that does is compared."""

_N = TypeVar("_N", int, float)

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]  # it has no public name


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        result = options.run(options)
        if isinstance(result, int):
            return result
        print(result, flush=True)
    except BrokenPipeError:  # such as: skippipe schedule show FILE | head
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - stays open till the end
    except OSError as error:
        print(f"skippipe: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, ImportError) as error:
        print(f"skippipe: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except SkipPipeError as error:
        print(f"skippipe: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="skippipe", description="Plan and inspect pipelines.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    adders = (_add_plan, _add_simulate, _add_costs, _add_schedule, _add_timeline, _add_export, _add_run, _add_worker)
    for add in adders:
        add(commands)
    return parser


def _add_plan(commands: Commands) -> None:
    planner = commands.add_parser("plan", help="plan paths, orders and perhaps the placement of a case")
    planner.add_argument("case", help="the case, JSON")
    planner.add_argument("--out", required=True, help="the plan file to write")
    planner.add_argument("--budget", type=_seconds, default=10.0, metavar="S", help="seconds of search at most (10)")
    planner.add_argument("--seed", type=int, default=0, help="equal seeds give equal plans (0)")
    planner.add_argument("--placement", choices=("given", "plan"), default="given", help="who places stages on nodes")
    _add_links(planner)
    planner.set_defaults(run=_plan)


def _add_simulate(commands: Commands) -> None:
    simulator = commands.add_parser("simulate", help="time a plan of a case, or a schedule on a cost model")
    simulator.add_argument("case", help="the case, or the schedule")
    simulator.add_argument("plan", help="the plan of the case, or the cost model of the schedule")
    _add_links(simulator)
    simulator.set_defaults(run=_simulate)


def _add_costs(commands: Commands) -> None:
    costs = commands.add_parser("costs", help="print a cost model as a table")
    costs.add_argument("file", help="the cost model, JSON")
    costs.set_defaults(run=_costs)


def _add_schedule(commands: Commands) -> None:
    schedule = commands.add_parser("schedule", help="inspect schedules").add_subparsers(required=True, metavar="ACTION")
    show = schedule.add_parser("show", help="print a schedule, or the schedule of a plan, as text")
    show.add_argument("file")
    show.set_defaults(run=_show)


def _add_timeline(commands: Commands) -> None:
    timeline = commands.add_parser(
        "timeline",
        help="draw what a step did or would do",
        description="Draw a step, one row per rank. What a file is can be told from its content: a plan with its case, "
        "a schedule (with its cost model; all costs alike without), a measured timeline or a trace that "
        "PipelineMonitor wrote. Of a trace and the schedule that ran, the measured step is drawn above the predicted.",
    )
    timeline.add_argument("files", nargs="+", metavar="FILE", help="what to draw, and what it needs")
    timeline.add_argument("--out", required=True, help="the picture to write, .png or .svg")
    timeline.add_argument("--trace", type=_numbers, metavar="M,M", help="microbatches whose way is drawn")
    timeline.add_argument("--title", default="", help="written above the picture")
    _add_links(timeline)
    timeline.set_defaults(run=_timeline)


def _add_export(commands: Commands) -> None:
    export = commands.add_parser(
        "export",
        help="write a smaller, ordinary checkpoint without some stages or blocks",
        description="Leave stages or blocks out of a Lightning checkpoint, or of a folder that save_pretrained wrote. "
        "What is left is renumbered and loads into a model with fewer layers.",
    )
    export.add_argument("checkpoint", help="a Lightning checkpoint, or a folder with config.json and weights")
    export.add_argument("out", help="the file or folder to write")
    export.add_argument("--skip-stages", type=_numbers, default=(), metavar="N,N", help="stages to leave out, from 1")
    export.add_argument("--num-stages", type=_count, metavar="N", help="how many block stages the pipeline had")
    export.add_argument("--skip-blocks", type=_numbers, default=(), metavar="N,N", help="blocks to leave out, from 0")
    export.add_argument("--blocks", metavar="NAME", help="the name of the block stack, such as model.layers")
    export.add_argument("--config", metavar="FILE", help="config.json of the transformers model inside: resize it too")
    export.add_argument("--trust", action="store_true", help="read objects of any class, which can run code")
    export.set_defaults(run=_export)


def _add_run(commands: Commands) -> None:
    run = commands.add_parser(
        "run",
        help="run a training script so that its driver may die too",
        description="Run a training script, such as: skippipe run -- python train.py. When it dies by a signal it is "
        "started again and training goes on at the same batch, from memory; its workers live on meanwhile. Any other "
        "end is the end of the run, with the same exit status.",
    )
    run.add_argument("--max-restarts", type=int, default=10, metavar="N", help="start it again at most N times (10)")
    run.add_argument("--host", default="127.0.0.1", help="this machine's address, as the workers reach it (127.0.0.1)")
    run.add_argument(
        "--port", type=_port, default=0, metavar="P", help="where those that stand by find it (any free one)"
    )
    run.add_argument(
        "--standby-for",
        metavar="HOST:PORT",
        help="begin nothing, but go on with the job that another host runs there (its --host and --port) when that "
        "host is lost. Workers that joined by hand from other hosts hold the training meanwhile",
    )
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="the command and its arguments")
    run.set_defaults(run=_run)


def _add_worker(commands: Commands) -> None:
    worker = commands.add_parser(
        "worker",
        help="join a running job as a worker, from any machine",
        description="Hold stages of a job until it ends. Ctrl-C or SIGTERM hands them over after the step, if the job "
        "has StageRecovery. Whoever knows the secret can run code here: only join jobs you trust.",
    )
    worker.add_argument(
        "--join", required=True, metavar="HOST:PORT", help="where the driver listens; it says so itself"
    )
    worker.add_argument(
        "--secret-file",
        metavar="FILE",
        help="the job's secret, readable by you alone (default: SKIPPIPE_SECRET, or the file that SKIPPIPE_SECRET_FILE "
        "names)",
    )
    worker.add_argument(
        "--device",
        type=_device,
        help="what to compute on, such as cuda:1 (default: the driver chooses among what this host has)",
    )
    worker.add_argument("--wait", type=_seconds, default=60.0, metavar="S", help="seconds to wait for the driver (60)")
    worker.set_defaults(run=_worker)


def _add_links(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--links",
        choices=get_args(Links),
        default="free",
        help="queued: bytes of messages wait for each other on a directed link; shared: messages do (free)",
    )


def _plan(options: argparse.Namespace) -> str:
    problem = read_case(options.case, placement_mode=options.placement, links=options.links)
    if not FilePath(options.out).absolute().parent.is_dir():
        raise ValueError(f"--out {options.out}: there is no such folder")
    started_s = time.monotonic()
    result = plan(problem, budget_s=options.budget, seed=options.seed)
    save_plan(result, options.out)
    idle = sorted(result.idle_share[: sum(map(bool, result.schedule.orders))])
    line = (
        f"makespan {result.makespan_s:.3f} s, lower bound {result.lower_bound_s:.3f} s (gap {result.gap:.1%}), "
        f"idle {idle[0]:.0%} to {idle[-1]:.0%}, planned in {time.monotonic() - started_s:.1f} s"
    )
    advice = _advice(problem, result)
    return line if advice is None else f"{line}\n{advice}"


def _advice(problem: PlanProblem, result: Plan) -> str | None:
    if problem.num_visits == len(problem.available) or len(problem.available) < problem.num_stages:
        return None  # nothing is skipped, or nothing could be left unskipped
    exact = plan(replace(problem, constraints=PathConstraints(max_jump=1)), max_iterations=_LITTLE)
    return why_no_gain(result.schedule, reordered(problem.cost, result.nodes), exact.makespan_s)


def _costs(options: argparse.Namespace) -> str:
    return CostModel.load(options.file).table()


def _simulate(options: argparse.Namespace) -> str:
    first = FilePath(options.case).read_text(encoding="utf-8").lstrip()
    if first.startswith("schedule ") or {"format", "schedule"} & read_json(options.case).keys():
        schedule = load_schedule(options.case)
        cost = CostModel.load(options.plan)
        _check_world(schedule, cost, options.case)
        validate(schedule)
    else:
        problem = read_case(options.case, links=options.links)
        schedule, nodes = read_plan(options.plan, problem)
        cost, caps = reordered(problem.cost, nodes), problem.memory_caps
        validate(schedule, memory_caps=None if caps is None else [caps[node] for node in nodes])
    timeline = simulate(schedule, cost, links=options.links)
    peaks = peak_activations(schedule)
    return (
        f"makespan {timeline.makespan_s:.3f} s, no order of these paths is below "
        f"{lower_bound_s(schedule, cost):.3f} s, at most {max(peaks)} activations on a rank\n{timeline.table()}"
    )


def _check_world(schedule: Schedule, cost: CostModel, name: str) -> None:
    if schedule.num_ranks != cost.num_ranks:
        raise ValueError(
            f"{name} is for {schedule.num_ranks} ranks, the cost model for {cost.num_ranks}; plan for this world size"
        )


def _show(options: argparse.Namespace) -> str:
    return str(load_schedule(options.file))


def _timeline(options: argparse.Namespace) -> str:
    out = FilePath(options.out)
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"--out {out}: the suffix chooses the kind of picture; name it .png or .svg")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out {out}: there is no such folder")
    panels = panels_of(options.files, links=options.links)
    draw(panels, out, title=options.title, trace=options.trace)
    return "\n\n".join(panel.table() for panel in panels) + f"\nwrote {out}"


def _export(options: argparse.Namespace) -> str:
    from skippipe_plugin.export import Omission, export  # imports torch

    omission = Omission(
        skip_stages=options.skip_stages,
        num_stages=options.num_stages,
        skip_blocks=options.skip_blocks,
        blocks=options.blocks,
    )
    config = None if options.config is None else FilePath(options.config)
    return export(FilePath(options.checkpoint), FilePath(options.out), omission, config=config, trust=options.trust)


def _run(options: argparse.Namespace) -> int:
    command = options.command[options.command[:1] == ["--"] :]
    if not command:
        raise ValueError("there is no command; write it after --, such as: skippipe run -- python train.py")
    from skippipe_plugin.supervisor import RunOptions, run  # imports torch
    from skippipe_plugin.worker.joining import parse_address

    first = None if options.standby_for is None else parse_address(options.standby_for)
    wanted = RunOptions(max_restarts=options.max_restarts, host=options.host, port=options.port, standby_for=first)
    return run(command, wanted)


def _worker(options: argparse.Namespace) -> str:
    from skippipe_plugin.engine.secret import job_secret
    from skippipe_plugin.worker.joining import join, parse_address  # imports torch

    host, port = parse_address(options.join)
    secret = job_secret(options.secret_file)
    if secret is None:
        raise ValueError("a worker must know its job's secret: give --secret-file FILE, or set SKIPPIPE_SECRET_FILE")
    join(host, port, secret, wait_s=options.wait, device=options.device or "")
    return f"the job at {options.join} needs this worker no more"


def _seconds(text: str) -> float:
    """Read a span of time."""
    return _checked(text, float, Range(0, SECONDS.most))


def _count(text: str) -> int:
    """Read how many there are."""
    return _checked(text, int, COUNT)


def _checked(text: str, kind: Callable[[str], _N], limits: Range) -> _N:
    try:
        value = kind(text)
        check("it", value, kind, limits)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not {describe(kind, limits)}") from None
    return value


def _device(text: str) -> str:
    """Read the name of a device."""
    kind, _, index = text.partition(":")
    if not kind.isidentifier() or (index and not index.isdecimal()) or text.endswith(":"):
        raise argparse.ArgumentTypeError(f"{shown(text)} is no device, such as cuda:1 or cpu")
    return text


def _port(text: str) -> int:
    """Read a port; 0 is any."""
    return _checked(text, int, Range(0, 65535))


def _numbers(text: str) -> tuple[int, ...]:
    """Read numbers with commas between them."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers such as 2,4") from None


if __name__ == "__main__":
    sys.exit(main())
