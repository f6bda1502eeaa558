"""Experts of two layers, brought into one order before their weights are averaged.

Experts are interchangeable: the third of one layer has nothing to do with the third of the next, so their average would
be neither. They are matched by their weights first, one to one, as neurons of two networks are in Git Re-Basin
(Ainsworth et al., arXiv 2209.04836, section 3), and the router's rows and biases go with them. A mixture of experts is
recognised by names and shapes alone: tensors below ``experts`` beside a ``gate`` or ``router``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

State = Mapping[str, Tensor]

_EXPERTS: Final = re.compile(r"(?P<layer>(?:.*\.)?)experts\.(?:(?P<expert>\d+)\.)?(?P<rest>.+)")
_ROUTER: Final = re.compile(r"(?P<router>gate|router|routers\.\d+)\.(?P<rest>.+)")


@dataclass(frozen=True, slots=True)
class Mixture:
    """The tensors of one mixture of experts in a block's state that have a part for each expert."""

    num_experts: int
    parts: tuple[tuple[str, ...], ...]
    """Each the name of a tensor whose first rows are the experts' (others may follow: null experts), or, for experts
    that are modules of their own, the names of their tensors in order."""

    def rows(self, state: State, names: Sequence[str]) -> Tensor:
        """Return one of :attr:`parts` of ``state`` as [experts, numbers]."""
        each = state[names[0]][: self.num_experts] if len(names) == 1 else torch.stack([state[n] for n in names])
        return each.reshape(self.num_experts, -1)

    def reordered(self, state: State, order: Sequence[int]) -> dict[str, Tensor]:
        """Return the mixture's tensors with expert ``order[k]`` in place k."""
        result: dict[str, Tensor] = {}
        for names in self.parts:
            if len(names) == 1:
                tensor = state[names[0]]
                result[names[0]] = torch.cat([tensor[list(order)], tensor[self.num_experts :]])
            else:
                result |= {name: state[names[expert]] for name, expert in zip(names, order, strict=True)}
        return result


def align_experts(reference: State, other: State) -> dict[str, Tensor]:
    """Return ``other`` with the experts of each mixture in the order of those of ``reference`` that they resemble most.

    What the mixture computes stays the same, unless its router chooses among fixed groups of experts. Blocks without
    experts come back as they are.

    Args:
        reference: The state of a block.
        other: The state of a block of the same names and shapes.
    """
    result = dict(other)
    for mixture in find_mixtures(reference):
        result |= mixture.reordered(other, match_experts(mixture, reference, other))
    return result


def match_experts(mixture: Mixture, reference: State, other: State) -> list[int]:
    """Return for each expert of ``reference`` the one of ``other`` that belongs to it, each once.

    The sum over experts and tensors of the cosines of their weights is as large as it can be, so that a router's row
    counts as much as a matrix of the expert.
    """
    from scipy.optimize import linear_sum_assignment

    similarity = torch.zeros(mixture.num_experts, mixture.num_experts, dtype=torch.float64)
    for names in mixture.parts:
        ours, theirs = (mixture.rows(state, names) for state in (reference, other))
        if ours.shape[1] > 1:  # a single number, such as a bias of the router, has no direction
            similarity += _directions(ours) @ _directions(theirs).T
    order: list[int] = linear_sum_assignment(similarity.numpy(), maximize=True)[1].tolist()
    return order


def _directions(rows: Tensor) -> Tensor:
    wide = rows.detach().to("cpu", torch.float64)
    lengths: Tensor = wide.norm(dim=1, keepdim=True)
    return wide / lengths.clamp(min=torch.finfo(torch.float64).tiny)


def find_mixtures(state: State) -> list[Mixture]:
    """Recognise the mixtures of experts in a block's state."""
    layers: dict[str, list[re.Match[str]]] = {}
    for name in state:
        if (match := _EXPERTS.fullmatch(name)) is not None:
            layers.setdefault(match["layer"], []).append(match)
    found = (_mixture(state, layer, matches) for layer, matches in layers.items())
    return [mixture for mixture in found if mixture is not None]


def _mixture(state: State, layer: str, matches: Sequence[re.Match[str]]) -> Mixture | None:
    """Return the mixture below the module ``layer``; None if it has no equal experts, or no router."""
    names = [match.string for match in matches]
    if all(match["expert"] is not None for match in matches):
        parts = _listed(matches)
        num_experts = len({match["expert"] for match in matches})
    else:
        parts = [(name,) for name in names]
        num_experts = max(len(state[name]) if state[name].ndim else 0 for name in names)
    if any(len(part) == 1 and state[part[0]].shape[:1] != (num_experts,) for part in parts) or num_experts < 2:
        return None
    router = list(_router_parts(state, layer, num_experts))
    return Mixture(num_experts, (*parts, *router)) if router else None


def _listed(matches: Sequence[re.Match[str]]) -> list[tuple[str, ...]]:
    """Group the tensors of experts that are modules by what they are called there, in order of the experts."""
    groups: dict[str, dict[int, str]] = {}
    for match in matches:
        groups.setdefault(match["rest"], {})[int(match["expert"])] = match.string
    return [tuple(name for _, name in sorted(group.items())) for group in groups.values()]


def _router_parts(state: State, layer: str, num_experts: int) -> Iterator[tuple[str, ...]]:
    """Yield the tensors of the routers beside the experts that have a row for each of them."""
    routers: dict[str, list[str]] = {}
    for name in state:
        match = _ROUTER.fullmatch(name.removeprefix(layer)) if name.startswith(layer) else None
        if match is not None:
            routers.setdefault(match["router"], []).append(name)
    for names in routers.values():
        outputs = [name for name in names if state[name].ndim in (1, 2) and not _feeds(state, name, names)]
        sizes = [len(state[name]) for name in outputs if state[name].ndim == 2 and len(state[name]) >= num_experts]
        yield from ((name,) for name in outputs if len(state[name]) in sizes[:1])


def _feeds(state: State, name: str, names: Sequence[str]) -> bool:
    """Tell whether a later matrix takes in what ``name`` puts out: then its rows are not experts."""
    later = names[names.index(name) + 1 :]
    return any(state[other].ndim == 2 and state[other].shape[1] == len(state[name]) for other in later)
