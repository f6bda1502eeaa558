"""A stage on the rank that holds it: its blocks, their forward and backward, their gradients.

Used by workers, and by a driver that hosts a stage. Nothing here knows of processes or messages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.distributed.pipelining._backward import stage_backward_input, stage_backward_weight

from .arguments import ArgumentGuard, ArrayInput, CacheRef, Earlier, HiddenAgain, Packed, SideInput, array_of
from .attributes import BlockWatch, Key, apply_changes, attributes_kept, named_attributes
from .call import Ambient, BlockMode, Call, CallSpec, Hop, Made, block_seed, made_before
from .computed import Computed
from .crossing import Gradients, Kept, Tensors, check_outputs, leaves_of
from .device import kept_random_states, random_states, seed_everything, set_random_states
from .errors import SkipPipeError
from .gradients import collector
from .half import computed_in_half
from .independence import Parts, difference, uncompiled
from .kept_state import Buffers
from .kvcache import CacheShelf
from .lasting import shows_later
from .memory_order import from_memory, in_memory, order_of
from .probes import Probe
from .process_switches import ProcessSwitches
from .returned import ReturnStructure, hidden_of, tensors_of
from .reuse import uses_again
from .taps import Recorder, Returns, Tapped
from .transport import TensorSpec


class Company(Protocol):
    """The other ranks that a stage's forward and backward need; each call of one is a call of all."""

    def enter(self, present: Sequence[bool]) -> None:
        """Begin a forward or backward of this rank; ``present`` tells which positions have a microbatch for it."""

    def leave(self) -> None:
        """End it."""

    def attend(self, meeting: int) -> None:
        """Take part in one of the others without a microbatch; its forward and backward have the same number."""


class DriverSide(Protocol):
    """What a microbatch has on its driver beside the hidden states: hooks of user code on blocks, and side inputs."""

    def show(self, stage: int, microbatch: int, tapped: Tapped) -> None:
        """Send what they are to see."""

    def gradients(self, stage: int, microbatch: int) -> Mapping[int, Tensor]:
        """Wait for the gradients of the tensors in that, by index."""

    def send_gradients(self, stage: int, microbatch: int, gradients: Mapping[int, Tensor]) -> None:
        """Send the gradients that came to side inputs in a stage, by slot."""


class Witness(Protocol):
    """What counts along with the microbatches of a training step."""

    def begin(self, microbatch: int) -> None:
        """Begin a forward."""

    def end(self, microbatch: int) -> None:
        """End it."""

    def turn(self, microbatch: int) -> None:
        """Begin the backward, or a half of it."""


@dataclass(frozen=True, slots=True)
class _Notes:
    """What all microbatches of one spec have in common for a stage, found once."""

    spec: CallSpec
    plain: bool
    """Whether the first block neither writes into its input nor hands it on, nor shows it to a hook."""
    bare: frozenset[int]
    """The blocks that get the hidden states and nothing else."""
    lasting: bool
    """Whether a block that has been set to its mode stays as the mode says."""
    carried: tuple[int, ...]
    """The slots of the side inputs whose gradients go back to the driver."""
    exported: tuple[Made, ...]
    """What the driver gets of what the blocks return, beside what leaves the last one."""
    kept: frozenset[Made]
    """What is needed again of what they return, or of what enters beside the hidden states."""
    shows: bool
    """Whether the driver gets anything of what goes on in them."""
    stop: int
    """The number after that of the last block."""

    @classmethod
    def of(cls, spec: CallSpec, blocks: Sequence[int], leaves: Hop) -> _Notes:
        """Look at what concerns ``blocks``."""
        modes, first = [spec.modes[block] for block in blocks], blocks[0]
        return cls(
            spec,
            bool(spec.careful) and not spec.careful[first] and not modes[0].hooks,
            frozenset(block for block in blocks if spec.templates[spec.block_template[block]].is_bare),
            not any(mode.tensors for mode in modes),
            spec.carried_by(blocks),
            spec.exported_by(blocks),
            spec.kept_by(blocks, leaves),
            bool(spec.exported_by(blocks)) or any(mode.hooks for mode in modes),
            blocks[-1] + 1,
        )


