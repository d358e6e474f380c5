"""One run of the comparison: TRL's GRPOTrainer, the weak captioner, one reward; what is measured goes to a JSONL file."""

import argparse
import dataclasses
import hashlib
import json
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import captioner
import measures

from yojo.demo import digits

HERE = Path(__file__).resolve().parent
REWARDS = ("truth", "judge")
# What TRL logs that goes into the file; times do not, so that two runs of a seed write the same.
TRL_FIGURES = {
    "reward": "reward",
    "kl": "kl",
    "entropy": "entropy",
    "completions/mean_length": "length",
    "loss": "loss",
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides a run.

    Attributes:
        reward: "truth", 1.0 for a caption that names the digit and no other, else 0.0; or "judge".
        judge: name of the judge, as for `yojo.judges.load_judge`; "" for the truth.
        seed: of images, sampled captions and orders.
        steps: of the policy.
        prompts: images of a step.
        group: captions of each.
        learning_rate: of AdamW, constant.
        beta: weight of the KL penalty to the initial policy.
        every: steps between evaluations.
        logging: steps that a line of the file averages.
        images: held-out images of an evaluation by samples.
        samples: captions of each of these, by either policy.
    """

    reward: str
    judge: str = ""
    seed: int = 0
    steps: int = 240
    prompts: int = 8
    group: int = 8
    learning_rate: float = 2e-4
    beta: float = 0.02
    every: int = 20
    logging: int = 5
    images: int = 120
    samples: int = 4

    def __post_init__(self):
        if self.reward not in REWARDS:
            raise ValueError(f"reward must be one of {', '.join(REWARDS)}, got {self.reward!r}")
        if (self.reward == "judge") != bool(self.judge):
            raise ValueError(f'judge must name a judge for reward="judge", and none for another: got {self.judge!r}')
        for name in ("steps", "prompts", "every", "logging", "images", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.group < 2:
            raise ValueError(f"group must be at least 2, a reward is compared with its group's: got {self.group}")


class Truth:
    """The true answer as a reward function of TRL's, and as scores of held-out groups."""

    def __call__(self, prompts, completions, label, **columns):
        """1.0 where a completion names the digit of its row and no other, else 0.0: list of floats."""
        return [float(captioner.is_right(text, digit)) for text, digit in zip(_texts(completions), label, strict=True)]

    def scores(self, images, labels, captions, draw):
        """The same of groups of captions: list of lists of floats."""
        return [
            [float(captioner.is_right(text, digit)) for text in group]
            for group, digit in zip(captions, labels, strict=True)
        ]

    def checksum(self):
        """Nothing here has weights."""


class Judged:
    """A judge as a reward function of TRL's, through `yojo.rewards.GroupReward`, and as scores of held-out groups."""

    def __init__(self, name, seed, group):
        from yojo.judges import load_judge
        from yojo.rewards.group import GroupReward
        from yojo.rewards.scorer import GroupScorer

        self.judge = load_judge(name)
        self.reward = GroupReward(self.judge, group_size=group, seed=seed)
        self.scorer = GroupScorer(self.judge, seed=seed)

    def __call__(self, prompts, completions, **columns):
        """The judge's scores of whole groups: list of floats."""
        return self.reward(prompts=prompts, completions=completions, **columns)

    def scores(self, images, labels, captions, draw):
        """Scores of groups of captions, in the judge's own unit: list of lists of floats."""
        from yojo.rewards.groups import Group

        asked = [Group(digits.PROMPT, texts, images=[image]) for image, texts in zip(images, captions, strict=True)]
        return [found.rewards for found in self.scorer.score(asked, draw=draw)]

    def checksum(self):
        """SHA-256 of the judge's weights; None for a judge that has none here."""
        model = getattr(self.judge, "model", None)
        if model is None:
            return None
        state = hashlib.sha256()
        for name, tensor in sorted(model.state_dict().items()):
            state.update(name.encode())
            state.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return state.hexdigest()


class Watched:
    """A reward function that also notes what its rewards are worth against the truth."""

    def __init__(self, reward):
        self.reward, self.groups, self.right = reward, [], []
        self.__name__ = "reward"  # how TRL calls it

    def __call__(self, prompts, completions, **columns):
        rewards = self.reward(prompts=prompts, completions=completions, **columns)
        right = [
            captioner.is_right(text, digit) for text, digit in zip(_texts(completions), columns["label"], strict=True)
        ]
        rows = {}
        for place, image in enumerate(columns["place"]):  # an image comes up in one group of a step
            rows.setdefault(image, []).append(place)
        for places in rows.values():
            self.groups.append([rewards[place] for place in places])
            self.right.append([right[place] for place in places])
        return rewards

    def taken(self):
        """What `measures.groups` says of all groups since the last call, rounded."""
        found = measures.groups(self.groups, self.right)
        self.groups, self.right = [], []
        return found


def run(settings, policy, out, *, quiet=False):
    """Train a policy; a run that is there whole is kept, one that was cut begins anew.

    Args:
        settings: `Settings`.
        policy: folder of the captioner.
        out: the JSONL file; beside it, once the run is whole, a .json file with settings, versions, machine and seconds.
        quiet: print nothing.

    Returns:
        dict: what the .json file holds.

    Raises:
        ValueError: the file is of a run with other settings.
        RuntimeError: the judge's weights changed.
    """
    import torch

    out, note = Path(out), Path(out).with_suffix(".json")
    wanted = dataclasses.asdict(settings)
    if note.is_file():
        found = json.loads(note.read_text())
        if found["settings"] != wanted:
            raise ValueError(f"{note} is of other settings, {found['settings']}: wanted {wanted}; take another file")
        return found
    out.parent.mkdir(parents=True, exist_ok=True)
    reward = Truth() if settings.reward == "truth" else Judged(settings.judge, settings.seed, settings.group)
    before, start = reward.checksum(), time.perf_counter()
    writing = out.with_name(f"{out.name}.writing")
    with open(writing, "w") as file:

        def write(line):
            file.write(json.dumps({name: _rounded(value) for name, value in line.items()}) + "\n")
            file.flush()
            if not quiet:
                print(json.dumps(line), flush=True)

        with tempfile.TemporaryDirectory() as folder:  # where TRL would save
            _train(settings, policy, reward, write, folder)
    if reward.checksum() != before:
        raise RuntimeError(f"the weights of {settings.judge} changed while the policy was trained with it")
    writing.replace(out)
    made = {
        "settings": wanted,
        "checksum": before,
        "seconds": round(time.perf_counter() - start, 1),
        "threads": torch.get_num_threads(),
    }
    made |= _where()
    part = note.with_name(f"{note.name}.writing")
    part.write_text(json.dumps(made, indent=2) + "\n")
    part.replace(note)
    return made


def _train(settings, policy, reward, write, folder):
    import datasets
    from transformers import PrinterCallback, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, processor = captioner.load(policy)
    train, held_out = digits.load_digits_split()
    watched = Watched(reward)
    evaluation = Evaluation(settings, reward, model, processor, held_out)

    class Notes(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            write({"step": 0, "kind": "eval"} | evaluation(0))

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % settings.every == 0 or state.global_step == settings.steps:
                write({"step": state.global_step, "kind": "eval"} | evaluation(state.global_step))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "reward" in logs:
                found = {ours: logs[theirs] for theirs, ours in TRL_FIGURES.items() if theirs in logs}
                write({"step": state.global_step, "kind": "train"} | found | watched.taken())

    rows = {
        "prompt": [[{"role": "user", "content": digits.PROMPT}] for _ in train],
        "image": [image for image, _ in train],
        "label": [digit for _, digit in train],
        "place": list(range(len(train))),
    }
    args = GRPOConfig(
        output_dir=folder,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        seed=settings.seed,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.prompts * settings.group,
        num_generations=settings.group,
        max_completion_length=captioner.LENGTH,
        temperature=1.0,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        beta=settings.beta,
        logging_steps=settings.logging,
    )
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=watched,
        args=args,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=processor,
        callbacks=[Notes()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


class Evaluation:
    """What a policy is worth on held-out images: to the truth, and to the reward it is trained with.

    Greedy on all of them. On some it answers several times, beside as many answers of the initial policy, and both are
    judged in one group: the share of pairs that it wins is a proxy reward in [0, 1], for every reward and for the truth.
    """

    def __init__(self, settings, reward, model, processor, held_out):
        self.settings, self.reward, self.model, self.processor = settings, reward, model, processor
        self.held_out, self.some = held_out, held_out[: settings.images]
        self.initial = self._sampled("initial")

    def __call__(self, step):
        from yojo.demo import pretrain

        images, labels = zip(*self.some, strict=True)
        was_training = self.model.training
        self.model.eval()
        greedy = pretrain.caption_accuracy(self.model, self.processor, self.held_out)
        ours = self._sampled(step)
        self.model.train(was_training)
        both = [a + b for a, b in zip(ours, self.initial, strict=True)]
        count = self.settings.samples
        found = {"greedy": greedy}
        truth = Truth().scores(images, labels, both, step)
        found["sampled"] = sum(sum(group[:count]) for group in truth) / (count * len(truth))
        for name, scores in (("true_wins", truth), ("proxy_wins", self.reward.scores(images, labels, both, step))):
            found[name] = measures.win_rate([s[:count] for s in scores], [s[count:] for s in scores])
        found["distinct"] = len({text for group in ours for text in group})
        found["several"] = sum(len(digits.named_digits(text)) > 1 for group in ours for text in group)
        found["none"] = sum(not digits.named_digits(text) for group in ours for text in group)
        return found

    def _sampled(self, what):
        seed = int(hashlib.sha256(f"{self.settings.seed} {what}".encode()).hexdigest()[:15], 16)
        return captioner.sample(self.model, self.processor, [i for i, _ in self.some], self.settings.samples, seed)


def _texts(completions):
    return [turns if isinstance(turns, str) else turns[-1]["content"] for turns in completions]


def _rounded(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _where():
    import peft
    import torch
    import transformers
    import trl

    from yojo.demo.progress import cpu_cores, cpu_model

    made = {module.__name__: module.__version__ for module in (torch, transformers, trl, peft)}
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=HERE, capture_output=True, text=True)
    made["commit"] = found.stdout.strip() or None
    return made | {"cpu": cpu_model(), "cores": cpu_cores(), "date": time.strftime("%Y-%m-%d")}


def main(argv=None):
    """Train one policy with one reward."""
    parser = argparse.ArgumentParser(description="Train the weak captioner by GRPO with one reward.")
    parser.add_argument("out", type=Path, help="the JSONL file of what is measured")
    parser.add_argument("--policy", type=Path, required=True, help="folder of the captioner, see captioner.py")
    for field in dataclasses.fields(Settings):
        flag = f"--{field.name.replace('_', '-')}"
        required = field.default is dataclasses.MISSING
        parser.add_argument(flag, type=field.type, required=required, default=None if required else field.default)
    options = vars(parser.parse_args(argv))
    out, policy = options.pop("out"), options.pop("policy")
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        run(Settings(**options), policy, out)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
