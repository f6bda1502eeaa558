"""Expert parallelism: the experts of a layer are spread over ranks, and tokens travel to them and back.

Each rank of a group has tokens of its own and some of the experts. A layer's forward is two exchanges, rows to the
experts and outputs back, and its backward is the same two for gradients. Both begin without waiting: with a degree of
overlap above 1 the tokens are cut into chunks, and while one travels another is computed (Tutel, arXiv 2206.03382,
section 3.3; FSMoE, arXiv 2501.10714, section 4). In backward it is the order in which autograd runs the nodes that
makes the exchanges overlap.

The ranks' calls pair up in order. A rank that has no tokens for a call of the others, because its microbatch is empty,
*attends*: the others then announce each exchange, and it takes part with no rows of its own until they are through.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from skippipe_plugin.moe.experts import ExpertWeights, compute_dtype, hidden_size, prepare, run_experts
from skippipe_plugin.moe.routing import Routing, empty_slots

Placement = tuple[int, ...]
"""By expert: the position in the group of the rank that holds it."""

SHARD = "_skippipe_shard"
"""The attribute of an experts module that says which of its experts are here; without it all are."""
IMPLEMENTATION: Final = "skippipe"
"""The name of our expert compute among the experts implementations of transformers."""
_SETTING: Final = "_experts_implementation"
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Arrival(Protocol):
    """Rows that are on their way."""

    def wait(self) -> Tensor:
        """Return them, [rows, dim]."""


class Exchange(Protocol):
    """The connections of a group of ranks; every call of one is a call of all."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    @property
    def position(self) -> int:
        """The place of this rank among them."""

    def all_to_all(self, rows: Tensor, send: Sequence[int], receive: Sequence[int]) -> Arrival:
        """Begin to send the first ``send[0]`` rows to position 0 and so on, and to receive likewise."""

    def sum(self, tensor: Tensor) -> None:
        """Sum a host tensor in place over the ranks."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Which experts of a layer are on this rank, and how to reach the others."""

    company: Company
    site: int
    """The layer's number in the group's list."""
    placement: Placement

    def order(self) -> Tensor:
        """Return by expert, and last for empty slots, its place when experts are sorted by rank: [experts + 1]."""
        by_rank = sorted(range(len(self.placement)), key=lambda expert: (self.placement[expert], expert))
        places = torch.empty(len(by_rank) + 1, dtype=torch.int64)
        places[torch.tensor(by_rank)] = torch.arange(len(by_rank))
        places[-1] = len(by_rank)
        return places

    def is_here(self) -> Tensor:
        """Tell which experts are on this rank: [experts], bool."""
        return torch.tensor(self.placement) == self.company.exchange.position

    def own_part(self, routing: Routing) -> Routing:
        """Return what is chosen of the experts here, by their numbers here."""
        size = len(self.placement) // self.company.exchange.size
        order = self.order().to(routing.experts.device)
        places = torch.take(order, routing.experts) - size * self.company.exchange.position
        elsewhere = (places < 0) | (places >= size)
        return empty_slots(Routing(routing.weights, places), elsewhere, size)


class _Say(IntEnum):
    """What is announced to a rank that attends."""

    END = 0
    COUNTS = 1
    DISPATCH = 2
    COMBINE = 3
    COMBINE_BACK = 4
    DISPATCH_BACK = 5
    SUM = 6


_HEADER: Final = 7


@dataclass(slots=True)
class _Served:
    """A call that this rank attends: what came, and what its experts made of it."""

    weights: ExpertWeights
    counts: Tensor
    """[ranks, experts here]"""
    dtype: torch.dtype
    autocast: bool
    grad: bool
    rows: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))


