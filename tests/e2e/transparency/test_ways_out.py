"""What refusals advise, followed: each way out gives the result of one process."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from skippipe_plugin import SkipPipeError
from tests.e2e.modules import loader
from tests.e2e.support import assert_same_run, train

DATA = loader(torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), 8)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.tanh(self.linear(hidden))


class Model(LightningModule):
    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.head, self.between = nn.Linear(4, 8), nn.Linear(8, 1), between
        self.blocks = nn.ModuleList([Block() for _ in range(4)])

    def training_step(self, batch: Tensor) -> Tensor:
        return F.mse_loss(self.head(self.between(self, self.embed(batch))), batch.sum(1, keepdim=True))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def called(module: Any, hidden: Tensor) -> Tensor:
    for block in module.blocks:
        hidden = block(hidden)
    return hidden


def forwarded(module: Any, hidden: Tensor) -> Tensor:
    for block in module.blocks:
        hidden = block.forward(hidden)
    return hidden


def reentrant(module: Any, hidden: Tensor) -> Tensor:
    for block in module.blocks:
        hidden = checkpoint(block, hidden, use_reentrant=True)
    return hidden


def not_reentrant(module: Any, hidden: Tensor) -> Tensor:
    for block in module.blocks:
        hidden = checkpoint(block, hidden, use_reentrant=False)
    return hidden


def head_first(module: Any, hidden: Tensor) -> Tensor:
    return called(module, hidden) if module.current_epoch >= 1 else hidden


def head_first_beside_the_blocks(module: Any, hidden: Tensor) -> Tensor:
    if module.current_epoch >= 1:
        return called(module, hidden)
    with torch.no_grad():
        called(module, hidden)
    return hidden


def run(between: Callable[[Any, Tensor], Tensor], devices: int) -> Any:
    return train(lambda: Model(between), DATA, devices, {"num_microbatches": 4} if devices > 1 else None, max_steps=6)


@pytest.mark.parametrize(
    ("refused", "message", "way_out"),
    [
        (reentrant, "pass use_reentrant=False", not_reentrant),
        (head_first, r"warm-up of the head.* under torch\.no_grad\(\)", head_first_beside_the_blocks),
    ],
    ids=["checkpoints", "warm-up"],
)
def test_what_is_refused_has_a_way_out_that_is_exact(
    refused: Callable[[Any, Tensor], Tensor], message: str, way_out: Callable[[Any, Tensor], Tensor]
) -> None:
    with pytest.raises(SkipPipeError, match=message):
        run(refused, 3)
    assert_same_run(run(way_out, 3), run(refused, 1))


def test_forward_of_a_block_is_a_call_of_it() -> None:
    assert_same_run(run(forwarded, 3), run(forwarded, 1))


def test_forward_of_a_block_with_hooks_is_refused() -> None:
    def hooked() -> Model:
        model = Model(forwarded)
        model.blocks[1].register_forward_hook(lambda *_: None)
        return model

    with pytest.raises(SkipPipeError, match="has forward hooks"):
        train(hooked, DATA, 3, {"num_microbatches": 4})


class Speech(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
        front = {"conv_dim": (8,), "conv_kernel": (3,), "conv_stride": (2,), "num_feat_extract_layers": 1}
        places = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}
        off = dict.fromkeys(["hidden", "attention", "activation", "feat_proj", "final"], 0.0)
        dropout = {f"{name}_dropout": rate for name, rate in off.items()} | {
            "layerdrop": 0.0,
            "apply_spec_augment": False,
        }
        config = hf.Wav2Vec2Config(**sizes, **front, **places, **dropout, num_labels=3)
        self.net = hf.Wav2Vec2ForSequenceClassification(config)

    def training_step(self, batch: Tensor) -> Tensor:
        logits = self.net(batch).logits
        return F.cross_entropy(logits, torch.tensor([0, 1, 2, 0], device=self.device)[: len(batch)].clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def test_a_head_that_asks_for_hidden_states_by_itself() -> None:
    data = loader(torch.randn(8, 40, generator=torch.Generator().manual_seed(0)), 4)

    def speech(devices: int) -> Any:
        settings = {"num_microbatches": 2, "microbatches": "stack"} if devices > 1 else None
        return train(Speech, data, devices, settings, max_steps=2)

    assert_same_run(speech(3), speech(1))


# ------------------------------------------------------------- what does not follow from microbatches

Loss = Callable[[Any, Tensor, Tensor, Tensor], Tensor]


def root(module: Any, batch: Tensor, hidden: Tensor, errors: Tensor) -> Tensor:
    return errors.mean().sqrt()


def weighted(module: Any, batch: Tensor, hidden: Tensor, errors: Tensor) -> Tensor:
    shares = weight_of_samples(batch)
    return (errors[:, 0] * shares).sum() / shares.sum()


def weight_of_samples(batch: Tensor) -> Tensor:
    return batch.prod(1).exp()


def far(hidden: Tensor) -> Tensor:
    """Nothing, but for hidden states that are larger than those of this model: only its user knows that."""
    return (hidden / 2).pow(32).mean().square()


def averaged(module: Any, batch: Tensor, hidden: Tensor, errors: Tensor) -> Tensor:
    return errors.mean() + far(hidden)


def summed(module: Any, batch: Tensor, hidden: Tensor, errors: Tensor) -> Tensor:
    return errors.sum() / 8 + far(hidden)


def spread(module: Any, batch: Tensor, hidden: Tensor, errors: Tensor) -> Tensor:
    module.log("spread", errors.std())
    return errors.mean()


class Judged(Model):
    """Its loss is made by ``loss`` of the errors of its samples."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(called)
        self.loss = loss

    def training_step(self, batch: Tensor) -> Tensor:
        hidden = called(self, torch.tanh(self.embed(batch)) / 16)
        return self.loss(self, batch, hidden, (self.head(hidden) - batch.sum(1, keepdim=True)).pow(2))


STACK = {"microbatches": "stack"}
WEIGHT = (
    r"microbatches='stack', or say .* microbatch_weight=\.\.\. \(a function of the microbatch, 'samples' or 'sum'\)$"
)


@pytest.mark.parametrize(
    ("loss", "message", "way_out"),
    [
        (root, WEIGHT, STACK),
        (weighted, WEIGHT, {"microbatch_weight": lambda batch: float(weight_of_samples(batch).sum())}),
        (averaged, WEIGHT, {"microbatch_weight": "samples"}),
        (summed, WEIGHT, {"microbatch_weight": "sum"}),
        (spread, r"self\.log\('spread'\) of the batch does not follow.*with microbatches='stack'$", STACK),
    ],
    ids=["stack", "function", "samples", "sum", "log"],
)
def test_what_does_not_follow_has_ways_out_that_are_exact(loss: Loss, message: str, way_out: dict[str, Any]) -> None:
    uneven = loader(torch.randn(22, 4, generator=torch.Generator().manual_seed(0)), 11)

    def judged(devices: int, **settings: Any) -> Any:
        strategy = {"num_microbatches": 4, "microbatches": "batch", **settings} if devices > 1 else None
        return train(lambda: Judged(loss), uneven, devices, strategy, max_steps=4)

    with pytest.raises(SkipPipeError, match=message):
        judged(3)
    found, expected = judged(3, **way_out), judged(1)
    assert_same_run(found, expected)
    torch.testing.assert_close(found.trainer.logged_metrics, expected.trainer.logged_metrics)
