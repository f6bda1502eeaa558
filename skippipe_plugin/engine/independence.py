"""Whether a block computes the same for a part of a batch as for all of it: what makes microbatches exact."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .attributes import attributes_kept
from .call import Call
from .device_errors import is_of_device
from .gradient_hooks import no_gradient_hooks
from .kept_state import KeptState, Values, others
from .lasting import in_training, next_outcomes

MIXES: Final = "mixes"
"""A block makes something else of a part of the batch than of all of it."""
FAILS: Final = "fails"
"""A block fails when it is asked."""
BENDS: Final = "bends"
"""A block's backward makes something else of a multiple of a gradient than that multiple of what it makes of it."""
LATER: Final = "what its next forward makes"
"""Not what a block makes, nor anything that has a name, but what it makes afterwards is another."""
FACTORS: Final = (2.0**20, 2.0**-20)
"""Multiples that show it: powers of two round nothing, and what cuts gradients off reaches none of both or differs."""
HALF_FACTORS: Final = (2.0**4, 2.0**-4)
"""The same in float16, which has no room for others."""
_ROUNDING: Final = 1e-6
"""Gradients are summed to so much of the largest of them."""
_HALF_ROUNDING: Final = 1e-3
_HALF_SIZE: Final = 2.0**6
"""How large gradients of a block are in float16, to be neither infinite nor lost when they are multiplied."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How a call of one block is cut, for the question whether that changes what the block computes.

    Without any part the question is whether the block's backward is linear.
    """

    calls: tuple[Call, ...]
    """The calls with the parts' side inputs."""
    rows: tuple[int, ...]
    """By part: how many rows it has in dimension :attr:`enters` of what enters the block."""
    enters: int
    leaves: int
    """The dimension of the block's result in which the parts' results are put together."""
    beside: tuple[tuple[int, int | None], ...] = ()
    """What else of what it returns is used: which tensor, and the same of that; None where all parts share it."""
    known_aside: bool = False
    """Whether BatchNorm, which is known to look at its batch, is left out."""


Run = Callable[[Call, Tensor], Sequence[Tensor]]
"""Calls the block, and returns its result and what else of what it returns is used."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the block gave, and what it has left."""

    results: Sequence[Tensor]
    left: Values
    later: Sequence[Sequence[Tensor]]
    """What it then makes of the same: it may keep what nothing can name (tensors, lists, objects)."""


def difference(module: nn.Module, run: Run, call: Call, hidden: Tensor, parts: Parts) -> str:
    """Compare what ``run`` makes of ``hidden``, and leaves in the block, with what it makes of its parts in turn.

    Random functions draw nothing meanwhile. A block that has other randomness is compared in evaluation mode, but for
    BatchNorm.

    Returns:
        :data:`MIXES`, :data:`FAILS`, the name of what the block keeps otherwise, :data:`LATER` where only later
        forwards show it, or nothing where all is the same; :data:`BENDS` where there are no parts and its backward is
        not linear.
    """
    with no_gradient_hooks(module.parameters()):
        return _difference(module, run, call, hidden, parts) if parts.calls else _bend(module, run, call, hidden)


def _difference(module: nn.Module, run: Run, call: Call, hidden: Tensor, parts: Parts) -> str:
    if call.spec.ambient.grad and any(map(_divides_by_counts, module.modules())):
        return MIXES  # a few samples need not show it
    with _known_aside(module) if parts.known_aside else nullcontext():
        for chance in (False, True):  # not everything runs under a dispatch mode
            state = KeptState(module, _is_aside)
            comparison = _Comparison(module, run, state, chance)
            try:
                found = comparison.between(call, hidden, parts)
                if found or not (module.training and call.spec.ambient.grad and hidden.is_floating_point()):
                    return found
                return "" if comparison.have_same_gradients(call, hidden, parts) else MIXES
            except Exception as error:
                if is_of_device(error):
                    raise
                continue
            finally:
                state.restore()
    return FAILS


