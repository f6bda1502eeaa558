"""Sampling with key-value caches while the blocks are on workers: the tokens are those of one process."""

import gc
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from skippipe_plugin.callbacks import StageRecovery
from skippipe_plugin.engine.channel import Channel
from skippipe_plugin.engine.errors import SkipPipeError
from skippipe_plugin.testing import At, Fault, Injector, Kill, Phase, Reset, Stop
from tests.grids import all_slow_but, slow
from tests.zoo import modules, pretrained

from . import zoo
from .models import tokens
from .modules import BATCH, Pretrained, loader
from .support import train, trainer_for

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": zoo.gpt2,
    "llama": zoo.llama,
    "qwen3": zoo.qwen3,
    "opt": zoo.opt,
    "mixtral": zoo.mixtral,
    "lora": zoo.lora_gpt2,
}
LENGTH = 10


def prompts(samples: int = 6) -> Tensor:
    # The first three tokens are special ones (end of sequence among them).
    return tokens(samples, 5, seed=3).clamp(min=3)


class Writer(Pretrained):
    """Generates in every hook in which users do."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__(net)
        self.options = options
        # Without an end of sequence: microbatches that end at different lengths make a list, not a padded tensor.
        net.generation_config.eos_token_id = None
        self.written: dict[str, list[Tensor]] = {}

    def write(self, where: str, ids: Tensor) -> Tensor:
        written = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LENGTH, pad_token_id=2, **self.options
        )
        self.written.setdefault(where, []).append(written)
        return written

    def validation_step(self, batch: Any) -> None:
        self.write("validation_step", batch["input_ids"][:, :4])
        self.log("val_loss", self.model(**batch).loss)

    def on_validation_epoch_end(self) -> None:
        self.write("epoch_end", prompts(2))
        self.write("epoch_end", prompts(3))

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.write("predict_step", batch)


def predict(make: Callable[[], LightningModule], data: DataLoader[Any], devices: int, **strategy: Any) -> Tensor:
    torch.manual_seed(0)
    module = make()
    strategy = {"num_microbatches": 2, **strategy} if devices > 1 else {}
    return torch.cat(trainer_for(devices, strategy).predict(module, data))


@pytest.mark.parametrize(
    ("name", "devices"),
    all_slow_but(
        [*((name, 3) for name in DECODERS), ("gpt2", 4), ("llama", 4)],
        ("gpt2", 3),
        ("mixtral", 3),
        ("lora", 3),
        ("llama", 4),
    ),
)
def test_greedy_generation_in_predict(name: str, devices: int) -> None:
    def make() -> Writer:
        return Writer(DECODERS[name](), do_sample=False)

    data = loader(prompts(), batch_size=4)
    plain = predict(make, data, 1)
    assert plain.shape == (6, 5 + LENGTH)
    assert torch.equal(predict(make, data, devices), plain)


BEAMS = {
    "beams": {"num_beams": 3, "do_sample": False},
    "more_beams": {"num_beams": 4, "length_penalty": 0.5, "do_sample": False},
    "without_cache": {"use_cache": False, "do_sample": False},
    "static": {"cache_implementation": "static", "do_sample": False},
}


@pytest.mark.parametrize("case", BEAMS)
@pytest.mark.parametrize("name", ["gpt2", slow("llama")])
def test_other_ways_to_generate(name: str, case: str) -> None:
    def make() -> Writer:
        return Writer(DECODERS[name](), **BEAMS[case])

    data = loader(prompts(), batch_size=4)
    assert torch.equal(predict(make, data, 3), predict(make, data, 1))


class Translating(LightningModule):
    """An encoder-decoder that writes in ``predict_step``."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.model, self.options = ENCODER_DECODERS[name](), options
        self.model.generation_config.eos_token_id = None
        for parameter in self.model.parameters():  # as they are, it writes one token again and again
            nn.init.normal_(parameter, std=0.5)

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.model.generate(batch, max_new_tokens=LENGTH, **self.options)  # type: ignore[no-any-return]


ENCODER_DECODERS: dict[str, Callable[[], Any]] = {
    "bart": pretrained.bart,
    "whisper": pretrained.whisper,
    "t5": pretrained.t5,
}


def sources(name: str) -> DataLoader[Any]:
    data = modules.speech(6)["input_features"] if name == "whisper" else modules.translations(6)["input_ids"]
    return loader(data, batch_size=4)


