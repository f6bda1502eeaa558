"""Dropless expert compute: tokens sorted by expert, each expert a matrix product over its own tokens.

Nothing is padded and nothing is dropped; empty slots cost nothing. Two ways give the same result: a loop over the
experts' products, and ``torch.nn.functional.grouped_mm``. :func:`run_experts` takes the faster one
(``benchmarks/moe_layer.py``) among those that the device, dtype and sizes allow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from skippipe_plugin.moe.routing import Routing, count_loads

Method = Literal["auto", "loop", "grouped"]

ALIGNMENT_BYTES = 16  # of every stride, asked for by grouped_mm
FEW_TOKENS = 192  # per expert; below, the loop copies more gradient than it multiplies, and grouped_mm is faster


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The parameters of all experts of a layer, stacked along the first dimension."""

    up: Tensor
    """[experts, inner, dim], or [experts, dim, inner] if transposed; inner is twice the width where there is a gate."""
    down: Tensor
    """[experts, dim, width], or [experts, width, dim] if transposed."""
    activation: Callable[[Tensor], Tensor]
    """From [tokens, inner] to [tokens, width]; includes the gate."""
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    transposed: bool = False
    norm: Callable[[Tensor], Tensor] | None = None
    """Applied to an expert's output before the router's weight."""

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return len(self.up)

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """Return the weights in ``dtype``; gradients flow back to the originals."""
        return replace(
            self,
            up=self.up.to(dtype),
            down=self.down.to(dtype),
            up_bias=None if self.up_bias is None else self.up_bias.to(dtype),
            down_bias=None if self.down_bias is None else self.down_bias.to(dtype),
        )


def run_experts(hidden: Tensor, routing: Routing, experts: ExpertWeights, *, method: Method = "auto") -> Tensor:
    """Return for each token the weighted sum of its experts' outputs: ``[tokens, dim]`` in the type of ``hidden``.

    Under autocast the products run in the autocast type, which ``grouped_mm`` alone would not do. Differentiable in
    the hidden states, the router's weights and the experts, also for no tokens, empty experts and empty slots.
    """
    compute = compute_dtype(hidden, experts)
    experts = experts.to(compute)
    slots = routing.experts.shape[1]
    counts = count_loads(routing.experts, experts.num_experts)
    order = routing.experts.reshape(-1).argsort(stable=True)  # empty slots come last
    rows = order[: int(counts.sum())]
    token = rows.div(slots, rounding_mode="floor") if slots > 1 else rows
    compute_rows = prepare(experts, len(rows), hidden.device, method)
    output = compute_rows(hidden.index_select(0, token).to(compute), counts)
    weights = routing.weights.reshape(-1)[rows]
    # Sums of a token's experts are taken in the weights' precision, float32 at least.
    weighted = output * weights.unsqueeze(-1)
    total = weighted.new_zeros(hidden.shape).index_add(0, token, weighted)
    return total.to(hidden.dtype)