def _bend(module: nn.Module, run: Run, call: Call, hidden: Tensor) -> str:
    state = KeptState(module, _is_aside)
    weights = [each for each in module.parameters() if each.requires_grad]
    leaf = hidden.detach().clone()
    leaf = leaf.requires_grad_(leaf.is_floating_point())
    call, sides = _opened(call)
    try:
        with torch.enable_grad(), attributes_kept(module):
            torch.manual_seed(0)
            results = [each for each in run(call, leaf) if each.requires_grad]
        is_half = call.spec.ambient.is_half or any(each.dtype == torch.float16 for each in results)
        factors, size = (HALF_FACTORS, _HALF_SIZE) if is_half else (FACTORS, 1.0)
        backwards = [_made_up_gradient(each) * size for each in results]
        sources = [each for each in (leaf, *weights, *sides) if each.requires_grad]
        one, *others = [
            torch.autograd.grad(
                results, sources, [each * factor for each in backwards], retain_graph=True, allow_unused=True
            )
            for factor in (1.0, *factors)
        ]
    except Exception:  # nothing goes back, or not in this way
        return ""
    finally:
        state.restore()
    pairs = zip(others, factors, strict=True)
    return "" if all(is_multiple(one, other, factor, is_half=is_half) for other, factor in pairs) else BENDS


