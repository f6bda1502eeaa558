"""Leave blocks out of a model: state dict -> smaller state dict, configuration -> smaller configuration.

Pure functions on mappings, without a model, a file or a process. Residual networks that were trained with skipped
stages bear it (SkipPipe, arXiv 2502.19913). Files are read and written in :mod:`skippipe_plugin.export`.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

from torch import Tensor

from .partition import cut

__all__ = ["NamedStack", "find_stack", "resize_config", "stage_blocks", "without_blocks"]

_NUMBERED: Final = re.compile(r"(?:^|(?<=\.))(\d+)\.")
_COUNTS: Final = frozenset(
    {"num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks", "n_blocks", "depth"}
)
"""Names under which configurations keep the number of their layers."""
_SIDED: Final = re.compile(r"^(?:num_)?(encoder|decoder)_layers$")
"""The same in models that have two stacks, by which of them; there the plain names mean the encoder."""
_LEADING: Final = frozenset({"first_k_dense_replace", "max_window_layers"})
"""How many of the first layers are of one kind."""
_INDICES: Final = frozenset({"mlp_only_layers", "cross_attention_layers", "moe_layers"})
"""The indices of the layers of one kind."""
_PER_LAYER: Final = re.compile(r"layer|block")
"""What the names of lists with one entry per layer contain, such as ``layer_types``."""
_PERIODIC: Final = re.compile(r"(layer|sparse|attention|attn|moe|expert|window).*_(period|freq|interval|step|pattern)$")
"""Rules that tell a layer's kind from its index."""


@dataclass(frozen=True, slots=True)
class NamedStack:
    """The block stack of a state dict: consecutive numbers below one name."""

    container: str
    """The dotted name before the numbers; "" when the names begin with them."""
    numbers: tuple[int, ...]
    """The number of each block in its container, ascending."""
    sizes: tuple[int, ...]
    """How many elements each block holds."""

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self.numbers)

    def __str__(self) -> str:
        """Describe the stack in one line, for messages."""
        return f"{self.container or '(no name)'}: {len(self)} blocks ({sum(self.sizes):,} elements)"


def find_stack(state: Mapping[str, Tensor], blocks: str | None = None) -> NamedStack:
    """Find the block stack of a state dict by its numbered names (``...layers.3.``).

    A stack is the longest run of consecutive numbers below one name. Outermost stacks count; those of composite blocks
    come before those of plain layers.

    Args:
        state: The tensors by name.
        blocks: The name before the numbers, such as ``"model.layers"``; needed where there is more than one stack.

    Raises:
        ValueError: There is no stack, or several and no ``blocks``; the message lists the candidates.

    Example:
        >>> import torch
        >>> str(find_stack({f"body.{i}.{part}.weight": torch.zeros(2) for i in range(4) for part in "ab"}))
        'body: 4 blocks (16 elements)'
    """
    stacks = list(_stacks(state))
    if blocks is not None:
        for stack, _ in stacks:
            if _bare(stack.container) == _bare(blocks):
                return stack
        raise ValueError(f"there are no numbered blocks below {blocks!r}. {_candidates(stacks)}")
    outer = [entry for entry in stacks if not any(_is_inside(entry[0], other) for other, _ in stacks)]
    best = [entry for entry in outer if entry[1] == max(is_composite for _, is_composite in outer)]
    if len(best) > 1:
        raise ValueError(f"the checkpoint holds {len(best)} block stacks; name one with --blocks. {_candidates(best)}")
    if not best:
        raise ValueError("the checkpoint holds no block stack: no name such as 'layers.3.weight' with a number in it")
    return best[0][0]


def stage_blocks(stack: NamedStack, num_stages: int) -> tuple[range, ...]:
    """Return the blocks of each stage, stage 1 first: the cut of a pipeline with so many block stages.

    A pipeline weighs blocks by what tokens are multiplied with. Names do not tell embedding tables and buffers from
    other tensors, so a block that holds more of them than the others may be cut elsewhere here.

    Raises:
        PartitionError: There are fewer blocks than stages.
    """
    return cut([float(max(1, size)) for size in stack.sizes], num_stages)


