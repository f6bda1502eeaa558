"""Run programs in one process and as a pipeline, judge them, shrink those that fail, and count."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from .compare import difference, diverges, leftover, refusal, run
from .grammar import FEATURES
from .program import Feature, conflict, render

DEVICES = 3
"""One driver and two workers in every program, so that the workers are reused."""
MIXED = "bf16-mixed"
LOW = "bf16-true"
LAST_BIT = 2.0**-9
"""Half the distance between two numbers of 16 bits, relative."""
AUTOCAST = "torch.autocast('cpu', torch.bfloat16"
"""What a feature enters; torch leaves autocast off, with a warning, when it is asked for float32."""
TOLERANCES = {"64-true": (1e-7, 1e-10), "32-true": (2e-4, 2e-5), MIXED: (2e-2, 2e-3), LOW: (4e-2, 4e-3)}
"""By precision: how far two numbers may be apart, relative and absolute."""
Kind = Literal["exact", "refused", "skipped", "WRONG"]
Program = tuple[Feature, ...]


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a program ended, and in which words."""

    kind: Kind
    text: str = ""


def judge(features: Sequence[Feature]) -> Verdict:
    """Run a program twice and compare."""
    text = render(features)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = run(load(text), 1)
        if plain.error is not None:
            return Verdict("skipped", f"{type(plain.error).__name__}: {plain.error}")
        if diverges(plain):
            return Verdict("skipped", "it diverges in one process")
        program = load(text)
        piped = run(program, DEVICES)
        if piped.error is not None:
            wrong = refusal(piped, program)
            return Verdict("WRONG", wrong) if wrong else Verdict("refused", " ".join(str(piped.error).split()))
    rough = "torch.bfloat16" in text  # somewhere inside: differences of rounding are as large
    rtol, atol = TOLERANCES[MIXED if rough else program["TRAINER"]["precision"]]
    wrong = difference(piped.values, plain.values, rtol, atol)
    if wrong and (rough or in_single(text) != text):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            others = [run(load(in_single(text)), 1), run(load(text), 1, jitter=LAST_BIT)]
        if any(other.error is not None for other in others) or is_rounding(
            piped.values, plain.values, [other.values for other in others], rtol, atol
        ):
            return Verdict("skipped", "in one process, too, rounding makes more than what is to be told")
    if not wrong:
        assert piped.module is not None
        assert plain.module is not None
        wrong = leftover(piped.module, plain.module)
    return Verdict("WRONG", wrong) if wrong else Verdict("exact")


def in_single(text: str) -> str:
    """Return a program that computes in float32 what this one lets autocast or its precision compute in 16 bits."""
    for coarse, fine in ((MIXED, "32-true"), (LOW, "32-true"), (AUTOCAST, f"{AUTOCAST[:-8]}float32")):
        text = text.replace(coarse, fine)
    return text


def is_rounding(found: Any, expected: Any, others: Sequence[Any], rtol: float, atol: float) -> bool:
    """Whether values are no further apart than a few times what one process makes of another rounding.

    Args:
        found: What the pipeline has left.
        expected: What one process leaves.
        others: What it leaves if it rounds otherwise; their numbers count, whatever their types.
        rtol: What is nothing in any case, relative.
        atol: The same, absolute.
    """
    rounded, *otherwise = (
        pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.double(), each) for each in (expected, *others)
    )
    return all(
        any(difference(rounded, other, max(1.0, size / 4) * rtol, max(1.0, size / 4) * atol) for other in otherwise)
        for size in (4.0**power for power in range(10))
        if difference(found, expected, size * rtol, size * atol)
    )


def load(text: str) -> dict[str, Any]:
    """Execute a program's text as a script of its own."""
    names: dict[str, Any] = {"__name__": "__main__"}
    torch.manual_seed(0)
    exec(compile(text, "<program>", "exec"), names)
    return names


def shrink(features: Program, wrong: Callable[[Program], bool]) -> Program:
    """Drop features one by one while the rest is still wrong."""
    for feature in features:
        smaller = tuple(each for each in features if each is not feature)
        if len(features) > 1 and wrong(smaller):
            return shrink(smaller, wrong)
    return features


def draw(random_: random.Random, features: Sequence[Feature] = FEATURES) -> Program:
    """Compose a program of one to five features of different axes."""
    while True:
        count = random_.choices((1, 2, 3, 4, 5), (1, 4, 5, 3, 2))[0]
        chosen: dict[str, Feature] = {}
        for feature in random_.sample(features, len(features)):
            if len(chosen) < count and feature.axis not in chosen and not conflict((*chosen.values(), feature)):
                chosen[feature.axis] = feature
            if len(chosen) == count:
                break
        return tuple(chosen.values())


@dataclass
class Tally:
    """What was found so far."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[frozenset[str], tuple[Program, Verdict]] = field(default_factory=dict)
    """By the names of a minimal program."""
    singles: dict[str, Verdict] = field(default_factory=dict)
    refusals: dict[str, Counter[str]] = field(default_factory=dict)
    """By the beginning of a refusal: the programs that got it."""
    seen: set[str] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def num_programs(self) -> int:
        return sum(self.counts.values())

    def known(self, features: Collection[Feature]) -> bool:
        """Whether a program holds one that is known to fail."""
        names = {feature.name for feature in features}
        return any(minimal <= names for minimal in self.failures)

    def note(self, features: Program, minimal: Program, verdict: Verdict) -> None:
        """Count a program, given the smallest part of it that is as wrong."""
        name = "+".join(feature.name for feature in features)
        self.seen.add(name)
        self.counts[verdict.kind] += 1
        if len(features) == 1:
            self.singles[name] = verdict
        if verdict.kind == "refused":
            self.refusals.setdefault(verdict.text[:60], Counter())[name] += 1
        if verdict.kind == "WRONG":
            self.failures[frozenset(feature.name for feature in minimal)] = minimal, verdict

    def summary(self) -> str:
        seconds = max(self.seconds, 1e-9)
        counts = ", ".join(f"{self.counts[kind]} {kind}" for kind in ("exact", "refused", "skipped", "WRONG"))
        return (
            f"{self.num_programs} programs in {seconds:.0f} s ({self.num_programs / seconds * 60:.0f} per minute): "
            f"{counts}; {len(self.failures)} distinct minimal failures"
        )


def programs(seed: int, tally: Tally, features: Sequence[Feature] = FEATURES) -> Iterator[Program]:
    """First every feature alone, then compositions without end that hold no known failure."""
    yield ()
    for feature in features:
        yield (feature,)
    random_ = random.Random(seed)
    while True:
        program = draw(random_, features)
        if not tally.known(program):
            yield program
