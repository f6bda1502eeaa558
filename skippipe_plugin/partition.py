"""Find the block stack of a model and cut it into pipeline stages.

Everything here reads an `nn.Module` and returns values: nothing is moved, replaced or run, and no
process, no Lightning and no particular model library is known. `find_blocks` chooses the stack,
`estimate_costs` weighs them, and `cut` turns the weights into one contiguous range per stage.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, groupby

from torch import nn
from torch.nn.parameter import is_lazy

from .sharing import PartitionError, has_forward, original

__all__ = [
    "BlockStack",
    "PartitionError",
    "cut",
    "driver_share",
    "estimate_costs",
    "find_blocks",
    "other_stacks",
]

_NAME_IT = (
    'name the stack yourself, as in blocks="model.layers" or, for a part of it, blocks="model.layers.2:10"; one layer '
    'that is called 6 times is blocks="model.layer*6"'
)
_TIMES = re.compile(r"(.+?) *\* *([1-9]\d*)")
_SLICE = re.compile(r"(-?\d*):(-?\d*)")
_NUMBERED = re.compile(r"\D*\d+")
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_LOOKUPS = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, slots=True)
class BlockStack:
    """Name the consecutive blocks of one container, in the order in which they are called."""

    container_name: str
    """Dotted name of the list, dict or `nn.Sequential` in the root module; "" for the root itself. Of several stacks,
    all names."""
    names: tuple[str, ...]
    """Dotted names of the blocks in the root module."""
    blocks: tuple[nn.Module, ...]
    """The blocks themselves; one module may stand here more than once."""

    def __len__(self) -> int:
        """Count the blocks."""
        return len(self.blocks)

    def __str__(self) -> str:
        """Describe the stack in one line, for messages."""
        kinds = [f"{len(list(same))} x {kind.__name__}" for kind, same in groupby(map(_kind, self.blocks))]
        shown = ", ".join(kinds if len(kinds) <= 6 else [*kinds[:5], "..."])
        return f"{self.container_name or '(the model itself)'}: {shown} ({_count(self.blocks):,} parameters)"


def find_blocks(model: nn.Module, blocks: str | Sequence[str] | None = None) -> BlockStack:
    """Find the stack of blocks that the pipeline stages are cut from.

    The stack is the run of consecutive modules of one class, in an `nn.ModuleList`, an
    `nn.Sequential` or an `nn.ModuleDict` of numbered layers, that holds the most parameters; the
    outermost, then the first, on a tie. Modules without a forward are never called and make no
    stack; where only parts of such modules would be left to choose, that is an error. Lists of plain
    layers (heads, projections) come after lists of composite blocks; embeddings and metrics never
    count. A model without any such run may still have an `nn.Sequential`: all of its children are
    the blocks then, because its forward is a plain chain.

    A module may be called at several depths. The list has it several times, or its owner's settings say
    how often it is called (ALBERT), or `blocks` does.

    Args:
        model: The root module, for instance a LightningModule. It is only read.
        blocks: The dotted name of the container, with an optional slice as its last part
            (`"model.layers.2:10"`), for a model where the choice above is not the right one. With a
            number of times (`"model.layers*3"`, or `"model.layer*6"` for a single module) the modules are
            called so often, one after the other and then again. A list names several stacks, in the order in
            which every forward calls them: `["model.encoder", "model.decoder"]`.

    Returns:
        The stack, with names relative to `model`.

    Raises:
        PartitionError: If there is no stack, or none of the given name, or two names have a module in common.

    Example:
        >>> body = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(4)))
        >>> find_blocks(nn.ModuleDict({"embed": nn.Embedding(10, 8), "body": body})).names
        ('body.0', 'body.1', 'body.2', 'body.3')
    """
    containers = list(_containers(model))
    orders = _orders(model, containers)
    if isinstance(blocks, str):
        return _named_stack(model, containers, orders, blocks)
    if blocks is not None:
        return _joined([_named_stack(model, containers, orders, each) for each in blocks], blocks)
    candidates = _candidates(containers, orders)
    uncalled = _uncalled_run(containers)
    if uncalled is not None and not _is_better(candidates, uncalled):
        raise _uncalled(uncalled, containers)
    if not candidates:
        raise PartitionError(f"Found no stack of blocks to cut into stages. {_looked_at(containers)}; {_NAME_IT}.")
    return candidates[0]


def other_stacks(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[str, ...]:
    """Name the other stacks of composite blocks that a model has beside ``blocks``, as `blocks=` takes them.

    Args:
        model: The root module.
        blocks: The stack that was chosen.

    Example:
        >>> model = nn.Transformer(8, 2, 2, 2, 16)
        >>> other_stacks(model, find_blocks(model).blocks)
        ('encoder.layers',)
    """
    inside = {id(part) for block in blocks for part in block.modules()}
    containers = dict(_containers(model))
    names = []
    for stack in _candidates(list(containers.items()), {}):
        children = _children(containers[stack.container_name])
        first = next(index for index, (_, child) in enumerate(children) if child is stack.blocks[0])
        part = "" if len(children) == len(stack) else f"{first}:{first + len(stack)}"
        if inside.isdisjoint(map(id, stack.blocks)) and not all(map(_is_plain_layer, stack.blocks)):
            names.append(_join(stack.container_name, part) if part else stack.container_name)
    return tuple(names)


def estimate_costs(blocks: Sequence[nn.Module]) -> tuple[float, ...]:
    """Estimate how the blocks' compute times relate, from the weights that each token is multiplied with.

    Tables that are only looked up in do not count. The estimate is never 0, so that activations
    and other blocks without weights still take a place.

    Args:
        blocks: The blocks, in order.

    Returns:
        One positive number per block; only their ratios mean something.

    Example:
        >>> estimate_costs([nn.Linear(4, 4, bias=False), nn.ReLU()])
        (16.0, 1.0)
    """
    return tuple(float(max(1, _count([block], skip=_LOOKUPS))) for block in blocks)


def driver_share(model: nn.Module, blocks: Sequence[nn.Module], num_stages: int) -> float:
    """Return the share of an ordinary stage that a driver should hold beside its own work, the head above all.

    The driver's work is estimated like that of blocks, so that all ranks end up with about the same; embeddings are
    look-ups and do not count. The share stays positive: a driver that hosts a stage holds at least one block.
    """
    inside = {id(part) for block in blocks for part in block.modules()}
    layers = [part for part in model.modules() if id(part) not in inside and _is_plain_layer(part)]
    own = sum(p.numel() for layer in layers if not isinstance(layer, nn.Embedding) for p in layer.parameters())
    total = own + sum(estimate_costs(blocks))
    return max(1.0 - own * num_stages / total, 0.01)


def cut(costs: Sequence[float], num_stages: int, *, first_share: float = 1.0) -> tuple[range, ...]:
    """Cut consecutive blocks into stages so that the slowest stage is as fast as possible.

    Among the cuts with the same slowest stage, the most even one is taken (least sum of squares),
    and among those the one with the longer ranges first.

    Args:
        costs: Relative cost of each block.
        num_stages: How many stages to make.
        first_share: The share of a machine that the first stage gets: with 0.5 its blocks cost
            twice as much, because its machine is the driver's and has other work.

    Returns:
        One non-empty range of block indices per stage, in order.

    Raises:
        PartitionError: If there are fewer blocks than stages, or a cost is not a finite number >= 0.

    Example:
        >>> cut([1, 1, 1, 1, 1], 2)
        (range(0, 3), range(3, 5))
        >>> cut([1, 1, 1, 1, 1, 1], 2, first_share=0.5)
        (range(0, 2), range(2, 6))
    """
    _check_cut(costs, num_stages, first_share)
    load = _exact_loads(costs, first_share)
    slowest = _best_rest(load, len(costs), num_stages, max)[0][0]

    def unevenness(here: int, rest: float) -> float:
        return math.inf if here > slowest or rest == math.inf else here * here + rest

    best = _best_rest(load, len(costs), num_stages, unevenness)
    ranges: list[range] = []
    start = 0
    for stage in range(num_stages):
        ends = reversed(_ends(start, len(costs), num_stages - stage))
        stop = next(e for e in ends if unevenness(load(stage, start, e), best[stage + 1][e]) == best[stage][start])
        ranges.append(range(start, stop))
        start = stop
    return tuple(ranges)


# Candidates ---------------------------------------------------------------------------------------


def _containers(module: nn.Module, name: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Yield every list, dict and Sequential under its first name, outermost first, without those of metrics."""
    seen = set() if seen is None else seen
    if id(module) in seen or _is_metric(module):
        return
    seen.add(id(module))
    if isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict):
        yield name, module
    for key, child in _children(module):
        yield from _containers(child, _join(name, key), seen)


