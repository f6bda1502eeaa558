"""One step on the driver: the users' functions, one for each microbatch, around the blocks."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.utils import _pytree as pytree

from ..engine.arguments import versions
from ..engine.call import Ambient, Call, block_seed
from ..engine.control.values import Opening, States
from ..engine.device import kept_random_states, seed_everything
from ..engine.errors import SkipPipeError
from ..engine.stage import back_propagate, back_propagate_all, inner
from ..schedule import Path
from .capture import own_gradients
from .capture.graphs import AroundTheBlocks, Ends, check_parts, is_over
from .capture.notes import Noted
from .capture.proxies import BlockProxies
from .capture.side_inputs import PreparedCall
from .capture.stack_call import StackCall
from .capture.suspend import Outcome, Returned, StepThreads, Suspended
from .capture.writer import CallWriter
from .doors import IN_A_STEP
from .tapped import TapExchange
from .unfinished import CalledTwice, GivenUp, Parked

_HELD_BACK_S: Final = 0.002
"""For how long announcements are collected before they are sent, so that cheap embeddings share one message."""
_FIRST_SHARE: Final = 1 / 8
"""For what share of the longest round trip the first ones of a step are collected. A worker that already waits for a
tensor hears of further microbatches, and asks for theirs, only when it has come: a round trip later."""
_LITTLE: Final = 1 << 20
"""Bytes of a step's hidden states with which nobody has to be sparing: more of them are announced together."""
_EMBED: Final = 1 << 20
_LOSS: Final = _EMBED + 1
"""Numbers of the driver's own parts where blocks have theirs, for :func:`block_seed`."""
_SOME_WITHOUT_LOSS: Final = (
    "the training step returned a loss for some microbatches and None for others; return None for the whole batch, or "
    "a zero loss"
)
CALLED_TWICE: Final = (
    "the training step calls the blocks more often than in the batches before: how often was found when it was tried. "
    "Let every batch make all of the calls (with a weight of 0 where one should not count), or put their inputs into "
    "one batch"
)
WITH_GRADIENTS: Final = (
    "the blocks of the pipeline were called with gradients enabled in a step that only evaluates (validation, test, "
    "prediction, a model called under torch.no_grad()), where there is no way back through them. Call them under "
    f"torch.no_grad(), or {IN_A_STEP}"
)
OUTSIDE_OF_STEPS: Final = (
    "the blocks of the pipeline were called outside of a training step with gradients enabled; call them under "
    f'torch.no_grad(), or {IN_A_STEP}. Where they stay on the workers between runs (gather="never"), '
    "trainer.strategy.gather() brings them into the model, and it trains anywhere"
)


def not_called(proxies: BlockProxies) -> str:
    """Say that a training step went without the blocks, and which other stacks the model has."""
    others = " or ".join(f'blocks="{name}"' for name in proxies.other_stacks[:5]) or "blocks=..."
    return (
        "the training step returned without calling the blocks of the pipeline "
        f"({proxies.names[0]} ...); name the stack it does call with {others}. Where it does without them for a while "
        "(a warm-up of the head), let it call them all the same under torch.no_grad(), and drop what they return"
    )


@dataclass(frozen=True, slots=True)
class StepTask:
    """What a step has to do."""

    functions: Sequence[Callable[[], Any]]  # Any: what the user's step returns
    """By microbatch of this driver."""
    weights: Sequence[float]
    """By microbatch: what its loss is multiplied with in that of the global batch. What weighs 0 is left out."""
    loss_of: Callable[[Any], Tensor | None]
    """Finds the loss in what a function returned."""
    seed: int
    training: bool
    sizes: Sequence[int] = ()
    """By microbatch: its number of samples, where several are cut from one batch."""
    rewind: Callable[[], None] = lambda: None
    """Undoes what the functions have changed on the driver, before they run once more."""
    outside: Callable[[Sequence[Any], Ends, Callable[[], Parked | None]], None] | None = None
    """Back-propagates into what the functions returned, when the loss is computed outside of them; it may wait. It is
    also told where their graphs end at the blocks (of what these were given, that in one of them), and what tells what
    is left to do if the step is given up."""

    loss_is_sum: bool = False
    """Whether this driver's loss is the sum of the weighted ones as they are, instead of their mean."""
    share: float = 1.0
    """The batch's share of the global batch: one over the number of drivers."""
    scale: float = 1.0
    """What the backward of the batch's loss is expected to bring: one over the number of batches that are accumulated.
    The step's own backward has it already, for hooks and functions with a backward of their own may bend by it."""
    bends: Callable[[], str] = lambda: ""
    """Names what of the step's backward is not linear in the loss, if anything; asked where its gradient is not
    :attr:`scale`."""
    framed: Callable[[], AbstractContextManager[None]] = nullcontext
    """What the functions run in when the step is repeated after its end; what they log then is dropped."""
    states: States | None = None
    """What it wants of the blocks' states."""

    @property
    def shares(self) -> list[float]:
        """By microbatch: its share of the global batch, if other drivers have microbatches like this one's."""
        total = sum(self.weights)
        return [self.share * (weight / total if total else 1 / len(self.weights)) for weight in self.weights]

    @property
    def losses_come_last(self) -> bool:
        """Whether every forward comes before the first backward."""
        return self.outside is not None

    def rewinder(self) -> Callable[[], None]:
        """Return what undoes the step so far, before it is repeated."""
        return self.rewind


