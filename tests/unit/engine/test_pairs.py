"""What NCCL needs of a process before its device starts."""

import os

import pytest
import torch

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.engine.pairs import prepare

LOADING = "CUDA_MODULE_LOADING"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (LOADING, "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_kernels_are_loaded_at_once_where_cuda_has_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    prepare("gloo")
    assert LOADING not in os.environ
    prepare("nccl")
    assert os.environ[LOADING] == "EAGER"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    prepare("nccl")


def test_it_is_refused_where_cuda_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setenv(LOADING, "LAZY")  # torch sets it when CUDA starts
    prepare("gloo")
    with pytest.raises(SkipPipeError, match=r"needs CUDA_MODULE_LOADING=EAGER.*started in this process with LAZY"):
        prepare("nccl")
