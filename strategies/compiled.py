"""Models wrapped by ``torch.compile``: the driver's part runs eagerly, the blocks are compiled on their workers.

A compiled graph cannot stop in its middle while the blocks run elsewhere, so each ``OptimizedModule`` is made to call
its original, and gets its compiled forward back at the end. Names (``_orig_mod``) stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch._dynamo import list_backends
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend


class CompiledParts:
    """The compiled modules of a model, switched to their originals until :meth:`restore`."""

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[OptimizedModule, Any]] = []  # Any: the compiled forward
        self.options: dict[str, Any] | None = None
        """Keyword arguments for ``Module.compile`` on the workers; None when nothing is compiled."""
        for module in model.modules():
            if isinstance(module, OptimizedModule):
                self._forwards.append((module, module.__dict__["forward"]))
                self.options = self.options or _options(module)
        for module, _ in self._forwards:
            module.__dict__["forward"] = module._orig_mod

    def restore(self) -> None:
        """Give the compiled modules their compiled forward back."""
        for module, forward in self._forwards:
            module.__dict__["forward"] = forward


def originals(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the blocks themselves where they are wrapped one by one."""
    return [block._orig_mod if isinstance(block, OptimizedModule) else block for block in blocks]


def options_of_blocks(blocks: Sequence[nn.Module]) -> dict[str, Any] | None:
    """Return how blocks that were compiled in place (``block.compile()``) are to be compiled; None if they were not."""
    return {} if any(block._compiled_call_impl is not None for block in blocks) else None


def _options(module: OptimizedModule) -> dict[str, Any]:
    context: Any = module.dynamo_ctx  # Any: its backend's type is a union that innermost_backend does not take
    backend = getattr(innermost_backend(context.callback), "__name__", "inductor")
    return {
        "backend": backend if backend in list_backends(None) else "inductor",
        "fullgraph": bool(context.fullgraph),
        "dynamic": context._dynamic,
    }