class Company:
    """The ranks that share the experts of a stage, seen from one of them."""

    def __init__(self, exchange: Exchange, sites: Sequence[nn.Module]) -> None:
        """Share the experts of the modules ``sites``, in this order."""
        self.exchange = exchange
        self.degree = 1
        """Into how many chunks a call's tokens are cut; the same on all ranks."""
        self.is_met = False
        """Whether the others take part at present; without them experts that are elsewhere give nothing, as in a test
        of what form a block's output has."""
        self.measured: dict[int, tuple[int, float]] = {}
        """By layer: the rows that came to the experts here in forwards, and the seconds of their compute."""
        self._sites = list(sites)
        self._calls = 0
        self._announces = False
        self._speaks = False
        self._attended: dict[int, dict[int, _Served]] = {}

    def begin_step(self) -> None:
        """Number calls anew; what an interrupted step has left is dropped."""
        self._calls = 0
        self._attended.clear()

    # ------------------------------------------------------------- meetings

    def enter(self, present: Sequence[bool]) -> None:
        """Begin a forward or backward for which the ranks have tokens or not; this one has."""
        self.is_met = True
        self._announces = not all(present)
        self._speaks = list(present).index(True) == self.exchange.position

    def leave(self) -> None:
        """End it."""
        self.announce(_Say.END)
        self.is_met = self._announces = False

    def attend(self, meeting: int) -> None:
        """Take part without tokens in the others' forward or backward of ``meeting`` until they leave."""
        served = self._attended.setdefault(meeting, {})
        while (order := self._listen())[0] != _Say.END:
            self._serve(served, order)

    def announce(self, say: _Say, *values: int) -> None:
        """Tell ranks that attend what comes; costs nothing where all have tokens."""
        if self._announces:
            header = torch.zeros(_HEADER, dtype=torch.int64)
            if self._speaks:
                header[: 1 + len(values)] = torch.tensor([say, *values])
            self.exchange.sum(header)

    def _listen(self) -> list[int]:
        header = torch.zeros(_HEADER, dtype=torch.int64)
        self.exchange.sum(header)
        order: list[int] = header.tolist()
        return order

    # ---------------------------------------------------------------- calls

    def sum(self, tensor: Tensor) -> None:
        """Sum the int64 host ``tensor`` in place over all ranks, those that attend included."""
        self.announce(_Say.SUM, len(tensor))
        self.exchange.sum(tensor)

    def exchange_counts(self, site: int, counts: Tensor, dtype: torch.dtype, autocast: bool) -> tuple[int, Tensor]:
        """Begin a call: tell every rank how many rows come.

        Args:
            site: The number of the layer.
            counts: Rows for each expert, by rank that holds it: [chunks, ranks, experts there].
            dtype: Of the rows.
            autocast: Whether they are computed under autocast.

        Returns:
            The number of the first chunk's call, and the rows that come: [chunks, ranks, experts here].
        """
        chunks, first = len(counts), self._calls
        grad = torch.is_grad_enabled()
        self.announce(_Say.COUNTS, site, first, chunks, _DTYPES.index(dtype), autocast, grad)
        return first, self._swap_counts(counts)

    def _swap_counts(self, counts: Tensor) -> Tensor:
        chunks, size, experts = counts.shape
        self._calls += chunks
        rows = counts.transpose(0, 1).reshape(size, chunks * experts)
        received = self.exchange.all_to_all(rows, [1] * size, [1] * size).wait()
        return received.view(size, chunks, experts).transpose(0, 1)

    def note(self, site: int, rows: int, seconds: float) -> None:
        """Count what the experts of a layer took for rows that came."""
        known_rows, known_s = self.measured.get(site, (0, 0.0))
        self.measured[site] = known_rows + rows, known_s + seconds

    # -------------------------------------------------------------- serving

    def _serve(self, served: dict[int, _Served], order: list[int]) -> None:
        say, number = order[:2]
        if say == _Say.SUM:
            self.exchange.sum(torch.zeros(number, dtype=torch.int64))
        elif say == _Say.COUNTS:
            self._serve_counts(served, *order[1:])
        elif say == _Say.DISPATCH:
            call = served[number]
            call.rows = self._receive(call, call.counts)
            self._compute(call)
        elif say == _Say.COMBINE:
            self._send(served[number], served[number].output.detach())
        elif say == _Say.COMBINE_BACK:
            call = served[number]
            torch.autograd.backward(call.output, self._receive(call, call.counts))
        else:
            call = served.pop(number)
            gradient = call.rows.grad
            self._send(call, torch.zeros_like(call.rows) if gradient is None else gradient)

    def _serve_counts(
        self, served: dict[int, _Served], site: int, first: int, chunks: int, dtype: int, autocast: int, grad: int
    ) -> None:
        weights = weights_of(self._sites[site])
        self._calls = first
        counts = self._swap_counts(torch.zeros(chunks, self.exchange.size, weights.num_experts, dtype=torch.int64))
        for chunk in range(chunks):
            served[first + chunk] = _Served(weights, counts[chunk], _DTYPES[dtype], bool(autocast), bool(grad))

    def _receive(self, call: _Served, counts: Tensor) -> Tensor:
        empty = call.weights.up.new_empty(0, hidden_size(call.weights), dtype=call.dtype)
        return self.exchange.all_to_all(empty, [0] * self.exchange.size, counts.sum(1).tolist()).wait()

    def _send(self, call: _Served, rows: Tensor) -> None:
        self.exchange.all_to_all(rows, call.counts.sum(1).tolist(), [0] * self.exchange.size).wait()

    def _compute(self, call: _Served) -> None:
        call.rows.requires_grad_(call.grad)
        kind = call.rows.device.type
        mixed = torch.autocast(kind, dtype=call.dtype) if call.autocast else nullcontext()
        with torch.set_grad_enabled(call.grad), mixed:
            compute_rows = prepare(call.weights.to(call.dtype), len(call.rows), call.rows.device)
            call.output = _compute_received(call.rows, call.counts, compute_rows)


