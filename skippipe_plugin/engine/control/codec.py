"""Typed messages as a channel carries them: a kind (the class's name), JSON fields, and blobs; checked on arrival.

What a field may be is said once, by its annotation: ``int``, ``float``, ``bool``, ``str``, ``None``, ``Literal`` of
strings, ``Sequence``, ``tuple`` of a fixed length, ``Mapping`` from strings, a frozen dataclass of such fields, and
``Any`` for JSON that is somebody else's. A ``Buffer`` is a blob, and ``Sequence[Buffer]``, which comes last, those that
are left. A message that does not fit is a ChannelError that names it and the field.
"""

from __future__ import annotations

import dataclasses
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Final, Literal, Union

from ..channel import Buffer, ChannelError, Message

_SCALARS: Final[Mapping[Any, frozenset[type]]] = {
    int: frozenset({int}),
    float: frozenset({float, int}),
    bool: frozenset({bool}),
    str: frozenset({str}),
    types.NoneType: frozenset({types.NoneType}),
}
_BLOBS: Final = Sequence[Buffer]
_VALUES: Final = "values"
"""The fields, in the order of the class: both ends have the same version, so that names would say nothing."""
_GENERATION: Final = "generation"
"""What answers say beside their fields: the generation of who answers."""


class Control:
    """A message; every kind is a frozen dataclass."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class Received:
    """A message that has come, and what its channel says of it."""

    body: Control
    number: int = -1
    """The how-many-eth message of the other end it is, from 0."""
    answers: int = -1
    """The number of this end's message that it answers; -1: none in particular."""
    generation: int = -1
    """The generation that who answers was in."""


class Vocabulary:
    """The messages that one end may send to the other.

    Args:
        to: Who takes them, for errors.
        kinds: Their classes.
    """

    def __init__(self, to: str, kinds: Iterable[type[Control]]) -> None:
        self._to = to
        self.kinds: Mapping[str, type[Control]] = {kind.__name__: kind for kind in kinds}
        self._forms = {name: _form_of(kind) for name, kind in self.kinds.items()}

    def encode(self, body: Control, generation: int = -1) -> tuple[str, dict[str, Any], Sequence[Buffer]]:
        """Return kind, fields and blobs; who answers names its generation."""
        kind = type(body).__name__
        values, blobs = self._forms[kind].take_apart(body)
        return kind, {_VALUES: values} if generation < 0 else {_VALUES: values, _GENERATION: generation}, blobs

    def decode(self, message: Message) -> Received:
        """Invert :meth:`encode`.

        Raises:
            ChannelError: It is none of these messages, or a field is missing, too much, or not of its type.
        """
        form, said = self._forms.get(message.kind), message.fields
        if form is None:
            raise ChannelError(f"{message.kind!r} is no message that a {self._to} takes")
        values, generation = said.get(_VALUES), said.get(_GENERATION, -1)
        if type(values) is not list or type(generation) is not int or len(said) != 1 + (_GENERATION in said):
            raise ChannelError(f"the message {message.kind!r} is not the list of its fields but {_short(said)}")
        try:
            body = form.put_together(values, message.blobs)
        except _Wrong as error:
            raise ChannelError(f"the message {message.kind!r} {error}") from None
        return Received(body, message.number, message.answers, generation)


class _Wrong(Exception):
    """What has come does not fit its annotation; the text goes on after the name of what is wrong."""


@dataclass(frozen=True, slots=True)
class _Check:
    """What a JSON value must be: of one of the types, and then what ``deeper`` makes of it."""

    types: frozenset[type] | None
    deeper: Callable[[Any], Any] | None = None  # Any: JSON

    def __call__(self, value: Any) -> Any:  # Any: JSON
        if self.types is not None and type(value) not in self.types:
            raise _Wrong(_short(value))
        return value if self.deeper is None or value is None else self.deeper(value)


