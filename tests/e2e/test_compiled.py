"""Models under ``torch.compile``, whole or block by block, train as they do uncompiled, and keep their names."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import ModelCheckpoint
from torch._dynamo.eval_frame import OptimizedModule
from torch.utils.data import DataLoader

from tests.grids import slow

from . import zoo
from .models import Telling, Transformer, tokens
from .modules import BATCH, STEPS, LanguageModel, Pretrained, loader
from .support import Run, assert_same_losses, assert_same_run, assert_same_weights, train, trainer_for

PIPELINE: dict[str, Any] = {"schedule": "1f1b", "num_microbatches": 4}


def whole_network() -> LanguageModel:
    return LanguageModel(torch.compile(Transformer(), backend="eager"))


def blocks_in_place() -> LanguageModel:
    net = Transformer()
    for block in net.blocks:
        block.compile(backend="eager")
    return LanguageModel(net)


def blocks_wrapped() -> LanguageModel:
    net = Transformer()
    for index, block in enumerate(net.blocks):
        net.blocks[index] = torch.compile(block, backend="eager")
    return LanguageModel(net)


def network_in_place() -> LanguageModel:
    net = Transformer()
    net.compile(backend="eager")
    return LanguageModel(net)


def lightning_module() -> Any:
    return torch.compile(LanguageModel(Transformer()), backend="eager")


class Configured(LanguageModel):
    """Compiles where Lightning recommends it."""

    def configure_model(self) -> None:
        if not isinstance(self.model, OptimizedModule):
            self.model = torch.compile(self.model, backend="eager")


FORMS: dict[str, Callable[[], LightningModule]] = {
    "whole_network": whole_network,
    "blocks_in_place": blocks_in_place,
    "blocks_wrapped": blocks_wrapped,
    "network_in_place": network_in_place,
    "lightning_module": lightning_module,
    "configure_model": lambda: Configured(Transformer()),
}


def _run(make: Callable[[], LightningModule], devices: int, **options: Any) -> Run:
    strategy = PIPELINE if devices > 1 else None
    return train(make, loader(tokens(BATCH * STEPS)), devices, strategy, val_data=loader(tokens(10)), **options)


@pytest.fixture(scope="module")
def uncompiled() -> Run:
    return _run(lambda: LanguageModel(Transformer()), 1)


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(
            form, marks=pytest.mark.slow if form in ("whole_network", "network_in_place", "blocks_wrapped") else ()
        )
        for form in FORMS
    ],
)
def test_compiled_models(form: str, uncompiled: Run, tmp_path: Path) -> None:
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    run = _run(FORMS[form], 3, callbacks=[checkpoint], enable_checkpointing=True)
    assert_same_losses(run.losses, uncompiled.losses)
    saved = torch.load(checkpoint.last_model_path, "cpu", weights_only=False)["state_dict"]
    for state in (run.weights, saved):
        stripped = {name.replace("_orig_mod.", ""): tensor for name, tensor in state.items()}
        assert_same_weights(stripped, uncompiled.weights)
    assert list(saved) == list(_saved_in_one_process(form, tmp_path))


def _saved_in_one_process(form: str, folder: Path) -> dict[str, torch.Tensor]:
    """What is compiled is part of the names then, too; nothing is run, so nothing is compiled."""
    trainer = trainer_for(1, max_steps=0)
    trainer.fit(FORMS[form](), loader(tokens(BATCH)))
    trainer.save_checkpoint(folder / "plain.ckpt")
    return torch.load(folder / "plain.ckpt", weights_only=False)["state_dict"]


def test_a_model_that_was_compiled_and_used_before(uncompiled: Run) -> None:
    def make() -> LanguageModel:
        module = LanguageModel(torch.compile(Transformer(), backend="aot_eager"))
        module.model(tokens(2))
        return module

    run = _run(make, 2)
    assert_same_losses(run.losses, uncompiled.losses)
    assert isinstance(run.module, LanguageModel)
    assert isinstance(run.module.model, OptimizedModule)
    assert run.module.model(tokens(2)).shape == (2, 8, 32)


class Predicting(LightningModule):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def predict_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.net(batch)


@pytest.mark.parametrize("form", ["no", "whole", "in_place", slow("block"), slow("module")])
@pytest.mark.parametrize("strategy", [{}, slow({"driver_stage": True})], ids=["remote", "driver_stage"])
def test_blocks_are_compiled_where_they_are(form: str, strategy: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(Telling(4) for _ in range(4)))
    data = DataLoader(torch.randn(6, 4), batch_size=6)
    for block in net:
        block.plain = 1.0 if form == "no" else 2.0
    (expected,) = trainer_for(1).predict(Predicting(net), data)
    for block in net:
        block.plain = 1.0
        if form == "block":
            block.compile(backend="eager")
    if form == "in_place":
        net.compile(backend="eager")
    module = Predicting(torch.compile(net, backend="eager") if form == "whole" else net)
    compiled = torch.compile(module, backend="eager") if form == "module" else module
    (found,) = trainer_for(3, {"num_microbatches": 2, **strategy}).predict(compiled, data)
    torch.testing.assert_close(found, expected)


def test_workers_compile_with_the_users_backend(tmp_path: Path) -> None:
    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        (tmp_path / str(os.getpid())).touch()
        return graph.forward

    net = torch.nn.Sequential(*(Telling(4) for _ in range(4)))
    net.compile(backend=backend)
    trainer_for(3, {"num_microbatches": 2}).predict(Predicting(net), DataLoader(torch.randn(6, 4), batch_size=6))
    assert len({path.name for path in tmp_path.iterdir()} - {str(os.getpid())}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "lora"])
def test_compiled_models_of_transformers(name: str) -> None:
    entry = zoo.ZOO[name]
    data = loader(entry.data(BATCH * STEPS))
    compiled = train(lambda: Pretrained(torch.compile(entry.model(), backend="eager")), data, 3, PIPELINE)
    plain = train(lambda: Pretrained(entry.model()), data, 1)
    compiled.weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in compiled.weights.items()}
    assert_same_run(compiled, plain)