def computes_our_way(experts: nn.Module) -> bool:
    """Tell whether an experts module runs through :func:`run_module`, so that its experts can be spread."""
    return (
        hasattr(experts, "expert_weights")
        or getattr(getattr(experts, "config", None), _SETTING, None) == IMPLEMENTATION
    )


def weights_of(experts: Any) -> ExpertWeights:  # Any: each family has its own class
    """Return the parameters of an experts module that computes our way."""
    weights: ExpertWeights = (
        experts.expert_weights() if hasattr(experts, "expert_weights") else of_transformers(experts)
    )
    return weights


def of_transformers(experts: Any) -> ExpertWeights:  # Any: each family has its own class
    """Read an experts module of transformers."""
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    prefix = "gate_up_proj" if experts.has_gate else "up_proj"
    return ExpertWeights(
        up,
        experts.down_proj,
        experts._apply_gate if experts.has_gate else experts.act_fn,
        up_bias=getattr(experts, f"{prefix}_bias") if experts.has_bias else None,
        down_bias=experts.down_proj_bias if experts.has_bias else None,
        transposed=experts.is_transposed,
        norm=experts.post_expert_norm if experts.has_post_expert_norm else None,
    )


# ----------------------------------------------------------------- one layer


def run_module(experts: nn.Module, hidden: Tensor, routing: Routing) -> Tensor:
    """Run an experts module on ``hidden`` [tokens, dim], whether its experts are all here or spread."""
    shard: Shard | None = getattr(experts, SHARD, None)
    if shard is None:
        return run_experts(hidden, routing, weights_of(experts))
    if not shard.company.is_met:
        return run_experts(hidden, shard.own_part(routing), weights_of(experts))
    return run_spread_experts(hidden, routing, weights_of(experts), shard)


def run_spread_experts(hidden: Tensor, routing: Routing, experts: ExpertWeights, shard: Shard) -> Tensor:
    """Do what :func:`~skippipe_plugin.moe.run_experts` does, when ``experts`` holds only this rank's.

    Every rank of the group calls this for the same layer. ``routing`` counts all experts.
    """
    company, size = shard.company, shard.company.exchange.size
    compute = compute_dtype(hidden, experts)
    local, places = experts.to(compute), shard.order().to(hidden.device)
    slots, num_experts = routing.experts.shape[1], len(shard.placement)
    chunks = [_Chunk(index, places, slots, num_experts) for index in _cut(routing.experts, company.degree)]
    sent = torch.stack([chunk.counts.cpu() for chunk in chunks]).view(len(chunks), size, -1)
    autocast = torch.is_autocast_enabled(hidden.device.type)
    first, received = company.exchange_counts(shard.site, sent, compute, autocast)
    ways, backs = [], []
    for number, (chunk, rows) in enumerate(zip(chunks, _cut(hidden, company.degree), strict=True)):
        send, receive = sent[number].sum(1).tolist(), received[number].sum(1).tolist()
        way = _Trip(company, first + number, send, receive, _Say.DISPATCH, _Say.DISPATCH_BACK)
        ways.append((way, way.begin(rows.index_select(0, chunk.tokens).to(compute))))
    compute_rows = prepare(local, int(received.sum()), hidden.device)
    for number, (way, token) in enumerate(ways):
        rows_here = way.end(token)
        _settle(hidden.device)
        start_s = time.perf_counter()
        output = _compute_received(rows_here, received[number], compute_rows)
        _settle(hidden.device)  # it is copied to the host next in any case
        company.note(shard.site, len(rows_here), time.perf_counter() - start_s)
        back = _Trip(company, way.call, way.receive, way.send, _Say.COMBINE, _Say.COMBINE_BACK)
        backs.append((back, back.begin(output)))
    totals = []
    cuts = zip(chunks, backs, _cut(hidden, company.degree), _cut(routing.weights, company.degree), strict=True)
    for chunk, (back, token), rows, weights in cuts:
        weighted = back.end(token) * weights.reshape(-1)[chunk.rows].unsqueeze(-1)
        totals.append(weighted.new_zeros(rows.shape).index_add(0, chunk.tokens, weighted))
    return torch.cat(totals).to(hidden.dtype)


