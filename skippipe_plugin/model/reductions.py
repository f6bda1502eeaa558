"""How a result of the whole batch follows from those of its microbatches: rules, which of them fit, and merging by one.

A result is anything a step computes: its loss, a value that it logs, what it returns. Pure values and functions; the
results that rules are fitted to come from :mod:`.asking`.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections import UserDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from ..driver.capture.microbatch import rebuild_mapping, rebuild_sequence
from ..engine.memory_order import joined
from .counting import Samples, View, Weighting


class _Missing:
    """Stands for the result of a microbatch that has none."""

    def __repr__(self) -> str:
        return "nothing"


MISSING: Final = _Missing()
COARSE: Final = frozenset({torch.float16, torch.bfloat16})
"""The types of 16 bits."""
_ROUNDING: Final = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}
_SHARPER, _SHARP = 1 / 16, 1 / 4
"""To what part of the usual rounding rules are held as soon as one of them keeps to it."""
_SAME_SHARE: Final = 1e-9
_SAME_ROUGHLY: Final = 0.015
"""How far shares may be apart and say the same: of a result of 16 bits, of which one is up to 0.004 off by rounding."""


@dataclass(frozen=True, slots=True)
class Equal:
    """All microbatches have the batch's."""

    def merge(self, parts: Sequence[Any], view: View) -> Any:
        return parts[0] if all(same(part, parts[0]) for part in parts[1:]) else MISSING


@dataclass(frozen=True, slots=True)
class Mean:
    """The weighted mean."""

    weighting: Weighting

    def merge(self, parts: Sequence[Any], view: View) -> Any:
        weights = view.weights(self.weighting)
        if weights is None or len(weights) != len(parts):
            return MISSING
        counting = [
            (part, weight) for part, weight in zip(parts, weights, strict=True) if weight and part is not MISSING
        ]
        total = sum(weight for _, weight in counting)
        if not counting:
            return MISSING
        return _combined([part for part, _ in counting], [weight / total for _, weight in counting])


@dataclass(frozen=True, slots=True)
class Sum:
    """The parts add up."""

    def merge(self, parts: Sequence[Any], view: View) -> Any:
        return _combined(parts, None)


@dataclass(frozen=True, slots=True)
class Extreme:
    """The largest part, or the smallest."""

    largest: bool

    def merge(self, parts: Sequence[Any], view: View) -> Any:
        if isinstance(parts[0], Tensor):
            stacked = torch.stack(list(parts))
            return stacked.amax(0) if self.largest else stacked.amin(0)
        return max(parts) if self.largest else min(parts)


@dataclass(frozen=True, slots=True)
class Joined:
    """The parts stand one after the other along a dimension."""

    dim: int

    def merge(self, parts: Sequence[Any], view: View) -> Any:
        if any(part.ndim <= self.dim for part in parts):
            return MISSING
        forms = {(*part.shape[: self.dim], *part.shape[self.dim + 1 :]) for part in parts}
        if len(forms) > 1:
            return MISSING
        if isinstance(parts[0], Tensor):
            return joined(parts, self.dim)
        return np.concatenate(list(parts), self.dim)


@dataclass(frozen=True, slots=True)
class Chained:
    """Lists that stand one after the other."""

    def merge(self, parts: Sequence[Any], view: View) -> Any:
        if not all(isinstance(part, (list, tuple)) for part in parts):
            return MISSING
        return rebuild_sequence(parts[0], [entry for part in parts for entry in part])


Rule = Equal | Mean | Sum | Extreme | Joined | Chained


@dataclass(frozen=True, slots=True)
class Leaf:
    """A result that is no container, with the rules that fit all that was seen of it."""

    rules: tuple[Rule, ...]
    refuted: frozenset[Rule] = frozenset()
    problem: str = ""
    """Why no rule is left."""
    is_rough: bool = False
    """Whether it has 16 bits."""


@dataclass(frozen=True, slots=True)
class Each:
    """A container whose entries follow rules of their own."""

    children: tuple[tuple[Any, Plan], ...]
    """By key, index or name of a field."""


Plan = Leaf | Each


