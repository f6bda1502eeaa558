"""One call of the block stack, as the driver's code made it, and what of it crosses from block to block."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ...engine.arguments import Earlier, SideInput, Template
from ...engine.call import Ambient, BlockMode, CacheUse, Form, Made
from ...engine.errors import SkipPipeError
from ...engine.probes import Probe
from ...engine.returned import ReturnStructure, tensors_in
from ...engine.taps import TapEvent
from ...engine.transport import TensorSpec
from .arguments import PADDED, SideInputs
from .deferred import Deferral
from .entered import EnteredStack
from .hooks import Running
from .shapes import Mode
from .token import HiddenToken, Origin
from .unavailable import Recording


@dataclass(frozen=True, slots=True)
class UsualCall:
    """A call whose blocks got their hidden states and nothing else, and what came out about them: mostly the next one
    is the same."""

    asked_in: tuple[Mode, Mode]
    templates: tuple[Template]
    modes: tuple[BlockMode, ...]
    probes: tuple[Probe, ...]
    specs: tuple[TensorSpec, ...]
    structures: tuple[ReturnStructure, ...]
    careful: tuple[bool, ...]


@dataclass(slots=True)
class StackCall:
    """One call of the block stack, as the driver's code made it."""

    entered: EnteredStack
    ambient: Ambient
    beside: SideInputs = field(default_factory=SideInputs)
    templates: list[Template] = field(default_factory=list)
    block_template: list[int] = field(default_factory=list)
    modes: list[BlockMode] = field(default_factory=list)
    """By block: its flags, attributes and hooks when it was called."""
    careful: list[bool] = field(default_factory=list)
    """By block: whether it may write into its input or hand it on."""
    hooks: dict[int, Mapping[tuple[int, int], Running]] = field(default_factory=dict)
    """By block: the hooks of the driver's that ran on it."""
    events: list[TapEvent] = field(default_factory=list)
    """What those are to see, once the blocks have run."""
    seen: list[Tensor] = field(default_factory=list)
    """The tensors in that."""
    caches: dict[int, Any] = field(default_factory=dict)  # Any: transformers' Cache
    cache_use: CacheUse | None = None
    """What the workers are told of them, once that is known: the same when the call is run once more after a loss."""
    unkept: list[Any] = field(default_factory=list)  # Any: the same
    """Caches that stay empty, since gradients are on."""
    asked_in: tuple[Mode, Mode] = (Mode(False, False), Mode(False, True))
    """In what mode a block is asked about that is not in training, and one that is."""
    placeholder: Tensor | None = None
    """What the next block must be called with."""
    is_bare: bool = False
    """Whether the last block was called with its hidden states and nothing else, as the next one will be, then."""
    specs: list[TensorSpec] = field(default_factory=list)
    """By block: the spec of its input; last, of the stack's output."""
    last_call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    """With what the last block was called, if a call with the very same objects means the same."""
    passes_on: bool = False
    """Whether blocks get more of others than their hidden states."""
    structures: list[ReturnStructure] = field(default_factory=list)
    """By block: what it returns."""
    recording: Recording = field(default_factory=Recording)
    """Tells tokens whether the last block has been called."""
    origin: Origin = field(init=False)
    """The same, and what else tokens know of their call."""
    exported: tuple[Made, ...] = ()
    """What else of what the blocks return the driver's code is known to use after them, in order."""
    tokens: dict[Made, HiddenToken] = field(default_factory=dict)
    """What stands for that in the driver's code."""
    deferrals: list[Deferral] = field(default_factory=list)
    """What code between the blocks has computed of what they return, in its order."""
    changed_by: str = ""
    """A block behind the first that changes its input in place."""
    values: list[Tensor] = field(default_factory=list)
    """The same in its values, once the blocks have run."""
    due: int = 0
    """The block that is to be called next."""
    follows: UsualCall | None = None
    """The call that this one is like so far: all is noted as it was in that one, to its end."""
    probes: list[Probe] = field(default_factory=list)
    """By block: what it makes of its input."""

    def follow(self, usual: UsualCall) -> None:
        """Note all as in another call, until :meth:`depart`."""
        self.follows = usual
        self.templates, self.block_template = [*usual.templates], [0] * len(usual.modes)
        self.modes, self.probes = [*usual.modes], [*usual.probes]
        self.specs, self.structures, self.careful = [*usual.specs], [*usual.structures], [*usual.careful]

    def depart(self) -> None:
        """Forget what was noted of the blocks that are still to be called: they are called in another way."""
        self.follows, due = None, self.due
        self.is_bare = bool(due)
        for noted in (self.block_template, self.modes, self.probes, self.structures, self.careful):
            del noted[due:]
        del self.specs[due + 1 :]
        self.templates = self.templates if due else []
        self.entered.is_passed_on = all(each.passes_input for each in self.probes)

    def as_usual(self) -> UsualCall | None:
        """Return what another call may follow; None where this one was not that simple."""
        template = self.templates[0]
        simple = len(self.templates) == 1 and template.is_bare and not self.hooks and not self.beside.tensors
        if not simple or self.caches or self.unkept or self.deferrals or any(e.changes_input for e in self.probes):
            return None
        modes, probes, forms = tuple(self.modes), tuple(self.probes), (tuple(self.specs), tuple(self.structures))
        return UsualCall(self.asked_in, (template,), modes, probes, *forms, tuple(self.careful))

    @property
    def hidden(self) -> Tensor:
        """What entered the first block, still attached to the driver's graph."""
        return self.entered.hidden

    @property
    def side_inputs(self) -> list[Tensor]:
        """The tensors among the blocks' arguments, each once."""
        return self.beside.tensors

    @property
    def carried(self) -> tuple[tuple[int, ...], ...]:
        """By block: the slots of its side inputs that carry a gradient; empty where none does."""
        if not self.beside.carrying or not self.ambient.grad:
            return ()
        slots = [template.slots().intersection(self.beside.carrying) for template in self.templates]
        by_template = [tuple(sorted(each)) for each in slots]
        return tuple(by_template[index] for index in self.block_template) if any(by_template) else ()

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """What gradients of the blocks go back to on the driver, if it carries one: hidden states and side inputs."""
        return (self.hidden, *(self.side_inputs[slot] for slot in self.beside.carrying if self.ambient.grad))

    @property
    def is_in_parts(self) -> bool:
        """Whether the driver gets more of the last block than its hidden states, maybe something computed of these."""
        last = len(self.block_template) - 1
        return bool(self.hooks.get(last)) or any(made.block == last for made in self.exported)

    @property
    def goes_back(self) -> bool:
        """Whether a gradient goes back through the blocks."""
        if not self.ambient.grad:
            return False
        entering = any(each.requires_grad for each in (self.hidden, *self.side_inputs))
        return entering or any(any(mode.requires_grad) for mode in self.modes)

    @property
    def on_host(self) -> tuple[int, ...]:
        """The slots of those that are on the host though the hidden states are on a device."""
        if self.hidden.device.type == "cpu":
            return ()
        return tuple(slot for slot, tensor in enumerate(self.side_inputs) if tensor.device.type == "cpu")

    @property
    def caching(self) -> list[int]:
        """The blocks that got a key-value cache."""
        has_cache = [template.has_cache() for template in self.templates]
        return [block for block, index in enumerate(self.block_template) if has_cache[index]]

    def used(self) -> list[Made]:
        """Return the tensors beside the hidden states that blocks return and that others or the code after them use.

        Of blocks that are alike all are named: what is asked of one of them holds for each.
        """
        numbers = {made.number for made in self.exported}
        numbers |= {each.number for template in self.templates for each in template.earlier()}
        found = (Made(block, number) for block in range(len(self.structures)) for number in sorted(numbers - {0}))
        return [made for made in found if made.number < len(self.structures[made.block].tensors)]

    @property
    def forms(self) -> tuple[TensorSpec, ...] | tuple[Form, ...]:
        """By block: what enters it; last, what leaves the stack."""
        if not self.passes_on:
            return tuple(self.specs)
        return tuple(Form(spec, beside) for spec, beside in zip(self.specs, self._passed(), strict=True))

    def _passed(self) -> list[tuple[tuple[Earlier, TensorSpec], ...]]:
        """Return by block what must have come to it beside its hidden states: some for it, some for others behind."""
        found: list[set[Earlier]] = [set() for _ in self.specs]
        for block, index in enumerate(self.block_template):
            for each in self.templates[index].earlier():
                for boundary in range(block - each.distance + 1, block + 1):
                    found[boundary].add(Earlier(boundary - block + each.distance, each.number))
        order = [sorted(each - {Earlier(1, 0)}, key=lambda e: (e.distance, e.number)) for each in found]
        return [tuple((e, self.spec_of(block, e)) for e in each) for block, each in enumerate(order)]

    def spec_of(self, block: int, earlier: Earlier) -> TensorSpec:
        """Return the spec of what ``block`` would name so."""
        made = Made(block - earlier.distance, earlier.number)
        return self.structures[made.block].tensors[made.number] if made.number else self.specs[made.block + 1]

    def alone(self, block: int) -> StackCall:
        """Return this call with all that ``block`` gets of others among the side inputs, with made-up values.

        It is for questions about that one block; of several such tensors, the order is that of :func:`passed_to`.
        """
        template = self.templates[self.block_template[block]]
        earlier = passed_to(template)
        if not earlier:
            return self
        made = [_made_up(self.spec_of(block, each), self.hidden.device, self.ambient.grad) for each in earlier]
        opened = with_sides(template, len(self.side_inputs))
        numbers = list(self.block_template)
        numbers[block] = len(self.templates)
        sides = SideInputs([*self.side_inputs, *made])
        templates = [*self.templates, opened]
        return dataclasses.replace(self, templates=templates, block_template=numbers, beside=sides)

    def fill(self, make: Callable[[TensorSpec], Tensor]) -> None:
        """Answer what the driver's code is to get beside the stack's result."""
        self.values = [make(self.spec_of(made.block + 1, Earlier(1, made.number))) for made in self.exported]

    def check_unchanged(self) -> None:
        """Raise when what the blocks are called with was changed in place since."""
        self.entered.check()
        self.beside.check()


