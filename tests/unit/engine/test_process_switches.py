"""Every switch of torch's for the whole process reaches the workers, or changes nothing of what blocks compute."""

import importlib
import json
import pickle
import pkgutil
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Final

import pytest
import torch

from skippipe_plugin.engine.process_switches import SWITCHES, ProcessSwitches

# Ways that are no switch of this module's.
CALL: Final = "travels with the call of the blocks (Ambient)"
CONFIGURE: Final = "travels with the generation (Configure)"
SEED: Final = "blocks are seeded for each call"
SPEED: Final = "changes speed or memory, not results"
SAYS: Final = "changes what is printed or warned of"
CHECKS: Final = "raises where a sparse tensor is malformed, which is the same tensor without it"
KERNELS: Final = "takes kernels out that compute the same, on GPUs and with packages of their own"
SET: Final = "sets several of the others"

WAYS: Final = {
    "torch.set_anomaly_enabled": "anomaly",
    "torch.use_deterministic_algorithms": "deterministic",
    "torch.set_deterministic_debug_mode": "deterministic",
    "torch.set_default_dtype": "default_dtype",
    "torch.set_default_tensor_type": "default_dtype",
    "torch.set_default_device": CALL,
    "torch.set_flush_denormal": "flush_denormal",
    "torch.set_float32_matmul_precision": "precision",
    "torch.set_grad_enabled": CALL,
    "torch.set_num_threads": CONFIGURE,
    "torch.set_num_interop_threads": SPEED,
    "torch.set_printoptions": SAYS,
    "torch.set_warn_always": SAYS,
    "torch.set_rng_state": SEED,
    **{
        f"torch.set_autocast_{name}": CALL
        for name in (
            *("enabled", "dtype", "cache_enabled", "cpu_enabled", "cpu_dtype", "gpu_dtype", "ipu_enabled", "ipu_dtype"),
            *("xla_enabled", "xla_dtype"),
        )
    },
    "backends.fp32_precision": "precision",
    "backends.set_flags": SET,
    "backends.disable_global_flags": "forbids to set others",
    "cuda.matmul.allow_tf32": "precision",
    "cuda.matmul.allow_fp16_reduced_precision_reduction": "cublas_allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_reduced_precision_reduction_split_k": "cublas_allow_fp16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction": "cublas_allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_bf16_reduced_precision_reduction_split_k": "cublas_allow_bf16_reduced_precision_reduction",
    "cuda.matmul.allow_fp16_accumulation": "cublas_allow_fp16_accumulation",
    "cuda.matmul.fp32_precision": "precision",
    "cuda.enable_flash_sdp": "flash_sdp",
    "cuda.enable_mem_efficient_sdp": "mem_efficient_sdp",
    "cuda.enable_math_sdp": "math_sdp",
    "cuda.enable_cudnn_sdp": "cudnn_sdp",
    "cuda.allow_fp16_bf16_reduction_math_sdp": "math_sdp_allow_fp16_bf16_reduction",
    "cuda.preferred_blas_library": "blas_library",
    "cuda.preferred_linalg_library": "linalg_library",
    "cuda.preferred_rocm_fa_library": "rocm_fa_library",
    "cudnn.enabled": "cudnn_enabled",
    "cudnn.benchmark": "cudnn_benchmark",
    "cudnn.benchmark_limit": "cudnn_benchmark_limit",
    "cudnn.deterministic": "cudnn_deterministic",
    "cudnn.allow_tf32": "precision",
    "cudnn.fp32_precision": "precision",
    "cudnn.conv.fp32_precision": "precision",
    "cudnn.rnn.fp32_precision": "precision",
    "cudnn.depthwise_kernel": "cudnn_depthwise_kernel",
    "cudnn.set_flags": SET,
    "miopen.immediate": "miopen_immediate",
    "miopen.set_flags": SET,
    "mkldnn.enabled": "mkldnn_enabled",
    "mkldnn.deterministic": "mkldnn_deterministic",
    "mkldnn.allow_tf32": "onednn_allow_tf32",
    "mkldnn.fp32_precision": "precision",
    "mkldnn.matmul.fp32_precision": "precision",
    "mkldnn.conv.fp32_precision": "precision",
    "mkldnn.rnn.fp32_precision": "precision",
    "mkldnn.set_flags": SET,
    "mha.set_fastpath_enabled": "encoder_fast_path",
    "nnpack.set_flags": "nnpack_enabled",
    "opt_einsum.enabled": "path_of_einsum",
    "opt_einsum.strategy": "path_of_einsum",
    "opt_einsum.set_flags": SET,
    "quantized.engine": "qengine",
    "python_native.disable_operations": KERNELS,
    "python_native.enable_operations": KERNELS,
    "python_native.disable_dispatch_keys": KERNELS,
    "python_native.enable_dispatch_keys": KERNELS,
}
_SETS: Final = ("set_", "use_", "enable_", "disable_", "allow_", "preferred_")


