"""The driver's copies of what workers hold: fetched when user code reads, sent back when it has written.

A copy is good until the workers may have changed what it is of: a step, an optimizer's step, another worker. What was
written into it is found by its fingerprint, however it was written (through views, ``.data``, numpy), and goes to the
workers before anything runs there. A copy that user code still holds, by a view for instance, is kept up to date, so
that it stays what it is in one process: the weight itself.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from ..engine.control.values import Written
from ..engine.errors import SkipPipeError
from ..engine.handover import tensor_blob
from ..engine.memory_order import order_of
from ..engine.wire import tensor_key, tensor_name
from .capture.gone import gone
from .capture.remote import Slot
from .doors import BEFORE_HANDOVER

_OWN_USES: Final = 2
"""How many uses the memory of a tensor has that nobody else looks at: itself, and who asks."""


class Workers(Protocol):
    """Where the tensors are."""

    def check_idle(self, what: str) -> None:
        """Raise when nobody can be asked for ``what`` because a step is under way."""

    def fetch(self, what: str, blocks: Collection[int]) -> Mapping[str, Tensor]:
        """Return ``"weights"`` or ``"gradients"`` of some blocks, by ``"<block>\\t<name>"``, on the driver's device."""

    def put(self, what: Written, tensors: Mapping[str, Tensor], *, absent: Collection[str] = ()) -> None:
        """Overwrite some of them, and drop the gradients named ``absent``; nobody answers."""


@dataclass(slots=True)
class _Copy:
    """A copy, and what it was when the workers had the same."""

    value: Tensor | None
    print: Fingerprint | None
    uses: int = _OWN_USES
    """How many its memory has while nobody else holds it."""

    @classmethod
    def of(cls, value: Tensor) -> _Copy:
        """Return a fresh copy."""
        return cls(value, fingerprint(value), _uses(value))

    @property
    def is_written(self) -> bool:
        return fingerprint(self.value) != self.print

    @property
    def is_shared(self) -> bool:
        """Whether user code holds its memory."""
        return self.value is not None and _uses(self.value) > self.uses


Fingerprint = tuple[Any, ...]  # Any: shape, type, order in memory and a sum over the bytes


def _uses(tensor: Tensor) -> int:
    tensor = tensor if tensor.layout is torch.strided else tensor._values()
    return torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


def fingerprint(tensor: Tensor | None) -> Fingerprint | None:
    """Tell tensors of other values apart, whoever has written them."""
    if tensor is None:
        return None
    if tensor.layout is torch.sparse_coo:  # the gradient of an embedding
        return tuple(tensor.shape), fingerprint(tensor._indices()), fingerprint(tensor._values())
    return tuple(tensor.shape), tensor.dtype, order_of(tensor), zlib.crc32(tensor_blob(tensor.detach()))


