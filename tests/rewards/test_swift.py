"""ms-swift: its own trainer, where it is installed; what the adapter reads of its rows, and what it refuses."""

import asyncio
import base64
import io
import json
import types

import framework_cases
import numpy as np
import pytest

from tests.reward_cases import Watched, picture
from yojo.rewards.swift import AsyncSwiftReward, SwiftPlugin, SwiftReward


def test_in_its_own_trainer():
    framework_cases.run("ms_swift", package="swift")


def arguments(size=2, evaluated=None, eval_strategy="no"):
    return types.SimpleNamespace(num_generations=size, num_generations_eval=evaluated, eval_strategy=eval_strategy)


def row(text, completion, *images, **columns):
    """A row as ms-swift hands it over."""
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": completion}]
    return {"messages": messages, "images": list(images), "is_truncated": False, "rollout_infos": {}} | columns


def call(reward, *rows, **options):
    """What ms-swift does: a column has None where another row has something."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names}
    completions = [row["messages"][-1]["content"] for row in rows]
    return reward(completions, trainer_state=types.SimpleNamespace(global_step=0), **columns, **options)


def png(colour):
    file = io.BytesIO()
    picture(colour).save(file, "PNG")
    return file.getvalue()


def test_images_are_the_same_in_whatever_form_they_come(tmp_path, monkeypatch):
    path, data = tmp_path / "red.png", png("red")
    path.write_bytes(data)
    long = base64.b64encode(data + bytes(3000)).decode()  # too long for a path
    monkeypatch.setenv("ROOT_IMAGE_DIR", str(tmp_path))
    judge = Watched()
    forms = [
        {"bytes": None, "path": str(path)},
        {"bytes": data, "path": None},
        str(path),
        "red.png",
        f"data:image/png;base64,{base64.b64encode(data).decode()}",
    ]
    call(SwiftReward(arguments(len(forms)), judge=judge), *(row("Why?", f"{n}", one) for n, one in enumerate(forms)))
    assert [len(example.responses) for example in judge.seen[0]] == [len(forms)]
    call(SwiftReward(arguments(1), judge=judge), row("Why?", "a", long))
    assert judge.seen[1][0].images == [data + bytes(3000)]


def test_one_question_about_two_pictures_is_two_groups():
    judge, reds, blues = Watched(), picture("red"), picture("blue")
    rows = [row("<image>Why?", text, image, prompt_id="prompt_0") for image in (reds, blues) for text in "ab"]
    call(SwiftReward(arguments(), judge=judge), *rows)
    assert [example.images for example in judge.seen[0]] == [[reds], [blues]]
    with pytest.raises(ValueError, match="an incomplete group: 1 completions of the prompt of row 0"):
        call(SwiftReward(arguments(), judge=judge), row("Why?", "a", reds), row("Why?", "b", blues))
    with pytest.raises(ValueError, match="an incomplete group"):
        call(SwiftReward(arguments(), judge=judge), row("Why?", "a"), row("Why? ", "b"))


def test_the_prompt_is_what_the_policy_was_given_and_its_tags_are_places():
    judge = Watched()
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "What is <image> this?"},
        {"role": "assistant", "content": "a"},
    ]
    tools = [json.dumps({"type": "function", "function": {"name": "look"}})]
    call(SwiftReward(arguments(1), judge=judge), row("", "a", picture("red"), messages=messages, tools=tools))
    (example,) = judge.seen[0]
    assert example.prompt == messages[:-1] and list(example.responses) == ["a"] and not example.literal_tags
    assert example.tools == [{"type": "function", "function": {"name": "look"}}]


def test_truncated_ones_are_told_by_ms_swift():
    rows = [row("Why?", "aaaa"), row("Why?", "a", is_truncated=True)]
    assert call(SwiftReward(arguments(), judge=Watched(), truncated=-7), *rows) == [4.0, -7.0]


def test_truncation_that_is_asked_for_and_not_told():
    rows = [{k: v for k, v in row("Why?", text).items() if k != "is_truncated"} for text in "ab"]
    assert len(call(SwiftReward(arguments(), judge=Watched()), *rows)) == 2
    with pytest.raises(ValueError, match="truncated=-7 needs the column is_truncated"):
        call(SwiftReward(arguments(), judge=Watched(), truncated=-7), *rows)


@pytest.mark.parametrize("values", [picture("red"), [[]], np.array([None, None])])
def test_a_column_that_cannot_be_read_is_not_passed_over(values):
    rows = [row("Why?", "a"), row("Why?", "b")]
    completions, messages = ["a", "b"], [one["messages"] for one in rows]
    with pytest.raises(ValueError, match="the column 'images' must be a list of 2 values, got"):
        SwiftReward(arguments(), judge=Watched())(completions, messages=messages, images=values)


@pytest.mark.parametrize(
    "changed, match",
    [
        ({"rollout_infos": {"num_turns": 2}}, "row 1: a rollout of 2 turns"),
        ({"audios": ["a.wav"]}, "row 1: the column 'audios' is filled"),
        ({"objects": {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}}, "row 1: the column 'objects' is filled"),
        ({"images": ["http://host/red.png"]}, "row 1: image 0: http://host/red.png is a URL"),
        ({"images": ["there-is-none.png"]}, "row 1: image 0: no such file"),
        ({"messages": [{"role": "user", "content": "Why?"}]}, "row 1: the messages must end with the completion"),
        ({"images": ["a.png", "b.png"]}, "row 1"),
    ],
)
def test_rows_of_which_the_judge_would_see_something_else(changed, match):
    with pytest.raises((TypeError, ValueError), match=match):
        call(SwiftReward(arguments(), judge=Watched()), row("Why?", "a"), row("Why?", "b", **changed))


def test_tags_in_turns_of_the_assistant():
    messages = [
        {"role": "user", "content": "<image>Hello"},
        {"role": "assistant", "content": "I see <image>"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(ValueError, match="a tag <image> in a turn of the assistant"):
        call(SwiftReward(arguments(1), judge=Watched()), row("", "a", picture("red"), messages=messages))


def test_fewer_tags_than_images_is_an_error():
    with pytest.raises(ValueError, match="1 <image> tags, but 2 images"):
        call(SwiftReward(arguments(1), judge=Watched()), row("<image>Why?", "a", picture("red"), picture("blue")))


@pytest.mark.parametrize("treatment", ["empty", "truncated", "forged"])
def test_none_is_refused_for_ms_swift_counts_it_as_0(treatment):
    with pytest.raises(ValueError, match=f"{treatment}='none': ms-swift counts"):
        SwiftReward(arguments(), judge="length", **{treatment: "none"})


def test_the_size_of_a_group_is_read_from_the_arguments():
    assert SwiftReward(arguments(3), judge="length").group_size == 3
    assert SwiftReward(arguments(3, 3, "steps"), judge="length").group_size == 3
    assert SwiftReward(arguments(3, 2, "no"), judge="length").group_size == 3
    with pytest.raises(ValueError, match="num_generations is 3 and num_generations_eval 2"):
        SwiftReward(arguments(3, 2, "steps"), judge="length")
    with pytest.raises(ValueError, match="group_size is 2, and ms-swift's num_generations is 3"):
        SwiftReward(arguments(3), judge="length", group_size=2)


def test_awaited_it_gives_the_same():
    rows = [row("Why?", "a"), row("Why?", "bbb")]
    assert asyncio.run(call(AsyncSwiftReward(arguments(), judge="length"), *rows)) == [1.0, 3.0]


def test_a_plugin_refuses_shards(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="a reward model in shards"):
        SwiftPlugin(None, group_size=2)
