"""The reward models of the comparison, trained from one start, and their held-out accuracy."""

import argparse
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from yojo.demo import reward

ROOT = Path(__file__).resolve().parents[3]
START, REST = 200, 250  # steps
SINGLE = {"mode": "isolated", "loss": "bradley_terry"}
MULTI = {"mode": "comparative", "loss": "best"}
WIDE = 8  # responses of the policy's groups, and of the records that "wide" learns from
# What is evaluated, and how it is called in the table.
JUDGES = {"single": "single", "multi": "multi", "multi-4": "multi#permutations=4", "wide": "wide"}


def make(folder, *, seed=0, start=START, rest=REST):
    """Train the reward models; what is there whole is kept.

    All begin as one single-response model: `start` steps of Bradley-Terry on a pair of responses, each judged alone. From
    there `rest` steps go on so ("single"), and as many judge all four responses in one row ("multi"), or the eight of
    other records about the same images ("wide"). From the backbone itself multi stays at the level of chance for hundreds
    of steps with some seeds (docs/rl.md).

    Args:
        folder: where data and models go.
        seed: of weights, order of examples and of responses.
        start, rest: steps of 32 examples.

    Returns:
        dict: judge -> the share of held-out items whose best response it scores highest; also written to accuracy.json.

    Raises:
        ValueError: the folder holds models of other settings.
        subprocess.CalledProcessError: a command failed; it has said why.
    """
    folder = Path(folder).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "start": start, "rest": rest}
    kept = folder / "settings.json"
    if not kept.exists():
        kept.write_text(json.dumps(settings) + "\n")
    if (found := json.loads(kept.read_text())) != settings:
        raise ValueError(
            f"{folder} holds reward models of other settings, {found}: wanted {settings}; take another folder"
        )
    if not (folder / "digits" / "held_out.jsonl").is_file():  # which is written last
        _yojo("demo", "--data", folder / "digits")
    pair = ("--max_responses", 2)
    _train(folder / "start", ROOT / "yojo/demo/backbone", start, seed, SINGLE, "--pooling", "last", *pair)
    _restarted(folder / "start", folder / "start-multi", MULTI)
    _train(folder / "single", folder / "start", rest, seed + 1000, SINGLE, *pair)
    _train(folder / "multi", folder / "start-multi", rest, seed + 1000, MULTI)
    if not (folder / "digits-wide" / "held_out.jsonl").is_file():
        reward.write_files(folder / "digits-wide", n=WIDE)
    _train(folder / "wide", folder / "start-multi", rest, seed + 1000, MULTI, data="digits-wide")
    report = folder / "preferences" / "report.json"
    if not report.is_file():
        judges = [word for name, judge in JUDGES.items() for word in ("--judge", f"{name}={folder / judge}")]
        _yojo("eval", "preferences", folder / "digits/held_out.jsonl", *judges, "--out", folder / "preferences")
    made = {
        judge["name"]: judge["figures"]["official"]["best_of_n"] for judge in json.loads(report.read_text())["judges"]
    }
    (folder / "accuracy.json").write_text(json.dumps(made) + "\n")
    return made


def _train(out, model, steps, seed, options, *more, data="digits"):
    if (out / "trainer_state.json").is_file():  # which is written last
        return
    data = out.parent / data
    words = {
        "model": model,
        "train_data": data / "train.jsonl",
        "eval_data": data / "held_out.jsonl",
        "max_steps": steps,
        "seed": seed,
        "output_dir": out,
    }
    words |= {"eval_strategy": "no", "save_strategy": "no", "disable_tqdm": "true", **options}
    flags = [word for name, value in words.items() for word in (f"--{name}", value)]
    _yojo("train", "--config", ROOT / "examples/digits.yaml", *flags, *more)


def _restarted(saved, out, options):
    """The same weights, to be trained further in another mode, with another loss."""
    import yojo
    from yojo.patching import recorded
    from yojo.patching.state import patched_base

    if (out / "yojo_config.json").is_file():
        return
    reward_model = yojo.RewardModel.from_pretrained(saved)
    base = patched_base(reward_model.model, "restart")
    base.yojo.config = dataclasses.replace(base.yojo.config, **options)
    base.config.yojo = recorded.record(base.yojo)
    yojo.RewardModel(reward_model.model, reward_model.processor).save_pretrained(out)


def _yojo(*words):
    subprocess.run([sys.executable, "-m", "yojo.cli", *map(str, words)], check=True)


def main(argv=None):
    """Train the reward models, and say how good they are."""
    parser = argparse.ArgumentParser(
        description="Train a single-response reward model and two multi-response ones on digits."
    )
    parser.add_argument("folder", type=Path, help="where they go; what is there is kept")
    parser.add_argument("--seed", type=int, default=0, help="of weights and orders (%(default)s)")
    options = parser.parse_args(argv)
    try:
        print(json.dumps(make(options.folder, seed=options.seed)))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
