"""Made-up records of every benchmark in its own layout, their images and frames, and judges whose figures are known."""

import copy
import json
from pathlib import Path

import numpy as np
from data_cases import png, write_lines

from yojo.evaluation import benchmarks
from yojo.evaluation.judged import Judged


def _vl(name, query, first, second, ranking, image):
    return {
        "id": name, "query": query, "response": [first, second], "image": image, "human_ranking": ranking,
        "query_source": "made up",
    }  # fmt: skip


def _multimodal(name, category, first, second, better):
    return {
        "ID": name, "Text": f"What is in {name}?", "Image": "images/a.png", "Output1": first, "Output2": second,
        "Better": better, "Category": category,
    }  # fmt: skip


def _judgebench(number, source, asked, first, second, label, model="gpt-4o-2024-05-13"):
    return {
        "pair_id": f"pair-{number}", "original_id": asked, "source": source, "question": f"Question {asked}? <image>",
        "response_model": model, "response_A": first, "response_B": second, "label": label,
    }  # fmt: skip


def _rb2(name, subset, chosen, rejected):
    return {
        "id": name, "prompt": f"Prompt of {name.split(':')[-1]}", "chosen": chosen, "rejected": rejected,
        "subset": subset, "num_correct": len(chosen), "num_incorrect": len(rejected), "total_completions": len(chosen) + len(rejected),
    }  # fmt: skip


def _mmrb2(name, first, second, chosen, image=True):
    return {
        "id": name, "prompt_source": "made up",
        "prompt_content": [
            ["text", "Look here"], *([["image", "images/a.png"]] if image else []), ["text", f"and at {name[0]}."],
        ],
        "response_a": {"model_name": "x", "response_content": [["text", first]]},
        "response_b": {"model_name": "y", "response_content": [["text", second]]},
        "chosen": chosen,
    }  # fmt: skip


def _pair(chosen, rejected, **more):
    return {"chosen": chosen, "rejected": rejected, **more}


def _mr2(number, responses, rankings, medium):
    media = {"picture": "images/a.png"} if medium == "image" else {"clip": "frames/video"}
    return {"asked": f"Question {number}", "answers": responses, "ranks": rankings, **media}


def _mr2_records(medium, count):
    full = [
        (["a", "bbbb", "cc", "ddd", "eeeee"], [3, 1, 2, 2, 4]),
        (["aaaa", "bb", "ccc", "d"], [1, 2, 3, 4]),
        (["aa", "b", "cccc"], [2, 1, 1]),
    ]
    if count is not None:
        full = [
            (["aaaa", "bb", "ccc", "d"][:count], [1, 2, 3, 4][:count]),
            (["a", "bb", "ccc", "dddd"][:count], [1, 2, 2, 3][:count]),
        ]
    return [_mr2(number, responses, ranks, medium) for number, (responses, ranks) in enumerate(full)]


_MR2 = {"prompt": "asked", "responses": "answers", "rankings": "ranks"}

# Name of the benchmark -> (records, column map). Answers are such that no two of a record are equally long.
CASES = {
    "vl-rewardbench": (
        [
            _vl("RLAIF-V_1", "What is here?", "A longer answer.", "Short.", [0, 1], "images/a.png"),
            _vl("RLHF_2", "What is there?", "Short.", "A longer answer.", [0, 1], "images/b.png"),
            _vl("hallucination_pair-3", "How many?", "One.", "Two of them.", [1, 0], "images/a.png"),
            _vl("mathverse_5", "x + 1 = 2?", "x = 1, of course.", "x = 2.", [1, 0], "images/b.png"),
            _vl("mmmu-pro_6", "Which one is it?", "B.", "The answer is A.", [0, 1], "images/a.png"),
            _vl("wildvision-battle-7", "Tell a story.", "Once upon a time.", "No.", [0, 1], "images/b.png"),
            _vl("7314", "Write <image> here and <image> there.", "Done as asked.", "Done.", [1, 0], "images/a.png"),
        ],
        None,
    ),
    "multimodal-rewardbench": (
        [
            _multimodal("nocaps_1", "open_generation/correctness_task", "A cat.", "A very big cat.", "Output2"),
            _multimodal("MathVista_2", "reasoning", "Four.", "It is five.", "Output1"),
            _multimodal("EMMA-Coding_3", "reasoning", "print(12)", "x", "Output1"),
            _multimodal("PAIRS_4", "safety", "I do not know that.", "The doctor.", "Output1"),
            _multimodal("toxic_5", "safety", "No.", "Here you go.", "Output1"),
        ],
        None,
    ),
    "mm-rlhf-rewardbench": (
        [
            {"id": "q1", "image": "mcq/a.png", "prompt": "<image>\nA or B?", **_pair("The answer is A.", "B.")},
            {"id": "q1", "image": "mcq/a.png", "prompt": "<image>\nA or B?", **_pair("A.", "The answer is C.")},
            {"id": "q2", "image": "long/a.png", "prompt": "Tell all.", **_pair("All that is there.", "All.")},
            {"id": "q3", "video": "video/clip", "prompt": "What happens?", **_pair("Nothing at all.", "Much.")},
            {"id": "q3", "video": "video/clip", "prompt": "What happens?", **_pair("Nothing at all!", "More.")},
        ],
        None,
    ),
    "videorewardbench": (
        [
            {"asked": f"Question {i}", "good": good, "bad": bad, "clip": "frames/video", "kind": kind}
            for i, (good, bad, kind) in enumerate(
                [
                    ("A longer one.", "Short.", "knowledge"),
                    ("Brief.", "Much longer.", "safety"),
                    ("Long one!", "No.", "safety"),
                ]
            )
        ],
        {"prompt": "asked", "chosen": "good", "rejected": "bad", "video": "clip", "group": "kind"},
    ),
    **{
        f"mr2bench-{medium}" + (f"-{count}" if count else ""): (
            _mr2_records(medium, count), {**_MR2, medium: "picture" if medium == "image" else "clip"},
        )
        for medium in ("image", "video") for count in (None, 2, 4)
    },
    "rewardbench2": (
        [
            _rb2("1", "Math", ["The answer is four."], ["3", "five", "It is six"]),
            _rb2("2", "Math", ["4"], ["It is 3", "five", "no 6"]),
            _rb2("3", "Focus", ["Yes."], ["No, never.", "Perhaps", "Maybe not"]),
            _rb2("ref:0", "Ties", ["red"], ["stone", "h"]),
            _rb2("tied:0", "Ties", ["red", "blue", "violet"], ["ro", "s"]),
            _rb2("ref:1", "Ties", ["one thing"], ["two", "z"]),
            _rb2("tied:1", "Ties", ["seven of us", "eight of them"], ["no", "m"]),
        ],
        None,
    ),
    "judgebench": (
        [
            _judgebench(1, "mmlu-pro-law", "10", "A long answer.", "Short.", "A>B"),
            _judgebench(2, "livebench-reasoning", "11", "Short.", "A long answer.", "A>B"),
            _judgebench(3, "livecodebench", "12", "Short.", "A long answer.", "B>A"),
            _judgebench(4, "mmlu-pro-law", "10", "Other.", "Another answer.", "B>A", "claude-3-5-sonnet-20240620"),
        ],
        None,
    ),
    "mmrb2": (
        [
            _mmrb2("a1", "A long answer.", "Short.", "A"),
            _mmrb2("a2", "Short.", "A long answer.", "A"),
            _mmrb2("b3", "Short.", "A long answer.", "B", image=False),
        ],
        None,
    ),
    "preferences": (
        [
            {
                "prompt": "One?", "responses": ["a", "bbbb", "cc"], "rankings": [2, 1, 3], "image": "images/a.png",
                "part": "x",
            },
            {"prompt": "Two?", "responses": ["aaa", "b"], "rankings": [2, 1], "image": "images/b.png", "part": "y"},
        ],
        {"group": "part"},
    ),
}  # fmt: skip
CASES["judgebench-gpt"] = (CASES["judgebench"][0][:3], None)
CASES["judgebench-claude"] = (CASES["judgebench"][0][3:], None)


