"""Multimodal RewardBench 2 (MMRB2): pairs of four tasks, of which those whose responses are text can be judged here."""

import re

from yojo.evaluation.benchmarks import benchmark, figures

TASKS = ("t2i", "edit", "interleaved", "reasoning")
RANKS = {"A": (1, 2), "B": (2, 1)}
_IMAGE = re.compile(r"<image_\d+>")


def parse(record):
    """A pair of its own JSON ("prompt_content"), or of its hub data set ("prompt_text") -> `Parsed`."""
    name = benchmark.name_of(record, "pair_id") or benchmark.name_of(record, "id")
    if name is None:
        raise ValueError(f"neither pair_id nor id; the record has {', '.join(map(str, record))}")
    if "prompt_text" in record or "prompt_images" in record:
        content, images = _row_prompt(record)
        responses = [_row_response(record, f"response_{side}") for side in "ab"]
    elif "prompt_content" in record:
        content, images = _prompt(record["prompt_content"])
        responses = [_response(record, f"response_{side}") for side in "ab"]
    else:
        raise ValueError(
            "no prompt_content: files named *_response_only.json hold no prompts; build the benchmark with its "
            "build_from_hf.py"
        )
    prompt = [{"role": "user", "content": content}]
    chosen = benchmark.text(record, "chosen")
    return benchmark.Parsed(
        prompt=prompt, responses=responses, images=images,
        rankings=benchmark.labelled({"chosen": chosen.upper()}, "chosen", RANKS), literal_tags=True, id=name,
        question=benchmark.question_of(prompt, images), group=benchmark.name_of(record, "task") or benchmark.ALL,
        tags=benchmark.tags_of(record, "prompt_source"),
    )  # fmt: skip


def _pieces(content, name):
    if not isinstance(content, (list, tuple)) or not content:
        raise ValueError(f"{name} must be a list of ['text' or 'image', value] pairs, got {type(content).__name__}")
    for piece in content:
        if not isinstance(piece, (list, tuple)) or len(piece) != 2 or piece[0] not in ("text", "image"):
            raise ValueError(f"{name} must hold ['text' or 'image', value] pairs, got {str(piece)[:60]}")
        if piece[0] == "text" and not isinstance(piece[1], str):
            raise ValueError(f"{name}: a text must be a string, got {type(piece[1]).__name__}")
    return content


def _prompt(content):
    parts, images = [], []
    for kind, value in _pieces(content, "prompt_content"):
        if kind == "image":
            images.append(value)
        parts.append({"type": "image"} if kind == "image" else {"type": "text", "text": value})
    return parts, images


def _response(record, name):
    response = benchmark.present(record, name)
    content = response.get("response_content") if isinstance(response, dict) else None
    pieces = _pieces(content, f"{name}.response_content")
    if any(kind == "image" for kind, _ in pieces):
        raise _holds_images(name)
    return "".join(value for _, value in pieces)


def _row_prompt(record):
    said, images = record.get("prompt_text") or "", list(record.get("prompt_images") or [])
    places = _IMAGE.findall(said)
    if places and len(places) != len(images):
        raise ValueError(f"prompt_text has places for {len(places)} images, and prompt_images holds {len(images)}")
    parts = []
    for i, words in enumerate(_IMAGE.split(said)):
        parts += [{"type": "image"}] if i else []
        parts += [{"type": "text", "text": words.strip()}] if words.strip() else []
    return parts + ([] if places else [{"type": "image"}] * len(images)), images


def _row_response(record, name):
    said = benchmark.text(record, f"{name}_text")
    if record.get(f"{name}_images") or _IMAGE.search(said):
        raise _holds_images(name)
    return said


def _holds_images(name):
    return ValueError(
        f"{name} holds images, and responses are judged as text: it cannot be judged without them; skip_bad "
        "(--skip-bad) leaves such pairs out and counts them"
    )


def readers(source):
    """Readers of its own JSON files ({"pairs": [...]}), of rows of its hub data set, or of lists of dicts."""
    from yojo.evaluation.benchmarks.pairs import open_pairs

    return open_pairs(source, TASKS)


def official(judged):
    """accuracy over all trials, every order of a pair being one, and each task's."""
    return figures.accuracies(figures.checked(judged))


BENCHMARKS = (
    benchmark.Benchmark(
        name="mmrb2",
        title="Multimodal RewardBench 2",
        paper="https://arxiv.org/abs/2512.16899",
        hub="rl-research/multimodal-rewardbench-2",
        patterns=("*/test-*",),
        split="test",
        counts=dict.fromkeys(TASKS, 1000),
        fields=("chosen",),
        optional=("pair_id", "id", "task", "prompt_source", "prompt_content", "prompt_text", "prompt_images"),
        confirmed=True,
        headline="accuracy",
        notes="Most responses hold images; such a pair is an error, or left out and counted with skip_bad, and never "
        "judged without them. So figures here are of a part of the benchmark and not to be compared with its "
        "leaderboard. Equal scores get half credit; the authors' script takes trials without a verdict out of the"
        " denominator, here a refusal is wrong. The task is told by the name of the file or its folder.",
        parse=parse,
        official=official,
        readers=readers,
    ),
)
