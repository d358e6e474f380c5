"""`yojo train`: options from files and flags, what it refuses, and a whole run on digits."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import yojo
from yojo.cli import app
from yojo.training import recipe
from yojo.training.recipe import parse

EXAMPLES = Path(__file__).parents[2] / "examples"


def config(folder, **options):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "train_data": ["a.jsonl"], "output_dir": "out", **options}))
    return str(path)


def test_flags_go_before_the_file(tmp_path):
    path = config(tmp_path, learning_rate="3e-5", lora_r=8, mode="isolated", train_data=["a.jsonl", "b.jsonl"])
    run, arguments, _ = parse(["--config", path, "--lora-r", "16", "--logging_steps=3", "--train_data", "c.jsonl"])
    assert (arguments.lora_r, arguments.logging_steps, run.train_data) == (16, 3, ["c.jsonl"])
    assert arguments.learning_rate == 3e-5 and arguments.yojo_options() == {"mode": "isolated"}


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ntrain_data: a.jsonl\noutput_dir: out\nlearning_rate: 1e-4\nbf16: false\n")
    run, arguments, _ = parse(["--config", str(path)])
    assert arguments.learning_rate == 1e-4 and arguments.bf16 is False and run.train_data == ["a.jsonl"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"learning_rte": 1}, "unknown option 'learning_rte' in the configuration file; did you mean learning_rate"),
        ({"learning_rate": "fast"}, "learning-rate: invalid float value: 'fast'"),
        ({"tune": "everything"}, "tune must be one of lora, full, head or None, got 'everything'"),
        ({"mode": "sideways"}, "mode must be one of comparative, isolated, got 'sideways'"),
        ({"row_tokens": 0}, "row_tokens must be at least 1, got 0"),
        ({"max_responses": 1}, "max_responses must be at least 2, got 1"),
        ({"center_scores": -1}, "center_scores must not be negative"),
        ({"quantize": "3bit"}, "quantize must be one of 4bit, 8bit, got '3bit'"),
        ({"dtype": "int8"}, "dtype must be one of bfloat16, float16, float32, got 'int8'"),
        ({"eval_fraction": 1.0}, "eval_fraction must be at least 0 and less than 1"),
        ({"eval_fraction": 0.1, "eval_data": ["b.jsonl"]}, "eval_data and eval_fraction are both given"),
        ({"train_weights": [1, 2]}, "2 train_weights for 1 train_data files"),
        ({"global_batch_size": 10, "gradient_accumulation_steps": 4}, "global_batch_size 10 cannot be shared by"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
    ],
)
def test_what_is_wrong_with_an_option_is_said(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        parse(["--config", config(tmp_path, **options)])


def test_unknown_flags_and_files_are_errors(tmp_path):
    with pytest.raises(ValueError, match="unknown option --lora_rank"):
        parse(["--config", config(tmp_path), "--lora_rank", "8"])
    with pytest.raises(ValueError, match="no such configuration file: nowhere.yaml"):
        parse(["--config", "nowhere.yaml"])
    with pytest.raises(ValueError, match="--config needs a file"):
        parse(["--config"])
    (tmp_path / "list.yaml").write_text("- a\n")
    with pytest.raises(ValueError, match="must hold options as `name: value` lines, got list"):
        parse(["--config", str(tmp_path / "list.yaml")])
    (tmp_path / "broken.yaml").write_text("a: [1\n")
    with pytest.raises(ValueError, match="broken.yaml is not YAML"):
        parse(["--config", str(tmp_path / "broken.yaml")])
    with pytest.raises(ValueError, match="required: --model, --train_data"):
        parse(["--lora_r", "8"])


def test_the_column_map_is_checked(tmp_path):
    run, *_ = parse(["--config", config(tmp_path, columns={"prompt": "question", "rankings": "meta.ranks"})])
    assert run.column_map() == {"prompt": "question", "rankings": "meta.ranks"}
    run, *_ = parse(["--config", config(tmp_path, columns="prompt:question")])
    with pytest.raises(ValueError, match="columns must be field=column pairs"):
        run.column_map()


def test_the_global_batch_is_shared_out(tmp_path, monkeypatch):
    path = config(tmp_path, global_batch_size=64, gradient_accumulation_steps=2, use_cpu=True)
    assert parse(["--config", path])[1].per_device_train_batch_size == 32


def checkpoints(arguments):
    """Whether layers are computed again in backward; transformers has changed the name."""
    name = "activation_checkpointing" if hasattr(arguments, "activation_checkpointing") else "gradient_checkpointing"
    return getattr(arguments, name)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_example_files_are_read(path):
    run, arguments, _ = parse(["--config", str(path), "--use_cpu", "true", "--bf16", "false"])
    assert run.model and arguments.output_dir
    if path.stem != "digits":  # the paper's recipe, as released
        paper = {"lora_r": 128, "lora_alpha": 16, "lora_dropout": 0.05, "learning_rate": 1e-4, "num_train_epochs": 3}
        assert {name: getattr(arguments, name) for name in paper} == paper
        assert arguments.global_batch_size == 64 and arguments.max_length == 24576
        assert arguments.yojo_options()["pooling"] == "last" and checkpoints(arguments)


def test_a_reward_model_on_the_hub_is_found(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(name, file):
        if name == "someone/reward-model":
            return str(tmp_path / file)
        raise LocalEntryNotFoundError("no such file")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert recipe._is_reward_model("someone/reward-model") and not recipe._is_reward_model("someone/backbone")
    assert not recipe._is_reward_model(str(tmp_path))
    (tmp_path / "yojo_config.json").write_text("{}")
    assert recipe._is_reward_model(str(tmp_path))


def test_held_out_examples_are_not_trained_on():
    class Data(list):
        pass

    kept, held = recipe._hold_out([Data(range(10)), Data(range(100, 130))], 0.2, seed=0)
    trained = [item for part in kept for item in (part[n] for n in range(len(part)))]
    evaluated = [held[n] for n in range(len(held))]
    assert sorted(trained + evaluated) == [*range(10), *range(100, 130)] and len(evaluated) == 8
    assert recipe._hold_out([Data(range(10))], 0.2, seed=1)[1].places != held.datasets[0].places
    with pytest.raises(ValueError, match="leaves nothing to train on of 1 examples"):
        recipe._hold_out([Data([1])], 0.5, seed=0)


def run(folder, *arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, "-m", "yojo.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)


# 99.2 % in the demonstration; 360 images, one is 0.3 %. A few steps learn nothing, and leave everything that a run leaves.
@pytest.mark.parametrize("steps, least", [(4, 0.0), pytest.param(450, 0.97, marks=pytest.mark.soak)])
def test_digits_are_learned_from_files_as_the_demonstration_learns_them(tmp_path, monkeypatch, steps, least):
    monkeypatch.chdir(tmp_path)
    made = CliRunner().invoke(app, ["demo", "--data", "digits"])
    assert made.exit_code == 0 and "digits/train.jsonl: 4311 records" in made.stdout
    backbone = EXAMPLES.parent / "yojo" / "demo" / "backbone"
    trained = run(tmp_path, "train", "--config", EXAMPLES / "digits.yaml", "--model", backbone, "--max_steps", steps)
    assert trained.returncode == 0, trained.stderr[-2000:]
    assert "4,311 examples to train on, 360 to evaluate on" in trained.stderr  # what was set is shown
    folder = tmp_path / "digits" / "reward-model"
    state = json.loads((folder / "trainer_state.json").read_text())
    (*_, last) = [line for line in state["log_history"] if "eval_best_of_n" in line]
    assert last["step"] == steps and last["eval_best_of_n"] >= least
    assert (folder / "training.png").stat().st_size > 20_000
    card = (folder / "README.md").read_text()
    assert f"eval_best_of_n | {last['eval_best_of_n']}" in card and "train.jsonl" in card and "seed" in card
    record = json.loads((tmp_path / "digits" / "held_out.jsonl").read_text().splitlines()[0])
    responses = [word for response in record["responses"] for word in ("--response", response)]
    image = Path("digits") / record["image"]
    command = ["score", image, "--model", folder, "--prompt", record["prompt"], *responses, "--json"]
    scored = run(tmp_path, *command)
    assert scored.returncode == 0, scored.stderr[-2000:]
    scores = [line["score"] for line in json.loads(scored.stdout)["scores"]]
    assert not least or record["rankings"][scores.index(max(scores))] == 1


def test_mistakes_are_one_line_and_exit_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, message in (
        ((), "nothing to train: yojo train --config FILE.yaml"),
        (("--config", "no.yaml"), "error: no such configuration file: no.yaml"),
        (("--model", "m", "--train_data", "no.jsonl", "--output_dir", "o", "--use_cpu", "true"), "no.jsonl"),
    ):
        done = CliRunner().invoke(app, ["train", *arguments])
        assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert "--global_batch_size" in CliRunner().invoke(app, ["train", "--help"]).stdout


def test_flags_and_files_as_people_write_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ntrain_data: a.jsonl\noutput_dir: out\nsave_strategy: no\n")
    _, arguments, _ = parse([f"--config={path}", "--gradient_checkpointing", "--skip_bad", "--use_cpu"])
    assert arguments.save_strategy == "no" and checkpoints(arguments) and arguments.skip_bad
    _, arguments, _ = parse(["--config", str(path), "--gradient_checkpointing", "false", "--use_cpu", "--bf16"])
    assert checkpoints(arguments) is False and arguments.bf16
    with pytest.raises(ValueError, match="--config is given twice"):
        parse(["--config", str(path), f"--config={path}"])


def test_a_run_is_repeated_from_its_own_record(tmp_path):
    _, first, chosen = parse(["--config", config(tmp_path, lora_r=8), "--lora_alpha", "4", "--lora_r", "16"])
    recipe._record(tmp_path / "out", chosen)
    _, again, _ = parse(["--config", str(tmp_path / "out" / "run.json"), "--seed", "7"])
    assert (again.lora_r, again.lora_alpha, again.seed) == (16, 4, 7)
    assert first.lora_r == 16


def small(folder, data, *flags):
    options = ("--dataloader_num_workers", "0", "--use_cpu", "--max_steps", "1", "--plots", "false")
    options += ("--save_strategy", "no", "--train_data", str(data), "--output_dir", str(folder))
    return recipe.train([*options, *flags])


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    record = {"prompt": "Which digit is shown?", "responses": ["It is a 7.", "A two."], "rankings": [1, 2]}
    path.write_text("".join(json.dumps(record) + "\n" for _ in range(8)))
    return path


BACKBONE = Path(recipe.__file__).parents[1] / "demo" / "backbone"


def test_going_on_from_an_adapter_trains_that_adapter_or_says_why_not(tmp_path, texts):
    small(tmp_path / "a", texts, "--model", str(BACKBONE), "--lora_r", "4")
    saved = ("--model", str(tmp_path / "a"))
    trainer = small(tmp_path / "b", texts, *saved)
    assert trainer.model.peft_config["default"].r == 4
    for flags, message in (
        (("--tune", "full"), "the model has an adapter, and tune='full' would not train it"),
        (("--tune", "head"), "the model has an adapter, and tune='head' would not train it"),
        (("--lora_r", "8"), "lora_r is 8, but the model has an adapter already, with 4"),
        (("--lora_targets", "q_proj"), "lora_targets is given, but the model has an adapter already"),
        (("--loss", "plackett_luce"), "was saved with loss='best': it cannot be trained further with"),
    ):
        with pytest.raises(ValueError, match=message):
            small(tmp_path / "c", texts, *saved, *flags)


def test_an_adapter_does_not_replace_its_own_base_model(tmp_path, texts):
    small(tmp_path / "a", texts, "--model", str(BACKBONE), "--tune", "full")
    before = sorted(file.name for file in (tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="holds the base model of this adapter, and saving the adapter there"):
        small(tmp_path / "a", texts, "--model", str(tmp_path / "a"))
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == before
    small(tmp_path / "a", texts, "--model", str(tmp_path / "a"), "--tune", "full")
    trainer = small(tmp_path / "b", texts, "--model", str(tmp_path / "a"))
    with pytest.raises(ValueError, match="holds the base model of this adapter"):
        yojo.RewardModel(trainer.model, trainer.processing_class).save_pretrained(tmp_path / "a")


def test_an_adapter_whose_base_model_is_gone(tmp_path, texts, monkeypatch):
    monkeypatch.chdir(BACKBONE.parent)
    small(tmp_path / "a", texts, "--model", "backbone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="is an adapter of the base model backbone, which is no folder here"):
        yojo.RewardModel.from_pretrained(tmp_path / "a")


def test_options_that_leave_nothing_to_train(tmp_path, texts):
    with pytest.raises(ValueError, match="dataloader_drop_last leaves nothing of 8 examples in batches of 16"):
        small(
            tmp_path, texts, "--model", str(BACKBONE), "--dataloader_drop_last", "--per_device_train_batch_size", "16"
        )
    with pytest.raises(ValueError, match=r"tune must be lora \(QLoRA\), got head"):
        small(tmp_path, texts, "--model", str(BACKBONE), "--quantize", "4bit", "--tune", "head")
