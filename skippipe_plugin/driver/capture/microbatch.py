"""How large microbatches are, and how their outputs are put together again; :mod:`.batches` cuts the batch."""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...engine.errors import SkipPipeError
from ...engine.memory_order import joined


class BatchError(SkipPipeError, ValueError):
    """A batch that cannot be cut into microbatches."""


def split_sizes(batch_size: int, num_microbatches: int) -> list[int]:
    """Return the sizes of at most ``num_microbatches`` microbatches, the larger ones first.

    >>> split_sizes(10, 4)
    [3, 3, 2, 2]
    >>> split_sizes(2, 4)
    [1, 1]
    """
    count = max(1, min(num_microbatches, batch_size))
    quotient, remainder = divmod(batch_size, count)
    return [quotient + (index < remainder) for index in range(count)]


def merge(outputs: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Put the outputs of all microbatches together.

    Tensors and lists whose first dimension is the microbatch's size are concatenated, other floating tensors and
    numbers are averaged by size, containers are merged item by item; what is equal everywhere stays.
    """
    first = outputs[0]
    if len(outputs) == 1:
        return first
    if isinstance(first, Tensor):
        return _merge_tensors(outputs, sizes)
    if isinstance(first, (Mapping, UserDict)):
        return rebuild_mapping(first, {key: merge([output[key] for output in outputs], sizes) for key in first})
    if isinstance(first, list) and _lists_samples(outputs, sizes):
        return [element for item in outputs for element in item]
    if isinstance(first, (list, tuple)) and len({len(item) for item in outputs}) == 1:
        return rebuild_sequence(first, [merge(items, sizes) for items in zip(*outputs, strict=True)])
    if isinstance(first, float):
        return sum(value * size for value, size in zip(outputs, sizes, strict=True)) / sum(sizes)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first)]
        return dataclasses.replace(
            first, **{name: merge([getattr(output, name) for output in outputs], sizes) for name in names}
        )
    if all(output is None or output == first for output in outputs):
        return first
    return list(outputs)


def _lists_samples(outputs: Sequence[list[Any]], sizes: Sequence[int]) -> bool:
    """Whether each list has one entry per sample, rather than entries that hold all samples each."""
    if any(len(item) != size for item, size in zip(outputs, sizes, strict=True)):
        return False
    return not any(
        isinstance(entry, Tensor) and entry.ndim and entry.shape[0] == size
        for item, size in zip(outputs, sizes, strict=True)
        for entry in item
    )


def _merge_tensors(outputs: Sequence[Tensor], sizes: Sequence[int]) -> Any:
    if all(tensor.ndim and tensor.shape[0] == size for tensor, size in zip(outputs, sizes, strict=True)):
        if len({tensor.shape[1:] for tensor in outputs}) == 1:
            return joined(outputs, 0)
        return [row for tensor in outputs for row in tensor]
    if len({tensor.shape for tensor in outputs}) == 1 and outputs[0].is_floating_point():
        weights = torch.tensor(sizes, dtype=outputs[0].dtype, device=outputs[0].device) / sum(sizes)
        return torch.einsum("m,m...->...", weights, torch.stack(list(outputs)))
    return list(outputs)


def rebuild_mapping(like: Any, items: dict[Any, Any]) -> Any:
    """Return a mapping of the kind of ``like`` with other items."""
    if isinstance(like, UserDict):  # transformers' BatchEncoding is one, with a constructor of its own
        result = copy.copy(like)
        result.data = items
        return result
    if type(like) is dict:
        return items
    if dataclasses.is_dataclass(type(like)):  # transformers' ModelOutput is a mapping and a dataclass
        kind: Any = type(like)
        return kind(**items)
    result = copy.copy(like)
    for key, item in items.items():
        result[key] = item
    return result


def rebuild_sequence(like: Any, items: list[Any]) -> Any:
    """Return a list or (named) tuple of the kind of ``like`` with other items."""
    if hasattr(like, "_fields"):
        return type(like)(*items)
    return type(like)(items)
