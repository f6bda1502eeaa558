"""What one microbatch asks of the blocks: shapes along its path, arguments of each block, modes and contexts.

A :class:`CallSpec` is the same for most microbatches of a run, so it travels once and is named by number afterwards.
What differs between microbatches are the side inputs' values (masks, rotary tables): they travel as tensors, each
distinct one once, and a spec refers to them by slot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from .arguments import Earlier, Template
from .process_switches import ProcessSwitches
from .taps import HookList
from .transport import TensorSpec


class Made(NamedTuple):
    """A tensor that a block has returned."""

    block: int
    number: int
    """Which one; 0 are the hidden states."""


@dataclass(frozen=True, slots=True)
class Beside:
    """A tensor that crosses a boundary beside the hidden states: a block before it made it for one behind it."""

    source: Earlier
    """Where it comes from, as the first block behind the boundary would name it."""
    spec: TensorSpec
    requires_grad: bool


@dataclass(frozen=True, slots=True)
class Form:
    """What crosses a boundary, where it is more than hidden states."""

    spec: TensorSpec
    beside: tuple[tuple[Earlier, TensorSpec], ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all of it."""
        return self.spec.num_bytes + sum(spec.num_bytes for _, spec in self.beside)

    def is_like(self, other: object) -> bool:
        """Whether the same may cross with both forms, wherever it lies in memory."""
        if not isinstance(other, Form) or [each for each, _ in self.beside] != [each for each, _ in other.beside]:
            return False
        pairs = zip((self.spec, *(s for _, s in self.beside)), (other.spec, *(s for _, s in other.beside)), strict=True)
        return all(mine.is_like(theirs) for mine, theirs in pairs)

    def __str__(self) -> str:
        return " + ".join(map(str, (self.spec, *(spec for _, spec in self.beside))))


@dataclass(frozen=True, slots=True)
class Hop:
    """What enters a visit (or, last, returns to the driver): hidden states, and what else blocks pass on."""

    spec: TensorSpec
    requires_grad: bool
    beside: tuple[Beside, ...] = ()
    there: tuple[TensorSpec, ...] = field(init=False, repr=False, compare=False)
    """What travels forward, by tensor, the hidden states first."""
    back: tuple[TensorSpec | None, ...] = field(init=False, repr=False, compare=False)
    """The same of gradients; None where none comes."""
    carries_gradient: bool = field(init=False, repr=False, compare=False)
    """Whether any gradient comes back."""

    def __post_init__(self) -> None:
        """Derive what is asked often."""
        each: tuple[Hop | Beside, ...] = (self, *self.beside)
        object.__setattr__(self, "there", tuple([one.spec for one in each]))
        object.__setattr__(self, "back", tuple([one.spec if one.requires_grad else None for one in each]))
        object.__setattr__(self, "carries_gradient", any(one.requires_grad for one in each))


@dataclass(frozen=True, slots=True)
class Ambient:
    """Grad mode and autocast state under which the user's code called the blocks."""

    grad: bool
    inference: bool
    autocast: tuple[tuple[str, torch.dtype], ...]
    """The device types for which autocast is on, with their dtypes."""
    switches: ProcessSwitches | None = None
    """Those of the driver's process; None to leave them as they are."""
    caches_casts: bool = True
    """Whether autocast casts a weight once for all its uses, whose gradients then add up in the lower precision."""
    makes_on: str = ""
    """The kind of device on which user code has tensors made that name none (``torch.set_default_device``, ``with
    torch.device(...)``); empty: torch's choice."""

    @property
    def is_half(self) -> bool:
        """Whether autocast computes in float16, whose range is small."""
        return any(dtype == torch.float16 for _, dtype in self.autocast)

    @classmethod
    def current(cls, device_types: Sequence[str], switches: ProcessSwitches | None = None) -> Ambient:
        """Read the state of the calling thread."""
        autocast = tuple((kind, torch.get_autocast_dtype(kind)) for kind in device_types if _autocast_is_on(kind))
        caches = not autocast or torch.is_autocast_cache_enabled()
        makes_on = torch.get_default_device().type if torch._C._len_torch_function_stack() else ""
        return cls(torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast, switches, caches, makes_on)

    def entered(self) -> AbstractContextManager[None]:
        """Put the calling thread into this state."""
        if not self.inference and not self.autocast and not self.makes_on:
            return torch.set_grad_enabled(self.grad)
        return self._entered()

    @contextmanager
    def _entered(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.inference:
                stack.enter_context(torch.inference_mode())
            else:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            if self.makes_on:
                stack.enter_context(torch.device(self.makes_on))
            for kind, dtype in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=self.caches_casts))
            yield


def device_types(device: torch.device) -> tuple[str, ...]:
    """Return the types of device whose autocast concerns code that runs on ``device``: the host's and its own."""
    return ("cpu",) if device.type == "cpu" else ("cpu", device.type)