def passed_to(template: Template) -> list[Earlier]:
    """Return what a block that is called so gets of others beside its hidden states, in a fixed order."""
    return sorted(template.earlier(), key=lambda each: (each.distance, each.number))


def with_sides(template: Template, first: int) -> Template:
    """Return a template with side inputs for what :func:`passed_to` returns, in its order, from slot ``first`` on."""
    slots = {each: SideInput(first + index) for index, each in enumerate(passed_to(template))}
    return template.with_leaves(lambda leaf: slots[leaf] if isinstance(leaf, Earlier) else leaf)


def entering(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the hidden states among the arguments of the first block, which has a name."""
    if any(isinstance(each, PackedSequence) for each in (*args, *kwargs.values())):
        raise SkipPipeError(
            PADDED.format(name=name, kind="a PackedSequence", pad="torch.nn.utils.rnn.pad_packed_sequence")
        )
    hidden = _first_tensor(args, kwargs)
    if hidden is None:
        raise SkipPipeError(f"{name} was called without a tensor of hidden states")
    if hidden.is_nested:
        raise SkipPipeError(PADDED.format(name=name, kind="a nested tensor", pad="torch.nested.to_padded_tensor"))
    return hidden


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    if args and isinstance(args[0], Tensor):
        return args[0]
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"]  # type: ignore[no-any-return]
    found = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if found is None:  # in a tuple, a dict or a dataclass
        found = next(iter(tensors_in((args, kwargs))), None)
    return found


def position_of(placeholder: Tensor | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Return where among a block's arguments the hidden states are; None where they are none of them."""
    for index, value in enumerate(args):
        if value is placeholder:
            return index
    return next((name for name, value in kwargs.items() if value is placeholder), None)


def same_arguments(call: StackCall, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block is called like the one before it, the hidden states aside: the usual case, found fast."""
    assert call.last_call is not None
    old_args, old_kwargs = call.last_call
    hidden = call.templates[call.block_template[-1]].hidden
    if len(args) != len(old_args) or kwargs.keys() != old_kwargs.keys():
        return False
    if hidden is None or (args[hidden] if isinstance(hidden, int) else kwargs[hidden]) is not call.placeholder:
        return False
    same_args = all(a is b for index, (a, b) in enumerate(zip(args, old_args, strict=True)) if index != hidden)
    return same_args and all(kwargs[name] is old_kwargs[name] for name in kwargs if name != hidden)


def _made_up(spec: TensorSpec, device: torch.device, grad: bool) -> Tensor:
    values = spec.random(device, torch.Generator().manual_seed(len(spec.shape)))
    return values.requires_grad_(grad) if values.is_floating_point() or values.is_complex() else values
