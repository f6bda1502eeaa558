"""Gradients between the backward of a step and the optimizer: kept aside, merged, summed, measured, clipped.

Lightning zeroes gradients after ``training_step`` and before ``backward``, while the engine computes them inside
``training_step``. So a step's new gradients are kept apart until ``backward`` asks for them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor, nn

from .gradient_hooks import GradientHooks, has_hooks
from .half import let_overflow

_BUCKET_BYTES: Final = 64 << 20
"""How much of gradients is summed over ranks at once."""


class GradientWindow:
    """The gradients of some parameters over one accumulation window."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters: Sequence[nn.Parameter] = [*parameters]
        self.in_half: set[int] = set()
        """The ids of those whose gradients are computed in float16, and overflow as a whole."""
        self._beside: list[weakref.ref[Tensor]] = []
        """What else steps have reached."""
        self._members: Sequence[Tensor] = ()
        """Whose gradients are those of the step that is open."""
        self._accumulated: list[Tensor | None] | None = None
        self._new: list[tuple[Tensor, Tensor]] = []
        """What the last step has computed, and for what."""
        self._hooks = GradientHooks()
        self._paused = False
        self._is_part = False
        """Whether what is merged is a part of one backward's gradients, which hooks see when all parts are there."""

    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Be that of other parameters; the gradient of one that comes in the middle of a step is all of that step."""
        if parameters is self.parameters:
            return
        if self._accumulated is None:
            self.parameters, self._new = parameters, []
            return
        known = set(map(id, self._members))
        came = [parameter for parameter in parameters if id(parameter) not in known]
        self.parameters = [*self.parameters, *came]
        self._members = [*self._members, *came]
        self._accumulated += [None] * len(came)

    def take_in(self, leaves: Sequence[Tensor]) -> None:
        """Be also that of leaves which a step is about to go back to, until they are gone; of each driver by itself."""
        if leaves:
            known = {*map(id, self.parameters), *(id(each()) for each in self._beside)}
            came = [leaf for leaf in leaves if id(leaf) not in known]
            self._beside += map(weakref.ref, came)
            if self._accumulated is not None:
                self._members = [*self._members, *came]
                self._accumulated += _take(came)
                self._hooks.quiet_more(came)
        if self._accumulated is not None and self._hooks.may_be_more():
            self._hooks.quiet_more(self._members)

    def open(self) -> None:
        """Start a step: put what is accumulated aside, so that the backward fills ``.grad`` from nothing."""
        if self._accumulated is not None:
            return
        self._paused = False
        self._members = self._all()
        self._accumulated = _take(self._members)
        if not self._is_part:
            self._hooks.quiet(self._members)

    def close(self) -> None:
        """End a step: keep its gradients aside and put the accumulated ones back."""
        if self._accumulated is None:
            self._new = []
            return
        self._new = _present(self._members)
        if not self._is_part:
            self._hooks.release()
        self._restore()

    @contextmanager
    def in_parts(self) -> Iterator[None]:
        """Let several passes of the body, and what was added since the step was opened, be one backward for hooks."""
        if self._is_part:
            yield
            return
        aside = self._accumulated
        if aside is None:
            self._members = self._all()
            aside = _take(self._members)
            self._hooks.quiet(self._members)
        else:
            self._accumulated = [None] * len(aside)
        members, self._is_part = self._members, True
        try:
            yield
            if self._accumulated is not None:
                self.close()
                self.merge(1.0)
        finally:
            self._is_part, self._accumulated, added = False, None, _present(members)
            self._hooks.release()
            for member, gradient in zip(members, aside, strict=True):
                member.grad = gradient
        self._add(added)

    def pause(self) -> None:
        """Let the code that a step waits for have what is accumulated, with what its own backward has added."""
        if self._accumulated is not None:
            self.close()
            self.merge(1.0)
            self._paused = True

    def resume(self) -> None:
        """Go on with a step that was paused."""
        if self._paused:
            self.open()

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Let user code in the middle of a step see what is accumulated, and change that."""
        if self._accumulated is None:
            yield
            return
        new = _present(self._members)
        self._hooks.release()
        self._restore()
        try:
            yield
        finally:
            self.open()
            for member, gradient in new:
                member.grad = gradient

    def new_of(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the new gradients of some of the parameters, to be changed in place."""
        wanted = {id(parameter) for parameter in parameters}
        return [gradient for member, gradient in self._new if id(member) in wanted]

    def drop_new(self) -> None:
        """Drop the gradients of the last step, which others have added already."""
        self._new = []

    def discard(self) -> None:
        """Give a step up: drop what it computed and put the accumulated gradients back."""
        self._paused = False
        self._hooks.release()
        if self._accumulated is not None:
            _take(self._members)
            self._restore()
        self._new = []

    def merge(self, scale: float) -> None:
        """Add ``scale`` times the new gradients to the accumulated ones."""
        new, self._new = self._new, []
        scale_gradients([gradient for _, gradient in new], scale)
        if self.in_half:
            let_overflow(gradient for member, gradient in new if id(member) in self.in_half)
        self._add(new)

    def zero(self, *, fill: bool = False) -> None:
        """Drop the accumulated gradients, or fill them with zeros."""
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter.grad) if fill and parameter.grad is not None else None

    def _restore(self) -> None:
        assert self._accumulated is not None
        for member, gradient in zip(self._members, self._accumulated, strict=True):
            member.grad = gradient
        self._accumulated, self._members = None, ()

    def _add(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Add a backward's whole gradients, of which hooks make what they like."""
        hooked: list[tuple[Tensor, Tensor]] = []
        for leaf, gradient in gradients:
            if has_hooks(leaf) and leaf.requires_grad:
                hooked.append((leaf, gradient))
            else:
                leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient
        if hooked:
            self._hooks.deliver(hooked)

    def _all(self) -> Sequence[Tensor]:
        if not self._beside:
            return self.parameters
        known = set(map(id, self.parameters))
        beside = [leaf for each in self._beside if (leaf := each()) is not None and id(leaf) not in known]
        self._beside = [*map(weakref.ref, beside)]
        return [*self.parameters, *beside]


_COLLECTS: Final = "_skippipe_collects"


def collector(leaf: Tensor) -> Tensor:
    """Mark a leaf of ours, whose gradient is for whoever has made it."""
    setattr(leaf, _COLLECTS, True)
    return leaf


def is_collector(leaf: Tensor) -> bool:
    """Whether a leaf is of ours; see :func:`collector`."""
    return hasattr(leaf, _COLLECTS)


def sum_over_holders(parameters: Sequence[nn.Parameter], all_reduce: Callable[[Tensor], None]) -> None:
    """Sum the gradients over all ranks that hold the same parameters, before the step is closed.

    A parameter that no holder used keeps None: an optimizer must skip it as in one process.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    used = torch.tensor([float(parameter.grad is not None) for parameter in trained])
    all_reduce(used)
    for dtype in sorted({parameter.dtype for parameter in trained}, key=str):
        group = [p for p, count in zip(trained, used, strict=True) if count > 0 and p.dtype == dtype]
        for bucket in _buckets(group):
            _sum_flat(bucket, all_reduce)


def norm_power(parameters: Sequence[Tensor], norm_type: float) -> float:
    """Return the sum of the powers of the gradients' elements (their maximum for an infinite norm).

    Partial results of several processes add up (or are compared), see :func:`total_norm`. A device is waited for once.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    by_device: dict[torch.device, list[Tensor]] = {}
    for norm in torch._foreach_norm(gradients, norm_type):
        by_device.setdefault(norm.device, []).append(norm)
    norms = torch.cat([torch.stack(each).to("cpu", torch.float64) for each in by_device.values()])
    return float(norms.max() if norm_type == float("inf") else (norms**norm_type).sum())


def total_norm(powers: Sequence[float], norm_type: float) -> float:
    """Combine the partial results of :func:`norm_power` into the norm of all gradients together."""
    if norm_type == float("inf"):
        return max(powers)
    return float(sum(powers) ** (1.0 / norm_type))


def scale_gradients(gradients: Sequence[Tensor], scale: float) -> None:
    """Multiply gradients in place."""
    if gradients and scale != 1.0:
        torch._foreach_mul_(list(gradients), scale)


def clip(parameters: Sequence[Tensor], *, scale: float | None, value: float | None) -> None:
    """Multiply the gradients by ``scale`` and clamp their elements to +-``value``, each if given."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if scale is not None:
        scale_gradients(gradients, scale)
    if value is not None and gradients:
        torch.nn.utils.clip_grad_value_(list(parameters), value)


def unscale(parameters: Sequence[Tensor], inverse: float) -> bool | None:
    """Multiply the gradients by ``inverse``, by the kernel of :class:`torch.amp.GradScaler`.

    Returns:
        Whether something in them was infinite or no number; None if there are no gradients.
    """
    alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in (parameter.grad for parameter in parameters if parameter.grad is not None):
        if gradient.dtype == torch.float16:
            raise ValueError("Attempting to unscale FP16 gradients.")  # as torch says it
        values = gradient._values() if gradient.is_sparse else gradient
        alike.setdefault((values.device, values.dtype), []).append(values)
    found = {device: torch.zeros((), device=device) for device, _ in alike}
    for (device, _), tensors in alike.items():
        factor = torch.tensor(inverse, dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found[device], factor)
    return any(map(bool, found.values())) if found else None


def _take(leaves: Sequence[Tensor]) -> list[Tensor | None]:
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


def _present(leaves: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Take the gradients that there are."""
    return [(leaf, gradient) for leaf, gradient in zip(leaves, _take(leaves), strict=True) if gradient is not None]


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Share parameters out so that what is summed at once takes little memory beside the gradients."""
    bucket, num_bytes = list[nn.Parameter](), 0
    for parameter in parameters:
        if bucket and num_bytes + parameter.nbytes > _BUCKET_BYTES:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append(parameter)
        num_bytes += parameter.nbytes
    if bucket:
        yield bucket


def _sum_flat(parameters: Sequence[nn.Parameter], all_reduce: Callable[[Tensor], None]) -> None:
    """Sum in host memory; a device is waited for once on the way there, and once on the way back."""
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([part.detach().reshape(-1) for part in parts])
    summed = flat.cpu()
    all_reduce(summed)
    pieces = torch.split(summed.to(flat.device), [part.numel() for part in parts])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter).to(parameter.device, copy=True)
