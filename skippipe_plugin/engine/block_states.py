"""What blocks keep from one forward to the next, as it was when a call of them began.

Buffers, attributes that forwards write, and parameters that they write. A step that is given up has not counted its
samples. A call that runs once more, because its gradients have come later than other calls, begins with what it found
the first time, and leaves what there is by then.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from .attributes import GONE, Key, apply_changes, copied, named_attributes, own_attributes, pack_changes
from .control.values import States, Writes
from .device import HOST
from .errors import SkipPipeError
from .stage import Stage
from .wire import tensor_key, tensor_name

log = logging.getLogger(__name__)

_LOST: Final = (
    "a call of the blocks that others have followed runs once more when its gradients are there, with what the blocks "
    "keep from one forward to the next (buffers, counters) as it was then; a worker that knew it was lost in between. "
    "Go on from the last checkpoint"
)
_EVALUATION: Final = -1
"""Where it is noted what there was when the last evaluation began."""
_PACKED: Final = "attributes"
_OF_HOST: Final = " on the host"
_STAYS: Final = "what a block's forward has written into %s (block %d) cannot travel with the block: %s"
_Value = tuple[Tensor | None, Tensor | None, int]
"""A tensor, a copy of it, and the version that it is of."""


class _Cell:
    """A buffer or a parameter of a module; most never change, and are copied once."""

    def __init__(self, owner: dict[str, Any], name: str, *, quietly: bool) -> None:  # Any: torch's own table
        self._owner = owner
        self._name = name
        self._quietly = quietly
        """Whether it may change without that being seen in its version, as torch's own batch norm does it."""
        self._last: _Value = None, None, -1

    def take(self) -> _Value:
        tensor, (known, _, version) = self._owner.get(self._name), self._last
        if tensor is not known or (tensor is not None and (self._quietly or tensor._version != version)):
            self._last = tensor, None if tensor is None else tensor.detach().clone(), _version(tensor)
        return self._last

    def put(self, value: _Value) -> None:
        tensor, copy, version = value
        self._owner[self._name] = tensor
        if tensor is None or copy is None or (not self._quietly and tensor._version == version):
            return
        if tensor.shape != copy.shape:
            tensor.resize_(copy.shape)
        tensor.copy_(copy)
        self._last = tensor, copy, tensor._version

    def forget(self) -> None:
        self._last = None, None, -1


@dataclass(frozen=True, slots=True)
class _State:
    """What there was at a moment."""

    tensors: Mapping[tuple[int, str, str], _Value]
    attributes: Mapping[tuple[int, Key], Any]
    """Those that forwards had written by then."""


