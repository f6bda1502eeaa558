"""Typed messages: what arrives is what was sent, and what does not fit its class is an error that names the field."""

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skippipe_plugin.engine.channel import Buffer, ChannelError, Message
from skippipe_plugin.engine.control.answers import Done, Failed
from skippipe_plugin.engine.control.codec import Control, Vocabulary
from skippipe_plugin.engine.control.commands import AskNorm, Clip, Get, Merge, StepOptimizer
from skippipe_plugin.engine.control.messages import TO_DRIVER, TO_WORKER
from skippipe_plugin.engine.control.values import StepOrder, Writes

EVERY = [(vocabulary, kind) for vocabulary in (TO_WORKER, TO_DRIVER) for kind in vocabulary.kinds.values()]
NAMES = [f"{kind.__name__}" for _, kind in EVERY]
ODD: list[Any] = [None, True, 7, -1, 0.5, "", "x", [], [None], [[]], [1, 2], ["x"], {}, {"a": None}, {"a": [1]}]
SCALARS = {int: st.integers(), float: st.floats(allow_nan=False), bool: st.booleans(), str: st.text(max_size=5)}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """What a field may be."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint == Buffer:
        return st.binary(max_size=5)
    if hint is Any:
        return st.sampled_from(ODD)
    if hint is types.NoneType:
        return st.none()
    if hint in SCALARS:
        return SCALARS[hint]
    if origin is Literal:
        return st.sampled_from(args)
    if origin in (Union, types.UnionType):
        return st.one_of(*map(values_of, args))
    if origin is tuple:
        return st.tuples(*map(values_of, args))
    if origin is Sequence:
        return st.lists(values_of(args[0]), max_size=3)
    if origin is Mapping:
        return st.dictionaries(st.text(max_size=5), values_of(args[1]), max_size=3)
    return st.builds(hint, *(values_of(each) for each in typing.get_type_hints(hint).values()))


def fits(hint: Any, value: Any) -> bool:
    """Whether JSON is what an annotation says, told in another way than the codec tells it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint in (int, str, bool):
        return type(value) is hint
    if hint is float:
        return type(value) in (int, float)
    if hint is types.NoneType:
        return value is None
    if origin is Literal:
        return type(value) is str and value in args
    if origin in (Union, types.UnionType):
        return any(fits(each, value) for each in args)
    if origin is Mapping:
        return type(value) is dict and all(fits(args[1], each) for each in value.values())
    if origin is Sequence:
        return type(value) is list and all(fits(args[0], each) for each in value)
    args = args if origin is tuple else tuple(typing.get_type_hints(hint).values())
    return type(value) is list and len(value) == len(args) and all(map(fits, args, value))


def sent(vocabulary: Vocabulary, body: Control, generation: int = -1) -> tuple[str, dict[str, Any], list[bytes]]:
    kind, fields, blobs = vocabulary.encode(body, generation)
    return kind, json.loads(json.dumps(fields)), [bytes(blob) for blob in blobs]


@pytest.mark.parametrize(("vocabulary", "kind"), EVERY, ids=NAMES)
def test_what_arrives_is_what_was_sent(vocabulary: Vocabulary, kind: type[Control]) -> None:
    @given(values_of(kind), st.integers(-1, 9))
    @settings(max_examples=8, deadline=None)
    def check(body: Control, generation: int) -> None:
        received = vocabulary.decode(Message(*sent(vocabulary, body, generation), 3, 4))
        assert received.body == body
        assert type(received.body) is kind
        assert (received.number, received.answers, received.generation) == (3, 4, generation)

    check()