@dataclass(frozen=True, slots=True)
class BlockMode:
    """The flags of one block that user code may change at any time on the driver's proxies."""

    training: tuple[bool, ...]
    """``training`` of the block and of its submodules, in the order of ``modules()``."""
    requires_grad: tuple[bool, ...]
    """``requires_grad`` of its parameters, in the order of ``parameters()``."""
    attributes: bytes = b""
    """What user code has set on the block since the hand-over, as ``engine.attributes.pack_changes`` packs it."""
    tensors: tuple[int, ...] = ()
    """The slots of the side inputs that belong to :attr:`attributes`."""
    hooks: tuple[HookList, ...] = ()
    """The forward hooks of those modules whose hooks do not all run with the block."""


@dataclass(frozen=True, slots=True)
class CacheOp:
    """A change of a key-value cache that the driver's code made between calls, such as ``reorder_cache``."""

    key: int
    method: str
    args: tuple[Any, ...]  # Any: the cache class defines them


@dataclass(frozen=True, slots=True)
class CacheUse:
    """The key-value caches of one call: new ones with every generation, so they are no part of its spec."""

    keys: tuple[int, ...] = ()
    """By slot: the driver's number of the cache."""
    ops: tuple[CacheOp, ...] = ()
    turns: tuple[int, ...] = ()
    """By slot: how many calls have had the cache before. One with the number of another is that one, run once more."""


NO_CACHES: Final = CacheUse()


@dataclass(frozen=True, slots=True)
class CallSpec:
    """Everything about a call but its tensors."""

    hops: tuple[Hop, ...]
    """By position on the path: the tensor entering each visit, then the one that returns to the driver."""
    templates: tuple[Template, ...]
    block_template: tuple[int, ...]
    """By block of the whole stack: the index of its template."""
    modes: tuple[BlockMode, ...]
    """By block of the whole stack."""
    ambient: Ambient
    careful: tuple[bool, ...] = ()
    """By block of the whole stack: whether it may write into its input or hand it on; empty: any may."""
    on_host: tuple[int, ...] = ()
    """The slots of side inputs that are on the host though blocks compute on a device: lengths of packed sequences,
    tables of numbers. They stay there, as in one process."""
    carried: tuple[tuple[int, ...], ...] = ()
    """By block of the whole stack: the slots of its side inputs whose gradients go back to the driver; empty: none."""
    exported: tuple[Made, ...] = ()
    """What else of what blocks return goes to the driver, in order of blocks."""

    def exported_by(self, blocks: Collection[int]) -> tuple[Made, ...]:
        """Return what goes to the driver of what ``blocks`` return, beside what leaves the last one."""
        return tuple(made for made in self.exported if made.block in blocks) if self.exported else ()

    def kept_by(self, blocks: Sequence[int], leaves: Hop) -> frozenset[Made]:
        """Return what is needed again of what consecutive ``blocks`` return, and of what enters beside their input."""
        needed = {*self.exported_by(blocks)}
        for block in blocks:
            template = self.templates[self.block_template[block]]
            needed |= {Made(block - each.distance, each.number) for each in template.earlier()}
        return frozenset(needed | {made_before(blocks[-1] + 1, each) for each in leaves.beside})

    def carried_by(self, blocks: Iterable[int]) -> tuple[int, ...]:
        """Return the slots of side inputs of ``blocks`` whose gradients go back to the driver."""
        return tuple(sorted({slot for block in blocks for slot in self.carried[block]})) if self.carried else ()

    def in_training(self) -> bool:
        """Whether a backward pass follows."""
        return self.ambient.grad


@dataclass(frozen=True, slots=True)
class Call:
    """One microbatch's call as a rank holds it during a step."""

    spec: CallSpec
    side_inputs: tuple[Tensor, ...]
    seed: int
    """Seeds the randomness of every block of this microbatch, see :func:`block_seed`."""
    caches: CacheUse = NO_CACHES

    def at(self, device: torch.device) -> Call:
        """Return the call with its side inputs where blocks that compute on ``device`` are to find them."""
        stay = () if device.type == "cpu" else self.spec.on_host
        placed = [each if slot in stay else each.to(device) for slot, each in enumerate(self.side_inputs)]
        return replace(self, side_inputs=tuple(placed))


def made_before(block: int, beside: Beside) -> Made:
    """Name what enters ``block`` beside its hidden states."""
    return Made(block - beside.source.distance, beside.source.number)


def block_seed(seed: int, block: int) -> int:
    """Derive the seed of one block's randomness; a splitmix64 step, so that neighbours are unrelated."""
    mixed = (seed + (block + 1) * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (mixed ^ (mixed >> 31)) & 0x7FFFFFFFFFFFFFFF


def _autocast_is_on(device_type: str) -> bool:
    return torch.is_autocast_enabled(device_type)