def without_blocks(state: Mapping[str, Tensor], stack: NamedStack, skipped: Collection[int]) -> dict[str, Tensor]:
    """Return the state dict of the same model with some blocks deleted from their container.

    Later numbers move down, as in an `nn.ModuleList`. Tensors are shared with ``state``.

    Args:
        state: The tensors by name.
        stack: Its block stack.
        skipped: The blocks to leave out, counted from 0 within the stack.

    Raises:
        ValueError: A block does not exist, or none is left.

    Example:
        >>> import torch
        >>> state = {f"body.{i}.weight": torch.tensor([i]) for i in range(4)}
        >>> without_blocks(state, find_stack(state), {1, 2})
        {'body.0.weight': tensor([0]), 'body.1.weight': tensor([3])}
    """
    check_selection("block", skipped, range(len(stack)))
    gone = {stack.numbers[block] for block in skipped}
    start = f"{stack.container}." if stack.container else ""
    kept = {}
    for name, tensor in state.items():
        match = _NUMBERED.match(name, len(start)) if name.startswith(start) else None
        if match is None:
            kept[name] = tensor
        elif (number := int(match[1])) not in gone:
            kept[f"{start}{number - sum(skip < number for skip in gone)}.{name[match.end() :]}"] = tensor
    return kept


def check_places(state: Mapping[str, Tensor], stack: NamedStack, kept: Sequence[int]) -> None:
    """Raise unless the blocks that are kept make a stack of the same kind.

    A model that gives its first block what all need (T5's table of relative positions), or makes every second one
    another, builds its blocks by their places: what is kept would lack tensors there, and they would be random.

    Args:
        state: The tensors by name.
        stack: Its block stack.
        kept: The blocks that are kept, ascending, from 0 within the stack.

    Raises:
        ValueError: A kind is left out altogether, or a block would come to the place of one of another kind.
    """
    kinds = _kinds(state, stack)
    last = len(kinds) - 1
    for block, kind in enumerate(kinds):
        if all(kinds[other] != kind for other in kept):
            raise ValueError(
                f"without block {block} no block has {_difference(kind, kinds[kept[0]])}, which the model looks for; "
                f"keep block {block}, and leave out others"
            )
    for place, block in enumerate(kept):
        if kinds[block] != kinds[place] and not (block == last and kinds.count(kinds[last]) == 1):
            raise ValueError(
                f"block {block} would come to the place of block {place}, but is of another kind: they differ in "
                f"{_difference(kinds[place], kinds[block])}; leave out blocks such that the rest come to places of "
                "their own kind, such as a whole period of them"
            )