def _settle(device: torch.device) -> None:
    """Wait for what was started on a device, so that its compute is timed and not how long it takes to start it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class _Chunk:
    """Some tokens' slots, sorted by the place of their experts."""

    def __init__(self, index: Tensor, places: Tensor, slots: int, num_experts: int) -> None:
        key = places[index.reshape(-1)]
        self.counts = torch.bincount(key, minlength=num_experts + 1)[:num_experts]
        self.rows = key.argsort(stable=True)[: int(self.counts.sum())]  # empty slots come last
        self.tokens = self.rows.div(slots, rounding_mode="floor")


def _cut(tensor: Tensor, degree: int) -> tuple[Tensor, ...]:
    return tensor.tensor_split(degree)  # as many on every rank, however few tokens it has


def _compute_received(rows: Tensor, counts: Tensor, compute_rows: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Run the experts on rows that came rank by rank, each rank's sorted by expert; ``counts`` is [ranks, experts]."""
    size, num_experts = counts.shape
    expert = torch.arange(num_experts).repeat(size).repeat_interleave(counts.reshape(-1))
    order = expert.argsort(stable=True).to(rows.device)
    output = compute_rows(rows.index_select(0, order), counts.sum(0).to(rows.device))
    return output.index_select(0, order.argsort())


class _Trip:
    """One exchange of a call, and the exchange of its gradients the other way."""

    def __init__(
        self, company: Company, call: int, send: list[int], receive: list[int], says: _Say, says_back: _Say
    ) -> None:
        self.company, self.call, self.send, self.receive = company, call, send, receive
        self._says, self._says_back = says, says_back
        self._arrival: Arrival | None = None

    def begin(self, rows: Tensor) -> Tensor:
        """Let ``rows`` go; return a token for :meth:`end`."""
        token: Tensor = _Begin.apply(rows, self)  # type: ignore[no-untyped-call]
        return token

    def end(self, token: Tensor) -> Tensor:
        """Wait for what comes."""
        rows: Tensor = _End.apply(token, self)  # type: ignore[no-untyped-call]
        return rows

    def go(self, rows: Tensor) -> None:
        self.company.announce(self._says, self.call)
        self._arrival = self.company.exchange.all_to_all(rows.detach(), self.send, self.receive)

    def go_back(self, gradient: Tensor) -> None:
        self.company.announce(self._says_back, self.call)
        self._arrival = self.company.exchange.all_to_all(gradient, self.receive, self.send)

    def arrive(self) -> Tensor:
        arrival, self._arrival = self._arrival, None
        assert arrival is not None, "nothing is on its way"
        return arrival.wait()


class _Begin(torch.autograd.Function):
    """Begins an exchange; its backward ends that of the gradients, which the backward of :class:`_End` began."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, trip: _Trip) -> Tensor:  # Any: torch's context
        ctx.trip = trip
        trip.go(rows)
        return rows.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.arrive(), None


class _End(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, trip: _Trip) -> Tensor:  # Any: torch's context
        ctx.trip = trip
        return trip.arrive()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.trip.go_back(gradients[0].contiguous())
        return gradients[0].new_empty(0), None
