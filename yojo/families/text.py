"""Text-only families, and decoders that stand in families of several kinds."""

from yojo.families.family import GEMMA_NORM, Decoder, Family

FAMILIES = (
    Family("Llama", ("llama",), decoders=("llama",)),
    Family("Qwen3", ("qwen3",), decoders=("qwen3",)),
    Family("Gemma 2", ("gemma2",), decoders=("gemma2",)),
)

DECODERS = (
    Decoder("llama", norms=("LlamaRMSNorm",), mlps=("LlamaMLP",), attentions=("LlamaAttention",)),
    Decoder("qwen2", norms=("Qwen2RMSNorm",), mlps=("Qwen2MLP",), attentions=("Qwen2Attention",)),
    Decoder("qwen3", norms=("Qwen3RMSNorm",), mlps=("Qwen3MLP",), attentions=("Qwen3Attention",)),
    Decoder("gemma", norms=("GemmaRMSNorm",), mlps=("GemmaMLP",), attentions=("GemmaAttention",), norm=GEMMA_NORM),
    Decoder("gemma2", norms=("Gemma2RMSNorm",), mlps=("Gemma2MLP",), attentions=("Gemma2Attention",), norm=GEMMA_NORM),
)
