"""Parameters and buffers that several blocks share, or a block and the rest of the model: there is one of each.

Tied layers, a table of relative positions, a mask, one layer at every depth. Such a tensor stays with the driver as it
is, one object for all, and every block has a copy of it where it runs. The driver's optimizer steps it like any other
parameter of the driver's: what the copies' gradients add up to comes to it at the end of each step. What the step and
user code write into it goes to all copies before anything runs there; a block that writes it is refused, because the
other copies would not see that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor, nn

from ..engine.attributes import have_equal_bits
from ..engine.control.answers import Done
from ..engine.errors import SkipPipeError
from ..engine.handover import unpack_gradients
from ..engine.wire import tensor_key, tensor_name
from ..sharing import outside

_NO_BLOCK: Final = -1
Values = Mapping[int, tuple[Sequence[str], Tensor]]
"""By number of a shared tensor: the names of its copies, ``"<block>\\t<name>"``, and its value."""


class Workers(Protocol):
    """Who have the copies."""

    @property
    def formed(self) -> int:
        """The generation that is formed, in which alone they have what they were sent; negative when there is none."""

    def share(self, values: Values) -> None:
        """Overwrite copies."""


@dataclass(slots=True)
class _Shared:
    """A tensor that stays, and what the workers have of it."""

    tensor: Tensor
    copies: tuple[str, ...]
    """The names of its copies."""
    label: str
    sent: Tensor
    version: int
    generation: int = -1
    """In which it was sent: who is new has none, or one that was rebuilt from others."""

    def is_written(self, *, thorough: bool) -> bool:
        """Whether it is another than the workers have; ``thorough`` sees writes past torch's count of them, too."""
        if not thorough and self.tensor._version == self.version:
            return False
        version = self.tensor._version
        if not have_equal_bits(self.tensor, self.sent):
            return True
        self.version = version
        return False

    def note_sent(self, generation: int) -> None:
        self.sent, self.version = self.tensor.detach().clone(), self.tensor._version
        self.generation = generation


