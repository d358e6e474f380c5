"""What scores responses: anything with `score_many(examples) -> list of [N]`; classifiers, models behind endpoints, baselines."""

import importlib

# Public name -> the module it lives in; loaded on first use, since torch and transformers take seconds.
_HOMES = {
    "ChatScores": "yojo.judges.chat_scores",
    "Classifier": "yojo.judges.classifier",
    "EndpointError": "yojo.judges.client",
    "Generative": "yojo.judges.generative",
    "Judge": "yojo.judges.judge",
    "Length": "yojo.judges.baselines",
    "Place": "yojo.judges.baselines",
    "Random": "yojo.judges.baselines",
    "Refusal": "yojo.judges.judge",
    "RemoteJudge": "yojo.judges.remote",
    "ValueHead": "yojo.judges.value_head",
    "checked_scores": "yojo.judges.judge",
    "fingerprint_of": "yojo.judges.judge",
    "load_judge": "yojo.judges.loading",
    "order_free": "yojo.judges.judge",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'yojo.judges' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})
