"""Graphs of short rows with a capture that runs the call again instead of replaying it: what is filled in, and when.

A graph reads the tensors of its bucket alone, and so does a call that is run again: a tensor that is not filled in anew
would show in the scores.
"""

import copy

import pytest
import torch

import yojo
from yojo.patching import attention as patched_attention
from yojo.patching import fuse, graphs
from yojo_kernels import multi_response_attention, tuning

PROMPTS = ["Which digit?", "And here, which digit is it?", "What?"]


def attend_with(impl, monkeypatch):
    def attend(*arguments, **keywords):
        keywords["impl"] = "auto" if keywords.get("query_rows") is not None else impl
        return multi_response_attention(*arguments, **keywords)

    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(32, 32, 1, 1))  # a quarter of the steps
    monkeypatch.setattr(patched_attention, "multi_response_attention", attend)


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    """Buckets are small, and attention reads the layout's tensors alone, as the kernels do, many times as fast."""
    attend_with("reference", monkeypatch)
    monkeypatch.setattr(graphs, "BUCKET", 64)


class Recorder:
    """A capture that counts."""

    def __init__(self):
        self.captured = self.replayed = 0

    def __call__(self, call):
        self.captured += 1

        def replay():
            self.replayed += 1
            call()

        return replay


def examples_of(samples, count=4):
    texts = ["one", "it is a two", "3", "maybe four", "a five"]
    return [
        yojo.Example(PROMPTS[i % 3], texts[: 1 + (i * 2) % 5], images=[samples[i][0]] * (i % 3 != 2))
        for i in range(count)
    ]


def with_graphs(reward_model, limit=192):
    yojo.patch(reward_model.model, graphs=limit)
    reward_model.model.yojo.fusion.graphs.capture = recorder = Recorder()
    return recorder


@pytest.mark.parametrize(
    "options, impl", [({"mode": "isolated"}, "triton"), ({"permutations": 2}, "reference")], ids=str
)
def test_replayed_scores_are_the_same(make_reward_model, samples, options, impl, monkeypatch):
    attend_with(impl, monkeypatch)
    reward_model = make_reward_model(**options, layers=3 if impl == "triton" else None)
    examples = examples_of(samples, 3)
    expected = reward_model.score_many(examples, token_budget=1)
    recorder = with_graphs(reward_model)
    graphs_of_a_row = 3  # the first two layers, whose outputs features are added to, and all others in one
    for _ in range(2):
        got = reward_model.score_many(examples, token_budget=1)
        for one, other in zip(got, expected, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=2e-6)
    frames = reward_model.model.yojo.fusion.graphs.frames
    assert recorder.captured == graphs_of_a_row * sum(bool(frame.graphs) for frame in frames.values()) > 0
    assert recorder.replayed >= graphs_of_a_row * (2 * len(examples) - len(frames)) > 3 * recorder.captured / 2
    assert {tokens % 64 for tokens, *_ in frames} == {0} and max(tokens for tokens, *_ in frames) <= 192


def test_several_samples_and_rows_of_more_samples(make_reward_model, samples, monkeypatch):
    """Tables grow with the samples of a row: beyond the room that there is, the row runs as it is."""
    attend_with("triton", monkeypatch)
    reward_model = make_reward_model(mode="isolated", layers=2)
    short = [yojo.Example("What?", ["7"]) for _ in range(6)]
    expected = [reward_model.score_many(short[:count])[0] for count in (1, 1, 3, 6)]
    monkeypatch.setattr(graphs, "SPARE_TILES", 2)
    monkeypatch.setattr(graphs, "BUCKET", 96)
    recorder = with_graphs(reward_model, 96)
    replayed = []
    for count, scores in zip((1, 1, 3, 6), expected, strict=True):
        before = recorder.replayed
        assert torch.allclose(reward_model.score_many(short[:count])[0], scores, rtol=0, atol=2e-6)
        replayed.append(recorder.replayed > before)
    assert replayed == [False, True, True, False]


def test_other_weights_are_captured_anew(make_reward_model, samples):
    reward_model = make_reward_model(mode="isolated")
    example = examples_of(samples)[1]
    recorder = with_graphs(reward_model)
    for _ in range(3):
        before = reward_model.score_many([example])[0]
    captured = recorder.captured
    mlp = reward_model.model.get_decoder().layers[0].mlp
    mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight.detach() * 2)
    for _ in range(3):
        after = reward_model.score_many([example])[0]
    assert recorder.captured == 2 * captured and not torch.allclose(before, after, atol=1e-4)
    yojo.patch(reward_model.model, graphs=0)
    assert torch.allclose(reward_model.score_many([example])[0], after, rtol=0, atol=2e-6)