@pytest.mark.parametrize(
    "case", ["greedy", "beams", *(pytest.param(each, marks=pytest.mark.slow) for each in BEAMS if each != "beams")]
)
@pytest.mark.parametrize("name", ["bart", slow("whisper")])
def test_encoder_decoders(name: str, case: str) -> None:
    """Their cache is two: of the decoder's own tokens, and of what the encoder has made."""

    def make() -> Translating:
        return Translating(name, **BEAMS.get(case, {"do_sample": False}))

    data = sources(name)
    plain = predict(make, data, 1)
    assert len(plain.unique()) > 2
    for count in (1, 2):
        assert torch.equal(predict(make, data, 3, num_microbatches=count), plain)


def test_a_bias_that_grows_with_the_cache_is_refused_with_its_way_out() -> None:
    data = sources("t5")
    with pytest.raises(SkipPipeError, match=r"or on a key-value cache \(T5's .*use_cache=False"):
        predict(lambda: Translating("t5", do_sample=False), data, 3)
    options = {"do_sample": False, "use_cache": False}
    found, plain = (predict(lambda: Translating("t5", **options), data, devices) for devices in (3, 1))
    assert torch.equal(found, plain)


class Padded(Writer):
    """Prompts of several lengths, padded on the left."""

    def predict_step(self, batch: Tensor) -> Tensor:
        mask = (torch.arange(batch.shape[1], device=self.device) >= batch[:, :1] % 4).long()
        return self.model.generate(
            input_ids=batch.where(mask > 0, 2), attention_mask=mask, max_new_tokens=LENGTH, pad_token_id=2
        )


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_prompts_of_several_lengths(name: str) -> None:
    def make() -> Writer:
        return Padded(DECODERS[name]())

    data = loader(prompts(), batch_size=6)
    assert torch.equal(predict(make, data, 3), predict(make, data, 1))


def test_generation_between_training_steps() -> None:
    """The second call starts from an empty cache; training after it is not disturbed."""

    def fit(devices: int) -> tuple[list[float], dict[str, list[Tensor]], float]:
        data = loader(zoo.language(BATCH * 4))
        run = train(
            lambda: Writer(zoo.gpt2(), do_sample=False),
            data,
            devices,
            {"num_microbatches": 2} if devices > 1 else None,
            max_steps=4,
            val_check_interval=2,
            limit_val_batches=2,
            num_sanity_val_steps=1,
            val_data=loader(zoo.language(BATCH * 2)),
        )
        assert isinstance(run.module, Writer)
        return run.losses, run.module.written, float(run.trainer.callback_metrics["val_loss"])

    losses, written, val_loss = fit(3)
    plain_losses, plain_written, plain_val_loss = fit(1)
    assert losses == pytest.approx(plain_losses, rel=1e-5)
    assert val_loss == pytest.approx(plain_val_loss, rel=1e-5)
    # A pipeline generates for each microbatch of a validation step, in one process for the batch.
    assert torch.equal(torch.cat(written["validation_step"]), torch.cat(plain_written["validation_step"]))
    for ours, theirs in zip(written["epoch_end"], plain_written["epoch_end"], strict=True):
        assert torch.equal(ours, theirs)


def test_sampling_from_the_random_state_of_the_driver() -> None:
    def make() -> Writer:
        return Writer(zoo.llama(), do_sample=True, temperature=0.8)

    data = loader(prompts(), batch_size=6)
    sampled = [predict(make, data, devices, num_microbatches=1) for devices in (1, 3, 3)]
    assert torch.equal(sampled[1], sampled[2])
    assert torch.equal(sampled[1], sampled[0])


