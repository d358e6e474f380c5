"""Rewards of whole groups for reinforcement learning: GRPO and friends, in TRL and other trainers."""

import importlib

# Public name -> the module it lives in; loaded on first use, since torch takes seconds.
_HOMES = {
    "AsyncGroupReward": "yojo.rewards.group",
    "Group": "yojo.rewards.groups",
    "GroupCollator": "yojo.rewards.collator",
    "GroupReward": "yojo.rewards.group",
    "GroupScorer": "yojo.rewards.scorer",
    "Reward": "yojo.rewards.answers",
    "RewardError": "yojo.rewards.scorer",
    "Rewarded": "yojo.rewards.scorer",
    "SharedJudge": "yojo.rewards.sharing",
    "share": "yojo.rewards.sharing",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'yojo.rewards' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})
