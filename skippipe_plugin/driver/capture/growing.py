"""Batches with a few samples more: a question to the user's code about which dimensions are the batch's.

Nothing here knows a pipeline.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .microbatch import rebuild_mapping, rebuild_sequence


def sample_counts(batch: Any) -> list[int]:  # Any: a batch of the user's
    """Return how many samples a batch may have, by the first dimensions of its tensors; the most frequent first.

    >>> sample_counts({"x": torch.ones(8, 4), "y": torch.ones(8), "class_weights": torch.ones(3)})
    [8, 3]
    """
    return [size for size, _ in Counter(_first_dims(batch)).most_common()]


def holds_iterators(batch: Any) -> bool:
    """Whether a step takes from its batch what it cannot be given once more."""
    return isinstance(batch, Iterator) or any(map(holds_iterators, _children(batch).values()))


def with_more_samples(batch: Any, num_samples: int, num_more: int | None) -> Any:
    """Return a batch whose first ``num_more`` samples come once more, at the end; None: all, with all other rows.

    No sample is new, so what the user's code reads off all of them together, such as the greatest length, stays.

    >>> with_more_samples([torch.tensor([1, 2]), torch.tensor([5, 6, 7])], 2, 1)
    [tensor([1, 2, 1]), tensor([5, 6, 7])]
    >>> with_more_samples({"n": torch.tensor([1, 2]), "packed": torch.tensor([4, 5, 6])}, 2, None)
    {'n': tensor([1, 2, 1, 2]), 'packed': tensor([4, 5, 6, 4, 5, 6])}
    """
    if _has_rows(batch):
        grows = batch.ndim and (num_more is None or batch.shape[0] == num_samples)
        return _longer(batch, num_more) if grows else batch
    if isinstance(batch, (list, tuple)) and len(batch) == num_samples and num_samples not in set(_first_dims(batch, 1)):
        return rebuild_sequence(batch, [*batch, *batch[:num_more]])
    children = _children(batch)
    grown = {key: with_more_samples(child, num_samples, num_more) for key, child in children.items()}
    if isinstance(batch, (list, tuple)):
        return rebuild_sequence(batch, list(grown.values()))
    if dataclasses.is_dataclass(batch) and not hasattr(batch, "keys"):
        return dataclasses.replace(batch, **grown)  # type: ignore[type-var]
    return rebuild_mapping(batch, grown) if children else batch


def _first_dims(value: Any, skip: int = 0) -> Iterator[int]:
    """Yield the first dimensions of all tensors, and the lengths of lists of tensors but for the outermost ``skip``."""
    if _has_rows(value):
        if value.ndim:
            yield int(value.shape[0])
        return
    children = _children(value)
    for child in children.values():
        yield from _first_dims(child, max(0, skip - 1))
    if not skip and isinstance(value, (list, tuple)) and children and all(map(_has_rows, children.values())):
        yield len(children)


def _has_rows(value: Any) -> bool:
    return isinstance(value, Tensor) or (type(value).__module__ == "numpy" and hasattr(value, "ndim"))


def _longer(rows: Any, num_more: int | None) -> Any:
    if isinstance(rows, Tensor):
        return torch.cat([rows, rows[:num_more]])
    index = [*range(len(rows)), *range(len(rows) if num_more is None else num_more)]
    return rows[index]


def _children(value: Any) -> dict[Any, Any]:
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if hasattr(value, "keys") and hasattr(value, "__getitem__"):
        return {key: value[key] for key in value.keys()}  # noqa: SIM118 - whatever has keys, not only mappings
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
    return {}
