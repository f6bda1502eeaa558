"""Proxies: the blocks of the driver's model, which record how they are called while the real blocks are elsewhere.

The module objects stay the user's own, of a subclass of their class, so that attributes, ``isinstance`` and names
work as before; their parameters keep their identity and become meta tensors. All but the last block of a call return
a placeholder at once; the last one hands the whole call over and returns the real result.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from ...engine.arguments import Template
from ...engine.attributes import Key
from ...engine.call import NO_CACHES, Ambient, BlockMode, CacheUse, Call, CallSpec, Form, Hop, Made, device_types
from ...engine.errors import SkipPipeError
from ...engine.probes import Probe
from ...engine.process_switches import ProcessSwitches
from ...engine.returned import ReturnStructure
from ...engine.transport import TensorSpec
from . import astray
from .arguments import ArgumentTaker, is_settled
from .attributes import BlockAttributes, written_elsewhere
from .caches import WITH_GRADIENTS, CacheLedger, close
from .capturing import refuse_captured_parts, shown_to_capturing
from .classes import ClassWatch
from .deferred import Forms, defer
from .entered import EnteredStack
from .hooks import Seen, StackHooks
from .ordinary import copied, reduced
from .poison import Poison
from .shapes import Mode, ShapeBook
from .stack_call import StackCall, UsualCall, entering, passed_to, position_of, same_arguments
from .suspend import current_thread
from .switches import check_modes
from .token import HiddenToken, Origin, begins_stack
from .twins import in_common, made_by_hooks, twin
from .unavailable import OutputWanted, Unavailable

_BARE: Final = Template((None,), {}, 0)
"""A block's hidden states and nothing else."""

_PAST_HOOKS: Final = (
    "block.forward(...) is called on a block that has forward hooks, which would not run in one process, but do on a "
    "pipeline's workers: remove the hooks, or call block(...)"
)

_WRITES: Final = (
    "the forward of a block writes the attribute {name} of a module that other blocks have, too: each of them has the "
    "module in a copy, which would not see that. Give each block a module of its own (it may have the parameters in "
    "common), or let forward keep nothing on the module"
)

_BUSY: Final = (
    "{name} is called with tensors of other forms, or in another mode, than ever before, while what it was called with "
    "before is still to go back through it: its worker cannot be asked what it makes of them. Call the model so once "
    "before (Lightning's sanity check does, num_sanity_val_steps=1), or after the backward"
)

log = logging.getLogger(__name__)

_FROM_BEFORE: Final = (
    "the blocks' forwards have written attributes, on workers (%s). They do not come back: in the model they are "
    "again what they were before the run"
)


