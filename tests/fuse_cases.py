"""What the tests of fused layers share: models with and without them on the same rows."""

import tiny
import torch
from family_cases import patched, rows_of, samples_of

import yojo


def pair(family, fuse, **options):
    """(fused model, the same model as it is, collator)."""
    options = {"mode": "isolated"} | options
    model, collator = patched(family, fuse=fuse, **options)
    return model, patched(family, fuse="none", **options)[0], collator


def batches_of(family, collator):
    """Packed rows of several samples and of one, of different lengths."""
    samples = samples_of(family)
    rows = [[samples[name] for name in names] for names in rows_of(family)] + [[sample] for sample in samples.values()]
    return [row_of(collator, row) for row in rows]


def row_of(collator, samples):
    """The batch of (processed prompt, responses) pairs."""
    return collator.pack([collator.from_processed(prompt, responses) for prompt, responses in samples])


def text_row(collator, prompts, branches):
    """A packed row of random text, by the lengths of its prompts and responses."""
    samples = []
    for i, (length, lengths) in enumerate(zip(prompts, branches, strict=True)):
        prompt = {"input_ids": torch.tensor([tiny.words(length, i)])}
        samples.append((prompt, tiny.responses(i, lengths)))
    return row_of(collator, samples)


def train(model, batch):
    """(scores, gradients by name) of one backward pass."""
    model.zero_grad()
    table = model(**batch).scores
    scores = table[table.isfinite()]
    (scores * torch.arange(1, 1 + len(scores))).sum().backward()
    return scores.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_training(model, plain, batch, tolerance=2e-5):
    """Scores within 2e-6, gradients within a part of their norm; or of the largest, where they cancel out."""
    (scores, grads), (expected, expected_grads) = (train(m, batch) for m in (model, plain))
    assert (scores - expected).abs().max() <= 2e-6
    assert grads.keys() == expected_grads.keys() and len(grads) > 6
    largest = max(grad.norm() for grad in expected_grads.values())
    for name, grad in grads.items():
        assert (grad - expected_grads[name]).norm() <= tolerance * (expected_grads[name].norm() + 1e-2 * largest), name


def lora(model):
    """The model with LoRA on attention and MLP, and a trained copy of the value head where it has one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "gate_proj"]
    saved = ["score"] if hasattr(model, "score") else None
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=targets, modules_to_save=saved, init_lora_weights=False)
    )


def module_dicts(model):
    """The attributes of every module, by the module's name."""
    return {name: set(module.__dict__) for name, module in model.named_modules()}


def check_ordinary_inputs(family, fuse):
    """Logits and generate() of a fused model, before and after it has scored, are those of the model unpatched."""
    tokenizer = tiny.tokenizer(with_separator=True)
    model = tiny.build(family)
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    prompt = next(iter(tiny.prompts(family).values()))

    def outputs():
        with torch.no_grad():
            return model(**prompt).logits, model.generate(**prompt, max_new_tokens=4, do_sample=False)

    expected = outputs()
    yojo.patch(model, tokenizer, fuse=fuse, head_dim=16)
    batch = batches_of(family, yojo.Collator(tokenizer, model))[-1]
    for _ in range(3):
        assert all(torch.equal(got, wanted) for got, wanted in zip(outputs(), expected, strict=True))
        with torch.no_grad():
            model(**batch)


def unpatched_like_new(model, family):
    """Whether nothing is left on any module after `unpatch`."""
    return module_dicts(yojo.unpatch(model)) == module_dicts(tiny.build(family))
