"""Made-up results of the blocks, and of random functions, that do not depend on how the batch is cut.

With them the user's step runs on the driver alone, once for the batch and once for each microbatch, and what comes out
differs only by how the step reduces over samples.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..driver.capture.stack_call import StackCall
from ..driver.capture.token import HiddenToken
from ..engine.memory_order import laid
from ..engine.stage import inner
from ..engine.transport import TensorSpec
from .entering import Entered, Entrance
from .flips import COMPARISONS, LOOKUPS, REDUCTIONS, Compared, Comparisons, Flip
from .kinks import Kink, Kinks, is_compared, mark
from .reductions import COARSE
from .resized import Sizes, takes_course
from .traces import SideAxes

_GOLDEN: Final = 0.6180339887
_DROPOUTS: Final = frozenset(
    (
        *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout"),
        *("feature_alpha_dropout", "dropout_", "alpha_dropout_", "feature_dropout_", "feature_alpha_dropout_"),
    )
)
_RANDOM: Final = frozenset(
    (
        *("rand", "randn", "randint", "rand_like", "randn_like", "randint_like"),
        *("normal", "bernoulli", "multinomial", "poisson"),
    )
)
_RANDOM_IN_PLACE: Final = frozenset(
    (
        *("uniform_", "normal_", "bernoulli_", "random_"),
        *("exponential_", "geometric_", "cauchy_", "log_normal_"),
    )
)
_WEIGHED: Final = frozenset({"cross_entropy", "nll_loss"})
_GRADIENT: Final = getattr(Tensor.grad, "__get__")  # noqa: B009 # mypy takes it for a gradient
_MIRRORED: Final = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


class Incomparable(Exception):
    """What microbatches do is no part of what the batch does."""


class Fakes:
    """Made-up hidden states behind the blocks, the microbatches' first, then the batch's.

    Each follows from what enters the blocks, row by row, with noise of its own; samples differ in size, so that losses
    of microbatches differ much.

    Args:
        sizes: The microbatches' numbers of samples.
        draw: Different numbers give different hidden states; of four in a row the last two are positive.
        factor: By how much all are multiplied.
        first: By how much those of the first microbatch are multiplied.
        axes: What is known of side inputs, on which the hidden states depend then, too.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        draw: int,
        factor: float = 1.0,
        *,
        first: float = 1.0,
        axes: SideAxes | None = None,
    ) -> None:
        self._sizes = sizes
        self._axes = axes or SideAxes()
        self._draw = draw
        self._factor = factor
        self._first = first
        self._noise: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in sizes]
        """By microbatch, and answer: what it is made of, the samples' sizes, and the samples' dimension."""
        self._answers = 0
        """How many the batch has got."""
        self._entered: list[list[Entered]] = [[] for _ in (*sizes, 0)]
        """By microbatch, and of the batch last: what its calls brought."""
        self.made: list[list[Tensor]] = [[] for _ in (*sizes, 0)]
        """By microbatch, and of the batch last: what was answered."""
        self.dtypes: set[torch.dtype] = set()
        """Of what was answered."""
        self.calls: dict[int, StackCall] = {}
        """By microbatch: its first call of the blocks."""
        self.whole_call: StackCall | None = None
        """The batch's first one."""
        self.are_watched = False
        """Whether forward hooks of the driver's were to see what the blocks do."""

    def of_piece(self, index: int, call: StackCall) -> Tensor:
        """Answer the next call of the blocks by a microbatch."""
        self.are_watched |= bool(call.hooks)
        self._entered[index].append(Entered.of(call))
        self.calls.setdefault(index, call)
        answer = functools.partial(self._answer_piece, index, call)
        call.fill(functools.partial(_handed_out, answer))
        return answer(call.specs[-1])

    def _answer_piece(self, index: int, call: StackCall, spec: TensorSpec) -> Tensor:
        size, number = self._sizes[index], len(self._noise[index])
        dim = next((d for d, n in enumerate(spec.shape) if n == size), None)
        if dim is None:
            dim = next((d for d, n in enumerate(spec.shape) if n and n % size == 0), 0)
        rows = spec.shape[dim] if spec.shape else 1
        generator = torch.Generator().manual_seed(7919 * self._draw + 101 * number + (index if rows % size == 0 else 0))
        noise = torch.randn(spec.shape, generator=generator) * 0.5
        first = sum(self._sizes[:index])
        scales = torch.tensor([self._scale(first + sample) for sample in range(size)])
        if rows % size == 0 and spec.shape:
            scales = scales.repeat_interleave(rows // size)
            scales = scales.reshape([-1 if d == dim else 1 for d in range(len(spec.shape))])
        else:
            scales = torch.ones(())
        self._noise[index].append((noise, scales, dim))
        return self._made(call, spec, noise, scales, index)

    def of_whole(self, call: StackCall) -> Tensor:
        """Answer the next call of the blocks by the batch."""
        self.whole_call = self.whole_call or call
        self._entered[-1].append(Entered.of(call))
        answer = functools.partial(self._answer_whole, call)
        call.fill(functools.partial(_handed_out, answer))
        return answer(call.specs[-1])

    def _answer_whole(self, call: StackCall, spec: TensorSpec) -> Tensor:
        number, shape = self._answers, spec.shape
        self._answers += 1
        if any(len(noise) <= number for noise in self._noise):
            raise Incomparable("the batch calls the blocks more often than its microbatches do")
        noises, scales, dims = zip(*(noise[number] for noise in self._noise), strict=True)
        dim = dims[0]
        if all(noise.shape == shape for noise in noises):
            return self._made(call, spec, noises[0], scales[0], -1)
        try:
            joined = torch.cat(noises, dim)
        except RuntimeError:
            joined = noises[0]
        if joined.shape != shape:
            forms = ", ".join(str(tuple(noise.shape)) for noise in noises)
            raise Incomparable(f"hidden states of shape {tuple(shape)} are {forms} in its microbatches")
        return self._made(call, spec, joined, torch.cat(scales, dim) if scales[0].ndim else scales[0], -1)

    def entrances(self, rounding: float) -> Iterator[Entrance]:
        """Yield what the batch's calls brought beside what those of its microbatches did."""
        for whole, *parts in zip(self._entered[-1], *self._entered[:-1], strict=False):
            yield Entrance(whole, parts, self._sizes, rounding)

    def axes(self) -> SideAxes:
        """Return which dimension of each side input is the batch's, as the calls show it."""
        axes = SideAxes()
        for number, (whole, *parts) in enumerate(zip(self._entered[-1], *self._entered[:-1], strict=False)):
            calls = [part.call for part in parts if part.call is not None]
            if whole.call is not None and len(calls) == len(parts):
                axes.learn(number, whole.call, calls)
        return axes

    def _scale(self, sample: int) -> float:
        factor = self._first if sample < self._sizes[0] else 1.0
        return factor * (0.3 + 2.2 * ((sample + 1 + 3 * self._draw) * _GOLDEN % 1.0))

    @property
    def dims(self) -> list[int]:
        """By answer: the dimension of the samples in it."""
        return [dim for _, _, dim in self._noise[0]]

    def _made(self, call: StackCall, spec: TensorSpec, noise: Tensor, scales: Tensor, index: int) -> Tensor:
        hidden = call.hidden if call.ambient.grad else call.hidden.detach()
        self.dtypes.add(spec.dtype)
        made = noise.to(hidden.device)
        if hidden.shape == spec.shape and hidden.is_floating_point():
            made = made + torch.sin((1.7 + 0.4 * (self._draw % 4)) * hidden.float())
        made = made * scales.to(hidden.device)
        made = ((made.abs() + 0.05 if self._draw % 4 > 1 else made) * self._factor).to(spec.dtype)
        number, size = len(self.made[index]), self._sizes[index] if index >= 0 else sum(self._sizes)
        nth = len(self._entered[index]) - 1
        zeros = self._axes.zeros(nth, call, made, self._noise[max(index, 0)][number][2], size)
        made = made if zeros is None else made + zeros.to(spec.dtype)
        made = laid(made, spec.order) if spec.order else made
        if call.ambient.grad and made.is_floating_point() and not made.requires_grad:
            made.requires_grad_()
        mark(made)
        self.made[index].append(made)
        return made


def _handed_out(make: Callable[[TensorSpec], Tensor], spec: TensorSpec) -> Tensor:
    """Return what a token of the driver's becomes, in whose place nobody may find it: an object of its own."""
    made = make(spec)
    handed = inner(made) if made.requires_grad else made.detach()
    mark(handed)
    return handed


class Neutral(TorchFunctionMode):
    """Takes randomness out of what runs under it, and notes which numbers tensors are compared with.

    Dropout is the identity. What random functions give is noted in the runs of microbatches; the batch gets all of it
    together, in the same order.

    Args:
        drawn: What the microbatches drew; None while they run.
        features: The ids of tensors of the batch whose values bend a step as made-up ones do.
        flip: A comparison that comes out otherwise.
    """

    is_for_the_driver = True
    """Whether blocks on workers may run without it."""

    def __init__(
        self,
        drawn: Sequence[Sequence[Tensor]] | None = None,
        *,
        features: Collection[int] = (),
        flip: Flip | None = None,
    ) -> None:
        super().__init__()
        self.constants: set[tuple[str, float]] = set()
        self.drawn: list[Tensor] = []
        self._pieces = drawn
        self._number = 0
        self._kinks = Kinks(features)
        self._comparisons = Comparisons(flip)
        self.takes_course = False
        """Whether it may do otherwise by values of its batch."""
        self.is_coarse = False
        """Whether anything that has run under it was computed in 16 bits."""
        self.is_half = False
        """Whether that was in float16."""
        self.reads_gradients = False
        """Whether what has run under it looked at gradients of parameters."""
        self.shows_gradients = False
        """Whether a tensor keeps its gradient, or a hook looks at one: user code may read it after the backward."""
        self.weighs_classes = False
        """Whether it took a mean over weights of classes, which is none over samples or labels."""

    @property
    def kinks(self) -> tuple[Kink, ...]:
        """Where what has run under it bends."""
        return tuple(self._kinks.seen)

    @property
    def sizes(self) -> Sizes:
        """What of it may go another way with values of other sizes."""
        return self._kinks.sizes

    @property
    def compared(self) -> Sequence[Compared]:
        """The comparisons of more than a number that were made."""
        return self._comparisons.seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "").strip("_") if not _in_place(func) else func.__name__
        if HiddenToken in types:  # what comes out is looked at when it has values
            result = func(*args, **kwargs)
            return result if isinstance(result, HiddenToken) else self._drawn_of(name, result)
        if name in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if name == "randperm":
            return torch.arange(args[0] if args else kwargs["n"], device=kwargs.get("device"))
        if kwargs.get("dropout_p"):
            kwargs = {**kwargs, "dropout_p": 0.0}
        self._note(func, name, args, kwargs)
        if name == "register_hook":
            args, kwargs = (args[0], self._noting(*args[1:], **kwargs)), {}
        result = func(*args, **kwargs)
        self.takes_course = self.takes_course or takes_course(name, args, result)
        if isinstance(result, Tensor) and result.dtype in COARSE:
            self.is_coarse, self.is_half = True, self.is_half or result.dtype == torch.float16
        if name in COMPARISONS or name in LOOKUPS or name in REDUCTIONS:
            given = (*args, *kwargs.values())
            result = self._comparisons.follow(name, given, result, of_values=is_compared(given[0]))
        result = self._kinks.follow(func, args, kwargs, result)
        return self._drawn_of(name, result)

    def _drawn_of(self, name: str, result: Any) -> Any:
        """Return what a function gives, in the place of what it has drawn if it draws."""
        if name in _RANDOM or name in _RANDOM_IN_PLACE:
            return self._drawn(result, in_place=name in _RANDOM_IN_PLACE)
        return result

    def _note(self, func: Any, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if "ignore_index" in kwargs:
            self._remember("ne", kwargs["ignore_index"])
        if name in _WEIGHED and kwargs.get("reduction") == "mean" and isinstance(kwargs.get("weight"), Tensor):
            weights = kwargs["weight"].detach()
            self.weighs_classes = self.weighs_classes or bool((weights != weights.reshape(-1)[:1]).any())
        if name in COMPARISONS and len(args) == 2:
            if isinstance(args[0], Tensor):
                self._remember(name, args[1])
            else:
                self._remember(_MIRRORED.get(name, name), args[0])
        elif name == "get" and func == _GRADIENT:
            self.reads_gradients = self.reads_gradients or (isinstance(args[0], nn.Parameter) and args[0].requires_grad)
        elif name == "retain_grad":
            self.shows_gradients = True
        elif name in ("isnan", "nansum", "nanmean", "nan_to_num"):
            self.constants.add(("isnan", 0.0))
        elif name in ("clamp", "clip", "clamp_min", "clamp_max"):
            for bound in (*args[1:], *kwargs.values()):
                self._remember("lt", bound)

    def _noting(self, hook: Callable[[Tensor], Tensor | None]) -> Callable[[Tensor], Tensor | None]:
        """Return a hook that notes whether it only looks."""

        def called(gradient: Tensor) -> Tensor | None:
            changed = hook(gradient)
            self.shows_gradients = self.shows_gradients or changed is None
            return changed

        return called

    def _remember(self, name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.ndim == 0 and value.device.type == "cpu" and not value.requires_grad:
            with torch._C.DisableTorchFunction():
                value = value.item()
        if isinstance(value, (bool, int, float)) and len(self.constants) < 64:
            self.constants.add((name, float(value)))

    def _drawn(self, result: Any, *, in_place: bool) -> Any:
        if not isinstance(result, Tensor):
            return result
        if self._pieces is None:
            self.drawn.append(result.detach().clone())
            return result
        number, self._number = self._number, self._number + 1
        parts = [piece[number] for piece in self._pieces if number < len(piece)]
        joined = _joined(parts, result.shape) if len(parts) == len(self._pieces) else None
        if joined is None:
            return result
        if not in_place:
            return joined.to(result.dtype)
        with torch.no_grad():
            return result.copy_(joined)


def _in_place(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name.endswith("_") and not name.endswith("__")


def _joined(parts: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    if all(part.shape == shape for part in parts):
        return parts[0].clone()
    for dim in range(len(shape)):
        others = {(*part.shape[:dim], *part.shape[dim + 1 :]) for part in parts if part.ndim == len(shape)}
        if others == {(*shape[:dim], *shape[dim + 1 :])} and sum(part.shape[dim] for part in parts) == shape[dim]:
            return torch.cat(list(parts), dim)
    return None
