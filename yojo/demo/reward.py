"""The demonstration's reward model: LoRA and a value head on the tiny backbone, trained by a plain Trainer."""

import random
from pathlib import Path

import torch

import yojo
from yojo.demo import digits
from yojo.demo.backbone import BACKBONE, load_backbone

REWARD_MODEL = Path(__file__).parent / "reward_model"

RESPONSES = 4
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def make_examples(samples, count, seed):
    """Examples of one image and four answers, one of them right.

    Args:
        samples: list of (PIL image, digit), gone through in a shuffled order, again and again.
        count: how many examples to make.
        seed: int; decides order, answers and wording.

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
        responses, rankings = digits.answers(digit, RESPONSES, rng)
        examples.append(yojo.Example(digits.PROMPT, responses, images=[image], rankings=rankings, id=place))
    return examples


def train(mode, *, steps=350, batch_size=32, learning_rate=3e-3, warmup=20, seed=0, log=None):
    """Patch the tiny backbone and train LoRA, value head and the separator's embedding on digits.

    Args:
        mode: "comparative" or "isolated".
        steps, batch_size, learning_rate: of the optimiser; AdamW, linear decay.
        seed: of weights, data and order.
        log: function (step, loss) called every 10 steps, or None.

    Returns:
        (`yojo.RewardModel` in eval mode, seconds the training took).
    """
    import tempfile
    import time

    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainerCallback, TrainingArguments

    torch.manual_seed(seed)
    model, processor = load_backbone()
    model = yojo.patch(model, processor, mode=mode)
    separator = model.yojo.separator_id
    lora = LoraConfig(
        r=32,
        lora_alpha=32,
        target_modules=LORA_TARGETS,
        modules_to_save=["score"],
        trainable_token_indices={"embed_tokens": [separator]},
    )
    model = get_peft_model(model, lora)
    train_samples, _ = digits.load_digits_split()

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if log is not None and "loss" in logs:
                log(state.global_step, logs["loss"])

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=batch_size,
                learning_rate=learning_rate,
                warmup_steps=warmup,
                max_grad_norm=1.0,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                label_names=["rankings"],
                seed=seed,
            ),
            train_dataset=make_examples(train_samples, steps * batch_size, seed),
            data_collator=yojo.Collator(processor, model),
            callbacks=[Log()],
        )
        _be_quiet(trainer)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    return yojo.RewardModel(model.cpu().eval(), processor), seconds


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


def _be_quiet(trainer):
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
