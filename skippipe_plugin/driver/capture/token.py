"""What stands between two blocks: a token, good for being the next block's hidden states and for nothing else.

It knows the form of the block's output, which is on a worker, and answers questions about it (shape, dtype, device,
whether it needs a gradient). Whatever would need its values raises, and says what to do instead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, Final, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import swap_tensors

from ...engine.call import BlockMode, Made
from ...engine.errors import SkipPipeError
from ...engine.transport import TensorSpec
from .unavailable import OutputWanted, Recording, Unavailable

FORM_QUESTIONS: Final = frozenset(
    {
        *("shape", "dtype", "device", "layout", "ndim", "itemsize", "nbytes", "requires_grad"),
        *("is_cuda", "is_cpu", "is_meta", "is_sparse", "is_sparse_csr", "is_quantized", "is_nested", "is_mkldnn"),
        *("is_mps", "is_xpu", "is_xla", "is_hpu", "is_mtia", "is_ipu", "is_maia", "is_vulkan"),
        *("size", "dim", "ndimension", "numel", "nelement", "element_size", "get_device", "__len__", "__hash__"),
        *("stride", "is_inference", "_version", "is_floating_point", "is_complex", "is_signed", "is_contiguous"),
        *("is_conj", "is_neg", "is_same_size"),
    }
)
"""What may be asked of a tensor without reading it."""
_REENTRANT: Final = (
    "torch.utils.checkpoint.checkpoint(block, ..., use_reentrant=True) is called on a block of a pipeline, whose "
    "output stays on a worker: pass use_reentrant=False, or checkpoint inside of the block's forward"
)
_KEEPING: Final = frozenset(
    {"contiguous", "to", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda", "__repr__", "__format__"}
)
"""What gives back the same tensor where nothing is to be converted, or only its description."""
_LIKE: Final = frozenset(
    {
        *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "randint_like"),
        *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    }
)
"""What makes another tensor of a tensor's form."""


class Origin(NamedTuple):
    """The call of the blocks that tokens belong to."""

    names: tuple[str, ...]
    """Of all blocks."""
    device: torch.device
    """Where the tensors would be that tokens stand for."""
    recording: Recording
    modes: Sequence[BlockMode]
    """By block, of those at least that were called; empty where no gradients are on."""


