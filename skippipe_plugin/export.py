"""Write a smaller, ordinary checkpoint that lacks some blocks: of Lightning, or a folder of transformers.

What is left out and how names change is decided in :mod:`skippipe_plugin.omit`; here are the files. Nothing is written
under the final name before it is complete. Neither Lightning nor transformers is imported.
"""

import copy
import json
import pickle
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any, Final

import torch
from torch import Tensor

from .engine import phases
from .omit import (
    NamedStack,
    check_places,
    check_selection,
    find_stack,
    resize_config,
    stage_blocks,
    tells_kinds,
    without_blocks,
)

__all__ = ["Omission", "export"]

_WEIGHT_FILES: Final = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin")
_WEIGHT_PATTERNS: Final = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*")
_OF_THE_RUN: Final = ("optimizer_states", "lr_schedulers", "callbacks")
"""What a checkpoint holds about the larger model's training; a checkpoint of weights only lacks it too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Omission:
    """What to leave out; give stages or blocks.

    Checkpoints of a pipeline do not say how many stages there were: they are those of one process. The cut follows
    from the blocks and the number of stages alone, so the number is all that is needed. (Except with ``driver_stage``,
    which makes the first stage smaller by what the head costs: name blocks then.)
    """

    skip_stages: tuple[int, ...] = ()
    """The stages to leave out, from 1 as in the pipeline."""
    num_stages: int | None = None
    """How many block stages the pipeline had, as in ``SkipPipeStrategy.num_stages``."""
    skip_blocks: tuple[int, ...] = ()
    """The blocks to leave out, from 0."""
    blocks: str | None = None
    """The name of the block stack; found when None."""

    def __post_init__(self) -> None:
        if bool(self.skip_stages) == bool(self.skip_blocks):
            raise ValueError("say what to leave out: either --skip-stages 2,4 --num-stages N or --skip-blocks 3,4,5")
        if self.skip_stages and self.num_stages is None:
            raise ValueError(
                "--skip-stages counts the stages of a pipeline, which the checkpoint does not know: add --num-stages N "
                "(the workers of the run, divided by its replicas), or name blocks with --skip-blocks"
            )

    def skipped_blocks(self, stack: NamedStack) -> tuple[int, ...]:
        """Return the blocks to leave out of a stack.

        Raises:
            ValueError: A stage or block does not exist, or nothing would be left.
        """
        if self.skip_blocks:
            check_selection("block", self.skip_blocks, range(len(stack)))
            return tuple(sorted(set(self.skip_blocks)))
        assert self.num_stages is not None
        stages = stage_blocks(stack, self.num_stages)
        check_selection("stage", self.skip_stages, range(1, self.num_stages + 1))
        return tuple(block for stage in sorted(set(self.skip_stages)) for block in stages[stage - 1])


def export(
    source: FilePath, target: FilePath, omission: Omission, *, config: FilePath | None = None, trust: bool = False
) -> str:
    """Write a smaller checkpoint and return a report of what was left out.

    Args:
        source: A Lightning checkpoint, or a folder with a ``config.json`` that ``save_pretrained`` wrote.
        target: The file or folder to write; must not exist.
        omission: What to leave out.
        config: The ``config.json`` of a transformers model inside the LightningModule. A smaller one is written beside
            the target, as ``<target>.config.json``.
        trust: Whether to unpickle objects of any class, which can run code.

    Raises:
        ValueError: The source is not a checkpoint, the omission does not fit it, or the target exists.
        OSError: A file cannot be read or written.
    """
    beside = target.with_name(f"{target.name}.config.json") if config is not None else None
    for path in filter(None, (target, beside)):
        if path.exists():
            raise ValueError(f"{path} exists; name a new one")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.absolute().parent}")
    if not source.exists():
        raise FileNotFoundError(2, "No such file or folder", str(source))
    phases.reach(phases.Phase.EXPORTING)
    if source.is_dir():
        return _export_folder(source, target, omission, trust)
    smaller = None if config is None else _model_config(config)
    return _export_checkpoint(source, target, omission, (smaller, beside), trust)


# Lightning -----------------------------------------------------------------------------------------


def _export_checkpoint(
    source: FilePath,
    target: FilePath,
    omission: Omission,
    config: tuple[dict[str, Any] | None, FilePath | None],
    trust: bool,
) -> str:
    checkpoint = _load(source, trust)
    state = checkpoint.get("state_dict") if isinstance(checkpoint, Mapping) else None
    if not isinstance(state, Mapping):
        raise ValueError(f"{source} is not a Lightning checkpoint: it has no 'state_dict'")
    stack, skipped, smaller = _smaller(state, omission)
    kept = [block for block in range(len(stack)) if block not in skipped]
    left = {name: value for name, value in checkpoint.items() if name not in _OF_THE_RUN}
    left["state_dict"] = smaller
    changed: tuple[str, ...] = ()
    if isinstance(hyper := left.get("hyper_parameters"), Mapping):
        left["hyper_parameters"], changed = _resize_hyperparameters(hyper, stack, kept)
    wanted, beside = config
    text, names = ("", ()) if wanted is None else _resized_text(wanted, stack, kept)
    if not tells_kinds((*changed, *names)):
        check_places(state, stack, kept)
    lines = [_report(stack, skipped, omission)]
    dropped = [name for name in _OF_THE_RUN if checkpoint.get(name)]
    if dropped:
        lines.append(f"dropped {', '.join(dropped)}: they belong to the larger model's training")
    lines.append(
        f"hyper_parameters changed: {', '.join(changed)}"
        if changed
        else f"no entry of hyper_parameters says {len(stack)} layers: build the model with {len(kept)} when you load it"
    )
    if wanted is not None and beside is not None:
        beside.write_text(text, encoding="utf-8")
        lines.append(f"wrote {beside} with {', '.join(names)} changed")
    _write_complete(target, lambda path: torch.save(left, path))
    return "\n".join([*lines, f"wrote {target}"])


def _load(path: FilePath, trust: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error).lower() and _is_archive(path):
            raise ValueError(
                f"{path} holds objects of other classes than torch's, which can run code when they are read; if you "
                "trust the file, add --trust"
            ) from error
        raise ValueError(f"{path} is not a checkpoint of torch") from error
    except (RuntimeError, EOFError, AttributeError, ImportError, KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is not a checkpoint that can be read here: {error}") from error


def _is_archive(path: FilePath) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _resize_hyperparameters(
    hyper: Mapping[str, Any], stack: NamedStack, kept: list[int]
) -> tuple[Any, tuple[str, ...]]:
    """Resize the layer counts of a module's arguments, also in configurations of transformers among them."""
    resized, changed = resize_config(hyper, len(stack), kept, stack.container)
    for name, value in hyper.items():
        if not isinstance(value, Mapping) and hasattr(value, "to_diff_dict"):
            inner, entries = resize_config(vars(value), len(stack), kept, stack.container)
            resized[name] = copy.copy(value)
            vars(resized[name]).update(inner)
            changed += tuple(f"{name}.{entry}" for entry in entries)
    return resized, changed


