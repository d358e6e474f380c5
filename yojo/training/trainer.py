"""`RewardTrainer`: transformers' Trainer for reward models on packed rows."""

import contextlib
import json
import logging
import math
from pathlib import Path

import numpy as np
import torch
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

from yojo.costs.flops import batch_flops
from yojo.evaluation.metrics import ranking_metrics
from yojo.inputs.packing import Collator
from yojo.patching.patch import patch
from yojo.patching.state import unwrap
from yojo.saving.save import refuse_own_base
from yojo.training import adapters, sharding
from yojo.training.arguments import RewardTrainingArguments
from yojo.training.batches import CostEstimate, Drawn, GlobalBatches, RowCollator, RowLoader
from yojo.training.resume import WholeCheckpoints

logger = logging.getLogger(__name__)

SKIPPED_FILE = "skipped.jsonl"  # in the output folder


class RewardTrainer(WholeCheckpoints, Trainer):
    """transformers' Trainer for reward models: packed rows, balanced over processes, ranking metrics, whole checkpoints.

    Args:
        model: a `transformers` model with a language-model head; patched (`yojo.patch`) or not, then it is patched with
            the fields of `args`.
        args: `RewardTrainingArguments`.
        train_dataset: map-style data set of ranked `yojo.Example`s: a list, `yojo.data.load(...)`, a
            `yojo.data.Mixture`, or None.
        eval_dataset: likewise, or a dict of names to data sets, or None.
        processing_class: the model's processor, or its tokenizer for a text-only model.
        peft_config: a PEFT config that has modules_to_save=["score"]; by default what `args.tune` says.
        provenance: dict of what the model card should tell besides (data files, base model, ...).
        **kwargs: further arguments of transformers' Trainer (callbacks, optimizers, compute_metrics, ...).
            compute_metrics gets scores and rankings, [S, Nmax], -inf and -1 where there is no response.

    Raises:
        TypeError, ValueError: a data set of something else, a PEFT config without the head, a model that cannot be
            patched, arguments that contradict the patch.
    """

    def __init__(
        self,
        model,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        peft_config=None,
        provenance=None,
        **kwargs,
    ):
        if args is None:
            args = RewardTrainingArguments(output_dir="reward-model")
        if not isinstance(args, RewardTrainingArguments):
            raise TypeError(f"args must be yojo.RewardTrainingArguments, got {type(args).__name__}")
        if processing_class is None:
            raise ValueError("processing_class is missing: pass the model's processor, or its tokenizer")
        if kwargs.pop("data_collator", None) is not None:
            raise ValueError("data_collator is not taken: RewardTrainer makes a yojo.Collator from the processor")
        if getattr(args.deepspeed_plugin, "zero_stage", None) == 3:
            raise ValueError(
                "DeepSpeed ZeRO-3 is not supported: the patch needs whole weights, and a process whose row holds no image "
                "would not take part in gathering the vision tower's. FSDP2 shards weights, too "
                "(examples/accelerate/fsdp2.yaml), and ZeRO-2 all but the weights"
            )
        if args.n_gpu > 1:
            logger.warning(
                "%d GPUs are visible to one process, which uses the first alone: torchrun --nproc-per-node %d uses all",
                args.n_gpu,
                args.n_gpu,
            )
            args._n_gpu = 1  # or the Trainer would wrap the model in DataParallel, which cannot share out packed rows
        # A model that is patched already refuses options that contradict its own.
        model = _adapted(patch(model, processing_class, **args.yojo_options()), args, peft_config)
        base = unwrap(model)
        refuse_own_base(model, args.output_dir)
        self.collator = Collator(processing_class, model, args.max_length)
        self.estimate = CostEstimate(self.collator, base)
        self.provenance = dict(provenance or {})
        self._window, self._skipped, self._unusable = [], {}, 0
        self._on_cpu = None
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else (eval_dataset,))):
            _check_dataset(dataset)
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        # `compute_loss` divides by the samples of all rows, accumulated ones among them. Some models say they cannot.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        if self.is_fsdp_enabled:
            sharding.set_up(self.accelerator, base)
        self.add_callback(_LogBeforeSaving)

    # ---- data ----

    def get_train_dataloader(self):
        """Loader of the global batches of an epoch, this process's share of each packed into rows."""
        if self.train_dataset is None:
            raise ValueError("training needs a train_dataset")
        args = self.args
        batch_size = self._train_batch_size * self._world
        batches = GlobalBatches(
            self.train_dataset, batch_size, seed=args.order_seed, drop_last=args.dataloader_drop_last
        )
        if not len(batches):
            raise ValueError(
                f"dataloader_drop_last leaves nothing of {len(self.train_dataset)} examples in batches of {batch_size}"
            )
        return self._loader(
            self.train_dataset,
            batches,
            max_responses=args.max_responses,
        )

    def get_eval_dataloader(self, eval_dataset=None):
        """Loader of an evaluation set, in its own order; responses stand in one order drawn for good."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("evaluation needs an eval_dataset")
        _check_dataset(dataset)
        batches = GlobalBatches(dataset, self.args.eval_batch_size * self._world, shuffle=False)
        return self._loader(dataset, batches, need_rankings=False)

    def get_test_dataloader(self, test_dataset):
        """As `get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def _loader(self, dataset, batches, max_responses=None, need_rankings=True):
        args = self.args
        drawn = Drawn(
            dataset,
            seed=args.order_seed,
            shuffle_responses=args.shuffle_responses,
            max_responses=max_responses,
        )
        rows = RowCollator(
            self.collator,
            self.estimate,
            rank=self.args.process_index,
            world=self._world,
            row_tokens=args.row_tokens,
            skip_bad=args.skip_bad,
            need_rankings=need_rankings,
        )
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        self.collator.tables.look(precision)  # workers have no model to ask
        workers = {}
        if args.dataloader_num_workers:
            workers = {
                "prefetch_factor": args.dataloader_prefetch_factor,
                "persistent_workers": args.dataloader_persistent_workers,
                "multiprocessing_context": getattr(args, "dataloader_multiprocessing_context", None),
            }
        return RowLoader(
            drawn,
            batch_sampler=batches,
            collate_fn=rows,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and torch.cuda.is_available(),
            **workers,
        )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As transformers' Trainer; `skipped.jsonl` begins anew, or is what the resumed run has skipped so far."""
        listed = Path(self.args.output_dir, SKIPPED_FILE)
        if not resume_from_checkpoint:
            if self.is_world_process_zero():
                listed.unlink(missing_ok=True)
            self._skipped = {}
        elif listed.is_file():
            self._skipped = _read_skipped(listed) | self._skipped
        self.accelerator.wait_for_everyone()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @property
    def skipped(self):
        """dict: why an example was left out -> its place in the data set, of those that this process knows of."""
        return self._skipped

    @property
    def _world(self):
        return self.args.world_size

    # ---- one step ----

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of one optimizer step, and how many samples they hold over all processes."""
        batches = []
        for _ in range(num_batches):
            batch = next(epoch_iterator, None)
            if batch is None:
                break
            batches.append(batch)
        samples = self._agree(batches)
        self._check_usable(sum(batch["drawn"] for batch in batches), samples)
        # Gradients are exchanged behind the last batch of a step, which must therefore have some.
        batches.sort(key=lambda batch: batch["passes"] > 0)
        return batches, samples

    def _check_usable(self, drawn, samples):
        self._unusable = 0 if samples else self._unusable + drawn
        if self._unusable >= len(self.train_dataset):
            raise ValueError(
                f"none of the last {self._unusable} examples can be used; one of them: {next(iter(self._skipped), 'unknown')}"
            )

    def _agree(self, batches):
        """Let all processes know how many rows each batch has at most, and return how many samples there are in all."""
        for batch in batches:
            if "error" in batch:
                raise ValueError(f"{batch['error']} (skip_bad leaves out what cannot be used, and lists it)")
        counts = torch.tensor([[len(batch["rows"]), batch["samples"]] for batch in batches]).view(-1, 2)
        most, samples = counts[:, 0], counts[:, 1]
        if self._world > 1:
            gathered = torch.stack(self._all_of([counts]))
            most, samples = gathered[..., 0].amax(0), gathered[..., 1].sum(0)
        for batch, passes in zip(batches, most.tolist(), strict=True):
            batch["passes"] = passes
            for index, reason in batch.pop("skipped"):
                self._skip(index, reason)
        return int(samples.sum())

    def _skip(self, index, reason):
        if reason in self._skipped:
            return
        self._skipped[reason] = index
        logger.warning("skipped (%d so far): %s", len(self._skipped), reason)
        folder = Path(self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / SKIPPED_FILE, "a") as file:
            half = "\n" if file.tell() and not (folder / SKIPPED_FILE).read_bytes().endswith(b"\n") else ""
            file.write(f"{half}{json.dumps({'index': index, 'reason': reason})}\n")

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of every row of this process's share, one after the other.

        Returns:
            scalar: this process's part of the loss, times the number of processes, so that their mean is the loss.
        """
        total, rows, passes = None, inputs["rows"], inputs["passes"]
        if not passes:  # every example of the batch was skipped, by all processes
            return torch.zeros((), device=self.args.device)
        last_of_step = self.accelerator.sync_gradients
        for n in range(passes):
            self._counts = n < len(rows) and inputs["samples"] > 0
            row = rows[min(n, len(rows) - 1)]
            with self._until_last(model, n == passes - 1):
                loss = super().training_step(model, row, num_items_in_batch)
            total = loss if total is None else total + loss
        self.accelerator.gradient_state._set_sync_gradients(last_of_step)
        return total

    @contextlib.contextmanager
    def _until_last(self, model, last):
        """Gradients of all rows but the last one are not exchanged yet; DeepSpeed must not step behind them either."""
        if last:
            yield
            return
        state = self.accelerator.gradient_state
        synchronised = state.sync_gradients
        state._set_sync_gradients(False)
        # FSDP would keep whole gradients meanwhile, which is what people shard them against.
        plain = self.is_fsdp_enabled or self.is_deepspeed_enabled
        try:
            with contextlib.nullcontext() if plain else self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(synchronised)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss of one packed row, as its part of the mean over the samples of the whole batch."""
        output = model(**inputs, num_items_in_batch=num_items_in_batch)
        loss = output.loss
        if self.args.center_scores:
            centre = center_penalty(output.scores)
            samples = output.scores.shape[0] if num_items_in_batch is None else num_items_in_batch
            loss = loss + self.args.center_scores * centre.sum() / samples
        if num_items_in_batch is not None:
            # Processes average their gradients, and num_items_in_batch counts the samples of all of them.
            loss = loss * self._world
        if not self._counts:
            loss = loss * 0.0
        elif model.training:
            self._window.append((output.scores.detach(), inputs["rankings"]))
        return (loss, output) if return_outputs else loss

    def floating_point_ops(self, inputs):
        """FLOPs of a training step over a batch: forward, backward at twice its price, recomputation if any."""
        if not all("layout" in row for row in inputs.get("rows", ())):
            return 0
        passes = 4 if self._recomputes else 3
        return passes * sum(batch_flops(self.model, row).total for row in inputs["rows"])

    @property
    def _recomputes(self):
        return bool(getattr(self.args, "activation_checkpointing", None) or self.args.gradient_checkpointing)

    def create_optimizer(self, model=None):
        """As transformers' Trainer makes it; the value head's weights in a group of their own where they have their rate."""
        made = self.optimizer is None
        if self.is_fsdp_enabled:
            sharding.shard_ends(self.accelerator, unwrap(self.model), self.optimizer)
        optimizer = super().create_optimizer(model) if model is not None else super().create_optimizer()
        rate = self.args.head_learning_rate
        if made and rate is not None:
            named = (self.model if model is None else model).named_parameters()
            head = {id(p) for name, p in named if ".score." in f".{name}" and not name.endswith("separator_delta")}
            groups = []
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in head]
                group["params"] = [p for p in group["params"] if id(p) not in head]
                if own:
                    groups.append({**group, "params": own, "lr": rate})
            for group in groups:
                optimizer.add_param_group(group)
        if self.is_fsdp_enabled:
            self._optimized = sharding.names_of(optimizer, self.model)
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        """As transformers' Trainer, which calls it as soon as accelerate has prepared model and optimizer."""
        if self.is_fsdp_enabled:
            sharding.rebind(self.optimizer, self.model, self._optimized)
        return super().create_scheduler(*args, **kwargs)

    # ---- metrics ----

    def log(self, logs, start_time=None):
        """As transformers' Trainer, with the ranking metrics of the samples trained on since the last line."""
        if "loss" in logs:
            window, self._window = self._window, []
            samples = self._all_of([self._sample(s, r) for pair in window for s, r in _split(*pair)])
            logs.update(ranking_metrics(samples))
            for some in self._all_of([self._skipped]):  # each process knows its own share's alone until now
                self._skipped = some | self._skipped
            if self._skipped:
                logs["skipped"] = float(len(self._skipped))
        super().log(logs, start_time)

    def _sample(self, scores, rankings):
        return scores, [-target for target in rankings] if self.collator.config.loss == "soft" else rankings

    def _all_of(self, items):
        """The items of all processes' lists."""
        if self._world == 1:
            return items
        if self._on_cpu is None:  # over the device, each exchange would wait until all it was given before is done
            self._on_cpu = torch.distributed.new_group(backend="gloo")
        gathered = [None] * self._world
        torch.distributed.all_gather_object(gathered, items, group=self._on_cpu)
        return [item for some in gathered for item in some]

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ):
        """Score a data set, as many rows at a time as memory allows, on all processes.

        Returns:
            `EvalLoopOutput`: predictions [S, Nmax] float32, the scores in the data set's own order of examples and
            responses, -inf where there is none; label_ids [S, Nmax], the rankings, -1 where there is none (or None); the
            metrics of `yojo.evaluation.metrics.ranking_metrics` and the loss, under the prefix.
        """
        model, precision = self._eval_model()
        model.eval()
        self.callback_handler.eval_dataloader = dataloader
        found, loss, counted = [], 0.0, 0
        for batch in dataloader:
            self._agree([batch])
            for n in range(batch["passes"]):
                at = min(n, len(batch["rows"]) - 1)
                row = self._prepare_inputs(batch["rows"][at])
                with torch.no_grad(), self.compute_loss_context_manager(), precision():
                    output = model(**row)
                if n >= len(batch["rows"]) or not batch["samples"]:
                    continue
                rankings = row.get("rankings")
                scores = output.scores.float().cpu().tolist()
                ranks = [None] * len(scores) if rankings is None else rankings.cpu().tolist()
                if output.loss is not None:
                    loss += float(output.loss) * len(scores)
                    counted += len(scores)
                found += zip(batch["indices"][at], batch["orders"][at], scores, ranks, strict=True)
            self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        if self.is_fsdp_enabled:
            sharding.free(model)
        found = sorted(self._all_of(found))
        if not found:
            raise ValueError(f"none of the examples can be used; one of them: {next(iter(self._skipped), 'unknown')}")
        metrics = {}
        totals = np.sum(self._all_of([(loss, counted)]), axis=0)
        if totals[1]:
            metrics["loss"] = float(totals[0] / totals[1])
        samples = [
            self._sample(scores[: len(order)], ranks[: len(order)]) for _, order, scores, ranks in found if ranks
        ]
        metrics.update(ranking_metrics(samples))
        scores, labels = _tables(found)
        if self.compute_metrics is not None and labels is not None:
            metrics.update(self.compute_metrics(EvalPrediction(predictions=scores, label_ids=labels)))
        metrics = {
            name if name.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{name}": value
            for name, value in metrics.items()
        }
        return EvalLoopOutput(predictions=scores, label_ids=labels, metrics=metrics, num_samples=len(found))

    def _eval_model(self):
        """(model, function that makes a context for its passes)."""
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # Not prepared for evaluation by accelerate, which would then take it for prepared for training, too.
            return self._wrap_model(self.model, training=False), self.accelerator.autocast
        if self.is_deepspeed_enabled and self.deepspeed is None:
            from transformers.integrations.deepspeed import deepspeed_init

            deepspeed_init(self, num_training_steps=0, inference=True)
        model = self._wrap_model(self.model, training=False)
        if not self.accelerator._models and model is self.model:
            if self.is_deepspeed_enabled:
                self.deepspeed = self.model_wrapped = model = self.accelerator.prepare(model)
            else:  # which accelerate does not prepare without an optimizer
                model, self.optimizer = self.accelerator.prepare(model, self.create_optimizer())
                sharding.rebind(self.optimizer, model, self._optimized)
                self.model = self.model_wrapped = model
        return model, contextlib.nullcontext


def _adapted(model, args, peft_config):
    if hasattr(model, "peft_config"):
        if peft_config is not None:
            raise ValueError("peft_config is given, but the model has an adapter already")
        adapters.check_existing(model, args)
        return model
    if peft_config is None and args.tune == "lora":
        targets = args.lora_targets
        if targets is not None and targets.replace(",", "").replace("_", "").isalnum():
            targets = targets.split(",")
        peft_config = adapters.lora_config(
            model, r=args.lora_r, alpha=args.lora_alpha, dropout=args.lora_dropout, targets=targets
        )
    if peft_config is not None:
        from peft import get_peft_model

        adapters.check_config(peft_config)
        return get_peft_model(model, peft_config)
    if args.tune is not None:
        adapters.choose_trained(model, args.tune)
    return model


class _LogBeforeSaving(TrainerCallback):
    """A line of the log ends where a checkpoint is, so that a resumed run's lines are those of an uninterrupted one."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or control.should_save
        return control

    on_epoch_end = on_step_end


def center_penalty(scores):
    """[S]: the square of each sample's mean score; scores [S, Nmax] with -inf where there is no response."""
    there = scores.isfinite()
    mean = torch.where(there, scores, 0.0).sum(dim=1) / there.sum(dim=1)
    return mean.square()


def _read_skipped(file):
    """dict reason -> index of a skipped.jsonl, whose last line may be half written by a run that was killed."""
    found = {}
    for line in file.read_text().splitlines():
        try:
            line = json.loads(line)
        except ValueError:
            continue
        found[line["reason"]] = line["index"]
    return found


def _split(scores, rankings):
    """One (scores, rankings) pair of lists per sample of a row; rankings tell nothing where there is no response."""
    for values, ranks in zip(scores.float().cpu().tolist(), rankings.cpu().tolist(), strict=True):
        count = sum(not math.isinf(value) or value > 0 for value in values)
        yield values[:count], ranks[:count]


def _tables(found):
    """([S, Nmax] scores, [S, Nmax] rankings or None) in the order of the data set, from what was found in drawn orders."""
    width = max((len(order) for _, order, _, _ in found), default=0)
    scores = np.full((len(found), width), -np.inf, dtype=np.float32)
    ranked = bool(found) and all(ranks is not None for *_, ranks in found)
    labels = np.full((len(found), width), -1, dtype=np.float32) if ranked else None
    for line, (_, order, values, ranks) in enumerate(found):
        for place, n in enumerate(order):
            scores[line, n] = values[place]
            if ranked:
                labels[line, n] = ranks[place]
    return scores, labels


def _check_dataset(dataset):
    if dataset is None:
        return
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"a data set must have a length and be indexed by place, got {type(dataset).__name__}: a list of "
            "yojo.Example, or what yojo.data.load returns"
        )
    if len(dataset) == 0:
        raise ValueError("the data set is empty")
