"""Run one rank's part of a schedule: a straight interpreter of its instructions.

Both ends of every message know the schedule, so a message carries bytes only. Receives are posted as soon as the
call of a microbatch is known, sends are never waited for before the end of the step, and values that stay on the
rank never touch the network.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Protocol, cast

import torch
from torch import Tensor

from ..schedule import Event, Op
from . import phases
from .absent import absent, is_absent
from .call import Call
from .crossing import Gradients, Tensors
from .device import synchronize
from .device_errors import is_of_device
from .errors import GenerationAborted, SkipPipeError
from .memory_order import in_memory
from .program import Instruction, Plan
from .stage import Stage
from .transport import PendingTensor, Transport


class CallFeed(Protocol):
    """Where a rank learns the calls of the microbatches that visit it."""

    def poll(self) -> Iterable[tuple[int, Call]]:
        """Return the (microbatch, call) pairs that arrived since the last time, without waiting."""

    def wait(self) -> Iterable[tuple[int, Call]]:
        """Wait for the next pairs."""


class DriverPart(Protocol):
    """The driver's stage 0: the user's step function around the blocks."""

    def embed(self, microbatch: int) -> tuple[Call, Tensor]:
        """Run the user's code up to the blocks; return their call and the hidden states that enter them."""

    @property
    def loss_is_outside(self) -> bool:
        """Whether the loss is computed after all outputs, and :meth:`gradients_from_outside` has the gradients."""

    def loss(self, microbatch: int, hidden: Tensor) -> Tensor | None:
        """Run the user's code after the blocks; in training return the gradient of ``hidden`` if it has one."""

    def gradients_from_outside(self) -> Mapping[int, Tensor | None]:
        """Wait for the loss that is outside; return the gradients of the hidden states by microbatch."""

    def backward(self, microbatch: int, gradient: Tensor | None) -> None:
        """Back-propagate into what produced the hidden states."""

    def announce_due(self) -> None:
        """Send the calls that are held back, unless others were sent just before: no embedding follows at once."""

    def announce(self) -> None:
        """Send the calls that are still held back, since this rank is about to wait."""


