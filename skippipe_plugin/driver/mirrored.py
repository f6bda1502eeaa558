"""The driver's picture of the blocks that workers hold: what user code reads of them, and what it writes.

Here the copies meet the pipeline: whom they are fetched from, when they are sent back, and what makes them old.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..engine import phases
from ..engine.control.answers import State
from ..engine.control.commands import Get, Overwrite, Share
from ..engine.control.values import Written, Zero
from ..engine.device import free_bytes
from ..engine.errors import SkipPipeError
from ..engine.handover import find_again, let_go, pack_gradients, pack_tensors, unpack_gradients, unpack_tensors
from ..engine.wire import block_tensors, tensor_key, tensor_name
from .accumulation import Accumulation
from .capture.remote import Slot, detach, reattach
from .copies import GradientCopies, NotedWeights, WeightCopies
from .doors import BEFORE_HANDOVER
from .layout import Layout
from .links import Links
from .shards import ExpertShards
from .shared import SharedTensors, Values
from .structure import Structure

_T = TypeVar("_T")


_LENT: Final = (
    "another tensor stands in the place of {name} in a training step (torch.func.functional_call), and its block is on "
    "a pipeline's worker, which would train the parameter itself. Compute the weight inside of the block "
    "(torch.nn.utils.parametrize); for a teacher, call a copy of the module that was made between steps "
    "(copy.deepcopy). In validation, test and predict steps, and for modules around the blocks, it is exact"
)


class Gradients(Protocol):
    """What commands the workers' gradients."""

    accumulation: Accumulation

    def before_reading(self) -> None:
        """Let the workers' gradients be what this driver takes them to be."""

    def take_zero(self) -> Zero:
        """Return how they are to be zeroed first, which the caller then has them do."""


class Host(Protocol):
    """The pipeline, as far as copies need it."""

    links: Links
    shards: ExpertShards
    device: torch.device

    @property
    def layout(self) -> Layout:
        """Which worker holds which block."""

    @property
    def generation(self) -> int:
        """The number of the last generation that was begun."""

    @property
    def is_formed(self) -> bool:
        """Whether it stands."""

    @property
    def leads(self) -> bool:
        """Whether this driver commands the workers."""

    @property
    def gradients(self) -> Gradients:
        """What commands the workers' gradients."""

    @property
    def beyond_help(self) -> bool:
        """Whether a worker is lost for good."""

    @property
    def in_step(self) -> bool:
        """Whether a step is under way on this driver."""

    @property
    def is_announced(self) -> bool:
        """Whether the workers have begun with it."""

    def heal(self) -> None:
        """Have idle workers."""

    def surviving(self, action: Callable[[], _T]) -> _T:
        """Run ``action``, again when a worker was lost under it."""


