"""What comes to a worker with blocks is checked as it arrives: nonsense is an error of the channel, and no other."""

import json
from typing import Any

import pytest

from skippipe_plugin.engine.channel import ChannelError, Message
from skippipe_plugin.engine.control.commands import Arrange
from skippipe_plugin.engine.control.keeping import Records
from skippipe_plugin.engine.control.messages import TO_DRIVER, TO_WORKER
from skippipe_plugin.engine.control.values import Record, Stand, StepOrder
from skippipe_plugin.engine.parcel import Parcel, pack_records, unpack_records

ORDER = StepOrder(None, 0.5, "drop", True, False, [(1, 1.1)])
ENTRY = ("0\tw", [2], "float32", [])
RECORD = Record("base", 1, 2, False, [ENTRY], ORDER)
PARCEL = Parcel(
    structure=(([ENTRY], []), [b"structure", b"s"]),
    weights=([ENTRY], [b"w"]),
    gradients=([], []),
    optimizer=([ENTRY], [b"rest", b"o"]),
    attributes=([ENTRY], [b"a"]),
    plan=b"plan",
    records={"base": (RECORD, [b"r", b"", b"r"]), "empty": (Record("empty", 1, 2, True, []), [])},
)
PARTS, BLOBS = PARCEL.pack()
WITHOUT_PARTS = ([(1, [0], [])], [], {}, 1, [], [], Stand())


def arrived(parts: Any, blobs: list[bytes]) -> Arrange:
    """An order with these parts, in JSON, as a worker takes it."""
    kind, fields, _ = TO_WORKER.encode(Arrange(*WITHOUT_PARTS, PARTS, b"", blobs))
    values = json.loads(json.dumps([*fields["values"][:-1], parts]))
    body = TO_WORKER.decode(Message(kind, {"values": values}, [b"", *blobs])).body
    assert isinstance(body, Arrange)
    return body


def said() -> list[Any]:
    """The parts in JSON."""
    values: list[Any] = TO_WORKER.encode(Arrange(*WITHOUT_PARTS, PARTS, b"", BLOBS))[1]["values"][-1]
    return json.loads(json.dumps(values))  # type: ignore[no-any-return]


def test_it_arrives_as_it_was_sent() -> None:
    order = arrived(said(), BLOBS)
    assert Parcel.unpack(order.parts, order.blobs) == PARCEL


def places_in(value: Any, path: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Where in nested lists something stands."""
    inner = [p for at, each in enumerate(value) for p in places_in(each, (*path, at))] if type(value) is list else []
    return [path, *inner]


@pytest.mark.parametrize("place", places_in(said()), ids=str)
def test_nonsense_anywhere_is_an_error_that_names_the_field(place: tuple[int, ...]) -> None:
    parts = [said()]
    *way, last = (0, *place)
    owner = parts
    for at in way:
        owner = owner[at]
    owner[last] = {"no": "such thing"}
    with pytest.raises(ChannelError, match="the message 'Arrange' has 'parts' that is no Parts"):
        arrived(parts[0], BLOBS)


@pytest.mark.parametrize("blobs", [BLOBS[:-1], [*BLOBS, b""], BLOBS[:3], []])
def test_other_blobs_than_are_told_are_an_error(blobs: list[bytes]) -> None:
    order = arrived(said(), blobs)
    with pytest.raises(ChannelError, match="blobs"):
        Parcel.unpack(order.parts, order.blobs)


@pytest.mark.parametrize("count", [-1, 2, 1 << 70])
def test_records_that_do_not_fit_their_blobs_are_an_error(count: int) -> None:
    entries, blobs = pack_records([(RECORD, [b"r"])])
    kind, fields, _ = TO_DRIVER.encode(Records(entries, blobs))
    assert unpack_records(entries, blobs) == {"base": (RECORD, [b"r"])}
    fields["values"][0][0][1] = count
    body = TO_DRIVER.decode(Message(kind, json.loads(json.dumps(fields)), blobs)).body
    assert isinstance(body, Records)
    with pytest.raises(ChannelError, match="what is packed should have"):
        unpack_records(body.records, body.blobs)