class _Form:
    """How the fields of one dataclass travel."""

    def __init__(self, kind: type) -> None:
        hints = typing.get_type_hints(kind)
        names = [field.name for field in dataclasses.fields(kind)]
        self._kind = kind
        self._rest = bool(names) and hints[names[-1]] == _BLOBS
        self._num_blobs = sum(hints[name] == Buffer for name in names)
        self._names = names[: len(names) - self._num_blobs - self._rest]
        self._blob_names = names[len(self._names) :]
        assert all(hints[name] not in (Buffer, _BLOBS) for name in self._names), f"{kind.__name__}: blobs come last"
        self._hints = {name: hints[name] for name in self._names}
        checks = [_check_of(hint) for hint in self._hints.values()]
        self._types = [check.types for check in checks]
        self._deeper = [(at, check.deeper) for at, check in enumerate(checks) if check.deeper is not None]
        taking = [_taken_apart(hint) for hint in self._hints.values()]
        self._nested = [(at, take) for at, take in enumerate(taking) if take is not None]
        self._fields_of, self._blobs_of = _all_of(self._names), _all_of(self._blob_names)
        self._fitting: set[tuple[type, ...]] = set()
        """Types of all fields together that were found to fit: there are few."""

    def take_apart(self, value: object) -> tuple[list[Any], Sequence[Buffer]]:
        if not self._blob_names:
            return self.values_of(value), ()
        blobs = self._blobs_of(value)
        return self.values_of(value), [*blobs[:-1], *blobs[-1]] if self._rest else blobs

    def values_of(self, value: object) -> list[Any]:
        values = [*self._fields_of(value)]
        for at, take in self._nested:
            values[at] = take(values[at])
        return values

    def put_together(self, values: list[Any], blobs: Sequence[Buffer]) -> Any:  # Any: of the class
        num = self._num_blobs
        if len(blobs) != num and (len(blobs) < num or not self._rest):
            raise _Wrong(f"should have {num} blobs ({', '.join(self._blob_names)}), and has {len(blobs)}")
        self._check(values)
        return self._kind(*values, *blobs[:num], blobs[num:]) if self._rest else self._kind(*values, *blobs)

    def built(self, values: list[Any]) -> Any:  # Any: of the class
        self._check(values)
        return self._kind(*values)

    def _check(self, values: list[Any]) -> None:
        """Check the fields, and make in place of them what they stand for."""
        if len(values) != len(self._names):
            raise _Wrong(f"has {len(values)} fields instead of {len(self._names)} ({', '.join(self._names)})")
        together = tuple(map(type, values))
        if together not in self._fitting:
            self._check_types(together, values)
        at = 0
        try:
            for at, deeper in self._deeper:
                if values[at] is not None:
                    values[at] = deeper(values[at])
        except _Wrong as error:
            raise self._wrong(at, str(error)) from None

    def _check_types(self, together: tuple[type, ...], values: Sequence[Any]) -> None:
        for at, (is_a, allowed) in enumerate(zip(together, self._types, strict=True)):
            if allowed is not None and is_a not in allowed:
                raise self._wrong(at, _short(values[at]))
        if None not in self._types:
            self._fitting.add(together)

    def _wrong(self, at: int, why: str) -> _Wrong:
        name = self._names[at]
        return _Wrong(f"has {name!r} that is no {_told(self._hints[name])}: {why}")


def _all_of(names: Sequence[str]) -> Callable[[Any], tuple[Any, ...]]:  # Any: what has these
    """Return what gets the attributes of these names as a tuple, however many they are."""
    if not names:
        return lambda _: ()
    if len(names) > 1:
        return attrgetter(*names)
    get = attrgetter(*names)
    return lambda value: (get(value),)


_FORMS: Final[dict[type, _Form]] = {}


def _form_of(kind: type) -> _Form:
    if kind not in _FORMS:
        _FORMS[kind] = _Form(kind)
    return _FORMS[kind]


def _check_of(hint: Any) -> _Check:  # Any: an annotation
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return _Check(None)
    if hint in _SCALARS:
        return _Check(_SCALARS[hint])
    if origin is Literal:
        return _Check(_SCALARS[str], _one_of(frozenset(args)))
    if origin in (Union, types.UnionType):
        checks = [_check_of(each) for each in args]
        deeper = [check.deeper for check in checks if check.deeper is not None]
        assert len(deeper) < 2, f"{hint}: only one alternative may have parts"
        return _Check(frozenset().union(*(check.types or () for check in checks)), *deeper)
    if origin is tuple:
        return _Check(frozenset({list}), _fixed([_check_of(each) for each in args]))
    if origin is Sequence:
        return _Check(frozenset({list}), _each_of(_check_of(args[0])))
    if origin is Mapping:
        return _Check(frozenset({dict}), _values_of(_check_of(args[1])))
    return _Check(frozenset({list}), _form_of(hint).built)


def _one_of(allowed: frozenset[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in allowed:
            raise _Wrong(_short(value))
        return value

    return check


def _each_of(item: _Check) -> Callable[[list[Any]], list[Any]]:
    allowed, deeper = item.types, item.deeper
    if allowed is None:
        return lambda values: values

    def check(values: list[Any]) -> list[Any]:
        if not allowed.issuperset(map(type, values)):
            raise _Wrong(_short(values))
        return values

    if deeper is None:
        return check
    return lambda values: [value if value is None else deeper(value) for value in check(values)]


def _values_of(item: _Check) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: {name: item(value) for name, value in values.items()}


def _fixed(items: Sequence[_Check]) -> Callable[[list[Any]], tuple[Any, ...]]:
    size = len(items)

    def check(values: list[Any]) -> tuple[Any, ...]:
        if len(values) != size:
            raise _Wrong(_short(values))
        return tuple([item(value) for item, value in zip(items, values, strict=True)])

    return check


def _taken_apart(hint: Any) -> Callable[[Any], Any] | None:  # Any: an annotation, and what it describes
    """Return what makes JSON of a value with dataclasses in it; None where there are none."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _form_of(hint).values_of
    origin, inner = typing.get_origin(hint), [_taken_apart(each) for each in typing.get_args(hint)]
    found = [take for take in inner if take is not None]
    if not found:
        return None
    if origin is tuple:
        return lambda value: [each if take is None else take(each) for take, each in zip(inner, value, strict=True)]
    (one,) = found
    if origin is Sequence:
        return lambda value: [one(each) for each in value]
    assert origin in (Union, types.UnionType), f"{hint}: no dataclass may stand there"
    return lambda value: value if value is None else one(value)


def _told(hint: Any) -> str:  # Any: an annotation
    text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
    return text.replace("collections.abc.", "").replace("typing.", "")


def _short(value: object) -> str:
    return reprlib.repr(value)
