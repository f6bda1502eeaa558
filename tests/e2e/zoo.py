"""Tiny models of transformers and peft with their batches, built from configurations: nothing is downloaded.

Dropout is off, so that a run can be compared with the plain Trainer's. Everything else is as the library has it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import peft
import torch
import transformers as hf
from torch import Tensor, nn

from .models import tokens

VOCABULARY = 32
WIDTH = 16
_DECODER = {"vocab_size": VOCABULARY, "max_position_embeddings": 32, "hidden_size": WIDTH}
_GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4, "intermediate_size": 32}
_SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Entry:
    """How to build a model and the arguments of its forward."""

    model: Callable[[], nn.Module]
    data: Callable[[int], Batch]


def gpt2(**changes: object) -> nn.Module:
    config = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_layer": 4, "n_head": 2, **changes}
    sizes = {"vocab_size": VOCABULARY, "n_positions": 32, "n_embd": WIDTH}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**_SPECIAL, **sizes, **config))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_SPECIAL, **_DECODER, **_GROUPED))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_SPECIAL, **_DECODER, **_GROUPED, head_dim=8))


def opt() -> nn.Module:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "ffn_dim": 32, "word_embed_proj_dim": WIDTH}
    return hf.OPTForCausalLM(hf.OPTConfig(**_SPECIAL, **_DECODER, **sizes, dropout=0.0))


def mixtral() -> nn.Module:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MixtralForCausalLM(hf.MixtralConfig(**_SPECIAL, **_DECODER, **_GROUPED, **experts))


def bert() -> nn.Module:
    sizes = {"num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return hf.BertForSequenceClassification(hf.BertConfig(**_DECODER, **sizes, **off))


def vit() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
    return hf.ViTForImageClassification(hf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))


def lora_gpt2() -> nn.Module:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True)
    return peft.get_peft_model(gpt2(), config)


def language(samples: int) -> Batch:
    ids = tokens(samples, vocabulary=VOCABULARY)
    return {"input_ids": ids, "labels": ids}


def padded_text(samples: int) -> Batch:
    ids = tokens(samples, vocabulary=VOCABULARY)
    lengths = torch.arange(samples) % 5 + 4
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 0] % 3}


def images(samples: int) -> Batch:
    pixels = torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "labels": (pixels.mean((1, 2, 3)) > 0).long()}


ZOO = {
    "gpt2": Entry(gpt2, language),
    "llama": Entry(llama, language),
    "qwen3": Entry(qwen3, language),
    "opt": Entry(opt, language),
    "mixtral": Entry(mixtral, language),
    "bert": Entry(bert, padded_text),
    "vit": Entry(vit, images),
    "lora": Entry(lora_gpt2, language),
}