class HiddenToken(Tensor):
    """The output of a block that is elsewhere, or another tensor that it returns; made by :meth:`of`."""

    _origin: Origin
    _made: Made
    _spec: TensorSpec
    _carries: bool
    _deferral: Any  # Any: what knows tokens
    _number: int

    @classmethod
    def of(cls, origin: Origin, made: Made, spec: TensorSpec, *, carries: bool) -> HiddenToken:
        """Make a token.

        Args:
            origin: The call that it belongs to.
            made: What it stands for.
            spec: The form of that.
            carries: Whether it needs a gradient whatever its block and those before it train.
        """
        strides = spec.empty(torch.device("meta")).stride() if spec.order else None
        token: HiddenToken = torch.Tensor._make_wrapper_subclass(
            cls, spec.shape, strides=strides, dtype=spec.dtype, device=origin.device
        )
        token.__dict__.update(_origin=origin, _made=made, _spec=spec, _carries=carries, _deferral=None)
        return token

    def computed(
        self, deferral: Any, number: int, made: Made, spec: TensorSpec, device: torch.device, requires_grad: bool
    ) -> HiddenToken:
        """Return a token for what is computed of this one.

        Args:
            deferral: The call that computes it.
            number: Which of its results.
            made: The last of what it follows from.
            spec: Its form.
            device: Where it will be.
            requires_grad: Whether it will need a gradient.
        """
        token = HiddenToken.of(self._origin._replace(device=device, modes=()), made, spec, carries=requires_grad)
        token.__dict__.update(_deferral=deferral, _number=number)
        return token

    @property
    def deferral(self) -> Any:  # Any: what knows tokens
        """What code between the blocks has called to get it; None for what a block returns."""
        return self._deferral

    @property
    def number(self) -> int:
        """Which of the results of that it is."""
        return self._number

    @property
    def bases(self) -> frozenset[Made]:
        """The tensors of blocks that it follows from."""
        return frozenset((self._made,)) if self._deferral is None else self._deferral.bases

    @property
    def spec(self) -> TensorSpec:
        """The form of what it stands for."""
        return self._spec

    def is_of(self, recording: Recording | None) -> bool:
        """Whether it belongs to that call."""
        return self._origin.recording is recording

    def becomes(self, value: Tensor) -> None:
        """Be ``value`` from now on, for all who have this object."""
        object.__setattr__(self, "__class__", Tensor)  # this class lets nobody set anything
        swap_tensors(self, value)  # type: ignore[no-untyped-call]

    def made_in(self, recording: Recording | None) -> Made | None:
        """Return what it stands for, if that is what a block returns in that call."""
        return self._made if self._origin.recording is recording and self._deferral is None else None

    @property
    def requires_grad(self) -> bool:
        """Whether the real output would need a gradient."""
        return self._carries or any(any(mode.requires_grad) for mode in self._origin.modes[: self._made.block + 1])

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._refuse("requires_grad = ...")

    def __repr__(self) -> str:  # type: ignore[override]
        with torch._C.DisableTorchFunctionSubclass():
            return f"<the output of {self.origin()}, {self._spec}, which is on a worker>"

    def __format__(self, format_spec: str) -> str:
        return repr(self) if not format_spec else self._refuse(f"format(..., {format_spec!r})")

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *self.__dict__})

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(f"{name} = ...")

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Return itself when nothing is to be converted."""
        wanted = [*args, *kwargs.values()]
        for each in wanted:
            if isinstance(each, Tensor):
                same = each.dtype == self.dtype and each.device == self.device
            elif isinstance(each, torch.dtype):
                same = each == self.dtype
            elif isinstance(each, bool):
                same = True
            else:
                same = self._lies(each) if isinstance(each, torch.memory_format) else self._is_here(each)
            if not same:
                return self._later("to", *args, **kwargs)
        copies = kwargs.get("copy") or args[2:3] == (True,)
        return self._later("to", *args, **kwargs) if copies else self

    def _later(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method when there are values."""
        if self._origin.recording.compute is None:
            self._refuse(name)
        return self._origin.recording.compute(getattr(Tensor, name), (self, *args), kwargs, [self])

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse it: torch asks no subclass about this one of its methods."""
        self._refuse("set_")

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        """Return itself when it is contiguous."""
        return self if self._lies(memory_format) else self._later("contiguous", memory_format=memory_format)

    def type_as(self, other: Tensor) -> Any:
        """Return itself when ``other`` is of its type."""
        return self.to(other.dtype).to(other.device)

    def float(self, *args: Any, **kwargs: Any) -> Any:
        """Return itself when it is float32."""
        return self.to(torch.float32)

    def double(self, *args: Any, **kwargs: Any) -> Any:
        """Return itself when it is float64."""
        return self.to(torch.float64)

    def half(self, *args: Any, **kwargs: Any) -> Any:
        """Return itself when it is float16."""
        return self.to(torch.float16)

    def bfloat16(self, *args: Any, **kwargs: Any) -> Any:
        """Return itself when it is bfloat16."""
        return self.to(torch.bfloat16)

    def cpu(self, *args: Any, **kwargs: Any) -> Any:
        """Return itself on the host."""
        return self.to("cpu")

    def cuda(self, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Return itself on that GPU."""
        return self.to("cuda" if device is None else torch.device("cuda", device) if type(device) is int else device)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),  # Any: whatever the torch function takes
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = function_name(func)
        if name in FORM_QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if name in _KEEPING and args and isinstance(args[0], HiddenToken):
            return getattr(args[0], name)(*args[1:], **(kwargs or {}))
        if name in _LIKE and args and isinstance(args[0], HiddenToken):
            spec: TensorSpec = args[0]._spec
            like = torch.empty(1, dtype=spec.dtype, device=args[0].device).expand(spec.shape)
            like = spec.empty(args[0].device) if spec.order else like
            return func(like, *args[1:], **(kwargs or {}))
        tokens = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, HiddenToken)]
        over = [token for token in tokens if token._origin.recording.is_over]
        if over:
            over[0]._refuse(name, frozenset().union(*(token.bases for token in over)))
        compute = tokens[0]._origin.recording.compute
        if any(token._origin.recording is not tokens[0]._origin.recording for token in tokens):
            raise OutputWanted("two calls of the blocks are open, and code between them uses both", tokens[0].bases)
        if compute is None:
            tokens[0]._refuse(name)
        return compute(func, args, kwargs or {}, tokens)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> NoReturn:
        _first(args, kwargs)._refuse(str(getattr(func, "overloadpacket", func)).rpartition(".")[2])

    def origin(self) -> str:
        """Return the name of the block whose output this is."""
        return self._origin.names[self._made.block]

    def _lies(self, memory_format: torch.memory_format) -> bool:
        return memory_format == torch.preserve_format or self.is_contiguous(memory_format=memory_format)

    def _is_here(self, device: Any) -> bool:
        wanted, own = torch.device(device), self.device
        return wanted.type == own.type and wanted.index in (None, own.index)

    def check_wanted(self, what: str) -> None:
        """Raise :class:`OutputWanted` if the call that it belongs to is over; ``what`` says where it is needed."""
        if self._origin.recording.is_over:
            self._refuse(what)

    def refuse(self, function: Any, error: Exception | None = None) -> NoReturn:
        """Say why ``function`` cannot be called with it; ``error`` is what it says of made-up values."""
        try:
            self._refuse(function_name(function))
        except SkipPipeError as refusal:
            raise refusal from error

    def _refuse(self, operation: str, wanted: frozenset[Made] = frozenset()) -> NoReturn:
        if _is_in_reentrant_checkpoint():
            raise SkipPipeError(_REENTRANT)
        name, block = self.origin(), self._made.block
        if self._origin.recording.is_over:
            self._origin.recording.want(
                f"code after the blocks of a pipeline needs what {name} returned ({operation}), which stays on a "
                "worker, since it was not needed when the step was tried. Use it in every batch from the first one on",
                wanted or self.bases,
            )
        following, which = self._origin.names[block + 1], "a second" if self._made.number else "the"
        parts = named_parts(self._origin.names, block, block)
        instead = f", or pipeline a part of the stack that ends with it or begins after it ({parts})" if parts else ""
        if name == following:
            instead = (
                f', or say in blocks="...*N" how often {name} is called ({len(self._origin.names)} times were expected)'
            )
        if begins_stack(self._origin.names, block + 1):
            instead = ", or name with blocks=... only stacks that every forward calls"
        raise SkipPipeError(
            f"code between the blocks of a pipeline needs {which} output of {name} ({operation}), but that stays on "
            f"a worker: here stands a placeholder that can only be passed on to {following}, and nothing may leave it "
            f"out (layer drop, an early exit). Move that code into a block{instead}. What uses the outputs of many "
            "layers (a loss on each, their mean) can keep them, and use them when the last block has been called"
        )


