"""What records of every benchmark become: groups, questions, ranks, media; and which records are refused, and how."""

import pytest
from benchmark_cases import CASES, made, opened, records_of, write, write_media

from yojo.data import DataError, MediaError
from yojo.evaluation import benchmarks
from yojo.inputs.digests import example_key

GROUPS = {
    "vl-rewardbench": ["hallucination"] * 3 + ["reasoning"] * 2 + ["general"] * 2,
    "multimodal-rewardbench": [
        "open_generation/correctness_task", "reasoning/math", "reasoning/coding", "safety/bias", "safety/toxicity",
    ],
    "mm-rlhf-rewardbench": ["mcq", "mcq", "long", "video", "video"],
    "videorewardbench": ["knowledge", "safety", "safety"],
    "rewardbench2": ["Math", "Math", "Focus", "Ties", "Ties", "Ties", "Ties"],
    "judgebench": ["knowledge", "reasoning", "coding", "knowledge"],
    "judgebench-gpt": ["knowledge", "reasoning", "coding"],
    "judgebench-claude": ["knowledge"],
    "mmrb2": ["all"] * 3,
    "preferences": ["x", "y"],
}  # fmt: skip
RANKS = {
    "vl-rewardbench": [(1, 2), (1, 2), (2, 1), (2, 1), (1, 2), (1, 2), (2, 1)],
    "multimodal-rewardbench": [(2, 1), (1, 2), (1, 2), (1, 2), (1, 2)],
    "mm-rlhf-rewardbench": [(1, 2)] * 5,
    "rewardbench2": [(1, 2, 2, 2)] * 3 + [(1, 2, 2), (1, 1, 1, 2, 2), (1, 2, 2), (1, 1, 2, 2)],
    "judgebench": [(1, 2), (1, 2), (2, 1), (2, 1)],
    "mmrb2": [(1, 2), (1, 2), (2, 1)],
    "mr2bench-video": [(3, 1, 2, 2, 4), (1, 2, 3, 4), (2, 1, 1)],
    "mr2bench-image-2": [(1, 2), (1, 2)],
    "preferences": [(2, 1, 3), (2, 1)],
}  # fmt: skip


def test_every_benchmark_has_a_case():
    assert set(CASES) == set(benchmarks.names())


@pytest.mark.parametrize("name", CASES)
def test_items_are_in_the_files_order_with_all_that_is_asked(name, tmp_path):
    items = made(name, tmp_path)
    assert len(items) == len(CASES[name][0]) and items.benchmark is benchmarks.get(name)
    for number, item in enumerate(items):
        assert item.number == number and item.where == f"data.jsonl:{number + 1}" == item.example.id
        assert tuple(item.example.rankings) == item.rankings and item.lengths == tuple(map(len, item.example.responses))
        light = items.light(number)
        assert {key: getattr(item, key) for key in vars(light)} == vars(light)
        text = "judgebench" in name or name in ("rewardbench2", "mmrb2")
        assert item.example.images or item.example.videos or text
    # Their media can be read: the key of an example is a digest of all that a judge sees. No two items are the same.
    assert len({example_key(item.example) for item in items}) == len(items)
    groups = [items.light(i).group for i in range(len(items))]
    assert groups == GROUPS.get(name, ["all"] * len(items))
    assert sum(items.group_counts.values()) == len(items) and list(items.group_counts) == list(dict.fromkeys(groups))
    if name in RANKS:
        assert [items.light(i).rankings for i in range(len(items))] == RANKS[name]


def test_what_shares_an_id_shares_a_question(tmp_path):
    def questions(name):
        items = made(name, tmp_path)
        return [items.light(i).question for i in range(len(items))]

    assert questions("mm-rlhf-rewardbench") == ["q1", "q1", "q2", "q3", "q3"]
    assert questions("rewardbench2") == ["1", "2", "3", "ties:0", "ties:0", "ties:1", "ties:1"]
    # One question of MMLU-Pro, answered by both models.
    assert questions("judgebench") == [
        "mmlu-pro-law/10",
        "livebench-reasoning/11",
        "livecodebench/12",
        "mmlu-pro-law/10",
    ]
    first, second, third = questions("mmrb2")  # the same text and image
    assert first == second != third
    assert len(set(questions("videorewardbench"))) == 3  # no ids: what the prompt says


