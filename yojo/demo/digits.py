"""The demonstration's data: scikit-learn's handwritten digits, and answers about them in varied wording."""

import re

import numpy as np
from PIL import Image

IMAGE_SIZE = 32  # pixels; what the demonstration's processor wants, so that it never has to resize
HELD_OUT = 360  # of 1797 images
SPLIT_SEED = 0

PROMPT = "Which digit is shown?"

QUESTIONS = (
    PROMPT,
    "Which digit is this?",
    "What digit is shown?",
    "What digit do you see?",
    "What number is this?",
    "Which number is in the image?",
    "What is in this picture?",
    "What does the image show?",
    "Read the digit.",
    "Describe the image.",
)

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# {n} is the digit as a word or a numeral, {a} the article it takes.
TEMPLATES = (
    "{n}",
    "{n}.",
    "{a} {n}.",
    "It is {a} {n}.",
    "This is {a} {n}.",
    "This is the digit {n}.",
    "The digit is {n}.",
    "The number is {n}.",
    "The answer is {n}.",
    "The digit shown is {n}.",
    "The image shows {a} {n}.",
    "The picture shows the number {n}.",
    "I see {a} {n}.",
    "I think it is {a} {n}.",
    "It looks like {a} {n}.",
    "It reads {n}.",
    "Someone wrote {a} {n}.",
    "A handwritten {n}.",
    "Clearly {a} {n}.",
    "That must be {a} {n}.",
    "{n} is the digit in the image.",
    "{a} {n} is shown here.",
)


def load_digits_split():
    """The images, split into training and held-out ones; the same split every time, stratified by digit.

    Returns:
        (train, held_out): lists of (PIL RGB image of 32 x 32 pixels, label int), 1437 and 360 of them.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    samples = [(_to_image(pixels), int(label)) for pixels, label in zip(data.images, data.target, strict=True)]
    train, held_out = train_test_split(
        samples, test_size=HELD_OUT, random_state=SPLIT_SEED, stratify=data.target.tolist()
    )
    return train, held_out


def caption(label, rng):
    """A right answer in varied wording.

    Args:
        label: the digit, 0 to 9.
        rng: a `random.Random`.

    Returns:
        A short sentence naming the digit, as a word or as a numeral.
    """
    return _fill(rng.choice(TEMPLATES), label, rng)


def answers(label, n, rng):
    """Candidate answers to `PROMPT`, one of them right.

    Which answer is right and how each is worded are drawn independently, so the wording says nothing about it.

    Args:
        label: the digit, 0 to 9.
        n: how many answers, at least 1. The wrong digits differ from each other as long as n is at most 10.
        rng: a `random.Random`.

    Returns:
        (responses, rankings): n strings and n ints, 1 for the right answer and 2 for every wrong one.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    wrong = [digit for digit in range(10) if digit != label]
    digits = rng.sample(wrong, n - 1) if n <= 10 else rng.choices(wrong, k=n - 1)
    digits.insert(rng.randrange(n), label)
    return [caption(digit, rng) for digit in digits], [1 if digit == label else 2 for digit in digits]


def named_digits(text):
    """The set of digits that a text names, as words or as numerals."""
    found = re.findall(r"[a-z]+|\d", text.lower())
    return {WORDS.index(token) if token in WORDS else int(token) for token in found if token in _NAMES}


_NAMES = frozenset(WORDS) | frozenset("0123456789")


def _to_image(pixels):
    grey = Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8))
    return grey.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC).convert("RGB")


def _fill(template, label, rng):
    name = rng.choice((WORDS[label], str(label)))
    text = template.format(n=name, a="an" if label == 8 else "a")
    return text[0].upper() + text[1:]
