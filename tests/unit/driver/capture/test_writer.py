"""What each worker is told of calls: whatever it lacks once, the same text for all who lack nothing."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from skippipe_plugin.driver.capture.side_inputs import PreparedCall
from skippipe_plugin.driver.capture.writer import CallWriter
from skippipe_plugin.engine.call import Call
from skippipe_plugin.engine.control.commands import Calls
from skippipe_plugin.engine.control.line import Said
from skippipe_plugin.engine.wire import CallDecoder
from skippipe_plugin.schedule import Path


@dataclass
class _Link:
    rank: int
    told: list[Any] = field(default_factory=list)

    def send(self, body: Any) -> None:
        self.told.append(body)


class _Spec:  # the writer and the decoder look at nothing else of one
    on_host = ()


def _calls(digests: list[tuple[str, ...]]) -> list[PreparedCall]:
    tensors = {name: torch.full((2,), float(ord(name))) for each in digests for name in each}
    return [
        PreparedCall(index, Call(_Spec(), tuple(tensors[name] for name in each), 10 + index), 7, each)  # type: ignore[arg-type]
        for index, each in enumerate(digests)
    ]


@pytest.mark.parametrize("paths", [["0: 1@1 2@2 3@3"] * 3, ["0: 1@1 3@3", "0: 1@1 2@2", "0: 1@1 2@2 3@3"]])
def test_every_worker_can_read_what_it_is_told(paths: list[str]) -> None:
    links = [_Link(rank) for rank in (1, 2, 3)]
    writer = CallWriter(links, None)  # type: ignore[arg-type]
    parsed = [Path.parse(path) for path in paths]
    steps = [[("a",), ("a", "b"), ()], [("a",), ("b",), ()], [("c",), (), ("a", "b")], [("c",), (), ("a", "b")]]
    decoders = {link.rank: CallDecoder(lambda tensor: tensor) for link in links}
    for step, digests in enumerate(steps):
        calls = _calls(digests)
        writer.send(step, calls[:2], parsed, None)
        writer.send(step, calls[2:], parsed, None)
        for link in links:
            heard = {}
            for body in link.told:
                told = body.body if isinstance(body, Said) else body
                assert isinstance(told, Calls)
                assert told.news.step == step
                heard.update(decoders[link.rank].decode(told.news, told.blobs))
            visiting = [at for at, path in enumerate(parsed) if any(visit.rank == link.rank for visit in path.visits)]
            assert list(heard) == visiting
            for at in visiting:
                assert heard[at].seed == calls[at].call.seed
                assert [t.tolist() for t in heard[at].side_inputs] == [t.tolist() for t in calls[at].call.side_inputs]
            link.told.clear()


def test_who_lacks_nothing_is_told_the_same_text() -> None:
    links = [_Link(rank) for rank in (1, 2, 3)]
    writer = CallWriter(links, None)  # type: ignore[arg-type]
    paths = [Path.parse("0: 1@1 2@2 3@3")] * 2
    for step in range(2):
        writer.send(step, _calls([("a",), ()]), paths, None)
    for link in links:
        first, second = link.told
        assert not isinstance(first, Said)
        assert second is links[0].told[1]
        assert isinstance(second, Said)
        assert not second.blobs


def test_side_inputs_in_use_are_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker forgets what it needed longest ago, and what only the short way has named since counts as needed."""
    monkeypatch.setattr("skippipe_plugin.driver.capture.side_inputs._KEPT_BYTES", 20)
    (link,) = links = [_Link(1)]
    writer = CallWriter(links, None)  # type: ignore[arg-type]
    decoder, paths = CallDecoder(lambda tensor: tensor), [Path.parse("0: 1@1")] * 2
    for digests in (("a",), ("b",), ("a",), ("c",), ("a",), ("b",)):
        writer.send(0, _calls([digests]), paths, None)
    sent = []
    for body in link.told:
        told = body.body if isinstance(body, Said) else body
        sent.append([entry[0] for entry in told.news.lacking.side_inputs] if told.news.lacking else [])
        assert len(decoder.decode(told.news, told.blobs)) == 1
    assert sent == [["a"], ["b"], [], ["c"], [], ["b"]]