def find_plan(
    whole: Any, parts: Sequence[Any], view: View, weightings: Sequence[Weighting], known: Plan | None = None
) -> Plan:
    """Return the rules by which ``whole`` follows from ``parts``.

    Args:
        whole: The batch's result.
        parts: The microbatches', :data:`MISSING` where there is none.
        view: The batch.
        weightings: What means may be weighted by, the likeliest first.
        known: What was found from other results of the kind.
    """
    keys = _keys(whole)
    if keys is not None and all(_keys(part) == keys for part in parts):
        olds = dict(known.children) if isinstance(known, Each) else {}
        return Each(
            tuple(
                (key, find_plan(_item(whole, key), [_item(p, key) for p in parts], view, weightings, olds.get(key)))
                for key in keys
            )
        )
    return _find_leaf(whole, parts, view, weightings, known if isinstance(known, Leaf) else Leaf(()))


def merge(plan: Plan, parts: Sequence[Any], view: View, *, otherwise: Rule | None = None) -> Any:
    """Return the batch's result.

    Args:
        plan: What is known of it.
        parts: The microbatches'.
        view: The batch.
        otherwise: What is done with what follows no rule.

    Raises:
        Unsettled: The parts are not what the plan was made for, or rules that both fit so far contradict each other.
    """
    if isinstance(plan, Each):
        keys = tuple(key for key, _ in plan.children)
        if any(_keys(part) != keys for part in parts):
            raise Unsettled("microbatches returned other entries than before")
        merged = {
            key: merge(child, [_item(part, key) for part in parts], view, otherwise=otherwise)
            for key, child in plan.children
        }
        return _rebuilt(parts[0], merged)
    if not plan.rules and otherwise is not None:
        found = _attempt(otherwise, parts, view)
        return list(parts) if found is MISSING else found
    return _merge_leaf(plan, parts, view)


class Unsettled(Exception):
    """What is known does not say how to merge these parts."""


def problems(plan: Plan, name: str) -> dict[str, str]:
    """Return, by name, why parts of a result follow no rule."""
    if isinstance(plan, Leaf):
        return {} if plan.rules else {name: plan.problem}
    found: dict[str, str] = {}
    for key, child in plan.children:
        found |= problems(child, f"{name}[{key!r}]")
    return found


def without(plan: Plan, wrong: frozenset[Rule]) -> Plan:
    """Return what is known of a result of which some rules were found not to hold otherwise."""
    if not isinstance(plan, Leaf):
        return plan
    return replace(plan, rules=tuple(rule for rule in plan.rules if rule not in wrong), refuted=plan.refuted | wrong)


def as_loss(plan: Plan) -> Plan:
    """Return what is known of a loss: only means and sums say what share each microbatch has of its gradient."""
    if not isinstance(plan, Leaf) or not plan.rules or any(isinstance(rule, (Mean, Sum)) for rule in plan.rules):
        return plan
    return replace(plan, rules=(), problem="it is one of the microbatches' losses, the largest or the smallest")


def check_settled(plan: Plan, view: View) -> None:
    """Check that means which fit so far are the same in this batch.

    Raises:
        Unsettled: They are not.
    """
    if isinstance(plan, Each):
        for _, child in plan.children:
            check_settled(child, view)
        return
    if _may_be_equal(plan):
        return  # any mean of what is the same everywhere is that; parts that differ are asked about when they merge
    means = [rule.weighting for rule in plan.rules if isinstance(rule, Mean)]
    for other in means[1:]:
        if not _alike(plan, view.shares(means[0]), view.shares(other)):
            raise Unsettled(f"means over {means[0]} and over {other} both fit what was tried")


def counts_nothing(plan: Plan, view: View) -> str:
    """Say what a result is a mean over, of which this batch has nothing; nothing where it has some, or rules differ."""
    if isinstance(plan, Each):
        return next(filter(None, (counts_nothing(child, view) for _, child in plan.children)), "")
    means = [rule.weighting for rule in plan.rules if isinstance(rule, Mean)]
    if not means or len(means) < len(plan.rules) or any(view.weights(each) is not None for each in means):
        return ""
    return f"it is a mean over {means[0]}, and there are none"


