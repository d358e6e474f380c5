"""A benchmark of a few made-up items that needs no files, and judges of all but no cost."""

import dataclasses

import scoring_cases
import torch

import yojo


@dataclasses.dataclass(frozen=True)
class Item:
    number: int
    id: str
    example: yojo.Example
    group: str
    question: str
    tags: dict = dataclasses.field(default_factory=dict)
    info: dict = dataclasses.field(default_factory=dict)

    @property
    def where(self):
        return f"made-up:{self.number + 1}"

    @property
    def rankings(self):
        return self.example.rankings

    @property
    def lengths(self):
        return [len(text) for text in self.example.responses]


class Items(list):
    """Items as `yojo.evaluation.benchmarks` gives them."""

    name = "made-up"

    def light(self, number):
        return list.__getitem__(self, number)


def items(count=24, sizes=(2, 4, 3)):
    """Items with ids that repeat, two to a question, in three groups."""
    made = []
    for n in range(count):
        size = sizes[n % len(sizes)]
        responses = [f"answer {n} {'long ' * ((n + k) % 3)}{k}" for k in range(size)]
        ranks = [1 + (k + n) % size for k in range(size)]
        example = yojo.Example(f"question {n}?", responses, rankings=ranks, id=f"made-up:{n + 1}")
        made.append(Item(n, f"q{n % 7}", example, "abc"[n % 3], f"question {n // 2}"))
    return Items(made)


class Constants(scoring_cases.Constants):
    """The same for items: free of order, as it says, and it notes in `calls` the ids of what it was asked."""

    order_free = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.calls = []

    def score_many(self, examples):
        found = super().score_many(examples)
        self.calls += [example.id for example in examples]
        return found


class Leaning(Constants):
    """The same, and the place where a response stands counts, too."""

    order_free = False

    def fingerprint(self):
        return {"judge": "leaning"}

    def score_many(self, examples):
        found = super().score_many(examples)
        return [scores - 4.0 * torch.arange(len(scores)) for scores in found]
