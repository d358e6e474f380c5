"""Pre-train the demonstration's backbone to caption handwritten digits: python -m yojo.demo.pretrain"""

import argparse
import datetime
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image

from yojo.demo import digits
from yojo.demo.backbone import BACKBONE, build_model, build_processor

BATCH_SIZE = 64
LEARNING_RATE = 2e-3
WARM_UP = 100
WEIGHT_DECAY = 0.05
SEED = 0


def prompt_text(processor, question):
    """The chat-formatted text of one user turn with an image and a question, up to where the answer starts."""
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
    return processor.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)


def augment(image, rng):
    """The image turned, moved, scaled and roughened a little, as a new PIL image of the same size."""
    size = image.size[0]
    zoom = rng.uniform(0.9, 1.1)
    angle = math.radians(rng.uniform(-12, 12))
    cos, sin = math.cos(angle) / zoom, math.sin(angle) / zoom
    centre = (size - 1) / 2
    dx, dy = centre + rng.uniform(-3, 3), centre + rng.uniform(-3, 3)
    affine = (cos, sin, centre - cos * dx - sin * dy, -sin, cos, centre + sin * dx - cos * dy)
    moved = np.asarray(image.transform(image.size, Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR))
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, 8, size=(size, size, 1))
    return Image.fromarray((moved + noise).clip(0, 255).astype(np.uint8))


def training_batch(processor, samples, rng):
    """One batch of captioning.

    Args:
        processor: from `build_processor()`.
        samples: list of B (image, label).
        rng: a `random.Random`.

    Returns:
        dict of the model's inputs, with `labels` [B, L]: -100 everywhere but at the caption and its <|im_end|>.
    """
    captions = [digits.caption(label, rng) + "<|im_end|>" for _, label in samples]
    texts = [prompt_text(processor, rng.choice(digits.QUESTIONS)) + text for text in captions]
    images = [augment(image, rng) for image, _ in samples]
    batch = processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    # Padded on the left, every row ends with its caption.
    lengths = torch.tensor([len(ids) for ids in processor.tokenizer(captions)["input_ids"]])
    length = batch["input_ids"].shape[1]
    in_caption = torch.arange(length)[None, :] >= length - lengths[:, None]
    batch["labels"] = batch["input_ids"].masked_fill(~in_caption, -100)
    return batch


def train(model, processor, samples, steps, seed):
    """Train the model in place; the learning rate rises over `WARM_UP` steps and then falls along a cosine.

    Returns:
        The mean loss of the last tenth of the steps.
    """
    rng = random.Random(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))

    def factor(step):
        return min((step + 1) / WARM_UP, 0.5 + 0.5 * math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    losses = []
    model.train()
    for step in range(steps):
        batch = training_batch(processor, rng.sample(samples, BATCH_SIZE), rng)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} of {steps}: loss {np.mean(losses[-100:]):.4f}", flush=True)
    model.eval()
    return float(np.mean(losses[-max(1, steps // 10) :]))


@torch.no_grad()
def greedy_captions(model, processor, images, question=digits.PROMPT, batch_size=60):
    """Greedy answers to one question about each image.

    Args:
        model: the backbone.
        processor: its processor.
        images: list of B PIL images.
        question: the prompt's text.
        batch_size: images of one call.

    Returns:
        list of B strings.
    """
    text = prompt_text(processor, question)
    captions = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size]
        batch = processor(text=[text] * len(part), images=part, padding=True, return_tensors="pt")
        out = model.generate(**batch, max_new_tokens=16, do_sample=False)
        captions += processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return captions


def caption_accuracy(model, processor, samples):
    """The share of (image, label) samples whose greedy caption names the right digit and no other."""
    captions = greedy_captions(model, processor, [image for image, _ in samples])
    right = [digits.named_digits(text) == {label} for text, (_, label) in zip(captions, samples, strict=True)]
    return sum(right) / len(right)


def main(argv=None):
    """Build, train, evaluate and write the backbone."""
    parser = argparse.ArgumentParser(description="Pre-train the demonstration's backbone.")
    parser.add_argument("--out", type=Path, default=BACKBONE, help="folder to write to")
    parser.add_argument("--steps", type=int, default=1000, help=f"training steps of {BATCH_SIZE} images")
    options = parser.parse_args(argv)

    train_samples, held_out = digits.load_digits_split()
    processor = build_processor()
    model = build_model(SEED)
    started = time.perf_counter()
    loss = train(model, processor, train_samples, options.steps, SEED)
    seconds = time.perf_counter() - started
    accuracy = caption_accuracy(model, processor, held_out)

    options.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(options.out)
    processor.save_pretrained(options.out)
    figures = {
        "steps": options.steps,
        "batch_size": BATCH_SIZE,
        "learning_rate": LEARNING_RATE,
        "seed": SEED,
        "seconds": round(seconds, 1),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "final_loss": round(loss, 4),
        "held_out_images": len(held_out),
        "held_out_caption_accuracy": round(accuracy, 4),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "date": datetime.date.today().isoformat(),
    }
    (options.out / "pretraining.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
