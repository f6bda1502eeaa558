"""What a pipeline cannot do, said before training starts, with the reason and the way out."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelPruning
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from ..driver.capture.remote import is_remote
from ..engine.errors import SkipPipeError
from ..model.settings import PipelineSettings
from ..partition import BlockStack, find_blocks
from ..supervisor import supervised


def check_fit(module: LightningModule, trainer: Trainer, settings: PipelineSettings) -> None:
    """Raise when ``trainer.fit(module)`` asks for what a pipeline cannot do."""
    if trainer.state.fn != TrainerFn.FITTING:
        return
    if not module.automatic_optimization:
        manual = f"{type(module).__name__} sets automatic_optimization=False"
        _check_open(manual, "use automatic optimization", settings)
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise SkipPipeError("training_step(dataloader_iter) cannot be microbatched; take a batch instead")
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, ModelPruning):
            _check_pruning(callback, find_blocks(module, settings.blocks))


def _check_pruning(callback: ModelPruning, stack: BlockStack) -> None:
    """Raise when layers of the blocks are to be pruned; Lightning has chosen them when it has set the callback up."""
    names = {
        module: f"{block_name}.{name}".rstrip(".")
        for block_name, block in zip(stack.names, stack.blocks, strict=True)
        for name, module in block.named_modules()
    }
    chosen = [f"{names[module]}.{name}" for module, name in callback._parameters_to_prune if module in names]
    if chosen:
        raise SkipPipeError(
            f"the callback {type(callback).__name__} prunes {len(chosen)} weights of the blocks while they train "
            f"({chosen[0]}, ...), but they are on the workers, which keep the structure they were handed. Prune them "
            "before fit (torch.nn.utils.prune), whose masks the workers apply, or after it; what is not in the blocks "
            "may be pruned while it trains: name it with parameters_to_prune=[(module, 'weight'), ...]"
        )


def check_several_calls(settings: PipelineSettings) -> None:
    """Raise when steps that call the blocks several times are to run in a way that only others can."""
    _check_open("training_step calls the blocks several times", "put the inputs of all calls into one batch", settings)


def _check_open(what: str, instead: str, settings: PipelineSettings) -> None:
    if settings.drivers > 1:
        raise SkipPipeError(
            f"{what}, and each of drivers={settings.drivers} would go back when its own code says so, which workers "
            f"cannot follow; use drivers=1, or {instead}"
        )
    if settings.microbatches == "batch":
        raise SkipPipeError(
            f'{what}, so that it must run once, on the whole batch, and cannot be cut by microbatches="batch"; leave '
            f"that out, and only what enters the blocks is cut; or {instead}"
        )
    if supervised():
        raise SkipPipeError(
            f"{what}, so that its backward is no part of what a driver that starts again under skippipe run repeats; "
            f"start the script without it, or {instead}"
        )


def far_reaching(optimizers: Sequence[Optimizer]) -> Optimizer:
    """Return the one of several optimizers that steps what is on workers; the first if none does.

    Raises:
        SkipPipeError: Several do.
    """
    far = [each for each in optimizers if any(is_remote(p) for group in each.param_groups for p in group["params"])]
    if len(far) > 1:
        raise SkipPipeError(
            f"{len(far)} of the {len(optimizers)} optimizers step parameters of the blocks, but the workers step one: "
            "let one optimizer have all parameters of the blocks, in groups of their own (the others may have the rest "
            "of the model), or name a stack that one optimizer has with blocks=..."
        )
    return (far or list(optimizers))[0]


def check_mirrored(optimizers: Sequence[Optimizer], module: LightningModule) -> None:
    """Raise when a driver that starts again would lack some of what is trained."""
    known = {id(parameter) for parameter in module.parameters()}
    for optimizer in optimizers:
        others = [each for group in optimizer.param_groups for each in group["params"] if id(each) not in known]
        if others:
            raise SkipPipeError(
                f"the {type(optimizer).__name__} steps {len(others)} parameters that {type(module).__name__} does not "
                f"have (the first of shape {tuple(others[0].shape)}), which a driver that starts again under skippipe "
                "run would begin anew; make them parameters of the module (self.name = ...), or start the script "
                "without it"
            )


def same_objects(one: Sequence[object], other: Sequence[object]) -> bool:
    """Whether two sequences hold the very same objects."""
    return len(one) == len(other) and all(map(operator.is_, one, other))


def check_replaceable(optimizers: Sequence[Optimizer], before: Sequence[Optimizer], *, is_continued: bool) -> None:
    """Raise when ``trainer.strategy.optimizers`` is set, while a model is spread, to what a pipeline cannot step."""
    if not optimizers:
        raise SkipPipeError(
            "trainer.strategy.optimizers was emptied during fit, and a pipeline has an optimizer to step; freeze the "
            "parameters (requires_grad_(False)) or set the learning rate to 0 instead"
        )
    if len(optimizers) > 1 or len(before) > 1:
        raise SkipPipeError(
            f"trainer.strategy.optimizers was set to {len(optimizers)} optimizers during fit, in place of "
            f"{len(before)}: a pipeline takes one in place of one; give an optimizer parameter groups, or return all "
            "of them from configure_optimizers"
        )
    if is_continued:
        raise SkipPipeError(
            "trainer.strategy.optimizers was replaced during a run of skippipe run, whose copies on other machines "
            "follow the first optimizer; change its param_groups instead, or start the run without skippipe run"
        )


def check_unreplaced(optimizers: Sequence[Optimizer], known: Sequence[Optimizer]) -> None:
    """Raise when the list has other optimizers than those that were given to the Trainer."""
    if not same_objects(optimizers, known):
        raise SkipPipeError(
            "the list trainer.strategy.optimizers was changed in place, of which neither Lightning nor the workers "
            "hear; assign another list (trainer.strategy.optimizers = [optimizer])"
        )