class WeightCopies:
    """Copies of parameters and buffers.

    Args:
        workers: Where the values are.
        slots: What there is, by ``"<block>\\t<name>"``.
    """

    def __init__(self, workers: Workers, slots: Mapping[str, Slot]) -> None:
        self._workers = workers
        self._slots = slots
        self._copies: dict[str, _Copy] = {}
        self._noted: weakref.WeakSet[NotedWeights] = weakref.WeakSet()

    def noted(self) -> NotedWeights:
        """Note what there is now, to bring it back."""
        noted = NotedWeights(self, dict(self._copies))
        self._noted.add(noted)
        return noted

    def label(self, name: str) -> str:
        """Return what users call one."""
        return self._slots[name].label

    def value(self, slot: Slot) -> Tensor:
        """Return the copy of one, fetching its block when there is none."""
        name = tensor_name(slot.block, slot.name)
        if name not in self._copies:
            self._workers.check_idle(f"the value of {slot.label}")
            self._fetch({slot.block})
        value = self._copies[name].value
        assert value is not None
        return value

    def overwritten(self, slot: Slot) -> None:
        """Make a copy of one that is about to be written as a whole, without asking for what it is."""
        name = tensor_name(slot.block, slot.name)
        if name not in self._copies:
            form = slot.form
            value = torch.empty_strided(form.size(), form.stride(), dtype=form.dtype, device=slot.source.device)
            self._copies[name] = _Copy(value, None, _uses(value))

    def set_value(self, slot: Slot, value: Tensor) -> None:
        """Let the user's tensor be the copy, as after ``parameter.data = value``."""
        self._check_form(slot, value)
        name = tensor_name(slot.block, slot.name)
        known = self._copies.get(name)
        self._copies[name] = _Copy(value.detach(), None if known is None else known.print)

    def write(self, slot: Slot, value: Tensor) -> None:
        """Write all of one, as user code does with ``copy_``."""
        self._check_form(slot, value)
        self.overwritten(slot)
        self.value(slot).data.copy_(value)

    def _check_form(self, slot: Slot, value: Tensor) -> None:
        if value.shape != slot.form.shape or value.dtype != slot.form.dtype:
            raise SkipPipeError(
                f"{slot.label} is {slot.form.dtype} of shape {tuple(slot.form.shape)} on a worker and cannot "
                f"become {value.dtype} of shape {tuple(value.shape)}: a worker's tensors keep their form. Change it "
                f"{BEFORE_HANDOVER}, or let Trainer(precision=...) or autocast say in which precision is computed"
            )

    def written(self) -> dict[str, Tensor]:
        """Return what user code has written and the workers do not have yet."""
        return {name: copy.value for name, copy in self._copies.items() if copy.value is not None and copy.is_written}

    def flush(self) -> None:
        """Send what was written."""
        written = self.written()
        for name, value in written.items():
            form = self._slots[name].form
            if value.shape != form.shape or value.dtype != form.dtype:
                raise SkipPipeError(
                    f"{self._slots[name].label} was {form.dtype} of shape {tuple(form.shape)} and is {value.dtype} of "
                    f"shape {tuple(value.shape)} now: a worker's tensors keep their form"
                )
        if written:
            for noted in self._noted:
                noted.keep(self.fetched(written.keys() - noted.kept.keys()))
            self._workers.put("weights", written)
            for name in written:
                self._copies[name].print = fingerprint(self._copies[name].value)

    def fetched(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return what the workers have of some, whatever user code has written here."""
        fetched = self._workers.fetch("weights", {tensor_key(name)[0] for name in names}) if names else {}
        return {name: _like(self._slots[name].form, fetched[name]) for name in names}

    def bring_back(self, before: Mapping[str, _Copy], values: Mapping[str, Tensor]) -> None:
        """Let the copies be ``before`` again, of ``values`` where those are others than the workers'."""
        others = {name for name, copy in self._copies.items() if copy is not before.get(name)}
        written = self.written().keys()
        changed = written | values.keys() | others
        rewritten = {name for name in changed - values.keys() if name in before and before[name].is_written}
        values = {**values, **self.fetched(rewritten)}
        with torch.no_grad():
            for name in changed:
                copy = before.get(name)
                if copy is not None and copy.value is not None:
                    self._copies[name] = copy
                    if name in values:
                        copy.value.copy_(values[name])
                elif name in values:
                    self._copies[name] = _Copy(values[name].clone(), None)
                elif name in written:
                    del self._copies[name]

    def outdate(self, *, buffers_only: bool = False) -> None:
        """Note that the workers may have changed what they hold: refresh the copies in use, forget the others.

        Args:
            buffers_only: Whether parameters are as they were.
        """
        kept = {
            name: copy
            for name, copy in self._copies.items()
            if (buffers_only and self._is_parameter(name)) or copy.is_shared or copy.is_written
        }
        stale = {name for name in kept if not (buffers_only and self._is_parameter(name))}
        self._copies = kept
        if stale:
            self._refresh(stale)

    def forget_read(self) -> None:
        """Note that other workers may be there: forget what nobody has written and nobody holds."""
        kept = self._copies.items()
        self._copies = {name: copy for name, copy in kept if copy.is_shared or copy.is_written}

    def take(self) -> dict[str, Tensor]:
        """Return all copies, and forget them."""
        copies, self._copies = self._copies, {}
        return {name: copy.value for name, copy in copies.items() if copy.value is not None}

    def _is_parameter(self, name: str) -> bool:
        return issubclass(self._slots[name].cls, torch.nn.Parameter)

    def _refresh(self, names: Collection[str]) -> None:
        fetched = self._workers.fetch("weights", {tensor_key(name)[0] for name in names})
        with torch.no_grad():
            for name in names:
                copy = self._copies[name]
                if copy.value is not None and not copy.is_written:
                    copy.value.copy_(fetched[name])
                    copy.print = fingerprint(copy.value)

    def _fetch(self, blocks: Collection[int]) -> None:
        for name, tensor in self._workers.fetch("weights", blocks).items():
            if name not in self._copies and name in self._slots:
                self._copies[name] = _Copy.of(_like(self._slots[name].form, tensor))


class NotedWeights:
    """What all weights were at a moment: of those that user code has written since, and the workers may have by now.

    Args:
        weights: The copies.
        copies: Those that there are, by name.
    """

    def __init__(self, weights: WeightCopies, copies: Mapping[str, _Copy]) -> None:
        self.name = "self"
        self._weights = weights
        self._copies = copies
        self.kept = {name: value.detach().clone() for name, value in weights.written().items()}
        """Values that the workers did not have then, or have no more."""

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Keep what the workers are about to lose."""
        self.kept |= values

    def restore(self) -> None:
        """Bring everything back."""
        self._weights.bring_back(self._copies, self.kept)

    def changes(self) -> Iterator[tuple[str, Tensor]]:
        """Return, by name, what user code has written since and the workers do not have."""
        for name, value in self._weights.written().items():
            if name not in self.kept or not torch.equal(value, self.kept[name]):
                yield f"{self.name}.{self._weights.label(name)}", value.detach().clone()


class GradientCopies:
    """Copies of accumulated gradients, from a backward until they are dropped."""

    def __init__(self, workers: Workers) -> None:
        self.present = False
        """Whether the workers have any."""
        self.hidden = False
        """Whether the driver's optimizer looks for its own parameters at present; the workers step theirs."""
        self.gone = False
        """Whether they have dropped some that one process would still have."""
        self._unowned: frozenset[str] = frozenset()
        """The parameters that need gradients, and that no optimizer has, by ``"<block>\\t<name>"``."""
        self._zeroed = False
        """Whether gradients were zeroed, theirs too, which in one process go on adding up."""
        self._workers = workers
        self._copies: dict[str, _Copy] = {}
        self._fetched: set[int] = set()

    def get(self, slot: Slot) -> Tensor | None:
        """Return the gradient of one parameter, fetching its block's when they are not here."""
        if self.hidden:
            return None
        name = tensor_name(slot.block, slot.name)
        if name not in self._copies:
            if self.gone:
                return gone(slot)
            if not self.present or slot.block in self._fetched:
                return None
            self._fetch(slot)
        copy = self._copies.get(name)
        if copy is not None and copy.value is not None and name in self._unowned:
            self.check_owned(slot.label)
        return None if copy is None else copy.value

    def own(self, unowned: Collection[str]) -> None:
        """Note which parameters that need gradients no optimizer has."""
        self._unowned = frozenset(unowned)

    def note_zeroed(self) -> None:
        """Note that the workers zero the gradients of all their parameters."""
        self._zeroed = True

    def check_owned(self, what: str) -> None:
        """Raise when gradients of parameters that no optimizer has are others than in one process.

        Args:
            what: Is about to be read.
        """
        if self._zeroed and self._unowned:
            block, name = tensor_key(min(self._unowned))
            raise SkipPipeError(
                f"the gradient of {what} is not that of one process: parameters that need a gradient but are in no "
                f"optimizer (block {block}, {name}) keep theirs there from step to step, and workers drop them. "
                "Freeze them (requires_grad_(False)), or give them to the optimizer"
            )

    def set(self, slot: Slot, value: Tensor | None) -> None:
        """Replace one."""
        if self.hidden:
            return
        name = tensor_name(slot.block, slot.name)
        if self.present and slot.block not in self._fetched:
            if value is None and name not in self._copies:  # whatever it was: nobody need be asked
                self._copies[name] = _Copy(None, ())
                return
            self._fetch(slot)
        if value is not None and (value.shape != slot.form.shape or value.dtype != slot.form.dtype):
            raise RuntimeError(
                f"assigned grad has data of {value.dtype} and shape {tuple(value.shape)}, but {slot.label} is "
                f"{slot.form.dtype} of shape {tuple(slot.form.shape)}"
            )
        known = self._copies.get(name)
        if value is not None or known is not None:
            self._copies[name] = _Copy(value, None if known is None else known.print)

    @contextmanager
    def unseen(self) -> Iterator[None]:
        """Let no gradient be seen, by code that looks for those of this driver's own parameters."""
        before, self.hidden = self.hidden, True
        try:
            yield
        finally:
            self.hidden = before

    def flush(self) -> bool:
        """Send what was written; return whether there was anything."""
        written = {name: copy for name, copy in self._copies.items() if copy.is_written}
        if written:
            tensors = {name: copy.value for name, copy in written.items() if copy.value is not None}
            self._workers.put("gradients", tensors, absent=[name for name in written if name not in tensors])
            for copy in written.values():
                copy.print = fingerprint(copy.value)
        return bool(written)

    def outdate(self, *, present: bool, gone: bool = False) -> None:
        """Note that the workers have others now, or none, perhaps where one process still has them."""
        self.present, self.gone = present, gone
        if self._copies or self._fetched:
            self._copies, self._fetched = {}, set()

    def _fetch(self, slot: Slot) -> None:
        self._workers.check_idle(f"the gradient of {slot.label}")
        self._fetched.add(slot.block)
        for name, tensor in self._workers.fetch("gradients", {slot.block}).items():
            self._copies.setdefault(name, _Copy.of(tensor))


def _like(form: Tensor, tensor: Tensor) -> Tensor:
    """Return ``tensor`` with the strides of ``form``."""
    if tensor.stride() == form.stride():
        return tensor
    return torch.empty_strided(form.size(), form.stride(), dtype=form.dtype, device=tensor.device).copy_(tensor)
