"""The training loops of accelerate's documentation, on data made here; only the accelerator differs between runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import SequenceClassifierOutput

from skippipe_plugin.accelerate import SkipPipeAccelerator

from .models import Block
from .support import DEVICE

STAGES = 2
"""How many workers all tests use, so that they take each other's over."""


class Classifier(nn.Module):
    """Samples [N, 8] into 4 classes; with labels it returns its loss as a dict, without them the logits."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(Block(16, dropout=dropout) for _ in range(4))
        self.head = nn.Linear(16, 4)

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> Any:
        hidden = self.embedding(inputs)[:, None].expand(-1, 3, -1)
        for block in self.blocks:
            hidden = block(hidden)
        logits = self.head(hidden.mean(1))
        if labels is None:
            return logits
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def bert() -> BertForSequenceClassification:
    """A small encoder, as in accelerate's nlp_example.py."""
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=2,
    )
    return BertForSequenceClassification(config)


def gpt2(dropout: float = 0.0) -> GPT2LMHeadModel:
    """A small language model."""
    config = GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=16,
        n_layer=4,
        n_head=2,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def samples(size: int, *, seed: int = 0) -> TensorDataset:
    """Inputs [size, 8] and classes."""
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, 8, generator=generator), torch.randint(0, 4, (size,), generator=generator))


def sentences(size: int, *, labels: int = 2) -> list[dict[str, Tensor]]:
    """Tokens with masks of many lengths, as a tokenizer returns them."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 9, (size,), generator=generator)
    return [
        {
            "input_ids": torch.randint(1, 40, (8,), generator=generator),
            "attention_mask": (torch.arange(8) < length).long(),
            "labels": torch.randint(0, labels, (), generator=generator),
        }
        for length in lengths
    ]


def texts(size: int) -> list[dict[str, Tensor]]:
    """Tokens to be predicted, with padding that the loss leaves out: microbatches have unequal numbers of labels."""
    samples = sentences(size)
    for sample in samples:
        sample["labels"] = torch.where(sample["attention_mask"] == 1, sample["input_ids"], -100)
    return samples


@dataclass
class Record:
    """What a loop saw."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    metrics: list[float] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def accelerator(kind: str, **arguments: Any) -> Iterator[Accelerator]:
    """Make ``"plain"``, accelerate's own, or ``"pipeline"``, and forget accelerate's global state before and after."""
    _forget()
    try:
        if kind == "plain":
            yield _placed(Accelerator(**{"cpu": True, **arguments}))
            return
        piped = SkipPipeAccelerator(**{"cpu": True, "num_stages": STAGES, "num_microbatches": 4, **arguments})
        _placed(piped)
        try:
            yield piped
        finally:
            piped.skippipe.close()
    finally:
        _forget()


def _placed(made: Accelerator) -> Accelerator:
    """Let it train on the device, as one of the kinds of device that accelerate knows by name."""
    made.state.device = PartialState().device = DEVICE
    return made


def _forget() -> None:
    for state in (AcceleratorState, PartialState, GradientState):
        state._reset_state()


def both(loop: Callable[..., Record], *arguments: Any, **options: Any) -> tuple[Record, Record]:
    """Run a loop with a pipeline and with ``Accelerator()``."""
    records = []
    for kind in ("pipeline", "plain"):
        with accelerator(kind, **options) as current:
            torch.manual_seed(0)
            records.append(loop(current, *arguments))
    return records[0], records[1]