def mean_weightings(plan: Plan) -> list[Weighting]:
    """Return what the means among the rules are weighted by."""
    if isinstance(plan, Leaf):
        return [rule.weighting for rule in plan.rules if isinstance(rule, Mean)]
    return [each for _, child in plan.children for each in mean_weightings(child)]


def counts_samples(plan: Plan) -> bool:
    """Whether its rules give the same for every batch: means over samples, or no mean at all, and no sum beside one."""
    if isinstance(plan, Each):
        return all(counts_samples(child) for _, child in plan.children)
    is_one_kind = len({type(rule) for rule in plan.rules if isinstance(rule, (Mean, Sum))}) < 2
    return is_one_kind and all(isinstance(each, Samples) for each in mean_weightings(plan))


def sharing(plan: Plan | None) -> list[Mean | Sum]:
    """Return the rules that say what share each microbatch has of a result."""
    return [rule for rule in plan.rules if isinstance(rule, (Mean, Sum))] if isinstance(plan, Leaf) else []


def weighting_of(plan: Plan, view: View) -> Mean | Sum | None:
    """Return the rule by which the losses of this batch's microbatches are weighted: a mean or the sum.

    Raises:
        Unsettled: Rules that both fit so far contradict each other here.
    """
    rules = sharing(plan)
    if not rules:
        return None
    first = rules[0]
    for other in rules[1:]:
        if isinstance(other, Sum) or isinstance(first, Sum):
            raise Unsettled("a mean and a sum both fit")
        if not _alike(plan, view.shares(first.weighting), view.shares(other.weighting)):
            raise Unsettled(f"means over {first.weighting} and {other.weighting} both fit so far")
    return first


def same(a: Any, b: Any, tolerance: float | None = None, scale: float = 0.0) -> bool:
    """Whether two results are equal; exactly without a ``tolerance``, which is relative to them and to ``scale``."""
    if isinstance(a, (Tensor, np.ndarray)):
        return _same_tensors(a, b, tolerance, scale)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(lambda x, y: same(x, y, tolerance, scale), a, b))
    if isinstance(a, (Mapping, UserDict)):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key], tolerance, scale) for key in a)
    if isinstance(a, (float, np.floating)) and isinstance(b, numbers.Real):
        if tolerance is None or a == b or not (math.isfinite(a) and math.isfinite(b)):
            return bool(a == b) or (a != a and b != b)
        return abs(float(a) - float(b)) <= tolerance * max(abs(float(a)), abs(float(b)), scale)
    if dataclasses.is_dataclass(a) and not isinstance(a, type):
        names = [field.name for field in dataclasses.fields(a)]
        return type(a) is type(b) and all(same(getattr(a, n), getattr(b, n), tolerance, scale) for n in names)
    return a is b or (type(a) is type(b) and bool(a == b))


# ------------------------------------------------------------- leaves


def _find_leaf(whole: Any, parts: Sequence[Any], view: View, weightings: Sequence[Weighting], known: Leaf) -> Leaf:
    if known.problem:
        return known
    present = [part for part in parts if part is not MISSING]
    if not present or whole is MISSING:
        who = "the whole batch" if present else "its microbatches"
        return replace(known, rules=(), problem=f"{who} had none")
    if not math.isfinite(_magnitude(whole)):
        rules = known.rules or tuple(_possible(whole, present[0], weightings))  # that tells nothing
        return replace(known, rules=rules)
    refuted = set(known.refuted)
    merged: dict[Rule, Any] = {}
    for rule in _possible(whole, present[0], weightings):
        if rule not in refuted:
            merged[rule] = _attempt(rule, parts if isinstance(rule, Mean) else present, view)
            if merged[rule] is MISSING and not isinstance(rule, Mean):
                refuted.add(rule)
    found = {rule: value for rule, value in merged.items() if value is not MISSING}
    tolerance, scale = _sharp(whole, found, view, _scale(present)), _scale(present)
    fitting = tuple(rule for rule, value in found.items() if same(whole, value, tolerance, scale))
    refuted |= found.keys() - set(fitting)
    if not fitting or all(same(part, present[0]) for part in present[1:]):
        fitting = tuple(rule for rule in merged if rule in fitting or _is_open(rule, known, view))
    is_rough = known.is_rough or (isinstance(whole, Tensor) and whole.dtype in COARSE)
    return Leaf(fitting, frozenset(refuted), "" if fitting else _describe(whole, present, view), is_rough)


