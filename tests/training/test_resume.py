"""Checkpoints of a run: whole or not there, and resumed to the bit."""

import copy
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from typer.testing import CliRunner

import yojo
from yojo.cli import app
from yojo.demo import digits
from yojo.demo.backbone import BACKBONE
from yojo.demo.reward import make_examples, write_files
from yojo.training import resume
from yojo.training.arguments import RewardTrainingArguments
from yojo.training.trainer import RewardTrainer


@pytest.fixture(scope="module")
def data():
    train, held_out = digits.load_digits_split()
    return make_examples(train, 24, seed=0), make_examples(held_out, 8, seed=1)


@pytest.fixture()
def make_trainer(backbone, data, tmp_path):
    """Function options -> `RewardTrainer` of 6 steps, two in an epoch and a half, a checkpoint every 2."""

    def make(folder="run", **options):
        model, processor = copy.deepcopy(backbone)
        model.config.name_or_path = str(BACKBONE)
        defaults = {
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "save_steps": 2,
            "dataloader_num_workers": 0,
            "lora_r": 4,
            "lora_dropout": 0.1,
            "row_tokens": 120,
            "disable_tqdm": True,
            "use_cpu": True,
        }
        arguments = RewardTrainingArguments(output_dir=str(tmp_path / folder), **(defaults | options))
        torch.manual_seed(arguments.seed)
        return RewardTrainer(model, arguments, *data, processing_class=processor)

    return make


