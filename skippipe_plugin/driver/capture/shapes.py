"""What each block does to the form of its input, learned once from the blocks themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Final, NamedTuple

import torch
from torch import nn

from ...engine.memory_order import order_of
from ...engine.probes import Probe
from ...engine.taps import own_hooks
from ...engine.transport import TensorSpec

_Signature = tuple[object, ...]
_Beside = tuple[Hashable, ...]


class Mode(NamedTuple):
    """In what a block is asked."""

    grad: bool
    """Whether gradients are on."""
    training: bool
    """Whether the block is in training."""
    dtypes: Hashable = None
    """What of the context decides on dtypes: autocast, the default one."""


class ShapeBook:
    """Knows output specs and return structures; asks ``probe`` about what it does not know.

    Blocks of the same classes with the same settings and parameters of the same shapes behave alike in the same mode.
    A kind of block that once kept its input's form is taken to keep every form of that dtype; the worker checks that at
    every call. Where dimensions lie in memory in another order than their own, which convolutions choose by their
    sizes, each form is asked about.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        kinds: dict[_Signature, int] = {}
        self._kinds = [kinds.setdefault(_signature(block), len(kinds)) for block in blocks]
        self._keeping: dict[tuple[int, Mode, torch.dtype], Probe] = {}
        self._turning = {k for k, b in zip(self._kinds, blocks, strict=True) if any(map(order_of, b.parameters()))}
        """The kinds of blocks that have got, made or hold something in another order in memory."""
        self._known: dict[tuple[int, Mode, TensorSpec, _Beside], Probe] = {}
        self.is_exact = False
        """Whether all tensors that blocks return count, not only their hidden states."""
        self._last: list[tuple[Mode, TensorSpec, _Beside, Probe] | None] = [None] * len(self._kinds)
        """By block: a question that has a lasting answer, and that answer: mostly the next question is the same."""

    def is_settled(self, training: Sequence[bool]) -> bool:
        """Whether every block is known to keep its input's form in a training step, so that nothing need be asked."""
        kept = [(kind, mode) for kind, mode, _ in self._keeping if mode.grad and kind not in self._turning]
        settled = {(kind, mode.training) for kind, mode in kept}
        return all(each in settled for each in zip(self._kinds, training, strict=True))

    def be_exact(self) -> None:
        """Let all tensors that blocks return count: of those that return several every form must be asked."""
        self.is_exact = True
        self._keeping = {key: probe for key, probe in self._keeping.items() if len(probe.structure.tensors) == 1}
        self._last = [None] * len(self._last)

    @property
    def writes_buffers(self) -> bool:
        """Whether the forward of a block that was asked writes its buffers, or its parameters."""
        return any(probe.buffers or probe.weights for probe in self._known.values())

    @property
    def keeps(self) -> bool:
        """Whether the forward of a block that was asked writes anything of the block."""
        return any(probe.buffers or probe.weights or probe.writes for probe in self._known.values())

    def written(self, block: int) -> set[str]:
        """Return what of ``block`` its forward writes, as far as its kind was asked.

        Buffers, parameters, and attributes that forwards after it, or evaluation, read.
        """
        kind = self._kinds[block]
        return {
            name
            for (known, *_), probe in self._known.items()
            if known == kind
            for name in (*probe.buffers, *probe.weights, *probe.lasting)
        }

    @property
    def written_weights(self) -> set[tuple[int, str]]:
        """Return the parameters (block, name) that forwards write, of kinds of blocks that were asked."""
        written = {kind: set(probe.weights) for (kind, *_), probe in self._known.items() if probe.weights}
        return {(block, name) for block, kind in enumerate(self._kinds) for name in written.get(kind, ())}

    def alike(self, block: int) -> list[int]:
        """Return the blocks of the same kind."""
        return [index for index, each in enumerate(self._kinds) if each == self._kinds[block]]

    def output(
        self,
        block: int,
        enters: TensorSpec,
        mode: Mode,
        probe: Callable[[], Probe],
        *,
        ask: bool,
        beside: _Beside = (),
    ) -> Probe:
        """Return what ``block`` makes of a tensor of spec ``enters``, and of those it gets ``beside`` it.

        With ``ask`` each mode is asked about, without it only what is known in none.
        """
        last = self._last[block]
        if last is not None and last[:3] == (mode, enters, beside):
            return last[3]
        kind = self._kinds[block]
        if (found := self._lasting(kind, mode, enters, beside)) is not None:
            self._last[block] = mode, enters, beside, found
            return found
        if not ask and (found := self._likely(kind, mode, enters, beside)) is not None:
            return found
        found = self._known[kind, mode, enters, beside] = probe()
        several = self.is_exact and len(found.structure.tensors) > 1
        if found.output.is_like(enters) and not beside and not several:
            self._keeping[kind, mode, enters.dtype] = found
        if enters.order or found.output.order:
            self._turning.add(kind)
        return found

    def _lasting(self, kind: int, mode: Mode, enters: TensorSpec, beside: _Beside = ()) -> Probe | None:
        """Return what is known of a kind of block in a mode."""
        found = self._known.get((kind, mode, enters, beside))
        if found is not None or enters.order or beside or kind in self._turning:
            return found
        keeping = self._keeping.get((kind, mode, enters.dtype))
        return None if keeping is None else dataclasses.replace(keeping, output=enters)

    def _likely(self, kind: int, mode: Mode, enters: TensorSpec, beside: _Beside) -> Probe | None:
        """Return what is known of a kind of block in another mode, as near as any; at last, that it keeps a dtype."""

        def difference(each: Mode) -> tuple[bool, bool, bool]:
            return each.dtypes != mode.dtypes, each.training != mode.training, each.grad != mode.grad

        modes = sorted({each for of, each, _, _ in self._known if of == kind}, key=difference)
        found = (self._lasting(kind, each, enters, beside) for each in modes)
        kept = (each for (of, *_), each in self._keeping.items() if of == kind)
        likely = next(filter(None, found), None)
        if beside:
            return likely
        keeping = next(kept, None)
        return likely if likely is not None or keeping is None else dataclasses.replace(keeping, output=enters)


def _signature(block: nn.Module) -> _Signature:
    shapes = tuple((name, tuple(parameter.shape), parameter.dtype) for name, parameter in block.named_parameters())
    parts = tuple((name, type(part), part.extra_repr(), _settings(part)) for name, part in block.named_modules())
    return (shapes, parts, tuple(own_hooks(block)))


_PLAIN: Final = (type(None), bool, int, float, str, torch.dtype, torch.Size)


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Return the plain attributes of a module, by which blocks of one class may differ in what they do."""
    held = [(name, value) for name, value in vars(module).items() if not name.startswith("_") and name != "training"]
    return tuple((name, repr(value)) for name, value in held if _is_plain(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, _PLAIN) for item in value)
    return isinstance(value, _PLAIN)
