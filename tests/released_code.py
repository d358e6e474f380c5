"""What the paper's released code computes, in plain PyTorch on the stock model: the truth for `format="mr2rm"`."""

import math

import torch

ACTIVATIONS = {
    "silu": torch.nn.SiLU,
    "gelu": torch.nn.GELU,
    "relu": torch.nn.ReLU,
    "selu": torch.nn.SELU,
    "tanh": torch.nn.Tanh,
}
SEPARATOR = "<|resp_sep|>"


def make_head(pooling, head, activation, hidden_size, head_dim=24, seed=5):
    """The value head with random weights, a `Linear` or a `Sequential`."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 * hidden_size if pooling == "first_last_concat" else hidden_size
    if head == "linear":
        made = torch.nn.Linear(width, 1)
    else:
        made = torch.nn.Sequential(
            torch.nn.Linear(width, head_dim), ACTIVATIONS[activation](), torch.nn.Linear(head_dim, 1)
        )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (0.1 if parameter.ndim > 1 else 0.5))
    return made


def names_of(head):
    """state dict name -> name in `yojo.patching.head.ScoreHead`."""
    if isinstance(head, torch.nn.Linear):
        return {"weight": "weight2", "bias": "bias2"}
    return {"0.weight": "weight1", "0.bias": "bias1", "2.weight": "weight2", "2.bias": "bias2"}


def put_head(score, head):
    """Give a patched model's head the weights of a released one."""
    with torch.no_grad():
        for theirs, ours in names_of(head).items():
            getattr(score, ours).copy_(head.state_dict()[theirs])


def conversation(prompt, responses, images=()):
    """The two turns as the released code builds them."""
    content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    answer = f"\n\n{SEPARATOR}\n\n".join(responses)
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ], answer


def ends_and_starts(ids, answer_ids, separator_id, count):
    """The released rule: find the answer's tokens in the sequence, then cut at the separators behind it."""
    first = next(i for i in range(len(ids)) if ids[i : i + len(answer_ids)] == answer_ids)
    cuts = [i for i in range(first, len(ids)) if ids[i] == separator_id]
    assert len(cuts) == count - 1
    return [*(cut - 1 for cut in cuts), len(ids) - 1], [first, *(cut + 1 for cut in cuts)]


def pooled(hidden, ends, starts, pooling):
    """[N, H] or [N, 2H] from hidden [L, H]."""
    last, first = hidden[ends], hidden[starts]
    if pooling == "response_mean":
        return torch.stack([hidden[a : b + 1].mean(dim=0) for a, b in zip(starts, ends, strict=True)])
    return {
        "last": last,
        "first": first,
        "first_last_concat": torch.cat([first, last], dim=-1),
        "first_last_add": first + last,
        "first_last_sub": last - first,
    }[pooling]


def scores(model, inputs, ends, starts, pooling, head, scale=True):
    """[N] scores from the stock model, which keeps every layer's hidden states."""
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True, use_cache=False)
        hidden = output.hidden_states[-1][0]
        value = head.to(hidden.dtype)(pooled(hidden, ends, starts, pooling)).squeeze(-1)
    return value / math.sqrt(hidden.shape[-1]) if scale else value
