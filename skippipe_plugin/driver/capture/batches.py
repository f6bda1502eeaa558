"""Cut a batch into microbatches: what has one entry per sample is cut, and what cannot be told is refused by its path.

A batch is read on the assumption that it has so many samples: tensors and arrays must have them along their first
dimension, a list or tuple is either one entry per sample or holds fields that are read alike, and mappings, dataclasses
and namespaces hold fields. Scalars, strings and lists of them with another length belong to the whole batch. Where
several numbers of samples fit, those that the data loader makes decide, and what the batches before were.

Where a step may run once, a batch that cannot be told stays whole.
"""

from __future__ import annotations

import itertools
from collections import UserDict
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import SimpleNamespace
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .kinds import ATOMS, has_fields, holds_arrays, holds_entries, is_array, is_sequence, names_of, parts, plain_form
from .microbatch import BatchError, rebuild_mapping, rebuild_sequence, split_sizes

__all__ = ["BatchError", "Cut", "Cutter", "Hint", "split"]

Reading = Literal["samples", "fields"]
"""What the entries of a list or tuple are."""
_TRIED: Final = 64
"""How many numbers of samples are tried."""
_MOST_SEEN: Final = 64
"""Of so many forms of batches it is remembered how they are cut."""
_NAMED: Final = 8
"""How many tensors are named in an error."""
_ONCE: Final = "Run the step once, on the whole batch, with microbatches='stack' or num_microbatches=1 otherwise"
_WAY_OUT: Final = (
    "Let every tensor and list of a batch have one entry for each sample (what belongs to the whole batch, such as "
    f"class weights, may be an attribute of the model or a number). {_ONCE}"
)


@dataclass(frozen=True, slots=True)
class Hint:
    """What is known of the batches beforehand."""

    sizes: frozenset[int] = frozenset()
    """The batch sizes of the data loaders; a last batch may be smaller."""
    default_collate: bool = False
    """Whether torch's own function puts them together: then no list holds the tensors of one sample each."""
    combined: bool = False
    """Whether a batch is a list of what several data loaders make."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A batch in microbatches."""

    pieces: list[Any]  # Any: of the batch's kind
    sizes: list[int]
    refusal: str = ""
    """Why it is a single one, where the batch cannot be cut."""


@dataclass(slots=True)
class _Plan:
    """How a batch is read if it has ``size`` samples."""

    size: int
    readings: dict[str, Reading] = field(default_factory=dict)
    """By path, of lists and tuples that hold tensors."""
    open: list[str] = field(default_factory=list)
    """Those that may be read both ways."""
    alike: list[str] = field(default_factory=list)
    """Those whose entries were read as samples for no other reason than that they look alike."""


class _Unfit(Exception):
    """The batch has not so many samples."""


