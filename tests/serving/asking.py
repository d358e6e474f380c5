"""What tests of the endpoints share: requests to a server in this process, scorers that fail or wait, words that nobody may repeat."""

import asyncio
import functools
import threading
import time

import torch

import yojo
from tests.reward_cases import demo_judge, of_order_one
from tests.serving.serving_cases import client_of, engine_of, run
from yojo.demo import reward
from yojo.demo.backbone import BACKBONE
from yojo.reward_model import RewardModel
from yojo.saving.known_scores import Known
from yojo.serving.roles import Scorer

CANARY = "xylograph"  # stands in no message, and in no other word
LONG = 60.0  # seconds that no test takes
NAN, RAISES = 5, 7  # how many responses a prompt has whose scores are NaN, or at which the model raises


def ask(*requests, settings=None, policy=None, ready=True, **options):
    """The responses to (method, path, keyword arguments of httpx)s, one after another, of one server."""

    async def go():
        async with client_of(engine_of(settings, **options), policy=policy, ready=ready) as client:
            return [await client.request(method, path, **given) for method, path, given in requests]

    return run(go)


def posts(path, *bodies, **options):
    """The responses to JSON bodies."""
    return ask(*[("POST", path, {"json": body}) for body in bodies], **options)


def close(found, wanted):
    """Assert that scores are those of the model."""
    torch.testing.assert_close(torch.tensor(found), torch.as_tensor(wanted), rtol=0, atol=2e-6)


def error_of(reply, status):
    """The error of a reply, in our form and of this status."""
    assert reply.status_code == status, reply.text
    (error,) = reply.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return error


async def until(condition):
    """What threads do wakes nobody here, so it is looked for."""
    end = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.002)


@functools.cache
def permuted():
    """The demonstration's model in two orders."""
    return of_order_one(yojo.RewardModel.from_pretrained(reward.REWARD_MODEL, base_model=BACKBONE, permutations=2))


class Faulty(RewardModel):
    """The demonstration's model, which fails at prompts with so many responses, and can be made to wait.

    Attributes:
        rows: numbers of responses of the examples of each row that was begun.
        go: where it is not set, rows wait.
        entered: set when a row is begun.
    """

    def __init__(self):
        judge = demo_judge()
        super().__init__(judge.model, judge.processor)
        self.rows, self.go, self.entered = [], threading.Event(), threading.Event()
        self.go.set()

    def _begin_row(self, encoded, modules=None, stream=None):
        counts = [len(item.responses) for item in encoded]
        self.rows.append(counts)
        self.entered.set()
        self.go.wait(60)
        if RAISES in counts:
            raise RuntimeError(f"the device says {CANARY}")
        wait = super()._begin_row(encoded, modules, stream)
        return lambda: [
            scores * (float("nan") if count == NAN else 1.0) for scores, count in zip(wait(), counts, strict=True)
        ]

    def scorer(self):
        """A `Scorer` of it."""
        return Scorer(self, Known(True, True, "as it was"))
