"""The formats of preference data, and the checks on their records."""

import pickle

import pytest
from data_cases import GOOD, only, png, write_lines

from yojo import data
from yojo.data import sources

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which digit?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def rated(*ratings):
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {aspect: {"Rating": r, "Rationale": "..."} for aspect, r in zip(aspects, ratings, strict=True)}


ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Which digit?",
    "models": ["a", "b", "c"],
    "completions": [
        {"annotations": rated("4", "5", "3", "N/A"), "model": "a", "response": "seven", "overall_score": 7.5},
        {"annotations": rated("2", "5", "5", "4"), "model": "b", "response": "two", "overall_score": 6.0},
        {"annotations": rated("5", "5", "5", "4"), "model": "c", "response": "one", "overall_score": 8.0},
    ],
    "correct_answers": ["None"],
}


VLFEEDBACK = {
    "id": "LLaVA-Instruct-7",
    "prompt": "Which digit?",
    "img_path": "digit.png",
    "models": ["a", "b"],
    "completions": {  # as a table stores a sequence of objects
        "annotations": [
            {
                "Ethical Considerations": {"Rating": "5", "Rationale": ""},
                "Helpfulness": {"Rating": "3", "Rationale": ""},
                "Visual Faithfulness": {"Rating": "2", "Rationale": ""},
            },
            {
                "Ethical Considerations": {"Rating": "5", "Rationale": ""},
                "Helpfulness": {"Rating": "5", "Rationale": ""},
                "Visual Faithfulness": {"Rating": "4", "Rationale": ""},
            },
        ],
        "model": ["a", "b"],
        "response": ["two", "seven"],
    },
}


CRITIC = (
    "<image>\nGiven an image and a corresponding question, please serve as an unbiased and fair judge to evaluate the "
    "quality of the answers provided by a Large Multimodal Model (LMM). Determine which answer is better and explain "
    "your reasoning with specific details. Your task is provided as follows:\n"
    "Question: [Which digit [0-9]?]\nThe first response: [It is [maybe] a two.]\nThe second response: [A seven.]\nASSISTANT:\n"
)


ARENA = (
    "<image>\n<|User Prompt|>\nWhich digit?\n\n<|The Start of Assistant A's Answer|>\nseven\n"
    "<|The End of Assistant A's Answer|>\n\n<|The Start of Assistant B's Answer|>\ntwo\n"
    "<|The End of Assistant B's Answer|>"
)


LLAVA_BENCH = (
    "<image>\n[Context]\nA digit.\n\n[Question]\nWhich digit?\n\n[Assistant 1]\nseven\n\n[End of Assistant 1]\n\n"
    "[Assistant 2]\ntwo\n\n[End of Assistant 2]\n\n[System]\nRate them."
)


POINTWISE = (
    "<image>\nGiven an image and a corresponding question, please serve as an unbiased and fair judge. Score the response "
    "out of 100. Your task is provided as follows:\nQuestion: [Which digit?]\nThe LMM response: [seven]\nASSISTANT:\n"
)


def critic(human, gpt, **more):
    return {
        "id": "vlfeedback_7",
        "data_source": "vlfeedback",
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}],
        "image": {"bytes": png(), "path": None},
        **more,
    }


