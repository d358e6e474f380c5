"""Workers without a model: what they were given can be looked at, and they can be made to wait, to fail and to die."""

import contextlib
import pickle
import threading

from yojo.serving.engine import Engine
from yojo.serving.errors import ApiError
from yojo.serving.roles import Asked, Prepared
from yojo.serving.settings import Settings
from yojo.serving.workers import Role

KNOWN = {"ok": True, "stored": True, "reason": "as it was", "difference": 0.0, "bound": 1.0}


class Stage:
    """What the workers of a test share.

    Attributes:
        rows: list of the rows that were scored: each the prompts in it.
        prepared: the prompts that were prepared.
        go: where it is not set, rows wait.
        entered: set when a row is begun.
        dies: prompts whose row kills the scoring worker; of the others those in it are scored again.
        dies_preparing: prompts that kill the preparing worker.
        digest: of the model, as each new scoring worker says it.
        known: whether it scores as it did.
        depth: rows that a scoring worker has at once.
        begun: how many scoring workers have begun.
    """

    def __init__(self):
        self.rows, self.prepared, self.begun = [], [], 0
        self.go, self.entered = threading.Event(), threading.Event()
        self.go.set()
        self.dies, self.dies_preparing, self.digest, self.known = set(), set(), "d0", KNOWN
        self.depth = 1

    def scorer(self):
        """A handler that gives the length of each response."""
        return _Scorer(self)

    def preparer(self, collator, limits):
        """A handler that takes a token for each character of the prompt."""
        return _Preparer(self)

    def engine(self, scorers=1, preparing=1, **settings):
        """An `Engine` of these."""
        roles = [Role(f"scoring {n}", self.scorer) for n in range(scorers)]
        return Engine(Settings(**settings), roles, preparing, self.preparer, in_process=True)


class _Scorer:
    def __init__(self, stage):
        self.stage = stage
        stage.begun += 1

    def hello(self):
        return {
            "collator": b"",
            "digest": self.stage.digest,
            "known": self.stage.known,
            "depth": self.stage.depth,
            "order_free": False,
        }

    def begin(self, ident, payloads):
        asked = [pickle.loads(payload) for payload in payloads]
        self.stage.rows.append([one.prompt for one in asked])
        self.stage.entered.set()
        self.stage.go.wait(60)
        if any(one.prompt in self.stage.dies for one in asked):
            raise SystemExit
        yield ident, [[float(len(text)) for text in one.responses] for one in asked]

    def rest(self):
        return ()


class _Preparer:
    def __init__(self, stage):
        self.stage = stage

    def hello(self):
        return {}

    def begin(self, ident, asked):
        self.stage.prepared.append(asked.prompt)
        if asked.prompt in self.stage.dies_preparing:
            raise SystemExit
        if asked.prompt.startswith("wrong"):
            yield ident, ApiError(422, "invalid_input", "it is wrong")
            return
        tokens = len(asked.prompt)
        yield ident, Prepared(pickle.dumps(asked), tokens, tokens, [1] * len(asked.responses))

    def rest(self):
        return ()


def asked(prompt, *responses):
    """An `Asked`."""
    return Asked(prompt, list(responses or ("yes",)))


@contextlib.asynccontextmanager
async def running(engine, ready=True):
    """An engine that is ready."""
    await engine.start()
    try:
        if ready:
            await engine.until_ready(60)
        yield engine
    finally:
        await engine.stop(0.0)
