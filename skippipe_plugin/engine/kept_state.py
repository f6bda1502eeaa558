"""What a block keeps from one forward to the next: buffers, numbers in attributes, parameters that it writes into."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from .attributes import have_equal_bits, own_attributes
from .without_chance import WithoutChance

_TOLERANCE: Final = 1e-5
_COARSE: Final = 3e-2
_SHAKE: Final = 0.01
_NUMBERS: Final = (bool, int, float)
Values = Mapping[str, Any]
"""By name: a tensor, or a number."""


class Buffers:
    """The buffers of a block as they are now, and which tensors they are; in training its parameters, too."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        weights = dict(module.named_parameters()) if module.training else {}
        self._weights = {name: (each, each.detach().clone()) for name, each in weights.items() if not each.is_meta}
        self._tables = [(part._buffers, dict(part._buffers)) for part in dict.fromkeys(module.modules())]
        self._copies = {
            id(tensor): (tensor, tensor.detach().clone())
            for _, table in self._tables
            for tensor in table.values()
            if tensor is not None
        }
        self._by_name = {name: self._copies[id(each)][1] for name, each in module.named_buffers()}

    def changed(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Name the buffers, and the parameters, that are new, or not, bit by bit, what they were."""
        now, known = dict(self._module.named_buffers()), self._by_name
        buffers = [name for name in known if name not in now or not have_equal_bits(now[name], known[name])]
        buffers += [name for name in now if name not in known]
        weights = [name for name, (each, copy) in self._weights.items() if not have_equal_bits(each, copy)]
        return tuple(buffers), tuple(weights)

    def restore(self) -> None:
        """Bring them back, those too that were replaced or have got another size."""
        with torch.no_grad():
            for tensor, copy in self._copies.values():
                if tensor.shape != copy.shape:
                    tensor.resize_(copy.shape)
                if tensor.layout != torch.strided or not torch.equal(tensor, copy):
                    tensor.copy_(copy)
            for weight, copy in self._weights.values():
                if not have_equal_bits(weight, copy):
                    weight.data.copy_(copy)
        for current, table in self._tables:
            current.clear()
            current.update(table)


class KeptState:
    """Lets a block run several times from the same state, which is back at the end, and reads what runs leave.

    Args:
        module: The block.
        aside: The parts of it that are not looked at.
    """

    def __init__(self, module: nn.Module, aside: Callable[[nn.Module], bool]) -> None:
        self._parts = {name: part for name, part in module.named_modules() if not aside(part)}
        self._parameters = {name: each for name, each in module.named_parameters() if not each.is_meta}
        self._buffers = Buffers(module)
        self._mode = WithoutChance([*self._parameters.values(), *module.buffers()])

    @contextmanager
    def without_chance(self) -> Iterator[None]:
        """Let no random function draw, and note what is written into parameters."""
        with self._mode:
            yield

    def restore(self) -> None:
        """Bring back buffers and parameters."""
        self._buffers.restore()
        with torch.no_grad():
            for tensor, copy in self._mode.copies:
                tensor.data.copy_(copy)

    def read(self) -> Values:
        """Return what there is now."""
        written = {id(tensor) for tensor, _ in self._mode.copies}
        values: dict[str, Any] = {
            name: each.detach().clone() for name, each in self._parameters.items() if id(each) in written
        }
        for path, part in self._parts.items():
            prefix = f"{path}." if path else ""
            values |= {f"{prefix}{n}": b.detach().clone() for n, b in part._buffers.items() if b is not None}
            own = own_attributes(part)
            values |= {f"{prefix}{n}": value for n, value in own.items() if type(value) in _NUMBERS}
        return values

    def written(self, before: Values, now: Values) -> list[str]:
        """Name what was written since :meth:`read` gave ``before``, if only with the same."""
        written = {id(tensor) for tensor, _ in self._mode.copies}
        buffers = {f"{path}.{n}".lstrip("."): b for path, part in self._parts.items() for n, b in part._buffers.items()}
        named = [name for name, buffer in buffers.items() if id(buffer) in written]
        return list(dict.fromkeys([*named, *(n for n in before if n not in now or not _is_equal(before[n], now[n]))]))

    def shake(self, names: Iterable[str]) -> None:
        """Change these buffers a little: what has settled by now, as spectral norms do, would not move any more."""
        noise = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name in names:
                path, _, own = name.rpartition(".")
                buffer = self._parts[path]._buffers.get(own) if path in self._parts else None
                if buffer is not None and buffer.is_floating_point():
                    drawn = 1 + _SHAKE * torch.rand(buffer.shape, generator=noise)
                    buffer.mul_(drawn.to(buffer))


def others(one: Values, other: Values) -> list[str]:
    """Name what is not the same in both, beyond rounding."""
    names = [name for name in one if name in other]
    return [name for name in names if not _same(one[name], other[name])]


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and (one == other or one != one)
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() and not one.is_complex():
        return torch.equal(one, other)
    tolerance = _COARSE if one.dtype in (torch.bfloat16, torch.float16) else _TOLERANCE
    scale = float(one.abs().nan_to_num(posinf=0.0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
