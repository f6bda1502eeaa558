"""Tiny random models of every family that is adapted."""

from typing import Any

import torch
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 32
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "decoder_sparse_step": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "mixtral": (MixtralForCausalLM, MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2_moe": (Qwen2MoeForCausalLM, Qwen2MoeConfig, {**QWEN, "shared_expert_intermediate_size": 12}),
    "qwen3_moe": (Qwen3MoeForCausalLM, Qwen3MoeConfig, {**QWEN, "norm_topk_prob": True, "head_dim": 8}),
    "olmoe": (OlmoeForCausalLM, OlmoeConfig, {"num_experts": 8, "num_experts_per_tok": 3}),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        {
            **LATENT,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 12,
            "first_k_dense_replace": 1,
        },
    ),
    "gpt_oss": (
        GptOssForCausalLM,
        GptOssConfig,
        {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8},
    ),
    "granitemoe": (GraniteMoeForCausalLM, GraniteMoeConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def build(family: str, seed: int = 0, **changes: Any) -> nn.Module:
    """Make a small model of a family whose every parameter is random; in training mode."""
    torch.manual_seed(seed)
    model_class, config_class, own = FAMILIES[family]
    model = model_class(config_class(**{**COMMON, **own, **changes}))
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.1)
    return model.train()


def tokens(seed: int = 0, batch: int = 2, length: int = 12) -> torch.Tensor:
    """Random token ids [batch, length]."""
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
