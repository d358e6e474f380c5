"""Which columns of a record a format reads, which it may leave, and which must not be left without a word."""

# Columns that say what the model is to see, or how responses rank. A format that does not read one of them must not drop it.
CONTENT = {
    "prompt", "question", "instruction", "input", "query", "context", "history", "messages", "conversations",
    "conversation", "system", "system_prompt", "tools", "functions", "image", "images", "img_path", "video", "videos",
    "audio", "audios", "fps", "sampling_interval", "responses", "answers", "completions", "chosen", "rejected", "rankings",
    "targets",
}  # fmt: skip

# Fields of a response that are a part of what the model said.
OF_A_RESPONSE = {"tool_calls", "function_call", "reasoning", "reasoning_content", "thinking"}

_NAMES_THE_RECORD = "names the record"
_SAYS_WHERE_FROM = "says where the record is from"
_SAYS_WHO = "says who wrote or rated a response"
_EXPLAINS = "explains or sums up what the ranks say"
_COUNTS = "counts what the record holds"

# What may be left, by format ("" = by all of them), and why: path -> reason. A dot reaches into the objects of a list.
LEFT = {
    "": {
        **dict.fromkeys(("id", "idx", "index", "ID", "uid", "uuid", "prompt_id", "question_id", "pair_id"), _NAMES_THE_RECORD),
        **dict.fromkeys(
            ("source", "data_source", "dataset", "ds_name", "origin_dataset", "origin_split", "subset", "split", "category",
             "task_name"),
            _SAYS_WHERE_FROM,
        ),
        **dict.fromkeys(("model", "models"), _SAYS_WHO),
    },
    "trl": {
        **dict.fromkeys(("chosen_model", "rejected_model", "chosen-model", "rejected-model"), _SAYS_WHO),
        **dict.fromkeys(
            ("score_chosen", "score_rejected", "score_margin", "chosen_score", "rejected_score", "chosen-rating",
             "rejected-rating"),
            _EXPLAINS,
        ),
    },
    "rewardbench2": dict.fromkeys(("num_correct", "num_incorrect", "total_completions"), _COUNTS),
    "nectar": {
        "answers.model": _SAYS_WHO, **dict.fromkeys(("turns", "num_responses"), _COUNTS), "good_natured": "rates the prompt",
    },
    "ultrafeedback": {
        **dict.fromkeys(("correct_answers", "incorrect_answers"), "is for the annotators"),
        **dict.fromkeys(("completions.principle", "completions.custom_system_prompt"), "made one response, not the prompt"),
    },
    "vlfeedback": {},
    "rlaifv": {"image_path": "is where the image once was"},
    "llava_critic": {},
    "nemo_rl": {},
    "yojo": {},
}  # fmt: skip
for _name in ("ultrafeedback", "vlfeedback"):
    LEFT[_name] |= {
        "completions.model": _SAYS_WHO,
        **dict.fromkeys(
            ("completions.critique", "completions.overall_score", "completions.fine-grained_score"), _EXPLAINS
        ),
        **dict.fromkeys(
            [f"completions.annotations.{name}" for name in ("Rationale", "Rationale For Rating", "Type")], _EXPLAINS
        ),
    }


class Row:
    """A record, or an object inside one, that notes which of its fields were asked for.

    Args:
        values: dict.
        path: what stands before the names of its fields, such as "completions.".
    """

    def __init__(self, values, path=""):
        self.values, self.path = values, path
        self._asked, self._inner = set(), []

    def get(self, name):
        """A field, or None; it counts as read."""
        self._asked.add(name)
        return self.values.get(name)

    def inside(self, values, name):
        """A `Row` of an object that stands under `name`."""
        row = Row(values, f"{self.path}{name}.")
        self._inner.append(row)
        return row

    def names(self):
        """Its fields, as error messages list them."""
        return ", ".join(map(str, self.values)) or "no columns"

    def left(self):
        """Paths of the fields that hold something and that nobody asked for, in order."""
        own = [f"{self.path}{name}" for name in self.own_left()]
        return list(dict.fromkeys([*own, *(path for row in self._inner for path in row.left())]))

    def own_left(self):
        """Names of the same, without those of the objects inside."""
        return [name for name, value in self.values.items() if name not in self._asked and given(value)]


def given(value):
    """Whether a column holds something: tables fill in nothing, empty strings and empty lists."""
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and not (isinstance(value, (list, tuple, dict, bytes)) and not value)


def same(one, other):
    """Whether two values are equal; arrays, which do not say, are the same only where they are one."""
    try:
        return one is other or bool(one == other)
    except (TypeError, ValueError, RuntimeError):
        return False


def one_of(row, *names, as_given=lambda value: value):
    """What several columns of one meaning say.

    Args:
        row: `Row`.
        names: of the columns, all of which count as read.
        as_given: function on a value, before they are compared.

    Returns:
        the value, as it stands; None where there is none.

    Raises:
        ValueError: two of them differ.
    """
    found = {name: row.get(name) for name in names}
    there = [name for name in names if given(found[name])]
    if not there:
        return next((value for value in found.values() if value is not None), None)
    first = there[0]
    for other in there[1:]:
        if not same(as_given(found[first]), as_given(found[other])):
            raise ValueError(
                f"both {first} and {other} are given, and they differ: keep one, or leave one out with "
                f"ignore_columns=[{other!r}] (--ignore-columns {other})"
            )
    return found[first]


def reason(format, path):
    """Why a path may be left, or None."""
    return LEFT[format].get(path) or LEFT[""].get(path)


def without_fillers(value):
    """A value of a table without the keys that hold nothing: its columns give every object the keys of all others."""
    if isinstance(value, dict):
        return {key: without_fillers(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_fillers(inner) for inner in value]
    return value


def beside(record, columns):
    """Paths of what stands in an object that a column map reaches into, and is not reached.

    Args:
        record: dict.
        columns: names of the columns, those with dots in them among them.
    """
    paths = [column.split(".") for column in columns if column not in record and "." in column]
    found = []

    def walk(value, path):
        if path in paths or not given(value):
            return
        if isinstance(value, dict) and any(other[: len(path)] == path for other in paths):
            for name, inner in value.items():
                walk(inner, [*path, str(name)])
        else:
            found.append(".".join(path))

    for name in dict.fromkeys(path[0] for path in paths):
        walk(record.get(name), [name])
    return found
