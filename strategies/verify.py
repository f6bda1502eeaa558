"""One training step twice, in one process and as a pipeline, each by a Trainer of its own on a copy of the module.

Copies, so that nothing of the user's changes: hooks of the module run on them, loggers and callbacks are left out.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import DataLoader

from ..engine.device import kept_random_states
from ..engine.errors import SkipPipeError, StageLostError
from ..model.settings import PipelineSettings
from ..model.skipping import skips
from ..model.verify import WAYS_OUT, Agreement, Difference, StepEvidence, compare, explain, without_randomness
from ..partition import find_blocks

if TYPE_CHECKING:
    from .skippipe import SkipPipeStrategy

Verify = Literal["off", "first"]
"""Whether a fit compares its first batch with one process."""
_SWITCHED_OFF = (
    *("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "num_sanity_val_steps"),
    "limit_val_batches",
)


def check_step(
    strategy: SkipPipeStrategy, module: LightningModule, batch: Any, options: Mapping[str, Any]
) -> Agreement:
    """Do what :meth:`SkipPipeStrategy.check` says."""
    if strategy.worker_pids or strategy.read_launcher() is not None:
        raise SkipPipeError(
            "check() starts a pipeline of its own: call it before fit, validate, test or predict, in a script that no "
            'launcher has started; or use SkipPipeStrategy(verify="first"), which works there too'
        )
    return _checked(strategy, module, batch, options)


def _checked(strategy: SkipPipeStrategy, module: LightningModule, batch: Any, options: Mapping[str, Any]) -> Agreement:
    _check_settings(strategy.settings)
    names = find_blocks(module, strategy.settings.blocks).names
    return StepCheck(
        module,
        batch,
        pipeline=functools.partial(_probe, strategy),
        devices=strategy.num_processes,
        device=strategy.root_device,
        options={"accelerator": _accelerator(strategy), "precision": strategy.precision_plugin.precision, **options},
        is_block=lambda name: any(name.startswith(f"{block}.") for block in names),
    ).run()


def _accelerator(strategy: SkipPipeStrategy) -> Any:
    """Return what Trainers call the strategy's accelerator; a third party's may have another name than its devices."""
    kind = strategy.root_device.type
    return kind if kind in AcceleratorRegistry.available_accelerators() else strategy.accelerator


def verify_first(strategy: SkipPipeStrategy, trainer: Trainer, module: LightningModule) -> None:
    """Check the first batch of a Trainer that is about to fit, and say so."""
    start_s = time.monotonic()
    agreement = _checked(strategy, module, first_batch(trainer), options_of(trainer))
    rank_zero_info(f"verified in {time.monotonic() - start_s:.1f} s that the first batch leaves {agreement}")


def _probe(strategy: SkipPipeStrategy, asked: Mapping[str, Any]) -> SkipPipeStrategy:
    """Return a strategy like this one for a step that is only looked at."""
    probe = type(strategy)()
    probe.settings = dataclasses.replace(strategy.settings, **{"verbose": False, **asked})
    probe.is_probe = True
    return probe


class StepCheck:
    """Compares one step of a module on one batch.

    Args:
        module: What is trained; it stays as it is.
        batch: What a data loader would give.
        pipeline: Makes the pipeline's strategy, given what is to be other than in the user's.
        devices: How many processes the pipeline has.
        device: What one process computes on.
        options: Further arguments of the Trainers.
        is_block: Says by its name whether a tensor belongs to the blocks.
    """

    def __init__(
        self,
        module: LightningModule,
        batch: Any,
        *,
        pipeline: Callable[[Mapping[str, Any]], Any],
        devices: int,
        device: torch.device,
        options: Mapping[str, Any],
        is_block: Callable[[str], bool],
    ) -> None:
        self._module = module
        self._batch = batch
        self._pipeline = pipeline
        self._devices = devices
        self._device = device
        self._options = dict(options)
        self._is_block = is_block

    def run(self) -> Agreement:
        """Compare, and return how close the two are.

        Raises:
            SkipPipeError: They differ, or one process cannot take the step.
        """
        with isolate_rng(), kept_random_states(self._device), _silence():
            expected = self._expected()
            result = compare(self._found(), expected)
            if isinstance(result, Agreement):
                return result
            raise SkipPipeError(self._complaint(result, expected))

    def _found(self) -> StepEvidence:
        """Take the step as a pipeline, which replaces nobody: what is lost is looked for here, not in a fit."""
        try:
            return self._step(self._pipeline({}))
        except StageLostError as error:
            raise StageLostError(
                f"the step could not be compared: {error.loss}",
                "Nothing was trained; look at that worker's host (memory?), and check or start the script again",
            ) from None

    def _expected(self) -> StepEvidence:
        """Take the step in one process: in double precision if the module can, where rounding hides nothing."""
        own = self._options.get("precision", "32-true")
        for precision in dict.fromkeys(("64-true", own) if "true" in str(own) else ("64-true", "32-true", own)):
            self._options["precision"] = precision
            try:
                return self._step(None)
            except Exception as error:
                failure = error
        raise SkipPipeError(
            f"the step cannot be checked, since one process cannot take it: {type(failure).__name__}: {failure}. The "
            "check runs the module's hooks without callbacks and loggers; give it a module and a batch that train "
            "without them"
        ) from failure

    def _complaint(self, difference: Difference, expected: StepEvidence) -> str:
        agreeing = next((asked for asked in WAYS_OUT if self._agrees(asked, expected)), None)
        buffers = {name for name, _ in self._module.named_buffers()}
        kind, advice = explain(
            difference,
            is_random=isinstance(compare(self._step(None, seed=1), expected), Difference),
            way_out=agreeing,
            in_blocks=self._is_block(difference.name),
            is_buffer=difference.name in buffers,
        )
        return f"{difference}. Likely {kind}. What helps: {advice}; or train without the pipeline"

    def _agrees(self, asked: Mapping[str, Any], expected: StepEvidence) -> bool:
        """Whether a pipeline with some other settings does what one process does."""
        try:
            return isinstance(compare(self._step(self._pipeline(asked)), expected), Agreement)
        except Exception:  # what cannot run is no way out
            return False

    def _step(self, strategy: Any, seed: int = 0) -> StepEvidence:
        """Train a copy of the module for one step."""
        torch.manual_seed(seed)
        module, observer = copy.deepcopy(self._module), _Observer()
        without_randomness(module)
        loader: DataLoader[Any] = DataLoader([copy.deepcopy(self._batch)], batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]
        # Without a strategy Lightning takes the CPU for a kind of accelerator that it does not know.
        alone: dict[str, Any] = {"devices": 1, "strategy": SingleDeviceStrategy(self._device)}
        placed = alone if strategy is None else {"devices": self._devices, "strategy": strategy}
        quiet: dict[str, Any] = dict.fromkeys(_SWITCHED_OFF, 0) | {"logger": False, "max_steps": 1}
        trainer = Trainer(callbacks=[observer], **quiet, **self._options, **placed)
        trainer.fit(module, loader)
        weights = {
            name: tensor.detach().clone() for name, tensor in module.state_dict().items() if torch.is_tensor(tensor)
        }
        return StepEvidence(observer.loss, observer.logged, observer.gradients, weights)


class _Observer(Callback):
    """Notes what the step leaves."""

    def __init__(self) -> None:
        self.loss: float | None = None
        self.logged: dict[str, float] = {}
        self.gradients: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        for name, parameter in pl_module.named_parameters():
            if parameter.grad is not None and not parameter.grad.is_meta:
                self.gradients[name] = float(parameter.grad.norm())

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        if outputs is not None:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
            self.loss = float(loss)
        metrics = trainer.callback_metrics.items()
        self.logged = {
            name: float(value) for name, value in metrics if not isinstance(value, Tensor) or value.numel() == 1
        }


def _check_settings(settings: PipelineSettings) -> None:
    """Raise when a pipeline of these settings differs from one process by what they are for."""
    by_design = {
        "skip_ratio": skips(settings.skip_ratio),
        "moe": settings.moe is not None,
        "drivers": settings.drivers > 1,
    }
    for name, given in by_design.items():
        if given:
            raise ValueError(
                f"a step with {name}={getattr(settings, name)!r} cannot be compared with one process, which has no "
                f"such thing; leave {name} out while you compare, or leave verify out"
            )


def first_batch(trainer: Trainer) -> Any:
    """Return the first training batch of a Trainer that is about to fit; its loader begins anew afterwards."""
    with isolate_rng():
        given = trainer.fit_loop._data_source.dataloader()
        loader = given if isinstance(given, CombinedLoader) else CombinedLoader(given, "max_size_cycle")
        with _generators_kept(loader):
            batch, _, _ = next(iter(loader))
    return batch


def options_of(trainer: Trainer) -> dict[str, Any]:
    """Return those arguments of a Trainer that decide what a step does."""
    return {
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": trainer.gradient_clip_algorithm,
    }


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the words of Trainers that nobody started from the user."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _generators_kept(loader: CombinedLoader) -> Iterator[None]:
    """Leave the generators that samplers draw from as they are."""
    parts = [part for each in loader.flattened for part in (each, getattr(each, "sampler", None))]
    generators = [each for part in parts if isinstance(each := getattr(part, "generator", None), torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)


def _as_it_is(batch: Any) -> Any:
    return batch
