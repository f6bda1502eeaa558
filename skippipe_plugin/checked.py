"""Settings that check themselves, wherever they come from: constructors, command lines, YAML, the environment.

What a setting may be follows from its annotation, once; ranges of numbers are named beside it. Imports no torch.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import inspect
import math
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar, Union

_T = TypeVar("_T")


class SettingError(ValueError, TypeError):
    """A setting cannot be what it was set to; the message names it, its value, and what is allowed."""


@dataclass(frozen=True, slots=True)
class Range:
    """Which numbers a setting may be.

    >>> str(Range(0, 1, includes_most=False))
    'of at least 0 and below 1'
    """

    least: float
    most: float
    includes_least: bool = True
    includes_most: bool = True

    def __contains__(self, value: float) -> bool:
        above = self.least <= value if self.includes_least else self.least < value
        return above and (value <= self.most if self.includes_most else value < self.most)

    def __str__(self) -> str:
        least = f"of at least {self.least:,}" if self.includes_least else f"above {self.least:,}"
        most = f"and at most {self.most:,}" if self.includes_most else f"and below {self.most:,}"
        return least if math.isinf(self.most) else f"{least} {most}"


COUNT: Final = Range(1, 1_000_000)
"""How many of something there are; more are a mistake."""
COUNT_OR_NONE: Final = Range(0, 1_000_000)
NUM_PROCESSES: Final = Range(1, 10_000)
NUM_SPARES: Final = Range(0, 10_000)
STEP: Final = Range(0, 2**63 - 1)
SECONDS: Final = Range(0, 10_000_000, includes_least=False)
PART: Final = Range(0, 1, includes_least=False, includes_most=False)
SHARE: Final = Range(0, 1, includes_most=False)
_ANY: Final = {int: Range(-(2**63), 2**63 - 1), float: Range(-1e300, 1e300)}


def checked(**ranges: Range) -> Callable[[type[_T]], type[_T]]:
    """Let the constructor of a class check what it is given by its annotations.

    Args:
        ranges: By setting: which numbers it may be. Others may be any finite one.

    >>> @checked(width=COUNT)
    ... @dataclass(frozen=True)
    ... class Sizes:
    ...     width: int = 4
    >>> Sizes(width=True)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    skippipe_plugin.checked.SettingError: width=True is of the wrong type (bool); it is a whole number of at least 1...
    >>> Sizes(widht=3)
    Traceback (most recent call last):
    ...
    skippipe_plugin.checked.SettingError: there is no setting 'widht' of Sizes; did you mean 'width'? There are: width
    """

    def decorate(cls: type[_T]) -> type[_T]:
        allowed = {name: each for base in reversed(cls.__mro__) for name, each in _ranges_of(base).items()} | ranges
        cls.__init__ = checked_call(cls.__init__, cls.__name__, **allowed)  # type: ignore[method-assign]
        return cls

    return decorate


def checked_call(function: Callable[..., Any], owner: str, **ranges: Range) -> Callable[..., Any]:
    """Return a constructor that checks its arguments before it runs; see :func:`checked`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    kinds = inspect.Parameter
    named = {each.name: each for each in parameters if each.kind not in (kinds.VAR_KEYWORD, kinds.VAR_POSITIONAL)}
    positional = [each.name for each in parameters if each.kind is kinds.POSITIONAL_OR_KEYWORD]
    takes_more = {each.kind for each in parameters}
    hints: dict[str, Any] = {}  # Any: annotations

    @functools.wraps(function)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = dict(zip(positional, args, strict=False)) | kwargs
        if len(args) > len(positional) and kinds.VAR_POSITIONAL not in takes_more:
            raise SettingError(f"{owner} takes its settings by name: {', '.join(named)}")
        if kinds.VAR_KEYWORD not in takes_more:
            unknown_settings(kwargs, named, owner)
        if not hints:
            hints.update(_hints(function, self))
        for name, value in given.items():
            if name not in named:
                continue  # another class's
            default = named[name].default
            if not (value is default and isinstance(default, (bool, int, float, str, type(None)))):
                check(name, value, hints.get(name, Any), ranges.get(name))
        function(self, *args, **kwargs)

    __init__._skippipe_ranges = ranges  # type: ignore[attr-defined]
    return __init__


def check(name: str, value: object, annotation: Any, limits: Range | None = None) -> None:
    """Check one value.

    Raises:
        SettingError: It is not what its annotation and range allow.
    """
    problem = _problem(value, annotation, limits)
    if problem:
        raise SettingError(f"{name}={shown(value)} is {problem}; it is {describe(annotation, limits)}")


def unknown_settings(given: Iterable[object], known: Iterable[str], where: str) -> None:
    """Refuse names that are no settings, such as keys of a file.

    Raises:
        SettingError: There is one.
    """
    known = list(known)
    for name in given:
        if name not in known:
            raise _unknown(name, known, where)


def shown(value: object) -> str:
    """Write a value for a message: short, and without failing."""
    try:
        return reprlib.repr(value)
    except Exception:  # objects whose repr fails, numbers of more digits than Python writes
        return f"<{type(value).__name__}>"


def _unknown(name: object, known: Iterable[str], owner: str) -> SettingError:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, 1)
    guess = f"did you mean {close[0]!r}? There are" if close else "there are"
    return SettingError(f"there is no setting {shown(name)} of {owner}; {guess}: {', '.join(known)}")


