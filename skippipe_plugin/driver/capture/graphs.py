"""The driver's graph around the blocks: what comes before them, what comes after, and what goes past them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from ...engine.errors import SkipPipeError
from ...engine.gradients import is_collector
from ...engine.half import computed_in_half

_Node = Any
"""A node of autograd's graph: torch's own stubs do not agree on its type."""


_LEFT: Final = (
    "the loss uses a tensor that the model has left beside what it returned (in an attribute, in a list, by a hook), "
    "and the blocks have gone back already: its gradient would be lost. Use one backward for all that a call has "
    "given; let the model return it, or add it to the loss that it returns; or detach it, where its value is all that "
    "counts. In a loop, with microbatches='stack', a model goes back with the loop's backward only, also where it "
    "returns its loss"
)
_IN_PARTS: Final = (
    "the step registers a hook before it calls the blocks (on a gradient, or it is a module's full backward hook), and "
    "what is computed there goes past the blocks as well, or into several calls of them: such gradients come in two "
    "parts, one from each way, of which the hook would see each by itself. Where a look is all, let tensors keep their "
    "gradients (retain_grad()), and read those after the backward; or register the hook behind the blocks, name a part "
    "of the stack with blocks=... that begins before that place, or train this without the pipeline"
)
_BENT: Final = (
    "the backward of {name}, a function of your own, makes something else of a sum of gradients than of its parts (it "
    "clips or normalizes, for instance), and what it has computed in front of the blocks goes past them as well, or "
    "into several calls of them: there the gradient comes in two parts, one from each way. Use it behind the blocks, "
    "name a part of the stack with blocks=... that begins before it, or train this without the pipeline"
)
_LEEWAY: Final = 1e-2
"""For rounding, in whatever precision: what bends a gradient does so by much more."""
_LATE: Final = -1
"""Where torch has the number of a hook that it has registered."""


@dataclass(frozen=True, slots=True)
class Ends:
    """Where the driver's graph ends at the blocks, on both sides of them."""

    sources: Sequence[Tensor] = ()
    """What they were given, if its graph goes back after that of what follows them."""
    results: Sequence[Tensor] = ()
    """What they have returned: leaves, which get its gradient."""
    is_hooked: bool = False
    """Whether a hook was registered on the way to them."""


def is_over(result: Tensor) -> None:
    """Refuse gradients that reach what the blocks have returned from now on: they have gone back."""
    if not result.requires_grad:
        return
    if result._backward_hooks is None:
        # Not register_hook: a handle of torch's would say to all who count them that hooks on blocks may have come.
        result._backward_hooks = OrderedDict(((_LATE, _refuse_late),))
    else:
        result._backward_hooks[_LATE] = _refuse_late


def follow_leaf(leaf: Tensor, function: Callable[[Tensor], None]) -> None:
    """Call ``function`` when a gradient has come to a leaf that nobody follows yet; torch counts it with no handle."""
    assert not leaf._post_accumulate_grad_hooks
    leaf._post_accumulate_grad_hooks = OrderedDict(((_LATE, function),))


def _refuse_late(gradient: Tensor) -> None:
    raise SkipPipeError(_LEFT)


def root_of(tensor: Tensor) -> GradientEdge | None:
    """Return where a gradient of ``tensor`` goes, whatever is done to it in place from now on; None: nowhere."""
    if not carries(tensor) or not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return None
    return get_gradient_edge(tensor)


def carries(tensor: Tensor) -> bool:
    """Whether a gradient of ``tensor`` goes anywhere: a view says that it requires one if what it shows does, and if
    it was made without gradients none goes through it.

    >>> table = torch.ones(2, 2, requires_grad=True)
    >>> with torch.no_grad():
    ...     row = table[0]
    >>> row.requires_grad, carries(row), carries(table[0]), carries(table)
    (True, False, True, True)
    """
    if not tensor.requires_grad or tensor.grad_fn is not None or not tensor._is_view():
        return tensor.requires_grad
    with torch.enable_grad():
        node: _Node = tensor.view_as(tensor).grad_fn
    return node.next_functions[0][0] is not None


