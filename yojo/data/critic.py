"""LLaVA-Critic-113k: question, responses and verdict out of a judge's prompt and its judgment."""

import re

_BRACKETS = re.compile(
    r"Question: \[(?P<question>.*?)\]\s*\n\s*"
    r"(?:The first response|Response 1|Response A): \[(?P<first>.*?)\]\s*\n\s*"
    r"(?:The second response|Response 2|Response B): \[(?P<second>.*)\]",
    re.DOTALL,
)
_ARENA = re.compile(
    r"<\|User Prompt\|>(?P<question>.*?)<\|The Start of Assistant A's Answer\|>(?P<first>.*?)"
    r"<\|The End of Assistant A's Answer\|>\s*<\|The Start of Assistant B's Answer\|>(?P<second>.*?)"
    r"<\|The End of Assistant B's Answer\|>",
    re.DOTALL,
)
_LLAVA_BENCH = re.compile(
    r"\[Question\](?P<question>.*?)\[Assistant 1\](?P<first>.*?)\[End of Assistant 1\]\s*"
    r"\[Assistant 2\](?P<second>.*?)\[End of Assistant 2\]",
    re.DOTALL,
)
_ONE_RESPONSE = re.compile(
    r"Question: \[(?P<question>.*?)\]\s*\n\s*(?:The LMM response|The response|Response): \[(?P<response>.*)\]",
    re.DOTALL,
)
_CAPTION = re.compile(r"Text Caption:(?P<response>.*?)\n\s*From 0 to 100", re.DOTALL)
_BETTER = re.compile(
    r"better response\s*(?:is)?\s*:?\s*(?:\[\s*(first|second|1|2|A|B)\s*\]|(?:the\s+)?(first|second)\b)", re.IGNORECASE
)


def parse(human, judgment):
    """Read one judgment.

    Three layouts hold two responses: brackets ("The first response: [...]", "The better response: [first]"), arena
    ("<|The Start of Assistant A's Answer|>", "[[A>B]]") and two scores ("[Assistant 1]", "8 6"). The pointwise ones
    hold one response and its score, which ranks nothing.

    Args:
        human: the judge's prompt.
        judgment: what the judge says.

    Returns:
        (question, responses, rankings, rest): rankings are None for one response; rest is what the judge is told
        besides.

    Raises:
        ValueError: another layout, or a judgment without a verdict.
    """
    if not isinstance(human, str) or not isinstance(judgment, str):
        raise ValueError("the turns of conversations need a string under 'value'")
    for pattern, verdict in ((_BRACKETS, _better), (_ARENA, _arena), (_LLAVA_BENCH, _two_scores)):
        found = pattern.search(human)
        if found:
            rankings = verdict(judgment)
            if rankings is None:
                raise ValueError(f"no verdict can be read from the judgment {judgment.strip()[-60:]!r}")
            return (
                found["question"].strip(),
                [found["first"].strip(), found["second"].strip()],
                rankings,
                _rest(human, found),
            )
    for pattern in (_ONE_RESPONSE, _CAPTION):
        found = pattern.search(human)
        if found:
            question = found["question"] if "question" in pattern.groupindex else "Describe the image."
            return question.strip(), [found["response"].strip()], None, _rest(human, found)
    raise ValueError(
        "conversations hold no LLaVA-Critic judgment: no question with two responses is found in the human turn, which "
        f"begins {human.removeprefix('<image>').strip()[:60]!r}"
    )


def _rest(human, found):
    return human[: found.start()] + human[found.end() :]


def _better(judgment):
    found = _BETTER.findall(judgment)
    if found:
        return [1, 2] if "".join(found[-1]).lower() in ("first", "1", "a") else [2, 1]
    return [1, 1] if re.search(r"equally (good|well)", judgment[-300:], re.IGNORECASE) else None


def _arena(judgment):
    found = re.findall(r"\[\[(A>>B|A>B|A=B|B>A|B>>A)\]\]", judgment)
    if not found:
        return None
    return [1, 1] if "=" in found[-1] else [1, 2] if found[-1].startswith("A") else [2, 1]


def _two_scores(judgment):
    found = re.match(r"\s*(\d+(?:\.\d+)?)[\s,]+(\d+(?:\.\d+)?)\s*(?:\n|$)", judgment)
    if not found:
        return None
    first, second = float(found[1]), float(found[2])
    return [1, 1] if first == second else [1, 2] if first > second else [2, 1]
