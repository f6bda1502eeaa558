import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.strategies.checks import check_mirrored


def test_what_the_next_driver_would_lack_is_named() -> None:
    module = LightningModule()
    module.layer = nn.Linear(2, 2)
    further = nn.Parameter(torch.zeros(3))
    check_mirrored([torch.optim.SGD(module.parameters(), 0.1)], module)
    with pytest.raises(SkipPipeError, match=r"the SGD steps 1 parameters that LightningModule .* of shape \(3,\)"):
        check_mirrored([torch.optim.SGD([*module.parameters(), further], 0.1)], module)
