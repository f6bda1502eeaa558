"""One process of a contender: it builds what it is told to and runs steps when it is told to.

Commands are JSON lines on standard input, answers JSON lines on standard output; :mod:`measure` has the other end.
``python contender.py one|torch|engine|schedules|trainer``; what else a contender must know stands in its first line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from models import Case, Stack, loss_of, make_batch, make_blocks
from protocol import Console, Timer, end_with_parent
from torch import Tensor, nn

Step = Callable[[], float | None]
Norm = Callable[[], float]
"""The sum of the squares of this process's gradients."""


def serve(console: Console, pids: list[int], build: Callable[[Case], Any]) -> None:
    """Answer commands; ``build(case)`` is a context manager that yields a step and a gradient norm."""
    console.answer(pids=pids)
    with ExitStack() as current:
        for command in console.commands():
            if "case" in command:
                current.pop_all().close()
                step, norm = current.enter_context(build(Case.of(command["case"])))
                for _ in range(command["warmup"]):
                    step()
                console.answer(built=True)
            elif "steps" in command:
                timer = Timer(command, pids)
                loss = step()
                while not timer.over():
                    loss = step()
                console.answer(**timer.result(loss))
            elif "norm" in command:
                console.answer(norm_power=norm())


def gradient_power(model: nn.Module) -> float:
    return sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)


def serve_one(console: Console, settings: dict[str, Any]) -> None:
    """One process, microbatch by microbatch."""

    @contextmanager
    def build(case: Case) -> Iterator[tuple[Step, Norm]]:
        model, batch = Stack(make_blocks(case)), make_batch(case)

        def step() -> float:
            model.zero_grad()
            total = 0.0
            for inputs, target in zip(*(part.chunk(case.num_microbatches) for part in batch), strict=True):
                loss = loss_of(model(inputs), target) / case.num_microbatches
                loss.backward()
                total += float(loss)
            return total

        yield step, lambda: gradient_power(model)

    serve(console, [os.getpid()], build)


def serve_torch(console: Console, settings: dict[str, Any]) -> None:
    """One rank of torch.distributed.pipelining."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    rank, size = settings["rank"], settings["size"]
    device = torch.device(settings.get("device", "cpu"))
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)
    backend = settings.get("backend", "gloo")
    dist.init_process_group(backend, init_method=f"tcp://{settings['store']}", rank=rank, world_size=size)
    first, last = rank == 0, rank == size - 1

    @contextmanager
    def build(case: Case) -> Iterator[tuple[Step, Norm]]:
        share = case.num_blocks // size
        model = Stack(make_blocks(case)[rank * share : (rank + 1) * share]).to(device)
        inputs, target = (part.to(device) for part in make_batch(case))
        stage = PipelineStage(model, rank, size, device)
        schedule_class = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[settings["schedule"]]
        schedule = schedule_class(stage, case.num_microbatches, loss_fn=loss_of)

        def step() -> float | None:
            model.zero_grad()
            losses: list[Tensor] = []
            arguments = (inputs,) if first else ()
            schedule.step(*arguments, **({"target": target, "losses": losses} if last else {}), return_outputs=False)
            return float(torch.stack(losses).mean()) if last else None

        yield step, lambda: gradient_power(model)

    serve(console, [os.getpid()], build)
    dist.destroy_process_group()


def serve_engine(console: Console, settings: dict[str, Any]) -> None:
    """The driver of a skippipe pipeline, without Lightning; it starts its workers itself."""
    from common import Workers, pipeline_over, pipeline_step

    workers = Workers(settings.get("host", "127.0.0.1"), settings["workers"])

    @contextmanager
    def build(case: Case) -> Iterator[tuple[Step, Norm]]:
        model, batch, count = Stack(make_blocks(case)), make_batch(case), case.num_microbatches
        arguments = (settings["schedule"], count, settings["driver_stage"])
        with pipeline_over(workers, model, model.blocks, *arguments) as pipeline:
            local = [parameter for parameter in model.parameters() if not hasattr(parameter, "is_remote")]
            norm = lambda: pipeline.gradients.norm(local, 2.0, stepped=False) ** 2  # noqa: E731
            yield pipeline_step(pipeline, model, batch, count), norm

    try:
        serve(console, [os.getpid(), *workers.pids], build)
    finally:
        workers.close()


def serve_schedules(console: Console, settings: dict[str, Any]) -> None:
    """The driver of a skippipe pipeline that measures its costs and runs whatever schedules it is given."""
    from common import Workers, pipeline_over, pipeline_step

    from skippipe_plugin.driver.pipeline import TRAINING
    from skippipe_plugin.model.spread import measured_costs
    from skippipe_plugin.schedule import Schedule

    workers = Workers(settings["host"], settings["workers"])
    console.answer(pids=(pids := [os.getpid(), *workers.pids]))
    commands = console.commands()
    case = Case.of(next(commands)["case"])
    model, batch, count = Stack(make_blocks(case)), make_batch(case), case.num_microbatches
    with pipeline_over(workers, model, model.blocks, "gpipe", count, driver_stage=False) as pipeline:
        step = pipeline_step(pipeline, model, batch, count)
        step()
        console.answer(built=True)
        for command in commands:
            if "steps" in command:
                timer = Timer(command, pids)
                loss = step()
                while not timer.over():
                    loss = step()
                console.answer(**timer.result(loss))
            elif "schedule" in command:
                pipeline.use_schedule(TRAINING, Schedule.from_json(command["schedule"]))
                console.answer(taken=True)
            else:
                pipeline.collect_timeline = True
                step()
                pipeline.collect_timeline = False
                cost = measured_costs(pipeline)
                assert cost is not None, "the first driver has a timeline"
                console.answer(cost=cost.to_json())
    workers.close()


SERVERS = {"one": serve_one, "torch": serve_torch, "engine": serve_engine, "schedules": serve_schedules}


def main() -> None:
    torch.set_num_threads(1)
    end_with_parent()
    console = Console()
    settings = json.loads(sys.stdin.readline())
    if sys.argv[1] == "trainer":
        from trainer import serve_trainer

        serve_trainer(console, settings)
    else:
        SERVERS[sys.argv[1]](console, settings)


if __name__ == "__main__":
    main()