def settable() -> Iterator[str]:
    """Every public name of torch and of its backends by which something global is set."""
    yield from (f"torch.{name}" for name in dir(torch) if name.startswith(("set_", "use_")))
    yield from (f"backends.{name}" for name in _settable_of(torch.backends))
    for info in pkgutil.iter_modules(torch.backends.__path__):
        if not info.name.startswith("_") and info.name != "xeon":  # that one starts scripts
            module = importlib.import_module(f"torch.backends.{info.name}")
            yield from (f"{info.name}.{name}" for name in _settable_of(module))


def _settable_of(module: types.ModuleType) -> Iterator[str]:
    for name in dir(module) + dir(type(module)):
        if name.startswith("_"):
            continue
        described = vars(type(module)).get(name)
        value = getattr(module, name, None)
        if type(described).__name__ in ("ContextProp", "_QEngineProp"):
            yield name
        elif type(value).__name__ == "_FP32Precision":
            yield f"{name}.fp32_precision"
        elif type(value).__name__ == "cuBLASModule":
            code = type(value).__setattr__.__code__.co_consts
            yield from (f"{name}.{each}" for each in code if isinstance(each, str) and hasattr(value, each))
        elif callable(value) and name.startswith(_SETS) and "torch" in str(getattr(value, "__module__", "")):
            yield name


def test_every_switch_of_torch_has_its_way() -> None:
    names = set(settable())
    assert names - WAYS.keys() == set()
    assert "cuda.matmul.allow_tf32" in names, "what is looked for is found"
    absent = {"cudnn_benchmark_limit", "cudnn_depthwise_kernel", "path_of_einsum"}  # in some builds and versions
    assert {way for way in WAYS.values() if " " not in way} <= _KNOWN | absent


