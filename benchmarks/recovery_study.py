"""What a lost stage does to learning, and to the time that a loss takes on a simulated clock.

Every training here is real; failures, and the seconds they cost, are simulated. Neither needs a second process.
"""

from __future__ import annotations

import math
import multiprocessing
import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import islice
from statistics import mean
from typing import Any

import torch
from recovery_losses import NUM_STAGES, Training, batches_of, held_out

# ------------------------------------------------ the loss after 50 further steps

BEFORE, AFTER = 300, 50
CHECKPOINT_AGES = (10, 50)
"""Steps since the last checkpoint: the mean for one every 20 and one every 100 steps."""
MIDDLE, END = 2, 0
"""Stages that are lost, from 0."""


def after_a_loss(seed: int) -> dict[str, float]:
    """Train, lose a stage, train on; return the held-out loss by what was done about it."""
    torch.set_num_threads(1)
    text, batches = held_out(), list(islice(batches_of(seed), BEFORE + AFTER))
    training, swapping, restored = Training(seed), Training(seed, swap_ends=True), {}
    for age in sorted(CHECKPOINT_AGES, reverse=True):
        restored[age] = training.run(batches[training.step : BEFORE - age]).copy()
    for each in (training, swapping):
        each.run(batches[each.step : BEFORE])

    def later(of: Training) -> float:
        return of.run(batches[of.step : of.step + AFTER]).loss_on(text)

    losses = {"no failure": later(training.copy()), "swapped ends, no failure": later(swapping.copy())}
    for of, stage, name in (
        (training, MIDDLE, "middle stage"),
        (training, END, "first stage"),
        (swapping, END, "swapped ends, first stage"),
    ):
        for rule in ("norm", "squared", "mean", "copy", "random"):
            if stage == MIDDLE or rule in ("copy", "random"):  # there is nothing to average at an end
                lost = of.copy()
                lost.lose(stage, rule)
                losses[f"{name}, {rule}, at once"] = lost.loss_on(text)
                losses[f"{name}, {rule}"] = later(lost)
    return losses | {f"checkpoint, {age} steps old": later(each) for age, each in restored.items()}


# ------------------------------------------------------- time to a given loss

ITERATION_S = 72.0
"""One iteration of CheckFree's 500M runs, from its constants: 10% per hour are 0.002 per iteration."""
RATES = (0.05, 0.10, 0.16)
"""Failures of a node per hour."""
LOOK_EVERY = 10
TARGET_STEP = 240
"""The loss that an undisturbed training has after this many steps is the one to be reached."""
MOST_STEPS = 600
WRITE_S = 16.0
"""Seconds that writing a checkpoint holds an iteration up: 1 GB of weights and moments per stage at 500 Mb/s."""
REDUNDANT_FACTOR = 1 + 1 / 3.21
"""How much longer iterations are that also compute the next stage's forward: F : I : W = 1 : 1.27 : 0.94."""
TRACES = 2000


@dataclass(frozen=True, slots=True)
class Journey:
    """A training with failures on its way to a given loss."""

    seed: int
    rate: float
    swap_ends: bool

    @property
    def name(self) -> str:
        return "CheckFree+" if self.swap_ends else "CheckFree"


def failure_probability(rate: float) -> float:
    """The probability that a stage is lost in one iteration."""
    return rate * ITERATION_S / 3600


def undisturbed(seed: int) -> list[float]:
    """Return the held-out loss after every LOOK_EVERY steps."""
    torch.set_num_threads(1)
    training, text, batches = Training(seed), held_out(), batches_of(seed)
    return [training.run(islice(batches, LOOK_EVERY)).loss_on(text) for _ in range(TARGET_STEP // LOOK_EVERY)]


def travel(journey: Journey, target: float) -> dict[str, Any]:
    """Train with failures until the target; return steps and failures, and None as steps if it was not reached."""
    torch.set_num_threads(1)
    training = Training(journey.seed, swap_ends=journey.swap_ends)
    text, batches, chance = held_out(), batches_of(journey.seed), random.Random(journey.seed)
    failures = 0
    while training.step < MOST_STEPS:
        for batch in islice(batches, LOOK_EVERY):
            for stage in range(NUM_STAGES):
                if chance.random() < failure_probability(journey.rate):
                    training.lose(stage)
                    failures += 1
            training.run([batch])
        if training.loss_on(text) <= target:
            return {"steps": training.step, "failures": failures}
    return {"steps": None, "failures": failures}


def time_with_recovery(steps: int, failures: int, pause_s: float) -> float:
    """Seconds for steps of which some are interrupted (in their middle, on average) and repeated."""
    return steps * ITERATION_S + failures * (ITERATION_S / 2 + pause_s)


def time_with_checkpoints(steps: int, rate: float, every: int, pause_s: float, write_s: float, seed: int = 0) -> float:
    """Mean seconds for steps when every failure goes back to the last checkpoint, over simulated failures."""
    chance = random.Random(seed)
    lost = 1 - (1 - failure_probability(rate)) ** NUM_STAGES
    return mean(_one_trace(chance, steps, lost, every, pause_s, write_s) for _ in range(TRACES))


def _one_trace(chance: random.Random, steps: int, lost: float, every: int, pause_s: float, write_s: float) -> float:
    """Failures are rare, so the steps between two of them are drawn, not each step."""
    seconds, done = 0.0, 0
    while True:
        until_failure = int(math.log(1 - chance.random()) / math.log(1 - lost)) if lost else steps
        if done + until_failure >= steps:
            written = steps // every - done // every
            return seconds + (steps - done) * ITERATION_S + written * write_s
        reached = done + until_failure
        seconds += (until_failure + 0.5) * ITERATION_S + (reached // every - done // every) * write_s + pause_s
        done = reached // every * every


def best_interval(rate: float) -> int:
    """Steps between two checkpoints that cost least: Young's sqrt(2 C / lambda), in iterations."""
    failures_per_step = NUM_STAGES * failure_probability(rate)
    return max(1, round(math.sqrt(2 * WRITE_S / ITERATION_S / failures_per_step)))


# --------------------------------------------------------------------- both


def run_all(function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], jobs: int) -> Iterator[Any]:
    """Call ``function`` with each of ``arguments``, some at a time; yield the results in order."""
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from [future.result() for future in [pool.submit(function, *each) for each in arguments]]
