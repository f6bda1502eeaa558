"""How much of the blocks' compute a token really gets, where stages are skipped and slots are empty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from skippipe_plugin.moe.attach import RouterStatistics
from skippipe_plugin.moe.families import find_routers


@dataclass(frozen=True, slots=True)
class BlockSize:
    """The parameters that work on a token that visits a block; each makes one multiply-add in a forward."""

    dense: int
    """Of everything but experts."""
    experts: Mapping[str, tuple[int, int]]
    """By router: the parameters of one expert, and how many experts a token chooses."""

    @property
    def whole(self) -> int:
        """When no slot is empty."""
        return self.dense + sum(size * slots for size, slots in self.experts.values())


def block_size(block: nn.Module, name: str) -> BlockSize:
    """Measure ``block``, which the model calls ``name``."""
    experts: dict[str, tuple[int, int]] = {}
    spread = 0
    sites = find_routers(block)
    for module in {id(site.experts): site.experts for site in sites.values()}.values():
        spread += sum(parameter.numel() for parameter in module.parameters())
    for router, site in sites.items():
        size = sum(parameter.numel() for parameter in site.experts.parameters())
        experts[f"{name}.{router}"] = size // site.num_experts, site.top_k
    total = sum(parameter.numel() for parameter in block.parameters())
    return BlockSize(total - spread, experts)


def spent_share(
    sizes: Sequence[BlockSize], visited: Sequence[float], statistics: Mapping[str, RouterStatistics]
) -> float:
    """Return the share of the blocks' forward products that was spent, of all blocks with every slot filled.

    Attention's products of tokens with each other are left out.

    Args:
        sizes: By block.
        visited: By block: the share of the tokens that visited it.
        statistics: By router: what the tokens that came by have chosen.
    """
    spent = 0.0
    for size, share in zip(sizes, visited, strict=True):
        work = float(size.dense)
        for router, (expert, slots) in size.experts.items():
            seen = statistics.get(router)
            filled = int(seen.loads.sum()) / seen.num_tokens if seen is not None and seen.num_tokens else slots
            work += expert * filled
        spent += share * work
    return spent / max(1, sum(size.whole for size in sizes))