class StepRun:
    """Implements the executor's driver part for the microbatches of one driver and one step (or evaluation round).

    ``took_s`` remembers across steps how long the last functions took up to the blocks, ``around`` whether their losses
    reach back before them; ``started`` is told of each function that has come to the blocks.
    """

    def __init__(
        self,
        task: StepTask,
        *,
        first: int,
        threads: StepThreads,
        proxies: BlockProxies,
        writer: CallWriter,
        device: torch.device,
        ambient: Ambient,
        took_s: deque[float],
        around: AroundTheBlocks,
        started: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._task = task
        self._first = first
        self._paths: Sequence[Path] = ()
        self._threads = threads
        self._proxies = proxies
        self._writer = writer
        self._device = device
        self._ambient = ambient
        self._took_s = took_s
        self._around = around
        self._started = started
        self._outcomes: dict[int, Outcome] = {}
        self._calls: dict[int, Call] = {}
        self._hidden: dict[int, Tensor] = {}
        self._sides: dict[int, Sequence[Tensor]] = {}
        self._roots: dict[int, GradientEdge | None] = {}
        """By microbatch: where the gradient of its hidden states goes."""
        self._roots_of_sides: dict[int, Sequence[GradientEdge | None]] = {}
        """By microbatch: its side inputs, where some of them carry a gradient."""
        self._leaves: dict[int, Tensor] = {}
        self._requests: dict[int, tuple[StackCall, Sequence[int]]] = {}
        """By microbatch, where the loss is outside: its call, and the versions of what that was given."""
        self._held_back: list[PreparedCall] = []
        self._announced_s = self._first_s = self._held_since_s = 0.0
        self._opening: Opening | None = None
        self._coming: Sequence[int] = ()
        self._taps: TapExchange | None = None
        self._most_ahead = 0
        self._ahead: dict[int, tuple[Call, Tensor]] = {}
        """By microbatch: what was embedded ahead and has not entered the blocks yet."""
        self.step = -1
        self.losses: dict[int, Tensor | None] = {}
        proxies.begin_step()

    # ------------------------------------------------------ life of a step

    def explained(self) -> AbstractContextManager[None]:
        """Explain failures; those of the user's functions are clear."""
        return nullcontext()

    def live(self, settled: Callable[[], bool]) -> list[int]:
        """Return the microbatches (numbers of the schedule) of a training step that will call the blocks.

        Args:
            settled: Tells after the first function whether the others may start in their turns.
        """
        if self.skipped() or not settled():
            self.start_all()
            return self.waiting()
        return [self._first + index for index in range(len(self._task.functions))]

    def open(
        self,
        step: int,
        paths: Sequence[Path],
        opening: Opening,
        coming: Sequence[int] = (),
        most_ahead: int = 0,
        taps: TapExchange | None = None,
    ) -> None:
        """Begin step number ``step``.

        Args:
            step: Its number.
            paths: By microbatch.
            opening: What the workers are told together with the first call.
            coming: The microbatches of this driver that may be embedded ahead of their turns, in that order.
            most_ahead: How many may be at once; twice as many where they are little.
            taps: Brings what hooks on the blocks are to see.
        """
        self.step, self._paths, self._opening = step, paths, opening
        self._coming, self._most_ahead, self._taps = coming, most_ahead, taps
        self._calls = {}
        self._first_s = time.monotonic() + self._writer.round_trip_s * _FIRST_SHARE

    def start_all(self) -> None:
        """Run every function up to its first call of the blocks."""
        for index in range(len(self._task.functions)):
            if index not in self._outcomes:
                self._start(index)

    def skipped(self) -> bool:
        """Start the first function and say whether it returned None at once, as user code does to skip a batch."""
        self._start(0)
        return isinstance(self._outcomes[0], Returned)

    def waiting(self) -> list[int]:
        """The microbatches (numbers of the schedule) whose functions wait for the blocks."""
        return [self._first + index for index, outcome in self._outcomes.items() if isinstance(outcome, Suspended)]

    def values(self) -> list[Any]:
        """Return what the functions returned, by microbatch."""
        outcomes = [self._outcomes[index] for index in range(len(self._task.functions))]
        assert all(isinstance(outcome, Returned) for outcome in outcomes)
        return [outcome.value for outcome in outcomes if isinstance(outcome, Returned)]

    def loss_of_batch(self) -> Tensor | None:
        """Return the loss of the whole batch; see :func:`merged_loss`."""
        return merged_loss(self, self._task)

    @property
    def shares(self) -> Sequence[float]:
        """By microbatch of this driver: its share of the global batch."""
        return self._task.shares

    def random_state(self) -> AbstractContextManager[None]:
        """Frame a training step: it seeds its own random state."""
        return kept_random_states(self._device)

    @property
    def states(self) -> States | None:
        """What the step wants of the blocks' states."""
        return self._task.states

    # ----------------------------------------------------- the driver part

    def embed(self, microbatch: int) -> tuple[Call, Tensor]:
        if microbatch in self._ahead:
            return self._ahead.pop(microbatch)
        start_s = time.monotonic()
        embedded = self._embed(microbatch)
        if len(self._held_back) == 1:
            self._held_since_s = start_s
        if self._opening is not None:
            self._embed_ahead()
            self._announce_after(0.0)
        else:
            self._announce_after(self._held_since_s + _HELD_BACK_S)
        return embedded

    def announce_due(self) -> None:
        self._announce_after(self._announced_s + _HELD_BACK_S)

    def announce(self) -> None:
        self._embed_ahead()  # this driver would only wait
        self._announce()

    def _embed(self, microbatch: int) -> tuple[Call, Tensor]:
        """Run the user's code up to the blocks, and hold the announcement of their call back."""
        index = microbatch - self._first
        if index not in self._outcomes:
            self._start(index)
        outcome = self._outcomes[index]
        if isinstance(outcome, Returned):
            raise SkipPipeError(_SOME_WITHOUT_LOSS)
        stack_call: StackCall = outcome.request
        seed = block_seed(self._task.seed, microbatch)
        prepared = self._writer.prepare(microbatch, self._paths[microbatch], stack_call, self._proxies, seed)
        self._calls[index] = prepared.call
        if self._task.training:
            self._hidden[index], self._roots[index] = stack_call.hidden, stack_call.entered.root
            if self._task.outside is not None:
                self._requests[index] = stack_call, versions([stack_call.hidden, *stack_call.side_inputs])
            if prepared.call.spec.carried:
                self._sides[index], self._roots_of_sides[index] = stack_call.side_inputs, stack_call.beside.roots
        elif prepared.call.spec.hops[-1].requires_grad:
            raise SkipPipeError(WITH_GRADIENTS)
        self._held_back.append(prepared)
        return prepared.call, stack_call.hidden

    def _embed_ahead(self) -> None:
        """Embed further microbatches, once all that were ahead have had their turn, so that one message announces them.

        Only where that is quick, since others wait for the message.
        """
        if self._ahead or len(self._calls) == len(self._task.functions):
            return
        # The least: a busy machine makes any of them look slow.
        quick = int(_HELD_BACK_S / max(min(self._took_s, default=inf), 1e-6))
        coming = (each for each in self._coming if each - self._first not in self._calls)
        for microbatch in islice(coming, min(quick, self._most_ahead * (2 if self._is_little() else 1))):
            self._ahead[microbatch] = self._embed(microbatch)

    def _is_little(self) -> bool:
        """Whether all hidden states of this driver's microbatches, if they are like the last ones, weigh nothing."""
        last = next(reversed(self._hidden.values()), None)
        return last is not None and last.nbytes * len(self._task.functions) <= _LITTLE

    def _announce(self) -> None:
        if self._held_back or self._opening is not None:
            held_back, self._held_back = self._held_back, []
            opening, self._opening = self._opening, None
            self._writer.send(self.step, held_back, self._paths, opening)
            self._proxies.note_announced()
            self._announced_s = time.monotonic()

    def _announce_after(self, moment_s: float) -> None:
        if (self._held_back or self._opening is not None) and time.monotonic() > max(moment_s, self._first_s):
            self._announce()

    def loss(self, microbatch: int, hidden: Tensor) -> Tensor | None:
        index = microbatch - self._first
        before = self._outcomes[index]
        assert isinstance(before, Suspended)
        before.request.check_unchanged()
        self._show_hooks(index, microbatch)
        if not self._task.training:
            self._outcomes[index] = self._resume(index, hidden)
            return None
        leaf = hidden.requires_grad_(self._calls[index].spec.hops[-1].requires_grad)
        seed_everything(block_seed(block_seed(self._task.seed, microbatch), _LOSS), self._device)
        result = inner(leaf)
        sources = self._sources(index) if self._sides else (self._hidden[index],)
        with own_gradients.Checked((result, sources)):
            outcome = self._resume(index, result)
        if isinstance(outcome, Suspended):
            raise CalledTwice(CALLED_TWICE)
        self._outcomes[index] = outcome
        if self.loss_is_outside:
            self._leaves[microbatch] = leaf
            return None
        loss = self._task.loss_of(outcome.value)
        weight = self._task.weights[index]
        self.losses[index] = None if loss is None else loss.detach()
        if loss is not None and weight:  # what counts nothing may be NaN, a mean over no label
            meet = self._around.look([loss], *sources)
            if meet:
                check_parts([loss], sources, is_hooked=before.request.entered.is_hooked)
            if self._calls[index].spec.ambient.is_half:
                self._around.look_for_half([loss, *sources])
            self._around.look_for_leaves([loss, *sources])
            back_propagate(loss, torch.full_like(loss, weight * self._task.scale), keep_graph=meet)
            if meet:  # nothing else is to keep this microbatch's graph until the end of the step
                detached = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, outcome.value)
                self._outcomes[index] = Returned(detached)
        self._send_back(microbatch)
        is_over(leaf)
        return gradient_of(leaf)

    @property
    def loss_is_outside(self) -> bool:
        return self._task.training and self._task.outside is not None

    def gradients_from_outside(self) -> dict[int, Tensor | None]:
        assert self._task.outside is not None
        assert len(self._leaves) == len(self._task.functions), "the schedule goes back before all losses"
        if any(call.spec.ambient.is_half for call in self._calls.values()):
            self._around.look_for_half(each for each in pytree.tree_leaves(self.values()) if isinstance(each, Tensor))
        is_hooked = any(call.entered.is_hooked for call, _ in self._requests.values())
        ends = Ends(next(map(self._sources, self._hidden), ()), tuple(self._leaves.values()), is_hooked)
        self._task.outside(self.values(), ends, self._parked)
        leaves, self._leaves = self._leaves, {}
        self._requests.clear()
        for microbatch in leaves:
            self._send_back(microbatch)
        for leaf in leaves.values():
            is_over(leaf)
        return {microbatch: gradient_of(leaf) for microbatch, leaf in leaves.items()}

    def backward(self, microbatch: int, gradient: Tensor | None) -> None:
        index = microbatch - self._first
        del self._hidden[index]
        root = self._roots.pop(index)
        if self._sides and index in self._sides:
            self._back_propagate_all(microbatch, root, gradient)
        elif gradient is not None and root is not None:
            self._around.back(lambda: back_propagate(root, gradient))

    # -------------------------------------------------------------- pieces

    def _parked(self) -> Parked | None:
        """Return what is left to do if the step is given up now."""
        leaves = {microbatch - self._first: leaf for microbatch, leaf in self._leaves.items()}
        calls = [GivenUp(*self._requests[index], leaves[index]) for index in sorted(leaves)]
        if not all(call.can_run_again() for call in calls):
            return None
        sources = next(map(self._sources, self._hidden), ())
        return Parked(calls, self.values(), sources, self._task.seed, self._task.sizes)

    def _show_hooks(self, index: int, microbatch: int) -> None:
        """Give the suspended call what its hooks are to see, and what else it is to get, when it goes on."""
        outcome = self._outcomes[index]
        if self._taps is None or not isinstance(outcome, Suspended):
            return
        call: StackCall = outcome.request
        if call.hooks or call.exported:
            shown = self._taps.collect(microbatch, self._paths[microbatch], call)
            call.events, call.seen, call.values = shown.events, shown.tensors, shown.exported

    def _sources(self, index: int) -> tuple[Tensor, ...]:
        """Return what a microbatch's blocks were given that may carry a gradient."""
        return (self._hidden[index], *(side for side in self._sides.get(index, ()) if side.requires_grad))

    def _back_propagate_all(self, microbatch: int, root: GradientEdge | None, gradient: Tensor | None) -> None:
        """Back-propagate into hidden states and side inputs together: one graph may have made them."""
        assert self._taps is not None, "no step is under way"
        index = microbatch - self._first
        sides, spec = self._sides.pop(index), self._calls[index].spec
        found = self._taps.gradients_of_sides(microbatch, self._paths[microbatch], spec, sides)
        beside = self._roots_of_sides.pop(index)
        roots = [(beside[slot], each) for slot, each in found.items()]
        if gradient is not None and root is not None:
            roots.insert(0, (root, gradient))
        if roots:
            self._around.back(lambda: back_propagate_all(*zip(*roots, strict=True)))

    def _send_back(self, microbatch: int) -> None:
        if self._taps is not None:
            self._taps.send_back(microbatch, self._paths[microbatch])

    def _start(self, index: int) -> None:
        if self._task.training:
            seed = block_seed(self._task.seed, self._first + index)
            seed_everything(block_seed(seed, _EMBED), self._device)
        start_s = time.monotonic()
        function = self._proxies.explaining(self._task.functions[index])
        with Noted(self._task.sizes, index):
            outcome = self._threads[index].start(function, self._ambient)
        self._took_s.append(time.monotonic() - start_s)
        self._started(index)
        if isinstance(outcome, Returned):
            self._proxies.check_complete(self._threads[index])
            if self._task.training and outcome.value is None:
                self.losses[index] = None
            elif self._task.training:
                raise SkipPipeError(not_called(self._proxies))
        self._outcomes[index] = outcome

    def _resume(self, index: int, hidden: Tensor) -> Outcome:
        before = self._outcomes[index]
        with Noted(self._task.sizes, index):
            outcome = self._threads[index].resume(hidden, last=self._task.training)
        if isinstance(before, Suspended):
            before.request.recording.check()
        if isinstance(outcome, Returned):
            self._proxies.check_complete(self._threads[index])
        return outcome


