"""Models under ``torch.compile``: the driver's part runs eagerly, the blocks are compiled on their workers.

A compiled graph cannot stop in its middle while the blocks run elsewhere, so whatever is compiled around them calls
its original until the end, and is compiled again afterwards. Names (``_orig_mod``) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from torch._dynamo import list_backends
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext, innermost_backend


class CompiledParts:
    """The compiled modules around ``blocks`` in ``model``, switched to their originals until :meth:`restore`.

    Args:
        model: The whole model.
        blocks: Its block stack.
        context: The settings (dynamo's context) of a compilation that has been undone already; None when there is none.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], context: Any = None) -> None:
        self._undo: list[Callable[[], None]] = []
        # Any: torch.compile's settings, None where they cannot be read
        self._contexts: list[Any] = [] if context is None else [context]
        for module in filter(_is_compiled, model.modules()):
            if not set(blocks).isdisjoint(module.modules()):
                self._switch(module)

    @property
    def options(self) -> dict[str, Any] | None:
        """Keyword arguments for ``Module.compile`` on the workers; None when no block is to be compiled."""
        return _options(self._contexts[0]) if self._contexts else None

    def restore(self) -> None:
        """Compile the modules again."""
        for undo in self._undo:
            undo()

    def _switch(self, module: nn.Module) -> None:
        if isinstance(module, OptimizedModule):
            self._contexts.append(module.dynamo_ctx)
            self._replace(module, "forward", module._orig_mod)
        else:
            self._contexts.append(_context_of(module._compiled_call_impl))
            self._replace(module, "_compiled_call_impl", None)

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:  # Any: something to call, or None
        compiled = module.__dict__[name]
        module.__dict__[name] = value
        self._undo.append(lambda: module.__dict__.__setitem__(name, compiled))


def originals(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the blocks themselves where they are wrapped one by one."""
    return [block._orig_mod if isinstance(block, OptimizedModule) else block for block in blocks]


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, OptimizedModule) or module._compiled_call_impl is not None


def _context_of(function: Any) -> Any:
    """Find the settings that ``Module.compile`` was called with; it keeps them in a closure only."""
    contents = [cell.cell_contents for cell in function.__closure__ or ()]
    return next((content for content in contents if isinstance(content, _TorchDynamoContext)), None)


def _options(context: Any) -> dict[str, Any]:
    if context is None:
        return {}
    backend = getattr(innermost_backend(context.callback), "__name__", "inductor")
    return {
        "backend": backend if backend in list_backends(None) else "inductor",
        "fullgraph": bool(context.fullgraph),
        "dynamic": context._dynamic,
    }
