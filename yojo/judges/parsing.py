"""What a judge wrote -> scores: its last line, in exactly the form it was asked for, and nothing that says otherwise above it."""

import re
import string

# Models whose server leaves their thoughts in the text put them so; drafts in there are no verdict.
_THOUGHTS, _THOUGHTS_END = "<think>", "</think>"
_MARKUP = str.maketrans("", "", "*`")  # **Ranking:** A > B, as judges like to write it
_WORDS = {"listwise": "Ranking", "pairwise": "Verdict", "pointwise": "Score"}


class Unparsable(ValueError):
    """A reply without exactly one verdict of the form that was asked for."""


def labels_of(count):
    """The labels of N responses: A, B, ... Z, or 1, 2, ... where there are more than letters; list of N strings."""
    return list(string.ascii_uppercase[:count]) if count <= 26 else [str(n + 1) for n in range(count)]


def verdict(reply, style, labels=()):
    """The verdict in a judge's reply.

    The last line that is not blank must be the verdict: "Ranking: C > A = B", "Verdict: A" (B, tie) or "Score: 7". Lines above
    that begin in this way must say the same. What stands in a fenced block (```) or in quotes is quoted, and no verdict; stars
    and backquotes within the line do not count, nor do the thoughts in front of "</think>".

    Args:
        reply: str.
        style: "listwise", "pairwise" or "pointwise".
        labels: of the responses, for "listwise": each must stand there exactly once.

    Returns:
        listwise: list of N floats, in the order of labels, how many of the others a response beats, a tie counted as half
            a one: N - 1 for a best one alone, 0 for a worst one alone. pairwise: 1.0 where A is better, 0.0 where B is, 0.5
            for a tie. pointwise: float from 1 to 10.

    Raises:
        Unparsable: anything else; the message says what.
    """
    word = _WORDS[style]
    if reply.lstrip().startswith(_THOUGHTS) and _THOUGHTS_END not in reply:
        raise Unparsable("its thoughts have no end")
    lines = [line.translate(_MARKUP).strip() for line in _unquoted(reply.rpartition(_THOUGHTS_END)[2].splitlines())]
    begins = re.compile(rf"{word}\s*:", re.IGNORECASE)
    found = [line[match.end() :].strip() for line in lines if (match := begins.match(line))]
    if not found:
        raise Unparsable(f'there is no line "{word}: ..."')
    if not begins.match(lines[-1]):
        raise Unparsable(f'the line "{word}: ..." is not the last one')
    read = {"listwise": lambda text: _ranking(text, labels), "pairwise": _better, "pointwise": _number}[style]
    last, *others = [_read(read, text) for text in reversed(found)]
    if isinstance(last, Unparsable):
        raise last
    if any(other != last for other in others):
        raise Unparsable(f'{len(found)} lines "{word}: ..." say different things')
    return last


def _unquoted(lines):
    """Lines that are not blank, without those in fenced blocks, whose ends stay."""
    is_quoted = False
    for line in lines:
        if line.strip().startswith("```"):
            is_quoted = not is_quoted
            yield line.replace("`", "'")
        elif line.strip() and not is_quoted:
            yield line


def _read(read, text):
    try:
        return read(text)
    except Unparsable as error:
        return error


def _ranking(text, labels):
    groups = [[label.strip() for label in group.split("=")] for group in text.split(">")]
    said = [label for group in groups for label in group]
    known = set(labels)
    if wrong := [label for label in said if label not in known]:
        raise Unparsable(f"{_shown(wrong[0])} is none of the labels {', '.join(labels)}")
    if twice := sorted({label for label in said if said.count(label) > 1}):
        raise Unparsable(f"the label {', '.join(twice)} stands there twice")
    if missing := [label for label in labels if label not in said]:
        raise Unparsable(f"the label {', '.join(missing)} is missing")
    scores, behind = {}, len(labels)
    for group in groups:
        behind -= len(group)
        scores |= {label: behind + (len(group) - 1) / 2 for label in group}
    return [scores[label] for label in labels]


def _better(text):
    found = 0.5 if text.lower() == "tie" else {"A": 1.0, "B": 0.0}.get(text)
    if found is None:
        raise Unparsable(f"the verdict must be A, B or tie, it is {_shown(text)}")
    return found


def _number(text):
    found = re.fullmatch(r"([0-9]{1,2}(?:\.[0-9]+)?)(?:\s*/\s*10)?", text, re.ASCII)
    if found is None or not 1 <= float(found[1]) <= 10:
        raise Unparsable(f"the score must be a number from 1 to 10, it is {_shown(text)}")
    return float(found[1])


def _shown(text):
    return repr(text if len(text) <= 40 else f"{text[:37]}...")