def lines(trainer):
    """What the log says of every step, without times."""
    return [
        {name: value for name, value in line.items() if not name.endswith(("runtime", "per_second"))}
        for line in trainer.state.log_history
        if "loss" in line or "eval_loss" in line
    ]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "options, steps",
    [
        ({}, (2, 4)),
        ({"tune": "full", "mode": "isolated", "loss": "bradley_terry"}, (4,)),
        ({"eval_strategy": "steps", "eval_steps": 3}, (4,)),
    ],
    ids=["lora", "full", "with evaluation"],
)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(make_trainer, tmp_path, options, steps):
    whole = make_trainer("whole", **options)
    whole.train()
    for step in steps:
        resumed = make_trainer("whole", **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert lines(resumed) == lines(whole) and len(lines(whole)) >= 6
        got, expected = weights(resumed), weights(whole)
        assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def test_logged_means_end_at_checkpoints(make_trainer, tmp_path):
    """Saving between two lines of the log ends one, or a resumed run's next line would be a mean over other steps."""
    whole = make_trainer("whole", logging_steps=4)
    whole.train()
    assert [line["step"] for line in lines(whole)] == [2, 4, 6]
    resumed = make_trainer("whole", logging_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert lines(resumed) == lines(whole)


def test_every_checkpoint_is_a_reward_model(make_trainer, tmp_path, data):
    trainer = make_trainer()
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-6"
    loaded = yojo.RewardModel.from_pretrained(folder)
    expected = yojo.RewardModel(trainer.model, trainer.processing_class).score_many(data[1])
    assert all(map(torch.equal, loaded.score_many(data[1]), expected))
    known = loaded.check_known_scores(folder)
    assert known.stored and known.ok
    assert not (tmp_path / "run" / resume.STAGING).exists()


def test_a_full_disk_leaves_the_last_checkpoint(make_trainer, tmp_path, monkeypatch):
    whole = make_trainer("whole")
    whole.train()
    trainer = make_trainer()
    write = torch.save

    def save(what, file, *args, **kwargs):
        if "checkpoint-4" in str(file):
            with open(file, "wb") as half:
                half.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device", str(file))
        return write(what, file, *args, **kwargs)

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left on device"):
        trainer.train()
    monkeypatch.undo()
    assert [folder.name for folder in resume.checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert not (tmp_path / "run" / resume.STAGING).exists()
    again = make_trainer()
    again.train(resume_from_checkpoint=True)
    assert lines(again) == lines(whole)


def test_processes_meet_around_what_one_of_them_does_to_folders(make_trainer, tmp_path, monkeypatch):
    """Before anyone writes, before the checkpoint is moved to its place, and behind that."""
    trainer = make_trainer(max_steps=2)
    run, seen = tmp_path / "run", []
    staging = run / resume.STAGING
    staging.mkdir(parents=True)
    (staging / "of a run that was killed").touch()
    save = trainer._save_checkpoint

    def saved(*arguments):
        folders = staging, staging / "checkpoint-2" / "score_head.safetensors", run / "checkpoint-2"
        with monkeypatch.context() as patch:
            patch.setattr(
                trainer.accelerator, "wait_for_everyone", lambda: seen.append([path.exists() for path in folders])
            )
            save(*arguments)

    monkeypatch.setattr(trainer, "_save_checkpoint", saved)
    trainer.train()
    meetings = [state for n, state in enumerate(seen) if not n or state != seen[n - 1]]
    assert meetings == [[False, False, False], [True, True, False], [False, False, True]]


def test_old_checkpoints_go_and_the_best_one_stays(make_trainer, tmp_path, data):
    trainer = make_trainer(
        save_total_limit=2,
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # so that the first one is
    )
    trainer.train()
    best = tmp_path / "run" / "checkpoint-1"
    losses = [line["eval_loss"] for line in lines(trainer) if "eval_loss" in line]
    assert losses[0] == max(losses) > losses[-1]
    assert [folder.name for folder in resume.checkpoints(tmp_path / "run")] == ["checkpoint-1", "checkpoint-6"]
    assert trainer.state.best_model_checkpoint == str(best)
    state = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    expected = yojo.RewardModel.from_pretrained(best).score_many(data[1])
    assert all(
        map(torch.equal, yojo.RewardModel(trainer.model, trainer.processing_class).score_many(data[1]), expected)
    )


def test_another_run_is_refused(make_trainer, tmp_path):
    make_trainer("run", max_steps=2).train()
    folder = str(tmp_path / "run" / "checkpoint-2")
    for options, message in (
        ({"seed": 7}, "seed 42, now 7; data_seed 42, now 7"),
        ({"per_device_train_batch_size": 2}, "global_batch_size 8, now 4"),
        ({"optim": "sgd"}, "optim 'adamw_torch_fused', now 'sgd'"),
        ({"max_responses": 2}, "max_responses None, now 2"),
        ({"head_learning_rate": 1e-2}, "head_learning_rate False, now True"),
        ({"learning_rate": 5e-3}, "learning_rate 0.001, now 0.005"),  # which the optimizer read back would not take
        ({"weight_decay": 0.1}, "weight_decay 0.0, now 0.1"),
    ):
        with pytest.raises(ValueError, match=f"cannot be resumed with other settings than it was made with: {message}"):
            make_trainer("run", **options).train(resume_from_checkpoint=folder)
    # Rows, workers and how the batch is accumulated may change: the samples of a step do not.
    make_trainer("run", per_device_train_batch_size=8, gradient_accumulation_steps=1, row_tokens=60).train(
        resume_from_checkpoint=folder
    )


def test_what_may_change_is_said(make_trainer, tmp_path, caplog):
    make_trainer("run", max_steps=2).train()
    folder = str(tmp_path / "run" / "checkpoint-2")
    again = make_trainer("run", max_steps=2, center_scores=0.5, lora_dropout=0.2, lr_scheduler_type="cosine")
    with caplog.at_level("WARNING", logger="yojo.training.resume"):
        again.train(resume_from_checkpoint=folder)
    assert "center_scores 0.0, now 0.5" in caplog.text and "lora_dropout 0.1, now 0.2" in caplog.text
    assert "lr_scheduler_type 'linear', now 'cosine'" in caplog.text
    with pytest.raises(ValueError, match="saved with another adapter than .*lora_alpha 16, now 32"):
        make_trainer("run", max_steps=2, lora_alpha=32).train(resume_from_checkpoint=folder)


def test_norms_trained_beside_an_adapter_are_resumed(make_trainer, tmp_path):
    def unfrozen(**options):
        trainer = make_trainer("run", **options)
        for name, parameter in trainer.model.named_parameters():
            if "language_model.layers.0.input_layernorm" in name:
                parameter.requires_grad_(True)
        return trainer

    first = unfrozen(max_steps=2)
    before = weights(first)
    first.train()
    moved = [name for name in before if "layernorm" in name and not torch.equal(before[name], weights(first)[name])]
    assert len(moved) == 1
    folder = str(tmp_path / "run" / "checkpoint-2")
    again = unfrozen(max_steps=2)
    again.train(resume_from_checkpoint=folder)
    assert all(torch.equal(weights(first)[name], weights(again)[name]) for name in before)
    with pytest.raises(ValueError, match="trained_tensors"):
        make_trainer("run", max_steps=2).train(resume_from_checkpoint=folder)


def test_weights_of_another_make_are_refused(make_trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(RewardTrainer, "_check_settings", lambda self, checkpoint: None)
    make_trainer("lora", max_steps=2).train()
    folder = tmp_path / "lora" / "checkpoint-2"
    with pytest.raises(ValueError, match="holds an adapter, the model to resume has none: tune must be what it was"):
        make_trainer("other", tune="head").train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="was saved with .*'comparative'.* the model is patched with .*'isolated'"):
        make_trainer("other", mode="isolated").train(resume_from_checkpoint=str(folder))
    with pytest.raises(ValueError, match="saved with another adapter .*target_modules"):
        make_trainer("other", lora_targets="q_proj,v_proj").train(resume_from_checkpoint=str(folder))


def test_the_hub_gets_the_head_with_every_checkpoint(make_trainer, tmp_path, monkeypatch, data):
    import transformers.trainer

    trainer = make_trainer(max_steps=2)
    uploaded = []

    class Hub:
        def upload_folder(self, folder_path, **options):
            if options.get("path_in_repo") is None:
                shutil.copytree(folder_path, tmp_path / f"hub{len(uploaded)}", dirs_exist_ok=True)
            uploaded.append(options)

            class Done:
                def done(self):
                    return True

            return Done()

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    trainer.hub_model_id, trainer.args.push_to_hub = "someone/reward-model", True
    trainer.push_in_progress = None
    trainer.train()
    assert uploaded and "step 2" in uploaded[0]["commit_message"]
    expected = yojo.RewardModel(trainer.model, trainer.processing_class).score_many(data[1])
    assert all(map(torch.equal, yojo.RewardModel.from_pretrained(tmp_path / "hub0").score_many(data[1]), expected))
    trainer.push_to_hub()
    assert (tmp_path / "hub1" / "README.md").read_text() == (tmp_path / "run" / "README.md").read_text()
    assert "# Reward model" in (tmp_path / "hub1" / "README.md").read_text()


# ---- kill -9 ----


def arguments(folder, data):
    flags = ["train", "--model", str(BACKBONE), "--train_data", str(data), "--output_dir", str(folder)]
    flags += ["--max_steps", "5", "--save_steps", "1", "--logging_steps", "1", "--use_cpu", "true", "--plots", "false"]
    flags += ["--per_device_train_batch_size", "4", "--lora_r", "4", "--dataloader_num_workers", "1"]
    return [*flags, "--disable_tqdm", "true"]


# The command, which never gets beyond the model of its third checkpoint: whoever looks late finds it in the middle.
HANGS = """
import time
from yojo.training import resume

save_pretrained = resume.save_pretrained

def save(model, folder, **options):
    save_pretrained(model, folder, **options)
    if str(folder).endswith("checkpoint-3"):
        time.sleep(600)

resume.save_pretrained = save
from yojo.cli import main
main()
"""


def start(folder, data, *flags, command=("-m", "yojo.cli")):
    return subprocess.Popen(
        [sys.executable, *command, *arguments(folder, data), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def finish(process):
    _, errors = process.communicate(timeout=900)
    assert process.returncode == 0, errors.decode()[-2000:]


def losses(folder):
    state = json.loads((folder / "trainer_state.json").read_text())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in state["log_history"] if "loss" in line]


def test_kill_9_while_a_checkpoint_is_written(tmp_path):
    write_files(tmp_path / "digits", count=16)
    data = tmp_path / "digits" / "train.jsonl"
    run = tmp_path / "killed"
    process = start(run, data, command=("-c", HANGS))
    staged = run / resume.STAGING / "checkpoint-3"
    deadline = time.monotonic() + 300
    while not staged.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert staged.exists() and process.returncode == -signal.SIGKILL  # it was killed in the middle
    found = [folder.name for folder in resume.checkpoints(run)]
    assert found == ["checkpoint-1", "checkpoint-2"]
    for name in found:
        yojo.RewardModel.from_pretrained(run / name)
    again = start(run, data, "--resume_from_checkpoint", "last")
    whole = CliRunner().invoke(app, arguments(tmp_path / "whole", data))  # on one thread, too
    finish(again)
    assert whole.exit_code == 0, (whole.output, whole.exception)
    assert losses(run) == losses(tmp_path / "whole") and len(losses(run)) == 5
    # A folder with checkpoints is not trained over.
    refused = CliRunner().invoke(app, arguments(tmp_path / "whole", data))
    assert refused.exit_code == 2
    assert "holds checkpoint-5 of another run: pass --resume_from_checkpoint" in " ".join(refused.output.split())