_Filled = dict[int, tuple[list[Any], dict[str, Any], ArgumentGuard | None]]
"""By template: the arguments of one visit, and what watches them."""


class Stage:
    """Consecutive blocks of the stack, run as one unit."""

    def __init__(self, index: int, blocks: dict[int, nn.Module], device: torch.device, *, guest: bool = False) -> None:
        """Hold ``blocks`` by number; a ``guest`` lives in the driver's process and leaves its random state alone."""
        self.index = index
        self.blocks = blocks
        self.device = device
        self.company: Company | None = None
        """With whom the stage runs together, where its experts are spread."""
        self.driver_side: DriverSide | None = None
        """Where what tapped modules compute goes to, and the gradients of side inputs."""
        self._recorder = Recorder()
        self._switches: ProcessSwitches | None = None
        self._tapped: dict[int, list[Tensor]] = {}
        self._sides: dict[int, dict[int, Tensor]] = {}
        """By microbatch and slot: what collects the gradients of side inputs."""
        self.witness: Witness | None = None
        """What counts along, in a training step."""
        self._guest = guest
        self._saved: dict[int, tuple[Tensors, Tensors]] = {}
        """By microbatch: what has entered, and what has left, the hidden states first."""
        self._halves: dict[int, Gradients | list[dict[str, Any]]] = {}  # Any: torch's parameter groups
        self._over: set[int] = set()
        """The microbatches whose first half was the whole backward."""
        self._notes: _Notes | None = None
        self._split_in: _Notes | None = None
        """For which calls it is known whether their backward can be split."""
        self._is_whole = False
        """Whether it cannot."""
        self._modes: dict[int, BlockMode] = {}
        self._settled: CallSpec | None = None
        """The spec whose modes all blocks have."""
        self._watches: dict[int, BlockWatch] = {}
        self._writes: dict[int, set[Key]] = {}
        self._unreported: list[tuple[int, Key]] = []
        self._shelf = CacheShelf()
        self.in_half: set[int] = set()
        """The ids of the parameters whose gradients are computed in float16."""
        self._looked_at: CallSpec | None = None
        """The spec whose forward was looked at for them."""
        self._careful = False
        """Whether a block has changed its input in place though nothing said so."""

    def named_parameters(self) -> Iterator[tuple[int, str, nn.Parameter]]:
        """Yield (block, name in the block, parameter)."""
        for block, module in self.blocks.items():
            for name, parameter in module.named_parameters():
                yield block, name, parameter

    def parameters(self) -> list[nn.Parameter]:
        """List the parameters of all blocks, shared ones once."""
        return list(dict.fromkeys(parameter for _, _, parameter in self.named_parameters()))

    def forward(self, microbatch: int, call: Call, entering: Tensors, enters: Hop, leaves: Hop) -> Tensors:
        """Run the blocks; keep what the backward needs.

        Args:
            microbatch: Its number.
            call: How the blocks are called.
            entering: The hidden states, and what enters beside them.
            enters: Says what that is.
            leaves: Says what is to leave the stage.

        Returns:
            What leaves, in the same order, detached.
        """
        ambient = call.spec.ambient
        self._take_over(ambient.switches)
        # What goes back is a training step's, which keeps the user's random state as a whole: this here takes long.
        fork = self._guest and not (enters.requires_grad or leaves.requires_grad)
        notes = self._notes
        if notes is None or notes.spec is not call.spec:
            notes = self._notes = _Notes.of(call.spec, list(self.blocks), leaves)
        if self.witness is not None:
            self.witness.begin(microbatch)
        with self._as_guest(ambient) if fork else ambient.entered():
            inputs = leaves_of(entering, enters) if ambient.grad else entering
            if notes.carried:
                self._sides[microbatch], call = _with_leaves(call, notes.carried)
            kept = Kept(notes.kept) if notes.kept or enters.beside else _NOTHING_KEPT
            if kept is not _NOTHING_KEPT:
                kept.note_entering(next(iter(self.blocks)), enters, [inner(each) for each in inputs])
            if notes.shows:
                with self._shown(microbatch, notes, kept, grad=ambient.grad):
                    output = self._run_blocks(call, notes, inputs[0], kept)
            else:
                output = self._run_blocks(call, notes, inputs[0], kept)
            outputs = (output, *[kept[made_before(notes.stop, each)] for each in leaves.beside])
        check_outputs(self.index, outputs, leaves)
        if ambient.autocast and self._looked_at is not call.spec and output.requires_grad:
            self._looked_at = call.spec
            self.in_half |= computed_in_half(outputs) if ambient.is_half else set()
        if self.witness is not None:
            self.witness.end(microbatch)
        grad = inputs[0].requires_grad or output.requires_grad
        if grad or any(each.requires_grad for each in (*inputs[1:], *outputs[1:])) or microbatch in self._tapped:
            self._saved[microbatch] = (inputs, outputs)
        return tuple([each.detach() for each in outputs])

    def backward(self, microbatch: int, gradients: Gradients) -> Gradients:
        """Back-propagate into the parameters, from the gradients of what has left; return those of what has entered.

        Nothing of either has a gradient where the tuples are empty.
        """
        if self.witness is not None:
            self.witness.turn(microbatch)
        if microbatch not in self._saved:  # a forward without gradients has no way back
            return ()
        inputs, outputs = self._saved.pop(microbatch)
        pairs = zip(outputs, gradients, strict=True) if gradients else ()
        roots = [(output, each) for output, each in pairs if each is not None and output.requires_grad]
        if not roots and self.company is not None and outputs[0].requires_grad:
            roots = [(outputs[0], torch.zeros_like(outputs[0]))]  # others wait for this rank's part in what goes back
        if microbatch in self._tapped:
            assert self.driver_side is not None, "somebody was shown what hooks see"
            tapped, found = self._tapped.pop(microbatch), self.driver_side.gradients(self.index, microbatch)
            roots += [(tapped[index], each.to(self.device)) for index, each in found.items()]
        if roots:
            back_propagate_all(*zip(*roots, strict=True))
        return tuple([leaf.grad for leaf in inputs])

    def backward_input(self, microbatch: int, gradients: Gradients) -> Gradients:
        """Compute the gradient of the input only (I); :meth:`backward_weight` does the rest.

        The split is torch's own; hooks on gradients do not fire and reentrant checkpointing fails under it. It knows
        one way into a stage and one out of it, and no weight that is used again: then this is the whole backward.
        """
        saved = self._saved.get(microbatch)
        several = saved is not None and len(saved[0]) + len(saved[1]) > 2
        if several or microbatch in self._tapped or microbatch in self._sides or self._uses_again(microbatch):
            whole = self.backward(microbatch, gradients)
            self._over.add(microbatch)
            return whole
        if self.witness is not None:
            self.witness.turn(microbatch)
        (gradient,) = gradients or (None,)
        if gradient is None or saved is None or not all(each.requires_grad for (each,) in saved):
            self._halves[microbatch] = gradients
            return ()
        (inputs,), (output,) = saved
        weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
        found, groups = stage_backward_input([output], [gradient], [inputs], iter(weights))
        self._halves[microbatch] = groups
        return (found[0],)

    def _uses_again(self, microbatch: int) -> bool:
        """Whether a weight is used several times in a stage; looked at once for calls of one spec."""
        saved = self._saved.get(microbatch)
        if self._split_in is not self._notes and saved is not None and all(each.requires_grad for (each,) in saved):
            self._split_in, self._is_whole = self._notes, uses_again(saved[1][0], saved[0][0])
        return self._is_whole

    def backward_weight(self, microbatch: int) -> None:
        """Compute the gradients of the parameters (W) that :meth:`backward_input` left out."""
        if microbatch in self._over:
            self._over.remove(microbatch)
            return
        half = self._halves.pop(microbatch)
        if isinstance(half, list):
            self._saved.pop(microbatch)
            if self.witness is not None:
                self.witness.turn(microbatch)
            weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
            stage_backward_weight(iter(weights), half)
        else:
            self.backward(microbatch, half)

    def send_gradients(self, microbatch: int) -> None:
        """Send the driver the gradients that a backward has brought to side inputs, if any of the stage's carry one."""
        sides = self._sides.pop(microbatch, None)
        if sides is not None:
            assert self.driver_side is not None, "nobody who waits for them"
            found = {slot: leaf.grad for slot, leaf in sides.items() if leaf.grad is not None}
            dense = {slot: each if each.layout is torch.strided else each.to_dense() for slot, each in found.items()}
            self.driver_side.send_gradients(self.index, microbatch, dense)

    def forget(self) -> None:
        """Drop the activations of a step that will not be finished."""
        self._sides.clear()
        self._saved.clear()
        self._tapped.clear()
        self._halves.clear()
        self._over.clear()

    def forget_caches(self, keys: Iterable[int]) -> None:
        """Free the stage's part of key-value caches that the driver let go."""
        self._shelf.drop(keys)

    def probe(self, block: int, call: Call, enters: TensorSpec) -> Probe:
        """Run one block on random input without leaving a trace, to learn the form of its output and what it writes."""
        module = self.blocks[block]
        self._set_mode(block, call)
        with self._without_a_trace(module, call) as before, Returns(module) as hooks:
            watch, inputs = BlockWatch(module), enters.random(self.device)
            version = inputs._version
            _, carrying = _with_leaves(call, call.spec.carried_by([block]))

            def run(hidden: Tensor) -> Sequence[Tensor]:
                made = self._call_block(block, carrying, hidden.clone(), {}, CacheShelf.of(call.caches))
                return [each.detach() for each in tensors_of(made)]

            output = self._call_block(block, carrying, inputs, filled={}, shelf=CacheShelf.of(call.caches))
            writes, (buffers, weights) = watch.differences(), before.changed()
            found = Probe.of(output, inputs, changed=inputs._version != version)
            if found.structure.has_numbers and self.company is None:  # perhaps of the values that it got
                again = self._call_block(block, carrying, -enters.random(self.device), {}, CacheShelf.of(call.caches))
                found = dataclasses.replace(found, structure=found.structure.agreeing(ReturnStructure.of(again)))
            if (
                writes
                and module.training
                and self.company is None
                and shows_later(module, before, run, enters, self.device)
            ):
                found = dataclasses.replace(found, lasting=tuple(sorted(named_attributes(module, writes))))
        found = dataclasses.replace(found, buffers=buffers, weights=weights)
        return dataclasses.replace(found, writes=tuple(sorted(writes)), idle=hooks.idle())

    def difference_of_parts(self, block: int, call: Call, enters: TensorSpec, parts: Parts) -> str:
        """Say whether one block makes the same of the parts of a batch as of all of it, without leaving a trace.

        See :func:`skippipe_plugin.engine.independence.difference`.
        """
        if self.company is not None:
            return ""  # a matter of several ranks

        def run(part: Call, hidden: Tensor) -> list[Tensor]:
            found = tensors_of(self._call_block(block, part, hidden.clone(), filled={}, shelf=CacheShelf()))
            return [found[0], *(found[number] for number, _ in parts.beside)]

        module = self.blocks[block]
        self._set_mode(block, call)
        with self._without_a_trace(module, call), torch.no_grad(), uncompiled():
            torch.manual_seed(0)
            return difference(module, run, call, enters.random(self.device), parts)

    @contextmanager
    def _without_a_trace(self, module: nn.Module, call: Call) -> Iterator[Buffers]:
        """Run a block under the call's conditions; bring back its buffers and attributes, and the random states."""
        buffers, states = Buffers(module), random_states(self.device)
        asked = call.spec.ambient
        self._take_over(asked.switches)
        # Where experts are spread, what goes back through them would be a matter of several ranks.
        ambient = Ambient(asked.grad and self.company is None, False, asked.autocast, makes_on=asked.makes_on)
        with torch.inference_mode(False), attributes_kept(module), ambient.entered():  # there no change is counted
            try:
                yield buffers
            finally:
                set_random_states(self.device, states)
                buffers.restore()

    def take_writes(self) -> list[tuple[int, Key]]:
        """Return (block, attribute) for what blocks have written that was not known to be written before."""
        for block in list(self._watches):
            self._learn_writes(block)
        writes, self._unreported = self._unreported, []
        return writes

    def written(self) -> Iterator[tuple[int, set[Key]]]:
        """Yield (block, the attributes that its forwards have written so far)."""
        for block in list(self._watches):
            self._learn_writes(block)
        yield from self._writes.items()

    def _run_blocks(self, call: Call, notes: _Notes, hidden: Tensor, kept: Kept) -> Tensor:
        self._shelf.begin(call.caches)
        if notes.plain and not self._careful:
            try:
                return self._run_each(call, notes, hidden, kept)
            except RuntimeError as error:
                self._expect_changes(next(iter(self.blocks)), error)
                self._shelf.begin(call.caches)
        return self._run_each(call, notes, inner(hidden), kept)

    def _expect_changes(self, block: int, error: RuntimeError) -> None:
        """Be careful from now on, and let the caller repeat what failed since ``block`` changes its input in place.

        It did not do so when it was asked what it does, so that depends on the data. What it has drawn or kept until
        then must come out the same the second time.
        """
        if "leaf Variable that requires grad" not in str(error):
            raise error
        if any(True for _ in self.blocks[block].buffers()) or not self._watches[block].unchanged():
            raise SkipPipeError(
                f"block {block} changes its input in place, which it did not do when it was first asked what it makes "
                "of its input: what it does depends on the data. Let it make a new tensor (x = x + y in place of "
                "x += y)"
            ) from error
        self._careful = True

    def _run_each(self, call: Call, notes: _Notes, hidden: Tensor, kept: Kept) -> Tensor:
        filled: _Filled = {}
        settled, self._settled = self._settled is call.spec, None
        for block, module in self.blocks.items():
            if not settled:
                self._set_mode(block, call)
            seed_everything(block_seed(call.seed, block), self.device)
            if block not in self._watches:
                self._watches[block] = BlockWatch(module)
            if block in notes.bare:
                output = module(hidden)
            else:
                output = self._call_block(block, call, hidden, filled, self._shelf, kept)
            hidden = output if type(output) is Tensor else hidden_of(output)
            if notes.kept:
                kept.note(block, tensors_of(output))
        if notes.kept:
            kept.check()
        if notes.lasting:
            self._settled = call.spec
        return hidden

    @contextmanager
    def _as_guest(self, ambient: Ambient) -> Iterator[None]:
        with ambient.entered(), kept_random_states(self.device):
            yield

    @contextmanager
    def _shown(self, microbatch: int, notes: _Notes, kept: Kept, *, grad: bool) -> Iterator[None]:
        """Send the driver what its hooks are to see of tapped modules in a forward, and what is exported."""
        assert self.driver_side is not None, "nobody to show it to"
        self._recorder.begin()
        try:
            yield
            events, tensors = self._recorder.pack(f"stage {self.index}")
        finally:
            self._recorder.end()
        tensors += [kept[made] for made in notes.exported]
        flags = tuple(grad and tensor.requires_grad for tensor in tensors)
        if any(flags):
            self._tapped[microbatch] = tensors
        self.driver_side.show(self.index, microbatch, Tapped(events, tuple(t.detach() for t in tensors), flags))

    def _take_over(self, switches: ProcessSwitches | None) -> None:
        """Let the process have the driver's switches, for backwards too."""
        if switches is self._switches or switches == self._switches:
            return
        self._switches = switches
        if switches is not None and not self._guest:
            switches.set()

    def _learn_writes(self, block: int) -> None:
        """Note which attributes the block's forwards have written, and look away from them."""
        if self._watches[block].unchanged():
            return
        fresh = self._watches[block].differences()
        known = self._writes.setdefault(block, set())
        known |= fresh
        self._unreported += [(block, key) for key in sorted(fresh)]
        self._watches[block] = BlockWatch(self.blocks[block], known)

    def _call_block(
        self,
        block: int,
        call: Call,
        hidden: Tensor,
        filled: _Filled,
        shelf: CacheShelf,
        kept: Mapping[Made, Tensor] = MappingProxyType({}),
    ) -> Any:  # Any: what the block returns
        index = call.spec.block_template[block]
        template = call.spec.templates[index]
        if index not in filled or template.repeats:
            tensors: list[Tensor] = []
            args, kwargs = template.fill(self._leaf(block, call, hidden, shelf, tensors, kept))
            guarded = tensors or template.mutable
            filled[index] = args, kwargs, ArgumentGuard(template, args, kwargs, tensors) if guarded else None
        args, kwargs, guard = filled[index]
        module = self.blocks[block]
        if template.hidden is None:
            output = module(*args, **kwargs)
        elif isinstance(template.hidden, str):
            output = module(*args, **{**kwargs, template.hidden: hidden})
        else:
            args[template.hidden] = hidden
            output = module(*args, **kwargs)
        if guard is not None:
            guard.check(block, module.forward)
        return output

    def _leaf(
        self,
        block: int,
        call: Call,
        hidden: Tensor,
        shelf: CacheShelf,
        used: list[Tensor],
        kept: Mapping[Made, Tensor],
    ) -> Callable[[Any], Any]:
        """Return what makes an argument of a template's leaf, and notes the side inputs among them as ``used``."""

        def leaf(value: Any) -> Any:  # Any: a leaf of the user's arguments
            kind = type(value)
            if kind is SideInput:
                used.append(call.side_inputs[value.slot])
                return used[-1]
            if kind is CacheRef:
                return shelf.cache(call.caches.keys[value.slot])
            if kind is HiddenAgain:
                return hidden
            if kind is Earlier:
                used.append(kept[Made(block - value.distance, value.number)])
                return used[-1]
            if kind is ArrayInput:
                return array_of(call.side_inputs[value.slot])
            if kind is Computed:
                return value.value(leaf)
            if kind is Packed:
                return value.load(leaf)
            return value

        return leaf

    def _set_mode(self, block: int, call: Call) -> None:
        self._settled = None
        mode, known = call.spec.modes[block], self._modes.get(block)
        if (known is mode or known == mode) and not mode.tensors:
            return
        if block in self._watches:
            self._learn_writes(block)  # before what the driver has set is written over it
        self._modes[block] = mode
        module = self.blocks[block]
        if mode.attributes:
            apply_changes(module, mode.attributes, [call.side_inputs[slot] for slot in mode.tensors])
        for child, training in zip(module.modules(), mode.training, strict=True):
            child.training = training
        for parameter, requires_grad in zip(module.parameters(), mode.requires_grad, strict=True):
            if isinstance(parameter, nn.Parameter):  # on a driver's stage a tensor of the user's may stand in for one
                parameter.requires_grad_(requires_grad)
        if mode.hooks:
            self._recorder.apply(block, module, mode.hooks)
        if block in self._watches:
            self._watches[block].look()