class Cutter:
    """Cuts the batches of one run; those that are put together alike are cut alike."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, Reading]] = {}
        self._refused: dict[Hashable, str] = {}
        """By source and outline of the batches that stay whole: why."""
        self._seen: dict[Hashable, tuple[list[int], Mapping[str, Reading]]] = {}
        """By form of a batch and what else its reading follows from: how it is cut, as long as no more is known."""

    def cut(
        self, batch: Any, num_microbatches: int, hint: Hint | None = None, source: str = "", *, may_stay: bool = False
    ) -> Cut:
        """Cut ``batch`` into at most ``num_microbatches``; one is the batch itself, whatever it holds.

        Args:
            batch: What a step function gets.
            num_microbatches: How many to make.
            hint: What is known of it.
            source: Where it comes from; batches of one source are put together alike.
            may_stay: Whether one that cannot be cut stays whole. So do all after it then that are put together alike:
                what is packed may have as many rows as there are samples, by chance, which are not theirs.

        Raises:
            BatchError: It cannot be told how.
        """
        if num_microbatches == 1:
            return Cut([batch], [1])
        if may_stay and self._refused and (refusal := self._refused.get((source, _outline(batch)))):
            return Cut([batch], [1], refusal)
        try:
            sizes, readings = self._reading(batch, num_microbatches, hint or Hint(), source)
            return Cut(split(batch, sizes, readings), [*sizes])
        except BatchError as error:
            if not may_stay:
                raise
            self._refused[source, _outline(batch)] = str(error)
            return Cut([batch], [1], str(error))

    def _reading(
        self, batch: Any, num_microbatches: int, hint: Hint, source: str
    ) -> tuple[list[int], Mapping[str, Reading]]:
        """Return how many samples each microbatch has, and what the lists of the batch are."""
        form = plain_form(batch)
        follows_from = source, form, num_microbatches, hint
        if form is not None and (seen := self._seen.get(follows_from)) is not None:
            return seen
        known = self._known.get(source, {})
        plan = _choose(batch, hint, known)
        found = split_sizes(plan.size, num_microbatches), plan.readings
        if plan.readings.items() <= known.items():
            if len(self._seen) >= _MOST_SEEN:
                self._seen.clear()
            self._seen[follows_from] = found
        else:  # batches may be read otherwise from now on
            self._known[source] = known | plan.readings
            self._seen.clear()
        return found


def split(batch: Any, sizes: Sequence[int], readings: Mapping[str, Reading] | None = None) -> list[Any]:
    """Cut ``batch``, which has ``sum(sizes)`` samples, into pieces of ``sizes``.

    >>> split({"x": torch.arange(3), "text": ["a", "b", "c"], "n": 7}, [2, 1])
    [{'x': tensor([0, 1]), 'text': ['a', 'b'], 'n': 7}, {'x': tensor([2]), 'text': ['c'], 'n': 7}]
    """
    if len(sizes) == 1:
        return [batch]
    if readings is None:
        readings = _read(batch, sum(sizes), Hint(), {}).readings
    ends = itertools.accumulate(sizes)
    slices = [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    return _sliced(batch, "batch", slices, sum(sizes), readings)


# ------------------------------------------------------------------ reading


def _choose(batch: Any, hint: Hint, known: Mapping[str, Reading]) -> _Plan:
    """Return the one way in which the batch can be read."""
    plans: list[_Plan] = []
    refused: BatchError | None = None
    for size in _candidates(batch, hint):
        try:
            plans.append(_read(batch, size, hint, known))
        except BatchError as error:
            refused = refused or error
        except _Unfit:
            continue
    if not plans:
        raise refused or BatchError(_why_not(batch))
    expected = [plan for plan in plans if plan.size in hint.sizes]
    as_before = [plan for plan in plans if known and plan.readings.items() <= known.items()]
    smaller = [plan for plan in plans if hint.sizes and plan.size < max(hint.sizes)]
    for some in (expected, as_before, smaller, plans):
        if len(some) == 1 and not some[0].open:
            return some[0]
    return _usual(plans)


def _usual(plans: Sequence[_Plan]) -> _Plan:
    """Several readings fit: fields of tensors are the usual one, unless a list's entries look like samples."""
    by_fields = [plan for plan in plans if all(reading == "fields" for reading in plan.readings.values())]
    if len(by_fields) == 1 and not any(plan.open or plan.alike for plan in plans):
        return by_fields[0]
    sizes = sorted({plan.size for plan in plans})
    paths = sorted({path for plan in plans for path in plan.readings})
    raise BatchError(
        f"it cannot be told how many samples a batch has ({' or '.join(map(str, sizes))}): the list {', '.join(paths)} "
        "may have one entry for each sample, or hold tensors with all samples each. Let the collate function stack the "
        f"samples into one tensor, or return a dict of tensors. {_ONCE}"
    )


def _candidates(batch: Any, hint: Hint) -> list[int]:
    """Return numbers of samples that the batch may have, those of its outermost parts first."""
    found: dict[int, None] = {}
    lengths: dict[int, None] = {}
    level: list[Any] = [batch]
    for _ in range(6):
        below: list[Any] = []
        for value in level:
            if is_array(value):
                if value.ndim:
                    found[int(value.shape[0])] = None
            elif is_sequence(value):
                lengths[len(value)] = None
                below += list(value)[:64]
            else:
                below += [item for _, item in parts(value)]
        level = below
    sizes = [*found, *lengths]
    return [size for size in dict.fromkeys((*(s for s in sizes if s in hint.sizes), *sizes)) if size > 0][:_TRIED]


