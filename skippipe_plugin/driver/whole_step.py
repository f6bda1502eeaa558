"""One step on the driver whose function runs once, on the whole batch: only its call of the blocks is cut.

The function is suspended where it calls the blocks. The call is cut into microbatches, which go through the pipeline;
their results are put together, and the function goes on with them. So whatever the driver's code computes, draws or
counts, it does as in one process. The price: every forward comes before the loss, and the head has the whole batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from ..engine.arguments import versions
from ..engine.call import Ambient, Call, block_seed
from ..engine.control.values import Opening, States
from ..engine.device import random_states, set_random_states
from ..engine.errors import SkipPipeError
from ..engine.memory_order import order_of
from ..engine.stage import back_propagate, back_propagate_all, inner
from ..schedule import Path
from .capture import own_gradients
from .capture.asking import CutBook, Question, ask
from .capture.cutting import CallForm, Cut, NotCuttable, cut_call, kind_of, likely_cuts
from .capture.graphs import AroundTheBlocks, Ends, check_parts, goes_past, is_over
from .capture.microbatch import split_sizes
from .capture.proxies import BlockProxies
from .capture.side_inputs import PreparedCall
from .capture.stack_call import StackCall
from .capture.suspend import Outcome, Returned, StepThreads, Suspended
from .capture.token import check_available
from .capture.writer import CallWriter
from .steps import CALLED_TWICE, WITH_GRADIENTS, gradient_of, not_called
from .tapped import TapExchange
from .unfinished import CalledTwice, GivenUp, Parked, Unfinished

_STEP: Final = 0
"""The thread in which the user's function runs."""
_QUESTION: Final = 1
"""The thread in which it is asked."""
_BEYOND: Final = "out of range", "out of bounds"
_NAMES_ROWS: Final = (
    "a block failed on a microbatch ({error}), and gets whole numbers of each sample's own: where they name rows of "
    "the batch, a microbatch lacks those rows. Give the blocks the whole batch, with num_microbatches=1. Where they "
    "name something else, one process fails in the same way"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeTask:
    """What a step has to do whose function runs once, on the whole batch."""

    function: Callable[[], Any]  # Any: what the user's step returns
    """The user's step on the whole batch."""
    loss_of: Callable[[Any], Tensor | None]
    """Finds the loss in what the function returned."""
    seed: int
    """Seeds the randomness inside the blocks. The driver's code draws from the user's own random state."""
    training: bool
    name: str = "step"
    """Which of the user's functions it is."""
    questions: Sequence[Question] = ()
    """What may be asked, in this order, until one has an answer; without any the call is not cut."""
    counts: Sequence[int] = ()
    """Where nothing may be asked: how many samples the batch may have, the likeliest first. What fits is tried."""
    cut: tuple[int, Cut] | None = None
    """Where neither is: the number of samples, and how the call is cut, as it was when it ran before."""
    note_state: Callable[[], Callable[[], None]] = lambda: lambda: None
    """Notes what the user's code may change on the driver; returns what undoes it, random states included."""
    repeats: bool = False
    """Whether an interrupted step is repeated, so that the state is noted before each."""
    share: float = 1.0
    """The batch's share of the loss of the global batch: one over the number of drivers."""
    scale: float = 1.0
    """What the backward of the batch's loss is expected to bring; see :class:`StepTask`."""
    bends: Callable[[], str] = lambda: ""
    """Names what of the step's backward is not linear in the loss, if anything; see :class:`StepTask`."""
    framed: Callable[[], AbstractContextManager[None]] = nullcontext
    """What the function runs in when the step is repeated after its end; what it logs then is dropped."""
    outside: Callable[[Sequence[Any], Ends, Callable[[], Parked | None]], None] | None = None
    """Back-propagates into what the function returned, when the loss is computed outside of it; it may wait. It is also
    told where its graph ends at the blocks, and what tells what is left to do if the step is given up."""
    states: States | None = None
    """What it wants of the blocks' states."""

    @property
    def sizes(self) -> tuple[()]:
        """The user's code runs on the whole batch: there is nothing that a microbatch could lack."""
        return ()

    @property
    def losses_come_last(self) -> bool:
        """Whether every forward comes before the first backward."""
        return True

    def rewinder(self) -> Callable[[], None]:
        """Return what undoes the step so far, before it is repeated."""
        return self.note_state() if self.repeats else lambda: None


class WholeRun:
    """Implements the executor's driver part for one function and the microbatches that its call of the blocks makes.

    Args:
        task: What to do.
        microbatches: The microbatches of the schedule that the call may make.
        book: How calls are cut.
        differs: Asks what the blocks compute otherwise for the parts of a call than for all of it, if anything.
        around: What is known of the run's steps.
        before_backward: Puts aside the accumulated gradients, which the function has seen.
        shown: Shows the function the accumulated gradients where they are put aside already, since a stage on this
            driver may have others' microbatches.
    """

    def __init__(
        self,
        task: WholeTask,
        *,
        microbatches: range,
        book: CutBook,
        differs: Callable[[StackCall, Cut, int], str],
        threads: StepThreads,
        proxies: BlockProxies,
        writer: CallWriter,
        device: torch.device,
        ambient: Ambient,
        around: AroundTheBlocks,
        before_backward: Callable[[], None],
        shown: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._task = task
        self._first = microbatches.start
        self._most = len(microbatches)
        self._book = book
        self._differs = differs
        self._threads = threads
        self._thread, self._asked = threads[_STEP], threads[_QUESTION]
        self._proxies = proxies
        self._writer = writer
        self._device = device
        self._ambient = ambient
        self._around = around
        self._before_backward = before_backward
        self._shown = shown
        self._outcome: Outcome | None = None
        self._undo: Callable[[], None] | None = None
        """Undoes what the function has changed so far, where that may be asked for."""
        self._draws: list[Tensor] = []
        """The user's random state, while others use the generators."""
        self._answers: list[Tensor] = []
        """What the function was answered so far, while it may have to begin again."""
        self._earlier: list[CallForm] = []
        self._sizes: Sequence[int] = ()
        self._parts: list[StackCall] = []
        """The calls of the microbatches; empty when none waits."""
        self._call: StackCall | None = None
        self._versions: Sequence[int] = ()
        """Of what it was given."""
        self._found: tuple[int, Cut] | None = None
        self._cut: Cut | None = None
        self._prepared: dict[int, Call] = {}
        self._results: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor | None] = {}
        self._of_sides: dict[int, dict[int, Tensor]] = {}
        """By slot and microbatch: the gradients of the microbatches' side inputs."""
        self._opening: Opening | None = None
        self._paths: Sequence[Path] = ()
        self._loss: Tensor | None = None
        self._taps: TapExchange | None = None
        self.step = -1
        proxies.begin_step()

    # ------------------------------------------------------ life of a step

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Say of a failed look-up of rows that the rows may be those of another microbatch."""
        try:
            yield
        except (IndexError, RuntimeError) as error:
            is_ours = isinstance(error, SkipPipeError)
            looked_up = isinstance(error, IndexError) or any(words in str(error) for words in _BEYOND)
            if is_ours or not looked_up or self._cut is None or self._call is None:
                raise
            if not self._cut.has_numbers(self._call):
                raise
            raise SkipPipeError(_NAMES_ROWS.format(error=error)) from error

    def live(self, settled: Callable[[], bool]) -> list[int]:
        """Run the function up to the blocks; return the microbatches that will call them."""
        self.start_all()
        return self.waiting()

    def start_all(self) -> None:
        """Run the function up to its first call of the blocks, if it did not run."""
        if self._outcome is not None:
            return
        task = self._task
        if self._most > 1 and task.questions and task.name not in self._book.settled:
            self._undo = task.note_state()
        self._start()

    def waiting(self) -> list[int]:
        """Go on with what has come back; return the microbatches (numbers of the schedule) that wait for the blocks."""
        if self._results:
            self._go_on()
        if isinstance(self._outcome, Suspended):
            self._cut_call()
        elif self._undo is not None:
            self._book.settled.add(self._task.name)
        return list(range(self._first, self._first + len(self._parts)))

    def open(
        self,
        step: int,
        paths: Sequence[Path],
        opening: Opening,
        coming: Sequence[int] = (),
        most_ahead: int = 0,
        taps: TapExchange | None = None,
    ) -> None:
        """Begin step number ``step``; see :meth:`StepRun.open`."""
        self.step, self._paths, self._opening, self._taps = step, paths, opening, taps
        self._prepared = {}

    def values(self) -> list[Any]:
        """Return what the function returned."""
        assert isinstance(self._outcome, Returned)
        return [self._outcome.value]

    def loss_of_batch(self) -> Tensor | None:
        """Return the loss; None when the function returned none."""
        return None if self._loss is None else self._loss.reshape(())

    @property
    def shares(self) -> list[float]:
        """By microbatch of this driver: its share of the global batch."""
        return [self._task.share * size / sum(self._sizes) for size in self._sizes]

    @contextmanager
    def random_state(self) -> Iterator[None]:
        """Keep the user's random state for the user's code: what else draws leaves no trace in it."""
        self._draws = random_states(self._device)
        try:
            yield
        finally:
            set_random_states(self._device, self._draws)

    @property
    def states(self) -> States | None:
        """What the step wants of the blocks' states."""
        return self._task.states

    # ----------------------------------------------------- the driver part

    def embed(self, microbatch: int) -> tuple[Call, Tensor]:
        if not self._prepared:
            self._announce()
        index = microbatch - self._first
        return self._prepared[index], self._parts[index].hidden

    def announce_due(self) -> None:
        pass  # all was announced at once

    def announce(self) -> None:
        if self._opening is not None:
            self._announce()

    def loss(self, microbatch: int, hidden: Tensor) -> Tensor | None:
        self._results[microbatch - self._first] = hidden
        return None

    @property
    def loss_is_outside(self) -> bool:
        return self._task.training

    def gradients_from_outside(self) -> dict[int, Tensor | None]:
        assert len(self._results) == len(self._parts), "the schedule goes back before all losses"
        leaf = self._joined(self._results)
        leaf.requires_grad_(any(call.spec.hops[-1].requires_grad for call in self._prepared.values()))
        self._show_hooks()
        with self._drawing():
            result, call = inner(leaf), self._call
            assert call is not None
            with own_gradients.Checked((result, call.sources)):
                self._resume(result)
            if isinstance(self._outcome, Suspended):
                raise CalledTwice(CALLED_TWICE, self._unfinished(leaf))
            self._back_propagate(self.values()[0], leaf)
        if self._taps is not None:
            for index in range(len(self._parts)):
                self._taps.send_back(self._first + index, self._paths[self._first + index])
        is_over(leaf)
        gradient = gradient_of(leaf)
        pieces = [None] * len(self._parts) if gradient is None else self._split(gradient)
        return {self._first + index: piece for index, piece in enumerate(pieces)}

    def backward(self, microbatch: int, gradient: Tensor | None) -> None:
        self._gradients[microbatch - self._first] = gradient
        if self._prepared[microbatch - self._first].spec.carried:
            self._collect_sides(microbatch)
        if len(self._gradients) < len(self._parts):
            return
        assert self._call is not None
        present = {index: piece for index, piece in self._gradients.items() if piece is not None}
        roots = self._roots_of_sides()
        if self._call.entered.root is not None and present:
            filled = {i: present.get(i, torch.zeros_like(part.hidden)) for i, part in enumerate(self._parts)}
            pieces = [filled[i] for i in sorted(filled)]
            whole = filled[0] if self._cut is None else self._cut.hidden.join(pieces, self._call.specs[0].order)
            roots.insert(0, (self._call.entered.root, whole))
        if roots:
            with self._drawing():
                back_propagate_all(*zip(*roots, strict=True))

    # -------------------------------------------------------------- pieces

    def _unfinished(self, leaf: Tensor) -> Unfinished | None:
        """Return the function, if it may go on though it has called the blocks once more."""
        call, outcome = self._call, self._outcome
        assert call is not None
        assert isinstance(outcome, Suspended)
        first = GivenUp(call, self._versions, leaf)
        if not first.can_run_again() or self._task.outside is not None:
            return None
        return Unfinished(self._threads.part_with(_STEP), first, self._found, self._task.seed, outcome.request)

    def _parked(self, leaf: Tensor, value: Any) -> Parked | None:  # Any: what the user's function returned
        """Return what is left to do if the step is given up now."""
        assert self._call is not None
        given_up = GivenUp(self._call, self._versions, leaf)
        if not given_up.can_run_again():
            return None
        return Parked([given_up], [value], self._call.sources, self._task.seed, cut=self._found)

    def _collect_sides(self, microbatch: int) -> None:
        """Wait for the gradients of a microbatch's side inputs."""
        assert self._taps is not None, "no step is under way"
        index = microbatch - self._first
        part, spec = self._parts[index], self._prepared[index].spec
        found = self._taps.gradients_of_sides(microbatch, self._paths[microbatch], spec, part.side_inputs)
        for slot, gradient in found.items():
            self._of_sides.setdefault(slot, {})[index] = gradient

    def _roots_of_sides(self) -> list[tuple[GradientEdge | None, Tensor]]:
        """Return where the gradients of the whole batch's side inputs go, each with what goes there."""
        assert self._call is not None
        roots: list[tuple[GradientEdge | None, Tensor]] = []
        for slot, found in sorted(self._of_sides.items()):
            axis = None if self._cut is None else self._cut.side_inputs[slot]
            if axis is None:
                gradient = functools.reduce(torch.add, [found[index] for index in sorted(found)])
            else:
                pieces = [part.side_inputs[slot] for part in self._parts]
                pieces = [found.get(i, torch.zeros_like(piece)) for i, piece in enumerate(pieces)]
                gradient = axis.join(pieces, order_of(self._call.side_inputs[slot]))
            roots.append((self._call.beside.roots[slot], gradient))
        return roots

    def _start(self) -> None:
        with self._shown():
            outcome = self._thread.start(self._proxies.explaining(self._task.function), self._ambient)
        self._take(outcome)
        if self._task.training and isinstance(self._outcome, Returned) and self._outcome.value is not None:
            raise SkipPipeError(not_called(self._proxies))

    def _resume(self, answer: Tensor) -> None:
        with self._shown():
            outcome = self._thread.resume(answer)
        if self._call is not None:
            self._call.recording.check()
        self._take(outcome)

    def _take(self, outcome: Outcome) -> None:
        if isinstance(outcome, Returned):
            self._proxies.check_complete(self._thread)
            check_available(outcome.value)
        self._outcome = outcome
        self._draws = random_states(self._device)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Let the user's code draw on where it stopped."""
        set_random_states(self._device, self._draws)
        yield
        self._draws = random_states(self._device)

    def _go_on(self) -> None:
        """In evaluation: resume the function with what came back."""
        assert self._call is not None
        self._show_hooks()
        answer, self._results, self._parts = self._joined(self._results), {}, []
        if self._undo is not None:
            self._answers.append(answer)
            self._earlier.append(CallForm.of(self._call))
        self._resume(answer)

    def _show_hooks(self) -> None:
        """Give the suspended call what its hooks are to see when it goes on; a call with hooks is not cut."""
        call = self._call
        if self._taps is None or call is None or not (call.hooks or call.exported):
            return
        microbatches = range(self._first, self._first + len(self._parts))
        pairs = zip(microbatches, self._parts, strict=True)
        found = [self._taps.collect(microbatch, self._paths[microbatch], part) for microbatch, part in pairs]
        call.events, call.seen, call.values = found[0].events, found[0].tensors, found[0].exported
        if self._cut is not None:
            with torch.set_grad_enabled(call.ambient.grad):
                call.values = self._cut.join_exported(call, [shown.exported for shown in found])

    def _cut_call(self) -> None:
        if self._parts:
            return
        found = self._found = self._find_cut()
        if not isinstance(self._outcome, Suspended):  # it began again, and went another way
            return
        call = self._call = self._outcome.request
        self._versions = versions([call.hidden, *call.side_inputs])
        self._cut, self._sizes, self._parts = None, [1], [call]
        if found is not None:
            num_samples, self._cut = found
            self._sizes = split_sizes(num_samples, self._most)
            self._parts = cut_call(call, self._cut, self._sizes)
            self._learn_forms()

    def _learn_forms(self) -> None:
        """Microbatches of the same size have the same forms."""
        known: dict[Any, StackCall] = {}
        for part in reversed(self._parts):  # the first one is the largest
            alike = known.setdefault(part.specs[0], part)
            if alike is part:
                self._proxies.learn_forms(part)
            else:
                part.specs, part.structures = alike.specs, alike.structures

    def _find_cut(self) -> tuple[int, Cut] | None:
        """Return the number of samples and the cut of the call that waits; None when it goes as it is."""
        task, call = self._task, self._outcome.request  # type: ignore[union-attr]
        if self._most == 1 or call.caches or not (task.questions or task.counts):
            return task.cut
        if call.hooks:
            self._book.tell("forward hooks watch modules of the blocks, and are to see the whole batch")
            return None
        counts = list(task.counts or dict.fromkeys(question.num_samples for question in task.questions))
        kind = task.name, kind_of(call, counts)
        known, found = self._book.find(kind, call, counts)
        has_new = self._book.has_new_numbers(kind, call)
        if known and found is not None and has_new and (difference := self._differs(call, found[1], found[0])):
            self._book.forget(kind)
            self._book.tell(difference)
            return None
        if known:
            return found
        if self._undo is None and not task.counts:
            self._book.settled.discard(task.name)  # the next one can be asked about
            return None
        try:
            found = self._choose(self._ask(call) if not task.counts else likely_cuts(CallForm.of(call), task.counts))
        except NotCuttable as error:
            self._book.tell(str(error))
        self._book.put(kind, None if found is None else (counts.index(found[0]), found[1]))
        return found

    def _choose(self, ways: Sequence[tuple[int, Cut]]) -> tuple[int, Cut]:
        """Return the first way to cut the call that waits which does not change what the blocks compute."""
        if not isinstance(self._outcome, Suspended):
            return ways[0]
        difference = ""
        for num_samples, cut in ways:
            difference = self._differs(self._outcome.request, cut, num_samples)
            if not difference:
                return num_samples, cut
        raise NotCuttable(difference)

    def _ask(self, call: StackCall) -> list[tuple[int, Cut]]:
        """Give the function up, ask, and let it begin again: whoever it locked out could not answer."""
        assert self._undo is not None
        form = CallForm.of(call)
        self._give_up()
        try:
            return ask(form, self._earlier, self._task.questions, self._asked, self._ambient, self._undo)
        finally:
            self._proxies.forget_open_calls()
            self._start()
            for answer in self._answers:
                if isinstance(self._outcome, Suspended):
                    self._resume(answer)
            if isinstance(self._outcome, Suspended) and CallForm.of(self._outcome.request) != form:
                raise NotCuttable("the step called the blocks in another way when it ran for a second time")

    def _give_up(self) -> None:
        assert self._undo is not None
        self._thread.abandon()
        self._proxies.forget_open_calls()
        self._undo()

    def _announce(self) -> None:
        """Prepare the calls of all microbatches, and announce them together with the step."""
        prepared: list[PreparedCall] = []
        for index, part in enumerate(self._parts):
            microbatch = self._first + index
            seed = block_seed(self._task.seed, microbatch)
            path = self._paths[microbatch]
            prepared.append(self._writer.prepare(microbatch, path, part, self._proxies, seed))
            if not self._task.training and prepared[-1].call.spec.hops[-1].requires_grad:
                raise SkipPipeError(WITH_GRADIENTS)
        opening, self._opening = self._opening, None
        self._writer.send(self.step, prepared, self._paths, opening)
        self._proxies.note_announced()
        self._prepared = {index: each.call for index, each in enumerate(prepared)}

    def _back_propagate(self, value: Any, leaf: Tensor) -> None:  # Any: what the user's function returned
        task, call = self._task, self._call
        assert call is not None
        self._before_backward()
        if task.outside is not None:
            task.outside(
                [value],
                Ends(call.sources, (leaf,), call.entered.is_hooked),
                functools.partial(self._parked, leaf, value),
            )
            return
        loss = task.loss_of(value)
        self._loss = None if loss is None else loss.detach()
        if loss is not None and task.share:  # what counts nothing may be NaN, a mean over no label
            self._around.tell_leaves([loss, *call.sources])
            again = goes_past([loss], *call.sources)
            if again:
                check_parts([loss], call.sources, is_hooked=call.entered.is_hooked)
            back_propagate(loss, torch.full_like(loss, task.share * task.scale), keep_graph=again)

    def _joined(self, results: Mapping[int, Tensor]) -> Tensor:
        pieces = [results[index] for index in range(len(self._parts))]
        if self._cut is None or self._call is None:
            return pieces[0]
        return self._cut.result.join(pieces, self._call.specs[-1].order)

    def _split(self, gradient: Tensor) -> Sequence[Tensor]:
        return [gradient] if self._cut is None else self._cut.result.split(gradient, self._sizes)
