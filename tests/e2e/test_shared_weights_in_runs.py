"""What blocks share in runs as people have them: hooks, checkpoints, scalers, loops of their own, losses of workers."""

import signal
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils import clip_grad_norm_

from skippipe_plugin import SkipPipeConfig, TorchPipeline
from skippipe_plugin.callbacks import StageRecovery
from tests.grids import slow

from . import test_elastic as elastic
from . import test_loss_scaling as scaling
from . import test_several_calls as several
from .support import assert_same_run, train
from .test_recovery import At, Ready, kill
from .test_shared_weights import SMALL, Block, Model, data, one_feedforward, one_layer, run, with_the_embedding

play = elastic.play


class Reading(Model):
    """Reads and writes weights and gradients of what is shared, by whichever name."""

    def __init__(self) -> None:
        super().__init__([])
        self.blocks.extend(one_feedforward().blocks)
        self.seen: list[float] = []
        self.blocks[2].feedforward[0].weight.register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))

    def training_step(self, batch: Any, number: int) -> Tensor:
        return super().training_step(batch, number) + 0.01 * self.blocks[1].feedforward[2].weight.pow(2).sum()

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradient = self.blocks[3].feedforward[0].weight.grad
        assert gradient is not None
        self.seen.append(gradient.norm().item())
        self.blocks[0].feedforward[0].bias.grad.mul_(0.5)

    def on_train_batch_end(self, *_: Any) -> None:
        self.blocks[3].feedforward[0].weight.data.mul_(0.9)
        self.seen.append(self.blocks[0].feedforward[0].weight.sum().item())

    def validation_step(self, batch: Any, _: int) -> None:
        self.seen.append(F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten()).item())