def goes_past(outputs: Iterable[Tensor], *hidden: Tensor) -> bool:
    """Whether ``outputs`` depend on what ``hidden`` was computed from other than through the blocks.

    Then the graph before the blocks takes two backwards: one from the outputs, one from the blocks.
    """
    if all(each.grad_fn is None for each in hidden):
        return False
    before = set(_nodes(hidden))
    return any(node in before for node in _nodes(outputs))


def comes_from(outputs: Iterable[Tensor], is_it: Callable[[_Node], bool]) -> bool:
    """Whether ``outputs`` depend on a node."""
    return any(map(is_it, _nodes(outputs)))


def goes_through(outputs: Iterable[Tensor], result: Tensor) -> bool:
    """Whether ``outputs`` depend on ``result``, which may be a leaf."""
    outputs = list(outputs)
    if any(output is result for output in outputs):
        return True
    if result.is_leaf:
        return any(reaches(output, result) for output in outputs)
    return result.grad_fn is not None and any(node is result.grad_fn for node in _nodes(outputs))


def reaches(output: Tensor, source: Tensor) -> bool:
    """Whether ``output`` was computed from ``source``."""
    if output is source:
        return True
    if output.grad_fn is None:
        return False
    before = set(_nodes([output]))
    if source.grad_fn is not None:
        return source.grad_fn in before
    ends = (each for node in (*before, output.grad_fn) for each, _ in node.next_functions if each is not None)
    return any(getattr(each, "variable", None) is source for each in ends)


def of_others(tensors: Sequence[Tensor]) -> frozenset[int]:
    """Return which of some tensors others of them were computed of, or are the same.

    >>> hidden = torch.ones(2, requires_grad=True) * 2
    >>> of_others([hidden, hidden.sum()])
    frozenset({0})
    """
    found: set[int] = set()
    for at, other in enumerate(tensors):
        before = set(_nodes([other]))
        for index, tensor in enumerate(tensors):
            if index == at:
                continue
            if tensor.grad_fn is None:
                is_before = reaches(other, tensor)
            elif tensor.grad_fn is other.grad_fn:  # of a split, for instance
                is_before = tensor.output_nr == other.output_nr
            else:
                is_before = tensor.grad_fn in before
            if is_before:
                found.add(index)
    return frozenset(found)


def check_parts(outputs: Sequence[Tensor], sources: Sequence[Tensor], *, is_hooked: bool) -> None:
    """Refuse what makes other things of a gradient's two parts than of the whole: hooks, and functions that bend it.

    The parts meet in what is before the blocks, where ``outputs`` reach it also past them.

    Args:
        outputs: What goes back first, in one part.
        sources: What the blocks were given, of which the other part comes.
        is_hooked: Whether the step had registered a hook before the blocks were called: torch tells of no node of the
            graph whether it has one.
    """
    for source in sources:
        if source._backward_hooks and any(reaches(output, source) for output in outputs):
            hook = next(iter(source._backward_hooks.values()))
            raise SkipPipeError(
                f"a tensor that the blocks get (shape {tuple(source.shape)}) has a gradient hook "
                f"({getattr(hook, '__qualname__', hook)}), and the loss uses that tensor around the blocks as well: "
                "its gradient comes in two parts, of which the hook would see each by itself. Let the tensor keep its "
                "gradient (retain_grad()), and read that after the backward, or give each way a tensor of its own "
                "(x * 1) with a hook"
            )
    if is_hooked:
        raise SkipPipeError(_IN_PARTS)
    before = set(_nodes(sources))
    for node in _nodes(outputs):
        if node in before and _is_of_user(node) and not _is_additive(node):
            raise SkipPipeError(_BENT.format(name=type(node)._forward_cls.__name__))