CASES: Final = {
    "torch.autograd.set_detect_anomaly(True, False)": "anomaly",
    "torch.use_deterministic_algorithms(True)": "deterministic",
    "torch.set_deterministic_debug_mode('warn')": "deterministic",
    "torch.utils.deterministic.fill_uninitialized_memory = False": "deterministic_fill_uninitialized_memory",
    "torch.set_default_dtype(torch.float64)": "default_dtype",
    "torch.set_flush_denormal(True)": "flush_denormal",
    "torch.set_float32_matmul_precision('high')": "precision",
    "torch.set_float32_matmul_precision('medium')": "precision",
    "backends.cuda.matmul.allow_tf32 = True": "precision",
    "backends.cudnn.allow_tf32 = False": "precision",
    "backends.fp32_precision = 'ieee'": "precision",
    "backends.fp32_precision = 'tf32'": "precision",
    "backends.fp32_precision = 'tf32'; backends.cuda.matmul.fp32_precision = 'ieee'": "precision",
    "torch.set_float32_matmul_precision('high'); backends.mkldnn.matmul.fp32_precision = 'ieee'": "precision",
    "backends.cuda.matmul.fp32_precision = 'tf32'": "precision",
    "backends.cudnn.fp32_precision = 'tf32'": "precision",
    "backends.cudnn.conv.fp32_precision = 'ieee'": "precision",
    "backends.mkldnn.matmul.fp32_precision = 'bf16'": "precision",
    "backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False": (
        "cublas_allow_fp16_reduced_precision_reduction"
    ),
    "backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False": (
        "cublas_allow_bf16_reduced_precision_reduction"
    ),
    "backends.cuda.matmul.allow_fp16_accumulation = True": "cublas_allow_fp16_accumulation",
    "backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)": "math_sdp_allow_fp16_bf16_reduction",
    "backends.cudnn.enabled = False": "cudnn_enabled",
    "backends.cudnn.benchmark = True": "cudnn_benchmark",
    "backends.cudnn.deterministic = True": "cudnn_deterministic",
    "backends.mkldnn.enabled = False": "mkldnn_enabled",
    "backends.mkldnn.deterministic = True": "mkldnn_deterministic",
    "backends.nnpack.set_flags(False)": "nnpack_enabled",
    "backends.miopen.immediate = True": "miopen_immediate",
    "backends.cuda.enable_cudnn_sdp(False)": "cudnn_sdp",
    "kept = attention.sdpa_kernel([Kernel.MATH]); kept.__enter__()": "flash_sdp",
    "kept = attention.sdpa_kernel([Kernel.MATH, Kernel.CUDNN_ATTENTION], set_priority=True); kept.__enter__()": (
        "sdp_priority_order"
    ),
    "backends.mha.set_fastpath_enabled(False)": "encoder_fast_path",
    "backends.quantized.engine = 'onednn'": "qengine",
    "backends.opt_einsum.enabled = False": "path_of_einsum",
    "backends.opt_einsum.strategy = 'greedy'": "path_of_einsum",
}
"""What a script may say, and a switch that it changes."""
_KNOWN: Final = {switch.name for switch in SWITCHES}
_SCRIPT: Final = """
import json, os, sys
import torch
from torch import backends
from torch.nn import attention
from torch.nn.attention import SDPBackend as Kernel
from skippipe_plugin.engine.process_switches import SWITCHES, ProcessSwitches

names, usual = [switch.name for switch in SWITCHES], ProcessSwitches.current()

def answer(function):
    reads, writes = os.pipe()
    if os.fork() == 0:
        os.write(writes, repr(function()).encode())
        os._exit(0)
    os.close(writes)
    os.wait()
    with os.fdopen(reads) as file:
        return eval(file.read(), {"torch": torch})

def on_the_driver():
    exec(said, globals())
    return ProcessSwitches.current().values

def on_a_worker():
    ProcessSwitches(values).set()
    found = ProcessSwitches.current().values
    usual.set()
    return found == values, ProcessSwitches.current() == usual

for said in json.loads(sys.argv[1]):
    values = answer(on_the_driver)
    changed = [name for name, value, before in zip(names, values, usual.values) if value != before]
    print(json.dumps([said, changed, *answer(on_a_worker)]))
"""


@pytest.fixture(scope="module")
def found() -> dict[str, tuple[list[str], bool, bool]]:
    """By what is said: the switches that it changes, whether a worker then has them, and whether it can go back."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        _SCRIPT,
        json.dumps([said for said, name in CASES.items() if name in {each.name for each in SWITCHES}]),
    ]
    said = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
    return {line[0]: tuple(line[1:]) for line in map(json.loads, said.splitlines())}  # type: ignore[misc]


@pytest.mark.parametrize("said", CASES)
def test_a_worker_has_what_a_script_says(said: str, found: dict[str, tuple[list[str], bool, bool]]) -> None:
    if CASES[said] not in _KNOWN:
        pytest.skip(f"there is no {CASES[said]} here")
    changed, arrives, goes_back = found[said]
    assert CASES[said] in changed
    assert arrives
    assert goes_back


def test_they_can_be_sent() -> None:
    switches = ProcessSwitches.current()
    assert pickle.loads(pickle.dumps(switches)) == switches
    assert hash(switches) == hash(ProcessSwitches.current())