def is_multiple(
    one: Sequence[Tensor | None], other: Sequence[Tensor | None], factor: float, *, is_half: bool = False
) -> bool:
    """Whether the gradients of the ``factor``-fold are the ``factor``-fold; true where they are not all finite."""
    pairs = [(a.to_dense(), b.to_dense()) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    if not all(bool(torch.isfinite(each).all()) for pair in pairs for each in pair):
        return True
    least = max((_largest(a) for a, _ in pairs), default=0.0) * (_HALF_ROUNDING if is_half else _ROUNDING)
    return all(torch.allclose(b.double() / factor, a.double(), rtol=1e-2, atol=least) for a, b in pairs)


def uncompiled() -> AbstractContextManager[None]:
    """Let what is compiled run as it was written."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")  # type: ignore[no-any-return, unused-ignore]


class _Comparison:
    """Compares one block's results."""

    def __init__(self, module: nn.Module, run: Run, state: KeptState, chance: bool) -> None:
        self._module = module
        self._run = run
        self._state = state
        self._mode: Callable[[], AbstractContextManager[None]] = nullcontext if chance else state.without_chance
        self._shaken: list[str] = []
        self._earlier: tuple[Call, Tensor] | None = None

    def between(self, call: Call, hidden: Tensor, parts: Parts) -> str:
        """Compare what comes of the block as it is, and of one that has run before: means show in the second only."""
        found = self._between(call, hidden, parts)
        if found:
            return found
        self._earlier = parts.calls[0], hidden.narrow(parts.enters, 0, parts.rows[0])
        return self._between(call, hidden, parts)

    def _between(self, call: Call, hidden: Tensor, parts: Parts) -> str:
        before = self._state.read()
        whole = self._whole(call, hidden)
        self._shaken = self._state.written(before, whole.left)
        if self._shaken:
            whole = self._whole(call, hidden)
        found = self._against(whole, call, parts, hidden)
        if not found or _is_same(whole, self._whole(call, hidden, seed=1)):
            return found
        if not self._module.training:
            return ""  # nothing can be said about it
        with _evaluated(self._module):
            whole = self._whole(call, hidden)
            found = self._against(whole, call, parts, hidden)
            return found if found and _is_same(whole, self._whole(call, hidden, seed=1)) else ""

    def _whole(self, call: Call, hidden: Tensor, seed: int = 0) -> _Outcome:
        with self._from_the_start(seed):
            results = self._run(call, hidden)
            return _Outcome(results, self._state.read(), self._later(call, hidden))

    def _later(self, call: Call, hidden: Tensor) -> list[Sequence[Tensor]]:
        return next_outcomes(self._module, lambda: self._run(call, hidden))

    def _against(self, whole: _Outcome, whole_call: Call, parts: Parts, hidden: Tensor) -> str:
        """Compare with the parts, each of which finds what the one before it has left."""
        pieces = torch.split(hidden, list(parts.rows), parts.enters)
        try:
            with self._from_the_start(0):
                results = [self._run(call, piece) for call, piece in zip(parts.calls, pieces, strict=True)]
                left, later = self._state.read(), self._later(whole_call, hidden)
            pairs = list(_pairs(whole.results, results, parts))
        except Exception as error:  # the block refuses a part, whatever it says of it
            if is_of_device(error):
                raise
            return MIXES
        changed = others(whole.left, left)
        if changed:
            return changed[0]
        if parts.known_aside and any(each.dtype in (torch.bfloat16, torch.float16) for each in whole.results):
            return ""  # too coarse to tell
        if not all(_are_close(*pair) for pair in pairs):
            return MIXES
        return "" if all(map(_are_all_close, whole.later, later)) else LATER

    def have_same_gradients(self, call: Call, hidden: Tensor, parts: Parts) -> bool:
        """Whether gradients of the parts add up to those of the whole; true where there are none to be compared."""
        try:
            whole = self._gradients(call, [call], [hidden], parts)
            pieces = self._gradients(call, parts.calls, torch.split(hidden, list(parts.rows), parts.enters), parts)
            rounding = _ROUNDING * max(map(_largest, whole))  # of those too that are 0 but for it, as of biases of keys
            if all(_are_close(*pair, coarse=10.0, least=rounding) for pair in zip(whole, pieces, strict=True)):
                return True
            again = self._gradients(call, [call], [hidden], parts)
        except Exception:  # nothing goes back, or not in this way
            return True
        return not all(map(torch.equal, whole, again))

    def _gradients(self, whole: Call, calls: Sequence[Call], pieces: Sequence[Tensor], parts: Parts) -> list[Tensor]:
        """Return the gradients of what enters the block, of its weights, and of the side inputs that carry one."""
        opened, sides = zip(*map(_opened, calls), strict=True)
        weights = [each for each in self._module.parameters() if each.requires_grad]
        leaves = [piece.detach().clone().requires_grad_() for piece in pieces]
        with torch.enable_grad(), self._from_the_start(0):
            results = [self._run(call, leaf) for call, leaf in zip(opened, leaves, strict=True)]
            together = [each for each in _together(results, parts) if each.requires_grad]
            sources = [*leaves, *weights, *(side for each in sides for side in each)]
            backwards = list(map(_made_up_gradient, together))
            found = iter(torch.autograd.grad(together, sources, backwards, allow_unused=True))
        entering = [_filled(next(found), leaf) for leaf in leaves]
        of_weights = [g.to_dense() for g in itertools.islice(found, len(weights)) if g is not None]
        of_sides = [[_filled(next(found), side) for side in each] for each in sides]
        forms = [whole.side_inputs[slot].shape for slot in _carried(whole)]
        joined = [_joined(each, form) for *each, form in zip(*of_sides, forms, strict=True)]
        return [torch.cat(entering, parts.enters), *of_weights, *joined]

    @contextmanager
    def _from_the_start(self, seed: int) -> Iterator[None]:
        self._state.restore()
        self._state.shake(self._shaken)
        with attributes_kept(self._module), self._mode():
            if self._earlier is not None:
                with torch.no_grad():
                    self._run(*self._earlier)
            torch.manual_seed(seed)
            yield


def _carried(call: Call) -> tuple[int, ...]:
    """Return the slots of the side inputs that carry a gradient: a question says the same of every block."""
    return call.spec.carried_by([0])


def _opened(call: Call) -> tuple[Call, list[Tensor]]:
    """Return the call with leaves in the places of side inputs that carry a gradient, and these."""
    leaves = {slot: call.side_inputs[slot].detach().requires_grad_() for slot in _carried(call)}
    sides = tuple(leaves.get(slot, each) for slot, each in enumerate(call.side_inputs))
    return dataclasses.replace(call, side_inputs=sides), list(leaves.values())


def _filled(gradient: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if gradient is None else gradient.to_dense()


def _joined(pieces: Sequence[Tensor], form: torch.Size) -> Tensor:
    """Put the gradients of a side input's pieces together; what the parts share has them all."""
    for dim, size in enumerate(form):
        if any(piece.shape[dim] != size for piece in pieces):
            return torch.cat(list(pieces), dim)
    return torch.stack(list(pieces)).sum(0)


def _pairs(
    whole: Sequence[Tensor], results: Sequence[Sequence[Tensor]], parts: Parts
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield each tensor of the whole's, with what the parts' come to; with each of theirs where they share it."""
    for number, (of_whole, dim) in enumerate(zip(whole, _dims(parts), strict=True)):
        pieces = [each[number] for each in results]
        yield from ((of_whole, piece) for piece in (pieces if dim is None else [torch.cat(pieces, dim)]))


def _together(results: Sequence[Sequence[Tensor]], parts: Parts) -> list[Tensor]:
    """Return what the parts' results come to; of what they share, the mean."""
    columns = zip(zip(*results, strict=True), _dims(parts), strict=True)
    return [torch.stack(list(each)).mean(0) if dim is None else torch.cat(list(each), dim) for each, dim in columns]


def _dims(parts: Parts) -> list[int | None]:
    return [parts.leaves, *(dim for _, dim in parts.beside)]


def _made_up_gradient(of: Tensor) -> Tensor:
    return torch.arange(of.numel()).mul(0.7).cos().reshape(of.shape).to(of)


def _is_same(one: _Outcome, other: _Outcome) -> bool:
    runs = zip((one.results, *one.later), (other.results, *other.later), strict=True)
    return all(_are_equal(*each) for each in runs) and not others(one.left, other.left)


def _are_equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


def _are_all_close(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(map(_are_close, one, other))


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().nan_to_num(posinf=0.0).max()) if tensor.numel() else 0.0


def _are_close(whole: Tensor, together: Tensor, coarse: float = 1.0, least: float = 0.0) -> bool:
    tolerance = 1e-4 if whole.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu") else 3e-2
    tolerance *= coarse
    return together.shape == whole.shape and torch.allclose(
        together, whole, rtol=tolerance, atol=max(least, tolerance * _largest(whole)), equal_nan=True
    )


def _is_aside(part: nn.Module) -> bool:
    """Whether what a part keeps is not looked at: BatchNorm shows in results, and metrics count what they are given."""
    return isinstance(part, _BatchNorm) or any(
        each.__module__.startswith("torchmetrics.") for each in type(part).__mro__
    )


def _divides_by_counts(part: nn.Module) -> bool:
    """Whether the gradient of an embedding depends on how often the batch looks a row up."""
    return isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.scale_grad_by_freq and part.weight.requires_grad


@contextmanager
def _known_aside(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm take no statistics from its batch."""
    norms = [each for each in module.modules() if isinstance(each, _BatchNorm)]
    before = [(each, each.training, each.running_mean, each.running_var) for each in norms]
    for each in norms:
        each.training = False
        if each.running_mean is None and each.num_features:
            weight = next(module.parameters(), None)
            dtype, device = (torch.float32, None) if weight is None else (weight.dtype, weight.device)
            each.running_mean = torch.zeros(each.num_features, dtype=dtype, device=device)
            each.running_var = torch.ones(each.num_features, dtype=dtype, device=device)
    try:
        yield
    finally:
        for each, training, mean, var in before:
            each.training, each.running_mean, each.running_var = training, mean, var


def _evaluated(module: nn.Module) -> AbstractContextManager[None]:
    """Let all but BatchNorm be in evaluation."""
    return in_training(module, lambda each: each.training and isinstance(each, _BatchNorm))