def prepare(
    experts: ExpertWeights, num_rows: int, device: torch.device, method: Method = "auto"
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the compute of ``num_rows`` rows in all, in one call or in several for chunks of them.

    A call takes rows [rows, dim] that are sorted by expert and of the experts' type, and how many of them each expert
    gets, [experts]. The weights are taken apart once for all calls, so that their gradients are put together once.
    """
    if _choose_method(method, num_rows, device, experts) == "grouped":
        return partial(_grouped, experts)
    return partial(_loop, _take_apart(experts))


def hidden_size(experts: ExpertWeights) -> int:
    """Return the size of the hidden states that the experts take and give."""
    return experts.up.shape[1 if experts.transposed else 2]


def compute_dtype(hidden: Tensor, experts: ExpertWeights) -> torch.dtype:
    """Return in which type the products run: the autocast type under autocast, else the experts' own."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else experts.up.dtype


def _choose_method(
    method: Method, num_rows: int, device: torch.device, experts: ExpertWeights
) -> Literal["loop", "grouped"]:
    possible = _can_group(num_rows, device, experts)
    if method == "auto":
        few = num_rows < FEW_TOKENS * experts.num_experts
        return "grouped" if possible and (few or device.type == "cuda") else "loop"
    if method == "grouped" and not possible:
        raise ValueError(
            f"grouped_mm takes float32, float16 or bfloat16, at least one token and sizes that are multiples of "
            f"{ALIGNMENT_BYTES} bytes; there are {num_rows} tokens in {experts.up.dtype}, experts of "
            f"{tuple(experts.up.shape)} and {tuple(experts.down.shape)}: use method='auto'"
        )
    return method


def _can_group(num_rows: int, device: torch.device, experts: ExpertWeights) -> bool:
    """Keep from ``grouped_mm`` what it refuses: other types, odd sizes, and backward without a single row."""
    if experts.up.dtype not in (torch.float32, torch.float16, torch.bfloat16) or num_rows == 0:
        return False
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return False
    sizes = {*experts.up.shape[1:], *experts.down.shape[1:]}
    return all(size * experts.up.element_size() % ALIGNMENT_BYTES == 0 for size in sizes)


@dataclass(frozen=True, slots=True)
class _Apart:
    """The weights of each expert for itself, as ``F.linear`` takes them."""

    experts: ExpertWeights
    ups: tuple[Tensor, ...]
    downs: tuple[Tensor, ...]
    up_biases: tuple[Tensor | None, ...]
    down_biases: tuple[Tensor | None, ...]


def _take_apart(experts: ExpertWeights) -> _Apart:
    """Unbind and do not index: the backward of ``up[expert]`` is a tensor of all experts' size, for each of them."""
    biases = (_unbind(bias, experts.num_experts) for bias in (experts.up_bias, experts.down_bias))
    return _Apart(experts, _as_linear(experts.up, experts), _as_linear(experts.down, experts), *biases)


def _loop(apart: _Apart, chosen: Tensor, counts: Tensor) -> Tensor:
    """Run one expert after the other on its rows.

    Temporaries of one expert's size stay in the caches; those of all rows would be paged in anew in every step.
    """
    experts, outputs = apart.experts, []
    pieces = torch.split(chosen, counts.tolist())
    used = [number for number, piece in enumerate(pieces) if len(piece)]
    for expert in used or [0]:  # without rows one still gives zeros as gradient
        inner = F.linear(pieces[expert], apart.ups[expert], apart.up_biases[expert])
        outputs.append(F.linear(experts.activation(inner), apart.downs[expert], apart.down_biases[expert]))
    output = torch.cat(outputs)
    return output if experts.norm is None else experts.norm(output)


def _as_linear(weight: Tensor, experts: ExpertWeights) -> tuple[Tensor, ...]:
    return tuple(each.t() for each in weight.unbind()) if experts.transposed else weight.unbind()


def _unbind(bias: Tensor | None, num_experts: int) -> tuple[Tensor | None, ...]:
    return (None,) * num_experts if bias is None else bias.unbind()


def _grouped(experts: ExpertWeights, chosen: Tensor, counts: Tensor) -> Tensor:
    """Run all experts in two calls of ``grouped_mm``."""
    if len(chosen) == 0:  # which its backward does not take
        return _loop(_take_apart(experts), chosen, counts)
    ends = counts.cumsum(0).to(torch.int32)
    up, down = experts.up, experts.down
    if not experts.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    inner = _add_bias(F.grouped_mm(chosen, up, offs=ends), experts.up_bias, counts)
    output = _add_bias(F.grouped_mm(experts.activation(inner).contiguous(), down, offs=ends), experts.down_bias, counts)
    return output if experts.norm is None else experts.norm(output)


def _add_bias(rows: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    return rows if bias is None else rows + bias.repeat_interleave(counts, dim=0, output_size=len(rows))
