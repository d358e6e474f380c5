"""Checkpoints of a training run: written aside and then given their name, read back to the bit."""

import json
import logging
import os
import shutil
from pathlib import Path

import torch
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from yojo.config import YojoConfig
from yojo.files.folders import flush, sync
from yojo.files.saved import CONFIG_FILE, HEAD_FILE, check_hashes, check_sizes, read_description, read_head
from yojo.patching import dates, fingerprints
from yojo.patching.state import patched_base, unwrap
from yojo.reward_model import RewardModel
from yojo.saving import load
from yojo.saving.parts import adapter_of, scoring_adapter
from yojo.saving.save import save_pretrained

logger = logging.getLogger(__name__)

STAGING = ".writing"  # in the output folder; never taken for a checkpoint
SETTINGS_FILE = (
    "run_settings.json"  # of a checkpoint: what a resumed run must have in common with the one it goes on from
)


class WholeCheckpoints:
    """Mixed into transformers' Trainer: a checkpoint folder exists whole or not at all, whenever the run is killed.

    A checkpoint is a reward model, as `RewardModel.save_pretrained` writes it, with the state of optimizer, scheduler and
    random number generators beside it.
    """

    _staging = None

    def _get_output_dir(self, trial):
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model, trial):
        run = Path(self._get_output_dir(trial))
        staging, name = run / STAGING, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed while it wrote
        self.accelerator.wait_for_everyone()
        push, self.args.push_to_hub = self.args.push_to_hub, False  # not from a folder that is about to move
        self._staging = staging
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)  # what is half written, or did not fit on the disk
            raise
        finally:
            self._staging, self.args.push_to_hub = None, push
        self.accelerator.wait_for_everyone()
        if self.state.best_model_checkpoint is not None:
            best = Path(self.state.best_model_checkpoint)
            if best.parent == staging:
                self.state.best_model_checkpoint = str(run / best.name)
        if self.args.should_save:
            self.state.save_to_json(str(staging / name / "trainer_state.json"))
            (staging / name / SETTINGS_FILE).write_text(
                json.dumps(self._settings() | {"free": self._free_settings()}, indent=2) + "\n"
            )
            _publish(staging / name, run / name)
            shutil.rmtree(staging, ignore_errors=True)
            _rotate(run, self.args.save_total_limit, self.state.best_model_checkpoint)
        self.accelerator.wait_for_everyone()
        if push:
            self._push_from_checkpoint(str(run / name))

    def _settings(self):
        """What decides which examples a step sees, and what its optimizer keeps."""
        args = self.args
        quantized = getattr(unwrap(self.model).config, "quantization_config", None)
        return {
            "seed": args.seed,
            "data_seed": args.order_seed,
            "examples": len(self.train_dataset),
            "global_batch_size": self._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "shuffle_responses": args.shuffle_responses,
            "max_responses": args.max_responses,
            "drop_last": args.dataloader_drop_last,
            "tune": args.tune,
            "head_learning_rate": args.head_learning_rate is not None,
            "optim": str(getattr(args.optim, "value", args.optim)),
            "quantized": quantized is not None,
            # An optimizer that is read back keeps these as they were, whatever is asked for.
            "learning_rate": args.learning_rate,
            "rate_of_the_head": args.head_learning_rate,
            "weight_decay": args.weight_decay,
            "adam": [args.adam_beta1, args.adam_beta2, args.adam_epsilon],
            "trained_tensors": sum(parameter.requires_grad for parameter in self.model.parameters()),
        }

    def _free_settings(self):
        """What a resumed run may have otherwise: it goes on with the new ones, and says so."""
        args = self.args
        names = ("num_train_epochs", "max_steps", "warmup_steps", "max_grad_norm", "center_scores", "max_length")
        free = {name: getattr(args, name) for name in (*names, "row_tokens", "skip_bad", "bf16", "fp16")}
        free["lr_scheduler_type"] = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
        if (adapter := adapter_of(self.model)) is not None:
            free["lora_dropout"] = getattr(adapter.peft_config[adapter.active_adapter], "lora_dropout", None)
        return free

    def _check_settings(self, checkpoint):
        """Refuse to go on from a checkpoint with settings that would make another run of it."""
        file = Path(checkpoint) / SETTINGS_FILE
        if not file.is_file():
            return
        saved, own = json.loads(file.read_text()), self._settings()
        free = _differing(saved.get("free", {}), self._free_settings())
        if free and self.is_world_process_zero():
            logger.warning("%s is resumed with other settings: %s", checkpoint, "; ".join(free))
        if other := _differing(saved, own):
            raise ValueError(
                f"{checkpoint} cannot be resumed with other settings than it was made with: {'; '.join(other)}. To train "
                "its weights further in another way, start from it as a model"
            )

    def _save(self, output_dir=None, state_dict=None):
        if not self.args.should_save:
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        save_pretrained(
            RewardModel(self.model, self.processing_class), folder, state_dict=state_dict, provenance=self.provenance
        )
        torch.save(self.args, Path(folder) / "training_args.bin")

    def create_model_card(self, *args, **kwargs):
        """Nothing: the card is written with the model, by `RewardModel.save_pretrained`."""

    def _push_from_checkpoint(self, checkpoint_folder):
        # The Trainer copies the files it knows into the output folder and uploads that: the head is not among them.
        if self.is_world_process_zero():
            folder = Path(checkpoint_folder)
            description = json.loads((folder / "yojo_config.json").read_text())
            for name in (*description["files"], "yojo_config.json"):
                target = Path(self.args.output_dir) / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(folder / name, target)
        # It would write the processor's files anew, other than `save_processor` does: those of the checkpoint are there.
        processor, self.processing_class = self.processing_class, None
        try:
            super()._push_from_checkpoint(checkpoint_folder)
        finally:
            self.processing_class = processor

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._check_settings(resume_from_checkpoint)
        adopt_date(self.model if model is None else model, self.processing_class, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            if (Path(resume_from_checkpoint) / CONFIG_FILE).is_file():
                check_resumable(self.model if model is None else model, resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_weights(self.model if model is None else model, resume_from_checkpoint)

    def _load_best_model(self):
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            load_weights(self.model, self.state.best_model_checkpoint)


def adopt_date(model, processor, path):
    """Let a run that goes on print the date it began with, where the chat template prints one."""
    file = Path(path) / CONFIG_FILE
    date = json.loads(file.read_text()).get("date") if file.is_file() else None
    if date is not None:
        patched_base(model, "resume").yojo.date = dates.settle(processor, date)


def _differing(saved, own):
    """Text of each setting that was saved and is another one now."""
    return [f"{name} {saved[name]!r}, now {own[name]!r}" for name in own if saved.get(name, own[name]) != own[name]]


def check_resumable(model, path):
    """A ValueError where a saved reward model is not of the same make as a live one, with what differs.

    Args:
        model: a patched model, with an adapter if the saved one has one.
        path: folder that `RewardModel.save_pretrained`, or a checkpoint of `RewardTrainer`, wrote.
    """
    path = Path(path)
    base, adapter, description = patched_base(model, "resuming"), adapter_of(model), read_description(path)
    config = YojoConfig.from_saved(description["config"])
    if config != base.yojo.config:
        raise ValueError(f"{path} was saved with {config}, the model is patched with {base.yojo.config}")
    if description["adapter"] != (adapter is not None):
        have, lacks = ("an adapter", "none") if description["adapter"] else ("a full model", "an adapter")
        raise ValueError(f"{path} holds {have}, the model to resume has {lacks}: tune must be what it was")
    check_hashes(path, description)
    if adapter is None:
        return
    _check_adapter_settings(adapter, path)
    if description.get("weights"):
        differ, _ = fingerprints.compare(description["weights"], base.yojo.weights, base.yojo.weights)
        if differ:
            raise ValueError(
                f"{path} was trained on another base model ({description['base_model']}; {len(differ)} weights differ: "
                f"{', '.join(differ[:3])}) than the one to resume ({base.config.name_or_path or 'made here'})"
            )


# Of an adapter's settings, those that its scores do not depend on.
_ADAPTER_FREE = {
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "revision",
}


def _check_adapter_settings(adapter, path):
    """The saved adapter must be of the live one's make: its weights are of the same shape with another alpha, too."""
    saved = json.loads((path / "adapter_config.json").read_text())
    own = adapter.peft_config[scoring_adapter(adapter)].to_dict()
    own = json.loads(json.dumps(own, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))
    other = []
    for name in sorted((saved.keys() & own.keys()) - _ADAPTER_FREE):
        pair = [sorted(value) if isinstance(value, list) else value for value in (saved[name], own[name])]
        if pair[0] != pair[1]:
            other.append(f"{name} {saved[name]!r}, now {own[name]!r}")
    if other:
        raise ValueError(f"{path} was saved with another adapter than the model to resume has: {'; '.join(other)}")


def load_weights(model, path):
    """Put the weights of a saved reward model into a live one of the same make: what resuming does.

    Args:
        model: a patched model, with an adapter if the saved one has one.
        path: folder that `RewardModel.save_pretrained`, or a checkpoint of `RewardTrainer`, wrote.

    Raises:
        ValueError: other settings, an adapter on one side only, weights that are missing or left over.
    """
    path = Path(path)
    base = patched_base(model, "load_weights")
    check_resumable(model, path)
    description, head = read_description(path), read_head(path)
    adapter = adapter_of(model)
    if adapter is not None:
        load.load_adapter(adapter, path)
        load.load_beside(base, path, description)
    else:
        check_sizes(path, description)
        saved = type(base).from_pretrained(path, dtype=base.dtype)
        load.check_weights(saved, path, description, path)
        missing, unknown = base.load_state_dict(saved.state_dict(), strict=False)
        missing = [name for name in missing if not name.startswith("score.")]
        if missing or unknown:
            raise ValueError(f"{path} does not fit the model: missing {missing[:5]}, unknown {unknown[:5]}")
    load.load_head(base, head, path / HEAD_FILE)


def _publish(staged, target):
    """Give a folder that is complete its name; what had the name before goes once the new one is on the disk."""
    flush(staged)
    old = staged.with_name(f"{target.name}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(staged, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def checkpoints(run):
    """The checkpoint folders of an output folder, by step."""
    found = []
    for folder in Path(run).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = folder.name.rpartition("-")[2]
        if folder.is_dir() and step.isdigit():
            found.append((int(step), folder))
    return [folder for _, folder in sorted(found)]


def _rotate(run, limit, best):
    """Delete the oldest checkpoints beyond `limit`; the best one and the newest stay."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(run)
    kept = {found[-1]} | ({Path(best)} if best is not None else set())
    for folder in found:
        if len(found) <= limit:
            break
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
            found = [other for other in found if other != folder]