def write_media(folder):
    """Two images under several names, a video of 3 frames and one of 40."""
    folder = Path(folder)
    for name, colour in (("images/a", "white"), ("images/b", "red"), ("mcq/a", "white"), ("long/a", "white")):
        file = folder / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(colour=colour))
    for video, count in (("frames/video", 3), ("video/clip", 40)):
        (folder / video).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (folder / video / f"{i}.png").write_bytes(png((4, 4)))
    return folder


def write(records, folder, kind="jsonl", name="data"):
    """A file of records; Parquet with images as bytes where `datasets` would have them so."""
    file = Path(folder) / f"{name}.{kind}"
    if kind == "jsonl":
        return write_lines(file, records)
    if kind == "json":
        file.write_text(json.dumps(records))
        return file
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(
        pyarrow.Table.from_pylist(records, pyarrow.unify_schemas(_schemas(records))), file, row_group_size=2
    )
    return file


def _schemas(records):
    import pyarrow

    return [pyarrow.Table.from_pylist([record]).schema for record in records]


def records_of(name):
    """A copy of a benchmark's records, which a test may spoil."""
    return copy.deepcopy(CASES[name][0])


def opened(name, data, **options):
    """`Items` of a made-up benchmark: there are fewer than were published."""
    options = {"columns": CASES[name][1], "partial": True} | options
    return benchmarks.open_benchmark(name, data, **options)


def made(name, folder, **options):
    """`Items` of a benchmark's records in a JSONL file."""
    return opened(name, write(CASES[name][0], write_media(folder)), **options)


# ---- judges ----


def first_place(responses):
    return [-float(place) for place in range(len(responses))]


def longest(responses):
    return [float(len(response)) for response in responses]


def coin(responses):
    return [0.0] * len(responses)


def cyclic(count):
    """Orders in which every response stands once in every place."""
    return [tuple((place + shift) % count for place in range(count)) for shift in range(count)]


def judged(items, judge, orders=cyclic, refuse=()):
    """What a judge says of items in every order.

    Args:
        items: `Items`.
        judge: function, texts in the order they are shown -> scores.
        orders: function, number of responses -> orders.
        refuse: numbers of items without scores.
    """
    found = []
    for item in items:
        responses = list(item.example.responses)
        asked = orders(len(responses))
        scores = np.zeros((len(asked), len(responses)))
        for k, order in enumerate(asked):
            scores[k, list(order)] = judge([responses[number] for number in order])
        found.append(said(item, scores, asked, refused=item.number in refuse))
    return found


def said(entry, scores, orders=None, refused=False):
    """A `Judged` with the given scores, [K, N] or [N]."""
    scores = np.atleast_2d(np.asarray(scores, dtype=np.float64))
    orders = [tuple(range(scores.shape[1]))] * len(scores) if orders is None else orders
    return Judged(
        number=entry.number, id=entry.id, question=entry.question, group=entry.group, rankings=entry.rankings,
        lengths=entry.lengths, orders=orders, scores=None if refused else scores,
        refused="asked to" if refused else None, tags=entry.tags, info=entry.info,
    )  # fmt: skip