RECORDS = {
    "yojo": (GOOD, "yojo", "Which digit?", ["seven", "two", "one"], [2, 1, 3]),
    "question": (
        {"question": "Which digit?", "responses": ["7", "2"], "rankings": [1.0, 1.0], "source": "x"},
        "yojo", "Which digit?", ["7", "2"], [1, 1],
    ),
    "soft": (
        {"prompt": TURNS, "responses": ["7", "2"], "targets": [1, 0]}, "yojo", TURNS, ["7", "2"], [1.0, 0.0],
    ),
    "trl": (
        {"prompt": "Which digit?", "chosen": "7", "rejected": "2"}, "trl", "Which digit?", ["7", "2"], [1, 2],
    ),
    "trl messages": (
        {"prompt": TURNS, "chosen": said("7"), "rejected": said([{"type": "text", "text": "2", "index": None}])},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "trl implicit": (
        {"chosen": [*TURNS, *said("7")], "rejected": [*TURNS, *said("2")]}, "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "ultrafeedback binarized": (
        {"prompt": "Which digit?", "chosen": [*TURNS, *said("7")], "rejected": [*TURNS, *said("2")], "score_chosen": 8.0},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "trl, the prompt twice": (
        {"prompt": TURNS[1:], "chosen": [*TURNS, *said("7")], "rejected": [*TURNS, *said("2")]},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "trl, the prompt in two pieces": (
        {"prompt": TURNS[:1], "chosen": [TURNS[1], *said("7")], "rejected": [TURNS[1], *said("2")]},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: Which digit?\n\nAssistant: 7",
            "rejected": "\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: Which digit?\n\nAssistant: 2",
        },
        "trl",
        [{"role": "user", "content": "Hello"}, *said("Yes?"), {"role": "user", "content": "Which digit?"}],
        ["7", "2"], [1, 2],
    ),
    "rewardbench2": (
        {
            "id": "7", "prompt": "Which digit?", "chosen": ["7"], "rejected": ["2", "1", "0"], "num_correct": 1,
            "num_incorrect": 3, "total_completions": 4, "models": ["a", "b", "c", "d"], "subset": "Factuality",
        },
        "rewardbench2", "Which digit?", ["7", "2", "1", "0"], [1, 2, 2, 2],
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Which digit?\n\nAssistant: ",
            "answers": [
                {"answer": "seven", "model": "a", "rank": 1.0},
                {"answer": "two", "model": "b", "rank": 2.0},
                {"answer": "one", "model": "c", "rank": 3.0},
            ],
            "turns": 1, "num_responses": 3, "source": ["sharegpt"], "good_natured": True,
        },
        "nectar", "Which digit?", ["seven", "two", "one"], [1, 2, 3],
    ),
    "nectar turns": (
        {
            "prompt": "\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: Which digit?\nHuman: I mean it.\n\nAssistant:",
            "answers": {"answer": ["seven", "two"], "model": ["a", "b"], "rank": [2, 1]},
        },
        "nectar",
        [
            {"role": "user", "content": "Hello"}, *said("Yes?"),
            {"role": "user", "content": "Which digit?\nHuman: I mean it."},
        ],
        ["seven", "two"], [2, 1],
    ),
    # Means 4, 4 and 4.75: an aspect without a rating counts for nothing.
    "ultrafeedback": (ULTRAFEEDBACK, "ultrafeedback", "Which digit?", ["seven", "two", "one"], [2, 2, 1]),
    "vlfeedback": (VLFEEDBACK, "vlfeedback", "Which digit?", ["two", "seven"], [2, 1]),
    "rlaifv": (
        {
            "ds_name": "RLAIF-V", "image": {"bytes": png(), "path": "digit.jpg"}, "question": "Which digit?",
            "chosen": "7", "rejected": "2", "origin_dataset": "mnist", "origin_split": "{}", "idx": "7",
            "image_path": "elsewhere/digit.jpg",
        },
        "rlaifv", "Which digit?", ["7", "2"], [1, 2],
    ),
    "critic": (
        critic(CRITIC, "The second response is better, as it says so.\nThe better response: [second]"),
        "llava_critic", "Which digit [0-9]?", ["It is [maybe] a two.", "A seven."], [2, 1],
    ),
    "critic A": (
        critic(CRITIC, "A better response is a short one. The better response: [A]"),
        "llava_critic", "Which digit [0-9]?", ["It is [maybe] a two.", "A seven."], [1, 2],
    ),
    "critic equal": (
        critic(CRITIC, "Both miss the point. The two responses are equally good."),
        "llava_critic", "Which digit [0-9]?", ["It is [maybe] a two.", "A seven."], [1, 1],
    ),
    "critic arena": (
        critic(ARENA, "My own answer: seven. Assistant A sees it.\n\nMy final verdict is: [[A>>B]]"),
        "llava_critic", "Which digit?", ["seven", "two"], [1, 2],
    ),
    "critic scores": (
        critic(LLAVA_BENCH, "6 8\nAssistant 2 ..."), "llava_critic", "Which digit?", ["seven", "two"], [2, 1],
    ),
    "nemo": (
        {
            "context": TURNS,
            "completions": [{"rank": 1, "completion": said("2")}, {"rank": 0, "completion": said("7")}],
        },
        "nemo_rl", TURNS, ["2", "7"], [2, 1],
    ),
    "nemo string": (
        {
            "context": "Which digit?",
            "completions": [{"rank": 1, "completion": "7"}, {"rank": 2, "completion": "2"}],
            "task_name": "x",
        },
        "nemo_rl", "Which digit?", ["7", "2"], [1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_formats(name, tmp_path):
    record, format, prompt, responses, rankings = RECORDS[name]
    (tmp_path / "digit.png").write_bytes(png())
    for chosen in ("auto", format):
        records = data.load([record], format=chosen, image_root=tmp_path, keep_tied=True)
        assert records.format == format
        example = records[0]
        assert (example.prompt, example.responses, example.rankings) == (prompt, responses, rankings)
        assert len(example.images) == sum(key in record for key in ("image", "img_path"))


def test_critic_with_one_response(tmp_path):
    record = critic(POINTWISE, "The response is right.\nScore: 95")
    example = only(record, ranked=False)
    assert (example.prompt, example.responses, example.rankings) == ("Which digit?", ["seven"], None)
    with pytest.raises(data.DataError, match="one response only: there is nothing to compare"):
        only(record)
    caption = "<image>\nText Caption: A handwritten seven.\nFrom 0 to 100, how correct is it?"
    assert only(critic(caption, "Final Score: 80"), ranked=False).responses == ["A handwritten seven."]


@pytest.mark.parametrize(
    "record, message",
    [
        (
            critic("<image>\nWhich digit?", "Seven."),
            "conversations hold no LLaVA-Critic judgment: .* begins 'Which digit",
        ),
        (critic(CRITIC, "Hard to say."), "no verdict can be read from the judgment 'Hard to say.'"),
        (critic(ARENA, "[[C]]"), "no verdict can be read"),
        (critic(LLAVA_BENCH, "Both are fine"), "no verdict can be read"),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"has a human turn and a gpt turn, got \['human'\]"),
        ({"conversations": "x"}, "conversations must be a list of objects, got str"),
        (critic(CRITIC, None), "need a string under 'value'"),
    ],
)
def test_critic_records_that_cannot_be_parsed(record, message):
    with pytest.raises(data.DataError, match=f"example 'records:1': .*{message}"):
        only(record)


def ultrafeedback(**changes):
    first = ULTRAFEEDBACK["completions"][0]
    return ULTRAFEEDBACK | {"completions": [first | changes, *ULTRAFEEDBACK["completions"][1:]]}


@pytest.mark.parametrize(
    "record, message",
    [
        (GOOD | {"responses": None}, "responses must be a list of strings, got nothing; the record has prompt, resp"),
        (GOOD | {"responses": "seven"}, "responses must be a list of strings, got str"),
        (GOOD | {"responses": []}, "no responses: at least one is needed"),
        (GOOD | {"responses": ["seven", " ", "x"]}, "response 1 is empty"),
        (GOOD | {"responses": ["seven", "two", 1]}, "response 2 must be a string, got int"),
        (GOOD | {"prompt": None}, "no prompt or question; the record has prompt, responses, rankings"),
        (GOOD | {"prompt": " "}, "the prompt is empty"),
        (GOOD | {"prompt": 7}, "prompt must be a string or a list of chat messages"),
        (GOOD | {"prompt": [{"role": "user"}]}, "a chat message must be a dict with role and content"),
        (GOOD | {"prompt": said("x")}, "ends with an assistant turn"),
        (GOOD | {"rankings": None}, "no rankings: training needs one rank per response, 1 = best"),
        (GOOD | {"rankings": "1, 2, 3"}, "rankings must be a list, got str"),
        (GOOD | {"rankings": [1, 2]}, "2 rankings for 3 responses: one rank per response"),
        (GOOD | {"rankings": [1, 2, "3"]}, "a rank must be a number, got '3' in"),
        (GOOD | {"rankings": [1, 2, True]}, "a rank must be a number, got True in"),
        (GOOD | {"rankings": [1, 2, None]}, "a rank must be a number, got None in"),
        (GOOD | {"rankings": [1, 2, float("nan")]}, "a rank must be a finite number, got nan"),
        (GOOD | {"rankings": [0, 1, 2]}, r"rankings \[0, 1, 2\] must start at 1, .* ranks start at 0 here, add 1"),
        (GOOD | {"rankings": [-1, 1, 2]}, "must start at 1, which is the best$"),
        (GOOD | {"rankings": [1, 2, 4]}, r"rankings \[1, 2, 4\] have gaps: make them \[1, 2, 3\], or .*--close-gaps"),
        (GOOD | {"rankings": [2, 2, 3]}, r"have gaps: make them \[1, 1, 2\]"),
        (GOOD | {"rankings": [1.5, 1.5, 3]}, r"are not whole numbers: make them \[1, 1, 2\]"),
        (GOOD | {"rankings": [1, 1, 1]}, r"all 3 responses are tied .*keep_tied=True \(--keep-tied\)"),
        (GOOD | {"responses": ["seven"], "rankings": [1]}, "one response only: there is nothing to compare"),
        (GOOD | {"targets": [1, 0, 0]}, "both rankings and targets are given"),
        ({"prompt": "x", "responses": ["a", "b"], "targets": [1]}, "1 targets for 2 responses"),
        ({"prompt": "x", "responses": ["a", "b"], "targets": [1, 1]}, "targets must sum to 1, got .* sum to 2"),
        ({"prompt": "x", "responses": ["a", "b"], "targets": [1, -1]}, "a target must be a number from 0 to 1, got -1"),
        (
            {"prompt": "x", "chosen": "a", "rejected": None},
            "rejected must be a string or a list of messages, got nothing",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": said("b")}, "must both be strings or both be lists"),
        ({"chosen": "a", "rejected": "b"}, "no prompt, and chosen and rejected are not two .* transcripts"),
        ({"chosen": said("a"), "rejected": said("b")}, "no prompt: chosen and rejected do not begin with the same"),
        ({"prompt": "x", "chosen": [], "rejected": said("b")}, "chosen is an empty list of messages"),
        ({"prompt": "x", "chosen": [], "rejected": ["a", "b"]}, "chosen is empty: no response has rank 1"),
        (
            {"chosen": [*TURNS, *said("a"), TURNS[1], *said("b")], "rejected": [*TURNS, *said("c")]},
            r"chosen must be one assistant message, got the roles \['assistant', 'user', 'assistant'\]",
        ),
        (
            {"prompt": "Another?", "chosen": [*TURNS, *said("a")], "rejected": [*TURNS, *said("c")]},
            "prompt and chosen disagree",
        ),
        (
            {
                "prompt": [*TURNS, *said("?"), TURNS[1]],
                "chosen": [*TURNS, *said("a")],
                "rejected": [*TURNS, *said("c")],
            },
            "prompt and chosen disagree: they share some messages",
        ),
        ({"prompt": "x", "chosen": said([{"type": "image"}]), "rejected": said("b")}, "chosen must be text alone"),
        ({"prompt": "x", "chosen": ["a"], "rejected": []}, "one response only"),
        ({"prompt": "x", "chosen": ["a", "b"], "rejected": []}, "all 2 responses are tied"),
        ({"prompt": "Which digit?", "answers": [{"answer": "a", "rank": 1}]}, "the prompt is not in the wrapper"),
        ({"prompt": "\n\nHuman: \n\nAssistant:", "answers": [{"answer": "a", "rank": 1}]}, "the prompt is empty"),
        (
            ultrafeedback(annotations=rated("N/A", "N/A", "N/A", "n/a")),
            "completion 0 has no numeric rating in any aspect",
        ),
        (ultrafeedback(annotations=rated("4", "good", "3", "3")), "completion 0: honesty is rated 'good', which is no"),
        (ultrafeedback(annotations=rated("4/5", "3", "3", "3")), "helpfulness is rated '4/5', which is no number"),
        (ultrafeedback(annotations=None), "completion 0 has no annotations to rank it by"),
        (ultrafeedback(response=None), "response 0 must be a string, got NoneType"),
        (ULTRAFEEDBACK | {"completions": []}, "no responses"),
        (VLFEEDBACK | {"completions": {"response": ["a"], "annotations": []}}, "columns of completions have different"),
        ({"context": "x", "completions": [{"rank": 0, "completion": [*TURNS]}]}, "completion 0 must be one assistant"),
        (
            {"context": "x", "completions": [{"completion": "a"}, {"completion": "b"}]},
            "a rank must be a number, got None",
        ),
        (
            {"context": "x", "completions": [{"rank": 0, "completion": "a"}, {"rank": 2, "completion": "b"}]},
            "have gaps",
        ),
        (GOOD | {"fps": 0}, "fps must be a number above 0, got 0"),
        (GOOD | {"sampling_interval": "4"}, "sampling_interval must be a number above 0, got '4'"),
        (GOOD | {"fps": 1, "sampling_interval": 1}, "both fps .* and sampling_interval .* are given"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, record, message):
    path = write_lines(tmp_path / "a.jsonl", ["", record])
    with pytest.raises(data.DataError, match=rf"^example 'a\.jsonl:2': .*({message})") as caught:
        data.load(path, image_root=tmp_path)[0]
    assert (caught.value.file, caught.value.line) == (str(path), 2)
    assert pickle.loads(pickle.dumps(caught.value)).line == 2


@pytest.mark.parametrize("rankings", [[1, 1, 2], [1, 1, 3], [1, 2, 2], [3, 1, 2], [1, 2, 2, 4], [1, 2, 2, 3]])
def test_dense_and_competition_ranks_pass(rankings):
    record = {"prompt": "x", "responses": ["a", "b", "c", "d"][: len(rankings)], "rankings": rankings}
    assert only(record).rankings == rankings


def test_options_on_ranks():
    assert only(GOOD | {"rankings": [2, 2, 7]}, close_gaps=True).rankings == [1, 1, 2]
    assert only(GOOD | {"rankings": [1.5, 1.5, 3]}, close_gaps=True).rankings == [1, 1, 2]
    assert only(GOOD | {"rankings": [1, 1, 1]}, keep_tied=True).rankings == [1, 1, 1]
    for record in ({"prompt": "x", "responses": ["a"]}, GOOD | {"rankings": [1, 1, 1]}):
        assert only(record, ranked=False).rankings == record.get("rankings")
    with pytest.raises(data.DataError, match="have gaps"):
        only(GOOD | {"rankings": [1, 2, 4]}, ranked=False)
    with pytest.raises(data.DataError, match="must start at 1"):
        only(GOOD | {"rankings": [0, 1, 2]}, close_gaps=True)


def test_column_maps():
    record = {"meta": {"question": "Which digit?", "n": [1, 2]}, "dotted.name": ["7", "2"]}
    columns = {"prompt": "meta.question", "responses": "dotted.name", "rankings": "meta.n"}
    records = data.load([record], columns=columns)
    assert records.format == "yojo" and records[0].prompt == "Which digit?" and records[0].rankings == [1, 2]
    pair = {"text": "Which digit?", "better": "7", "worse": "2"}
    mapped = only(pair, columns={"prompt": "text", "chosen": "better", "rejected": "worse"})
    assert mapped.responses == ["7", "2"]
    with pytest.raises(
        data.ColumnError, match=r"no column 'txt' \(mapped to prompt\); columns found: text, better, worse"
    ):
        data.load([pair], columns={"prompt": "txt"})
    with pytest.raises(
        data.ColumnError, match=r"fit no known format; columns found: text, better, worse\n(.|\n)*nectar:"
    ):
        data.load([pair])
    with pytest.raises(ValueError, match="columns maps 'promt', which is no field; fields are .*prompt"):
        data.load([pair], columns={"promt": "text"})
    with pytest.raises(ValueError, match="columns maps 'prompt' to 7, which is no name"):
        data.load([pair], columns={"prompt": 7})
    with pytest.raises(ValueError, match="format must be auto or one of yojo, trl, .* got 'dpo'"):
        data.load([pair], format="dpo")
    with pytest.raises(data.DataError, match="no prompt or question"):  # this record lacks what the others have
        data.load([record, {"meta": None, "dotted.name": ["7", "2"]}], columns=columns)[1]


def test_every_format_says_what_it_needs():
    assert set(sources.COLUMNS) == set(sources.FORMATS)


def test_a_reply_without_text():
    record = {"prompt": "x", "chosen": [{"role": "assistant", "content": [{"type": "text"}]}]}
    record["rejected"] = [{"role": "assistant", "content": "b"}]
    with pytest.raises(data.DataError, match="a text part needs a string under .text., got None"):
        data.load([record])[0]
