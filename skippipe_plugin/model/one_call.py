"""One call of a loop's model, and what it is called with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model is called with."""


@dataclass(frozen=True, slots=True)
class CutCall:
    """One call of the model, cut into microbatches."""

    calls: list[Call]
    sizes: list[int]
    uncut: str = ""
    """Why it is a single one, where it is trained on and cannot be cut."""


def code_of(function: Callable[..., Any]) -> Hashable:
    """Return what tells functions of a loop apart: those that it makes anew for each batch have one code."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__code__", None) or getattr(type(function), "__qualname__", "")


def asks_for_cache(kwargs: Mapping[str, Any]) -> bool:
    """Whether a call of a model says that others will go on from its key-value cache, by the names of transformers."""
    return kwargs.get("use_cache") is True or not kwargs.keys().isdisjoint(("past_key_values", "cache"))


def given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return what a loop calls its batch: the arguments by name, or the only argument there is."""
    if not args:
        return kwargs
    return args[0] if len(args) == 1 and not kwargs else (args, kwargs)
