"""What processes of torch.distributed do with a reward of whole groups, started by torchrun: python reward_processes.py FOLDER CASE...

Each leaves what it found of every case in FOLDER/CASE-RANK.pt.
"""

import asyncio
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import trl_cases
from accelerate import PartialState
from trl_cases import GROUP, Noted, NotedAwaited, logged, make_policy, make_trainer

from tests.reward_cases import Failing, Hanging, Saying
from yojo.demo import digits
from yojo.rewards import AsyncGroupReward, GroupReward, gathering, scorer
from yojo.rewards.sharing import share

DEADLINE = 2.0  # seconds of a judge that hangs


# ---- TRL's trainers ----


def trained(folder, *, kind=GroupReward, trainer="GRPO", rows=6, mode="isolated", shared=False, **options):
    """Two steps of groups of four: of 6 rows a process, the second of three groups is split; of 8, none is."""
    judge = trl_cases.reward_model(mode)
    before, policy = trl_cases.checksum(judge.model), make_policy()
    if shared:
        policy, judge = share(judge, trl_cases.lora())
    noted = NotedAwaited if kind is AsyncGroupReward else Noted
    reward = noted(kind(judge, normalize="none"))
    made = make_trainer(folder, policy, reward, kind=trainer, per_device_train_batch_size=rows, **options)
    made.train()
    return {
        "calls": reward.calls,
        "logs": logged(made),
        "rewards": list(made._logs["rewards"]["yojo"]),
        "scores": list(made._logs["extra"]["yojo/score"]),
        "unchanged": trl_cases.checksum(trl_cases.reward_model(mode).model) == before,
    }


def stopped(folder, judges, **options):
    """How training ends where the judge of one process, or its rows, are not right."""
    judge = judges[dist.get_rank()]()
    reward = GroupReward(judge, retries=0, **options)
    made = make_trainer(folder, make_policy(), reward, per_device_train_batch_size=6)
    try:
        made.train()
        found = "no error"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    return {"error": found, "step": made.state.global_step}


# ---- called directly ----


def table(seed=0, groups=5):
    """Rows of five groups of four in a drawn order, two of one question and picture, dealt out unevenly: 13 and 7."""
    samples = digits.load_digits_split()[1]
    rng = random.Random(seed)
    pictures = [samples[n][0] for n in (0, 1, 2, 3, 3)][:groups]
    rows = [
        (digits.PROMPT, f"{digits.caption(rng.randrange(10), rng)} {n}", picture)
        for picture in pictures
        for n in range(GROUP)
    ]
    rng.shuffle(rows)
    return rows


def called(share, *, kind=GroupReward, judge=None, mode="isolated", calls=1, **options):
    """A reward called with this process's share of the table's rows: (error, rewards) of each call."""
    rows = share(table())[dist.get_rank()]
    reward = kind((judge or (lambda: trl_cases.reward_model(mode)))(), group_size=GROUP, retries=0, **options)
    found = []
    for _ in range(calls):
        try:
            rewards = reward([p for p, _, _ in rows], [t for _, t, _ in rows], image=[image for _, _, image in rows])
            if kind is AsyncGroupReward:
                rewards = asyncio.run(rewards)
            error = None
        except Exception as raised:
            rewards, error = None, f"{type(raised).__name__}: {raised}"
        found.append((error, rewards))
    return found


def uneven(rows):
    return rows[:13], rows[13:]


def one_has_none(rows):
    return rows, []


def incomplete(rows):
    return rows[:13], rows[13:-1]


def only(rank, seconds):
    """A deadline that one process has: the judge of the other one is right, and takes as long as it takes."""
    return seconds if dist.get_rank() == rank else None


def right(rank, judge):
    """A judge that one process has, and the trained reward model that the other has."""
    return lambda: judge() if dist.get_rank() == rank else trl_cases.reward_model()


def late(folder):
    """The call of a process that the other one does not answer: it is waited for no longer than it may be late."""
    gathering.MARGIN = 1.5
    prompts, texts, pictures = zip(*uneven(table())[dist.get_rank()], strict=True)
    reward = GroupReward(trl_cases.reward_model(), group_size=GROUP, deadline=1.5)
    dist.barrier()
    reward._begin()  # which both have to do at once, and is done; no judge has to be as fast as that
    error, start = None, time.monotonic()
    if dist.get_rank() == 0:
        try:
            reward(list(prompts), list(texts), image=list(pictures))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
    seconds = time.monotonic() - start
    dist.barrier()  # the other one is there, and busy, for as long as it is waited for
    return error, seconds


CASES = {
    "split": lambda folder: trained(folder),
    "whole": lambda folder: trained(folder, rows=8, max_steps=1),
    "split, awaited": lambda folder: trained(folder, kind=AsyncGroupReward, max_steps=1),
    "split, comparative": lambda folder: trained(folder, mode="comparative", max_steps=1),
    "split, RLOO": lambda folder: trained(folder, trainer="RLOO", max_steps=1),
    "split, one backbone": lambda folder: trained(folder, shared=True),
    "raises": lambda folder: stopped(folder, (trl_cases.reward_model, Failing)),
    "hangs": lambda folder: stopped(folder, (Hanging, trl_cases.reward_model), deadline=only(0, DEADLINE)),
    "uneven": lambda folder: called(uneven, calls=2),
    "uneven, awaited": lambda folder: called(uneven, kind=AsyncGroupReward),
    "one has none": lambda folder: called(one_has_none),
    "incomplete": lambda folder: called(incomplete),
    "one raises": lambda folder: called(uneven, judge=right(1, Failing), calls=2),
    "one hangs": lambda folder: called(uneven, judge=right(0, Hanging), deadline=only(0, DEADLINE)),
    "one gives NaN": lambda folder: called(uneven, judge=right(1, lambda: Saying([[float("nan")] * GROUP]))),
    "one gives too few": lambda folder: called(uneven, judge=right(1, lambda: Saying([[1.0]]))),
    "late": late,
}


def main(folder, *names):
    torch.set_num_threads(1)
    scorer.PAUSE = 0.01
    PartialState(cpu=True)
    assert dist.get_backend() == "gloo" and dist.get_world_size() == 2
    for name in names:
        found = CASES[name](Path(folder) / "runs")
        torch.save(found, Path(folder) / f"{name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
