"""Models of transformers, as the library has them, built from small configurations: nothing is downloaded.

Dropout is off, so that a run can be compared with the plain Trainer's.
"""

from __future__ import annotations

from typing import Any

import peft
import transformers as hf
from torch import nn

from .networks import DEPTH, VOCABULARY, WIDTH

_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_SIDES: dict[str, Any] = {
    f"{side}_{name}": size
    for side in ("encoder", "decoder")
    for name, size in {"layers": DEPTH, "attention_heads": 2, "ffn_dim": 32}.items()
}
_NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
_LAYERS = {"num_hidden_layers": DEPTH, "num_attention_heads": 2, "hidden_size": WIDTH, "intermediate_size": 32}
_TEXT = {**_SPECIAL, **_LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "num_key_value_heads": 2}
_VISION = {**_LAYERS, "num_hidden_layers": 2, "image_size": 8, "patch_size": 4}

IMAGE_TOKEN, VISION_START = 31, 30
"""What stands for a patch of an image in a text, and before the first one."""


def t5() -> nn.Module:
    sizes = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": DEPTH, "num_heads": 2, "vocab_size": VOCABULARY}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, pad_token_id=2)
    )


def bart() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "max_position_embeddings": 32}
    config = hf.BartConfig(**sizes, **_SIDES, **_SPECIAL, **_NO_DROPOUT, decoder_start_token_id=1)
    return hf.BartForConditionalGeneration(config)


def whisper() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "d_model": WIDTH, "num_mel_bins": 8}
    lengths = {"max_source_positions": 11, "max_target_positions": 16}
    silent = {"suppress_tokens": None, "begin_suppress_tokens": None, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**sizes, **lengths, **_SIDES, **_SPECIAL, **_NO_DROPOUT, **silent)
    return hf.WhisperForConditionalGeneration(config)


def clip() -> nn.Module:
    text = {**_TEXT, "attention_dropout": 0.0}
    del text["num_key_value_heads"]
    vision = {**_VISION, "num_hidden_layers": DEPTH, "attention_dropout": 0.0}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_TEXT))


def llava() -> nn.Module:
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_TEXT),
        vision_config=hf.CLIPVisionConfig(**_VISION, projection_dim=8),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
    )
    return hf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> nn.Module:
    text = {**_TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2, "hidden_size": WIDTH, "patch_size": 4, "mlp_ratio": 2}
    tokens = {"image_token_id": IMAGE_TOKEN, "vision_start_token_id": VISION_START, "vision_end_token_id": 29}
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=vision, video_token_id=28, **tokens)
    )


def albert() -> nn.Module:
    config = {**_TEXT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "embedding_size": 8}
    del config["num_key_value_heads"]
    return hf.AlbertForMaskedLM(hf.AlbertConfig(**config))


def with_lora(model: nn.Module) -> nn.Module:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
