"""The demonstration's reward model: LoRA and a value head on the tiny backbone, trained by a plain Trainer."""

import dataclasses
import json
import random
from pathlib import Path

import torch

import yojo
from yojo.demo import digits
from yojo.demo.backbone import BACKBONE, load_backbone

REWARD_MODEL = Path(__file__).parent / "reward_model"

RESPONSES = 4
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def make_examples(samples, count, seed, n=RESPONSES):
    """Examples of one image and n answers, one of them right.

    Args:
        samples: list of (PIL image, digit), gone through in a shuffled order, again and again.
        count: how many examples to make.
        seed: int; decides order, answers and wording.
        n: answers of an example.

    Returns:
        list of `yojo.Example`.
    """
    examples, order = [], []
    rng = random.Random(seed)
    while len(examples) < count:
        if not order:
            order = rng.sample(range(len(samples)), len(samples))
        place = order.pop()
        image, digit = samples[place]
        responses, rankings = digits.answers(digit, n, rng)
        examples.append(yojo.Example(digits.PROMPT, responses, images=[image], rankings=rankings, id=place))
    return examples


def write_files(folder, *, count=4311, seed=0, n=RESPONSES):
    """Write the digits as preference files, in the paper's JSONL.

    Args:
        folder: made if it is missing.
        count: records to train on; each of the 1,437 images comes up every so often, with other answers.
        seed: of answers and wording.
        n: answers of a record.

    Returns:
        dict: path of `train.jsonl` and of `held_out.jsonl` -> how many records it holds.
    """
    folder, written = Path(folder), {}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, samples, number in zip(("train", "held_out"), digits.load_digits_split(), (count, 360), strict=True):
        for place, (image, _) in enumerate(samples):
            image.save(folder / "images" / f"{name}-{place:04d}.png")
        path = folder / f"{name}.jsonl"
        with open(path, "w") as file:
            for example in make_examples(samples, number, seed, n):
                record = {
                    "prompt": example.prompt,
                    "image": f"images/{name}-{example.id:04d}.png",
                    "responses": example.responses,
                    "rankings": example.rankings,
                }
                file.write(json.dumps(record) + "\n")
        written[path] = number
    return written


def encode(collator, samples, examples, known=None, log=None):
    """Examples as tokens; each image and each answer is encoded once, however often it comes up.

    `collator.encode(example)` gives the same for each example. It renders the chat template, prepares the image and
    tokenises the answers every time, which takes as long as the model's own part of a training step here.

    Args:
        collator: `yojo.Collator`.
        samples: list of (PIL image, digit) that the examples were made of.
        examples: list of `yojo.Example` from `make_examples`.
        known: dict that keeps what is encoded, for further calls with the same samples; or None.
        log: function (what, done, total) called as images are encoded, or None.

    Returns:
        list of `Encoded`, for `collator.pack`.
    """
    known = {} if known is None else known
    places = sorted({example.id for example in examples} - known.keys())
    for done, place in enumerate(places):
        known[place] = collator.encode(yojo.Example(digits.PROMPT, ["0"], images=[samples[place][0]]))
        if log is not None:
            log("preparing image", done + 1, len(places))
    answers = sorted({text for example in examples for text in example.responses} - known.keys())
    if answers:
        found = collator.encode(yojo.Example(digits.PROMPT, answers, images=[samples[0][0]]))
        known.update(zip(answers, zip(found.responses, found.leads, strict=True), strict=True))
    encoded = []
    for example in examples:
        responses, leads = zip(*(known[text] for text in example.responses), strict=True)
        encoded.append(
            dataclasses.replace(
                known[example.id],
                name=example.name,
                responses=list(responses),
                leads=list(leads),
                rankings=example.rankings,
            )
        )
    return encoded


def train(
    mode,
    *,
    start=None,
    steps=250,
    batch_size=32,
    learning_rate=7e-4,
    head_learning_rate=1e-3,
    seed=0,
    known=None,
    log=None,
):
    """Patch the tiny backbone and train LoRA, value head and the separator's embedding on digits.

    Args:
        mode: "comparative" or "isolated".
        start: `yojo.RewardModel` of an earlier call, in either mode, whose weights to go on from; or None.
        steps, batch_size: of the training.
        learning_rate, head_learning_rate: of LoRA and of the value head; AdamW, warm-up, decay along a cosine.
        seed: of weights, data and order.
        known: dict for `encode`, the same in every call, so that each image is prepared once; or None.
        log: function (what, done, total, loss=None) called for images that are prepared and every 5 steps, or None.

    Returns:
        (`yojo.RewardModel` in eval mode, seconds the training took).
    """
    import tempfile
    import time

    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments, get_cosine_schedule_with_warmup

    torch.manual_seed(seed)
    model, processor = load_backbone()
    model = yojo.patch(model, processor, mode=mode)
    _start_separator(model, processor)
    lora = LoraConfig(r=64, lora_alpha=64, target_modules=LORA_TARGETS, modules_to_save=["score"])
    model = get_peft_model(model, lora)
    if start is not None:
        model.load_state_dict(start.model.state_dict())
    collator = yojo.Collator(processor, model)
    train_samples, _ = digits.load_digits_split()
    # Another seed when it goes on from another model, so that it sees other answers.
    examples = make_examples(train_samples, steps * batch_size, seed if start is None else seed + 1000)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    in_head = {name for name in trained if ".score." in name and not name.endswith("separator_delta")}
    head = [p for name, p in trained.items() if name in in_head]
    others = [p for name, p in trained.items() if name not in in_head]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": learning_rate}, {"params": head, "lr": head_learning_rate}], weight_decay=0.0
    )

    class Log(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            if log is not None:
                log("step", 0, steps)

        def on_log(self, args, state, control, logs=None, **kwargs):
            if log is not None and "loss" in logs:
                log("step", state.global_step, steps, logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                max_grad_norm=1.0,
                logging_steps=5,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                label_names=["rankings"],
                use_cpu=True,
                dataloader_pin_memory=False,
                seed=seed,
            ),
            train_dataset=encode(collator, train_samples, examples, known, log),
            data_collator=collator.pack,
            optimizers=(optimizer, get_cosine_schedule_with_warmup(optimizer, min(20, steps), steps)),
            callbacks=[Log()],
        )
        _be_quiet(trainer)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    return yojo.RewardModel(model.eval(), processor), seconds


def best_of_n(scores, examples):
    """Share of examples whose highest score belongs to a response of rank 1: the accuracy of best-of-N."""
    right = sum(
        example.rankings[int(score.argmax())] == min(example.rankings)
        for score, example in zip(scores, examples, strict=True)
    )
    return right / len(examples)


def load_reward_model():
    """The reward model shipped with the package, trained by `yojo demo --save`."""
    return yojo.RewardModel.from_pretrained(REWARD_MODEL, base_model=BACKBONE)


@torch.no_grad()
def _start_separator(model, processor):
    """Let the separator begin as a full stop: a place where the backbone has both the answer's digit and the image's.

    The mean of all embeddings, which a new token has, is a word that the backbone has never seen. What it makes of the
    answer there is poor, and scores took long to leave the level of chance (docs/log.md).
    """
    stop, separator = processor.tokenizer.convert_tokens_to_ids([".", model.yojo.config.separator])
    embeddings = model.get_input_embeddings().weight
    model.score.separator_delta.copy_(embeddings[stop] - embeddings[separator])


def _be_quiet(trainer):
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
