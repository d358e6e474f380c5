"""Facts about the modules that transformers builds decoder layers from, by class name."""

# Facts about transformers' modules, by class name. RMSNorms: what is added to the weight, and Liger's name for when the
# weight comes in, after rounding to the input's dtype ("llama") or before ("gemma").
NORMS = {
    "LlamaRMSNorm": (0.0, "llama"),
    "MistralRMSNorm": (0.0, "llama"),
    "Qwen2RMSNorm": (0.0, "llama"),
    "Qwen3RMSNorm": (0.0, "llama"),
    "Qwen2VLRMSNorm": (0.0, "llama"),
    "Qwen2_5_VLRMSNorm": (0.0, "llama"),
    "Qwen3VLTextRMSNorm": (0.0, "llama"),
    "Molmo2RMSNorm": (0.0, "llama"),
    "GemmaRMSNorm": (1.0, "gemma"),
    "Gemma2RMSNorm": (1.0, "gemma"),
    "Gemma3RMSNorm": (1.0, "gemma"),
}


# MLPs that compute down_proj(act_fn(gate_proj(x)) * up_proj(x)), and the activations that Liger has.
MLPS = (
    "LlamaMLP",
    "MistralMLP",
    "Qwen2MLP",
    "Qwen3MLP",
    "Qwen3VLTextMLP",
    "Molmo2MLP",
    "GemmaMLP",
    "Gemma2MLP",
    "Gemma3MLP",
)


ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu"}


# Attention that calls `apply_rotary_pos_emb` of its module, which rotates halves: M-RoPE has then joined its axes.
ATTENTIONS = (
    "LlamaAttention",
    "MistralAttention",
    "Qwen2Attention",
    "Qwen3Attention",
    "Qwen2VLAttention",
    "Qwen2_5_VLAttention",
    "Qwen3VLTextAttention",
    "Molmo2Attention",
    "GemmaAttention",
    "Gemma2Attention",
    "Gemma3Attention",
)
