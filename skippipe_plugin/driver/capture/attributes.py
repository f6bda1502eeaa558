"""What user code sets on blocks that live elsewhere: noticed at each call of the block, and sent with the call.

An attribute that has once been another than at the hand-over travels with every call from then on, so that a worker
that takes a block over later hears of it too.
"""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...engine.attributes import GONE, BlockWatch, Key, pack_changes
from ...engine.call import BlockMode
from ...engine.errors import SkipPipeError
from ..doors import BEFORE_HANDOVER


class BlockAttributes:
    """The flags and attributes of one block on the driver, as its next call is to find them.

    Args:
        name: The block's name in the model.
        block: The block.
    """

    def __init__(self, name: str, block: nn.Module) -> None:
        self.name = name
        self._block = block
        self._parameters = list(block.parameters())
        self._watch = BlockWatch(block)
        self._names = list(dict(block.named_modules()))
        self._at_handover = self._watch.portraits
        self._changed: set[Key] = set()
        self._written: frozenset[Key] = frozenset()
        self._packed = b""
        self._tensors: list[Tensor] = []
        self._carrying: Tensor | None = None
        """A tensor among them that carries a gradient."""
        self._flags = self._read_flags()
        self._mode = BlockMode(*self._flags)

    def module(self, key: Key) -> nn.Module:
        """Return the module that has the attribute."""
        return self._watch.modules[key[0]]

    def full_name(self, key: Key) -> str:
        """Name an attribute as the user's code would."""
        index, name = key
        return ".".join(part for part in (self.name, self._names[index], name) if part)

    def refresh_flags(self) -> None:
        """Read ``training`` and ``requires_grad``, which are looked at once for all microbatches of a step."""
        flags = self._read_flags()
        if flags != self._flags:
            self._flags = flags
            self._make_mode()

    def mode(self) -> tuple[BlockMode, list[Tensor]]:
        """Return what the coming call is to find, and the tensors among the attributes."""
        if not self._watch.unchanged():
            self._look()
        if self._carrying is not None and torch.is_grad_enabled():
            self._refuse_gradient()
        return self._mode, self._tensors

    def leave_to_worker(self, keys: Iterable[Key]) -> set[Key]:
        """Look away from attributes that the block itself writes; return those that were not known.

        Raises:
            SkipPipeError: User code has set one of them, too.
        """
        fresh = set(keys) - self._written
        if not fresh:
            return fresh
        if not self._watch.unchanged():
            self._look()
        self._written |= fresh
        both = self._changed & self._written
        if both:
            raise SkipPipeError(written_elsewhere(self.full_name(min(both))))
        self._watch = BlockWatch(self._block, self._written)
        return fresh

    # -------------------------------------------------------------- pieces

    def _read_flags(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        with torch._C.DisableTorchFunctionSubclass():  # remote tensors' own handling takes long for so many flags
            requires_grad = tuple([parameter.requires_grad for parameter in self._parameters])
        return tuple([module.training for module in self._watch.modules]), requires_grad

    def _look(self) -> None:
        if not self._watch.has_same_modules():
            self._refuse_other_modules()
        self._watch.look()
        now, before = self._watch.portraits, self._at_handover
        both = now.keys() | before.keys()
        self._changed |= {key for key in both - self._written if key not in now or now[key] != before.get(key)}
        if self._changed:
            self._packed, tensors = self._pack(self._values())
            self._tensors = [tensor.detach() for tensor in tensors]
            self._carrying = next((tensor for tensor in tensors if tensor.requires_grad), None)
        self._flags = self._read_flags()
        self._make_mode()

    def _make_mode(self) -> None:
        self._mode = BlockMode(*self._flags, self._packed)

    def _pack(self, values: Mapping[Key, Any]) -> tuple[bytes, list[Tensor]]:
        for key, value in values.items():
            self._refuse_what_cannot_travel(key, value)
        try:
            return pack_changes(values, self._block)
        except Exception as error:
            names = ", ".join(map(self.full_name, values))
            raise SkipPipeError(
                f"the attribute {names} was set after the blocks went to their workers, and cannot be sent there: "
                f"{error}. Set it {BEFORE_HANDOVER}, or pass it to the block as an argument"
            ) from error

    def _values(self) -> dict[Key, Any]:
        return {key: vars(self._watch.modules[key[0]]).get(key[1], GONE) for key in sorted(self._changed)}

    def _refuse_gradient(self) -> None:
        assert self._carrying is not None
        values, shape = self._values(), tuple(self._carrying.shape)
        holding = [key for key in values if any(leaf is self._carrying for leaf in pytree.tree_leaves(values[key]))]
        raise SkipPipeError(
            f"the attribute {self.full_name((holding or list(values))[0])} was set to a tensor that carries a gradient "
            f"(shape {shape}), and the block is on a worker, from which the gradient would not come back. Detach it, "
            "compute it inside the block, or train without the pipeline"
        )

    def _refuse_what_cannot_travel(self, key: Key, value: Any) -> None:  # Any: what the user has set
        what = None
        if isinstance(value, nn.Module):
            what = f"a module ({type(value).__name__})"
        elif isinstance(value, types.MethodType):
            what = f"the method {value.__qualname__}"
        elif isinstance(value, types.FunctionType) and value.__closure__:
            what = f"the function {value.__qualname__}, which has variables of its own"
        if what is not None:
            raise SkipPipeError(
                f"the attribute {self.full_name(key)} was set to {what} after the blocks went to their workers, where "
                f"it would be a copy. Set it {BEFORE_HANDOVER}"
            )

    def _refuse_other_modules(self) -> None:
        now = dict(self._block.named_modules())
        before = dict(zip(self._names, self._watch.modules, strict=True))
        other = next(name for name in {**now, **before} if now.get(name) is not before.get(name))
        raise SkipPipeError(
            f"the submodule {other} of {self.name} was added, replaced or removed after the blocks went to their "
            f"workers. Do it {BEFORE_HANDOVER}"
        )


def written_elsewhere(name: str) -> str:
    """Say why an attribute that a block's forward writes can be neither read nor set on the driver."""
    return (
        f"the attribute {name} is written by the block's forward, which runs on a worker: its value is there, and the "
        "driver can neither read nor set it. Do inside of the block's forward what needs it or resets it, "
        "collect it with a forward hook on the module that computes it, or train without the pipeline"
    )
