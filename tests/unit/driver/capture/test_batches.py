"""A batch is cut where it has one entry for each sample, and refused by its path where that cannot be told."""

import copy
import re
import time
from collections import UserList, defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from skippipe_plugin.driver.capture.batches import BatchError, Cutter, Hint
from skippipe_plugin.driver.capture.microbatch import split_sizes


@dataclass
class Sample:
    x: Any
    y: Any = 0


@dataclass(frozen=True)
class Counted:
    x: Tensor
    num: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num", len(self.x))


class Fields(NamedTuple):
    x: Any
    y: Any


def rows(size: int, *shape: int) -> Tensor:
    return torch.arange(size * int(np.prod(shape, dtype=int)), dtype=torch.float32).reshape(size, *shape)


def hint(size: int) -> Hint:
    return Hint(frozenset({size}))


# By name: makes a batch of so many samples, which a data loader of that batch size made.
FORMS: dict[str, Any] = {
    "pairs": lambda n: [(rows(4), torch.tensor(i)) for i in range(n)],
    "pairs_of_one_length": lambda n: [(rows(4), rows(4)) for _ in range(n)],
    "dicts": lambda n: [{"x": rows(4), "y": i} for i in range(n)],
    "dataclasses": lambda n: [Sample(rows(4), i) for i in range(n)],
    "objects": lambda n: [object() for _ in range(n)] if n > 1 else [rows(1)],
    "sequences": lambda n: [rows(23) + i for i in range(n)],
    "sequences_of_any_length": lambda n: [rows(13 + i) for i in range(n)],
    "arrays_of_one_length": lambda n: [rows(23).numpy() for _ in range(n)],
    "detection": lambda n: (
        [rows(3, 9, 9 + i) for i in range(n)],
        [{"boxes": rows(13 + i, 4), "labels": rows(13 + i)} for i in range(n)],
    ),
    "zipped": lambda n: tuple(zip(*[(rows(3, 2), i) for i in range(n)], strict=True)),
    "numpy": lambda n: {"x": rows(n, 2), "weight": np.arange(n)},
    "numpy_of_strings": lambda n: {"x": rows(n, 2), "text": np.array([f"text {i}" for i in range(n)])},
    "strings": lambda n: {"x": rows(n, 2), "text": [str(i) for i in range(n)]},
    "strings_alone": lambda n: {"text": [str(i) for i in range(n)]},
    "ragged_ids": lambda n: {"ids": [[i] * (i + 1) for i in range(n)], "n": 3},
    "lists_in_a_dict": lambda n: {"images": [rows(3, 9 + i) for i in range(n)], "y": rows(n)},
    "fields_alike": lambda n: [rows(n, 2), rows(n, 2), rows(n, 2)] if n != 3 else [rows(3), rows(3, 2)],
    "namespace": lambda n: SimpleNamespace(x=rows(n, 2), names=[str(i) for i in range(n)]),
    "named_tuple": lambda n: Fields(rows(n, 2), [rows(14 + i) for i in range(n)]),
    "computed": lambda n: Counted(rows(n, 2)),
    "default_dict": lambda n: defaultdict(list, x=rows(n, 2), y=list(range(n))),
    "range": lambda n: {"x": rows(n), "number": range(n)},
    "nothing_of_the_batch": lambda n: {"x": rows(n, 3), "size": torch.Size([n]), "scale": np.float32(2), "t": None},
}


def same(a: Any, b: Any) -> bool:
    if isinstance(a, (Tensor, np.ndarray)):
        return type(a) is type(b) and a.shape == b.shape and bool((a == b).all())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dict__") and type(a) is not type:
        return same(vars(a), vars(b))
    return bool(a == b)


def joined_fields(pieces: list[Any], whole: Any) -> list[Any]:
    return [joined(list(each), part) for each, part in zip(zip(*pieces, strict=True), whole, strict=True)]