def _read(batch: Any, size: int, hint: Hint, known: Mapping[str, Reading]) -> _Plan:
    """Read the batch as one of ``size`` samples.

    Raises:
        _Unfit: It is not.
        BatchError: It holds what cannot be cut at all.
    """
    plan = _Plan(size)
    if not _visit(batch, "batch", plan, hint, known):
        raise _Unfit
    return plan


def _visit(value: Any, path: str, plan: _Plan, hint: Hint, known: Mapping[str, Reading]) -> bool:
    """Whether something in ``value`` has one entry per sample; what has another number is no fit."""
    if is_array(value):
        _check_array(value, path)
        if value.ndim and value.shape[0] != plan.size:
            raise _Unfit
        return bool(value.ndim)
    if isinstance(value, ATOMS):
        return False
    if isinstance(value, PackedSequence):
        raise BatchError(f"{path} is a PackedSequence, whose rows mix the samples; pack it in the step. {_WAY_OUT}")
    if is_sequence(value):
        return _visit_sequence(value, path, plan, hint, known)
    if has_fields(value):
        found = [_visit(item, path + suffix, plan, hint, known) for suffix, item in parts(value)]
        return any(found)
    _check_object(value, path, plan.size)
    return False


def _visit_sequence(value: Sequence[Any], path: str, plan: _Plan, hint: Hint, known: Mapping[str, Reading]) -> bool:
    per_sample = len(value) == plan.size
    if not any(holds_entries(item) for item in value):
        return per_sample
    trial = _Plan(plan.size)
    refused: BatchError | None = None
    try:
        found = [_visit(item, f"{path}[{index}]", trial, hint, known) for index, item in enumerate(value)]
        as_fields = any(found)
    except _Unfit:
        as_fields = False
    except BatchError as error:
        as_fields, refused = False, error
    as_samples = per_sample and not (hint.default_collate and any(map(is_array, value))) and _alike(value)
    if as_fields and as_samples and path in known:
        as_fields, as_samples = known[path] == "fields", known[path] == "samples"
    if as_fields and as_samples and plan.size in hint.sizes and not hint.combined and not is_array(value[0]):
        as_fields = False  # as many whole batches as a batch has samples are less likely than they
    looks_alike = isinstance(value, list) and _same_form(value)
    if as_fields:
        plan.readings |= {path: "fields", **trial.readings}
        plan.open += [*trial.open, *([path] if as_samples and looks_alike else ())]
        plan.alike += trial.alike
        return True
    if not as_samples:
        raise refused or _Unfit()
    plan.readings[path] = "samples"
    plan.alike += [path] if looks_alike and is_array(value[0]) else []
    return True


def _alike(entries: Sequence[Any]) -> bool:
    """Whether the entries may be samples: of one type, with the same fields."""
    first = entries[0]
    if any(type(entry) is not type(first) for entry in entries):
        return False
    if is_array(first):
        return len({(entry.dtype, entry.ndim) for entry in entries}) == 1
    if isinstance(first, tuple):
        return len({len(entry) for entry in entries}) == 1
    return not isinstance(first, Mapping) or all(entry.keys() == first.keys() for entry in entries)


def _same_form(entries: Sequence[Any]) -> bool:
    return not all(map(is_array, entries)) or len({tuple(entry.shape) for entry in entries}) == 1


# ------------------------------------------------------------------ refusals


def _check_array(value: Any, path: str) -> None:
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested):
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.").replace("_", " ")
        raise BatchError(
            f"{path} is a {kind} tensor, which cannot be cut along its samples; make it dense, or make it in the step. "
            + _WAY_OUT
        )