def test_prompts_and_media_of_each_layout(tmp_path):
    vl = made("vl-rewardbench", tmp_path)
    assert vl[0].example.images == [str(tmp_path / "images/a.png")]
    assert vl[6].example.literal_tags  # two tags and one image: they are text
    assert vl.light(0).tags == {"query_source": "made up"}
    rlhf = made("mm-rlhf-rewardbench", tmp_path)
    assert not rlhf[0].example.literal_tags  # one tag and one image: a place
    frames = rlhf[3].example.videos[0].source
    # 32 of 40 frames: floor(i * 39 / 31), as numpy.linspace cuts them.
    assert [path.rsplit("/", 1)[1] for path in frames] == [f"{i * 39 // 31}.png" for i in range(32)]
    mmrb2 = made("mmrb2", tmp_path)[0].example
    assert [part["type"] for part in mmrb2.prompt[0]["content"]] == ["text", "image", "text"]
    assert made("judgebench", tmp_path)[0].example.prompt == "Question 10? <image>"  # text only: no place for an image
    assert made("mr2bench-video", tmp_path)[0].example.videos[0].source == str(tmp_path / "frames/video")


def test_a_short_video_is_shown_whole(tmp_path):
    folder, records = write_media(tmp_path), records_of("mm-rlhf-rewardbench")
    records[3]["video"] = "frames/video"
    frames = opened("mm-rlhf-rewardbench", write(records, folder))[3].example.videos[0].source
    assert [path.rsplit("/", 1)[1] for path in frames] == ["0.png", "1.png", "2.png"]


# ---- records that are refused ----


def _set(**fields):
    return lambda record: record.update(fields)


def _drop(*fields):
    return lambda record: [record.pop(field) for field in fields]


def _twin(first, second):
    return lambda record: record.update({second: record[first]})


