"""On GPUs a pipeline gives what one GPU gives: workers that share one, and one for each process."""

import pytest
import torch

from skippipe_plugin.strategies import NetworkConfig

from . import loops
from .models import Transformer, tokens
from .modules import BATCH, STEPS, LanguageModel, loader
from .support import assert_same_run, train

pytestmark = pytest.mark.gpu

needs_one = pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
needs_three = pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")


@needs_one
def test_workers_that_share_a_gpu() -> None:
    loops.assert_same(*loops.both(loops.quicktour, cpu=False), rtol=1e-4)


@needs_three
@pytest.mark.parametrize("backend", ["gloo", "gloo-pairs", "nccl"])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_gpu_for_each_process(precision: str, backend: str) -> None:
    data, network = loader(tokens(BATCH * STEPS)), NetworkConfig(backend=backend)
    rtol = 1e-4 if precision == "32-true" else 0.03
    options = {"accelerator": "gpu", "precision": precision}
    alone = train(lambda: LanguageModel(Transformer()), data, 1, **options)
    pipeline = train(lambda: LanguageModel(Transformer()), data, 3, {"network": network}, **options)
    assert_same_run(pipeline, alone, rtol=rtol, weights_rtol=10 * rtol, weights_atol=rtol)