def _is_open(rule: Rule, known: Leaf, view: View) -> bool:
    """Whether a mean that fitted so far is over what this batch has nothing of, which tells nothing about it."""
    return isinstance(rule, Mean) and rule in known.rules and view.weights(rule.weighting) is None


def _sharp(whole: Any, found: Mapping[Rule, Any], view: View, scale: float) -> float:
    """Return how far a rule may be off: little where another fits well, for losses of samples may differ little.

    Never less than rounding alone makes of the batch's result and of its microbatches'.
    """
    tolerance = _tolerance(whole, view)
    digits = torch.finfo(whole.dtype).eps if isinstance(whole, Tensor) and whole.is_floating_point() else 0.0
    for sharp in (tolerance * _SHARPER, tolerance * _SHARP):
        if sharp > digits and any(same(whole, value, sharp, scale) for value in found.values()):
            return sharp
    return tolerance


def _possible(whole: Any, part: Any, weightings: Sequence[Weighting]) -> list[Rule]:
    """Return the rules that are thinkable for a result of this kind, the likeliest first."""
    extremes: list[Rule] = [Extreme(True), Extreme(False)]
    means: list[Rule] = [Mean(weighting) for weighting in weightings]
    if isinstance(whole, (list, tuple)):
        return [Equal(), Chained()]
    if isinstance(whole, bool):
        return [Equal(), *extremes]
    if isinstance(whole, (Tensor, np.ndarray)):
        if getattr(part, "shape", None) != whole.shape:
            return [Joined(dim) for dim in range(whole.ndim)]
        if isinstance(whole, np.ndarray):
            return [
                Equal(),
                *(means if whole.dtype.kind == "f" else ()),
                *([Sum()] if whole.dtype.kind in "iuf" else ()),
            ]
        if whole.dtype == torch.bool:
            return [Equal(), *extremes]
        return [
            Equal(),
            *(means if whole.is_floating_point() else ()),
            Sum(),
            *(() if whole.is_complex() else extremes),
        ]
    if isinstance(whole, numbers.Real):
        return [Equal(), *(() if isinstance(whole, numbers.Integral) else means), Sum(), *extremes]
    return [Equal()]


def _attempt(rule: Rule, parts: Sequence[Any], view: View) -> Any:
    try:
        return rule.merge(parts, view)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return MISSING


def _merge_leaf(leaf: Leaf, parts: Sequence[Any], view: View) -> Any:
    present = [part for part in parts if part is not MISSING]
    if not leaf.rules:
        raise Unsettled(leaf.problem)
    if not present:
        return MISSING
    if _may_be_equal(leaf) and all(same(part, present[0]) for part in present[1:]):
        return present[0]  # means and extremes of it are the same
    found, first = MISSING, None
    for rule in leaf.rules:
        if isinstance(rule, Mean) and isinstance(first, Mean):
            if not _alike(leaf, view.shares(first.weighting), view.shares(rule.weighting)):
                raise Unsettled(f"means over {first.weighting} and {rule.weighting} both fit so far")
            continue
        merged = _attempt(rule, parts if isinstance(rule, Mean) else present, view)
        if merged is MISSING:
            continue
        if first is None:
            found, first = merged, rule
        elif not same(found, merged, _tolerance(found, view), _scale(present)):
            raise Unsettled(f"{first} and {rule} both fit so far")
    if first is None:
        raise Unsettled("the parts are of another form than before")
    return found


def _may_be_equal(leaf: Leaf) -> bool:
    """Whether all microbatches had the batch's so far, which is no sum as that of nothing is."""
    return leaf.rules[:1] == (Equal(),) and not any(isinstance(rule, Sum) for rule in leaf.rules)