def joined(pieces: list[Any], whole: Any) -> Any:
    """What one process has, from the microbatches."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(pieces) if first.ndim else first
    if isinstance(first, np.ndarray):
        return np.concatenate(pieces)
    if isinstance(first, dict):
        return {key: joined([piece[key] for piece in pieces], whole[key]) for key in first}
    if isinstance(first, tuple) and hasattr(first, "_fields"):
        return type(first)(
            *[joined(list(each), part) for each, part in zip(zip(*pieces, strict=True), whole, strict=True)]
        )
    if isinstance(first, torch.Size):
        return first
    if isinstance(first, (list, tuple)):
        if sum(map(len, pieces)) == len(whole):
            return type(first)(entry for piece in pieces for entry in piece)
        return type(first)(
            joined(list(each), part) for each, part in zip(zip(*pieces, strict=True), whole, strict=True)
        )
    if isinstance(first, range):
        return range(pieces[0].start, pieces[-1].stop)
    if isinstance(first, SimpleNamespace):
        return SimpleNamespace(**joined([vars(piece) for piece in pieces], vars(whole)))
    if isinstance(first, Counted):
        return Counted(torch.cat([piece.x for piece in pieces]))
    return first


@pytest.mark.parametrize("form", FORMS)
@settings(max_examples=30, deadline=None)
@given(size=st.integers(2, 12), num_microbatches=st.integers(2, 8))
def test_the_microbatches_make_the_batch(form: str, size: int, num_microbatches: int) -> None:
    batch = FORMS[form](size)
    cut = Cutter().cut(batch, num_microbatches, hint(size))
    assert cut.sizes == split_sizes(size, num_microbatches)
    assert all(type(piece) is type(batch) for piece in cut.pieces)
    assert same(joined(cut.pieces, batch), dict(batch) if isinstance(batch, dict) else batch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", [2, 5, 7])
def test_a_smaller_last_batch_is_cut_like_those_before(form: str, last: int) -> None:
    cutter = Cutter()
    cutter.cut(FORMS[form](8), 4, hint(8))
    batch = FORMS[form](last)
    cut = cutter.cut(batch, 4, hint(8))
    assert sum(cut.sizes) == last
    assert same(joined(cut.pieces, batch), dict(batch) if isinstance(batch, dict) else batch)


def test_what_a_class_computes_is_computed_anew() -> None:
    assert [piece.num for piece in Cutter().cut(Counted(rows(5)), 2, None).pieces] == [3, 2]


class Graph:
    """A batch class with its own way to be cut."""

    def __init__(self) -> None:
        self.x = rows(8, 2)
        self._store = {"edges": torch.zeros(2, 31)}


class Slots:
    __slots__ = ("x",)

    def __init__(self) -> None:
        self.x = rows(8, 2)


REFUSED: dict[str, tuple[Any, str]] = {
    "class_weights": ({"x": rows(8, 2), "weight": rows(10)}, r"batch\['x'\]: 8, batch\['weight'\]: 10"),
    "numpy_class_weights": ((rows(8, 2), np.zeros(10)), r"batch\[0\]: 8, batch\[1\]: 10"),
    "time_first": ({"x": rows(5, 8, 2), "y": [rows(8)]}, r"batch\['x'\]: 5, batch\['y'\]\[0\]: 8"),
    "an_object": ({"x": rows(8, 2), "graph": Graph()}, r"batch\['graph'\] is a Graph that may hold"),
    "an_object_alone": (Graph(), "batch is a Graph|holds no tensor"),
    "slots": ((rows(8), Slots()), r"batch\[1\] is a Slots"),
    "a_list_class": ({"x": rows(8), "y": UserList(range(8))}, r"batch\['y'\] is a UserList"),
    "a_set": ({"x": rows(8), "ids": set(range(8))}, r"batch\['ids'\] is a set"),
    "sparse": ({"x": rows(8, 2).to_sparse(), "y": rows(8)}, r"batch\['x'\] is a sparse coo tensor"),
    "sparse_rows": ((rows(8, 2).to_sparse_csr(), rows(8)), r"batch\[0\] is a sparse csr tensor"),
    "packed": ((pack_sequence([rows(3), rows(2)]), rows(2)), r"batch\[0\] is a PackedSequence"),
    "an_iterator": ({"x": rows(8), "more": iter([1])}, r"batch\['more'\] is a list_iterator"),
    "nothing": ({"n": 3, "name": "x"}, "a batch of type dict holds no tensor or list to cut along"),
    "sequences_without_a_loader": ([rows(12) for _ in range(8)], r"\(8 or 12\): the list batch may"),
    "as_many_as_long": ([rows(8) for _ in range(8)], r"\(8\): the list batch may have one entry for each sample"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_is_refused_by_path(name: str) -> None:
    batch, message = REFUSED[name]
    with pytest.raises(BatchError, match=f"{message}(.|\n)*num_microbatches=1"):
        Cutter().cut(batch, 4)
    cut = Cutter().cut(batch, 1)  # the way out
    assert cut.pieces[0] is batch


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_told_may_stay_whole(name: str) -> None:
    batch, message = REFUSED[name]
    cut = Cutter().cut(batch, 4, may_stay=True)
    assert cut.pieces[0] is batch
    assert cut.sizes == [1]
    assert re.search(message, cut.refusal)


def test_after_packed_rows_as_many_as_samples_are_not_theirs() -> None:
    cutter = Cutter()
    packed = {"x": rows(8, 2), "targets": rows(11, 3)}
    alike = {"x": rows(8, 2), "targets": rows(8, 3)}
    assert cutter.cut(packed, 2, source="training", may_stay=True).refusal
    assert cutter.cut(alike, 2, source="training", may_stay=True).pieces == [alike]
    assert cutter.cut(alike, 2, source="validation", may_stay=True).sizes == [4, 4]
    assert cutter.cut({"x": rows(8, 2)}, 2, source="training", may_stay=True).sizes == [4, 4]
    assert cutter.cut(alike, 2, source="training").sizes == [4, 4]


def test_nested_tensors_are_refused() -> None:
    nested = torch.nested.nested_tensor([rows(3), rows(2)], layout=torch.jagged)
    with pytest.raises(BatchError, match=r"batch\['x'\] is a nested tensor"):
        Cutter().cut({"x": nested, "y": rows(2)}, 2)


def test_with_torchs_own_collate_function_lists_are_fields() -> None:
    ordinary = Hint(frozenset({8}), default_collate=True)
    for size in (8, 3, 2):
        cut = Cutter().cut([rows(size, 2)] * 3, 2, ordinary)
        assert [piece[0].shape[0] for piece in cut.pieces] == cut.sizes


def test_an_ordinary_batch_is_cut_in_no_time() -> None:
    cutter, batch = Cutter(), {"input_ids": rows(32, 8), "attention_mask": rows(32, 8), "labels": rows(32, 8)}
    best = float("inf")
    for _ in range(50):
        start_s = time.perf_counter()
        cutter.cut(copy.copy(batch), 8, hint(32))
        best = min(best, time.perf_counter() - start_s)
    assert best < 0.001


_SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=2)
_LEAVES = st.one_of(
    st.tuples(_SHAPES, st.sampled_from([torch.float32, torch.int64])).map(
        lambda each: torch.zeros(each[0], dtype=each[1])
    ),
    st.sampled_from([7, "text", None]),
)
_BATCHES = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=4),
        st.lists(inner, min_size=1, max_size=4).map(tuple),
        st.dictionaries(st.sampled_from("xyz"), inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


def _outcome(cutter: Cutter, batch: Any, hint: Hint, may_stay: bool) -> str:
    try:
        return repr(cutter.cut(batch, 2, hint, may_stay=may_stay))
    except BatchError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(
    some=st.lists(_BATCHES, min_size=1, max_size=3),
    order=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.booleans()), min_size=2, max_size=8),
    may_stay=st.booleans(),
)
def test_what_is_remembered_of_a_form_says_what_reading_it_does(
    some: list[Any], order: list[tuple[int, int, bool]], may_stay: bool
) -> None:
    remembers, forgets = Cutter(), Cutter()
    for index, size, default in order:
        batch, given = some[index % len(some)], Hint(frozenset({size} if size else ()), default)
        forgets._seen.clear()
        assert _outcome(remembers, batch, given, may_stay) == _outcome(forgets, batch, given, may_stay)