class Executor:
    """One rank of one generation; :meth:`run` executes one step.

    With ``timed`` it notes when each action ran: on a device, how long it took to start it. With ``measured`` every
    action is over on the device before its time is taken.
    """

    def __init__(
        self,
        transport: Transport,
        stages: Mapping[int, Stage],
        device: torch.device,
        driver: DriverPart | None = None,
        *,
        timed: bool = False,
        measured: bool = False,
    ) -> None:
        self._timed = timed or measured
        self._measured = measured
        self._transport = transport
        self._stages = stages
        self._device = device
        self._driver = driver
        self._calls: dict[int, Call] = {}
        self._posted: dict[tuple[int, bool, int], list[PendingTensor | None]] = {}
        """By microbatch, direction and hop: the receives of its tensors; None for what does not travel."""
        self._local: dict[tuple[int, bool, int], Gradients] = {}
        self._plan = Plan((), ())
        self._num_unknown = 0
        """How many microbatches of the step there are whose call is not known yet."""
        self._incoming: dict[int, deque[Instruction]] = {}
        """By source, where receives are not posted ahead: what is still to come, in the order in which it is sent."""
        self._owing: list[Instruction] = []
        """Losses whose gradients are still to come from outside."""

    def run(self, plan: Plan, feed: CallFeed) -> list[Event]:
        """Execute the instructions of a plan in order; return when each ran, if that is noted.

        Raises:
            GenerationAborted: The generation ended under the step.
        """
        self._plan, live = plan, plan.live
        self._num_unknown = len(plan.receiving)
        if not self._transport.posts_ahead:
            self._incoming = _by_source(plan.receiving.values())
        events: list[Event] = []
        try:
            for instruction in plan.instructions:
                if self._owing and not instruction.takes_forward:
                    self._give_owed()
                if instruction.microbatch not in live:
                    self._attend(instruction)
                    continue
                if self._num_unknown or self._driver is not None:
                    self._ready(instruction, feed)
                taken = self._take(instruction, feed)
                if self._timed:
                    events.append(self._clocked(instruction, taken))
                else:
                    self._execute(instruction, taken)
            self._transport.end_step()
        except GenerationAborted:
            raise
        except Exception as error:
            if self._transport.is_aborted:  # what was computed with, and failed, may be anything
                raise GenerationAborted(f"generation {self._transport.generation} was given up") from error
            raise
        finally:
            self._clear()
        return events

    def _ready(self, instruction: Instruction, feed: CallFeed) -> None:
        if self._driver is not None:
            if instruction.on_driver and instruction.takes is None:
                return  # this action makes the call
            self._driver.announce_due()
        if self._num_unknown:
            for microbatch, call in feed.poll():
                self._admit(microbatch, call)
            self._learn(instruction.microbatch, feed)

    def _learn(self, microbatch: int, feed: CallFeed) -> None:
        """Wait for the call of a microbatch."""
        while microbatch not in self._calls:
            for other, call in feed.wait():
                self._admit(other, call)

    def _admit(self, microbatch: int, call: Call) -> None:
        """Learn a call, and post every receive of its microbatch on this rank if that may be done ahead."""
        self._calls[microbatch] = call
        receiving = self._plan.receiving.get(microbatch)
        if receiving is None:
            return  # it does not visit this rank
        self._num_unknown -= 1
        if self._transport.posts_ahead:
            for instruction in receiving:
                self._post(instruction, call)

    def _post(self, instruction: Instruction, call: Call) -> None:
        """Post the receives of what an instruction takes: gradients only where something needs them."""
        number, link, forward = instruction.takes, instruction.receives, instruction.takes_forward
        assert number is not None
        assert link is not None, "it takes what comes from elsewhere"
        hop = call.spec.hops[number]
        if not forward and not hop.carries_gradient:
            return
        posted: list[PendingTensor | None] = []
        for spec in hop.there if forward else hop.back:
            posted.append(None if spec is None else self._transport.receive(spec, link.rank, link.tag, self._device))
        self._posted[instruction.microbatch, forward, number] = posted

    def _post_up_to(self, instruction: Instruction, feed: CallFeed) -> None:
        """Post what its link brings before it, and its own receive, unless a later message was asked for already."""
        link = instruction.receives
        incoming = self._incoming.get(link.rank) if link is not None else None
        while incoming and _place(incoming[0]) <= _place(instruction):
            first = incoming.popleft()
            self._learn(first.microbatch, feed)
            self._post(first, self._calls[first.microbatch])

    def _take(self, instruction: Instruction, feed: CallFeed) -> Gradients:
        hop, forward = instruction.takes, instruction.takes_forward
        if hop is None:
            return ()
        key = (instruction.microbatch, forward, hop)
        if instruction.receives is None:
            return self._local.pop(key)
        if self._incoming:
            self._post_up_to(instruction, feed)
        posted = self._posted.pop(key, None)
        if posted is None:
            return ()
        if self._driver is not None:
            self._driver.announce()
        try:
            if forward:
                came = [None if each is None else each.wait() for each in posted]
            else:
                came = [None if each is None else each.wait_unless(is_absent) for each in posted]
            if instruction.action.op is Op.L:
                self._transport.confirm()  # user code looks at it
            return tuple(came)
        except GenerationAborted:
            raise
        except Exception as error:
            if is_of_device(error):
                raise
            raise SkipPipeError(f"receiving for {instruction.text} failed") from error

    def _give(self, instruction: Instruction, values: Gradients) -> None:
        hop, action = instruction.gives, instruction.action
        if hop is None:
            return
        if instruction.sends is None:
            self._local[action.microbatch, action.op is Op.F, hop] = values
            return
        forward, crosses = action.op is Op.F, self._calls[action.microbatch].spec.hops[hop]
        specs = crosses.there if forward else crosses.back
        for spec, value in zip(specs, values or (None,) * len(specs), strict=True):
            if spec is None:
                continue
            if value is None:
                assert not forward, f"{instruction.text} has nothing to send"
                value = absent(spec, self._device)
            elif spec.order:
                value = in_memory(value, spec.order)
            self._transport.send(value, instruction.sends.rank, instruction.sends.tag)

    def _clocked(self, instruction: Instruction, taken: Gradients) -> Event:
        if self._measured:
            synchronize(self._device)
        start = time.perf_counter()
        self._execute(instruction, taken)
        if self._measured:
            synchronize(self._device)
        return Event(self._transport.rank, instruction.action, start, time.perf_counter())

    def _execute(self, instruction: Instruction, taken: Gradients) -> None:
        if instruction.on_driver:
            self._execute_driver(instruction, taken)
        elif instruction.together:
            self._execute_together(instruction, taken)
        else:
            self._execute_stage(instruction, taken)

    def _execute_driver(self, instruction: Instruction, taken: Gradients) -> None:
        if phases.watchers:
            phases.act(instruction.action)
        assert self._driver is not None, f"{instruction.text} is not an action of a worker"
        microbatch, op = instruction.microbatch, instruction.action.op
        if op is Op.F:
            call, hidden = self._driver.embed(microbatch)
            self._admit(microbatch, call)
            self._give(instruction, (hidden,))
        elif op is Op.L:
            (came,) = taken
            assert came is not None
            gradient = self._driver.loss(microbatch, came)
            if self._driver.loss_is_outside:
                self._owing.append(instruction)
            else:
                self._give(instruction, (gradient,))
        else:
            self._driver.backward(microbatch, taken[0] if taken else None)

    def _attend(self, instruction: Instruction) -> None:
        """Take part in what the coupled ranks do in this action's place, for which this rank has no microbatch."""
        company = self._stages[instruction.action.stage].company
        if company is not None:
            company.attend(instruction.microbatch)

    def _give_owed(self) -> None:
        assert self._driver is not None, "only a driver owes gradients"
        owing, self._owing = self._owing, []
        gradients = self._driver.gradients_from_outside()
        for instruction in owing:
            self._give(instruction, (gradients[instruction.microbatch],))

    def _execute_together(self, instruction: Instruction, taken: Gradients) -> None:
        company = self._stages[instruction.action.stage].company
        if company is not None:
            company.enter([microbatch in self._plan.live for microbatch in instruction.together])
        self._execute_stage(instruction, taken)
        if company is not None:
            company.leave()

    def _execute_stage(self, instruction: Instruction, taken: Gradients) -> None:
        action = instruction.action
        stage, call = self._stages[action.stage], self._calls[action.microbatch]
        if action.op is Op.F:
            assert instruction.takes is not None
            hops, number = call.spec.hops, instruction.takes
            entering = cast("Tensors", taken)  # of what goes forward, none is none
            self._give(instruction, stage.forward(action.microbatch, call, entering, hops[number], hops[number + 1]))
        elif action.op is Op.W:
            stage.backward_weight(action.microbatch)
        else:
            backward = stage.backward if action.op is Op.B else stage.backward_input
            self._give(instruction, backward(action.microbatch, taken))
            if call.spec.carried:
                stage.send_gradients(action.microbatch)

    def _clear(self) -> None:
        self._calls.clear()
        self._posted.clear()
        self._local.clear()
        self._incoming.clear()
        self._owing.clear()


def _by_source(instructions: Iterable[Iterable[Instruction]]) -> dict[int, deque[Instruction]]:
    """Return what each rank sends, in the order in which it sends it."""
    incoming: dict[int, list[Instruction]] = {}
    for instruction in chain.from_iterable(instructions):
        assert instruction.receives is not None
        incoming.setdefault(instruction.receives.rank, []).append(instruction)
    return {source: deque(sorted(each, key=_place)) for source, each in incoming.items()}


def _place(instruction: Instruction) -> int:
    assert instruction.receives is not None
    return instruction.receives.place