class Mirror:
    """What the remote tensors of one pipeline show; the source of them all."""

    def __init__(self, host: Host) -> None:
        self.names_only = False
        self._host = host
        self._slots: dict[str, Slot] = {}
        self._tensors: dict[str, Tensor] = {}
        self._structure = Structure()
        self._lent: dict[str, _Lent] = {}
        """Parameters in whose places other tensors stand for a while, by ``"<block>\\t<name>"``."""
        self.weights = WeightCopies(self, self._slots)
        self.gradients = GradientCopies(self)
        self.shared = SharedTensors(self)
        self._blocks: tuple[nn.Module, ...] = ()
        """The blocks whose values are elsewhere."""

    @property
    def device(self) -> torch.device:
        """Where the driver computes."""
        return self._host.device

    # ------------------------------------------------------------ hand-over

    def own(self, blocks: Mapping[int, nn.Module], names: Sequence[str]) -> None:
        """Take the values of blocks away from the driver's model; the workers have them. What is shared stays."""
        self._blocks = (*self._blocks, *blocks.values())
        staying = self.shared.copies
        for name, tensor in block_tensors(blocks).items():
            if name in staying:
                continue
            block, local = tensor_key(name)
            detach(tensor, self, block, local, f"{names[block]}.{local}")
            self._tensors[name] = tensor
            self._slots[name] = tensor.__dict__["_skippipe_slot"]
        self._structure = Structure(
            (f"{names[block]}.{path}".rstrip("."), own)
            for block, module in blocks.items()
            for path, part in module.named_modules()
            for own in (part._parameters, part._buffers, part._modules)
        )

    def give_back(self, weights: Mapping[str, Tensor]) -> list[int]:
        """Put values into the driver's model again, NaN where there are none; return the blocks that lack some."""
        lost: list[int] = []
        copies, recurrent = self.weights.take(), [module for block in self._blocks for module in let_go(block)]
        for name, tensor in self._tensors.items():
            value = self._lent[name].value if name in self._lent else copies.get(name, weights.get(name))
            if value is None or value.shape != tensor.shape:
                value = torch.full(tensor.shape, float("nan")).to(tensor.dtype)
                lost.append(tensor_key(name)[0])
            reattach(tensor, value)
        find_again(recurrent)
        self._blocks = ()
        self._lent.clear()
        self._tensors.clear()
        self._slots.clear()
        self._structure = Structure()
        self.shared.clear()
        self.gradients.outdate(present=False)
        return list(dict.fromkeys(lost))

    def named(self) -> Mapping[str, Tensor]:
        """Return the remote tensors by ``"<block>\\t<name>"``."""
        return self._tensors

    # ------------------------------------------------------------ user code

    def value(self, slot: Slot) -> Tensor:
        self._check_seen(slot)
        return self.weights.value(slot) if (lent := self._own_value(slot)) is None else lent

    def overwritten(self, slot: Slot) -> None:
        self._check_seen(slot)
        if self._own_value(slot) is None:
            self.weights.overwritten(slot)

    def set_value(self, slot: Slot, value: Tensor) -> None:
        self._check_seen(slot)
        if (lent := self._own_value(slot)) is None:
            self.weights.set_value(slot, value)
        else:
            lent.copy_(value)

    def _own_value(self, slot: Slot) -> Tensor | None:
        """Return what a parameter is in whose place another tensor stands; None for all others."""
        if self._lent:
            self._take_replaced(may_lend=True)
        lent = self._lent.get(tensor_name(slot.block, slot.name))
        return None if lent is None else lent.value

    def noted(self) -> NotedWeights:
        return self.weights.noted()

    def _check_seen(self, slot: Slot) -> None:
        """Raise while an optimizer's own code runs, which changes weights here before the workers change theirs."""
        if self.gradients.hidden:
            raise SkipPipeError(
                f"the optimizer's step reads or writes {slot.label}, which is on a pipeline's worker, other than by "
                "its parameter groups: each process steps what it holds, and there the groups have no more. Let step() "
                "take parameters from self.param_groups, and do the rest after the step, in on_train_batch_end (in a "
                "loop of your own: after optimizer.step())"
            )

    def gradient(self, slot: Slot) -> Tensor | None:
        return self.gradients.get(slot)

    def set_gradient(self, slot: Slot, value: Tensor | None) -> None:
        self.gradients.set(slot, value)

    # ------------------------------------------------------------- the pipeline

    def settle(self, *, may_lend: bool = False) -> None:
        """Let the workers have all that user code has written; called before anything runs there.

        Args:
            may_lend: Whether other tensors may stand in the places of parameters: nothing is trained then.
        """
        self._take_replaced(may_lend)
        self.weights.flush()
        self.shared.flush()

    def note_started(self, function: int) -> None:
        """Note that one of a step's functions has come to the blocks: only the first may have written anything."""
        if function == 0:
            self.weights.flush()
            self.shared.flush()
        else:
            self.check_unwritten()

    def check_unwritten(self) -> None:
        """Raise when user code has written weights where the workers cannot have them any more."""
        written = [self._slots[name].label for name in self.weights.written()]
        if label := (written[0] if written else self.shared.written()):
            raise SkipPipeError(
                f"{label} was changed inside of a step, while the workers computed "
                "with it or once for each microbatch. Change weights between steps, in on_train_batch_start or "
                "on_train_batch_end (in a loop of your own: outside of the model's forward), or use num_microbatches=1"
            )

    @property
    def formed(self) -> int:
        """The generation that is formed; negative when there is none."""
        return self._host.generation if self._host.is_formed else -1

    def share(self, values: Values) -> None:
        """Overwrite copies of what is shared."""
        host = self._host
        for link in host.links if host.leads else ():
            blocks = set(host.layout.hosted(link.rank))
            here = {
                str(number): [name for name in names if tensor_key(name)[0] in blocks]
                for number, (names, _) in values.items()
            }
            copies = {number: names for number, names in here.items() if names}
            if copies:
                command = Share(copies, *pack_tensors({number: values[int(number)][1] for number in copies}))
                (link.tell if host.links.recovering else link.send)(command)

    def _take_replaced(self, may_lend: bool) -> None:
        """Take up buffers that were replaced by others, and what stands in for parameters; nothing else can be."""
        if not self._structure.has_changed():
            return
        for label, own, known in self._structure.changed():
            self._check_replaced(label, own, known, may_lend)
        self._structure.look()

    def _check_replaced(self, label: str, own: dict[str, Any], known: tuple[Any, ...], may_lend: bool) -> None:
        by_id = {id(tensor): name for name, tensor in self._tensors.items()}
        by_id |= {id(lent.to): name for name, lent in self._lent.items()}
        present = tuple(own.values())
        for old, new in zip(known, present, strict=False):
            if old is new:
                continue
            name = by_id.get(id(old))
            if name is None or not (type(new) is Tensor or new is self._tensors[name]):
                break
            self._replace(name, new, may_lend)
        else:
            if len(known) == len(present):
                return
        labels = {tensor: self._slots[name].label for tensor, name in by_id.items()}
        was = {id(each): labels.get(id(each)) for each in known}
        now = {f"{label}.{key}": id(value) for key, value in own.items()}
        other = [each for each, value in now.items() if value not in was or was[value] not in (None, each)]
        gone = [each for value, each in was.items() if each is not None and value not in now.values()]
        first = next(iter([*other, *gone, f"a part of {label}"]))
        raise SkipPipeError(
            f"{first} was replaced, added or removed while the block is on a pipeline's worker, which has the "
            "structure that the model had when the blocks were handed over. Change the structure "
            f"{BEFORE_HANDOVER}, or write new values into what is there: parameter.data = ..., copy_(), "
            "load_state_dict(...) without assign=True"
        )

    def _replace(self, name: str, new: Tensor, may_lend: bool) -> None:
        """Let another tensor stand where a remote one did, or that one again."""
        old, slot = self._tensors[name], self._slots[name]
        if new is old:
            self.weights.write(slot, self._lent.pop(name).value)
            return
        before = self._lent[name].value if name in self._lent else self.weights.value(slot).detach().clone()
        if not issubclass(slot.cls, nn.Parameter):
            self.weights.set_value(slot, new)
            detach(new, self, slot.block, slot.name, slot.label)
            reattach(old, before)
            self._tensors[name], self._slots[name] = new, new.__dict__["_skippipe_slot"]
        elif may_lend:
            self.weights.write(slot, new.detach())
            self._lent[name] = _Lent(new, before)
        else:
            raise SkipPipeError(_LENT.format(name=slot.label))

    # -------------------------------------------------------------- workers

    def check_idle(self, what: str) -> None:
        if self._host.is_announced:
            raise SkipPipeError(
                f"{what} was asked for in the middle of a step, when the workers compute and cannot be asked. Read it "
                "before the blocks are called, or between steps: in on_train_batch_start, on_before_optimizer_step, "
                "on_train_batch_end; in a loop of your own before it calls the model, or after loss.backward(). (A "
                "penalty on weights in the loss is the optimizer's weight_decay=... here; or keep the block on the "
                "driver with blocks=..., which names the stack without it)"
            )

    def fetch(self, what: str, blocks: Collection[int]) -> Mapping[str, Tensor]:
        def ask() -> dict[str, Tensor]:
            self._host.heal()
            if what == "gradients":
                self._host.gradients.accumulation.settle()
            return self._ask(what, blocks)

        if what == "gradients":
            self._host.gradients.before_reading()
        return self._ask(what, blocks) if self._host.in_step else self._host.surviving(ask)

    def _ask(self, what: str, blocks: Collection[int]) -> dict[str, Tensor]:
        phases.reach(phases.Phase.SAVING)
        host, parts = self._host, dict[int, dict[str, Tensor]]()
        unpack = unpack_tensors if what == "weights" else unpack_gradients
        for stage in sorted({host.layout.stage_of_block(block) for block in blocks}):
            own = [block for block in host.layout.blocks(stage) if block in blocks]
            for rank in host.layout.whole_set(stage, host.links):
                question = Get("weights" if what == "weights" else "last_gradients", own)
                state = host.links[rank].ask(question, State)
                parts.setdefault(rank, {}).update(unpack(state.tensors, state.blobs))
        return _where_it_fits(host.shards.join(parts), self.device)

    def put(self, what: Written, tensors: Mapping[str, Tensor], *, absent: Collection[str] = ()) -> None:
        host = self._host
        zero: Zero = host.gradients.take_zero() if what == "gradients" else ""
        if not host.leads:
            return  # the first driver has the same, and sends it
        if not host.in_step:
            host.surviving(host.heal)
        for link in host.links:
            blocks = set(host.layout.hosted(link.rank))
            own = {
                name: host.shards.part(tensor_key(name), tensor.detach(), link.rank)
                for name, tensor in tensors.items()
                if tensor_key(name)[0] in blocks
            }
            gone = [name for name in absent if tensor_key(name)[0] in blocks]
            if own or gone or zero:
                entries, blobs = (pack_tensors if what == "weights" else pack_gradients)(own)
                command = Overwrite(what, entries, gone, zero, blobs)
                (link.tell if host.links.recovering else link.send)(command)


