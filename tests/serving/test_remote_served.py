"""`yojo.RemoteJudge` against the server itself: the scores of the model here, for every kind of input and of caller."""

import asyncio
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

import yojo
from tests.reward_cases import demo_judge, pictures
from tests.serving.serving_cases import ANSWERS, QUESTION, engine_of, listening, png
from yojo.judges.wire import request_of
from yojo.serving.settings import Limits, Settings

KEY = "a-key-of-sixteen-characters"


@pytest.fixture(scope="module")
def server():
    settings = Settings(keys={KEY: "tests"}, limits=Limits(responses=8))
    with listening(engine_of(settings)) as server:
        yield server


@pytest.fixture()
def judge(server):
    with yojo.RemoteJudge(server.url, api_key=KEY) as judge:
        yield judge


@pytest.fixture()
def examples(tmp_path):
    """Images as files, bytes, PIL images, arrays and in messages' parts; JPEG, GIF with a palette, gray with alpha; none."""
    small = pictures()[3]
    jpeg, gif = io.BytesIO(), io.BytesIO()
    small.convert("RGB").resize((64, 48)).save(jpeg, "JPEG", quality=70)
    small.convert("P").save(gif, "GIF")
    (tmp_path / "digit.png").write_bytes(png(1))
    alpha = Image.fromarray(np.arange(512, dtype=np.uint8).reshape(16, 16, 2) % 251, "LA")
    images = [
        str(tmp_path / "digit.png"),
        png(2),
        small,
        np.asarray(small.convert("RGB")),
        jpeg.getvalue(),
        gif.getvalue(),
        alpha,
    ]
    found = [yojo.Example(QUESTION, ANSWERS[: 1 + n % 3], images=[image]) for n, image in enumerate(images)]
    parts = [{"type": "text", "text": "This: "}, {"type": "image"}, {"type": "text", "text": QUESTION}]
    found.append(yojo.Example([{"role": "user", "content": parts}], ANSWERS, images=[png(4)]))
    inline = [{"type": "image", "image": png(5)}, {"type": "text", "text": QUESTION}]
    found.append(yojo.Example([{"role": "user", "content": inline}], ANSWERS))
    found.append(yojo.Example("Say <image> or </s>, é, \U0001f600.", ["<|resp_sep|> no.", "\n yes"], literal_tags=True))
    return found


def test_the_scores_of_the_model_here(judge, examples):
    wanted = demo_judge().score_many(examples)
    for found in (judge.score_many(examples), asyncio.run(judge.ascore_many(examples))):
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    assert judge.fingerprint() == demo_judge().fingerprint()
    assert (judge.mode, judge.order_free) == ("comparative", False)


def test_errors_are_those_of_the_example(judge, server):
    bad = [
        yojo.Example(QUESTION, ["word"] * 9, id="many"),
        yojo.Example(QUESTION, ["yes."]),
        yojo.Example(QUESTION, ["a"], images=[b"no"]),
    ]
    found = dict(judge.score_each(bad, errors="return"))
    assert isinstance(found[0], ValueError) and "many" in str(found[0]) and "responses" in str(found[0])
    assert found[1].shape == (1,) and isinstance(found[2], ValueError)
    with pytest.raises(yojo.judges.EndpointError, match="YOJO_API_KEY|api_key"):
        yojo.RemoteJudge(server.url, api_key="another-key-altogether").score(QUESTION, ANSWERS)


def test_rewards_through_the_server(judge):
    reward = yojo.GroupReward(judge, group_size=3)
    here = yojo.GroupReward(demo_judge(), group_size=3)
    rows = {"prompts": [QUESTION] * 3, "completions": ANSWERS}
    torch.testing.assert_close(torch.tensor(reward(**rows)), torch.tensor(here(**rows)), rtol=0, atol=2e-6)


def test_the_keys_of_turns_keep_their_order():
    turn = {"role": "assistant", "content": "4", "reasoning_content": "2 and 2", "tool_calls": [{"b": 1, "a": 2}]}
    prompt = [{"role": "user", "content": "2 + 2?"}, turn, {"role": "user", "content": "Sure?"}]
    sent = request_of(yojo.Example(prompt, ["Yes."]))["prompt"]
    assert json.dumps(sent) == json.dumps(yojo.Example(prompt, ["Yes."]).prompt)
    with pytest.raises(TypeError, match="cannot be sent as JSON"):  # which would make strings of them
        request_of(yojo.Example([{**prompt[0], 1: "x"}], ["Yes."]))
