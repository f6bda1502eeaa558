"""Switches of a whole process that change what blocks compute: read on the driver, set where the blocks are.

They are read once a step, and some whenever microbatches take turns, so most of them are read as torch itself reads
them, without its public names around that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import nn

_C: Final = torch._C
_TINY: Final = 2.0**-1022
"""Half of it is no normal number."""
_LIBRARIES: Final = ("generic", *4 * ("cuda",), *4 * ("mkldnn",))
_OPERATIONS: Final = ("all", *2 * ("all", "matmul", "conv", "rnn"))
"""Of what torch's newer words for precision are said; of all first, since it is said of each then."""
_newer: Final = _C._get_fp32_precision_getter


@dataclass(frozen=True, slots=True)
class Switch:
    """A switch as this process has it."""

    name: str
    get: Callable[[], Any]  # Any: what can be compared, and pickled
    set: Callable[[Any], object]
    is_quick: bool = True
    """Whether it is read in a moment; what is not is seldom switched around the blocks of one step."""

    def bring_to(self, value: Any) -> None:  # Any: what get() has returned somewhere
        """Set it, if it is not that already: some are there to be read only, where the device is not."""
        if self.get() != value:
            self.set(value)


@dataclass(frozen=True, slots=True)
class ProcessSwitches:
    """What user code may have switched for its process."""

    values: tuple[Any, ...]
    """As :data:`SWITCHES` names them."""

    @classmethod
    def current(cls) -> ProcessSwitches:
        """Read those of this process."""
        return cls(tuple([get() for get in _GETTERS]))

    def set(self) -> None:
        """Let this process have them, for what follows."""
        for switch, value in zip(SWITCHES, self.values, strict=True):
            switch.bring_to(value)


# ----------------------------------------------------------------------- the switches


def _precision() -> tuple[Any, ...]:
    """What products of float32 are rounded to, in torch's older and newer words."""
    try:
        older: tuple[Any, ...] = _C._get_float32_matmul_precision(), _C._get_cudnn_allow_tf32()
    except RuntimeError:
        older = _read(_C._get_float32_matmul_precision), _read(_C._get_cudnn_allow_tf32)
    return (*older, *map(_newer, _LIBRARIES, _OPERATIONS))


def _read(get: Callable[[], Any]) -> Any:
    """Read an older word; None where newer words have said something else, and torch refuses to mix them."""
    try:
        return get()
    except RuntimeError:
        return None


def _set_precision(values: Sequence[Any]) -> None:
    of_matmul, of_cudnn, *newer = values
    if of_matmul not in (None, _read(_C._get_float32_matmul_precision)):
        _C._set_float32_matmul_precision(of_matmul)
    if of_cudnn not in (None, _read(_C._get_cudnn_allow_tf32)):
        _C._set_cudnn_allow_tf32(of_cudnn)
    for library, operation, value in zip(_LIBRARIES, _OPERATIONS, newer, strict=True):  # what the older ones set, too
        if _newer(library, operation) != value:
            _C._set_fp32_precision_setter(library, operation, value)


def _precision_of_products() -> tuple[Any, ...]:
    """Of all that is said of precision, what a step is likely to switch around its blocks."""
    return _read(_C._get_float32_matmul_precision), _newer("cuda", "matmul")


def _set_precision_of_products(values: tuple[Any, ...]) -> None:
    of_matmul, of_cuda = values
    if of_matmul is not None:
        _C._set_float32_matmul_precision(of_matmul)
    if _newer("cuda", "matmul") != of_cuda:
        _C._set_fp32_precision_setter("cuda", "matmul", of_cuda)


def flushes_denormal() -> bool:
    """Whether this thread takes numbers that are no normal ones for zeros; torch can set that, and not tell it."""
    return _TINY * 0.5 == 0.0


def _path_of_einsum() -> str | None:
    """How einsum finds the order in which it contracts; None where it takes its operands from left to right."""
    how = torch.backends.opt_einsum
    return how.strategy if how.enabled else None


def _set_path_of_einsum(strategy: str | None) -> None:
    how: Any = torch.backends.opt_einsum
    how.enabled = strategy is not None
    if strategy is not None:
        how.strategy = strategy


def _use_flash_attention(name: str | None) -> None:
    if name is None:
        nn.attention.restore_flash_attention_impl()
    else:
        nn.attention.activate_flash_attention_impl(name)


def _of_torch(name: str, getter: str = "", setter: str = "", *, is_quick: bool = True) -> Iterator[Switch]:
    """Yield a switch by what reads and sets it in torch; nothing where this version of torch has none."""
    get = getattr(_C, getter or f"_get_{name}", None)
    put = getattr(_C, setter or f"_set_{name}", None)
    if get is not None and put is not None:
        yield Switch(name, get, put, is_quick)


