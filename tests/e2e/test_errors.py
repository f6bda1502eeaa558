"""What cannot work says so, with the reason and the way out, and leaves workers and model fit for the next run."""

import socket
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from skippipe_plugin.driver.capture.microbatch import BatchError
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.partition import PartitionError
from skippipe_plugin.strategies import NetworkConfig, SkipPipeStrategy


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.linear(hidden)


class FailingBlock(Block):
    def forward(self, hidden: Tensor) -> Tensor:
        if self.training:
            raise ZeroDivisionError("the third block divides by zero")
        return super().forward(hidden)


class Model(LightningModule):
    def __init__(self, blocks: list[nn.Module] | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks or [Block() for _ in range(4)])
        self.head = nn.Linear(4, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0]).pow(2).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: LightningModule, devices: int = 3, data: Any = None, **strategy: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=SkipPipeStrategy(**{"num_microbatches": 2, **strategy}),
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data or DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4))


def changed(**methods: Callable[..., Any]) -> Model:
    """A model whose class has some methods replaced."""
    return type("Changed", (Model,), methods)()


@pytest.fixture(autouse=True)
def next_run_works():
    """After every failure the very same workers train the next model."""
    yield
    model = Model()
    before = model.blocks[0].linear.weight.clone()
    fit(model)
    assert not any(hasattr(parameter, "is_remote") for parameter in model.parameters())
    assert not torch.equal(before, model.blocks[0].linear.weight)


def test_no_block_stack() -> None:
    model = Model()
    model.blocks = Block()
    with pytest.raises(PartitionError, match="blocks="):
        fit(model)


def test_fewer_blocks_than_stages() -> None:
    with pytest.raises(PartitionError, match=r"4 blocks.*5 stages|5 stages.*4 blocks"):
        fit(Model(), devices=6)


def test_code_between_the_blocks() -> None:
    def forward(self: Model, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden)
            hidden = hidden * 2 if hidden.mean() > 0 else hidden
        return self.head(hidden)

    with pytest.raises(SkipPipeError, match=r"code between the blocks .* needs the output of blocks\.0 \(__bool__\)"):
        fit(changed(forward=forward))


def test_a_step_that_skips_a_block() -> None:
    def forward(self: Model, hidden: Tensor) -> Tensor:
        for block in list(self.blocks)[:-1]:
            hidden = block(hidden)
        return self.head(hidden)

    with pytest.raises(SkipPipeError, match=r"output of blocks\.2 .* only be passed on to blocks\.3.*early exit"):
        fit(changed(forward=forward))


def test_a_step_that_leaves_the_stack_and_uses_nothing_of_it() -> None:
    def training_step(self: Model, batch: Any, batch_idx: int) -> Tensor:
        self.blocks[0](batch[0])
        return self.head(batch[0]).sum()

    with pytest.raises(SkipPipeError, match="only the first 1 of 4 blocks were called"):
        fit(changed(training_step=training_step))


def test_a_step_that_skips_a_block_and_misses_what_a_hook_keeps() -> None:
    kept: dict[str, Tensor] = {}

    def forward(self: Model, hidden: Tensor) -> Tensor:
        for block in list(self.blocks)[:-1]:
            hidden = block(hidden)
        return self.head(kept["hidden"])

    model = changed(forward=forward)
    model.blocks[1].register_forward_hook(lambda module, args, output: kept.update(hidden=output))
    with pytest.raises(SkipPipeError, match=r"KeyError\('hidden'\) when only the first 3 .* Hooks on blocks\.1 run"):
        fit(model)


def test_a_step_that_never_reaches_the_blocks() -> None:
    with pytest.raises(SkipPipeError, match="returned without calling the blocks"):
        fit(changed(training_step=lambda self, batch, batch_idx: self.head(batch[0]).sum()))