def _check_object(value: Any, path: str, size: int) -> None:
    """Refuse what would go whole to each microbatch and may hold one entry per sample."""
    kind = type(value).__name__
    if isinstance(value, Iterator):
        raise BatchError(
            f"{path} is a {kind}, from which each microbatch would take a part. Make it a list. {_WAY_OUT}"
        )
    if (isinstance(value, Collection) and len(value) == size > 1) or holds_arrays(value):
        raise BatchError(
            f"{path} is a {kind} that may hold something of each sample, and there is no telling how to cut it; give "
            f"its contents as a dict, dataclass, list or tensor and make the {kind} in the step. {_WAY_OUT}"
        )


def _why_not(batch: Any) -> str:
    sizes: list[str] = []

    def note(value: Any, path: str) -> None:
        if is_array(value):
            if value.ndim:
                sizes.append(f"{path}: {value.shape[0]}")
        elif not isinstance(value, ATOMS):
            for suffix, item in parts(value):
                note(item, path + suffix)

    note(batch, "batch")
    if not sizes:
        return f"a batch of type {type(batch).__name__} holds no tensor or list to cut along. {_WAY_OUT}"
    listing = ", ".join(sizes[:_NAMED]) + (", ..." if len(sizes) > _NAMED else "")
    return (
        f"the tensors of a batch must share their first dimension to be cut into microbatches, but {listing}. "
        + _WAY_OUT
    )


def _outline(batch: Any) -> Hashable:
    """Return what batches have in common that are put together alike: their kind, and the names of what they hold."""
    return type(batch), tuple(suffix for suffix, _ in parts(batch)) if has_fields(batch) else ()


# ------------------------------------------------------------------ cutting


def _sliced(value: Any, path: str, slices: Sequence[slice], total: int, readings: Mapping[str, Reading]) -> list[Any]:
    """Return, by slice of the samples, what there is of ``value``."""
    if is_array(value):
        return [value[part] for part in slices] if value.ndim else [value] * len(slices)
    if isinstance(value, ATOMS):
        return [value] * len(slices)
    if is_sequence(value):
        if readings.get(path, "samples" if len(value) == total else "fields") == "samples":
            return [value[part] for part in slices]
        if path not in readings:
            return [value] * len(slices)
        columns = [_sliced(item, f"{path}[{i}]", slices, total, readings) for i, item in enumerate(value)]
        return [rebuild_sequence(value, [*row]) for row in zip(*columns, strict=True)]
    if not has_fields(value):
        return [value] * len(slices)
    columns = [_sliced(item, path + suffix, slices, total, readings) for suffix, item in parts(value)]
    rows = zip(*columns, strict=True) if columns else itertools.repeat((), len(slices))
    return [_rebuilt(value, [*row], path) for row in rows]


def _rebuilt(value: Any, items: list[Any], path: str) -> Any:
    """Return a record of the kind of ``value`` with other items, in the order of :func:`parts`."""
    try:
        if isinstance(value, (Mapping, UserDict)):
            return rebuild_mapping(value, dict(zip(value, items, strict=True)))
        if isinstance(value, SimpleNamespace):
            return type(value)(**dict(zip(vars(value), items, strict=True)))
        if isinstance(value, tuple):
            return rebuild_sequence(value, items)
        return _rebuilt_dataclass(value, dict(zip(names_of(value), items, strict=True)))
    except Exception as error:
        raise BatchError(
            f"{path} is a {type(value).__name__} that cannot be made again with a part of the samples ({error}). "
            + _WAY_OUT
        ) from error


def _rebuilt_dataclass(value: Any, items: dict[str, Any]) -> Any:
    """What the class computes from its fields (``__post_init__``) is computed anew, unless it holds the samples."""
    init = {each.name for each in fields(value) if each.init}
    result = replace(value, **{name: item for name, item in items.items() if name in init})
    for name, item in items.items():
        if name not in init and (not hasattr(result, name) or holds_entries(item)):
            object.__setattr__(result, name, item)
    return result