class SharedTensors:
    """Those of one model."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._all: list[_Shared] = []
        self._label_of: dict[str, str] = {}
        """By the name of a copy."""

    def find(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        remote: Collection[int],
        names: Sequence[str],
        device: torch.device,
    ) -> None:
        """Find those of some blocks, before these leave, and let them be on the driver's device.

        Args:
            model: The whole model.
            blocks: The stack; one module may be several blocks.
            remote: The numbers of those that leave.
            names: Of all blocks.
            device: The driver's.
        """
        self.clear()
        for tensor, copies in _find(model, blocks, remote):
            block, local = tensor_key(copies[0])
            label = f"{names[block]}.{local}"
            if tensor.is_meta:
                raise SkipPipeError(
                    f"{label} is also in other blocks or in the rest of the model, and has no values yet (the meta "
                    "device). Give each block a tensor of its own, or make this one with values: "
                    "torch.ones(..., device='cpu')"
                )
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
            self._all.append(_Shared(tensor, copies, label, tensor.detach().clone(), tensor._version))
            self._label_of.update({name: f"{names[tensor_key(name)[0]]}.{tensor_key(name)[1]}" for name in copies})

    @property
    def copies(self) -> frozenset[str]:
        """The names of all copies."""
        return frozenset(self._label_of)

    def tensors(self) -> list[Tensor]:
        """Return what stays."""
        return [each.tensor for each in self._all]

    def clear(self) -> None:
        """Forget them: the blocks are here again."""
        self._all.clear()
        self._label_of.clear()

    def flush(self) -> None:
        """Send what the optimizer or user code has written, and everything to workers that may be new."""
        generation = self._workers.formed if self._all else -1
        if generation < 0:
            return  # whoever forms the next one comes here again
        news = {
            number: each
            for number, each in enumerate(self._all)
            if each.generation != generation or each.is_written(thorough=True)
        }
        if news:
            self._workers.share({number: (each.copies, each.tensor.detach()) for number, each in news.items()})
            for each in news.values():
                each.note_sent(generation)

    def add_gradients(self, done: Iterable[Done]) -> list[Tensor]:
        """Add what a step's copies have gathered to the gradients here; return whose autocast computes in float16."""
        in_half: list[Tensor] = []
        for each in done:
            for name, gradient in unpack_gradients(each.shared, each.blobs).items():
                tensor = self._all[int(name)].tensor
                here = gradient.to(tensor.device)
                tensor.grad = here if tensor.grad is None else tensor.grad + here
            in_half += [self._all[number].tensor for number in each.in_half]
        return in_half

    def written(self) -> str | None:
        """Name one that was written and that the workers do not have as it is now."""
        return next((each.label for each in self._all if each.is_written(thorough=False)), None)

    def check_kept(self, blocks: Sequence[int], written: Sequence[str]) -> None:
        """Raise when ``blocks``, of one kind, write one of theirs.

        Args:
            blocks: Their numbers.
            written: The buffers that such a block writes, by their names in it.
        """
        for name in (tensor_name(block, local) for local in written for block in blocks):
            if name in self._label_of:
                self._refuse(name)

    def check_alike(self, weights: Mapping[str, Tensor]) -> None:
        """Raise when a copy among ``weights`` is not what it was made of: its block has written it."""
        for each in (each for each in self._all if each.generation == self._workers.formed):
            for name in each.copies:
                if name in weights and not have_equal_bits(weights[name], each.sent.to(weights[name].device)):
                    self._refuse(name)

    def _refuse(self, name: str) -> None:
        raise SkipPipeError(
            f"the forward of a block writes {self._label_of[name]}, which other blocks or the rest of the model have, "
            "too: they have copies of it on other machines, which would not see that. Give each block a tensor of its "
            "own (tensor.clone()), or write it outside of the blocks, between steps"
        )


def _find(
    model: nn.Module, blocks: Sequence[nn.Module], remote: Collection[int]
) -> Iterator[tuple[Tensor, tuple[str, ...]]]:
    """Yield each tensor with more than one owner, and the names of it in blocks that leave.

    Overlapping memory counts as one.
    """
    inside = [
        (tensor, block, local)
        for block, module in enumerate(blocks)
        for local, tensor in (*module.named_parameters(), *module.named_buffers())
    ]
    owners: dict[object, list[tuple[Tensor, int]]] = {}
    for tensor, block, _ in inside:
        owners.setdefault(_memory(tensor), []).append((tensor, block))
    for module in outside(model, blocks):
        for each in (*module._parameters.values(), *module._buffers.values()):
            if each is not None:
                owners.setdefault(_memory(each), []).append((each, _NO_BLOCK))
    found: dict[int, tuple[Tensor, list[str]]] = {}
    for tensor, block, local in inside:
        others = (each for each, owner in owners[_memory(tensor)] if owner != block)
        if block in remote and any(each is tensor or _overlap(each, tensor) for each in others):
            found.setdefault(id(tensor), (tensor, []))[1].append(tensor_name(block, local))
    for tensor, names in found.values():
        yield tensor, tuple(names)


def _memory(tensor: Tensor) -> object:
    if tensor.is_meta or tensor.layout is not torch.strided:
        return id(tensor)
    try:
        return ("memory", tensor.untyped_storage().data_ptr() or id(tensor))
    except (RuntimeError, NotImplementedError):
        return id(tensor)


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of the same storage have memory in common, gaps between their elements included."""
    (start, stop), (first, last) = _reach(one), _reach(other)
    return start < last and first < stop


def _reach(tensor: Tensor) -> tuple[int, int]:
    size, start = tensor.element_size(), int(tensor.storage_offset())
    if tensor.numel() == 0:
        return 0, 0
    length = 1 + sum(int(n - 1) * int(stride) for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start * size, (start + length) * size