def _orders(model: nn.Module, containers: Sequence[tuple[str, nn.Module]]) -> dict[str, tuple[int, ...]]:
    """Return by container in which order its modules are called, where the settings of its owner say that.

    Those of ALBERT have a number of layers, and a number of groups of layers that are one.
    """
    orders = {}
    for name, container in containers:
        config = getattr(model.get_submodule(name.rpartition(".")[0]), "config", None)
        layers, groups = (getattr(config, f"num_hidden_{what}", None) for what in ("layers", "groups"))
        if type(layers) is int and type(groups) is int and len(_children(container)) == groups < layers:
            orders[name] = tuple(int(layer / (layers / groups)) for layer in range(layers))
    return orders


def _candidates(containers: Sequence[tuple[str, nn.Module]], orders: Mapping[str, Sequence[int]]) -> list[BlockStack]:
    """Return the possible stacks, best first."""
    ranked = []
    for name, container in containers:
        if isinstance(container, nn.ModuleDict) and not all(map(_NUMBERED.fullmatch, container)):
            continue  # different parts under their names
        runs = [run for run in _runs(name, container, orders.get(name)) if _is_called(run.blocks[0])]
        if not runs and type(container).forward is nn.Sequential.forward and len(_children(container)) >= 2:
            runs = [_stack(name, _children(container))]
        ranked += [(_rank(run, container), -_count(run.blocks), run) for run in runs]
    # The sort is stable, so on a tie the outermost and first stays in front.
    return [run for _, size, run in sorted(ranked, key=lambda entry: entry[:2]) if size]