@pytest.mark.parametrize("after", [False, True], ids=["before the blocks", "after the blocks"])
def test_a_step_that_raises_midway(after: bool) -> None:
    rows = torch.arange(1.0, 33.0).view(8, 4) / 40

    def training_step(self: Model, batch: Any, batch_idx: int) -> Tensor:
        output = self(batch[0]) if after else batch[0]
        if torch.equal(batch[0][0], rows[6]):  # the second microbatch of the second step
            raise KeyError("the user's own mistake")
        return (output if after else self(output)).mean()

    with pytest.raises(KeyError, match="the user's own mistake") as caught:
        fit(changed(training_step=training_step), data=DataLoader(TensorDataset(rows), batch_size=4))
    assert any(entry.name == "training_step" for entry in caught.traceback)


def test_a_loss_that_is_not_a_scalar() -> None:
    with pytest.raises(SkipPipeError, match=r"training_step returned a tensor of shape \(2, 1\)"):
        fit(changed(training_step=lambda self, batch, batch_idx: self(batch[0])))


def test_a_batch_without_a_common_first_dimension() -> None:
    data = DataLoader([(torch.randn(4, 4), torch.randn(3))], batch_size=None)
    with pytest.raises(BatchError, match=r"batch\[0\]: 4, batch\[1\]: 3"):
        fit(Model(), data=data, microbatches="batch")


def test_devices_that_do_not_fit_the_replicas() -> None:
    with pytest.raises(ValueError, match=r"devices=4 does not fit drivers=1 and replicas=2.*such as 3 or 5"):
        fit(Model(), devices=4, replicas=2)


def test_an_exception_in_a_remote_block() -> None:
    with pytest.raises(ZeroDivisionError, match="the third block divides by zero") as caught:
        fit(Model([Block(), Block(), FailingBlock(), Block()]), blocks="blocks")
    assert "in forward" in str(caught.value.__cause__)
    assert "worker rank 2 (stage 2)" in caught.value.__notes__[0]


def test_a_call_with_gradients_outside_of_the_step() -> None:
    with pytest.raises(
        SkipPipeError, match=r"outside of a training step with gradients enabled.*no_grad.*training_step"
    ):
        fit(changed(on_train_batch_start=lambda self, batch, batch_idx: self(batch[0]).sum()))


def test_several_optimizers() -> None:
    def configure_optimizers(self: Model) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.head.parameters(), lr=0.1), torch.optim.SGD(self.blocks.parameters(), lr=0.1)]

    with pytest.raises((SkipPipeError, RuntimeError), match="optimizers"):
        fit(changed(configure_optimizers=configure_optimizers))


def test_parts_of_layers_that_stay_on_the_workers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=16, n_positions=8)

    def training_step(self: Model, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0], output_attentions=True).loss

    model = changed(training_step=training_step)
    del model.blocks
    model.model = transformers.GPT2LMHeadModel(config)
    data = DataLoader(TensorDataset(torch.randint(0, 16, (8, 6))), batch_size=4)
    with pytest.raises(SkipPipeError, match=r"asked for attentions.* of every layer"):
        fit(model, data=data)


def test_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SkipPipeError, match=f"cannot listen on 127.0.0.1:{port}.*choose another port"):
            fit(Model(), network=NetworkConfig(port=port))


def test_an_address_that_nobody_can_reach() -> None:
    with pytest.raises(ValueError, match=r"host='0.0.0.0' means every address of this machine"):
        NetworkConfig(host="0.0.0.0")


def test_several_nodes_without_a_launcher() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy=SkipPipeStrategy(), logger=False)
    with pytest.raises(SkipPipeError, match=r"num_nodes=2 needs a launcher .* torchrun or srun"):
        trainer.fit(Model())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "2f2b"}, "schedule='2f2b' is unknown; it is one of 'auto'"),
        ({"num_microbatches": 0}, "num_microbatches=0 is out of range; it is a whole number of at least 1"),
        ({"replicas": -1}, "replicas=-1"),
        ({"drivers": 1.5}, "drivers=1.5"),
    ],
)
def test_settings_out_of_range(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SkipPipeStrategy(**arguments)
