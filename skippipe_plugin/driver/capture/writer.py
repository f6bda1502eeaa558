"""Recorded calls become messages; each worker is told nothing twice."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from ...engine.call import Beside, Call, Form, Hop
from ...engine.channel import Buffer
from ...engine.control.commands import Calls, Step
from ...engine.control.line import Said, to_all_workers
from ...engine.control.values import CallNews, Opening
from ...engine.errors import SkipPipeError
from ...engine.transport import TensorSpec
from ...engine.wire import encode_calls
from ...schedule import Path
from ..layout import Layout
from ..links import Links
from .proxies import BlockProxies
from .side_inputs import Digests, Outbox, PreparedCall, SpecNumbers, numbered
from .stack_call import StackCall

_OF_REPLICAS: Final = (
    "stage {stage} has replicas: each would keep what its own microbatches leave there, where one process has all in "
    "one place. Use replicas=1"
)
_OF_DRIVERS: Final = (
    "there are {count} drivers: it would be written once for the batch of each, where one process writes it once for "
    "all of them. Use drivers=1"
)


@dataclass(frozen=True, slots=True)
class _KnownHops:
    """The hops that followed from a path, gradients, forms, modes and side inputs."""

    asked: tuple[object, ...]
    hops: tuple[Hop, ...]


@dataclass(frozen=True, slots=True)
class _Visits:
    """Which microbatches visit which rank."""

    paths: Sequence[Path]
    by_rank: Mapping[int, Collection[int]]

    @classmethod
    def of(cls, paths: Sequence[Path]) -> _Visits:
        """Find out."""
        by_rank: dict[int, set[int]] = {}
        for microbatch, path in enumerate(paths):
            for visit in path.visits:
                by_rank.setdefault(visit.rank, set()).add(microbatch)
        return cls(paths, by_rank)


def _hop(form: TensorSpec | Form, requires_grad: bool) -> Hop:
    """Return what crosses with a form; gradients come back for what may have one."""
    if isinstance(form, TensorSpec):
        return Hop(form, requires_grad)
    beside = [Beside(each, spec, requires_grad and _is_real(spec.dtype)) for each, spec in form.beside]
    return Hop(form.spec, requires_grad and _is_real(form.spec.dtype), tuple(beside))


def _is_real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _kept(proxies: BlockProxies, block: int) -> str:
    """Name something that the forward of a block writes, BatchNorm aside, whose rule is documented."""
    module = proxies.blocks[block]
    written = sorted(proxies.book.written(block))
    return next((n for n in written if not isinstance(module.get_submodule(n.rpartition(".")[0]), _NormBase)), "")


def _message(opening: Opening | None, news: CallNews, blobs: Sequence[Buffer]) -> Calls | Step:
    return Calls(news, blobs) if opening is None else Step(opening, news, blobs)


class CallWriter:
    """Turns recorded calls into messages; remembers across steps what each worker knows."""

    def __init__(self, links: Links, layout: Layout) -> None:
        self._links = links
        self._layout = layout
        self._numbers = SpecNumbers()
        self._digests = Digests()
        self._outboxes = {link.rank: Outbox() for link in links}
        self._hops_before: dict[int, _KnownHops] = {}
        self._visits: _Visits | None = None

    @property
    def round_trip_s(self) -> float:
        """The longest round trip to a worker."""
        return max((link.round_trip_s for link in self._links), default=0.0)

    def prepare(
        self,
        microbatch: int,
        path: Path,
        call: StackCall,
        proxies: BlockProxies,
        seed: int,
    ) -> PreparedCall:
        """Describe ``call`` for the ranks on ``path``."""
        spec, number = self._numbers.known(proxies.spec(call, self._hops(microbatch, path, call, proxies)))
        digests = self._digests.digests(call.side_inputs)
        whole = Call(spec, tuple(call.side_inputs), seed, proxies.cache_use(call))
        return PreparedCall(microbatch, whole, number, digests)

    def send(self, step: int, calls: Sequence[PreparedCall], paths: Sequence[Path], opening: Opening | None) -> None:
        """Announce calls to the workers on their paths, and the step itself to all if ``opening`` describes it."""
        copies: dict[str, Tensor] = {}
        to_all: Said | None = None
        if self._visits is None or self._visits.paths is not paths:
            self._visits = _Visits.of(paths)
        for link in self._links:
            here = self._visits.by_rank.get(link.rank, ())
            visiting = [call for call in calls if call.microbatch in here]
            if not visiting and opening is None:
                continue
            outbox = self._outboxes[link.rank]
            if len(visiting) < len(calls) or not outbox.has_all(visiting):
                link.send(_message(opening, *outbox.encode(step, visiting, copies)))
                continue
            if to_all is None:  # whom all of the calls come to, and who lack nothing, are told the same
                to_all = to_all_workers(_message(opening, *encode_calls(step, numbered(calls), {}, {}, ())))
            link.send(to_all)

    def _hops(self, microbatch: int, path: Path, call: StackCall, proxies: BlockProxies) -> tuple[Hop, ...]:
        """Return what crosses between the ranks on ``path``; mostly what it was in the step before."""
        requires_grad = call.ambient.grad and call.hidden.requires_grad
        before = self._hops_before.get(microbatch)
        asked = path, requires_grad, call.ambient.grad, call.forms, tuple(call.modes), call.carried, call.exported
        if before is None or before.asked != asked:
            self._check_forms(microbatch, path, call)
            self._check_kept(call, proxies)
            before = self._hops_before[microbatch] = _KnownHops(asked, self._find_hops(path, call, requires_grad))
        return before.hops

    def _find_hops(self, path: Path, call: StackCall, requires_grad: bool) -> tuple[Hop, ...]:
        forms, carried = call.forms, call.carried
        hops = [_hop(forms[0], requires_grad)]
        for visit in path.visits:
            blocks = self._layout.blocks(visit.stage)
            trained = any(flag for block in blocks for flag in call.modes[block].requires_grad)
            trained = trained or (bool(carried) and any(carried[blocks.start : blocks.stop]))
            requires_grad = requires_grad or (call.ambient.grad and trained)
            hops.append(_hop(forms[blocks.stop], requires_grad))
        return tuple(hops)

    def _check_kept(self, call: StackCall, proxies: BlockProxies) -> None:
        """Refuse replicas of blocks that keep something, and several drivers: one process has all in one place."""
        replicated, drivers = self._layout.replicated_blocks, self._layout.num_drivers
        for block in range(len(call.modes)) if drivers > 1 else sorted(replicated):
            if call.modes[block].training[0] and (kept := _kept(proxies, block)):
                stage = self._layout.stage_of_block(block)
                why = _OF_REPLICAS.format(stage=stage) if block in replicated else _OF_DRIVERS.format(count=drivers)
                raise SkipPipeError(f"the forward of {proxies.names[block]} writes {kept}, and {why}")

    def _check_forms(self, microbatch: int, path: Path, call: StackCall) -> None:
        """A path has to visit the stages that change the form of the hidden states, in their order."""
        forms, form = call.forms, call.forms[0]
        stages = [self._layout.stage_of_block(made.block) for made in call.exported]
        if missing := sorted(set(stages) - set(path.stages)):
            raise SkipPipeError(
                f"the path of microbatch {microbatch} ({path}) does not visit the stages {missing}, though code after "
                "the blocks uses what blocks of theirs return. Visit them, or use skip_ratio=..., which does"
            )
        for visit in path.visits:
            blocks = self._layout.blocks(visit.stage)
            if not form.is_like(forms[blocks.start]):
                break
            form = forms[blocks.stop]
        else:
            if form.is_like(forms[-1]):
                return
        shaping = self._layout.shaping_stages(forms)
        changes = ", ".join(
            f"stage {stage} turns {forms[blocks.start]} into {forms[blocks.stop]}"
            for stage in shaping
            for blocks in [self._layout.blocks(stage)]
        )
        raise SkipPipeError(
            f"the path of microbatch {microbatch} ({path}) does not visit the stages {shaping} in this order, which "
            f"every path must: they change the form of the hidden states ({changes}). Visit them, use skip_ratio=..., "
            "which does, or name a stack of blocks that keep the form of their input with blocks=..."
        )