def _runs(name: str, container: nn.Module, order: Sequence[int] | None = None) -> Iterator[BlockStack]:
    children = _children(container)
    called = children if order is None else [children[index] for index in order]
    for kind, same in groupby(called, key=lambda item: _kind(item[1])):
        run = list(same)
        if len(run) >= 2 and not issubclass(kind, _LOOKUPS):
            yield _stack(name, run)


def _uncalled_run(containers: Sequence[tuple[str, nn.Module]]) -> BlockStack | None:
    """Return the largest run of modules that nobody calls, such as a list of lists."""
    lists = [(name, each) for name, each in containers if not isinstance(each, nn.ModuleDict)]
    runs = [run for name, each in lists for run in _runs(name, each) if not _is_called(run.blocks[0])]
    return max(runs, key=lambda run: _count(run.blocks), default=None)


def _is_better(candidates: Sequence[BlockStack], uncalled: BlockStack) -> bool:
    """Whether the best candidate is no scrap of what was meant: composite blocks elsewhere, or more of anything."""
    inside = {id(part) for block in uncalled.blocks for part in block.modules()}
    if not candidates or id(candidates[0].blocks[0]) in inside:
        return False
    best = candidates[0]
    is_composite = len(set(map(_kind, best.blocks))) == 1 and not all(map(_is_plain_layer, best.blocks))
    return is_composite or _count(best.blocks) >= _count(uncalled.blocks)


