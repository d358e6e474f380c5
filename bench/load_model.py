"""The model that a load test serves: the demonstration's, its scores of order one."""

import torch

import yojo
from yojo.demo import reward
from yojo.demo.backbone import BACKBONE
from yojo.patching.state import patched_base
from yojo.saving.parts import active_head

SCALE = 2**-4  # of scores of about ten: exact, and what is left is of the order that a bound of 2e-6 is meant for


def judge(mode="comparative"):
    """`yojo.RewardModel`."""
    found = yojo.RewardModel.from_pretrained(reward.REWARD_MODEL, base_model=BACKBONE, mode=mode)
    with torch.no_grad():
        head = active_head(patched_base(found.model, "a load test"))
        head.weight2.mul_(SCALE)
        head.bias2.mul_(SCALE)
    return found


def save(path):
    """Save it into a folder; dict: mode -> the model in that mode."""
    judges = {mode: judge(mode) for mode in ("comparative", "isolated")}
    judges["comparative"].save_pretrained(path)
    return judges
