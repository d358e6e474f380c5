"""Files of votes -> the votes of each question: their columns, and the words in which they say who won."""

import collections
import dataclasses
import json

from yojo.data.columns import given
from yojo.data.readers import NOT_A_RECORDS_FAULT, ColumnError, DataError, open_source, what_it_says
from yojo.rankings.votes import WINNERS, Vote

# Our field -> names of the column that holds it, the first one that is there.
COLUMNS = {
    "question": ("question", "question_id", "prompt", "prompt_id", "qid"),
    "first": ("model_a", "item_a", "response_a", "first", "a"),
    "second": ("model_b", "item_b", "response_b", "second", "b"),
    "winner": ("winner", "vote", "verdict", "preference", "label"),
    "annotator": ("annotator", "annotator_id", "judge", "user", "evaluator"),
    "weight": ("weight",),
}
OPTIONAL = ("annotator", "weight")
# Three columns of 0 and 1 in the place of one of words.
ONE_HOT = {"winner_model_a": "first", "winner_model_b": "second", "winner_tie": "tie"}
# What files say, in small letters -> what it means.
WORDS = {
    **dict.fromkeys(("first", "model_a", "item_a", "response_a", "a", "[[a]]", "a>b", "a>>b", "leftvote", "left"), "first"),
    **dict.fromkeys(
        ("second", "model_b", "item_b", "response_b", "b", "[[b]]", "b>a", "b>>a", "rightvote", "right"), "second"
    ),
    **dict.fromkeys(
        ("tie", "tievote", "a=b", "draw", "equal", "tie (bothbad)", "tie (both bad)", "bothbad", "both_bad", "both bad",
         "bothbad_vote", "both_good", "both good", "[[c]]"),
        "tie",
    ),
    **dict.fromkeys(("abstain", "abstention", "skip", "skipped", "unsure", "invalid", "error"), "abstain"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that is no vote, or no response: its file, its line or record number from 1, and why."""

    file: str
    line: int | None
    reason: str


@dataclasses.dataclass
class Votes:
    """Votes of files.

    Attributes:
        questions: dict, question (a string) -> list of `Vote`, in the order of the files.
        bad: one `Bad` for each record that is no vote, in order.
        records: how many there are, good and bad.
        columns: dict, our field -> the column that it was read from; of the first file.
    """

    questions: dict
    bad: list
    records: int
    columns: dict


def read_votes(source, *, columns=None, labels=None, skip_bad=False):
    """Read votes.

    A record names a question, two items, who won, and perhaps the annotator and the weight of the vote: `COLUMNS` has the
    names of the columns, `WORDS` what may stand for the winner; the name of one of the two items may, too. Numbers may not,
    since files disagree on what 0 and 1 mean, unless `labels` says it.

    Args:
        source: path of a .jsonl, .json or .parquet file, or of a folder of such files; a list of paths; a list of dicts.
        columns: dict, our field -> column of the file: {"question": "qid"}.
        labels: dict, what stands for the winner, as text -> "first", "second", "tie" or "abstain": {"0": "first"}.
        skip_bad: list records that are no votes, rather than raise at the first.

    Returns:
        `Votes`.

    Raises:
        DataError: a file, or (unless skip_bad) a record, that cannot be used.
        ColumnError: a column is missing.
        TypeError, ValueError: a bad argument.
    """
    columns, labels = checked_columns(columns, COLUMNS), _checked_labels(labels)
    made = Votes({}, [], 0, {})
    for reader in open_source(source):
        found = find_columns(reader, COLUMNS, columns, _missing_is_fine(reader, columns))
        made.columns = made.columns or found
        for index, record in each_record(reader, made.bad, skip_bad):
            try:
                question, vote = _vote(record, found, labels)
            except (TypeError, ValueError) as error:
                refuse(reader, index, error, made.bad, skip_bad)
            else:
                made.questions.setdefault(question, []).append(vote)
        made.records += len(reader)
    return made


def each_record(reader, bad, skip_bad):
    """(number, record) of each record that can be read; the others are added to `bad`, or the first one raises."""
    for index in range(len(reader)):
        try:
            yield index, reader.read(index)
        except NOT_A_RECORDS_FAULT:
            raise
        except DataError as error:
            refuse(reader, index, error, bad, skip_bad)


def refuse(reader, index, error, bad, skip_bad):
    """Add a record to those that cannot be used, or raise `DataError` that names it."""
    error = error if isinstance(error, DataError) else reader.error(what_it_says(error), index)
    if not skip_bad:
        raise error
    name = f"{reader.name}:{reader.line(index)}"
    bad.append(Bad(str(reader.file or reader.name), reader.line(index), str(error).removeprefix(f"example {name!r}: ")))


def find_columns(reader, names, columns, optional):
    """Which column holds which field.

    Args:
        reader: `yojo.data.readers.Reader`.
        names: dict, field -> names of its column.
        columns: dict, field -> column, of those that are given.
        optional: fields that need not be there.

    Returns:
        dict, field -> column.

    Raises:
        ColumnError: a column is missing.
    """
    there = reader.columns()
    file = str(reader.file or reader.name)
    listed = f"columns found: {', '.join(map(str, there)) or 'none'}"
    found = {}
    for field, known in names.items():
        if field in columns:
            if columns[field] not in there:
                raise ColumnError(f"{file}: there is no column {columns[field]!r} (mapped to {field}); {listed}", file)
            found[field] = columns[field]
            continue
        column = next((name for name in known if name in there), None)
        if column is None and field not in optional:
            raise ColumnError(
                f"{file}: there is no column for {field} ({', '.join(known)}); {listed}; say which it is: "
                f"columns={{{field!r}: ...}} (--map {field}=...)",
                file,
            )
        if column is not None:
            found[field] = column
    return found


def key_of(value, name):
    """The text by which questions (or models) are the same: strings and whole numbers as they are, messages as JSON."""
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name == "question" and isinstance(value, (list, dict)) and value:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    raise ValueError(f"{name} must be a string that is not empty, or a whole number, got {value!r}")


def _vote(record, columns, labels):
    for field, column in columns.items():
        if field not in OPTIONAL and column not in record:
            raise ValueError(f"there is no {column!r}; the record has {', '.join(map(str, record)) or 'nothing'}")
    first, second = (key_of(record[columns[name]], columns[name]) for name in ("first", "second"))
    if "winner" in columns:
        winner = _winner(record[columns["winner"]], columns["winner"], first, second, labels)
    else:
        winner = _one_hot(record)
    annotator, weight = (record.get(columns[name]) if name in columns else None for name in OPTIONAL)
    vote = Vote(
        first,
        second,
        winner,
        annotator=key_of(annotator, columns["annotator"]) if given(annotator) else None,
        weight=1.0 if weight is None else weight,
    )
    return key_of(record[columns["question"]], "question"), vote


def _winner(value, column, first, second, labels):
    text = value if isinstance(value, str) else json.dumps(value)
    mapped, word = labels.get(text), WORDS.get(text.strip().lower())
    if mapped is not None:
        return mapped
    named = {first: "first", second: "second"}.get(value) if isinstance(value, str) else None
    if named is not None and word is not None and word != named:
        raise ValueError(
            f"{column} is {value!r}, which names the {named} item and is also the word for {word!r}: say which is meant, "
            f"labels={{{text!r}: ...}} (--label {text}=...)"
        )
    if named is not None or word is not None:
        return named or word
    if value is None:
        raise ValueError(f"{column} is empty: where that is an abstention, say so: labels={{'null': 'abstain'}}")
    if isinstance(value, (int, float)) or text.strip().isdigit():
        what = "is a number, and files disagree on what numbers mean"
    else:
        what = "names neither item, and is no word that is known (model_a, model_b, A, B, tie, tie (bothbad), abstain, ...)"
    raise ValueError(
        f"{column} is {value!r}, which {what}: say it, labels={{{text!r}: 'first'}} (--label {text}=first); "
        f"first, second, tie and abstain can be said"
    )


def _one_hot(record):
    said = [winner for column, winner in ONE_HOT.items() if record.get(column) in (1, True)]
    if len(said) != 1 or any(record.get(column) not in (0, 1) for column in ONE_HOT):
        values = ", ".join(f"{column}={record.get(column)!r}" for column in ONE_HOT)
        raise ValueError(f"one of {', '.join(ONE_HOT)} must be 1 and the others 0, got {values}")
    return said[0]


def _missing_is_fine(reader, columns):
    one_hot = "winner" not in columns and set(ONE_HOT) <= set(reader.columns())
    one_hot = one_hot and not any(name in reader.columns() for name in COLUMNS["winner"])
    return (*OPTIONAL, "winner") if one_hot else OPTIONAL


def checked_columns(columns, known, apart=True):
    """A dict field -> column of some of the known fields, or an error that says what is wrong with it.

    Args:
        columns: that dict, or None.
        known: names of the fields.
        apart: whether each has a column of its own.
    """
    columns = dict(columns or {})
    for field, column in columns.items():
        if field not in known:
            raise ValueError(f"columns maps {field!r}, which is none of {', '.join(known)}")
        if not isinstance(column, str):
            raise TypeError(f"columns must map {field} to the name of a column, got {column!r}")
    taken = collections.Counter(columns.values())
    for column, count in taken.items():
        if count > 1 and apart:
            raise ValueError(f"columns maps {column!r} to several fields: each has a column of its own")
    return columns


def _checked_labels(labels):
    labels = dict(labels or {})
    for label, winner in labels.items():
        if not isinstance(label, str):
            raise TypeError(f"labels must map text as it stands in the file, got {label!r}: write {str(label)!r}")
        if winner not in WINNERS:
            raise ValueError(f"labels maps {label!r} to {winner!r}: it must be one of {', '.join(WINNERS)}")
    return labels