def _uncalled(run: BlockStack, containers: Sequence[tuple[str, nn.Module]]) -> PartitionError:
    kind = _kind(run.blocks[0]).__name__
    name = run.container_name or "The model itself"
    return PartitionError(
        f"{name} is a list of {len(run)} x {kind}, which have no forward and are never called: code such as "
        f"`for attention, feedforward in ...` calls what is in them, and a stage can only call whole blocks. Give them "
        f"a forward, which leaves the names of the weights as they are: `class Layer(nn.{kind}): def forward(self, x): "
        f"...`, and call the layers; or {_NAME_IT}. {_looked_at(containers)}"
    )


def _is_called(block: nn.Module) -> bool:
    """Whether a module can be called at all: a ModuleList has no forward."""
    return not isinstance(block, _CONTAINERS) or has_forward(block)


def _rank(stack: BlockStack, container: nn.Module) -> int:
    """Order the kinds of candidates: how likely is it that the modules are called one after the other?"""
    if len(set(map(_kind, stack.blocks))) > 1:
        return 2  # a chain without a repeated block
    if not all(map(_is_plain_layer, stack.blocks)):
        return 0  # repeated composite blocks
    return 1 if isinstance(container, nn.Sequential) else 3  # a list of plain layers: mostly heads or projections


def _stack(name: str, children: Sequence[tuple[str, nn.Module]]) -> BlockStack:
    return BlockStack(name, tuple(_join(name, key) for key, _ in children), tuple(child for _, child in children))


# Stacks named by the user -------------------------------------------------------------------------


def _named_stack(
    model: nn.Module, containers: Sequence[tuple[str, nn.Module]], orders: Mapping[str, Sequence[int]], blocks: str
) -> BlockStack:
    repeated = _TIMES.fullmatch(blocks)
    times = int(repeated[2]) if repeated is not None else 1
    wanted, part = _split_slice(blocks if repeated is None else repeated[1])
    for name, container in containers:
        if _without_wrappers(name) == _without_wrappers(wanted):
            children = _children(container)[part]
            if not children:
                raise PartitionError(f"blocks={blocks!r} selects none of the {len(_children(container))} modules.")
            if not all(_is_called(child) for _, child in children):
                raise _uncalled(_stack(name, children), containers)
            if repeated is None and part == slice(None) and name in orders:
                children = [children[index] for index in orders[name]]
            return _stack(name, children * times)
    if repeated is not None:
        for name, module in model.named_modules():
            if _without_wrappers(name) == _without_wrappers(wanted) and name and _is_called(module):
                container_name, _, key = name.rpartition(".")
                return _stack(container_name, [(key, module)] * times)
    raise PartitionError(
        f"blocks={blocks!r} names no list, dict or nn.Sequential of modules. {_looked_at(containers)}."
    )


def _joined(stacks: Sequence[BlockStack], blocks: Sequence[str]) -> BlockStack:
    """Return several stacks as one, whose blocks are called one after the other."""
    if not stacks:
        raise PartitionError(f"blocks={list(blocks)} names no stack; {_NAME_IT}.")
    seen: dict[int, str] = {}
    for stack in stacks:
        names = dict(zip(map(id, stack.blocks), stack.names, strict=True))
        if again := names.keys() & seen.keys():
            twice = next(name for block, name in names.items() if block in again)
            raise PartitionError(f"blocks={list(blocks)} names {twice} twice; every stack stands there once.")
        seen |= names
    return BlockStack(
        " + ".join(stack.container_name for stack in stacks),
        tuple(name for stack in stacks for name in stack.names),
        tuple(block for stack in stacks for block in stack.blocks),
    )


def _split_slice(blocks: str) -> tuple[str, slice]:
    name, _, last = blocks.rpartition(".")
    match = _SLICE.fullmatch(last)
    if match is None:
        return blocks, slice(None)
    start, stop = (int(bound) if bound.strip("-") else None for bound in match.groups())
    return name, slice(start, stop)


