"""Short rows replayed from CUDA graphs score as they do without, and hold no more memory than they are meant to."""

import pytest
import torch

import yojo
from yojo import graphs
from yojo.demo import digits

pytestmark = pytest.mark.gpu
TEXTS = ["It is a 7.", "This is a two", "3", "Maybe it is a four, or a five.", "zero"]


def examples_of(samples):
    return [
        yojo.Example(digits.PROMPT, TEXTS[: 1 + (i * 2) % 5], images=[samples[i % len(samples)][0]] * (i % 3 != 2))
        for i in range(12)
    ]


@pytest.mark.parametrize("fuse", ["none", "auto"])
@pytest.mark.parametrize("options", [{"mode": "isolated"}, {}, {"permutations": 2}], ids=str)
def test_replayed_scores_are_the_same(make_reward_model, samples, options, fuse):
    reward_model = make_reward_model(**options)
    reward_model.model.cuda()
    yojo.patch(reward_model.model, fuse=fuse)
    examples = examples_of(samples)
    expected = reward_model.score_many(examples, token_budget=1)
    yojo.patch(reward_model.model, graphs=1024)
    for _ in range(3):
        for one, other in zip(reward_model.score_many(examples, token_budget=1), expected, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-5)
    frames = reward_model.model.yojo.fusion.graphs.frames
    if reward_model.model.yojo.fusion.choose(torch.device("cuda"))[0] != "compile":
        assert any(frame.graphs for frame in frames.values())


def test_graphs_do_not_add_up_in_memory(make_reward_model, samples):
    """Layers share one pool and two tensors of hidden states: more passes and layers take no more."""
    reward_model = make_reward_model(mode="isolated")
    reward_model.model.cuda()
    yojo.patch(reward_model.model, fuse="none", graphs=graphs.BUCKET)
    examples = examples_of(samples)[:1]
    for _ in range(3):
        reward_model.score_many(examples)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(20):
        reward_model.score_many(examples)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_other_weights_are_seen(make_reward_model, samples):
    reward_model = make_reward_model(mode="isolated")
    reward_model.model.cuda()
    yojo.patch(reward_model.model, fuse="none", graphs=1024)
    (example,) = examples_of(samples)[1:2]
    for _ in range(3):
        before = reward_model.score_many([example])[0]
    mlp = reward_model.model.get_decoder().layers[0].mlp
    with torch.no_grad():
        mlp.down_proj.weight.mul_(2)  # in place: the graphs read it where it is
    changed = reward_model.score_many([example])[0]
    yojo.patch(reward_model.model, graphs=0)
    assert not torch.allclose(before, changed, atol=1e-4)
    assert torch.allclose(reward_model.score_many([example])[0], changed, rtol=0, atol=1e-5)