class BlockProxies:
    """The proxies of one model's block stack."""

    def __init__(
        self,
        names: Sequence[str],
        blocks: Sequence[nn.Module],
        device: torch.device,
        probe: Callable[[int, Call, TensorSpec], Probe],
        forward: Callable[[StackCall], Tensor],
        other_stacks: Sequence[str] = (),
    ) -> None:
        self.names = tuple(names)
        self.blocks = tuple(blocks)
        self.book = ShapeBook(blocks)
        self._forms = Forms(device)
        self.ledger = CacheLedger()
        self._device_types = device_types(device)
        self._probe = probe
        self._forward = forward
        self._attributes = [BlockAttributes(name, block) for name, block in zip(names, blocks, strict=True)]
        self._in_common = in_common(blocks)
        self._hooks = StackHooks(names, blocks)
        self._classes = ClassWatch(blocks)
        self._switches: ProcessSwitches | None = None
        self._poison = Poison()
        self._closed: list[str] = []
        """The names of the attributes that the blocks' forwards write."""
        self._is_in_step = self._is_announced = False
        self._fresh = False
        """Whether the blocks' flags were read in this step."""
        self.other_stacks = tuple(other_stacks)
        """Other stacks of the model, as ``blocks=`` names them, for messages."""
        self._open: dict[object, StackCall] = {}
        """By the step thread that has begun with it (or what stands for code outside of steps)."""
        self.forms: tuple[TensorSpec, ...] | tuple[Form, ...] = ()
        """Of the last call: what entered each block, and what left the stack; empty before."""
        self._outside = _Outside()
        self.detached = False
        """True while the driver holds no weights of its remote blocks."""
        self._usual: UsualCall | None = None
        """The last call, where others may be like it."""
        self.entrances = frozenset(block for block in range(1, len(names)) if begins_stack(names, block))
        """The blocks with which further stacks begin; they may get nothing of what others have returned."""
        self._mains = [Made(block, 0) for block in range(len(blocks))]
        self._exported: set[Made] = set()
        """What else of what blocks return the driver's code has asked for."""

    # ------------------------------------------------------------- install

    def install(self) -> dict[int, nn.Module]:
        """Turn the blocks into proxies; return modules that still compute and share their parameters."""
        real = {index: twin(block) for index, block in enumerate(self.blocks)}
        places: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks):
            places.setdefault(id(block), []).append(index)
        for first, *others in places.values():
            block = self.blocks[first]
            again = functools.partial(self._called_again, (first, *others))
            block.__dict__["_skippipe_call"] = again if others else functools.partial(self._called, first)
            block.__class__ = _proxy_class(type(block))
        self._classes.watch(self.blocks)
        return real

    def remove(self) -> None:
        """Turn the proxies into ordinary blocks again."""
        self._poison.lift()
        if self._closed:
            names, self._closed = self._closed, []
            log.warning(_FROM_BEFORE, ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else ""))
        for block in self.blocks:
            if "_skippipe_call" in block.__dict__:
                del block.__dict__["_skippipe_call"]
                block.__class__ = type(block).__mro__[1]

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Let the blocks be without the hooks that run on the driver, while they are handed over."""
        with ExitStack() as stack:
            for hooks in self._hooks.blocks:
                stack.enter_context(hooks.taken_out())
            yield

    def begin_step(self) -> None:
        """Read the blocks' flags anew at the next call of the stack; large models have thousands."""
        self._fresh = False

    @property
    def is_watched(self) -> bool:
        """Whether hooks of the driver's are to see what goes on inside of the blocks."""
        return self._hooks.are_running

    @property
    def is_settled(self) -> bool:
        """Whether a training step can begin without asking what the blocks do."""
        return self.book.is_settled([block.training for block in self.blocks])

    @property
    def exporting(self) -> frozenset[int]:
        """The blocks of which the driver's code gets more than the stack's result."""
        return frozenset(made.block for made in self._exported)

    def learn(self, wanted: OutputWanted) -> bool:
        """Let blocks return what was asked for, from the next call of the stack on; return whether that is new."""
        self._usual = None
        new = wanted.made - self._exported
        if any(made.number for made in new) and not self.book.is_exact:
            self.book.be_exact()
        for number in {made.number for made in new}:
            if any(made.number == number for made in self._exported):  # one after the other: so for all of them
                self._exported |= {Made(block, number) for block in range(len(self.blocks))}
        self._exported |= new
        return bool(new)

    @contextmanager
    def in_step(self) -> Iterator[None]:
        """While the workers run a step nothing can be asked of them."""
        self._is_in_step = True
        try:
            yield
        finally:
            self._is_in_step = self._is_announced = False

    def note_announced(self) -> None:
        """The workers know of the step under way, and answer nothing until it is over."""
        self._is_announced = self._is_in_step

    def note_all_writes(self, writes: Iterable[tuple[int, Key]]) -> list[str]:
        """Do what :meth:`note_writes` does, for (block, attribute) pairs, which may have come as JSON."""
        return [each for block, (index, name) in writes for each in self.note_writes(block, [(index, name)])]

    def note_writes(self, block: int, keys: Iterable[Key]) -> list[str]:
        """Close attributes to the driver's code that the block's forward writes where it runs; name those that are new.

        Raises:
            SkipPipeError: User code sets one of them, too, or the module that has it is part of several blocks.
        """
        attributes, fresh = self._attributes[block], []
        for key in attributes.leave_to_worker(keys):
            module = attributes.module(key)
            if id(module) in self._in_common and key[1] not in made_by_hooks(module):
                raise SkipPipeError(_WRITES.format(name=attributes.full_name(key)))
            fresh.append(attributes.full_name(key))
            self._poison.close(attributes.module(key), key[1], written_elsewhere(attributes.full_name(key)))
        self._closed += fresh
        return fresh

    # --------------------------------------------------------------- calls

    def spec(self, call: StackCall, hops: tuple[Hop, ...]) -> CallSpec:
        """Return the part of ``call`` that is the same for most microbatches."""
        return CallSpec(
            hops,
            tuple(call.templates),
            tuple(call.block_template),
            tuple(call.modes),
            call.ambient,
            tuple(call.careful),
            call.on_host,
            call.carried,
            call.exported,
        )

    def learn_forms(self, call: StackCall) -> None:
        """Find what ``call``, which was cut from another one, makes of its hidden states (``specs``)."""
        call.specs[1:], call.structures = [], []
        for block in range(len(self.blocks)):
            probe = self._look_up(call, block)
            call.specs.append(probe.output)
            call.structures.append(probe.structure)
        self.forms = call.forms

    def one_of_each(self, call: StackCall) -> list[int]:
        """Return blocks of which every block of this call has one of its kind, that is called alike."""
        kinds = [(self.book.alike(block)[0], call.block_template[block]) for block in range(len(self.blocks))]
        return [kinds.index(kind) for kind in dict.fromkeys(kinds)]

    def question_about(self, call: StackCall, block: int) -> CallSpec:
        """Return how ``block`` is to be called when something is asked about it."""
        template = call.templates[call.block_template[block]]
        modes = (call.modes[block],) * len(self.blocks)
        ambient = dataclasses.replace(call.ambient, inference=False, caches_casts=True)
        carried = call.carried[block : block + 1] * len(self.blocks)
        return CallSpec((), (template,), (0,) * len(self.blocks), modes, ambient, on_host=call.on_host, carried=carried)

    def cache_use(self, call: StackCall) -> CacheUse:
        """Return the key-value caches of ``call``, which runs, with what happened to them since the call before."""
        if not call.unkept and not call.caches:
            return NO_CACHES
        for cache in call.unkept:
            close(cache, WITH_GRADIENTS)
        if call.cache_use is None:
            call.cache_use = self.ledger.use(list(call.caches))
        return call.cache_use

    def check_complete(self, owner: object) -> None:
        """Raise when the code that ``owner`` (a step thread) runs left the stack before its last block."""
        call = self._open.pop(owner, None)
        if call is not None:
            raise astray.left_early(call, self.names, self.entrances)

    def explaining(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """Let the errors of a step's function say so where they may come of hooks that have not run yet."""

        def run() -> Any:  # Any: what the function returns
            try:
                return function()
            except Exception as error:
                call = self._open.get(current_thread())
                if call is None or not call.hooks or isinstance(error, SkipPipeError):
                    raise
                raise astray.failed_early(call, self.names, error) from error

        return run

    def forget_open_calls(self) -> None:
        """Drop the calls of a step that was given up."""
        self._open.clear()

    def _called_again(self, places: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take a call of a module that is several blocks: it is the one that is due."""
        call = self._open.get(current_thread() or self._outside)
        due = 0 if call is None else call.due
        return self._called(due if due in places else places[0], args, kwargs)

    def _called(self, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        owner = current_thread() or self._outside
        if block == 0:
            self.check_complete(owner)
            call = self._begin(args, kwargs)
            self._open[owner] = call
        else:
            found = self._open.get(owner)
            if found is None or block != found.due:
                raise astray.out_of_order(0 if found is None else found.due, block, self.names, self.entrances)
            call = found
        hooks = self._hooks.of(block)
        mode, tensors = self._attributes[block].mode()
        is_bare = len(args) == 1 and not kwargs and args[0] is call.placeholder
        if call.follows is not None and not (is_bare and mode is call.modes[block] and not hooks.lists):
            call.depart()
        if call.follows is not None:
            probe = call.probes[block]
        else:
            if is_bare and call.is_bare:
                call.block_template.append(call.block_template[-1])
            else:
                self._record(call, block, args, kwargs)
            call.modes.append(self._mode(call, block, mode, tensors) if hooks.lists or tensors else mode)
            probe = self._note(call, block)
        call.due = block + 1
        if block + 1 < len(self.blocks):
            call.placeholder = token = self._token(call, self._mains[block], probe.output)
            returned = token if probe.structure.is_bare else self._wrapped(call, probe.structure, block, token)
            shown = self.blocks[block]._forward_hooks
            return shown_to_capturing(self.blocks[block], args, returned) if shown else returned
        del self._open[owner]
        self.forms = call.forms
        self._finish(call)
        call.entered.close()
        call.beside.check()
        result = self._forward(call)
        if call.is_in_parts and result.requires_grad:
            result = result.as_subclass(Seen)
        call.entered.hide()
        for event in call.events:
            self._hooks.blocks[event.block].run(event, call.hooks[event.block], call.seen)
        if not call.ambient.grad:
            for cache in call.caches.values():
                first, *others = call.caching
                self.ledger.count(cache, call.specs[first + 1].shape, call.hidden.device, 1 + len(others))
        for made, token in call.tokens.items():
            token.becomes(call.values[call.exported.index(made)])
        for deferral in call.deferrals:
            if deferral.bases.issubset(call.exported):
                deferral.settle()
        returned = result if probe.structure.is_bare else self._wrapped(call, probe.structure, block, result)
        shown = self.blocks[block]._forward_hooks
        return shown_to_capturing(self.blocks[block], args, returned) if shown else returned

    def _note(self, call: StackCall, block: int) -> Probe:
        """Note what ``block`` makes of what it is called with."""
        probe, template = self._look_up(call, block), call.templates[call.block_template[block]]
        if probe.changes_input and call.hooks:
            self._check_unseen(call, block)
        call.probes.append(probe)
        call.specs.append(probe.output)
        call.structures.append(probe.structure)
        call.careful.append(probe.changes_input or probe.passes_input)
        if probe.changes_input and block:
            call.changed_by = call.changed_by or self.names[block]
        call.entered.passed(self.names[block], probe)
        if call.entered.changed_by:
            call.entered.check_apart(self.names[block], [call.side_inputs[slot] for slot in template.slots()])
        return probe

    def _finish(self, call: StackCall) -> None:
        """All blocks were called: say what of theirs the code after them gets beside the result."""
        self._usual = call.follows or call.as_usual()
        call.recording.is_over, call.recording.compute = True, None
        for deferral in call.deferrals:
            deferral.check_unchanged()
        if self._exported:
            last = Made(len(self.blocks) - 1, 0)
            made = (Made(block, n) for block, each in enumerate(call.structures) for n in range(len(each.tensors)))
            call.exported = tuple(each for each in made if each in self._exported and each != last)
        if call.changed_by and (call.exported or call.passes_on):
            raise SkipPipeError(
                f"{call.changed_by} changes its input in place, on a worker, and what blocks before it have returned "
                "is used by other blocks, or after them, who would not see that. Let the block make a new tensor (x = "
                "x * y in place of x *= y)"
            )

    def _wrapped(self, call: StackCall, structure: ReturnStructure, block: int, hidden: Tensor) -> Any:
        """Return what a block itself would, with its hidden states and what stands for its other tensors."""
        name = self.names[block]

        def tensor(number: int, place: int) -> Any:  # Any: a token, or what says that there is none
            made = Made(block, number)
            if not number:
                return hidden
            if call.recording.is_over and made in call.exported:
                return call.values[call.exported.index(made)]
            if not self.book.is_exact:
                return Unavailable(name, place, made, call.recording)
            return self._token(call, made, structure.tensors[number])

        return structure.wrap(tensor, lambda place: Unavailable(name, place))

    def _check_unseen(self, call: StackCall, block: int) -> None:
        """Refuse a block that changes its input in place where a hook on the driver has kept that tensor, maybe."""
        if block - 1 in call.hooks:
            watched = self.names[block - 1]
        elif any(hook.pre for hook in call.hooks.get(block, {}).values()):
            watched = self.names[block]
        else:
            return
        raise SkipPipeError(
            f"{self.names[block]} changes its input in place, on a worker, and a hook of yours on {watched} may have "
            "kept that tensor, which would not change here. Let the block make a new tensor (x = x * y in place of "
            "x *= y), or remove the hook"
        )

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StackCall:
        refuse_captured_parts(self.names[0])
        check_modes(self.names[0])
        hidden = entering(self.names[0], args, kwargs)
        if not self._fresh or current_thread() is None:  # outside of steps anything may have happened since
            for attributes in self._attributes:
                attributes.refresh_flags()
            self._classes.check()
            self._switches = ProcessSwitches.current()
            self._fresh = True
        if isinstance(hidden, HiddenToken):
            hidden.check_wanted(f"as the input of {self.names[0]}")
            raise SkipPipeError(
                f"{self.names[0]} was called with the output of {hidden.origin()}, which stays on a worker: the blocks "
                "of a pipeline are called once each, in order. Name another stack with blocks=..., or train without "
                "the pipeline"
            )
        ambient = Ambient.current(self._device_types, self._switches)
        dtypes = ambient.autocast, torch.get_default_dtype()
        asked_in = Mode(ambient.grad, False, dtypes), Mode(ambient.grad, True, dtypes)
        thread = current_thread()
        is_hooked = thread is not None and thread.has_hooked
        call = StackCall(EnteredStack(hidden, is_hooked=is_hooked), ambient, asked_in=asked_in, placeholder=hidden)
        call.specs.append(TensorSpec.of(hidden))
        usual = self._usual
        if usual is not None and usual.specs[0] == call.specs[0] and usual.asked_in == asked_in:
            call.follow(usual)
        call.recording.compute = functools.partial(self._compute, call)
        call.origin = Origin(self.names, hidden.device, call.recording, call.modes if ambient.grad else ())
        return call

    def _compute(
        self,
        call: StackCall,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        tokens: Sequence[HiddenToken],
    ) -> Any:  # Any: tokens, as the function returns tensors
        """Note what code between the blocks computes of their outputs."""
        ambient = Ambient.current(self._device_types)
        try:
            deferral = defer(self._forms, function, args, kwargs, ambient, tokens)
        except Exception as error:
            tokens[0].refuse(function, error)
        if deferral is None:
            tokens[0].refuse(function)
        call.deferrals.append(deferral)
        return deferral.results[0] if deferral.is_single else tuple(deferral.results)

    def _record(self, call: StackCall, block: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if call.last_call is not None and same_arguments(call, args, kwargs):
            call.block_template.append(call.block_template[-1])
            return
        position = position_of(call.placeholder, args, kwargs)
        call.is_bare = bare = len(args) == 1 and not kwargs and position is not None
        template = _BARE if bare else self._taken(call, block, position, args, kwargs)
        if template not in call.templates:
            call.templates.append(template)
            call.passes_on = call.passes_on or (template.repeats and bool(template.earlier()))
        call.block_template.append(call.templates.index(template))
        settled = bare or (not template.repeats and all(map(is_settled, (*args, *kwargs.values()))))
        call.last_call = (args, kwargs) if settled else None

    def _taken(
        self, call: StackCall, block: int, position: int | str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Template:
        """Take the arguments of a block; at ``position`` stand the hidden states, unless they are inside of one."""
        taker = self._taker(call, block)
        error: SkipPipeError | None = None
        try:
            template = taker.template(position, args, kwargs)
        except SkipPipeError as refusal:
            error = refusal
        if position is None and not taker.has_met_tokens and block not in self.entrances:
            raise SkipPipeError(
                f"{self.names[block]} was not called with what {self.names[block - 1]} returned: code between the "
                "blocks changes the hidden states (or activation checkpointing wraps a block from outside). Move that "
                "code into a block, or name a stack without such code with blocks=..."
            ) from error
        if error is not None:
            raise error
        return template

    def _find(self, call: StackCall, made: Made) -> None:
        """Learn the form of a tensor that a block of ``call`` has returned, now that another one gets it."""
        if not self.book.is_exact:
            self.book.be_exact()
        call.structures[made.block] = self._look_up(call, made.block).structure

    def _taker(self, call: StackCall, block: int) -> ArgumentTaker:
        def cache_slot(cache: Any) -> int:
            key = self.ledger.key(cache)
            call.caches[key] = cache
            return list(call.caches).index(key)

        assert call.placeholder is not None
        return ArgumentTaker(
            self.names,
            block,
            call.placeholder,
            call.beside,
            grad=call.ambient.grad,
            recording=call.recording,
            find=functools.partial(self._find, call),
            cache_slot=cache_slot,
            leave=call.unkept.append,
        )

    def _token(self, call: StackCall, made: Made, spec: TensorSpec) -> HiddenToken:
        carries = call.ambient.grad and (call.entered.hidden.requires_grad or bool(call.beside.carrying))
        token = HiddenToken.of(call.origin, made, spec, carries=carries)
        if made in self._exported:
            call.tokens[made] = token
        return token

    def _mode(self, call: StackCall, block: int, mode: BlockMode, tensors: Sequence[Tensor]) -> BlockMode:
        """Return what user code has set on ``block`` until now: a mode of its attributes, and the tensors in it."""
        hooks = self._hooks.blocks[block]
        if hooks.lists:
            call.hooks[block] = hooks.running
        slots = tuple([call.beside.slot(tensor, self.names[block]) for tensor in tensors])
        return dataclasses.replace(mode, hooks=hooks.lists, tensors=slots)

    def _look_up(self, call: StackCall, block: int) -> Probe:
        """Return what ``block`` makes of what enters it in this call."""
        mode = call.asked_in[call.modes[block].training[0]]
        template = call.templates[call.block_template[block]]
        beside = self._entering(call, block, template) if template.repeats or template.hidden is None else ()
        ask = not self._is_in_step or (bool(beside) and not self._is_announced)
        return self.book.output(block, call.specs[block], mode, lambda: self._ask(call, block), ask=ask, beside=beside)

    def _entering(self, call: StackCall, block: int, template: Template) -> tuple[Hashable, ...]:
        """Return what its output's form depends on, of what ``block`` gets of others beside its hidden states."""
        found: list[Hashable] = [call.spec_of(block, each) for each in passed_to(template)]
        if template.computes or template.hidden is None:
            found += [str((template.args, template.kwargs))]
            found += [TensorSpec.of(call.side_inputs[slot]) for slot in sorted(template.slots())]
        return tuple(found)

    def _ask(self, call: StackCall, block: int) -> Probe:
        """Ask the holder of ``block`` what it does with this input."""
        if self._is_announced:
            raise SkipPipeError(_BUSY.format(name=self.names[block]))
        empty = self.ledger.emptied(list(call.caches))  # as in the first call of a generation
        alone = call.alone(block)
        question = Call(self.question_about(alone, block), tuple(alone.side_inputs), 0, empty)
        probe = self._probe(block, question, call.specs[block])
        for each in self.book.alike(block):
            self.note_writes(each, probe.writes)
        hooks = self._hooks.blocks[block]
        hooks.let_run_here(probe.idle)
        if hooks.lists != call.modes[block].hooks:  # attributes stay: a piece of a batch has its own part of them
            call.hooks[block] = hooks.running
            call.modes[block] = dataclasses.replace(call.modes[block], hooks=hooks.lists)
        return probe


class _Outside:
    """Owns the call that code outside of any step has open."""


def _proxy_class(cls: type[nn.Module]) -> type[nn.Module]:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.__dict__["_skippipe_call"](args, kwargs)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self._forward_hooks or self._forward_pre_hooks:
            raise SkipPipeError(_PAST_HOOKS)
        return self.__dict__["_skippipe_call"](args, kwargs)

    named = functools.wraps(cls.forward)(forward)  # for who asks for its signature
    names = {
        "__call__": call,
        "forward": named,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return type(cls.__name__, (cls,), names | {"__deepcopy__": copied(cls), "__reduce_ex__": reduced(cls)})
