"""Runs code without chance, and keeps a copy of each of some tensors before the code writes into it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def _half(args: Mapping[str, Any], low: str, high: str) -> float:
    return (float(args[low]) + float(args[high])) / 2


_aten = torch.ops.aten
_EXPECTED: Final[Mapping[Any, Callable[[Mapping[str, Any]], Any]]] = {
    _aten.bernoulli_.float: lambda a: a["p"],
    _aten.bernoulli.p: lambda a: a["p"],
    _aten.bernoulli_.Tensor: lambda a: a["p"],
    _aten.bernoulli.default: lambda a: a["self"],
    _aten.uniform_.default: lambda a: _half(a, "from", "to"),
    _aten.normal_.default: lambda a: a["mean"],
    _aten.exponential_.default: lambda a: 1.0 / a["lambd"],
    _aten.rand.default: lambda _: 0.5,
    _aten.rand_like.default: lambda _: 0.5,
    _aten.randn.default: lambda _: 0.0,
    _aten.randn_like.default: lambda _: 0.0,
}
"""By random function: what takes the place of all that it draws. It is what it draws on the average."""


class WithoutChance(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    """Lets random functions give the same to every sample, with which dropout is the identity.

    Args:
        kept: Tensors that may be written into, by an alias of them as well.
    """

    def __init__(self, kept: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.copies: list[tuple[Tensor, Tensor]] = []
        """What was written into, and what it was before."""
        self._kept: dict[int, list[Tensor]] = {}
        for tensor in kept:
            if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta:
                self._kept.setdefault(tensor.untyped_storage().data_ptr(), []).append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._kept and func._schema.is_mutable:
            self._keep(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is _aten.native_dropout.default:
            return args[0].clone(), torch.ones_like(result[1])
        if func in _EXPECTED and isinstance(result, Tensor):
            names = [each.name for each in func._schema.arguments]
            defaults = {each.name: each.default_value for each in func._schema.arguments if each.has_default_value()}
            value = _EXPECTED[func]({**defaults, **dict(zip(names, args, strict=False)), **kwargs})
            result.copy_(value) if isinstance(value, Tensor) else result.fill_(value)
        return result

    def _keep(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for index, each in enumerate(func._schema.arguments):
            if each.alias_info is None or not each.alias_info.is_write:
                continue
            value = args[index] if index < len(args) else kwargs.get(each.name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                    for known in self._kept.pop(tensor.untyped_storage().data_ptr(), ()):
                        self.copies.append((known, known.detach().clone()))