def _ranges_of(cls: type) -> Mapping[str, Range]:
    return getattr(vars(cls).get("__init__"), "_skippipe_ranges", {})


def _hints(function: Callable[..., Any], owner: Any) -> dict[str, Any]:
    """Return the annotations of a constructor; a dataclass inherits fields of other modules, with names of theirs.

    Names inside of them stay as they are (what a function takes, for instance): nobody looks there.
    """
    cls: type = type(owner)
    if not dataclasses.is_dataclass(cls):
        return _evaluated(function.__annotations__, vars(sys.modules[function.__module__]))
    found: dict[str, Any] = {}
    for base in reversed(cls.__mro__):
        found |= _evaluated(vars(base).get("__annotations__", {}), vars(sys.modules[base.__module__]))
    return found


def _evaluated(annotations: Mapping[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    return {name: eval(each, names) if isinstance(each, str) else each for name, each in annotations.items()}


# ------------------------------------------------------------------ what annotations mean


def _options(annotation: Any) -> list[Any]:
    """Return the annotations of which any will do."""
    if typing.get_origin(annotation) in (Union, types.UnionType):
        return [option for each in typing.get_args(annotation) for option in _options(each)]
    return [annotation]


def _problem(value: object, annotation: Any, limits: Range | None) -> str:
    """Say what is wrong with a value; nothing if it will do."""
    options = _options(annotation)
    problems = [_mismatch(value, option, limits) for option in options]
    if "" in problems:
        return ""
    if isinstance(value, str) and any(typing.get_origin(option) is Literal for option in options):
        return "unknown"
    return next((each for each in problems if each != _WRONG), f"of the wrong type ({type(value).__name__})")


_WRONG: Final = "wrong"


def _mismatch(value: object, option: Any, limits: Range | None) -> str:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if option is Any:
        return ""
    if option is None or option is type(None):
        return "" if value is None else _WRONG
    if origin is Literal:
        return "" if any(type(value) is type(each) and value == each for each in arguments) else _WRONG
    if option in (int, float):
        return _number_problem(value, option, limits)
    if option in (bool, str):
        return "" if isinstance(value, option) else _WRONG
    if origin is tuple:
        return _items_problem(value, arguments[0], limits) if isinstance(value, tuple) else _WRONG
    if origin is collections.abc.Sequence:
        return _items_problem(value, arguments[0], limits) if isinstance(value, (list, tuple)) else _WRONG
    if origin is not None and isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        if not isinstance(value, Mapping):
            return _WRONG
        return _items_problem(value, arguments[0], None) or _items_problem(value.values(), arguments[1], None)
    if origin is collections.abc.Callable or getattr(option, "_is_protocol", False):
        return "" if callable(value) and not isinstance(value, type) else _WRONG
    kind = origin or option
    return "" if isinstance(kind, type) and isinstance(value, kind) else _WRONG


def _number_problem(value: object, kind: Any, limits: Range | None) -> str:
    if isinstance(value, bool) or not isinstance(value, (int,) if kind is int else (int, float)):
        return _WRONG
    assert isinstance(value, (int, float))
    if isinstance(value, float) and not math.isfinite(value):
        return "not a finite number"
    return "" if value in (limits or _ANY[kind]) else "out of range"


def _items_problem(values: Iterable[object], annotation: Any, limits: Range | None) -> str:
    for each in values:
        if problem := _problem(each, annotation, limits):
            return f"not all {_plural(annotation)} ({shown(each)} is {problem})"
    return ""


def describe(annotation: Any, limits: Range | None = None) -> str:
    """Say in words what an annotation allows.

    >>> describe(int | None, COUNT), describe(Literal["a", "b"]), describe(bool)
    ('a whole number of at least 1 and at most 1,000,000, or None', "one of 'a', 'b'", 'True or False')
    """
    *first, last = [_words(option, limits) for option in _options(annotation)]
    return f"{', '.join(first)}, or {last}" if first else last


def _words(option: Any, limits: Range | None) -> str:
    origin, arguments = typing.get_origin(option), typing.get_args(option)
    if option is None or option is type(None):
        return "None"
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if option in (int, float):
        word = "a whole number" if option is int else "a finite number"
        return word if limits is None else f"{word} {limits}"
    if origin is tuple:
        return f"a tuple of {_plural(arguments[0])}"
    if origin is collections.abc.Sequence:
        return f"a list of {_plural(arguments[0])}"
    if origin is not None and isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return f"a mapping of {_plural(arguments[0])} to {_plural(arguments[1])}"
    if origin is collections.abc.Callable or getattr(option, "_is_protocol", False):
        return "a function"
    words = {bool: "True or False", str: "a text", os.PathLike: "a path"}
    kind = origin or option
    if kind in words:
        return words[kind]
    name = getattr(kind, "__name__", str(kind))
    return f"a {name} such as {name}(...)" if dataclasses.is_dataclass(kind) else f"a {name}"


def _plural(annotation: Any) -> str:
    if typing.get_origin(annotation) is Literal:
        return "these"
    return {int: "whole numbers", float: "numbers", str: "texts"}.get(annotation, "what it may hold")
