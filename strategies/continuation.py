"""A fit under ``skippipe run``: mirrored on workers while it runs, and gone on with when its driver was lost.

Lightning restores its loops, callbacks, optimizers and schedulers from a checkpoint; here that checkpoint was never in
a file. What Lightning does not do in the middle of an epoch is done here: the data loaders are run forward from the
random state in which the epoch began, and metrics and logs of the epoch so far are brought back.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from ..driver.mirror import DriverMirror, DriverState
from ..driver.optimizer import RemoteOptimizer
from ..driver.recovery.neighbours import Source
from ..driver.recovery.recall import Recalled, rebuilt
from ..driver.recovery.report import RecoveryEvent
from ..engine.control.keeping import NoteEstimates
from ..engine.errors import SkipPipeError, StageLostError
from ..job.fits import Fits
from ..model.spread import Recovery, SpreadModel
from .checks import check_mirrored
from .replay import RandomState, random_state, set_random_state
from .snapshot import logged, set_logged, snapshot, whole_checkpoint

log = logging.getLogger(__name__)

FROM_MEMORY: Final = "skippipe run (memory)"
"""Takes the place of the path of the checkpoint."""

Phase = Literal["before batch", "after batch"]


class Continuation:
    """One fit under a supervisor.

    Args:
        fits: Counts them, and knows what there is to go on from.
        trainer: About to fit.
    """

    def __init__(self, fits: Fits, trainer: Trainer) -> None:
        self._trainer = trainer
        self._fits = fits
        self._fit, self._recalled, self._result = fits.next()
        self._began_s = time.monotonic()
        self._recovery: Recovery | None = None
        self._rebuilt: Mapping[range, Source] = {}
        self._spread: SpreadModel | None = None
        self._remote: RemoteOptimizer | None = None
        self._mirror: DriverMirror | None = None
        self._max_steps = trainer.fit_loop.epoch_loop.max_steps
        self._num_sanity_steps = trainer.num_sanity_val_steps
        self._epoch_state: RandomState = {}
        self._first_fetch: RandomState | None = None
        self._last_fetch: RandomState | None = None
        self._outputs: list[Any] = []
        """What the training steps since the last optimizer step have returned."""
        self._pending: Any = None
        if self._recalled is not None:
            log.warning("%s", _told(self._recalled))

    def resuming(self, function: functools.partial[Any]) -> functools.partial[Any]:
        """Return a call of the Trainer's ``_fit_impl`` that goes on from memory, whatever it was to start from."""
        if self._recalled is None and self._result is None:
            return function
        call = inspect.signature(function.func).bind(*function.args, **function.keywords)
        call.arguments["ckpt_path"] = FROM_MEMORY
        return functools.partial(function.func, *call.args, **call.kwargs)

    def checkpoint(self, recovery: Recovery | None) -> dict[str, Any]:
        """Return the checkpoint that the fit goes on from.

        Args:
            recovery: How stages are rebuilt whose workers died with the driver; None when they are not.

        Raises:
            SkipPipeError: They are not, or cannot be.
        """
        if self._recalled is not None:
            self._recovery = recovery
            self._recalled, self._rebuilt = rebuilt(self._recalled, None if recovery is None else recovery[0].rule)
            return whole_checkpoint(self._recalled)
        assert self._result is not None, "nothing to go on from"
        return dict(self._result)

    def attach(self, spread: SpreadModel, remote: RemoteOptimizer) -> None:
        """Follow the loops of the trainer, whose model is spread and not yet restored."""
        trainer, recalled, epoch_loop = self._trainer, self._recalled, self._trainer.fit_loop.epoch_loop
        if self._result is not None:
            trainer.should_stop = True  # whatever has ended it
            trainer.num_sanity_val_steps = 0
            return
        if spread.pipeline.shards.placements:
            raise SkipPipeError(
                "skippipe run cannot bring back experts that are spread over the replicas of a stage; set "
                "expert_parallel=1, or start this run without skippipe run"
            )
        check_mirrored(trainer.optimizers, trainer.lightning_module)
        optimizer = trainer.optimizers[0]
        self._spread, self._remote = spread, remote
        state = DriverState(trainer.lightning_module, remote)
        step = recalled.step if recalled is not None else 0
        mirror = self._mirror = DriverMirror(spread.links, state, self._outcome, self._fit, step)
        spread.pipeline.gradients.send_step, spread.pipeline.gradients.stand = mirror.commit, lambda: mirror.stand
        trainer.fit_loop.__dict__["_load_combined_loader_states"] = self._before_iterators
        epoch_loop.__dict__["on_run_start"] = self._on_epoch_start
        epoch_loop.__dict__["on_advance_end"] = self._on_batch_end
        epoch_loop.__dict__["_on_before_fetch"] = self._before_fetch
        if recalled is not None:
            epoch_loop.max_steps = -1  # there may be no step left, but the end of the epoch
            warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch")
        if recalled is not None and recalled.pending is not None:
            self._pending = recalled.pending
            self._outputs = list(recalled.pending["outputs"])
            _skip_next_step(optimizer, remote)

    def detach(self, *, over: bool) -> None:
        """Leave the trainer's loops alone again; the model is whole again.

        Args:
            over: Whether the fit has come to its end, and need not be run again.
        """
        loop = self._trainer.fit_loop
        loop.__dict__.pop("_load_combined_loader_states", None)
        for name in ("on_run_start", "on_advance_end", "_on_before_fetch"):
            loop.epoch_loop.__dict__.pop(name, None)
        loop.epoch_loop.max_steps = self._max_steps
        self._trainer.num_sanity_val_steps = self._num_sanity_steps
        mirror, self._mirror = self._mirror, None
        if mirror is not None and over:
            with contextlib.suppress(StageLostError):  # then the fit is run again where it would have been skipped
                mirror.finish(snapshot(self._trainer, (), self._param_groups()))
                self._fits.settle()

    # ------------------------------------------------------- hooks of the loops

    def _before_iterators(self) -> None:
        """The first epoch's data loaders are about to be iterated."""
        type(self._trainer.fit_loop)._load_combined_loader_states(self._trainer.fit_loop)
        self._note_epoch()

    def _on_epoch_start(self, data_fetcher: Any) -> None:
        loop, epoch_loop = self._trainer.fit_loop, self._trainer.fit_loop.epoch_loop
        recalled, self._recalled = self._recalled, None
        if recalled is not None:
            self._go_on(recalled, data_fetcher)
        else:
            if self._trainer.current_epoch > 0 and not loop.is_resuming and not epoch_loop.restarting:
                self._note_epoch()
            type(epoch_loop).on_run_start(epoch_loop, data_fetcher)
            if self._mirror_now.started:
                self._mirror_now.note(self._progress("before batch"))
            else:
                self._start(self._progress("before batch"))

    def _on_batch_end(self, data_fetcher: Any) -> None:
        """A batch was trained on; what follows may be a validation, which a new driver begins anew."""
        epoch_loop = self._trainer.fit_loop.epoch_loop
        window_over = not epoch_loop._should_accumulate()
        if window_over and epoch_loop._should_check_val_fx(data_fetcher):
            self._mirror_now.note(self._progress("after batch"))
        type(epoch_loop).on_advance_end(epoch_loop, data_fetcher)
        if window_over:
            self._outputs = []
            self._mirror_now.note(self._progress("before batch"))

    def _before_fetch(self) -> None:
        self._last_fetch = random_state(self._loaders)
        self._first_fetch = self._first_fetch or self._last_fetch
        epoch_loop = self._trainer.fit_loop.epoch_loop
        type(epoch_loop)._on_before_fetch(epoch_loop)

    # --------------------------------------------------------- training steps

    def step(self, run: Callable[[], Any]) -> Any:  # Any: what a training step may return
        """Run a training step, or return what it has returned already when its optimizer step was taken before."""
        if self._mirror is None:  # there is no optimizer
            return run()
        if self._pending is None:
            output = run()
            self._outputs.append(tree_map_only(Tensor, Tensor.detach, output))
            return output
        output = self._outputs.pop(0)
        if not self._outputs:  # the step that is not taken again follows
            self._mirror_now.state.put(self._pending["changed"])
            set_logged(self._trainer, self._pending["logged"])
            set_random_state(self._pending["random"], self._loaders)
            self._pending = None
        return tree_map_only(Tensor, _differentiable, output)

    def _outcome(self) -> dict[str, Any]:
        return {
            "outputs": self._outputs,
            "changed": self._mirror_now.state.changed(),
            "logged": logged(self._trainer),
            "random": random_state(self._loaders),
        }

    # ----------------------------------------------------------------- mirror

    @property
    def _mirror_now(self) -> DriverMirror:
        assert self._mirror is not None, "not attached"
        return self._mirror

    @property
    def _loaders(self) -> list[Any]:
        combined = self._trainer.fit_loop._combined_loader
        return [] if combined is None else combined.flattened

    def _param_groups(self) -> list[dict[str, Any]]:
        assert self._remote is not None
        return self._remote.numbered_groups()

    def _note_epoch(self) -> None:
        self._epoch_state, self._first_fetch, self._last_fetch = random_state(self._loaders), None, None

    def _start(self, progress: Mapping[str, Any]) -> None:
        assert self._spread is not None
        self._mirror_now.start({"blocks": self._spread.remote_block_names()}, progress, self._pending)
        self._fits.settle()

    def _progress(self, phase: Phase) -> dict[str, Any]:
        trainer = self._trainer
        return {
            "checkpoint": snapshot(trainer, self._mirror_now.state.names(), self._param_groups()),
            "logged": logged(trainer),
            "phase": phase,
            "epoch": trainer.current_epoch,
            "batches": trainer.fit_loop.epoch_loop.batch_progress.current.completed,
            "random": random_state(self._loaders),
            "random_at_epoch": self._epoch_state,
            "random_at_fetches": (self._first_fetch, self._last_fetch),
        }

    # ------------------------------------------------------------------ go on

    def _go_on(self, recalled: Recalled, data_fetcher: Any) -> None:
        """Bring the running epoch to where the last driver left it."""
        trainer, progress = self._trainer, recalled.progress
        loop, epoch_loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        self._wind_forward(progress, data_fetcher)
        type(epoch_loop).on_run_start(epoch_loop, data_fetcher)
        loop._restarting = False
        epoch_loop.restarting = False  # its validation loop's too: nothing is half done
        epoch_loop.max_steps = self._max_steps
        self._epoch_state = progress["random_at_epoch"]
        self._first_fetch, self._last_fetch = progress["random_at_fetches"]
        self._mirror_now.state.put({**recalled.base["others"], **progress["changed"]})
        set_logged(trainer, progress["logged"])
        set_random_state(progress["random"], self._loaders)
        self._report_rebuilt()
        self._start(self._progress(progress["phase"]))
        if progress["phase"] == "after batch":
            self._on_batch_end(data_fetcher)

    def _report_rebuilt(self) -> None:
        """Say which blocks are not what they were; their learning rate is scaled as after any such loss."""
        assert self._spread is not None
        gradients, layout = self._spread.pipeline.gradients, self._spread.pipeline.layout
        for blocks, source in self._rebuilt.items():
            assert self._recovery is not None, "nobody wants lost blocks rebuilt"
            policy, report = self._recovery
            gradients.lr_factors_of_blocks |= dict.fromkeys(blocks, policy.lr_factor)
            self._spread.links.tell_survivors(NoteEstimates(list(blocks)))
            stages = tuple(sorted(set(map(layout.stage_of_block, blocks))))
            how_lost, seconds = "it died together with the driver", time.monotonic() - self._began_s
            report(RecoveryEvent(layout.placement[stages[0]][0], stages, how_lost, source, seconds, 0))

    def _wind_forward(self, progress: Mapping[str, Any], data_fetcher: Any) -> None:
        """Fetch and drop the batches of the epoch that were trained on, from the epoch's random state."""
        if all(isinstance(loader, _Stateful) for loader in self._loaders):
            return  # Lightning has brought them there
        set_random_state(progress["random_at_epoch"], self._loaders)
        iter(data_fetcher)
        first, last = progress["random_at_fetches"]
        for number in range(progress["batches"]):
            if number == 0:
                set_random_state(first, self._loaders)
            if number == progress["batches"] - 1:  # a stream's next batch, which is trained on, is fetched with it
                set_random_state(last, self._loaders)
            next(data_fetcher)
        data_fetcher.fetched -= progress["batches"]  # Lightning adds them