# transformers --------------------------------------------------------------------------------------


def _export_folder(source: FilePath, target: FilePath, omission: Omission, trust: bool) -> str:
    config = _model_config(source / "config.json")
    state = _folder_state(source, trust)
    stack, skipped, smaller = _smaller(state, omission)
    kept = [block for block in range(len(stack)) if block not in skipped]
    text, names = _resized_text(config, stack, kept)
    if not tells_kinds(names):
        check_places(state, stack, kept)

    def write(folder: FilePath) -> None:
        from safetensors.torch import save_file

        shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*_WEIGHT_PATTERNS))
        (folder / "config.json").write_text(text, encoding="utf-8")
        save_file(
            {name: tensor.contiguous() for name, tensor in smaller.items()},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )

    _write_complete(target, write)
    return f"{_report(stack, skipped, omission)}\nconfig.json changed: {', '.join(names)}\nwrote {target}"


def _folder_state(folder: FilePath, trust: bool) -> dict[str, Tensor]:
    found = next((folder / name for name in _WEIGHT_FILES if (folder / name).exists()), None)
    if found is None:
        raise ValueError(f"{folder} holds no weights; it needs one of {', '.join(_WEIGHT_FILES)}")
    if found.suffix == ".bin":
        state: dict[str, Tensor] = _load(found, trust)
        return state
    from safetensors.torch import load_file

    names = [found.name]
    if found.suffix == ".json":
        names = sorted(set(json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()))
    return {name: tensor for file in names for name, tensor in load_file(folder / file).items()}


def _model_config(path: FilePath) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} is not a model's config.json")
    return config


def _resized_text(config: Mapping[str, Any], stack: NamedStack, kept: list[int]) -> tuple[str, tuple[str, ...]]:
    """Return the smaller config.json and the names of the changed entries; exactly one part of it must be changed."""
    resized, changed = resize_config(config, len(stack), kept, stack.container)
    parts = {name.rpartition(".")[0] for name in changed}
    if len(parts) != 1:
        where = f"several parts say so ({', '.join(changed)})" if parts else "no entry says so"
        raise ValueError(f"cannot tell what in config.json stands for the {len(stack)} blocks: {where}")
    return json.dumps(resized, indent=2) + "\n", changed


# Both ----------------------------------------------------------------------------------------------


def _smaller(state: Mapping[str, Any], omission: Omission) -> tuple[NamedStack, tuple[int, ...], dict[str, Tensor]]:
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    stack = find_stack(tensors, omission.blocks)
    skipped = omission.skipped_blocks(stack)
    return stack, skipped, without_blocks(state, stack, skipped)


def _report(stack: NamedStack, skipped: tuple[int, ...], omission: Omission) -> str:
    what = _named("block", skipped)
    if omission.skip_stages:
        what = f"{_named('stage', sorted(set(omission.skip_stages)))} of {omission.num_stages} ({what})"
    return f"{stack}; left out {what}, kept {len(stack) - len(skipped)}"


def _named(kind: str, numbers: Sequence[int]) -> str:
    return f"{kind}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def _write_complete(target: FilePath, write: Callable[[FilePath], None]) -> None:
    """Write under a temporary name in the same folder, then rename."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    try:
        write(unfinished)
        unfinished.rename(target)
    except BaseException:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)
        raise
