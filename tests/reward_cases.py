"""What tests of rewards share: judges that can be watched, or that fail; rows as a trainer hands them over."""

import functools
import itertools
import threading

import torch
from PIL import Image

import yojo
from yojo.demo import digits, reward
from yojo.demo.backbone import BACKBONE
from yojo.inputs.digests import example_key
from yojo.patching.state import patched_base
from yojo.saving.parts import active_head


def of_order_one(reward_model):
    """A reward model whose scores, of about ten, are made a 16th, exactly: in float32, one is what a bound of 2e-6 is meant for."""
    with torch.no_grad():
        head = active_head(patched_base(reward_model.model, "a test"))
        head.weight2.mul_(2**-4)
        head.bias2.mul_(2**-4)
    return reward_model


@functools.cache
def demo_judge(mode="comparative"):
    """The demonstration's reward model, with scores of about one."""
    return of_order_one(yojo.RewardModel.from_pretrained(reward.REWARD_MODEL, base_model=BACKBONE, mode=mode))


@functools.cache
def pictures():
    """The held-out images of the digits."""
    return [image for image, _ in digits.load_digits_split()[1]]


class Watched:
    """A judge whose scores say what it was shown: the place of a response in its example, and its length.

    Attributes:
        seen: the examples of each call.
    """

    def __init__(self):
        self.seen = []

    def score_many(self, examples):
        self.seen.append(list(examples))
        return [[len(text) + place / 1024 for place, text in enumerate(example.responses)] for example in examples]

    def fingerprint(self):
        return {"judge": "Watched"}


class Hashed:
    """A judge whose scores are drawn from prompt, images and response: of each by itself, the same in every process."""

    order_free = True

    def score_many(self, examples):
        return [torch.tensor([self.score(example, text) for text in example.responses]) for example in examples]

    def score(self, example, text):
        key = example_key(example.__class__(example.prompt, [text], images=example.images, literal_tags=True))
        return int(key[:8], 16) / 2**32


class Failing:
    """A judge that fails some times, and then scores like `Hashed`.

    Args:
        times: how often; None: always.
        error: what it raises.
    """

    def __init__(self, times=None, error=None):
        self.left = itertools.repeat(True) if times is None else iter([True] * times)
        self.error, self.calls = error or OSError("the line is down"), 0

    def score_many(self, examples):
        self.calls += 1
        if next(self.left, False):
            raise self.error
        return Hashed().score_many(examples)


class Hanging:
    """A judge that gives no answer until it is let go."""

    def __init__(self):
        self.go, self.entered = threading.Event(), threading.Event()

    def score_many(self, examples):
        self.entered.set()
        self.go.wait(60)
        return Hashed().score_many(examples)


class Saying:
    """A judge that says what it is told to."""

    def __init__(self, found):
        self.found = found

    def score_many(self, examples):
        return self.found


def picture(colour):
    """A small image of one colour."""
    return Image.new("RGB", (8, 8), colour)


def rows(prompts, size, images=None, text="completion {n} of {prompt}"):
    """The arguments of a reward function: `size` completions of each prompt, in the order of trainers."""
    found = {"prompts": [prompt for prompt in prompts for _ in range(size)]}
    found["completions"] = [text.format(n=n, prompt=p) for p in range(len(prompts)) for n in range(size)]
    if images is not None:
        found["image"] = [image for image in images for _ in range(size)]
    return found
