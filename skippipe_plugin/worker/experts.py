"""The experts of a worker's stages that are spread over the stages' replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.control.values import ExpertCost
from ..engine.exchange import GroupExchange
from ..engine.gradients import sum_over_holders
from ..engine.handover import swap_memory
from ..engine.optimizer import StageOptimizer
from ..engine.stage import Stage
from ..engine.transport import Transport
from ..moe.attach import RouterHook
from ..moe.experts import hidden_size
from ..moe.overlap import OverlapTuner
from ..moe.parallel import SHARD, Company, Placement, Shard, weights_of
from ..moe.shards import has_rows, moved_rows, moves, take_shard
from ..schedule import Event

Key = tuple[int, str]
"""A block's number, and the name of its experts or of one of their tensors."""


class SpreadExperts:
    """Which experts are here, who has the others, and how gradients of several holders are summed."""

    def __init__(self) -> None:
        self._placements: dict[int, dict[Key, Placement]] = {}
        self._tensors: dict[Key, Key] = {}
        self._ranks: dict[int, tuple[int, ...]] = {}
        self._companies: dict[int, Company] = {}
        self._holders: dict[int, str] = {}
        self._position = 0
        self._overlap = 1
        self._tunes = False
        self._tuners: dict[int, OverlapTuner] = {}
        self._measures: set[int] = set()

    # ------------------------------------------------------------ generations

    def form(self, transport: Transport, groups: Iterable[tuple[int, Sequence[Sequence[int]]]]) -> None:
        """Form the groups of a generation: by stage, the ranks that share a set of all experts, several times."""
        self._ranks, self._holders, self._companies = {}, {}, {}
        for stage, sets in groups:
            own = next((tuple(ranks) for ranks in sets if transport.rank in ranks), None)
            if own is None:
                continue
            self._position = own.index(transport.rank)
            self._ranks[stage] = own
            transport.form_subgroup(_set_name(stage, own), own)
            if len(sets) > 1:
                self._holders[stage] = f"holders {stage} {self._position}"
                transport.form_subgroup(self._holders[stage], [ranks[self._position] for ranks in sets])

    def bind(self, transport: Transport | None, stages: Mapping[int, Stage]) -> None:
        """Connect the experts that are here with the others, once both stages and groups are there."""
        for each in stages.values():
            each.company = None
        for stage, ranks in self._ranks.items():
            if transport is None or stage not in stages or stage not in self._placements:
                continue
            placements, blocks = self._placements[stage], stages[stage].blocks
            modules = [blocks[block].get_submodule(path) for block, path in placements]
            company = Company(GroupExchange(transport, _set_name(stage, ranks), ranks), modules)
            for number, (module, placement) in enumerate(zip(modules, placements.values(), strict=True)):
                setattr(module, SHARD, Shard(company, number, placement))
            for hook in _hooks(blocks.values()):
                hook.company = company
            self._companies[stage] = stages[stage].company = company

    def begin_step(self) -> None:
        """Begin a step or an evaluation round; the first rank of each set says with which degree of overlap."""
        self._measures.clear()
        for stage, company in self._companies.items():
            company.begin_step()
            tuner = self._tuners.get(stage)
            if tuner is None:
                company.degree = self._overlap
                continue
            said = torch.zeros(2, dtype=torch.int64)
            if company.exchange.position == 0:
                said += torch.tensor([tuner.degree, tuner.is_tuning])
            company.exchange.sum(said)
            company.degree = int(said[0])
            if said[1]:
                self._measures.add(stage)

    @property
    def wants_times(self) -> bool:
        """Whether the step's actions are to be timed: the degree of overlap is on trial."""
        return bool(self._measures)

    def end_step(self, events: Iterable[Event]) -> None:
        """Note what a training step took, where its degree of overlap is on trial."""
        took = dict.fromkeys(self._measures, 0.0)
        count = dict.fromkeys(self._measures, 0)
        for event in events:
            if event.action.stage in took:
                took[event.action.stage] += event.duration_s
                count[event.action.stage] += 1
        for stage in sorted(took):
            sums = torch.tensor([took[stage], count[stage]], dtype=torch.float64)
            self._companies[stage].exchange.sum(sums)
            if sums[1]:
                self._tuners[stage].note(float(sums[0] / sums[1]))

    # ----------------------------------------------------------------- stages

    def forget(self, overlap: int | str) -> None:
        """Drop what was said of stages that are not here any more; the coming ones have this degree of overlap."""
        self._placements, self._tensors, self._tuners = {}, {}, {}
        self._overlap = 1 if isinstance(overlap, str) else overlap
        self._tunes = isinstance(overlap, str)

    def cut(self, stage: int, blocks: Mapping[int, nn.Module], described: Iterable[Sequence[Any]]) -> None:
        """Keep only this rank's experts of a stage that has just come; those with values came cut already."""
        self._placements[stage] = {}
        if self._tunes:
            self._tuners[stage] = OverlapTuner()
        for number, path, placement, tensors, position in described:
            self._placements[stage][number, path] = tuple(placement)
            for name in tensors:
                self._tensors[number, name] = number, path
                tensor = _tensor(blocks[number], name)
                if len(tensor) == len(placement):
                    swap_memory(tensor, take_shard(tensor, tuple(placement), position))

    def measured(self, stages: Mapping[int, Stage], optimizer: StageOptimizer | None) -> list[ExpertCost]:
        """Return what the experts here took since the last time."""
        result: list[ExpertCost] = []
        for stage, company in self._companies.items():
            for number, (block, path) in enumerate(self._placements[stage]):
                tensors = self._moving((block, path), stages[stage], optimizer)
                rows, seconds = company.measured.pop(number, (0, 0.0))
                module = stages[stage].blocks[block].get_submodule(path)
                weights = weights_of(module)
                row_bytes = hidden_size(weights) * weights.up.element_size()
                expert_bytes = sum(tensor[0].numel() * tensor.element_size() for tensor in tensors)
                result.append((block, path, rows, seconds, row_bytes, expert_bytes))
        return result

    def move(
        self, orders: Iterable[Sequence[Any]], stages: Mapping[int, Stage], optimizer: StageOptimizer | None
    ) -> None:
        """Move experts to other places, with their gradients and optimizer state; the others do so at the same time."""
        for block, path, target in orders:
            for stage, company in self._companies.items():
                if (block, path) in self._placements[stage]:
                    self._move_one(stage, (block, path), tuple(target), stages[stage], optimizer, company)

    def _move_one(
        self,
        stage: int,
        key: Key,
        target: Placement,
        held: Stage,
        optimizer: StageOptimizer | None,
        company: Company,
    ) -> None:
        before, exchange = self._placements[stage][key], company.exchange
        send, receive = moves(before, target, exchange.position)
        leave, arrive = moved_rows(send, receive, before, target, exchange.position)
        counts = [len(each) for each in send], [len(each) for each in receive]
        for tensor in self._moving(key, held, optimizer):
            with torch.no_grad():
                tensor[arrive] = exchange.all_to_all(tensor[leave], *counts).wait()
        self._placements[stage][key] = target
        module = held.blocks[key[0]].get_submodule(key[1])
        shard: Shard = getattr(module, SHARD)
        setattr(module, SHARD, replace(shard, placement=target))

    def _moving(self, key: Key, stage: Stage, optimizer: StageOptimizer | None) -> list[Tensor]:
        """Return the tensors with a row for each expert of a layer that is here, in an order that all ranks have."""
        state = {} if optimizer is None else optimizer.state()
        found: list[Tensor] = []
        for (block, name), site in self._tensors.items():
            if site == key:
                tensor = _tensor(stage.blocks[block], name)
                entries = state.get((block, name), {})
                found.append(tensor)
                found += [] if tensor.grad is None else [tensor.grad]
                found += [entries[each] for each in sorted(entries) if has_rows(entries[each], len(tensor))]
        return found

    def parameters(self, stages: Mapping[int, Stage]) -> list[nn.Parameter]:
        """Return the parameters of which only some rows are here."""
        return [p for stage in stages.values() for p in self._split(stage)[1]]

    def sum_gradients(self, stage: Stage, over_replicas: Callable[[Tensor], None], transport: Transport) -> None:
        """Sum a stage's gradients: dense parts over all replicas, experts over those that hold the same ones."""
        dense, spread = self._split(stage)
        sum_over_holders(dense, over_replicas)
        if stage.index in self._holders:
            name = self._holders[stage.index]
            sum_over_holders(spread, lambda tensor: transport.all_reduce(tensor, name))

    def _split(self, stage: Stage) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        dense: list[nn.Parameter] = []
        spread: list[nn.Parameter] = []
        for block, name, parameter in stage.named_parameters():
            (spread if (block, name) in self._tensors else dense).append(parameter)
        return list(dict.fromkeys(dense)), spread


def _set_name(stage: int, ranks: Sequence[int]) -> str:
    """Name a group of its own: groups of one name would meet each other's ranks."""
    return f"experts {stage} {ranks[0]}"


def _tensor(block: nn.Module, name: str) -> Tensor:
    path, _, leaf = name.rpartition(".")
    tensor: Tensor = getattr(block.get_submodule(path), leaf)
    return tensor


def _hooks(modules: Iterable[nn.Module]) -> list[RouterHook]:
    found = (hook for block in modules for module in block.modules() for hook in module._forward_hooks.values())
    return [hook for hook in found if isinstance(hook, RouterHook)]