def _is_of_user(node: _Node) -> bool:
    """Whether it is the backward of a function written in Python that is neither torch's nor ours."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        return False
    home = type(node)._forward_cls.__module__.partition(".")[0]  # type: ignore[attr-defined]
    return home not in ("torch", __name__.partition(".")[0])


def _is_additive(node: _Node) -> bool:
    """Whether a function's backward makes of a sum what it makes of its parts; also where it cannot be asked."""
    generator = torch.Generator().manual_seed(0)

    def drawn() -> list[Tensor]:
        forms = [(form.shape, form.dtype, form.device) for form in node._input_metadata]
        return [torch.randn(shape, generator=generator).to(device, dtype) for shape, dtype, device in forms]

    def made(gradients: Sequence[Tensor]) -> list[Tensor]:
        results = node.apply(*[each.clone() for each in gradients])
        return [each for each in (results if isinstance(results, tuple) else (results,)) if each is not None]

    one, other = drawn(), drawn()
    with torch.no_grad():
        try:
            parts = [a + b for a, b in zip(made(one), made(other), strict=True)]
            whole = made([a + b for a, b in zip(one, other, strict=True)])
        except Exception:  # it takes its gradients in its own turn only, and says so if that fails
            return True
    pairs = zip(parts, whole, strict=True)
    return all(torch.allclose(a, b, rtol=0.0, atol=_LEEWAY * float(b.abs().max() or 1)) for a, b in pairs if b.numel())


def _nodes(tensors: Iterable[Tensor]) -> Iterator[_Node]:
    """Yield the nodes that the backward of ``tensors`` runs, but for those that only add up a leaf's gradient."""
    found: set[_Node] = set()
    waiting = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    while waiting:
        node = waiting.pop()
        if node in found or not node.next_functions:
            continue
        found.add(node)
        yield node
        waiting += [each for each, _ in node.next_functions if each is not None]


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the leaves that the backward of ``tensors`` adds gradients to, but for those of ours."""
    ends = (each for node in _nodes(tensors) for each, _ in node.next_functions if each is not None)
    variables = (each.variable for each in ends if hasattr(each, "variable"))
    found = {id(leaf): leaf for leaf in variables}
    return [leaf for leaf in found.values() if not is_collector(leaf)]


_FIRST: Final = 32
"""In how many microbatches of a run it is looked for: the walk costs more than a small microbatch may."""


class AroundTheBlocks:
    """What is known of a run's steps: whether their losses go past the blocks, and what they go back to.

    Args:
        reached: Is told before a step goes back: of leaves that it comes to, where these were looked for.
    """

    def __init__(self, reached: Callable[[Sequence[Tensor]], None] = lambda _: None) -> None:
        self._reached = reached
        self.meet = False
        """Whether the loss reaches the graph in front of the blocks."""
        self.in_half: set[int] = set()
        """The ids of the parameters around the blocks whose gradients are computed in float16."""
        self.look_again()

    def look(self, outputs: Iterable[Tensor], *hidden: Tensor) -> bool:
        """Say whether ``outputs`` go past the blocks."""
        if not self.meet and self._looked < _FIRST:
            self._looked += 1
            self.meet = goes_past(outputs, *hidden)
        return self.meet

    def look_again(self) -> None:
        """Look as in the first microbatches: steps may do something else from now on."""
        self._looked = self._looked_for_half = self._looked_for_leaves = 0

    def look_for_leaves(self, outputs: Iterable[Tensor]) -> None:
        """Tell of the leaves that the backward of ``outputs`` reaches."""
        if self._looked_for_leaves < _FIRST:
            self._looked_for_leaves += 1
            self.tell_leaves(outputs)
        else:
            self._reached(())

    def tell_leaves(self, outputs: Iterable[Tensor]) -> None:
        """The same, however many there were before."""
        self._reached(_leaves(outputs))

    def look_for_half(self, outputs: Iterable[Tensor]) -> None:
        """Look for parameters whose gradients are computed in float16, before the backward of ``outputs``."""
        if self._looked_for_half < _FIRST:
            self._looked_for_half += 1
            self.in_half |= computed_in_half(outputs)

    def back(self, propagate: Callable[[], None]) -> None:
        """Run the second pass; if the first has not left its graph standing, say so and do so from now on."""
        self._reached(())
        try:
            propagate()
        except RuntimeError as error:
            if self.meet or "second time" not in str(error):
                raise
            self.meet = True
            raise SkipPipeError(
                "the loss of this step uses what is computed before the blocks also on a way around them, which no "
                "step did before, so that part of the graph was freed too early. Let every step take that way (with "
                "a weight of 0 where it should not count). Or its microbatches share something with a gradient, such "
                "as a tensor in an attribute or in an object: make it an argument of the model, or use "
                "num_microbatches=1"
            ) from error