def _without_wrappers(name: str) -> str:
    """Drop torch.compile's wrapper from a name, so that a model is addressed alike compiled or not."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _looked_at(containers: Sequence[tuple[str, nn.Module]]) -> str:
    if candidates := _candidates(containers, {}):
        return "Candidates:\n  " + "\n  ".join(map(str, candidates))
    if not containers:
        return "The model has no nn.ModuleList and no nn.Sequential"
    return "Looked at:\n  " + "\n  ".join(str(_stack(name, _children(module))) for name, module in containers) + "\n"


# Modules and parameters ---------------------------------------------------------------------------


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """List the children, repeated ones too (`named_children` gives each module once)."""
    return [(key, child) for key, child in module._modules.items() if child is not None]


def _kind(module: nn.Module) -> type[nn.Module]:
    """Return the class of a block, seen through torch.compile's wrapper."""
    return type(original(module))


def _is_metric(module: nn.Module) -> bool:
    return any(base.__module__.startswith("torchmetrics.") for base in type(module).__mro__)


def _is_plain_layer(module: nn.Module) -> bool:
    return not _children(module) and type(module).__module__.startswith("torch.nn.")


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _count(blocks: Sequence[nn.Module], skip: tuple[type[nn.Module], ...] = ()) -> int:
    """Count the elements of the blocks' parameters, each parameter once."""
    modules = [module for block in blocks for module in block.modules() if not isinstance(module, skip)]
    parameters = {id(p): p for module in modules for p in module.parameters(recurse=False)}
    return sum(1 if is_lazy(p) else p.numel() for p in parameters.values())


# The optimal cut ----------------------------------------------------------------------------------


def _check_cut(costs: Sequence[float], num_stages: int, first_share: float) -> None:
    if num_stages < 1:
        raise PartitionError(f"num_stages={num_stages}, but there must be at least one stage.")
    if len(costs) < num_stages:
        raise PartitionError(
            f"{len(costs)} blocks cannot fill {num_stages} stages: each stage needs at least one block. Use at most "
            f"{len(costs)} stages (fewer devices), make the model deeper, or name a longer stack with blocks=..."
        )
    if not all(math.isfinite(cost) and cost >= 0 for cost in costs):
        raise PartitionError(f"Costs must be finite numbers >= 0, but they are {list(costs)}.")
    if not (math.isfinite(first_share) and first_share > 0):
        raise PartitionError(f"first_share={first_share}, but the first stage needs a share greater than 0.")


def _exact_loads(costs: Sequence[float], first_share: float) -> Callable[[int, int, int], int]:
    """Return load(stage, start, stop) in integers: exact sums, so that equal cuts really compare equal."""
    exact = [Fraction(cost) for cost in costs]
    scale = math.lcm(*(cost.denominator for cost in exact))
    prefix = [0, *accumulate(int(cost * scale) for cost in exact)]
    share = Fraction(first_share)

    def load(stage: int, start: int, stop: int) -> int:
        return (prefix[stop] - prefix[start]) * (share.numerator if stage else share.denominator)

    return load


def _ends(start: int, num_blocks: int, stages_left: int) -> range:
    """Return where a stage that begins at `start` may end, so that each later stage gets a block."""
    return range(num_blocks, num_blocks + 1) if stages_left == 1 else range(start + 1, num_blocks - stages_left + 2)


def _best_rest(
    load: Callable[[int, int, int], int], num_blocks: int, num_stages: int, combine: Callable[[int, float], float]
) -> list[list[float]]:
    """Tabulate the best value of cutting blocks [start:] into stages [stage:], as table[stage][start]."""
    table = [[math.inf] * (num_blocks + 1) for _ in range(num_stages)] + [[math.inf] * num_blocks + [0]]
    for stage in reversed(range(num_stages)):
        for start in range(stage, num_blocks - (num_stages - stage) + 1):
            ends = _ends(start, num_blocks, num_stages - stage)
            table[stage][start] = min(combine(load(stage, start, e), table[stage + 1][e]) for e in ends)
    return table
