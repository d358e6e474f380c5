"""What `test_parallel` runs in one process and in two, and compares: short trainings of the demonstration's backbone.

As a script, under `accelerate launch`: python tests/parallel_cases.py FOLDER [NAME...]; the first process writes
FOLDER/results.pt.
"""

import functools
import os
import random
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

import yojo
from yojo.demo import digits
from yojo.demo.backbone import load_backbone
from yojo.demo.reward import make_examples
from yojo.patching.state import unwrap
from yojo.training.arguments import RewardTrainingArguments
from yojo.training.trainer import RewardTrainer

# Every value of one with every value of each other: tune, mode, gradient_accumulation_steps.
CASES = {
    "lora comparative 1": ("lora", "comparative", 1),
    "lora isolated 2": ("lora", "isolated", 2),
    "full comparative 2": ("full", "comparative", 2),
    "full isolated 1": ("full", "isolated", 1),
}
ROW_TOKENS = 64  # one or two examples
STEPS = 3


@functools.cache
def all_images():
    """The digits' training images, which take a second to make."""
    return digits.load_digits_split()[0]


def mixed_examples(count, seed=0):
    """Examples of 1 to 7 responses, about one image, two of them, or none, so that no share of them is like another."""
    rng, images = random.Random(seed), all_images()
    made = []
    for n in range(count):
        pictures = rng.sample(images, (1, 0, 2, 1)[n % 4])
        responses, rankings = digits.answers(rng.randrange(10), (4, 2, 7, 1, 3)[n % 5], rng)
        question = digits.PROMPT if pictures else "Which number is the better answer, and why do you think so?"
        made.append(
            yojo.Example(question, responses, images=[image for image, _ in pictures], rankings=rankings, id=f"e{n}")
        )
    return made


def held_out_examples():
    """What the trainers evaluate on."""
    return mixed_examples(5, seed=1)


def make_trainer(folder, examples, eval_dataset=None, *, world, batch=8, accumulation=1, optimizer=None, **options):
    """A `RewardTrainer` whose global batch is the same whatever the number of processes, and how it went."""
    torch.manual_seed(0)
    model, processor = load_backbone()
    settings = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "dataloader_num_workers": 0,
        "per_device_train_batch_size": batch // (world * accumulation),
        "per_device_eval_batch_size": 4 // world,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-3,
        "adam_epsilon": 1e-3,  # a gradient that is nothing but rounding must not become a whole step
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "row_tokens": ROW_TOKENS,
        "max_steps": STEPS,
        "lora_r": 4,
        "lora_dropout": 0.0,
    }
    args = RewardTrainingArguments(output_dir=str(folder), **settings | options)
    trainer = RewardTrainer(model, args, examples, eval_dataset, processing_class=processor)
    if optimizer is not None:
        trainer.optimizer = optimizer([p for p in trainer.model.parameters() if p.requires_grad])
    with torch.no_grad():  # scores of a few tenths, so that losses and gradients are not those of ties
        generator = torch.Generator().manual_seed(1)
        for name, parameter in trainer.model.named_parameters():
            if name.endswith(("weight1", "weight2", "lora_B.default.weight")) and parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    record = Record(trainer)
    trainer.add_callback(record)
    return trainer, record


class Record(TrainerCallback):
    """Gradients of the first step, and what every process was given to do."""

    def __init__(self, trainer):
        self.trainer, self.gradients, self.shares = trainer, None, []
        agree = trainer._agree

        def watched(batches):
            total = agree(batches)
            if trainer.is_in_train:
                self.shares += [(len(batch["rows"]), batch["samples"], batch["passes"]) for batch in batches]
            return total

        trainer._agree = watched

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.gradients is None:
            self.gradients = {
                name: whole(parameter.grad)
                for name, parameter in self.trainer.model.named_parameters()
                if parameter.grad is not None
            }