@pytest.mark.parametrize(("vocabulary", "kind"), EVERY, ids=NAMES)
def test_what_does_not_fit_names_message_and_field(vocabulary: Vocabulary, kind: type[Control]) -> None:
    hints = typing.get_type_hints(kind)
    names = [name for name in hints if hints[name] not in (Buffer, Sequence[Buffer])]
    num_blobs = sum(hint == Buffer for hint in hints.values())
    takes_more = Sequence[Buffer] in hints.values()

    @given(values_of(kind), st.data())
    @settings(max_examples=8, deadline=None)
    def check(body: Control, data: st.DataObject) -> None:
        name, fields, blobs = sent(vocabulary, body)
        for at, each in enumerate(names):
            odd = data.draw(st.sampled_from(ODD))
            values = [*fields["values"][:at], odd, *fields["values"][at + 1 :]]
            altered = Message(name, json.loads(json.dumps({"values": values})), blobs)
            if fits(hints[each], odd):
                vocabulary.decode(altered)
            else:
                with pytest.raises(ChannelError, match=rf"^the message '{name}' has '{each}' that is no "):
                    vocabulary.decode(altered)
        for values in (fields["values"][:-1], [*fields["values"], None]):
            if len(values) != len(names):
                with pytest.raises(ChannelError, match=f"^the message '{name}' has {len(values)} fields instead of"):
                    vocabulary.decode(Message(name, {"values": values}, blobs))
        for altered_blobs in (blobs[:-1], [*blobs, b""]):
            if len(altered_blobs) < num_blobs or (len(altered_blobs) > num_blobs and not takes_more):
                with pytest.raises(ChannelError, match=f"^the message '{name}' should have {num_blobs} blobs"):
                    vocabulary.decode(Message(name, json.loads(json.dumps(fields)), altered_blobs))

    check()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(EVERY), JSON | st.fixed_dictionaries({"values": JSON}), st.lists(st.binary(), max_size=3))
@settings(max_examples=300, deadline=None)
def test_nonsense_is_an_error_of_the_channel_and_no_other(
    known: tuple[Vocabulary, type[Control]], said: Any, blobs: list[bytes]
) -> None:
    vocabulary, kind = known
    fields = said if isinstance(said, dict) else {"values": said}
    with contextlib.suppress(ChannelError):  # it may fit
        vocabulary.decode(Message(kind.__name__, fields, blobs))


@pytest.mark.parametrize(
    ("body", "at", "value", "told"),
    [
        (Get("weights", [1]), 0, "height", r"the message 'Get' has 'what' that is no Literal\[.*\]: 'height'"),
        (Get("weights", [1]), 1, [1, "2"], r"the message 'Get' has 'blocks' that is no Sequence\[int\] \| None: .*'2'"),
        (
            Merge(1.0, "", [], AskNorm(1, 2.0, False)),
            3,
            [1, "two", False],
            r"'norm' .* has 'norm_type' that is no float",
        ),
        (Clip(None, None, ""), 0, True, "the message 'Clip' has 'scale' that is no float | None: True"),
        (
            StepOptimizer(StepOrder(1.0, None, "", True, False, []), b""),
            0,
            [1.0],
            "'order' .* has 1 fields instead of 7",
        ),
    ],
)
def test_errors_lead_to_the_field(body: Control, at: int, value: Any, told: str) -> None:
    kind, fields, blobs = sent(TO_WORKER, body)
    fields["values"][at] = value
    with pytest.raises(ChannelError, match=told):
        TO_WORKER.decode(Message(kind, fields, blobs))


def test_neither_end_takes_what_is_for_the_other() -> None:
    for vocabulary, body in ((TO_WORKER, Done(1, [], Writes(), {})), (TO_DRIVER, Get("weights"))):
        other = TO_DRIVER if vocabulary is TO_WORKER else TO_WORKER
        with pytest.raises(ChannelError, match=f"'{type(body).__name__}' is no message that a "):
            vocabulary.decode(Message(*sent(other, body)))


def test_messages_are_values() -> None:
    for _, kind in EVERY:
        assert dataclasses.is_dataclass(kind)
        assert not hasattr(kind, "__dict__") or "__slots__" in vars(kind), kind
    with pytest.raises(dataclasses.FrozenInstanceError):
        Failed(True, "").aborted = False  # type: ignore[misc]


def test_the_document_has_every_message() -> None:
    text = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [kind.__name__ for _, kind in EVERY if f"`{kind.__name__}`" not in text] == []
