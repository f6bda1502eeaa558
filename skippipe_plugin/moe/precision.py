"""Selection biases that are moved by small steps stay in float32, whatever the precision of the model.

In bfloat16 a step of 0.001 is less than half a unit in the last place of any bias above 0.25, and so is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from skippipe_plugin.moe.families import RouterSite, find_routers


def widen_biases(sites: Iterable[RouterSite]) -> None:
    """Let the routers' own selection biases be float32 at least, as the authors of DeepSeek-V3 keep theirs."""
    for site in sites:
        if site.bias is not None:
            bias: Tensor = getattr(site.router, site.bias)
            _put(site.router, site.bias, bias.to(torch.promote_types(bias.dtype, torch.float32)))


@contextmanager
def kept_biases(model: nn.Module) -> Iterator[None]:
    """Keep the selection biases' values and float32 while the body changes the precision of ``model``."""
    sites = [site for site in find_routers(model).values() if site.bias is not None]
    widen_biases(sites)
    before = [getattr(site.router, site.bias or "").detach().clone() for site in sites]
    yield
    for site, value in zip(sites, before, strict=True):
        assert site.bias is not None
        now: Tensor = getattr(site.router, site.bias)
        if torch.promote_types(now.dtype, value.dtype) != now.dtype:
            _put(site.router, site.bias, value.to(now.device))


def _put(router: nn.Module, name: str, value: Tensor) -> None:
    bias = getattr(router, name)
    if isinstance(bias, nn.Parameter):
        bias.data = value
    else:
        setattr(router, name, value)
