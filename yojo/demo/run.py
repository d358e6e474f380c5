"""What `yojo demo` does: train on digits, measure accuracy, time and FLOPs, draw a picture."""

import json
import time
import warnings
from pathlib import Path

import torch

import yojo
from yojo.demo import digits, reward
from yojo.demo.progress import Progress, cpu_cores, cpu_model, say
from yojo.patching.state import unwrap

COUNTS = (1, 2, 4, 8, 16)
MODES = ("comparative", "isolated")

# Isolated first: it learns to judge an answer by the image alone, and the comparative model goes on from there.
STEPS = {"isolated": 250, "comparative": 200}
SINGLY = 120  # held-out images that single passes score: N passes each take their time


def run(*, out="demo-out", json_file=None, steps=None, seed=0, save=None, images=None, rounds=9):
    """Run the demonstration and print what it finds, and every few seconds how far it is.

    Args:
        out: folder for the picture.
        json_file: file for the figures, or None.
        steps: training steps of each mode, `STEPS` by default.
        seed: of weights, data and order.
        save: folder for the comparative reward model, or None.
        images: how many of the 360 held-out images are scored; all by default.
        rounds: how many times each pass is timed; their median is shown.

    Returns:
        dict of the figures: accuracy by mode, seconds, speedup and flops by number of responses, and where they were
        measured.
    """
    import transformers
    from rich.console import Console

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    console = Console()
    start = time.perf_counter()
    say(f"torch's threads: {torch.get_num_threads()}; data: scikit-learn's handwritten digits")
    _, held_out = digits.load_digits_split()
    examples = reward.make_examples(held_out, len(held_out) if images is None else images, seed + 1)
    models, scores, accuracy, trained, known = {}, {}, {}, {}, {}
    plan = STEPS if steps is None else dict.fromkeys(STEPS, steps)
    for mode, count in plan.items():
        before = models.get("isolated")
        say(f"{mode}: {count} steps of LoRA and value head{'' if before is None else ', from the isolated model'}")
        ahead = sum(list(plan.values())[len(models) + 1 :])
        models[mode], trained[mode] = reward.train(
            mode, start=before, steps=count, seed=seed, known=known, log=Progress(mode, ahead)
        )
        say(f"{mode}: trained in {trained[mode]:.0f} s; scoring {len(examples)} held-out images")
        scores[mode] = models[mode].score_many(examples)
        accuracy[mode] = reward.best_of_n(scores[mode], examples)
        say(f"{mode}: best-of-{reward.RESPONSES} on {len(examples)} held-out images: {accuracy[mode]:.1%}")
    say("drawing")
    picture = draw(examples[:6], scores["comparative"][:6], Path(out) / "demo.png")
    if save is not None:
        _save(models["comparative"], save)
    some = examples[:SINGLY]
    say(f"single: the isolated model again, one stock pass per response, on {len(some)} of the images")
    progress, single = Progress("single"), []
    for done, example in enumerate(some):
        single.append(score_singly(models["isolated"], example))
        progress("scoring image", done + 1, len(some))
    accuracy["single"] = reward.best_of_n(single, some)
    at_once = reward.best_of_n(scores["isolated"][: len(some)], some)
    difference = max(float((a - b).abs().max()) for a, b in zip(single, scores["isolated"], strict=False))
    say(
        f"single: {accuracy['single']:.1%} (isolated mode on the same images: {at_once:.1%}; scores differ by at most "
        f"{difference:.0e}; chance is {1 / reward.RESPONSES:.0%})"
    )
    measured = {}
    for count in COUNTS:
        say(f"measuring time and FLOPs of {count} response{'s' if count > 1 else ''}")
        measured[str(count)] = measure(models, held_out[0], count, rounds)
    console.print(_table(measured))
    say(f"picture: {picture}")
    figures = {
        "accuracy": accuracy,
        "seconds": {n: m["seconds"] for n, m in measured.items()},
        "speedup": {n: m["seconds"]["single"] / m["seconds"]["comparative"] for n, m in measured.items()},
        "speedup_isolated": {n: m["seconds"]["single"] / m["seconds"]["isolated"] for n, m in measured.items()},
        "flops": {n: m["flops"] for n, m in measured.items()},
        "tokens": {n: m["tokens"] for n, m in measured.items()},
        "training_seconds": trained,
        "training_steps": plan,
        "total_seconds": time.perf_counter() - start,
        "cpu_seconds": time.process_time(),
        "held_out_images": len(examples),
        "single_images": len(some),
        "isolated_on_single_images": at_once,
        "single_difference": difference,
        "seed": seed,
        "cpu": cpu_model(),
        "cores": cpu_cores(),
        "threads": torch.get_num_threads(),
        "picture": str(picture),
        "yojo": yojo.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if json_file is not None:
        Path(json_file).parent.mkdir(parents=True, exist_ok=True)
        Path(json_file).write_text(json.dumps(figures, indent=2) + "\n")
        say(f"figures: {json_file}")
    say(f"done in {figures['total_seconds']:.0f} s")
    return figures


def score_singly(reward_model, example):
    """Score an example as people do without YOJO: one ordinary pass of the model per response, [N] float32."""
    return single_scores(reward_model, single_inputs(reward_model, example))


def single_inputs(reward_model, example):
    """Ordinary inputs of N single-response passes: list of N dicts of tensors, batch size 1."""
    encoded = reward_model.collator.encode(example)
    prompt_types = encoded.token_types["mm_token_type_ids"]
    inputs = []
    for response in encoded.responses:
        ids = torch.cat([encoded.prompt_ids, torch.tensor(response)])[None]
        types = torch.cat([prompt_types, prompt_types.new_zeros(len(response))])[None]
        mask = torch.ones_like(ids)
        inputs.append({"input_ids": ids, "attention_mask": mask, "mm_token_type_ids": types, **encoded.vision})
    return inputs


@torch.inference_mode()
def single_scores(reward_model, inputs):
    """N ordinary passes through backbone and head, no layout: [N] float32."""
    base = unwrap(reward_model.model)
    scores = []
    for one in inputs:
        hidden = base.base_model(**one, use_cache=False)[0][0]
        scores.append(base.score(hidden, torch.tensor([hidden.shape[0] - 1])))
    return torch.cat(scores)


def measure(models, sample, count, rounds):
    """Time and FLOPs of scoring `count` responses: one pass in each mode against `count` single passes.

    Tokenising and image preparation are left out on both sides.

    Returns:
        dict: seconds (median), flops (`yojo.costs.flops`: of the pairs that are visible) and tokens, each a dict by variant.
    """
    import random

    from yojo.costs.flops import batch_flops

    image, _ = sample
    rng = random.Random(count)
    responses = [digits.caption(rng.randrange(10), rng) for _ in range(count)]
    example = yojo.Example(digits.PROMPT, responses, images=[image])
    variants, tokens, flops = {}, {}, {}
    for mode in MODES:
        batch = models[mode].collator([example])
        tokens[mode] = batch["input_ids"].shape[1]
        variants[mode] = lambda mode=mode, batch=batch: _packed(models[mode].model, batch)
        flops[mode] = batch_flops(models[mode].model, batch).total
        flops["single"] = batch_flops(models[mode].model, batch, single=True).total
    inputs = single_inputs(models["isolated"], example)
    tokens["single"] = sum(one["input_ids"].shape[1] for one in inputs)
    variants["single"] = lambda: single_scores(models["isolated"], inputs)
    alone = variants["single"]()
    difference = float((alone - variants["isolated"]()[0]).abs().max())
    if not difference <= 1e-5 * max(10.0, float(alone.abs().max())):  # float32, and scores of some ten
        raise RuntimeError(f"isolated and single scores differ by {difference}: nothing is timed")
    runs = {name: [] for name in variants}
    for _ in range(rounds):  # in turns, so that a disturbance hits all alike
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            runs[name].append(time.perf_counter() - start)
    seconds = {name: sorted(times)[len(times) // 2] for name, times in runs.items()}
    return {"seconds": seconds, "flops": flops, "tokens": tokens}


@torch.inference_mode()
def _packed(model, batch):
    return model(**batch).scores


def draw(examples, scores, path):
    """Draw images with their answers and scores, best first.

    Args:
        examples: list of `yojo.Example` with one PIL image and rankings.
        scores: list of [N] tensors.
        path: PNG file.

    Returns:
        The path, absolute.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = 2
    rows = -(-len(examples) // columns)
    figure, axes = pyplot.subplots(rows, 2 * columns, figsize=(13, 1.9 * rows + 0.6), width_ratios=[1, 3.2] * columns)
    axes = axes.reshape(rows, 2 * columns)
    for axis in axes.flat:
        axis.axis("off")
    low, high = min(float(s.min()) for s in scores), max(float(s.max()) for s in scores)
    for place, (example, values) in enumerate(zip(examples, scores, strict=True)):
        row, column = divmod(place, columns)
        axes[row, 2 * column].imshow(example.images[0])
        axis = axes[row, 2 * column + 1]
        order = values.argsort(descending=True).tolist()
        for line, n in enumerate(order):
            right = example.rankings[n] == 1
            colour = "#1a7f37" if right else "#8c959f"
            width = 0.22 * (float(values[n]) - low) / max(high - low, 1e-9)
            axis.barh(line, width, left=0.0, height=0.55, color=colour)
            axis.text(0.24, line, f"{float(values[n]):+.2f}", va="center", family="monospace", fontsize=10)
            axis.text(0.39, line, example.responses[n], va="center", fontsize=10, color="#1f2328")
            if right:
                axis.text(-0.01, line, "right", va="center", ha="right", fontsize=8, color=colour)
        axis.set_xlim(-0.1, 1.0)
        axis.set_ylim(len(order) - 0.4, -0.6)
    figure.suptitle(f"“{digits.PROMPT}” Four answers scored in one pass, held-out images", fontsize=12)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path.resolve()


def _save(reward_model, folder):
    # The name the backbone was loaded under is a folder of this installation, which means nothing elsewhere.
    base = reward_model.model.get_base_model()
    base.config.name_or_path = base.name_or_path = "yojo-demo-backbone"
    for adapter in reward_model.model.peft_config.values():
        adapter.base_model_name_or_path = "yojo-demo-backbone"
    reward_model.save_pretrained(folder)


def _table(measured):
    from rich.table import Table

    table = Table(title="One pass against N single passes")
    table.add_column("N", justify="right")
    short = {"single": "single", "comparative": "comp.", "isolated": "isol."}
    for name in ("single", *MODES):
        table.add_column(f"{short[name]}\nms", justify="right")
    for name in MODES:
        table.add_column(f"{short[name]}\nfaster", justify="right")
    for name in MODES:
        table.add_column(f"{short[name]}\nfewer FLOPs", justify="right")
    for count, m in measured.items():
        seconds, flops = m["seconds"], m["flops"]
        table.add_row(
            count,
            *(f"{seconds[name] * 1e3:.1f}" for name in ("single", *MODES)),
            *(f"{seconds['single'] / seconds[name]:.1f}x" for name in MODES),
            *(f"{flops['single'] / flops[name]:.1f}x" for name in MODES),
        )
    return table