class NoFeed:
    """The driver makes its calls itself; nobody sends it any."""

    def poll(self) -> tuple[()]:
        """Nothing ever comes."""
        return ()

    def wait(self) -> tuple[()]:
        """A driver that waits for a call has a wrong schedule."""
        raise AssertionError("an action of a microbatch that another driver leads")


def gradient_of(leaf: Tensor) -> Tensor | None:
    """Return the gradient that reached a leaf; None when none did: the blocks' parameters are to have none either."""
    return leaf.grad


def merged_loss(run: StepRun, task: StepTask) -> Tensor | None:
    """Return the loss of this driver's batch; None when the user's step returned none for any microbatch."""
    losses: Mapping[int, Tensor | None] = run.losses
    present = {index: loss for index, loss in losses.items() if loss is not None}
    if not present:
        return None
    if len(present) != len(losses):
        raise SkipPipeError(_SOME_WITHOUT_LOSS)
    weights = task.weights
    total = 1.0 if task.loss_is_sum else sum(weights[index] for index in present)
    shares = {index: weights[index] / total for index in present if weights[index]}
    scalars = [present[index] for index in shares or present]
    parts = torch.stack([loss.reshape(()) if loss.ndim else loss for loss in scalars])
    if len(set(shares.values())) == 1:  # nearly always, and one operation takes as long as one on them all
        return (parts * next(iter(shares.values()))).sum()
    if not shares:  # a mean over nothing, of which only other drivers' batches have some
        return parts.sum()
    return torch.stack([part * share for part, share in zip(parts, shares.values(), strict=True)]).sum()