def whole(tensor):
    """A copy of a tensor, or of a DTensor's parts together."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def outcome(trainer, record):
    """All there is to compare of a training."""
    return {
        "losses": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "metrics": [
            {name: value for name, value in line.items() if not name.endswith(("runtime", "per_second", "norm"))}
            for line in trainer.state.log_history
            if "loss" in line or "eval_loss" in line
        ],
        "norms": [
            float(whole(torch.as_tensor(line["grad_norm"])))
            for line in trainer.state.log_history
            if "grad_norm" in line
        ],
        "gradients": record.gradients,
        "weights": {name: whole(p) for name, p in trainer.model.named_parameters() if p.requires_grad},
        "shares": trainer._all_of([record.shares]),
        "units": {name for name in (type(m).__name__ for m in trainer.model.modules()) if name.startswith("FSDP")},
    }


MORE = ("idle", "head", "skips", "whole lora", "whole full", "bf16")


def run_cases(world, folder, names=(*CASES, *MORE), **options):
    """dict of name -> `outcome` of the named cases, by all processes together; "resumed" comes with "whole"."""
    results = {}
    examples, held_out = mixed_examples(22), held_out_examples()
    for name, (tune, mode, accumulation) in CASES.items():
        if name not in names:
            continue
        trainer, record = make_trainer(
            folder / "run",
            examples,
            held_out,
            world=world,
            batch=8,
            accumulation=accumulation,
            tune=tune,
            mode=mode,
            gradient_checkpointing=tune == "lora",
            eval_strategy="steps",
            eval_steps=2,
            **options,
        )
        predictions = []
        trainer.compute_metrics = lambda found, kept=predictions: kept.append(torch.from_numpy(found.predictions)) or {}
        trainer.train()
        results[name] = outcome(trainer, record) | {"predictions": predictions, "saved": None}
        if mode == "isolated":
            results[name]["saved"] = str(folder / tune)
            trainer.save_model(results[name]["saved"])
    # Two examples a batch, but for the last one: a second process has nothing to do there. Of the two that share a batch
    # one has an image and one has none, and so have the two processes.
    if "idle" in names:
        some = [examples[n] for n in (1, 5, 0)]
        trainer, record = make_trainer(folder / "run", some, world=world, batch=2, max_steps=2, **options)
        trainer.train()
        results["idle"] = outcome(trainer, record)
    # The head alone, with an optimizer that was made elsewhere, and evaluated before it is trained.
    if "head" in names:
        own = {"tune": "head", "optimizer": torch.optim.SGD, "max_steps": 2}
        trainer, record = make_trainer(folder / "run", examples, held_out, world=world, batch=4, **own, **options)
        trainer.evaluate()
        trainer.train()
        results["head"] = outcome(trainer, record)
    # Records that are bad: one that is longer than may be, the dearest, and one whose image is none, the next but one. With
    # two processes they are not the same one's.
    if "skips" in names:
        bad = [long_example(40), long_example(25), long_example(24, images=[b"no image"])]
        skips = folder / f"skips-{world}"
        trainer, record = make_trainer(
            skips, [*examples[:5], *bad], world=world, max_steps=2, max_length=180, skip_bad=True, **options
        )
        trainer.train()
        results["skips"] = outcome(trainer, record)
        results["skips"]["skipped"] = (skips / "skipped.jsonl").read_text().splitlines()
    # Stopped after a step, and gone on from the checkpoint, with dropout.
    for tune in ("lora", "full"):
        if f"whole {tune}" not in names:
            continue
        run = folder / f"resumed-{tune}-{world}"
        saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2, "lora_dropout": 0.2, "tune": tune}
        for name, checkpoint in (("whole", None), ("resumed", str(run / "checkpoint-1"))):
            trainer, record = make_trainer(run, examples, world=world, **saving, **options)
            trainer.train(resume_from_checkpoint=checkpoint)
            results[f"{name} {tune}"] = outcome(trainer, record)
    if "bf16" in names:
        results["bf16"] = mixed_precision(world, folder, examples, **options)
    if "stock" in names:
        results["stock"] = stock_gradients(make_examples(all_images(), 8, seed=0))
    return results


def stock_gradients(examples):
    """Gradients of a batch, and of DistributedDataParallel, whose two processes pack a half of it each, without a trainer."""
    model, processor = load_backbone()
    yojo.patch(model.eval(), processor)
    collator = yojo.Collator(processor, model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model(**collator(examples)).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    same = yojo.patch(parallel) is parallel
    half, rank = len(examples) // 2, torch.distributed.get_rank()
    parallel(**collator(examples[half * rank : half * (rank + 1)])).loss.backward()
    halves = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"whole": whole, "halves": halves, "patched once": same, "units": set()}


def mixed_precision(world, folder, examples, **options):
    """`outcome` of a step, and the types of loss, scores and head in it."""
    trainer, record = make_trainer(folder / "run", examples, world=world, max_steps=1, bf16=True, **options)
    types = set()
    compute_loss = trainer.compute_loss

    def watched(model, inputs, **kwargs):
        loss, output = compute_loss(model, inputs, return_outputs=True, **kwargs)
        head = unwrap(model).score
        types.add((loss.dtype, output.scores.dtype, head.weight1.dtype, head.separator_delta.dtype))
        return loss

    trainer.compute_loss = watched
    trainer.train()
    return outcome(trainer, record) | {"types": types}


def long_example(words, images=()):
    """An example of 6 responses of so many words."""
    responses = [" ".join(["seven"] * words)] * 6
    return yojo.Example(digits.PROMPT, responses, images=images, rankings=[1, 2, 3, 4, 5, 6], id=f"long{words}")


def allow_fsdp_on_cpus():
    """accelerate shards on accelerators alone and would quietly take DDP instead; PyTorch's FSDP2 does it over gloo, too."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType

    start = PartialState.__init__

    def started(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = started


def main(folder, *names):
    """Run everything and keep it; `accelerate launch` has said how the processes work together."""
    torch.set_num_threads(1)
    from accelerate import PartialState

    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        allow_fsdp_on_cpus()
    state = PartialState(cpu=True)
    results = run_cases(state.num_processes, folder, names or (*CASES, *MORE))
    if state.is_main_process:
        torch.save(results, folder / "results.pt")
    state.wait_for_everyone()
    torch.distributed.destroy_process_group()


def losses(trainer):
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