def _difference(one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> str:
    """Name a tensor that one kind of blocks has and the other has not, or not so."""
    own = sorted(name for name in one if one[name] != other.get(name))
    return (own or sorted(other.keys() - one.keys()))[0]


def _kinds(state: Mapping[str, Tensor], stack: NamedStack) -> list[dict[str, tuple[int, ...]]]:
    """Return the names and shapes of each block's tensors."""
    start = f"{stack.container}." if stack.container else ""
    kinds: dict[int, dict[str, tuple[int, ...]]] = {number: {} for number in stack.numbers}
    for name, tensor in state.items():
        match = _NUMBERED.match(name, len(start)) if name.startswith(start) else None
        if match is not None and int(match[1]) in kinds and isinstance(tensor, Tensor):
            kinds[int(match[1])][name[match.end() :]] = tuple(tensor.shape)
    return list(kinds.values())


def tells_kinds(changed: Collection[str]) -> bool:
    """Whether among the changed entries of a configuration are some that say which layer is of which kind."""
    names = [name.rpartition(".")[2] for name in changed]
    return any(name not in _COUNTS and not _SIDED.search(name) for name in names)


def check_selection(kind: str, skipped: Collection[int], existing: range) -> None:
    """Raise ValueError when what is to be left out does not exist, or is everything or nothing."""
    if unknown := sorted(set(skipped) - set(existing)):
        raise ValueError(
            f"there is no {kind} {unknown[0]}; the {len(existing)} {kind}s are {existing[0]} to {existing[-1]}"
        )
    if not skipped:
        raise ValueError(f"nothing to leave out: name at least one {kind}")
    if len(set(skipped)) == len(existing):
        raise ValueError(f"all {len(existing)} {kind}s would be left out; keep at least one")


def resize_config(
    config: Mapping[str, Any], num_blocks: int, kept: Sequence[int], stack: str = ""
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a configuration for the blocks that are kept, and the dotted names of the entries that changed.

    Changed are numbers of layers (``num_hidden_layers``, ``n_layer``, ...) that equal ``num_blocks``, lists with one
    entry per layer (``layer_types``), lists of layer indices (``mlp_only_layers``) and numbers of leading layers
    (``first_k_dense_replace``), in nested mappings too.

    Args:
        config: A configuration, such as the content of a ``config.json``.
        num_blocks: The number of blocks that it describes.
        kept: The blocks that are kept, ascending, from 0.
        stack: The name of the block stack, which tells an encoder from a decoder.

    Raises:
        ValueError: The kind of a layer follows from its index, so that no configuration describes what is left.

    Example:
        >>> resize_config({"n_layer": 3, "layer_types": ["full", "sliding", "full"]}, 3, [0, 1])
        ({'n_layer': 2, 'layer_types': ['full', 'sliding']}, ('n_layer', 'layer_types'))
    """
    _check_not_periodic(config, num_blocks)
    resized: dict[str, Any] = {}
    changed: list[str] = []
    others = _counts_of_the_other(config, stack)
    for name, value in config.items():
        if isinstance(value, Mapping):
            resized[name], inner = resize_config(value, num_blocks, kept, stack)
            changed += [f"{name}.{entry}" for entry in inner]
        else:
            resized[name] = value if name in others else _resized(str(name), value, num_blocks, kept)
            changed += [name] * (resized[name] != value)
    return resized, tuple(changed)


def _counts_of_the_other(config: Mapping[str, Any], stack: str) -> Collection[str]:
    """Return the entries that count the layers of a stack which is not the one with this name."""
    sides = {str(name): match[1] for name in config if (match := _SIDED.search(str(name))) is not None}
    own = next((side for side in ("decoder", "encoder") if side in re.split(r"[._]", stack)), "")
    if not sides or not own:
        return ()
    return {name for name, side in sides.items() if side != own} | (set(_COUNTS) if own == "decoder" else set())


def _resized(name: str, value: Any, num_blocks: int, kept: Sequence[int]) -> Any:
    if isinstance(value, list | tuple):
        if name in _INDICES:
            return [new for new, old in enumerate(kept) if old in value]
        return [value[old] for old in kept] if _is_per_layer(name, value, num_blocks) else value
    if (name in _COUNTS or _SIDED.search(name)) and value == num_blocks:
        return len(kept)
    if name in _LEADING and isinstance(value, int):
        return sum(old < value for old in kept)
    return value


def _is_per_layer(name: str, value: Any, num_blocks: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == num_blocks and bool(_PER_LAYER.search(name))


def _check_not_periodic(config: Mapping[str, Any], num_blocks: int) -> None:
    counts = any(name in _COUNTS and value == num_blocks for name, value in config.items())
    if not counts or any(_is_per_layer(str(name), value, num_blocks) for name, value in config.items()):
        return
    for name, value in config.items():
        if _PERIODIC.search(str(name)) and isinstance(value, int) and value > 1:
            raise ValueError(
                f"{name}={value}: this model tells a layer's kind from its index, so no configuration describes it "
                "with layers left out; list the kinds in 'layer_types' if the model knows it"
            )


# Stacks in names ----------------------------------------------------------------------------------


def _stacks(state: Mapping[str, Tensor]) -> Iterator[tuple[NamedStack, bool]]:
    """Yield the stack of each container that has one, and whether its blocks are composite."""
    for container, children in _containers(state).items():
        runs = [run for run in _runs(children) if len(run) >= 2]
        if runs:
            best = max(runs, key=lambda run: (_is_composite(children[run[0]]), len(run)))
            sizes = tuple(sum(children[number].values()) for number in best)
            yield NamedStack(container, tuple(best), sizes), _is_composite(children[best[0]])


def _containers(state: Mapping[str, Tensor]) -> dict[str, dict[int, dict[str, int]]]:
    """Map container name -> number -> name below the number -> elements."""
    containers: dict[str, dict[int, dict[str, int]]] = {}
    for name, tensor in state.items():
        for match in _NUMBERED.finditer(name):
            children = containers.setdefault(name[: match.start()].rstrip("."), {})
            children.setdefault(int(match[1]), {})[name[match.end() :]] = tensor.numel()
    return containers


def _runs(children: Mapping[int, Mapping[str, int]]) -> Iterator[list[int]]:
    """Yield runs of consecutive numbers: of composite children of whatever kind, or of alike plain layers."""

    def key(entry: tuple[int, int]) -> tuple[int, Any]:
        position, number = entry
        child = children[number]
        return number - position, _is_composite(child) or sorted(child.items())

    for _, run in groupby(enumerate(sorted(children)), key=key):
        yield [number for _, number in run]


def _is_composite(child: Mapping[str, int]) -> bool:
    return any("." in name for name in child)


def _is_inside(stack: NamedStack, other: NamedStack) -> bool:
    start = f"{other.container}." if other.container else ""
    match = _NUMBERED.match(f"{stack.container}.", len(start)) if stack.container.startswith(start) else None
    return match is not None and int(match[1]) in other.numbers


def _bare(name: str) -> str:
    """Drop torch.compile's wrapper from a name."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _candidates(stacks: Sequence[tuple[NamedStack, bool]]) -> str:
    return "Candidates: " + ("; ".join(str(stack) for stack, _ in stacks) or "none")
