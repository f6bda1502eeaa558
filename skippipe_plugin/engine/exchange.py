"""Rows that change places within a group of ranks, begun without waiting."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .transport import PendingTensor, Transport


class GroupExchange:
    """One subgroup of a generation; implements :class:`skippipe_plugin.moe.parallel.Exchange`.

    Every call is one of all ranks of the group, in the same order on each.
    """

    def __init__(self, transport: Transport, name: str, ranks: Sequence[int]) -> None:
        """Use the subgroup ``name`` of ``ranks``, which is formed."""
        self.size = len(ranks)
        self.position = list(ranks).index(transport.rank)
        self._transport = transport
        self._name = name

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> PendingTensor:
        """Send the first ``send[0]`` of the rows [rows, ...] to the first rank and so on; receive likewise."""
        return self._transport.all_to_all(rows, send, receive, self._name)

    def sum(self, tensor: Tensor) -> None:
        """Sum the host tensor in place over the group."""
        self._transport.all_reduce(tensor, self._name)

    def swap(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Exchange rows and wait."""
        with torch.no_grad():
            return self.all_to_all(rows, send, receive).wait()
