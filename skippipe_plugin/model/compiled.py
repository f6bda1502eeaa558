"""Models under ``torch.compile``: the driver's part runs eagerly, the blocks are compiled on their workers.

A compiled graph cannot stop in its middle while the blocks run elsewhere, so whatever is compiled around them calls
its original until the end, and is compiled again afterwards. Names (``_orig_mod``) stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch._dynamo.backends.registry import list_backends, lookup_backend
from torch._dynamo.eval_frame import OptimizedModule, _TorchDynamoContext, innermost_backend

from ..engine.compilation import Compilation
from ..engine.errors import SkipPipeError


class CompiledParts:
    """The compiled modules around ``blocks`` in ``model``, switched to their originals until :meth:`restore`.

    Args:
        model: The whole model.
        blocks: Its block stack.
        context: The settings (dynamo's context) of a compilation that has been undone already; None when there is none.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], context: Any = None) -> None:
        self._undo: list[Callable[[], None]] = []
        self._contexts: dict[int, dict[str, Any]] = {}  # Any: torch.compile's settings, which dynamo keeps
        """By block, and by name within it; where compiled modules contain a block, those of the outermost."""
        if context is not None:
            self._note(context, blocks, model)
        for module in filter(_is_compiled, [*model.modules()]):
            if not set(blocks).isdisjoint(module.modules()):
                self._switch(module, blocks)
        for index, block in enumerate(blocks):
            for name, module in block.named_modules():  # those within wrappers travel as they are
                if _is_compiled(module) and not isinstance(module, OptimizedModule):
                    self._contexts.setdefault(index, {}).setdefault(name, _context_of(module._compiled_call_impl))

    @property
    def compilation(self) -> Compilation:
        """How the blocks are to be compiled where they are.

        Raises:
            SkipPipeError: That cannot be told.
        """
        contexts = [context for within in self._contexts.values() for context in within.values()]
        known = {id(context): _settings(context) for context in contexts}
        return Compilation(
            {
                block: {name: known[id(context)] for name, context in within.items()}
                for block, within in self._contexts.items()
            }
        )

    def restore(self) -> None:
        """Compile the modules again."""
        for undo in self._undo:
            undo()

    def _switch(self, module: nn.Module, blocks: Sequence[nn.Module]) -> None:
        if isinstance(module, OptimizedModule):
            self._note(module.dynamo_ctx, blocks, module)
            self._replace(module, "forward", module._orig_mod)
        else:
            self._note(_context_of(module._compiled_call_impl), blocks, module)
            self._replace(module, "_compiled_call_impl", None)

    def _note(self, context: Any, blocks: Sequence[nn.Module], around: nn.Module) -> None:
        inside = set(around.modules())
        for index, block in enumerate(blocks):
            if block in inside:
                self._contexts.setdefault(index, {}).setdefault("", context)

    def _replace(self, module: nn.Module, name: str, value: Any) -> None:  # Any: something to call, or None
        compiled = module.__dict__[name]
        module.__dict__[name] = value
        self._undo.append(lambda: module.__dict__.__setitem__(name, compiled))


def originals(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """Return the blocks themselves where they are wrapped one by one."""
    return [block._orig_mod if isinstance(block, OptimizedModule) else block for block in blocks]


def _is_compiled(module: nn.Module) -> bool:
    """Whether calls of a module are compiled; ``compile(disable=True)`` leaves it the call that it had."""
    call = module._compiled_call_impl
    return isinstance(module, OptimizedModule) or (call is not None and call != module._call_impl)


def _context_of(function: Any) -> Any:
    """Find the settings that ``Module.compile`` was called with; it keeps them in a closure only."""
    contents = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return next((content for content in contents if isinstance(content, _TorchDynamoContext)), None)


def _settings(context: Any) -> dict[str, Any]:
    """Return the arguments of ``torch.compile``; of its limits of recompilations it leaves no trace."""
    if context is None or not callable(context.callback):
        raise SkipPipeError(
            "with what settings the model is compiled cannot be told, so that its blocks, which are compiled on the "
            "workers, would run otherwise. Compile the model with torch.compile(model, ...) or model.compile(...)"
        )
    found: dict[str, Any] = {"fullgraph": bool(context.fullgraph), "dynamic": context._dynamic}
    found |= _backend(innermost_backend(context.callback))
    only_guards = getattr(context._hooks, "guard_filter_fn", None)
    if only_guards is not None:  # torch has taken it out of the options, and so there is no mode
        found["options"] = {**found.get("options", {}), "guard_filter_fn": only_guards}
    return found


def _backend(backend: Any) -> dict[str, Any]:
    """Return the backend, and its mode or options, which torch has wrapped in one callable."""
    if isinstance(backend, torch._TorchCompileInductorWrapper):
        options = dict(backend.config)
        if isinstance(backend, torch._TorchCompileAOTInductorWrapper):
            options["use_aoti"] = True
        return {"backend": "inductor", **({"options": options} if options else {})}
    if isinstance(backend, torch._TorchCompileWrapper):
        return {"backend": _named(backend.compiler_name, backend.compiler_fn), **backend.kwargs}
    return {"backend": backend}  # of torch._dynamo.optimize, which wraps nothing


def _named(name: str, backend: Any) -> Any:
    """Return the name of a backend that torch has in every process; another one itself."""
    comes_with_torch = getattr(backend, "__module__", "").partition(".")[0] in ("torch", "functools")
    if comes_with_torch and name in list_backends(None) and lookup_backend(name) is backend:
        return name
    return backend