def check_available(returned: Any) -> None:  # Any: what user code returned
    """Raise where what a step returns holds what blocks have returned, and nobody has asked for before.

    Raises:
        OutputWanted: It does.
    """
    if isinstance(returned, Tensor) and not isinstance(returned, HiddenToken):
        return
    for leaf in pytree.tree_leaves(returned):
        if isinstance(leaf, HiddenToken):
            leaf._refuse("returned")
        if isinstance(leaf, Unavailable):
            leaf._refuse("return")


def _is_in_reentrant_checkpoint() -> bool:
    """Whether reentrant activation checkpointing is what asks: it detaches what a block gets to run that again."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
            return frame.f_code.co_name == "detach_variable" or bool(frame.f_locals.get("use_reentrant"))
        frame = frame.f_back
    return False


def begins_stack(names: Sequence[str], block: int) -> bool:
    """Whether ``block``, which is not the first, is in another container than the one before it.

    >>> [begins_stack(["encoder.0", "encoder.1", "decoder.0"], block) for block in (1, 2)]
    [False, True]
    """
    return names[block].rpartition(".")[0] != names[block - 1].rpartition(".")[0]


def named_parts(names: Sequence[str], first: int, last: int) -> str:
    """Say how the parts of a stack are named that end with block ``first``, or begin after block ``last``.

    >>> named_parts(["net.0", "net.1", "net.2", "net.3"], 1, 1)
    'blocks="net.0:2" or blocks="net.2:4"'
    """
    if len(set(names)) < len(names) or any(begins_stack(names, block) for block in range(1, len(names))):
        return ""  # of one module, or of several stacks
    container, _, key = names[0].rpartition(".")
    start, prefix = int(key) if key.isdigit() else 0, f"{container}." if container else ""
    ranges = [(0, first + 1), (last + 1, len(names))]
    return " or ".join(f'blocks="{prefix}{start + a}:{start + b}"' for a, b in ranges if b - a >= 2)


def function_name(func: Any) -> str:
    """Name a torch function as user code writes it: for the getter of an attribute, the attribute."""
    if getattr(func, "__name__", "") in ("__get__", "__set__", "__delete__"):
        return getattr(getattr(func, "__self__", func), "__name__", "an attribute")
    return getattr(func, "__name__", None) or str(func)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> HiddenToken:
    leaves = pytree.tree_leaves((args, kwargs))
    return next(leaf for leaf in leaves if isinstance(leaf, HiddenToken))
