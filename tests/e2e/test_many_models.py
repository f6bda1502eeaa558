"""A walk through the architectures of transformers: each trains and generates exactly, or says why it cannot."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from skippipe_plugin.engine.errors import SkipPipeError

from . import zoo
from .modules import BATCH, Pretrained, loader
from .support import assert_same_run, train, trainer_for

STEPS = 3
PIPELINE: dict[str, Any] = {"num_microbatches": 4}
_COMMON: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
    "pad_token_id": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_OFF: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_NO_PDROP: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NO_DROPOUT: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
_GROUPED: dict[str, Any] = {"num_key_value_heads": 1, "head_dim": 8}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT: dict[str, Any] = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 2,
}

# By the common prefix of the names of its configuration and of its model for causal language modelling.
DECODERS: dict[str, dict[str, Any]] = {
    "Bloom": {"n_layer": 4, "n_head": 2, **_NO_DROPOUT},
    "Cohere": _GROUPED,
    "DeepseekV3": {
        **_LATENT,
        **_EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    },
    "Falcon": _NO_DROPOUT,
    "GPTJ": {"n_embd": 16, "n_layer": 4, "n_head": 2, "rotary_dim": 4, **_NO_PDROP},
    "GPTNeo": {
        "num_layers": 4,
        "num_heads": 2,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 4,
        "resid_dropout": 0.0,
        "embed_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    "GPTNeoX": _NO_DROPOUT,
    "Gemma2": {**_GROUPED, "sliding_window": 4},
    "Glm4": _GROUPED,
    "GptOss": {**_GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    "Granite": _GROUPED,
    "Mistral": {**_GROUPED, "sliding_window": 4},
    "Mpt": {"d_model": 16, "n_heads": 2, "n_layers": 4, "max_seq_len": 40},
    "Olmo2": _GROUPED,
    "Phi": _NO_PDROP,
    "Phi3": _NO_PDROP,
    "Qwen2": _GROUPED,
    "Qwen3Moe": {**_GROUPED, **_EXPERTS, "num_experts": 4},
    "SmolLM3": _GROUPED,
    "StableLm": {"num_key_value_heads": 2, **_NO_DROPOUT},
    "Starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0},
}

_DISTILLED = {"dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "DistilBert": {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32, **_DISTILLED},
    "Electra": {"embedding_size": 16, **_OFF},
    "ModernBert": {"local_attention": 4},
    "Roberta": _OFF,
    "Llama": _GROUPED,
}

_IMAGE = {"image_size": 8, "patch_size": 4, "vocab_size": 8}
VISION: dict[str, dict[str, Any]] = {
    "Beit": {**_IMAGE, **_OFF, "drop_path_rate": 0.0},
    "DeiT": {**_IMAGE, **_OFF},
    "Dinov2": _IMAGE,
}


def build(name: str, head: str, changes: dict[str, Any]) -> nn.Module:
    config = getattr(hf, f"{name}Config")(**{**_COMMON, **changes})
    return getattr(hf, f"{name}For{head}")(config)


def check_training(make: Callable[[], nn.Module], data: zoo.Batch, **strategy: Any) -> None:
    pipeline = train(lambda: Pretrained(make()), loader(data), 3, {**PIPELINE, **strategy}, max_steps=STEPS)
    assert_same_run(pipeline, train(lambda: Pretrained(make()), loader(data), 1, max_steps=STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoders(name: str) -> None:
    check_training(lambda: build(name, "CausalLM", DECODERS[name]), zoo.language(BATCH * STEPS))


class Padded(Pretrained):
    """Generates from prompts of several lengths."""

    def predict_step(self, batch: Tensor) -> Tensor:
        mask = (torch.arange(batch.shape[1], device=batch.device) >= batch[:, :1] % 4).long()
        prompts = batch.where(mask > 0, 2)
        return self.model.generate(
            input_ids=prompts, attention_mask=mask, min_new_tokens=10, max_new_tokens=10, pad_token_id=2
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_generate(name: str) -> None:
    data = loader(zoo.language(6)["input_ids"][:, :5].clamp(min=3), batch_size=6)
    written = []
    for devices in (3, 1):
        torch.manual_seed(0)
        module = Padded(build(name, "CausalLM", DECODERS[name]))
        written += trainer_for(devices, PIPELINE if devices > 1 else None).predict(module, data)
    assert written[0].shape == (6, 15)
    assert torch.equal(written[0], written[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifiers(name: str) -> None:
    changes = {**CLASSIFIERS[name], "num_labels": 3}
    check_training(lambda: build(name, "SequenceClassification", changes), zoo.padded_text(BATCH * STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("name", VISION)
def test_vision(name: str) -> None:
    changes = {**VISION[name], "num_labels": 3}
    check_training(lambda: build(name, "ImageClassification", changes), zoo.images(BATCH * STEPS))


@pytest.mark.slow
def test_a_state_space_model() -> None:
    """It trains; its cache has no keys and values to keep on the workers."""
    changes = {"state_size": 4, "expand": 2}
    check_training(lambda: build("Mamba", "CausalLM", changes), zoo.language(BATCH * STEPS))
    data = loader(zoo.language(6)["input_ids"], batch_size=6)
    with pytest.raises(SkipPipeError, match="use_cache=False"):
        trainer_for(3, PIPELINE).predict(Padded(build("Mamba", "CausalLM", changes)), data)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2}
    special = {"decoder_start_token_id": 0, "pad_token_id": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=32, dropout_rate=0.0, **sizes, **special))


def bart() -> nn.Module:
    sides = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in _SIDES.items()}
    special = {"pad_token_id": 2, "bos_token_id": 0, "eos_token_id": 1}
    sizes = {"vocab_size": 32, "d_model": 16, "max_position_embeddings": 40}
    return hf.BartForConditionalGeneration(hf.BartConfig(**sizes, **sides, **special, dropout=0.0))


_SIDES = {"layers": 4, "attention_heads": 2, "ffn_dim": 32}


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_either_stack_of_an_encoder_decoder(stack: str) -> None:
    """Every block of the decoder attends to what the encoder has made, on the driver, which trains."""
    check_training(bart, zoo.language(BATCH * STEPS), blocks=f"model.model.{stack}.layers")


@pytest.mark.slow
def test_a_table_of_relative_positions_for_all_blocks() -> None:
    changes = {"relative_attention": True, "pos_att_type": ["p2c"], "num_labels": 3, **_OFF}
    check_training(lambda: build("DebertaV2", "SequenceClassification", changes), zoo.padded_text(BATCH * STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_a_bias_of_positions_that_the_first_block_makes_for_all(stack: str) -> None:
    check_training(t5, zoo.language(BATCH * STEPS), blocks=f"model.{stack}.block")
