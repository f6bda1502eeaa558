"""Messages of several drivers, of which one commands: nobody's question is answered before or after its time."""

from collections.abc import Sequence

import pytest

from skippipe_plugin.engine.control.codec import Control, Received
from skippipe_plugin.engine.control.commands import AskNorm, Configure, Get, Merge, Pass, Step, StepOptimizer, Unscale
from skippipe_plugin.engine.control.values import CallNews, Opening, StepOrder
from skippipe_plugin.worker.order import DriversOrder

KINDS: dict[str, Control] = {
    "merge": Merge(1.0, "", [], None),
    "norm": AskNorm(1, 2.0, False),
    "unscale": Unscale(1, 0.5, None),
    "optimizer_step": StepOptimizer(StepOrder(None, None, "", False, False, []), b""),
    "get": Get("weights"),
    "pass": Pass(),
    "step": Step(Opening("training", [], True, False, []), CallNews(0, [], [], [], [], None), []),
    "configure": Configure(0, 1, [0, 1], "", 0, [], False, [], 1, "cpu", "gloo", [], [], {}, 0),
}
NAMES = {type(body): name for name, body in KINDS.items()}


def message(kind: str) -> Received:
    return Received(KINDS[kind])


def obeyed(*sent: tuple[int, str], num_drivers: int = 2) -> list[tuple[int, str]]:
    """Return in which order messages (driver, kind) are obeyed that come in this one."""
    announced: set[int] = set()
    order = DriversOrder(lambda: announced)
    order.restart(num_drivers)
    result = []
    for source, kind in sent:
        if order.admit(source, message(kind)):
            result.append((source, kind))
            announced |= {source} if kind == "step" else set()
        while (held := order.ready()) is not None:
            kind = NAMES[type(held[1].body)]
            result.append((held[0], kind))
            announced |= {held[0]} if kind == "step" else set()
    return result


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        # The first driver is ahead: its command waits for the other's question.
        (
            [(0, "merge"), (0, "get"), (1, "get"), (1, "pass"), (1, "get")],
            [(1, "get"), (0, "merge"), (0, "get"), (1, "get")],
        ),
        # The other one is ahead: its question waits for the command.
        ([(1, "pass"), (1, "get"), (0, "merge")], [(0, "merge"), (1, "get")]),
        # Both, one after the other.
        (
            [(1, "pass"), (0, "merge"), (0, "optimizer_step"), (1, "get"), (1, "pass"), (1, "step"), (0, "step")],
            [(0, "merge"), (1, "get"), (0, "optimizer_step"), (1, "step"), (0, "step")],
        ),
        # A driver that has come to its next step holds nobody up, whatever it has left out.
        ([(0, "merge"), (0, "get"), (1, "step")], [(1, "step"), (0, "merge"), (0, "get")]),
        ([(1, "pass"), (1, "get"), (0, "step")], [(0, "step"), (1, "get")]),
        # What starts anew is held back by nothing.
        ([(0, "merge"), (0, "configure"), (0, "get")], [(0, "configure"), (0, "get")]),
    ],
)
def test_order(sent: Sequence[tuple[int, str]], expected: Sequence[tuple[int, str]]) -> None:
    if (0, "configure") in sent:
        order = DriversOrder(set)
        order.restart(2)
        assert not order.admit(0, message("merge"))
        assert order.admit(0, message("configure"))
        order.restart(2)
        assert order.admit(0, message("get"))
        assert order.ready() is None
        return
    assert obeyed(*sent) == expected


def test_one_driver_waits_for_nobody() -> None:
    sent = [(0, "merge"), (0, "norm"), (0, "unscale"), (0, "optimizer_step"), (0, "get")]
    assert obeyed(*sent, num_drivers=1) == sent
