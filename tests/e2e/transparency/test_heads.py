"""transformers' Trainer on heads of many kinds: losses and weights are those of one process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate.state import AcceleratorState
from torch import Tensor

from skippipe_plugin.accelerate import SkipPipe, SkipPipeConfig
from tests.grids import all_slow_but, slow

from ..modules import Rows

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
BERT = {**SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"vocab_size": 32, "n_positions": 32, "n_embd": 16, "n_layer": 4, "n_head": 2}
DISTIL = {"dim": 16, "n_heads": 2, "n_layers": 4, "hidden_dim": 32, "vocab_size": 32}
SEQ2SEQ = {
    **{"vocab_size": 32, "d_model": 16, "encoder_layers": 4, "decoder_layers": 2, "encoder_attention_heads": 2},
    **{"decoder_attention_heads": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 32, "dropout": 0.0, "pad_token_id": 2},
    **{"bos_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


IDS = torch.randint(3, 32, (24, 10), generator=torch.Generator().manual_seed(0))
TOKENS = torch.where(torch.arange(10) < torch.arange(24)[:, None] % 8 + 2, IDS, -100)
TAGS = torch.where(TOKENS == -100, -100, TOKENS % 3)
CLASSES = torch.arange(24) % 2
TEXT = {"input_ids": IDS}
SPANS = {"start_positions": torch.arange(24) * 5 % 14, "end_positions": torch.arange(24) * 7 % 14}

Head = tuple[Callable[[], Any], dict[str, Tensor], str | None]
HEADS: dict[str, Head] = {
    "bert masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), {**TEXT, "labels": TOKENS}, None),
    "bert classes": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)),
        {**TEXT, "labels": CLASSES},
        None,
    ),
    "bert regression": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=1)),
        {**TEXT, "labels": CLASSES.float()},
        None,
    ),
    "bert tags": (
        lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=3)),
        {**TEXT, "labels": TAGS},
        None,
    ),
    "bert answers": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)), {**TEXT, **SPANS}, None),
    "bert pretraining": (
        lambda: hf.BertForPreTraining(hf.BertConfig(**BERT)),
        {**TEXT, "labels": TOKENS, "next_sentence_label": CLASSES},
        None,
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)),
        {**TEXT, "labels": TOKENS},
        None,
    ),
    "llama": (
        lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=2)),
        {**TEXT, "labels": TOKENS},
        None,
    ),
    "vit": (
        lambda: hf.ViTForImageClassification(hf.ViTConfig(**{**BERT, "image_size": 8, "patch_size": 4})),
        {"pixel_values": random(24, 3, 8, 8), "labels": CLASSES},
        None,
    ),
    "distilbert": (
        lambda: hf.DistilBertForSequenceClassification(
            hf.DistilBertConfig(**DISTIL, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0)
        ),
        {**TEXT, "labels": CLASSES},
        None,
    ),
    "roberta": (
        lambda: hf.RobertaForTokenClassification(hf.RobertaConfig(**BERT, num_labels=3, max_position_embeddings=40)),
        {**TEXT, "labels": TAGS},
        None,
    ),
    "bart": (
        lambda: hf.BartForConditionalGeneration(
            hf.BartConfig(**SEQ2SEQ, max_position_embeddings=40, forced_eos_token_id=None)
        ),
        {**TEXT, "labels": TOKENS},
        None,
    ),
    "whisper": (
        lambda: hf.WhisperForConditionalGeneration(
            hf.WhisperConfig(**SEQ2SEQ, num_mel_bins=8, max_source_positions=20, max_target_positions=20)
        ),
        {"input_features": random(24, 8, 40), "labels": TOKENS},
        "model.encoder.layers",
    ),
}
ACCUMULATED = {"bart"}
"""What the ordinary run accumulates."""


class Losses(hf.TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.values += [logs["loss"]] if "loss" in logs else []


def run(head: Head, folder: Path, pipeline: bool, options: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    make, columns, blocks = head
    AcceleratorState._reset_state(True)
    torch.manual_seed(0)
    losses = Losses()
    quiet = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "logging_steps": 1}
    usual = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 0.05, "optim": "sgd", "seed": 0}
    arguments = hf.TrainingArguments(
        str(folder), **{**quiet, **usual, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **options}
    )
    trainer = hf.Trainer(model=make(), args=arguments, train_dataset=Rows(columns), callbacks=[losses])
    if pipeline:
        config = SkipPipeConfig(num_stages=2, num_microbatches=4, verbose=False, blocks=blocks)
        with SkipPipe(trainer.accelerator, config=config):
            trainer.train()
    else:
        trainer.train()
    return losses.values, {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def assert_exact(name: str, folder: Path, options: dict[str, Any]) -> None:
    plain, found = (run(HEADS[name], folder, pipeline, options) for pipeline in (False, True))
    assert len(set(plain[0])) == 3
    assert found[0] == pytest.approx(plain[0], rel=1e-6)
    for key, tensor in plain[1].items():
        torch.testing.assert_close(found[1][key], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", all_slow_but(HEADS, "bert answers", "gpt2", "bart"))
def test_heads_of_transformers(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert_exact(name, tmp_path, {})
    assert "computes something else" not in caplog.text  # the gradient of a key's bias is rounding alone


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in ACCUMULATED else pytest.mark.slow) for name in HEADS]
)
def test_heads_of_transformers_over_several_batches(name: str, tmp_path: Path) -> None:
    assert_exact(name, tmp_path, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 7})


@pytest.mark.parametrize("name", ["llama", slow("bert classes"), slow("bert masked")])
def test_heads_under_autocast_are_cut(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain, found = (run(HEADS[name], tmp_path, pipeline, {"bf16": True}) for pipeline in (False, True))
    assert found[0] == pytest.approx(plain[0], rel=2e-3)  # of a bfloat16, 8e-3 is the next one
    assert "runs once, on the whole batch" not in caplog.text


def test_a_head_in_bfloat16_is_cut_where_the_mask_could_count_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    columns = {**TEXT, "attention_mask": (TOKENS != -100).long(), "labels": CLASSES}
    head = (lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT)).to(torch.bfloat16), columns, None)
    plain, found = (run(head, tmp_path, pipeline, {}) for pipeline in (False, True))
    assert found[0] == pytest.approx(plain[0], rel=1e-2)
    assert "runs once, on the whole batch" not in caplog.text


@pytest.mark.parametrize("name", ["gpt2", slow("bert tags")])
def test_smoothed_labels(name: str, tmp_path: Path) -> None:
    assert_exact(name, tmp_path, {"label_smoothing_factor": 0.1})