def test_hooks_see_one_parameter() -> None:
    options = {"gradient_clip_val": 0.3, "val_data": data(1), "val_check_interval": 2}
    one, found = run(Reading, 1, **options), run(Reading, 3, SMALL, **options)
    assert_same_run(found, one)
    torch.testing.assert_close(found.module.seen, one.module.seen, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_has_it_once_and_goes_on(tmp_path: Path) -> None:
    for name, devices, strategy in (("pipeline", 3, SMALL), ("one", 1, None)):
        saved = {"enable_checkpointing": True, "default_root_dir": tmp_path / name}
        train(with_the_embedding, data(8), devices, strategy, max_steps=4, **saved)
    paths = [str(next((tmp_path / name).glob("**/*.ckpt"))) for name in ("pipeline", "one")]
    ours, theirs = (torch.load(path, weights_only=False) for path in paths)
    assert list(ours["state_dict"]) == list(theirs["state_dict"])
    states = [each["optimizer_states"][0] for each in (ours, theirs)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert list(states[0]["state"]) == list(states[1]["state"])
    for path in paths:
        found = train(with_the_embedding, data(8), 4, SMALL, ckpt_path=path, max_steps=8)
        assert_same_run(found, train(with_the_embedding, data(8), 1, ckpt_path=paths[1], max_steps=8))


def test_averages_of_weights() -> None:
    options = {"callbacks": [EMAWeightAveraging(decay=0.5)]}
    assert_same_run(run(one_layer, 3, SMALL, **options), run(one_layer, 1, callbacks=[EMAWeightAveraging(decay=0.5)]))


def test_a_loss_scaler() -> None:
    make, settings = (lambda: Model(list(one_feedforward().blocks), "sgd")), {"scaler": {"init_scale": 2.0**22}}

    def fit(devices: int) -> Any:
        scales = scaling.Scales()
        plugins = scaling.half(**settings["scaler"])
        return train(make, data(), devices, callbacks=[scales], plugins=plugins, max_steps=4), scales.seen

    expected = fit(1)
    assert min(expected[1])[0] < 2.0**22, "steps were skipped"
    scaling.assert_same(fit(3), expected)


class Manual(Model):
    def __init__(self) -> None:
        super().__init__(list(with_the_embedding().blocks))
        for block in (self.blocks[1], self.blocks[3]):
            block.embed = self.embed
        self.automatic_optimization = False

    def training_step(self, batch: Any, number: int) -> Tensor:
        optimizer = self.optimizers()
        loss = super().training_step(batch, number)
        for _ in range(2):
            optimizer.zero_grad()
            loss = F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())
            self.manual_backward(loss)
            optimizer.step()
        return loss


def test_manual_optimization() -> None:
    assert_same_run(run(Manual, 3, SMALL), run(Manual, 1))


@pytest.mark.parametrize("kind", [several.Contrastive, several.Recurrent])
def test_several_calls_in_a_step(kind: Any) -> None:
    def make() -> Any:
        module = kind()
        for block in module.net.blocks:
            block.linear = module.net.blocks[0].linear
        return module

    several.assert_exact(make, {"num_microbatches": 2})


@pytest.mark.parametrize("make", [slow(one_feedforward), with_the_embedding, one_layer])
@pytest.mark.parametrize("driver_stage", [False, True])
def test_loops_of_plain_torch(make: Callable[[], Model], driver_stage: bool) -> None:
    def losses(pipe: bool) -> list[float]:
        torch.manual_seed(0)
        model = make()
        optimizer, found = torch.optim.AdamW(model.parameters(), lr=0.02), list[float]()
        config = SkipPipeConfig(num_stages=2, num_microbatches=4, driver_stage=driver_stage, verbose=False)
        pipeline = TorchPipeline(model, optimizer, config)
        with pipeline if pipe else nullcontext():
            for x, y in data():
                loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
                loss.backward()
                clip = pipeline.clip_grad_norm_ if pipe else partial(clip_grad_norm_, model.parameters())
                norm = clip(0.5)
                optimizer.step()
                optimizer.zero_grad()
                found += [loss.item(), float(norm)]
        return [*found, *(tensor.sum().item() for tensor in model.state_dict().values())]

    torch.testing.assert_close(losses(True), losses(False), rtol=1e-4, atol=1e-5)


def test_skipped_stages_leave_their_copies_out() -> None:
    """A third of the microbatches visits each; the gradient is the sum over those that did."""
    found = run(one_layer, 4, {**SMALL, "num_microbatches": 6, "skip_ratio": 1 / 3}, "sgd")
    assert len(set(found.losses)) == 4


def sgd_model() -> Model:
    return Model([Block()] * 6, "sgd")


def test_a_lost_worker_takes_nothing_along() -> None:
    """What is shared is not rebuilt from neighbours: it comes from the driver, as it is."""
    recovery = StageRecovery()
    callbacks = [recovery, At("on_train_batch_start", 3, kill(2)), Ready(1)]
    found = train(sgd_model, data(), 4, SMALL, callbacks=callbacks, max_steps=4)
    assert len(recovery.events) == 1
    assert_same_run(found, train(sgd_model, data(), 1, max_steps=4))


def test_a_worker_that_leaves() -> None:
    recovery = StageRecovery()
    callbacks = [recovery, At("on_train_batch_start", 3, kill(2, how=signal.SIGTERM)), Ready(1)]
    found = train(one_feedforward, data(), 3, SMALL, callbacks=callbacks, max_steps=4)
    assert [event.source for event in recovery.events] == ["relieved"]
    assert_same_run(found, run(one_feedforward, 1))


@pytest.mark.slow
def test_blocks_that_move(play: Any) -> None:
    recovery = StageRecovery(spares=0, elastic=True)
    callbacks = [recovery, play(joins={2: 1}, leaves={5: 1})]
    found = train(one_feedforward, data(8), 3, SMALL, callbacks=callbacks, max_steps=8)
    assert elastic.stages(recovery) == [(2, 3), (3, 2)]
    assert_same_run(found, train(one_feedforward, data(8), 1, max_steps=8))
