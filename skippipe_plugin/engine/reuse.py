"""Whether a backward can be split by torch's halves: they do not know of parameters that a graph uses several times."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.pipelining._backward import construct_reverse_graph, reverse_closure


def uses_again(output: Tensor, inputs: Tensor) -> bool:
    """Whether the graph of ``output`` uses a parameter twice, or what was made of parameters alone, as tied layers do.

    Args:
        output: Of blocks.
        inputs: The leaf that entered them.
    """
    users = construct_reverse_graph([output.grad_fn])  # type: ignore[list-item]
    entered = {node for node in users if getattr(node, "variable", None) is inputs}
    on_the_way, _ = reverse_closure([*entered], set(), users)
    return any(len(by) > 1 for node, by in users.items() if node not in on_the_way)
