"""Files of responses, one of a question and a model a record -> what each question asks, shows, and was answered."""

import base64
import dataclasses
import os
from pathlib import Path

from yojo.data.columns import given, same, without_fillers
from yojo.data.readers import open_source
from yojo.rankings.reading import COLUMNS, checked_columns, each_record, find_columns, key_of, refuse

# Our field -> names of the column that holds it, the first one that is there.
RESPONSE_COLUMNS = {
    "question": COLUMNS["question"],
    "model": ("model", "model_id", "item", "model_name"),
    "response": ("response", "answer", "output", "completion"),
    "prompt": ("prompt", "instruction", "question"),
}
MEDIA = ("images", "image", "img_path", "videos", "video")
BESIDE = ("fps", "sampling_interval", "system", "system_prompt", "tools")


@dataclasses.dataclass
class Question:
    """One question with what models said.

    Attributes:
        prompt: string or chat messages.
        beside: dict, column -> value: images, videos and what else the model is to see, paths as they are written.
        responses: dict, model -> text.
    """

    prompt: object
    beside: dict
    responses: dict = dataclasses.field(default_factory=dict)


def read_responses(source, *, folder, columns=None, named=None, image_root=None, bad=None, skip_bad=False):
    """Read responses.

    Args:
        source: path of a .jsonl, .json or .parquet file, or of a folder of such files; a list of paths; a list of dicts.
        folder: where relative paths of images and videos are to start, in what is returned.
        columns: dict, our field (question, model, response, prompt) -> column of the file.
        named: column that holds the question where the files have it, as those of the votes do.
        image_root: folder that they start from in the files; the files' own by default.
        bad: list to add records to that cannot be used.
        skip_bad: add them, rather than raise at the first.

    Returns:
        dict, question (a string) -> `Question`.

    Raises:
        DataError: a file, or (unless skip_bad) a record, that cannot be used.
        ColumnError: a column is missing.
    """
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"image_root is no folder: {image_root}")
    found, bad, columns = {}, [] if bad is None else bad, checked_columns(columns, RESPONSE_COLUMNS, apart=False)
    known = RESPONSE_COLUMNS | {"question": ((named,) if named else ()) + RESPONSE_COLUMNS["question"]}
    for reader in open_source(source):
        names = find_columns(reader, known, columns, ())
        move = _mover(Path(image_root) if image_root is not None else reader.folder, folder)
        for index, record in each_record(reader, bad, skip_bad):
            try:
                _add(found, without_fillers(record) if reader.filled else record, names, move)
            except (TypeError, ValueError) as error:
                refuse(reader, index, error, bad, skip_bad)
    return found


def _add(found, record, names, move):
    for column in names.values():
        if column not in record:
            raise ValueError(f"there is no {column!r}; the record has {', '.join(map(str, record)) or 'nothing'}")
    question, model = key_of(record[names["question"]], "question"), key_of(record[names["model"]], "model")
    prompt, response = record[names["prompt"]], record[names["response"]]
    if not isinstance(response, str):
        raise ValueError(f"{names['response']} must be a string, got {type(response).__name__}")
    if not given(prompt) or not isinstance(prompt, (str, list)):
        raise ValueError(f"{names['prompt']} must be a string or a list of messages, got {prompt!r}")
    beside = {name: move(record[name]) for name in MEDIA if given(record.get(name))}
    beside |= {name: record[name] for name in BESIDE if given(record.get(name))}
    kept = found.get(question) or Question(prompt, beside)
    for name, one, other in [("prompt", kept.prompt, prompt), ("images, videos, ...", kept.beside, beside)]:
        if not same(one, other):
            raise ValueError(f"{name} of question {question!r} differ from those of its other responses")
    if kept.responses.get(model, response) != response:
        raise ValueError(
            f"{model} has answered question {question!r} before, otherwise: keep one response of each model"
        )
    kept.responses[model] = response
    found[question] = kept


def _mover(old, new):
    """Function on an image or a video, or lists of them: relative paths start at another folder, bytes become data URLs."""
    old, new = Path(os.path.abspath(old)), Path(os.path.abspath(new))

    def move(value):
        if isinstance(value, (list, tuple)):
            return [move(inner) for inner in value]
        if isinstance(value, dict):
            inner = next((value[key] for key in ("bytes", "path", "url") if value.get(key) is not None), None)
            if inner is None:
                raise ValueError(f"an image or a video has neither bytes nor path: {sorted(value)}")
            return move(inner)
        if isinstance(value, bytes):
            return "data:application/octet-stream;base64," + base64.b64encode(value).decode()
        if not isinstance(value, str):
            raise ValueError(f"images and videos must be paths, URLs or bytes, got {type(value).__name__}")
        if old == new or os.path.isabs(value) or value.startswith(("data:", "http://", "https://", "file://")):
            return value
        return Path(os.path.relpath(old / value, new)).as_posix()

    return move
