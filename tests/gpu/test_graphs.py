"""Short rows replayed from CUDA graphs score as they do without, and hold no more memory than they are meant to."""

import itertools
import threading

import pytest
import torch

import yojo
from yojo.demo import digits
from yojo.patching import graphs

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
        assert all(frame.failures == 0 for frame in frames.values())


def captured(reward_model, example):
    """The model on the GPU with graphs of this example's row, and its scores."""
    reward_model.model.cuda()
    yojo.patch(reward_model.model, fuse="none", graphs=1024)
    for _ in range(3):
        scores = reward_model.score(example.prompt, example.responses, images=example.images)
    assert any(frame.graphs for frame in reward_model.model.yojo.fusion.graphs.frames.values())
    return scores


def test_a_capture_that_fails_leaves_the_row_as_it_is(make_reward_model, samples, monkeypatch, caplog):
    """An operation that no graph may hold: what is captured with it is dropped, and captured again."""
    reward_model = make_reward_model(mode="isolated")
    example = examples_of(samples)[1]
    reward_model.model.yojo.whole_last_layer = "every layer is captured"
    expected = captured(reward_model, example)
    yojo.patch(reward_model.model, graphs=0)
    yojo.patch(reward_model.model, graphs=1024)
    layer = type(reward_model.model.get_decoder().layers[0].mlp)
    forward, failed = layer.forward, []

    def waiting(self, x):
        if torch.cuda.is_current_stream_capturing() and not failed:
            failed.append(1)
            x.sum().item()
        return forward(self, x)

    monkeypatch.setattr(layer, "forward", waiting)
    stream = torch.cuda.current_stream()
    for _ in range(5):
        scores = reward_model.score(example.prompt, example.responses, images=example.images)
        assert torch.allclose(scores, expected, rtol=0, atol=1e-5)
        assert torch.cuda.current_stream() == stream
    (frame,) = (frame for frame in reward_model.model.yojo.fusion.graphs.frames.values() if frame.failures)
    assert frame.failures == 1 and frame.graphs and frame.unfit is None
    assert "failed with" in caplog.text
    # Random numbers and the allocator are as outside of a capture.
    before = torch.cuda.memory_allocated()
    shared = torch.rand(2**20, device="cuda")
    shared.record_stream(torch.cuda.Stream())
    del shared
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.rand(8, device="cuda").numel() == 8 and torch.cuda.memory_allocated() < before + 2**20


def test_other_threads_pin_and_allocate_while_a_row_is_captured(make_reward_model, samples):
    """A loader that pins memory must neither fail nor make the capture fail."""
    stop, errors = threading.Event(), []

    def busy():
        try:
            for size in itertools.cycle(range(1, 65)):
                if stop.is_set():
                    break
                torch.empty(size * 2**16).pin_memory()
                torch.empty(size * 2**20, device="cuda").fill_(1)
        except RuntimeError as error:
            errors.append(error)

    reward_model = make_reward_model(mode="isolated")
    thread = threading.Thread(target=busy)
    thread.start()
    try:
        captured(reward_model, examples_of(samples)[1])
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert all(frame.failures == 0 for frame in reward_model.model.yojo.fusion.graphs.frames.values())


def test_rows_of_two_streams_do_not_meet(make_reward_model, samples):
    """A second stream fills what the first one's graphs still read: it waits for them."""
    reward_model = make_reward_model(mode="isolated")
    model, examples = reward_model.model, examples_of(samples)[:6]
    captured(reward_model, examples[1])
    pack = reward_model.collator.pack
    batches = [pack([reward_model.collator.encode(one, rankings=False)], graphs.BUCKET) for one in examples]
    batches = [{name: value.to("cuda") for name, value in batch.items()} for batch in batches]
    with torch.inference_mode():
        for _ in range(3):
            expected = [model(**batch).scores for batch in batches]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        for _ in range(5):
            found = []
            for number, batch in enumerate(batches):
                with torch.cuda.stream(streams[number % 2]):
                    torch.cuda._sleep(2_000_000 * (number % 2))
                    found.append(model(**batch).scores)
            torch.cuda.synchronize()
            assert all(map(torch.equal, found, expected))


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