class BlockStates:
    """What the blocks of some stages keep.

    Args:
        stages: By number.
    """

    def __init__(self, stages: Mapping[int, Stage] | None = None) -> None:
        self._stages = {} if stages is None else stages
        self._cells = {
            (block, path, name): _Cell(part._buffers, name, quietly=isinstance(part, _NormBase))
            for block, path, part in self._parts()
            for name in part._buffers
        }
        self._saved = [
            (block, f"{path}.{name}".lstrip("."), part._buffers, name)
            for block, path, part in self._parts()
            if not isinstance(part, _NormBase)  # of which is known that they count
            for name in part._buffers
            if name not in part._non_persistent_buffers_set
        ]
        """The buffers that checkpoints have."""
        self._found: list[tuple[Tensor | None, int]] = []
        """Which they were when the step began, and how often each had been written."""
        self._first: dict[tuple[int, Key], Any] | None = None
        """All attributes as of the first look."""
        self._noted: dict[int, _State] = {}
        self._evaluation = 0
        """The number of the last evaluation."""
        self._open: int | None = None
        """What is to be brought back if the step is given up."""
        self._latest: _State | None = None
        """What is to be brought back when the step is over."""

    # ----------------------------------------------------------------- steps

    def begin(self, order: States | None, *, repeats: bool, may_repeat: bool) -> None:
        """Begin a step.

        Args:
            order: What the driver wants; None: nothing in particular.
            repeats: Whether its samples are counted already.
            may_repeat: Whether it may be given up and repeated.
        """
        self._begin(order, repeats=repeats, may_repeat=may_repeat)
        self._found = self._look()

    def _begin(self, order: States | None, *, repeats: bool, may_repeat: bool) -> None:
        self._bring_back()
        if order is None and not repeats and not may_repeat:
            self._open = None
            if self._first is not None and not self._noted:
                self._free()
            return
        order = order or States()
        self._know(order.weights)
        with torch.no_grad():
            if order.evaluation:
                self._begin_evaluation(order.evaluation)
                return
            if order.start or repeats:
                number = order.start or order.note
                if order.start and not repeats and number not in self._noted and self._keeps_any():
                    raise SkipPipeError(_LOST)
                self._latest, self._open = self._take(), None
                if number in self._noted:
                    self._put(self._noted[number])
                return
            number = order.note
            for each in [each for each in self._noted if 0 < each < order.oldest]:
                del self._noted[each]
            if number and number in self._noted:  # it begins again
                self._put(self._noted[number])
                for each in [each for each in self._noted if each > number]:
                    del self._noted[each]
            else:
                self._noted[number] = self._take()
            self._open = number

    def _begin_evaluation(self, number: int) -> None:
        """Begin the first step of an evaluation, or begin it again: all of its steps are repeated then."""
        begins_again, self._evaluation, self._open = number == self._evaluation, number, None
        if begins_again and _EVALUATION in self._noted:
            self._put(self._noted[_EVALUATION])
        else:
            self._noted[_EVALUATION] = self._take()

    def end(self) -> Writes:
        """End a step; return what its forwards have written."""
        pairs = zip(self._saved, self._found, self._look(), strict=True)
        buffers = [
            (block, name)
            for (block, name, *_), (before, count), (now, counted) in pairs
            if before is not now or count != counted
        ]
        attributes = [each for stage in self._stages.values() for each in stage.take_writes()]
        self._bring_back()
        return Writes(attributes, buffers)

    def keep(self) -> None:
        """Let what the last step has left be what it is: it counts."""
        self._open = None

    def settle(self, *, counts: bool) -> None:
        """After a step that was given up: take back what it has left, unless it counts."""
        self._bring_back()
        number, self._open = self._open, None
        if number is not None and not counts:
            with torch.no_grad():
                self._put(self._noted[number])

    def forget(self) -> None:
        """After an optimizer step: no call of before runs once more."""
        if self._noted:
            self._noted = {number: state for number, state in self._noted.items() if not number}
            self._open = self._open if self._open in self._noted else None

    def packed_attributes(self) -> dict[str, Tensor]:
        """Return what forwards have written into attributes, for :func:`put_attributes`; what cannot travel is said."""
        packed: dict[str, Tensor] = {}
        blocks = self._blocks()
        for block, keys in (each for stage in self._stages.values() for each in stage.written() if each[1]):
            try:
                text, tensors = pack_changes({key: self._attribute(block, key) for key in sorted(keys)}, blocks[block])
            except Exception as error:
                log.warning(_STAYS, ", ".join(named_attributes(blocks[block], sorted(keys))), block, error)
                continue
            packed[tensor_name(block, _PACKED)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
            for number, tensor in enumerate(tensors):
                where = _OF_HOST if tensor.device == HOST else ""
                packed[tensor_name(block, f"{number}{where}")] = tensor.detach()
        return packed

    # ---------------------------------------------------------------- pieces

    def _look(self) -> list[tuple[Tensor | None, int]]:
        return [(found := table.get(name), _version(found)) for *_, table, name in self._saved]

    def _free(self) -> None:
        """Hold no copies: steps note nothing any more."""
        self._first = None
        for cell in self._cells.values():
            cell.forget()

    def _bring_back(self) -> None:
        latest, self._latest = self._latest, None
        if latest is not None:
            with torch.no_grad():
                self._put(latest)

    def _take(self) -> _State:
        if self._first is None:
            self._first = self._copies(
                ((block, (index, name)), value)
                for block, index, part in self._modules()
                for name, value in own_attributes(part).items()
            )
        written = [(block, key) for stage in self._stages.values() for block, keys in stage.written() for key in keys]
        attributes = self._copies((place, self._attribute(*place)) for place in written) if written else {}
        return _State({place: cell.take() for place, cell in self._cells.items()}, attributes)

    def _put(self, state: _State) -> None:
        for place, value in state.tensors.items():
            self._cells[place].put(value)
        written = [(block, key) for stage in self._stages.values() for block, keys in stage.written() for key in keys]
        if not written:
            return
        before = self._first or {}
        found = self._copies((each, state.attributes.get(each, before.get(each, GONE))) for each in written)
        modules = {(block, index): part for block, index, part in self._modules()}
        for (block, (index, name)), value in found.items():
            own = vars(modules[block, index])
            if value is GONE:
                own.pop(name, None)
            else:
                own[name] = value

    def _attribute(self, block: int, key: Key) -> Any:
        module = next(part for of, index, part in self._modules() if (of, index) == (block, key[0]))
        return vars(module).get(key[1], GONE)

    def _copies(self, values: Iterable[tuple[tuple[int, Key], Any]]) -> dict[tuple[int, Key], Any]:
        """Copy attributes; what several have in common stays common."""
        modules = [part for _, _, part in self._modules()]
        tensors = [each for part in modules for each in (*part._parameters.values(), *part._buffers.values())]
        memo: dict[int, Any] = {id(each): each for each in (*modules, *tensors) if each is not None}
        return {place: copied(value, memo) for place, value in values}

    def _know(self, weights: Sequence[tuple[int, str]]) -> None:
        """Have parameters that forwards write, too."""
        blocks = self._blocks()
        for block, label in weights:
            path, _, name = label.rpartition(".")
            if block in blocks and (block, path, name) not in self._cells:
                owner = blocks[block].get_submodule(path)._parameters
                self._cells[block, path, name] = _Cell(owner, name, quietly=True)

    def _keeps_any(self) -> bool:
        """Whether there is anything that a forward may have changed."""
        return bool(self._cells) or any(keys for stage in self._stages.values() for _, keys in stage.written())

    def _blocks(self) -> dict[int, nn.Module]:
        return {block: module for stage in self._stages.values() for block, module in stage.blocks.items()}

    def _parts(self) -> list[tuple[int, str, nn.Module]]:
        """List the parts of all blocks, a part that several have once."""
        found = [(block, path, part) for block, each in self._blocks().items() for path, part in each.named_modules()]
        return list({id(part): (block, path, part) for block, path, part in reversed(found)}.values())

    def _modules(self) -> list[tuple[int, int, nn.Module]]:
        """List the modules of all blocks by the numbers that attributes have."""
        blocks = self._blocks().items()
        return [(block, index, part) for block, each in blocks for index, part in enumerate(each.modules())]


def put_attributes(blocks: Mapping[int, nn.Module], packed: Mapping[str, Tensor], device: torch.device) -> None:
    """Let blocks have what :meth:`BlockStates.packed_attributes` has told of others.

    Args:
        blocks: By their numbers in the stack.
        packed: Of these blocks.
        device: Where they live.
    """
    texts: dict[int, Tensor] = {}
    tensors: dict[int, list[Tensor]] = {}
    for name, tensor in packed.items():
        block, local = tensor_key(name)
        if local == _PACKED:
            texts[block] = tensor
        else:
            tensors.setdefault(block, []).append(tensor if local.endswith(_OF_HOST) else tensor.to(device))
    for block, text in texts.items():
        apply_changes(blocks[block], text.numpy().tobytes(), tensors.get(block, []))


def _version(tensor: Tensor | None) -> int:
    return -1 if tensor is None else tensor._version
