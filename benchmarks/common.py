"""Pipelines without Lightning: the engine behind the strategy, driven by a plain step function.

Workers are started here, if need be each under a command of its own, such as ``ip netns exec``.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from models import loss_of
from torch import Tensor, nn

from skippipe_plugin.driver.capture.proxies import BlockProxies
from skippipe_plugin.driver.devices import Devices
from skippipe_plugin.driver.layout import Layout
from skippipe_plugin.driver.links import Link, Links
from skippipe_plugin.driver.pipeline import EVALUATION, TRAINING, Pipeline, Rendezvous
from skippipe_plugin.driver.pool import WorkerPool
from skippipe_plugin.driver.steps import StepTask
from skippipe_plugin.engine.compilation import Compilation
from skippipe_plugin.partition import cut, estimate_costs
from skippipe_plugin.schedule import Schedule, full_schedule


class Workers:
    """Worker processes and the pool they joined; the n-th started is the n-th in :attr:`links`."""

    def __init__(self, host: str, commands: Sequence[Sequence[str]]) -> None:
        self.pool = WorkerPool(host)
        self._processes: list[subprocess.Popen[bytes]] = []
        self.links: list[Link] = []
        for command in commands:
            self._processes.append(self._start(command))
            if command:  # the order in which they join matters only where they differ
                self.links += self.pool.acquire(1)
        self.links += self.pool.acquire(len(commands) - len(self.links))

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [process.pid for process in self._processes]

    def _start(self, command: Sequence[str]) -> subprocess.Popen[bytes]:
        host, port = self.pool.address
        environment = os.environ | {
            "SKIPPIPE_SECRET": self.pool.secret,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        worker = [*command, sys.executable, "-m", "skippipe_plugin.worker", f"{host}:{port}"]
        return subprocess.Popen(worker, env=environment, stdin=subprocess.DEVNULL)

    def close(self) -> None:
        """Send the workers home."""
        self.pool.close()
        for process in self._processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def pipeline_over(
    workers: Workers, model: nn.Module, blocks: nn.ModuleList, schedule: str, num_microbatches: int, driver_stage: bool
) -> Iterator[Pipeline]:
    """Spread ``blocks`` of ``model`` over the workers, with a share for the driver if it has a stage."""
    num_stages = len(workers.links) + driver_stage
    programs = {
        name: full_schedule(
            schedule,
            num_stages=num_stages,
            num_microbatches=num_microbatches,
            driver_stage=driver_stage,
            backward=name == TRAINING,
        )
        for name in (TRAINING, EVALUATION)
    }
    pipeline = _pipeline(workers, programs, cut(estimate_costs(blocks), num_stages))
    names = [f"blocks.{index}" for index in range(len(blocks))]
    proxies_of = functools.partial(BlockProxies, names, list(blocks), torch.device("cpu"))
    try:
        pipeline.form()
        pipeline.load(model, proxies_of, Compilation({}), 0)
        yield pipeline
    finally:
        pipeline.unload()
        pipeline.close()


def _pipeline(workers: Workers, programs: dict[str, Schedule], stage_blocks: tuple[range, ...]) -> Pipeline:
    layout = Layout(1, stage_blocks, programs[TRAINING].placement)
    links = Links()
    for rank, link in zip(layout.workers, workers.links, strict=True):
        links.add(rank, layout.stages_of(rank), link)
    pool, host = workers.pool, workers.pool.address[0]
    return Pipeline(
        layout=layout,
        schedules=programs,
        links=links,
        store=pool.store,
        generations=pool.generations,
        rendezvous=Rendezvous(host=host, store_host=host, store_port=0),
        rank=0,
        devices=Devices(torch.device("cpu")),
    )


def pipeline_step(
    pipeline: Pipeline, model: nn.Module, batch: tuple[Tensor, Tensor], num_microbatches: int
) -> Callable[[], float]:
    """Return a function that runs forward and backward of a batch and returns its loss."""

    def one(inputs: Tensor, target: Tensor) -> Tensor:
        return loss_of(model(inputs), target)

    def step() -> float:
        pieces = zip(*(part.chunk(num_microbatches) for part in batch), strict=True)
        functions: list[Callable[[], Any]] = [functools.partial(one, *piece) for piece in pieces]
        task = StepTask(functions, [1 / num_microbatches] * num_microbatches, lambda loss: loss, 0, training=True)
        pipeline.gradients.zero()
        model.zero_grad()
        _, loss = pipeline.train(task)
        assert loss is not None
        loss.backward()
        return float(loss.detach())

    return step
