"""What happens to gradients between a step and the optimizer: scaled, merged, measured, clipped, everywhere alike."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..engine import gradients, phases
from ..engine.control.answers import Done, NormPowers, Unscaled
from ..engine.control.codec import Control
from ..engine.control.commands import AskNorm, Clip, Merge, Pass, StepOptimizer, Unscale
from ..engine.control.values import Opening, Stand, StepOrder, Zero
from ..engine.errors import SkipPipeError
from ..engine.gradients import GradientWindow
from ..engine.stage import Stage
from ..schedule import Schedule
from .accumulation import Accumulation
from .capture.suspend import current_thread
from .copies import GradientCopies
from .formation import HasLayout
from .layout import Layout
from .links import Links
from .loads import LoadWindow
from .resizing import carried_over
from .shared import SharedTensors

GradientScale = Literal["batch", "visit"]
"""What the gradient of a stage is the mean over: all microbatches of the batch, or those that visited the stage.

With ``"batch"`` (as in the SkipPipe paper's code) a stage that a third of the microbatches skipped has about two
thirds of the gradient; ``"visit"`` makes up for it. SGD's steps shrink in proportion under ``"batch"``; Adam's hardly
do, since it divides by the gradient's own scale. Clipping by norm and weight decay weigh such a stage differently
under the two.
"""


_ROUNDING: Final = 1e-6
_BENDS: Final = (
    "the loss is multiplied (by {quotient:.6g}) between the step and its backward, which has run already, and {what}. "
    "Multiply the loss inside of the step: in training_step, in the model's forward or in what run() is "
    "given; or let the Trainer or accelerate divide it (accumulate_grad_batches, gradient_accumulation_steps). In a "
    "loop it may also be computed from what the model returns (called without labels)"
)


class GradientControl:
    """The gradients of a pipeline, seen from one driver; the first driver commands the workers'."""

    def __init__(
        self, links: Links, formed: HasLayout, copies: GradientCopies, shared: SharedTensors, *, leads: bool
    ) -> None:
        self.scale: GradientScale = "batch"
        self.optimizers: Callable[[], Sequence[Optimizer]] = tuple
        """Returns what steps this driver's part of what is trained."""
        self._own: Callable[[], Sequence[nn.Parameter]] = list
        self.window = GradientWindow([])
        """The gradients of the parameters that live on this driver."""
        self.visit_counts: dict[int, int] = {}
        """By block stage: how many microbatches of all drivers visited it in the last training step."""
        self.send_step: Callable[[StepOrder, bytes], None] = functools.partial(_send_step, links)
        """Sends the workers the command to step, and the settings for it."""
        self.stand: Callable[[], Stand] = Stand
        """Returns the last optimizer step, where they are numbered."""
        self.copies = copies
        """What user code sees of the workers' gradients."""
        self.pending_clip: tuple[float | None, float | None] = (None, None)
        """How the coming optimizer step clips: a factor, and the largest element."""
        self._links = links
        self._formed = formed
        self._leads = leads
        self._hosted: Mapping[int, Stage] = {}
        self._shared = shared
        self._stage_scales: dict[int, float] = {}
        self._counted: tuple[Schedule, list[float]] | None = None
        """Of what the two above follow."""
        self.num_merged = 0
        """How often gradients were added."""
        self._accumulates = False
        """Whether gradients were added since they were zeroed."""
        self.keeps_stepped = True
        """Whether workers keep gradients after an optimizer step, until they are zeroed as in one process. Not where
        zeroing is sure to come before the next gradients are added: then the memory is free during the next step."""
        self.loads = LoadWindow()
        """The visits of experts whose gradients are accumulated."""
        self.on_merge: Callable[[], None] = _nothing
        """Called on this driver with every merge."""
        self.accumulation = Accumulation()
        """What the accumulated gradients were computed from."""
        self._zero: Zero = ""
        """How the workers are to zero their gradients before anything else: ``"drop"``, ``"fill"``, or not at all."""
        self._opened_zero = True
        """Whether a step under way has told the workers of every zeroing so far."""
        self._is_stepped = False
        """Whether the accumulated gradients were stepped with, and nothing has become of them since."""
        self._expected_norm: tuple[float, bool] | None = None
        self._norm_under_way = False
        self._num_norms = 0
        self.unscales = False
        """Whether gradients are unscaled before each step: until then their norm is nobody's business."""
        self._num_unscaled = 0
        self.keep_norms = False
        """Whether workers remember the norms of their gradients, for who must rebuild a stage from its neighbours."""
        self.hosted_norms: dict[int, float] = {}
        """By stage on this driver: the norm of its last gradient, before the clipping of all together."""
        self.lr_factors: dict[int, float] = {}
        """By stage: what its learning rate is multiplied with, where that is not 1."""

    @property
    def _layout(self) -> Layout:
        return self._formed.layout

    @property
    def lr_factors_of_blocks(self) -> dict[int, float]:
        """The same by block, for who goes on with other stages: each then has the mean of its blocks."""
        return {block: factor for stage, factor in self.lr_factors.items() for block in self._layout.blocks(stage)}

    @lr_factors_of_blocks.setter
    def lr_factors_of_blocks(self, factors: Mapping[int, float]) -> None:
        single = [range(block, block + 1) for block in range(self._layout.num_blocks)]
        by_number = {block + 1: factor for block, factor in factors.items()}
        self.lr_factors = carried_over(by_number, single, self._layout.stage_blocks)

    def all_optimizers(self) -> Sequence[Optimizer]:
        """Return what steps this driver's part, as of now."""
        return self.optimizers()

    def own(self, parameters: Callable[[], Sequence[nn.Parameter]], hosted: Mapping[int, Stage]) -> None:
        """Take charge of this driver's parameters, those of hosted stages and what blocks share among them.

        Args:
            parameters: Returns those that there are: a model may get layers while it trains.
            hosted: The stages.
        """
        self._own = parameters
        self.window = GradientWindow(())
        self.follow()
        self._hosted = hosted

    def let_go(self) -> None:
        """Refer to nothing of the model and its optimizer any more, so that their memory can be freed."""
        self.optimizers = tuple
        self.own(list, {})

    def follow(self) -> None:
        """Take charge of what has come to be trained on this driver, also in the middle of a step."""
        self.window.follow(self._own())

    def reached(self, leaves: Sequence[Tensor]) -> None:
        """Take charge of what a step is about to go back to, whoever holds and steps it."""
        self.window.take_in(leaves)

    def add_shared(self, done: Mapping[int, Done]) -> None:
        """Add what a step's copies of shared parameters have gathered, in the order of the ranks."""
        if self._leads and any(each.shared for each in done.values()):
            self.window.open()
            in_half = self._shared.add_gradients(each for _, each in sorted(done.items()))
            self.window.in_half.update(map(id, in_half))

    def count_visits(self, schedule: Schedule, weights: Sequence[float]) -> None:
        """Note who visited what; further drivers are taken to have microbatches like this one's.

        Args:
            schedule: What ran.
            weights: By microbatch of this driver: its share of the global batch.
        """
        if self._counted is not None and self._counted[0] is schedule and self._counted[1] == weights:
            return  # as in the step before
        self._counted = schedule, list(weights)
        per_driver = schedule.num_microbatches // self._layout.num_drivers
        counts = dict.fromkeys(range(1, schedule.num_stages + 1), 0)
        shares = dict.fromkeys(counts, 0.0)
        for microbatch, path in enumerate(schedule.paths):
            if microbatch % per_driver < len(weights):
                for stage in path.stages:
                    counts[stage] += 1
                    shares[stage] += weights[microbatch % per_driver]
        self.visit_counts = counts
        by_visit = self.scale == "visit"
        self._stage_scales = {stage: 1.0 / share for stage, share in shares.items() if share} if by_visit else {}

    @property
    def are_waiting(self) -> bool:
        """Whether there are gradients that a step would use already."""
        return self._accumulates and (self.keeps_stepped or not self._is_stepped)

    def zero(self, set_to_none: bool = True) -> None:
        """Zero what the workers have accumulated before the next gradients are added; the local ones are not ours."""
        if not set_to_none and self._is_stepped and not self.keeps_stepped:
            raise SkipPipeError(
                "zero_grad(set_to_none=False) came after an optimizer step whose gradients the workers have dropped; "
                "override optimizer_zero_grad (or optimizer_step) in the LightningModule, and they keep them for it"
            )
        if current_thread() is not None and self._accumulates and not self._is_stepped:
            raise SkipPipeError(
                "zero_grad() was called inside of a step, where the gradients of the batches before are out of reach; "
                "call it in a hook, such as on_before_backward or optimizer_zero_grad (in a loop of your own: outside "
                "of the model's forward)"
            )
        self.keeps_stepped = self.keeps_stepped or not set_to_none
        self._zero = "drop" if set_to_none or self._zero == "drop" else "fill"
        self._opened_zero = False
        self.accumulation.zeroed()
        self.pending_clip = None, None
        if self._is_stepped or self._accumulates:
            self.copies.note_zeroed()
        self._is_stepped = self._accumulates = False
        self.copies.outdate(present=self._zero == "fill" and self.copies.present and not self._is_one_of_many)

    def take_zero(self) -> Zero:
        """Return how the workers are to zero first, which the caller then has them do."""
        zero: Zero = self._zero
        self._zero = ""
        return zero

    def begin_step(self) -> None:
        """Start a training step: gradients that an optimizer step has used are dropped now, unless they are kept."""
        self.copies.hidden = False
        self.follow()
        if self._is_stepped and not self.keeps_stepped and self.copies.present:
            self.copies.outdate(present=False, gone=True)

    def before_reading(self) -> None:
        """Let the workers zero and clip what is zeroed and clipped on this driver already."""
        (scale, value), self.pending_clip = self.pending_clip, (None, None)
        zero: Zero = "" if self._is_one_of_many else self.take_zero()
        if zero or scale is not None or value is not None:
            self.accumulation.clipped(scale, value)
            self._command(Clip(scale, value, zero))

    def clip_later(self, *, scale: float | None = None, value: float | None = None) -> None:
        """Have the workers clip when they step; at once where other drivers may read before."""
        if self._flush():
            self._norm_under_way = False
        before, known = self.pending_clip
        factor = before if scale is None else scale * (1.0 if before is None else before)
        self.pending_clip = factor, known if value is None else value
        self.copies.outdate(present=self.copies.present)
        if self._is_one_of_many:
            self.before_reading()

    @property
    def _is_one_of_many(self) -> bool:
        return self._layout.num_drivers > 1

    def _command(self, command: Control, *, more: bool = False) -> None:
        """Command the workers as the first driver; as another one, let them go on with what that one commands."""
        self._links.broadcast(command if self._leads else Pass(), more=more)

    def opening(self, opening: Opening) -> Opening:
        """Return a training step's announcement with what is to be said of gradients, such that it may be repeated."""
        zero: Zero = self._zero if self.keeps_stepped else ""
        self._opened_zero = True
        return replace(opening, zero=zero, repeats=self.accumulation.repeating, loads=self.loads.base)

    def opened(self, loads: Iterable[Mapping[str, Sequence[int]]]) -> None:
        """Note that the workers have done what :meth:`opening` said, and the visits of experts in the step, by rank."""
        self.loads.note(loads)
        if self.keeps_stepped and self._opened_zero:  # a loop may have zeroed between the step's forward and backward
            self._zero = ""

    def merge(self, scale: float) -> None:
        """Add the last step's gradients, times ``scale``, to the accumulated ones, here and on the workers."""
        phases.reach(phases.Phase.MERGING)
        self._accumulates = True
        self.num_merged += 1
        self.accumulation.renew()
        if self.pending_clip != (None, None):
            self.before_reading()  # what comes is not clipped with what is there
        self._flush()
        if self._is_stepped:
            self._settle_stepped()
        common = {id(tensor) for tensor in self._shared.tensors()}  # they are of several stages, or of the driver, too
        for stage, held in self._hosted.items():
            own = [parameter for parameter in held.parameters() if id(parameter) not in common]
            gradients.scale_gradients(self.window.new_of(own), self._stage_scales.get(stage, 1.0))
            self.window.in_half |= held.in_half
        self.window.merge(scale)
        zero = self.take_zero()
        if zero:
            self.loads.clear()
        self.accumulation.added(scale, list(self._stage_scales.items()))
        self.loads.merge()
        self.on_merge()
        norm = None if self.unscales else self._norm_ahead()
        # Nothing is asked of it, and the optimizer step or the next batch follows: it goes out with that.
        follows = norm is None and not self._is_one_of_many
        self._command(Merge(scale, zero, list(self._stage_scales.items()), norm), more=follows)
        self._norm_under_way = norm is not None
        self.copies.outdate(present=True)

    def unscale(self, inverse: float) -> Callable[[], bool | None]:
        """Multiply what the workers' optimizers step by ``inverse``, as a loss scaler does.

        Returns:
            Waits, and says whether something there was infinite or no number; None if there are no gradients.
        """
        self.accumulation.require()
        self.before_reading()
        self._flush()
        norm, self._num_unscaled = self._norm_ahead(), self._num_unscaled + 1
        self._command(Unscale(self._num_unscaled, inverse, norm))
        self._norm_under_way = norm is not None
        self.copies.outdate(present=self.copies.present)
        return functools.partial(self._overflowed, self._num_unscaled, inverse)

    def _overflowed(self, number: int, inverse: float) -> bool | None:
        answers = self._links.gather(Unscaled, lambda answer: answer.number == number)
        found = [each.overflowed for each in answers.values() if each.overflowed is not None]
        self.accumulation.unscaled(inverse, overflowed=any(found))
        return any(found) if found else None

    def _flush(self) -> bool:
        """Let the workers have what user code has written; return whether it has written anything."""
        written = self.copies.flush()
        if written:
            self.accumulation.written()
        return written

    def _settle_stepped(self) -> None:
        """New gradients come, and nobody has called zero_grad since the last optimizer step: workers add, if they can.

        What is dropped in another way (``parameter.grad = None``) was written, and they have heard of it.
        """
        self._is_stepped = False
        if not self.keeps_stepped:
            raise SkipPipeError(
                "gradients are added to those of the last optimizer step, which the workers have dropped; call "
                "optimizer.zero_grad() before, or override optimizer_zero_grad in the LightningModule and they are kept"
            )

    def norm(self, local: Sequence[Tensor], norm_type: float, *, stepped: bool) -> float:
        """Return the norm of the accumulated gradients of the ``local`` parameters and of those on the workers.

        Args:
            local: The parameters on this driver that count.
            norm_type: Which norm.
            stepped: Whether of those on the workers only what an optimizer steps counts.
        """
        kind = float(norm_type), stepped
        norm_type = kind[0]
        self.accumulation.require()
        if not stepped:
            self.copies.check_owned("the model as a whole")
        if self._flush():
            self._norm_under_way = False
        if not self._norm_under_way or self._expected_norm != kind:
            self._command(self._norm_request(kind))
        number = self._num_norms
        answers = self._links.gather(NormPowers, lambda powers: powers.number == number)
        self._norm_under_way = False
        # A run that clips once clips always: from now on workers measure as soon as they have merged.
        self._expected_norm = kind
        sets = [self._layout.whole_set(stage, answers) for stage in range(1, len(self._layout.placement))]
        firsts = {ranks[0] for ranks in sets if ranks}
        powers = [answers[rank].power for rank in firsts]
        powers += [answers[rank].experts for ranks in sets for rank in ranks[1:]]
        return gradients.total_norm([gradients.norm_power(local, norm_type), *powers], norm_type)

    def forget_norm(self) -> None:
        """Let the next :meth:`norm` ask anew: what is measured has changed since the workers were asked."""
        self._norm_under_way = False

    def step_optimizers(self, settings: bytes) -> None:
        """Let every worker step its optimizer, after clipping."""
        if self._is_stepped and not self.keeps_stepped:
            raise SkipPipeError(
                "optimizer.step() was called twice for the same gradients, which the workers have dropped after the "
                "first; override optimizer_step in the LightningModule, and they keep them until zero_grad"
            )
        phases.reach(phases.Phase.STEPPING)
        self.accumulation.require()
        self._flush()
        self._norm_under_way = False
        zero = self.take_zero()
        (scale, value), self.pending_clip = self.pending_clip, (None, None)
        self.accumulation.stepped(kept=self.keeps_stepped)
        self._is_stepped = self.copies.present  # a step without any gradient leaves nothing to be dropped
        self.loads.clear()
        if self.keep_norms:
            powers = {stage: gradients.norm_power(held.parameters(), 2.0) for stage, held in self._hosted.items()}
            self.hosted_norms = {stage: power**0.5 / (scale or 1.0) for stage, power in powers.items()}
        if self._leads:
            factors = list(self.lr_factors.items())
            self.send_step(StepOrder(scale, value, zero, self.keeps_stepped, self.keep_norms, factors), settings)
        else:
            self._links.broadcast(Pass())
        self.copies.outdate(present=self.copies.present)

    def _norm_ahead(self) -> AskNorm | None:
        """What is to be measured before it is asked for: a run that clips once clips always."""
        return None if self._expected_norm is None else self._norm_request(self._expected_norm)

    def _norm_request(self, kind: tuple[float, bool]) -> AskNorm:
        """Number a request: the answers of steps that were not clipped must not be taken for that of a later one."""
        self._num_norms += 1
        return AskNorm(self._num_norms, *kind)


def _nothing() -> None:
    """Nothing else to merge."""


def _send_step(links: Links, order: StepOrder, settings: bytes) -> None:
    links.broadcast(StepOptimizer(order, settings))


class MergeOnBackward(torch.autograd.Function):
    """The batch's loss as autograd sees it: its backward hands the incoming gradient to ``control.merge``."""

    @staticmethod
    def forward(
        ctx: Any, root: Tensor, loss: Tensor, control: GradientControl, scale: float, bends: Callable[[], str]
    ) -> Tensor:
        ctx.control, ctx.scale, ctx.bends, ctx.is_over = control, scale, bends, False
        ctx.set_materialize_grads(False)
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, None, None, None, None]:
        if grad_outputs[0] is None:  # the step runs once more, and gets it then
            return None, None, None, None, None
        if ctx.is_over:
            raise SkipPipeError(
                "backward was called twice for the loss of one batch (retain_graph=True), but a pipeline has its "
                "gradients once; add up what is to be back-propagated, such as 2 * loss, and call backward once"
            )
        ctx.is_over = True
        quotient = _quotient(float(grad_outputs[0]), ctx.scale)
        # What is multiplied by infinity is none the better for it: a loss scaler finds it, and skips the step.
        if quotient != 1.0 and math.isfinite(quotient) and (bend := ctx.bends()):
            raise SkipPipeError(_BENDS.format(what=bend, quotient=quotient))
        ctx.control.merge(quotient)
        return torch.zeros(()), None, None, None, None


def _quotient(scale: float, expected: float) -> float:
    """Return one over the other, and 1 where they are the same in the precision of a loss."""
    quotient = scale / expected
    return 1.0 if abs(quotient - 1.0) < _ROUNDING else quotient


def mergeable(
    loss: Tensor, control: GradientControl, scale: float = 1.0, bends: Callable[[], str] = lambda: ""
) -> Tensor:
    """Return ``loss`` such that ``backward`` merges the step's gradients, scaled by the gradient it receives.

    Args:
        loss: Of the batch.
        control: Merges.
        scale: What the step's gradients were scaled with already.
        bends: Names what on the way back is not linear, if anything: then they cannot be scaled afterwards.
    """
    root = torch.zeros((), requires_grad=True)
    return MergeOnBackward.apply(root, loss, control, scale, bends)  # type: ignore[no-untyped-call, no-any-return]
