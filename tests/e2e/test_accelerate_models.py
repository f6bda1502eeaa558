"""What loops do with a model beside training it: compose, save, load, generate, compile, recover, hand to a Trainer."""

import copy
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from skippipe_plugin.accelerate import RecoveryPolicy, SkipPipe, SkipPipeConfig
from tests.e2e import loops
from tests.e2e.loops import Classifier, assert_same
from tests.e2e.support import DEVICE

X, Y = (column.to(DEVICE) for column in loops.samples(8).tensors)
CONFIG = SkipPipeConfig(num_stages=loops.STAGES, num_microbatches=4)


def train(current: Accelerator, model: Any, optimizer: Any, steps: int = 2) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = functional.cross_entropy(model(X), Y)
        current.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def made() -> tuple[Classifier, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Classifier().to(DEVICE)
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_a_pipeline_for_a_part_of_a_run() -> None:
    """Composed with an ordinary accelerator, before, in and after whose ``with`` the loop is the same."""
    losses = {}
    for kind in ("plain", "composed"):
        with loops.accelerator("plain") as current:
            model, optimizer = current.prepare(*made())
            losses[kind] = train(current, model, optimizer)
            if kind == "composed":
                with SkipPipe(current, model, CONFIG):
                    assert hasattr(model.blocks[0].mlp[0].weight, "is_remote")
                    losses[kind] += train(current, model, optimizer)
                assert not hasattr(model.blocks[0].mlp[0].weight, "is_remote")
            else:
                losses[kind] += train(current, model, optimizer)
            losses[kind] += train(current, model, optimizer)
            assert type(current).__dict__.keys().isdisjoint(current.__dict__)
    assert losses["composed"] == pytest.approx(losses["plain"], rel=1e-5)


def test_saved_models_are_whole(tmp_path: Path) -> None:
    with loops.accelerator("pipeline") as current:
        torch.manual_seed(0)
        original = loops.gpt2()
        expected = loops.weights_of(original)
        model = current.prepare(original)
        assert current.unwrap_model(model) is original
        model.save_pretrained(tmp_path / "transformers")
        current.save_model(model, tmp_path / "accelerate")
        states = [
            current.get_state_dict(model),
            loops.weights_of(GPT2LMHeadModel.from_pretrained(tmp_path / "transformers")),
        ]
        for state in states:
            assert list(state) == list(expected)
            assert all(torch.equal(state[name].cpu(), expected[name]) for name in expected)
        assert (tmp_path / "accelerate" / "model.safetensors").exists()
        other = loops.gpt2()
        model.load_state_dict(other.state_dict(), assign=True)
        assert all(torch.equal(model.state_dict()[name].cpu(), tensor) for name, tensor in other.state_dict().items())
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(other.state_dict() | {"transformer.h.0.ln_1.weight": torch.ones(3)})


def test_generation() -> None:
    prompt = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with loops.accelerator("pipeline") as current:
        torch.manual_seed(0)
        model = loops.gpt2().eval()
        expected = model.generate(prompt, max_new_tokens=6, do_sample=False)
        found = current.prepare(model).generate(prompt, max_new_tokens=6, do_sample=False)
    assert torch.equal(found, expected)


def test_memory_is_freed_for_the_next_model() -> None:
    with loops.accelerator("pipeline") as current:
        model, optimizer = made()
        piped = current.prepare(model, optimizer)
        train(current, *piped)
        workers = {child.pid for child in psutil.Process().children()}
        current.free_memory(*piped)
        assert not any(hasattr(parameter, "is_remote") for parameter in model.parameters())
        assert len(optimizer.state) == len(list(model.parameters()))
        train(current, *current.prepare(*made()))
        assert {child.pid for child in psutil.Process().children()} == workers


def test_an_optimizer_keeps_the_state_it_has() -> None:
    model, optimizer = made()
    functional.cross_entropy(model(X), Y).backward()
    optimizer.step()
    optimizer.zero_grad()
    start = {"model": loops.weights_of(model), "optimizer": optimizer.state_dict()}
    losses = []
    for kind in ("pipeline", "plain"):
        with loops.accelerator(kind) as current:
            model, optimizer = made()
            model.load_state_dict(start["model"])
            optimizer.load_state_dict(copy.deepcopy(start["optimizer"]))
            losses.append(train(current, *current.prepare(model, optimizer)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_compiled_model() -> None:
    losses = []
    for kind in ("pipeline", "plain"):
        with loops.accelerator(kind) as current:
            model, optimizer = made()
            compiled = torch.compile(model, backend="aot_eager") if kind == "pipeline" else model
            losses.append(train(current, *current.prepare(compiled, optimizer)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_a_killed_worker_with_a_replica_changes_nothing(inside: bool) -> None:
    losses = {}
    for kind in ("pipeline", "plain"):
        arguments = {"num_stages": 2, "replicas": 2, "recovery": RecoveryPolicy()} if kind == "pipeline" else {}
        with loops.accelerator(kind, **arguments) as current:
            model, optimizer = current.prepare(*made())
            losses[kind] = []
            for index in range(6):
                if kind == "pipeline" and index == 3:
                    killed = current.skippipe.worker_pids[1]
                    os.kill(killed, signal.SIGKILL)
                loss = model(X, labels=Y)["loss"] if inside else functional.cross_entropy(model(X), Y)
                current.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses[kind].append(loss.item())
            if kind == "pipeline":
                assert killed not in current.skippipe.worker_pids.values()
    assert losses["pipeline"] == pytest.approx(losses["plain"], rel=1e-5)


@pytest.mark.slow
def test_skipped_stages_train() -> None:
    with loops.accelerator("pipeline", num_stages=4, skip_ratio=0.25) as current:
        record = loops.quicktour(current)
        current.free_memory()
        losses = train(current, *current.prepare(*made()), steps=40)
    assert losses[-1] < 0.7 * losses[0]
    assert all(value == value for value in record.losses)


def hf_trainer(folder: Path) -> Trainer:
    torch.manual_seed(0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        adam_epsilon=1e-4,
        max_grad_norm=0.5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Trainer(loops.gpt2(), arguments, train_dataset=loops.texts(40), eval_dataset=loops.texts(10))


@pytest.mark.slow
def test_the_trainer_of_transformers(tmp_path: Path) -> None:
    """Nothing of it is overridden: the pipeline is composed with the accelerator that it made."""
    histories, weights = {}, {}
    for kind in ("plain", "pipeline"):
        with loops.accelerator("plain"):
            trainer = hf_trainer(tmp_path / kind)
            if kind == "plain":
                trainer.train()
            else:
                with SkipPipe(trainer.accelerator, config=CONFIG):
                    trainer.train()
                    assert hasattr(trainer.model.transformer.h[0].ln_1.weight, "is_remote")
                    trainer.save_model(str(tmp_path / "saved"))
                    evaluated = trainer.evaluate()["eval_loss"]
                assert trainer.evaluate()["eval_loss"] == pytest.approx(evaluated, rel=1e-5)
            histories[kind] = [
                entry[key]
                for entry in trainer.state.log_history
                for key in ("loss", "grad_norm", "eval_loss")
                if key in entry
            ][:20]
            weights[kind] = loops.weights_of(trainer.model)
    assert histories["pipeline"][:14] == pytest.approx(histories["plain"][:14], rel=1e-4)
    record = loops.Record(weights=weights["pipeline"])
    assert_same(record, loops.Record(weights=loops.weights_of(GPT2LMHeadModel.from_pretrained(tmp_path / "saved"))))
    for name, weight in weights["pipeline"].items():
        torch.testing.assert_close(weight, weights["plain"][name], rtol=1e-3, atol=1e-4)