_NOTHING_KEPT: Final = Kept(())
"""Where nothing is needed again."""
_SAME_MEMORY: Final[Callable[[Tensor, torch.Size], Tensor]] = torch.ops.aten._unsafe_view.default


def _with_leaves(call: Call, slots: Iterable[int]) -> tuple[dict[int, Tensor], Call]:
    """Return leaves that collect the gradients of some side inputs, by slot, and the call that computes with them."""
    leaves = {slot: call.side_inputs[slot].detach().requires_grad_() for slot in slots}
    sides = [inner(leaves[slot]) if slot in leaves else each for slot, each in enumerate(call.side_inputs)]
    return leaves, dataclasses.replace(call, side_inputs=tuple(sides))


def inner(leaf: Tensor) -> Tensor:
    """Return what user code gets in place of a tensor that receives a gradient: like what a layer returned.

    It is of the same memory, and may be changed in place; autograd forbids that for a leaf, and for a view of one.
    """
    if not leaf.requires_grad:
        return leaf
    if not torch.is_grad_enabled():
        with torch.enable_grad():
            return inner(leaf)
    same = _SAME_MEMORY(collector(leaf), leaf.shape)
    if same.stride() == leaf.stride():
        return same
    order = order_of(leaf)  # of which dimensions of one entry are a part
    lying = in_memory(leaf, order)
    return from_memory(_SAME_MEMORY(lying, lying.shape), order)


def back_propagate(output: Tensor | GradientEdge, gradient: Tensor, *, keep_graph: bool = False) -> None:
    """Do what ``torch.autograd.backward`` does, without its checks: they take as long as a small block's backward."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((output,), (gradient,), keep_graph, False, (), allow_unreachable=True, accumulate_grad=True)


def back_propagate_all(outputs: tuple[Tensor | GradientEdge, ...], gradients: tuple[Tensor, ...]) -> None:
    """Do the same from several tensors of one graph."""
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward(outputs, gradients, False, False, (), allow_unreachable=True, accumulate_grad=True)