def assert_same(found: Record, expected: Record, rtol: float = 1e-5) -> None:
    """Compare all that two loops saw; the weights of Adam's parameters without a gradient are noise."""
    for name in ("losses", "norms", "metrics"):
        one, other = getattr(found, name), getattr(expected, name)
        assert len(one) == len(other)
        torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=rtol, atol=1e-6)
    assert list(found.weights) == list(expected.weights)
    for name, weight in found.weights.items():
        torch.testing.assert_close(
            weight, expected.weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy a model's ``state_dict``."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


# ------------------------------------------------------------------ the loops


def quicktour(current: Accelerator, model: nn.Module | None = None) -> Record:
    """``loss = criterion(model(inputs), targets)``: accelerate's first page. The loader shuffles."""
    record, model = Record(), model or Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    loader = DataLoader(samples(20), batch_size=8, shuffle=True)
    model, optimizer, loader = current.prepare(model, optimizer, loader)
    for _ in range(2):
        for inputs, targets in loader:
            optimizer.zero_grad()
            outputs = model(inputs)
            loss = functional.cross_entropy(outputs, targets)
            current.backward(loss)
            optimizer.step()
            record.losses.append(loss.item())
    record.weights = weights_of(model)
    return record


def classification(current: Accelerator) -> Record:
    """``nlp_example.py``: a model that returns its loss, a schedule, gathered metrics."""
    record, model = Record(), bert()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    train, evaluate = DataLoader(sentences(20), batch_size=8, shuffle=True), DataLoader(sentences(12), batch_size=8)
    model, optimizer, train, evaluate, scheduler = current.prepare(model, optimizer, train, evaluate, scheduler)
    for _ in range(2):
        model.train()
        for batch in train:
            outputs = model(**batch)
            assert isinstance(outputs, SequenceClassifierOutput)
            loss = outputs.loss
            current.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())
        model.eval()
        for batch in evaluate:
            with torch.no_grad():
                outputs = model(**batch)
            predictions, references = current.gather_for_metrics((outputs.logits.softmax(-1)[:, 0], batch["labels"]))
            assert len(predictions) == len(references)
            record.metrics += [outputs.loss.item(), *predictions.tolist()]
    return record


def accumulation(current: Accelerator) -> Record:
    """``gradient_accumulation.py``, with clipping where gradients are complete."""
    record, model = Record(), Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(samples(28), batch_size=4)
    model, optimizer, loader = current.prepare(model, optimizer, loader)
    for inputs, targets in loader:
        with current.accumulate(model):
            loss = model(inputs, labels=targets)["loss"]
            current.backward(loss)
            if current.sync_gradients:
                record.norms.append(float(current.clip_grad_norm_(model.parameters(), 0.3)))
            optimizer.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())
    record.weights = weights_of(model)
    return record


def by_hand(current: Accelerator, clip_each: bool = False) -> Record:
    """The loss is divided by the loop, gradients are clipped by value, and ``model.zero_grad()`` drops them.

    With ``clip_each`` what is accumulated is clipped by its norm after every batch, not only before the step.
    """
    record, model = Record(), Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(samples(24), batch_size=4)
    optimizer, model, loader = current.prepare(optimizer, model, loader)  # in any order
    for index, (inputs, targets) in enumerate(loader):
        loss = model(inputs, targets)["loss"] / 3
        current.backward(loss)
        if clip_each:
            current.clip_grad_norm_(model.parameters(), 0.02)
        if index % 3 == 2:
            current.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
            model.zero_grad()
        record.losses.append(loss.item())
    record.weights = weights_of(model)
    return record


def language(current: Accelerator) -> Record:
    """A language model whose loss is the mean over the labels that are not padding."""
    record, model = Record(), gpt2()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(texts(20), batch_size=7)
    model, optimizer, loader = current.prepare(model, optimizer, loader)
    for batch in loader:
        loss = model(**batch).loss
        current.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        record.losses.append(loss.item())
        with torch.no_grad():
            record.metrics.append(model(**batch).loss.item())
    record.weights = weights_of(model)
    return record


def checkpointing(current: Accelerator, folder: Path, *, resume: Path | None = None) -> Record:
    """``checkpointing.py``: saves after the third batch; with ``resume`` it goes on from there."""
    record, model = Record(), Classifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)
    scheduler = LambdaLR(optimizer, lambda step: 1.0 / (1 + step))
    loader = DataLoader(samples(32), batch_size=4)
    model, optimizer, loader, scheduler = current.prepare(model, optimizer, loader, scheduler)
    if resume is not None:
        current.load_state(str(resume))
        loader = current.skip_first_batches(loader, 3)
    for index, (inputs, targets) in enumerate(loader):
        loss = functional.cross_entropy(model(inputs), targets)
        current.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        record.losses.append(loss.item())
        if resume is None and index == 2:
            current.save_state(str(folder))
    record.weights = weights_of(model)
    return record


def early_stopping(current: Accelerator) -> Record:
    """``early_stopping.py``: one process sets the trigger, all stop."""
    record, model = Record(), Classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    loader = DataLoader(samples(40), batch_size=8)
    model, optimizer, loader = current.prepare(model, optimizer, loader)
    for _ in range(10):
        for inputs, targets in loader:
            loss = model(inputs, labels=targets)["loss"]
            current.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            record.losses.append(loss.item())
            if loss.item() < 1.3:
                current.set_trigger()
            if current.check_trigger():
                return record
    return record