def test_what_a_graph_would_leave_out_runs_as_it_is(make_reward_model, samples):
    """Hooks, adapters and training mode; gradients and longer rows."""
    from peft import LoraConfig, get_peft_model

    example = examples_of(samples)[1]
    reward_model = make_reward_model(mode="isolated")
    recorder = with_graphs(reward_model)
    seen = []
    layer = reward_model.model.get_decoder().layers[0]
    handle = layer.mlp.register_forward_hook(lambda *arguments: seen.append(1))
    for _ in range(3):
        reward_model.score_many([example])
    assert recorder.captured == 0 and len(seen) == 3
    handle.remove()
    for _ in range(3):
        reward_model.score_many([example])
    assert recorder.captured > 0
    layer.mlp.register_forward_hook(lambda *arguments: seen.append(1))
    reward_model.score_many([example])
    assert len(seen) == 4

    reward_model = make_reward_model(mode="isolated")
    batch = reward_model.collator.pack([reward_model.collator.encode(example)], pad_to_multiple_of=64)
    recorder = with_graphs(reward_model)
    for _ in range(3):
        reward_model.model(**batch).scores.sum().backward()
    assert recorder.captured == 0
    assert [graphs.bucket_of(tokens, 128) for tokens in (1, 64, 65, 128, 129)] == [64, 64, 128, 128, None]

    reward_model = make_reward_model(mode="isolated")
    wrapped = get_peft_model(reward_model.model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    recorder = with_graphs(yojo.RewardModel(wrapped, reward_model.processor))
    for _ in range(3):
        yojo.RewardModel(wrapped.eval(), reward_model.processor).score_many([example])
    assert recorder.captured == 0


def test_inference_mode_no_grad_and_autocast_follow_each_other(make_reward_model, samples):
    """What is filled in anew was made in one mode and is filled in the other; another precision is another graph."""
    reward_model = make_reward_model(mode="isolated")
    model = reward_model.model
    batch = reward_model.collator.pack([reward_model.collator.encode(examples_of(samples)[1])], pad_to_multiple_of=64)
    contexts = {
        "inference": torch.inference_mode,
        "no_grad": torch.no_grad,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    }
    expected = {}
    for name, context in contexts.items():
        with torch.no_grad(), context():
            expected[name] = model(**batch).scores.clone()
    assert not torch.equal(expected["autocast"], expected["no_grad"])
    yojo.patch(model, fuse="none")
    recorder = with_graphs(reward_model)
    for name in ("inference", "inference", "no_grad", "autocast", "autocast", "inference", "no_grad", "autocast"):
        with torch.no_grad(), contexts[name]():
            assert torch.allclose(model(**batch).scores, expected[name], rtol=0, atol=2e-6), name
    assert recorder.replayed > recorder.captured > 0
    # A call that is run again obeys the precision around it, and a graph would not: it needs one of its own.
    assert len(model.yojo.fusion.graphs.frames) == 2


def test_training_mode_runs_as_it_is(make_reward_model, samples):
    """A graph made in eval mode would leave dropout out."""
    reward_model = make_reward_model(mode="isolated")
    batch = reward_model.collator.pack([reward_model.collator.encode(examples_of(samples)[1])], pad_to_multiple_of=64)
    recorder = with_graphs(reward_model)
    with torch.no_grad():
        for _ in range(3):
            reward_model.model(**batch)
        replayed = recorder.replayed
        reward_model.model.train()
        for _ in range(3):
            reward_model.model(**batch)
    assert recorder.replayed == replayed > 0


def test_graphs_go_before_compiling(make_reward_model, samples, monkeypatch):
    """Where "auto" compiles, the rows that graphs take are not compiled: asking for graphs must not do nothing."""
    monkeypatch.setattr(fuse, "_automatic", lambda device, obstacle: ("compile", "as on CUDA"))
    monkeypatch.setattr(fuse, "BACKEND", "eager")
    reward_model = make_reward_model(mode="isolated")
    recorder = with_graphs(reward_model)
    for _ in range(3):
        reward_model.score_many(examples_of(samples)[1:2])
    assert recorder.captured > 0 and not reward_model.model.yojo.fusion.compiled
    with pytest.raises(ValueError, match="graphs=192 cannot replay layers that fuse='compile' runs"):
        yojo.patch(reward_model.model, fuse="compile")
    assert reward_model.model.yojo.fuse == "auto" and reward_model.model.yojo.graphs == 192


def test_a_copy_has_graphs_of_its_own_and_unpatch_leaves_none(make_reward_model, samples):
    reward_model = make_reward_model(mode="isolated")
    example = examples_of(samples)[1]
    with_graphs(reward_model)
    for _ in range(2):
        expected = reward_model.score_many([example])[0]
    other = copy.deepcopy(reward_model.model)
    own = other.yojo.fusion.graphs
    assert own is not reward_model.model.yojo.fusion.graphs and not own.frames and other.yojo.graphs == 192
    assert own.layers[0] is other.get_decoder().layers[0]
    again = yojo.RewardModel(other, reward_model.processor)
    assert torch.allclose(again.score_many([example])[0], expected, rtol=0, atol=2e-6)
    yojo.unpatch(other)
    assert all("forward" not in layer.__dict__ and not hasattr(layer, "yojo_fusion") for layer in other.get_decoder().layers)  # fmt: skip


@pytest.mark.parametrize(
    "graphs_option, error", [(-1, ValueError), (100, ValueError), (2.5, TypeError), (True, TypeError)]
)
def test_a_wrong_number_is_refused(backbone, monkeypatch, graphs_option, error):
    monkeypatch.setattr(graphs, "BUCKET", 256)
    model, processor = copy.deepcopy(backbone)
    with pytest.raises(error, match="graphs must be"):
        yojo.patch(model, processor, graphs=graphs_option)
    assert not hasattr(model, "yojo")