SPOILED = [
    ("vl-rewardbench", _set(human_ranking=[0, 0]), r"human_ranking must be \[0, 1\].*no ties, got \[0, 0\]"),
    ("vl-rewardbench", _set(response=["one"]), "response must hold two answers, got 1"),
    ("vl-rewardbench", _set(response=["one", 2]), "response must be a list of strings"),
    ("vl-rewardbench", _set(response=["same", "same"]), "responses 0 and 1 are the same text, but ranked"),
    ("vl-rewardbench", _set(response=["one", " "]), "response 1 is empty"),
    ("vl-rewardbench", _drop("query"), "no query; the record has id, response"),
    ("vl-rewardbench", _set(query=3), "query must be a string, got int"),
    ("vl-rewardbench", _set(id=None), "no id"),
    ("vl-rewardbench", _set(image=None), "no image"),
    ("multimodal-rewardbench", _set(Better="Output3"), "Better must be one of Output1, Output2 .*got 'Output3'"),
    ("multimodal-rewardbench", _set(Better="Tie"), "there are no ties"),
    ("multimodal-rewardbench", _twin("Output1", "Output2"), "the same text"),
    ("multimodal-rewardbench", _drop("Category"), "no Category"),
    ("multimodal-rewardbench", _set(Image=""), "no Image"),
    ("mm-rlhf-rewardbench", _twin("chosen", "rejected"), "the same text"),
    ("mm-rlhf-rewardbench", _drop("image"), "neither image nor video"),
    ("mm-rlhf-rewardbench", _set(video="video/clip"), "both image and video"),
    ("mm-rlhf-rewardbench", _drop("rejected"), "no rejected"),
    ("videorewardbench", _twin("good", "bad"), "the same text"),
    ("videorewardbench", _set(clip=None), "no video"),
    ("videorewardbench", _set(bad=None), "no rejected"),
    ("videorewardbench", _set(kind=["x"]), "group must be a string or a whole number"),
    ("mr2bench-image", _set(ranks=[1, 1, 1, 1, 1]), "all 5 responses are tied"),
    ("mr2bench-image", _set(ranks=[1, 2]), "2 rankings for 5 responses"),
    ("mr2bench-image", _set(ranks="1"), "rankings must be a list of ranks"),
    ("mr2bench-image", _set(ranks=[0, 1, 2, 3, 4]), "must start at 1"),
    ("mr2bench-image", _set(answers=["a", "a", "c", "d", "e"]), "responses 0 and 1 are the same text"),
    ("mr2bench-image-2", _set(answers=["a", "b", "c"]), "3 responses, this variant has 2"),
    ("mr2bench-video-4", _set(answers=["a", "b", "c"]), "3 responses, this variant has 4"),
    ("mr2bench-video", _set(clip=None), "no video"),
    ("mr2bench-image", _set(answers=["a"], ranks=[1]), "1 responses: there is nothing to compare"),
    ("rewardbench2", _set(chosen=[]), "at least one chosen and one rejected answer"),
    ("rewardbench2", _set(rejected=["The answer is four.", "b"]), "total_completions is 4, but the record holds 3"),
    ("rewardbench2", _set(num_correct=2), "num_correct is 2, but the record holds 1"),
    ("rewardbench2", _set(rejected=["The answer is four.", "b", "c"]), "the same text"),
    ("rewardbench2", _set(subset="Ties"), "must be 'ref:NUMBER' or 'tied:NUMBER', got '1'"),
    ("rewardbench2", _set(subset="Ties", id="tied:7"), "a tied record needs two or more chosen answers"),
    ("rewardbench2", _drop("subset"), "no subset"),
    ("judgebench", _set(label="A=B"), "label must be one of A>B, B>A .*no ties.*got 'A=B'"),
    ("judgebench", _twin("response_A", "response_B"), "the same text"),
    ("judgebench", _drop("source"), "no source"),
    ("judgebench-gpt", _set(response_model="claude-3-5-sonnet-20240620"), "split gpt: open judgebench-claude"),
    ("mmrb2", _set(chosen="C"), "chosen must be one of A, B .*got 'C'"),
    ("mmrb2", _set(response_a={"response_content": [["text", "Here:"], ["image", "x.png"]]}), "holds images"),
    ("mmrb2", _set(response_a={"response_content": "text"}), r"response_a.response_content must be a list"),
    ("mmrb2", _twin("response_a", "response_b"), "the same text"),
    ("mmrb2", _drop("prompt_content"), "no prompt_content: files named .*response_only.json"),
    ("mmrb2", _drop("id"), "neither pair_id nor id"),
    ("preferences", _set(rankings=[1, 1, 1]), "all 3 responses are tied"),
    ("preferences", _set(rankings=None), "no rankings"),
    ("preferences", _set(responses=["a", "a", "b"]), "the same text"),
    ("preferences", _set(part=2.5), "group must be a string or a whole number"),
]  # fmt: skip


@pytest.mark.parametrize("name, spoil, message", SPOILED, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(SPOILED)])
def test_a_record_that_cannot_be_judged_is_named_with_its_line(name, spoil, message, tmp_path):
    records = [records_of(name)[0], *records_of(name)]
    spoil(records[1])
    file = write(records, write_media(tmp_path))
    with pytest.raises(DataError, match=message) as caught:
        opened(name, file)
    assert "data.jsonl:2'" in str(caught.value) and caught.value.line == 2
    items = opened(name, file, skip_bad=True)
    assert len(items) == len(records) - 1
    ((where, why),) = items.bad
    assert where == "data.jsonl:2" and "data.jsonl" not in why.split(":")[0]
    assert [items.light(i).where for i in range(2)] == ["data.jsonl:1", "data.jsonl:3"][: len(items)]
    assert [items.light(i).number for i in range(len(items))] == list(range(len(items)))


WITH_MEDIA = [name for name in CASES if "judgebench" not in name and name != "rewardbench2"]


@pytest.mark.parametrize("name", WITH_MEDIA)
def test_a_missing_image_is_found_when_its_item_is_read(name, tmp_path):
    records = records_of(name)
    _lose(records[1])
    items = opened(name, write(records, write_media(tmp_path)))
    assert items[0].example.responses
    assert items.light(1).group  # known without it
    with pytest.raises(MediaError, match=r"data.jsonl:2'.*gone") as caught:
        items[1]
    assert caught.value.line == 2


def _lose(record):
    for field in ("image", "Image", "picture", "clip", "video"):
        if field in record:
            record[field] = record[field] + "-gone"
    if "prompt_content" in record:
        record["prompt_content"][1][1] = "gone.png"