class Traffic(Callback):
    """Counts what the driver tells its workers, by the kind of message, from the third step on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: dict[str, list[tuple[int, int]]] = {}
        self.specs: list[int] = []
        self._monkeypatch = monkeypatch

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            self._count_messages()

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        pipeline = trainer.strategy._running().pipeline
        self.specs.append(len(pipeline._writer._numbers._numbers))
        assert not pipeline._proxies.ledger._ops, "training made a cache"

    def _count_messages(self) -> None:
        send = Channel.send

        def counting(channel: Channel, kind: str, fields: Any = None, blobs: Any = (), **options: Any) -> int:
            size = sum(memoryview(blob).nbytes for blob in blobs)
            self.messages.setdefault(kind, []).append((size, len(json.dumps(fields))))
            return send(channel, kind, fields, blobs, **options)

        self._monkeypatch.setattr(Channel, "send", counting)


@pytest.mark.parametrize("name", [slow("gpt2"), "llama"])
def test_caches_neither_travel_nor_pile_up_in_training(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With ``use_cache`` at its default, True, a step sends a few numbers for each microbatch and nothing else."""
    traffic = Traffic(monkeypatch)
    net = DECODERS[name]
    train(lambda: Pretrained(net()), loader(zoo.language(BATCH * 10)), 3, {"num_microbatches": 4}, callbacks=[traffic])
    assert net().config.use_cache
    assert len(set(traffic.specs)) == 1
    calls = traffic.messages.get("Calls", ())  # quick embeddings are all announced together with their step
    assert all(blobs == 0 and size < 1000 for blobs, size in calls)


class Sizes(Callback):
    """Notes how much is known about caches and specs after each validation."""

    def __init__(self) -> None:
        self.values: list[tuple[int, int]] = []

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        gc.collect()
        pipeline = trainer.strategy._running().pipeline
        pipeline._proxies.ledger.take_freed()
        self.values.append((len(pipeline._proxies.ledger._ops), len(pipeline._writer._numbers._numbers)))


def test_caches_are_freed_after_each_generation() -> None:
    sizes = Sizes()
    train(
        lambda: Writer(zoo.gpt2(), do_sample=False),
        loader(zoo.language(BATCH * 4)),
        3,
        {"num_microbatches": 2},
        callbacks=[sizes],
        max_steps=4,
        val_check_interval=1,
        num_sanity_val_steps=0,
        val_data=loader(zoo.language(BATCH)),
    )
    assert len(sizes.values) == 4
    assert [caches for caches, _ in sizes.values] == [0] * 4
    assert sizes.values[1] == sizes.values[3]


class Telling(Writer):
    """Generates between two steps, by weights with which each token depends on all before it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(zoo.gpt2(), **options)
        for parameter in self.model.parameters():
            nn.init.normal_(parameter, std=0.5)

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.model(input_ids=batch).logits  # type: ignore[no-any-return]

    def on_predict_batch_end(self, *_: Any) -> None:
        self.write("between steps", prompts(2))


class InStep(Telling):
    """Generates in a step, which begins anew."""

    def predict_step(self, batch: Tensor) -> Tensor:
        return self.write("in a step", batch)

    def on_predict_batch_end(self, *_: Any) -> None:
        pass


def written(make: Callable[[], Writer], devices: int = 1, *faults: Fault, replicas: int = 1) -> list[Tensor]:
    """Return what is generated, while faults happen at the moment of a token."""
    torch.manual_seed(0)
    module = make()
    callbacks = [StageRecovery()] if devices > 1 else []
    strategy = {"num_microbatches": 1, "replicas": replicas} if devices > 1 else {}
    with Injector(*faults) as injector:
        trainer_for(devices, strategy, callbacks=callbacks).predict(module, loader(prompts(2), 2))
    assert [each.done for each in injector.report] == [True] * len(faults)
    return next(iter(module.written.values()))


@pytest.mark.slow
@pytest.mark.parametrize("case", ["greedy", "beams"])
@pytest.mark.parametrize("nth", [2, 5])
def test_a_connection_breaks_between_two_tokens(case: str, nth: int) -> None:
    """In the first call and in a later one: a stage that has the tokens already does not add them once more."""

    def make() -> Writer:
        return Telling(**BEAMS.get(case, {"do_sample": False}))

    stop = Stop(At(Phase.VALIDATING, nth, action="0F0"), 2, 1.0)
    reset = Reset(At(Phase.VALIDATING, nth, action="0F0", delay_s=0.6), (1, 2))
    for found, expected in zip(written(make, 3, stop, reset), written(make), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.slow
def test_a_worker_is_lost_between_two_tokens() -> None:
    """It takes keys and values with it: a step begins anew with its generation, and other code is told to."""

    def in_step() -> Writer:
        return InStep(do_sample=False)

    lost = Kill(At(Phase.VALIDATING, 5, action="0F0"), 1)
    (found,), (expected,) = written(in_step, 5, lost, replicas=2), written(in_step)
    assert torch.equal(found, expected)
    with pytest.raises(SkipPipeError, match="begin the generation anew"):
        written(lambda: Telling(do_sample=False), 3, lost)
