"""The policy of the comparison: the demonstration's captioner after too few steps, and what it says about images."""

import argparse
import json
import os
from pathlib import Path

import torch

from yojo.demo import digits, pretrain
from yojo.demo.backbone import build_model, build_processor
from yojo.inputs.processors import load_processor

STEPS = 250  # of the 1,000 that the demonstration's backbone had: it names many digits, not all
LENGTH = 16  # tokens of a caption, at most; those that it learnt have 10
FIGURES = "captioner.json"  # written last: a folder that holds it is whole


def make(folder, *, steps=STEPS, seed=0):
    """Pre-train a weak captioner and save it; a folder that is there is kept.

    Args:
        folder: where model and processor go.
        steps: of pre-training, of 64 images each.
        seed: of weights and data.

    Returns:
        dict: the settings, and the share of held-out images that it names rightly, greedy.

    Raises:
        ValueError: the folder holds one of other settings.
    """
    folder, settings = Path(folder), {"steps": steps, "seed": seed}
    if (folder / FIGURES).is_file():
        found = json.loads((folder / FIGURES).read_text())
        if {name: found.get(name) for name in settings} != settings:
            raise ValueError(
                f"{folder} holds a captioner of other settings, {found}: wanted {settings}; take another folder"
            )
        return found
    train, held_out = digits.load_digits_split()
    model, processor = build_model(seed), build_processor()
    pretrain.train(model, processor, train, steps, seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    figures = settings | {"greedy": round(pretrain.caption_accuracy(model, processor, held_out), 4)}
    writing = folder / f"{FIGURES}.{os.getpid()}"
    writing.write_text(json.dumps(figures) + "\n")
    writing.replace(folder / FIGURES)
    return figures


def load(folder):
    """A captioner and its processor, which pads on the left, as generation needs it.

    Raises:
        FileNotFoundError: there is no whole captioner.
    """
    from transformers import Qwen3VLForConditionalGeneration

    if not (Path(folder) / FIGURES).is_file():
        raise FileNotFoundError(
            f"{folder} holds no captioner: make one with examples/grpo/comparison/captioner.py {folder}"
        )
    processor = load_processor(folder)
    processor.tokenizer.padding_side = "left"
    return Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), processor


@torch.no_grad()
def sample(model, processor, images, count, seed, batch_size=60):
    """Captions drawn at temperature 1, as in training; torch's random state is left as it was.

    Args:
        model, processor: of the captioner.
        images: list of B PIL images.
        count: captions of each.
        seed: of the draws.
        batch_size: images of one call.

    Returns:
        list of B lists of `count` strings.
    """
    text, drawn = pretrain.prompt_text(processor, digits.PROMPT), []
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": LENGTH}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for start in range(0, len(images), batch_size):
            part = images[start : start + batch_size]
            batch = processor(text=[text] * len(part), images=part, padding=True, return_tensors="pt")
            # A drawn image token would have no image.
            hidden = [model.config.image_token_id]
            out = model.generate(**batch, **options, num_return_sequences=count, suppress_tokens=hidden)
            said = processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            drawn += [said[n : n + count] for n in range(0, len(said), count)]
    return drawn


def is_right(text, digit):
    """Whether a caption names the digit, and no other."""
    return digits.named_digits(text) == {digit}


def main(argv=None):
    """Make a weak captioner, and say how good it is."""
    parser = argparse.ArgumentParser(description="Pre-train a weak captioner of handwritten digits.")
    parser.add_argument("folder", type=Path, help="where it goes; one that is there is kept")
    parser.add_argument("--steps", type=int, default=STEPS, help="of pre-training (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data (%(default)s)")
    options = parser.parse_args(argv)
    print(json.dumps(make(options.folder, steps=options.steps, seed=options.seed)))


if __name__ == "__main__":
    main()