def _told(recalled: Recalled) -> str:
    progress = recalled.progress
    where = f"epoch {progress['epoch']}, batch {progress['batches']}, after {recalled.step} optimizer steps"
    rest = "" if recalled.pending is None else "; the last of them is not taken again, but its batch is finished"
    return f"the driver was lost in fit {recalled.fit}, which goes on from memory at {where}{rest}"


def _differentiable(tensor: Tensor) -> Tensor:
    """Return what may be back-propagated, and leads nowhere."""
    return tensor.requires_grad_() if tensor.is_floating_point() else tensor


def _skip_next_step(optimizer: Optimizer, remote: RemoteOptimizer) -> None:
    """The first batch was stepped for already: run all around the step, but not the step.

    A loss scaler hears what it has heard the first time: that gradients, which nobody has now, are finite.
    """
    original = optimizer.__dict__.get("step")  # schedulers put one there
    remote.__dict__["unscale"] = lambda inverse: lambda: False

    def step(closure: Callable[[], Any] | None = None) -> Any:  # Any: the loss
        del remote.__dict__["unscale"]
        if original is None:
            del optimizer.__dict__["step"]
        else:
            optimizer.__dict__["step"] = original
        loss = None if closure is None else closure()  # where the loss is scaled, it has run before
        remote.forget_clipping()
        return loss

    optimizer.__dict__["step"] = step