def _pair_of_torch(name: str) -> Iterator[Switch]:
    """Yield a switch that is a pair in newer versions of torch."""
    yield from (_paired(one) if isinstance(one.get(), tuple) else one for one in _of_torch(name))


def _paired(switch: Switch) -> Switch:
    put = switch.set
    return Switch(switch.name, switch.get, lambda pair: put(*pair))


def _library(name: str) -> Iterator[Switch]:
    """Yield the choice of a library, as a number: its type cannot be pickled."""
    get = getattr(_C, f"_get_{name}_preferred_backend", None)
    if get is None:
        return
    kinds, put = type(get()), getattr(_C, f"_set_{name}_preferred_backend")
    yield Switch(f"{name}_library", lambda: int(get()), lambda value: put(kinds(value)), is_quick=False)


def _all() -> Iterator[Switch]:
    looks, for_nan = torch.is_anomaly_enabled, torch.is_anomaly_check_nan_enabled
    yield Switch("anomaly", looks, lambda value: torch.set_anomaly_enabled(value, for_nan()))
    yield Switch("anomaly_check_nan", for_nan, lambda value: torch.set_anomaly_enabled(looks(), value))
    uses, warns = _C._get_deterministic_algorithms, _C._get_deterministic_algorithms_warn_only
    use = torch.use_deterministic_algorithms
    yield Switch("deterministic", uses, lambda value: use(value, warn_only=warns()))
    yield Switch("deterministic_warn_only", warns, lambda value: use(uses(), warn_only=value))
    yield from _of_torch("deterministic_fill_uninitialized_memory")
    yield Switch("default_dtype", torch.get_default_dtype, torch.set_default_dtype)
    yield Switch("flush_denormal", flushes_denormal, torch.set_flush_denormal)
    yield Switch("precision", _precision, _set_precision, is_quick=False)
    yield from _of_torch("onednn_allow_tf32")
    for kind in ("fp16", "bf16"):
        yield from _pair_of_torch(f"cublas_allow_{kind}_reduced_precision_reduction")
    yield from _of_torch("cublas_allow_fp16_accumulation")
    yield from _of_torch("cpu_allow_fp16_reduced_precision_reduction")
    yield from _of_torch("math_sdp_allow_fp16_bf16_reduction")
    # Kernels.
    for name in ("cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic"):
        yield from _of_torch(name)
    for name in ("mkldnn_enabled", "mkldnn_deterministic", "nnpack_enabled", "miopen_immediate"):
        yield from _of_torch(name)
    limit = "cudnn_benchmark_limit"
    yield from _of_torch(limit, f"_cuda_get_{limit}", f"_cuda_set_{limit}", is_quick=False)
    for name in ("cudnn_depthwise_kernel", "qengine"):
        yield from _of_torch(name, is_quick=False)
    for name in ("blas", "linalg", "rocm_fa"):
        yield from _library(name)
    for name in ("flash", "mem_efficient", "math", "cudnn", "overrideable"):
        yield from _of_torch(f"{name}_sdp", f"_get_{name}_sdp_enabled", f"_set_sdp_use_{name}")
    yield _PRIORITIES
    if hasattr(nn.attention, "current_flash_attention_impl"):
        yield Switch("flash_attention", nn.attention.current_flash_attention_impl, _use_flash_attention, is_quick=False)
    mha: Any = torch.backends.mha
    private = "_is_fastpath_enabled"  # what the public getter returns, behind two more calls
    get = functools.partial(getattr, mha, private) if hasattr(mha, private) else mha.get_fastpath_enabled
    yield Switch("encoder_fast_path", get, mha.set_fastpath_enabled)
    if torch.backends.opt_einsum.is_available():
        yield Switch("path_of_einsum", _path_of_einsum, _set_path_of_einsum, is_quick=False)


_PRIORITIES: Final = Switch(
    "sdp_priority_order",
    lambda: tuple(_C._get_sdp_priority_order()),
    lambda value: _C._set_sdp_priority_order([*value]),
)
SWITCHES: Final[Sequence[Switch]] = tuple(_all())
"""All of them, in the order in which they are set."""
QUICK: Final[Sequence[Switch]] = (
    *(switch for switch in SWITCHES if switch.is_quick and switch is not _PRIORITIES),
    Switch(_PRIORITIES.name, _C._get_sdp_priority_order, _C._set_sdp_priority_order),
    Switch("precision of products", _precision_of_products, _set_precision_of_products),
)
"""What a step may switch around its blocks for each microbatch."""
_GETTERS: Final = [switch.get for switch in SWITCHES]
