"""Orders for the routers of one process, a worker or a driver."""

from __future__ import annotations

from ..engine.control.answers import RouterNews
from ..engine.control.commands import AskRouters
from ..moe.board import RouterBoard


def obey(board: RouterBoard, order: AskRouters) -> RouterNews:
    """Carry an order out and answer."""
    statistics = board.take() if order.take else {}
    board.set_biases(order.biases)
    board.update_biases(order.loads, order.rule, order.rate)
    return RouterNews(statistics, board.given_biases())
