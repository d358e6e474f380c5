"""What is scored in the benchmarks: prompts, numbers of responses and their lengths, on a GPU and on a CPU."""

import dataclasses

from bench.models import KINDS


@dataclasses.dataclass(frozen=True)
class Point:
    """What is scored.

    Attributes:
        kind: "text", "image" or "video": what the prompt is beside words.
        prompt: P, tokens of the prompt.
        count: N, responses.
        each: tokens of each response, its separator among them.
    """

    kind: str
    prompt: int
    count: int
    each: int

    def __post_init__(self):
        assert self.kind in KINDS and self.each >= 2

    def __str__(self):
        return f"{self.kind}_{self.prompt}+{self.count}x{self.each}"

    def fields(self):
        """Its fields of a result line."""
        return {
            "samples": 1,
            "prompt": self.kind,
            "prompt_tokens": self.prompt,
            "responses": self.count,
            "response_tokens": self.each,
        }


# By device: prompts (kind, tokens), responses, tokens of a response. The first prompt is the shortest. All sweeps go
# through MIDDLE: on a GPU what the paper speaks of, four responses of 100 tokens to an image.
PROMPTS = {
    "cuda": [("text", 256), ("image", 1024), ("image", 2048), ("video", 8192), ("video", 16384)],
    "cpu": [("text", 32), ("image", 128), ("image", 256), ("video", 1024), ("video", 2048)],
}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = {"cuda": (32, 100, 128, 512), "cpu": (4, 12, 16, 64)}
MIDDLE = {"cuda": (("image", 2048), 4, 100), "cpu": (("image", 256), 4, 12)}
QUICK = {
    "cuda": [Point("text", 256, 4, 512), Point("image", 2048, 1, 100), Point("image", 2048, 4, 100)],
    "cpu": [Point("text", 16, 2, 16), Point("image", 32, 1, 8), Point("image", 32, 4, 8)],
}


def points_of(device_type, quick=False, full=False):
    """The points to measure, in order.

    The sweeps change one of N, prompt and length at a time; short prompts with long responses, where there is little to
    gain, are among them.
    """
    if quick:
        return QUICK[device_type]
    prompts, lengths = PROMPTS[device_type], LENGTHS[device_type]
    (middle, count, each), shortest = MIDDLE[device_type], prompts[0]
    if full:
        chosen = [(*prompt, n, length) for prompt in prompts for length in lengths for n in COUNTS]
    else:
        chosen = [(*middle, n, each) for n in COUNTS]
        chosen += [(*prompt, count, each) for prompt in prompts]
        chosen += [(*middle, count, length) for length in lengths]
        chosen += [(*shortest, count, lengths[-1]), (*shortest, 1, each)]
    return list(dict.fromkeys(Point(*numbers) for numbers in chosen))
