"""Peak memory of a scoring pass: no vocabulary logits, no hidden states of all layers."""

import pytest
import tiny
import torch
import transformers

import yojo

pytestmark = pytest.mark.gpu

HIDDEN, VOCABULARY, PROMPT = 256, 20_000, 3000


def model_and_row(layers):
    """A random Qwen3 in bfloat16 and a packed row of some 3,400 tokens, on the GPU."""
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": layers, "head_dim": 64}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 8192}
    config = transformers.Qwen3Config(**(tiny.TEXT | sizes))
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").bfloat16().eval()
    yojo.patch(model, tiny.tokenizer(), mode="isolated", fuse="none")
    collator = yojo.Collator(tiny.tokenizer(with_separator=True), model)
    prompt = {"input_ids": torch.tensor([tiny.words(PROMPT, 0)])}
    batch = collator.pack([collator.from_processed(prompt, tiny.responses(0, (100,) * 4))])
    return model.cuda(), {name: value.to("cuda") for name, value in batch.items()}


def peak(call):
    """Bytes that a call allocates at most beyond what was allocated before; warmed up, so that no workspace counts."""
    with torch.inference_mode():
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def test_peak_memory_has_neither_logits_nor_all_hidden_states():
    peaks, states = [], None
    for layers in (3, 7):
        model, batch = model_and_row(layers)
        tokens = batch["layout"].num_tokens
        states = 2 * tokens * HIDDEN
        peaks.append(peak(lambda model=model, batch=batch: model(**batch)))
        assert peaks[-1] < 2 * tokens * VOCABULARY / 2
        ids = {"input_ids": batch["input_ids"].clamp(max=tiny.VOCABULARY - 1)}
        logits = peak(lambda model=model, ids=ids: model(**ids, use_cache=False))
        assert logits >= 2 * tokens * VOCABULARY  # so that the bound means something
    assert abs(peaks[1] - peaks[0]) < states