def _combined(parts: Sequence[Any], weights: Sequence[float] | None) -> Any:
    """Return the sum of the parts, times ``weights``, as exact as their type allows."""
    first = parts[0]
    if isinstance(first, Tensor):
        if weights is None:
            return torch.stack(list(parts)).sum(0, dtype=first.dtype)
        stacked = torch.stack(list(parts)).to(torch.float64)
        factors = torch.tensor(weights, dtype=torch.float64, device=first.device)
        return torch.tensordot(factors, stacked, 1).to(first.dtype)
    if isinstance(first, (np.ndarray, np.generic)):
        return sum(part if weights is None else part * weights[index] for index, part in enumerate(parts))
    if weights is None:
        return sum(parts)
    return math.fsum(part * weight for part, weight in zip(parts, weights, strict=True))


def _alike(plan: Plan, a: Sequence[float] | None, b: Sequence[float] | None) -> bool:
    if a is None or b is None:
        return a is b
    relative = _SAME_ROUGHLY if isinstance(plan, Leaf) and plan.is_rough else 0.0
    return all(abs(x - y) <= _SAME_SHARE + relative * max(x, y) for x, y in zip(a, b, strict=True))


def _tolerance(value: Any, view: View) -> float:
    rough = _ROUNDING.get(value.dtype, 0.0) if isinstance(value, Tensor) else 0.0
    return max(rough, view.rounding)


def _scale(parts: Sequence[Any]) -> float:
    return max(filter(math.isfinite, map(_magnitude, parts)), default=0.0)


def _magnitude(value: Any) -> float:
    if isinstance(value, Tensor):
        return float(value.detach().abs().max()) if value.numel() and not value.is_complex() else 0.0
    if isinstance(value, np.ndarray):
        return float(np.abs(value).max()) if value.size and value.dtype.kind in "iuf" else 0.0
    return abs(float(value)) if isinstance(value, numbers.Real) else 0.0


def _same_tensors(a: Any, b: Any, tolerance: float | None, scale: float) -> bool:
    if type(a) is not type(b) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if isinstance(a, np.ndarray):
        if a.dtype.kind != "f":
            return bool(np.array_equal(a, b))
        a, b = torch.from_numpy(a), torch.from_numpy(b)
    if not a.is_floating_point() or tolerance is None:
        return torch.equal(a, b) if not a.is_floating_point() else bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    bound = max(scale, _magnitude(torch.nan_to_num(a.detach())))
    return torch.allclose(a.double(), b.double(), rtol=tolerance, atol=tolerance * bound, equal_nan=True)


def _describe(whole: Any, parts: Sequence[Any], view: View) -> str:
    if isinstance(whole, Tensor) and whole.ndim == 0:
        whole, parts = whole.item(), [part.item() if isinstance(part, Tensor) else part for part in parts]
    if isinstance(whole, numbers.Real) and all(isinstance(part, numbers.Real) for part in parts):
        mean = _attempt(Mean(Samples()), [float(part) for part in parts], view)
        shown = f"{float(mean):.6g}" if isinstance(mean, float) else "nothing"
        return (
            f"on made-up hidden states it is {float(whole):.6g} for the batch, and for its microbatches the mean over "
            f"samples is {shown} and the sum {float(sum(parts)):.6g}; no mean over labels or masks of the batch fits"
        )
    return f"it is {_form(whole)} for the batch and {', '.join(sorted({_form(p) for p in parts}))} for microbatches"


def _form(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"a tensor of shape {tuple(value.shape)}" + (" (other values)" if value.size else "")
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


# ------------------------------------------------------------- containers


def _keys(value: Any) -> tuple[Any, ...] | None:
    """Return what names the entries of a container; None for anything else."""
    if isinstance(value, (Mapping, UserDict)):
        return tuple(value)
    if isinstance(value, (list, tuple)):
        return tuple(range(len(value))) or None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tuple(field.name for field in dataclasses.fields(value))
    return None


def _item(value: Any, key: Any) -> Any:
    return getattr(value, key) if dataclasses.is_dataclass(value) and not isinstance(value, Mapping) else value[key]


def _rebuilt(like: Any, items: dict[Any, Any]) -> Any:
    if isinstance(like, (Mapping, UserDict)):
        return rebuild_mapping(like, items)
    if isinstance(like, (list, tuple)):
        return rebuild_sequence(like, list(items.values()))
    return dataclasses.replace(like, **items)