@dataclass(frozen=True, slots=True)
class _Lent:
    """A parameter in whose place another tensor stands, as ``torch.func.functional_call`` puts it there."""

    to: Tensor
    value: Tensor
    """What it is itself."""


def check_hooks(blocks: Mapping[int, nn.Module], names: Sequence[str], staying: Collection[str]) -> None:
    """Raise when a hook waits for the gradient of a parameter that is about to leave; those of ``staying`` are not."""
    for block, module in blocks.items():
        for name, parameter in module.named_parameters():
            if tensor_name(block, name) in staying:
                continue
            if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
                raise SkipPipeError(
                    f"a hook is registered for the gradient of {names[block]}.{name}, which a pipeline's worker "
                    "computes in parts, one for each microbatch. Remove the hook and change the whole gradient, "
                    "parameter.grad in on_before_optimizer_step (in a loop of your own: between backward and "
                    "optimizer.step), or keep the block on the driver with blocks=..., which names the stack without it"
                )


def _where_it_fits(values: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Return values on the driver's device, where remote tensors say that they are; what has no room there stays.

    A ``state_dict()`` of a model that only all workers together hold is such.
    """
    free = free_bytes(device)
    if device.type == "cpu" or (free is not None and sum(value.nbytes for value in values.values()) > free):
        return values
    return {name: value.to(device) for name, value in values.items()}
