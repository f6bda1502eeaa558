"""What links and compute alone allow a GPipe step over unequal links, without any runtime."""

from __future__ import annotations

from itertools import pairwise

from models import Case
from wan import Matrix


def gpipe_bound_s(case: Case, matrix: Matrix, forward_s: float, backward_s: float) -> float:
    """Play all forwards and then all backwards over the nodes in their order.

    A node computes one action at a time, a link carries one message at a time, and nothing else takes any time.
    """
    nodes = list(range(matrix.num_nodes))
    sweep_s = _sweep(case, matrix, nodes, forward_s, [0.0] * case.num_microbatches)
    return _sweep(case, matrix, nodes[::-1], backward_s, [sweep_s[-1]] * case.num_microbatches)[-1]


def _sweep(case: Case, matrix: Matrix, nodes: list[int], action_s: float, ready_s: list[float]) -> list[float]:
    """Take every microbatch through the nodes; return when each has left the last one."""
    free_s = dict.fromkeys([*nodes, *pairwise(nodes)], 0.0)
    for source, target in [*pairwise(nodes), (nodes[-1], None)]:
        for microbatch, ready in enumerate(ready_s):
            done_s = free_s[source] = max(ready, free_s[source]) + action_s
            if target is not None:
                transfer_s = case.message_bytes / matrix.bandwidth_Bps[source][target]
                done_s = free_s[source, target] = max(done_s, free_s[source, target]) + transfer_s
                done_s += matrix.latency_s[source][target]
            ready_s[microbatch] = done_s
    return ready_s
