"""Models of every family, patched, and what their own unpatched code makes of the same prompts."""

import functools

import pytest
import tiny
import torch

import yojo

FAMILIES = list(tiny.FAMILIES)


PARITY = 2e-6  # float32: about 16 ulp of a score of order 1


parametrize_families = pytest.mark.parametrize("family", FAMILIES)


def patched(family, attention=None, tokenizer=None, **options):
    """A patched model of the family and its collator."""
    model = tiny.build(family, attention)
    tokenizer = tokenizer or tiny.tokenizer()
    yojo.patch(model, tokenizer, **({"head_dim": 16} | options))
    spread(model.score)
    return model, yojo.Collator(tokenizer, model)


def spread(head):
    """Scores of order 1: each layer keeps the variance of what it reads, and the division by sqrt(H) is made up for.

    The head's own initialisation (std 0.01 twice, divided by sqrt(H)) gives scores of order 1e-3, on which an absolute
    tolerance would see nothing.
    """
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for weight, gain in ((head.weight1, 1.0), (head.weight2, head.scale)):
            if weight is not None:
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain / weight.shape[1] ** 0.5)


def stock_of(family, model, attention=None):
    """The family's unpatched model with the patched model's embedding, whose new row is the separator's."""
    stock = tiny.build(family, attention)
    stock.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    return stock


def continued(prompt, ids, family):
    """Ordinary inputs of one sequence: a processed prompt and the ids that follow it."""
    inputs = dict(prompt)
    tail = torch.tensor([ids])
    inputs["input_ids"] = torch.cat([prompt["input_ids"], tail], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in inputs:  # PaliGemma's suffix has the type 1, everything else is text
            types = torch.full_like(tail, int(family.startswith("paligemma")))
            inputs[name] = torch.cat([prompt[name], types], dim=1)
    return inputs


def own_scores(stock, head, prompt, ids, family, separator_id):
    """Scores at the separators among ids: the stock model's own pass, then the head."""
    hidden = stock.base_model(**continued(prompt, ids, family), use_cache=False)[0][0]
    length = prompt["input_ids"].shape[1]
    rows = [length + i for i, token in enumerate(ids) if token == separator_id]
    return head(hidden, torch.tensor(rows))


def single_scores(stock, model, collator, prompt, responses, family):
    """What isolated mode must give: one pass of the stock model per response."""
    separator = collator.separator_id
    passes = [own_scores(stock, model.score, prompt, [*ids, separator], family, separator) for ids in responses]
    return torch.cat(passes)


def joint_scores(stock, model, collator, prompt, responses, family):
    """What comparative mode must give: one pass of the stock model over all responses."""
    separator = collator.separator_id
    ids = [token for response in responses for token in [*response, separator]]
    return own_scores(stock, model.score, prompt, ids, family, separator)


def samples_of(family):
    """name -> (processed prompt, responses), with other responses for every prompt."""
    lengths = ((3, 5, 2), (4, 1), (2, 7, 3, 1), (6,), (1, 2), (3, 3))
    return {
        name: (prompt, tiny.responses(i, lengths[i])) for i, (name, prompt) in enumerate(tiny.prompts(family).items())
    }


def rows_of(family):
    """Lists of sample names that go into one packed row."""
    if family == "molmo2":  # its forward takes images or videos, not both
        return [["image", "text", "two images", "image"], ["video", "text", "longer video"]]
    if family == "llava_onevision":
        return [["image", "text", "two images", "video"], ["two images", "larger image", "image"]]
    names = list(samples_of(family))
    return [names, names[::-1]]


def batch_of(family, collator, names=None):
    """A packed row of the family's samples, ranked; of those that go together by default."""
    samples = [samples_of(family)[name] for name in names or rows_of(family)[0]]
    return collator.pack(
        [
            collator.from_processed(prompt, responses, rankings=list(range(1, len(responses) + 1)))
            for prompt, responses in samples
        ]
    )


def score(model, collator, samples):
    """Scores of several samples in one packed row, as a list of tensors."""
    batch = collator.pack([collator.from_processed(prompt, responses) for prompt, responses in samples])
    table = model(**batch).scores
    return [row[: len(responses)] for row, (_, responses) in zip(table, samples, strict=True)]


def difference(scores, expected):
    assert scores.shape == expected.shape
    return float((scores - expected).abs().max())


@functools.cache
def isolated(family):
    """A patched model, its collator and its stock reference, for tests that change none of them."""
    model, collator = patched(family, mode="isolated")
    return model, collator, stock_of(family, model)


@functools.cache
def comparative(family):
    model, collator = patched(family, mode="comparative")
    return model, collator, stock_of(family, model)


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(got, expected, tolerance=1e-4):
    """Gradients agree relative to the largest entry of each; sums over many tokens in another order, so 1e-4.

    Some are zero but for rounding (a bias of the keys changes no softmax): what is asked of those is a few ulp of the
    largest gradient of all, from which they are the rounding.
    """
    assert got.keys() == expected.keys()
    rounding = 8 * torch.finfo(torch.float32).eps * max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in got.items():
        bound = max(tolerance * float(expected[name].abs().max()), rounding)
        assert (gradient - expected[name]).abs().max() <= bound, name
