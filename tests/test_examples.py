"""The scripts in examples/ run as they are, and what they save scores; accelerate reads the configurations."""

import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import yojo
from yojo.demo import digits
from yojo.demo.backbone import BACKBONE
from yojo.demo.reward import make_examples

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def preferences(tmp_path_factory):
    """A JSONL file of eight preferences, each about an image in a file beside it."""
    folder = tmp_path_factory.mktemp("preferences")
    with open(folder / "train.jsonl", "w") as file:
        for n, example in enumerate(make_examples(digits.load_digits_split()[0], 8, seed=0)):
            example.images[0].save(folder / f"{n}.png")
            record = {
                "prompt": example.prompt,
                "responses": list(example.responses),
                "rankings": example.rankings,
                "image": f"{n}.png",
            }
            file.write(json.dumps(record) + "\n")
    return folder / "train.jsonl"


@pytest.fixture()
def here(accelerate_state, alone, monkeypatch, capsys):
    """Function (command) -> what the script printed, run as the main program of this very process if that has no GPU."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return alone if torch.cuda.is_available() else run


@pytest.fixture()
def alone():
    """Function (command) -> what the script printed, in a process that has loaded nothing else."""

    def run(script, *arguments):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, script, *arguments]
        found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
        assert found.returncode == 0, found.stderr
        return found.stdout

    return run


@pytest.mark.parametrize(
    "name, where", [("stock_trainer", "here"), ("accelerate_loop", "here"), ("plain_loop", "alone")]
)
def test_a_script_trains_and_saves_a_reward_model(name, where, preferences, tmp_path, request):
    pytest.importorskip("yojo.data")
    script = EXAMPLES / f"{name}.py"
    assert len(script.read_text().splitlines()) <= 60
    run = request.getfixturevalue(where)
    assert "loss" in run(script, BACKBONE, preferences, tmp_path, "--steps", "3", "--batch-size", "4")
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    fresh = yojo.RewardModel.from_pretrained(tmp_path)
    with torch.no_grad():  # LoRA begins at zero: taking it away leaves what was before it
        for parameter_name, parameter in fresh.model.named_parameters():
            if "lora_B" in parameter_name:
                assert parameter.abs().max() > 0  # it was trained
                parameter.zero_()
    example = make_examples(digits.load_digits_split()[1], 1, seed=1)[0]
    scores = loaded.score(example.prompt, example.responses, images=example.images)
    assert scores.shape == (4,) and scores.isfinite().all()
    assert not torch.equal(scores, fresh.score(example.prompt, example.responses, images=example.images))


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_accelerate_reads_the_configurations(name):
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    from accelerate.utils import DistributedType

    path = EXAMPLES / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))  # an unknown key is an error
    assert isinstance(config, ClusterConfig) and config.mixed_precision == "bf16" and config.num_processes > 1
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(name, "DEEPSPEED")
    assert config.distributed_type is DistributedType[kind]
    assert f"--config_file examples/accelerate/{name}.yaml -m yojo.cli train" in path.read_text()


@pytest.mark.parametrize("name", ["fsdp2", "zero2"])
def test_the_launcher_knows_every_setting(name):
    """It takes what it does not know from the file for an argument of its own, and says nothing."""
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(EXAMPLES / "accelerate" / f"{name}.yaml"))
    settings = config.fsdp_config | config.deepspeed_config
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert settings and set(settings) <= set(known)


def test_the_settings_of_fsdp_reach_its_plugin(monkeypatch):
    import argparse

    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = str(EXAMPLES / "accelerate" / "fsdp2.yaml")
    args = launch_command_parser().parse_args(["--config_file", path, "--main_process_port", "0", "script.py"])
    args, _, _ = _validate_launch_command(args)
    assert isinstance(args, argparse.Namespace) and args.use_fsdp
    for name, value in prepare_multi_gpu_env(args).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    assert plugin.state_dict_type.name == "FULL_STATE_DICT" and not plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None  # the trainer names the decoder's
    assert load_config_from_file(path).fsdp_config.keys() >= {"fsdp_version", "fsdp_state_dict_type"}


# ---- compare.sh ----

# What stands for `yojo`: writes down what it was asked, and leaves what a command leaves; a training may be cut by CUT.
STUB = """
import json, os, pathlib, sys

words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps(words) + "\\n")
if words[0] == "demo":
    pathlib.Path(words[2]).mkdir(parents=True)
if words[0] == "train":
    folder = pathlib.Path(words[words.index("--output_dir") + 1])
    (folder / "checkpoint-5").mkdir(parents=True, exist_ok=True)
    if os.environ.get("CUT") == folder.name:
        sys.exit(9)
    (folder / "trainer_state.json").write_text("{}")
sys.exit(int(os.environ.get("EVAL", 0)) if words[0] == "eval" else 0)
"""


@pytest.fixture()
def compare(tmp_path):
    """Function (*words, code=0, **environment) -> (calls of `yojo`, which is a stub, and the output)."""
    (tmp_path / "stub.py").write_text(STUB)
    calls = tmp_path / "calls"

    def run(*words, code=0, **environment):
        calls.write_text("")
        environment = {"YOJO": f"{sys.executable} {tmp_path / 'stub.py'}", "CALLS": str(calls), **environment}
        command = ["bash", EXAMPLES / "compare.sh", *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return [json.loads(line) for line in calls.read_text().splitlines()], done.stdout + done.stderr

    return run


@pytest.fixture()
def run_file(tmp_path):
    (tmp_path / "run.yaml").write_text("model: m\ntrain_data: t.jsonl\nmode: isolated\n")
    return tmp_path / "run.yaml"


def option(words, name):
    """The last value of an option, which is the one that counts."""
    return dict(zip(words, words[1:], strict=False)).get(name)


def trained(calls):
    return [Path(option(words, "--output_dir")).name for words in calls if words[0] == "train"]


def test_the_two_models_differ_in_mode_loss_and_pairs_alone(compare, tmp_path):
    calls, _ = compare("--max_steps", 7, "--loss=plackett_luce")
    demo, check, single, multi, table = calls
    assert demo == ["demo", "--data", "comparison/digits.writing"] and (tmp_path / "comparison/digits").is_dir()
    assert check == ["eval", "preferences", "comparison/digits/held_out.jsonl", "--judge", "length"]
    own = ["--mode", "isolated", "--permutations", "1", "--loss", "bradley_terry", "--max_responses", "2"]
    same = multi[: multi.index("--mode")]
    assert single == [*same, *own, "--output_dir", "comparison/single"]
    assert multi == [*same, "--mode", "comparative", "--output_dir", "comparison/multi"]
    assert option(same, "--config") == str(EXAMPLES / "digits.yaml") and option(same, "--model") == str(BACKBONE)
    assert option(same, "--train_data") == "comparison/digits/train.jsonl" and same[-3:] == [
        "--max_steps",
        "7",
        "--loss=plackett_luce",
    ]
    assert table[:5] == [*check[:3], "--out", "comparison/preferences"]
    assert table[6::2] == [
        "multi=comparison/multi",
        "single=comparison/single",
        "multi-permutations=comparison/multi#permutations=4",
        "multi-isolated=comparison/multi#isolated",
    ]


def test_a_cut_run_goes_on_and_what_is_there_is_kept(compare, run_file):
    words = ("--config", run_file, "--out", "my runs/a b", "--", "preferences", "held out.jsonl", "--draws", 50)
    calls, _ = compare(*words, code=9, CUT="multi")
    assert trained(calls) == ["single", "multi"] and all("--resume_from_checkpoint" not in call for call in calls)
    calls, text = compare(*words)
    assert trained(calls) == ["multi"] and calls[1][-2:] == ["--resume_from_checkpoint", "last"]
    assert calls[0] == ["eval", "preferences", "held out.jsonl", "--draws", "50", "--judge", "length"]
    assert "my runs/a b/single is there" in text and calls[2][:2] == ["eval", "preferences"]
    calls, _ = compare(*words)
    assert [call[0] for call in calls] == ["eval"] and option(calls[0], "--out") == "my runs/a b/preferences"
    calls, _ = compare(*words[:4], "--", "vl-rewardbench", "other")  # the same models, another table
    assert trained(calls) == [] and option(calls[0], "--out") == "my runs/a b/vl-rewardbench"


def test_models_of_other_options_are_not_taken_for_these(compare, run_file):
    words = ("--config", run_file, "--", "preferences", "f.jsonl")
    compare("--seed", 1, *words)
    calls, text = compare("--seed", 2, *words, code=2)
    assert trained(calls) == [] and "comparison/single.options" in text and "another --out" in text
    run_file.write_text("model: other\n")
    assert trained(compare("--seed", 1, *words, code=2)[0]) == []


def test_a_launcher_trains_and_nothing_else(compare, run_file, tmp_path):
    launch = f"{sys.executable} {tmp_path / 'stub.py'} launch -m yojo.cli"
    calls, _ = compare("--config", run_file, "--", "preferences", "f.jsonl", LAUNCH=launch)
    assert [call[0] for call in calls] == ["eval", "launch", "launch", "eval"]
    assert all(call[:4] == ["launch", "-m", "yojo.cli", "train"] for call in calls[1:3])


def test_bad_held_out_data_is_found_before_training(compare, run_file):
    words = ("--config", run_file, "--", "preferences", "f.jsonl")
    for code in (1, 2):
        calls, _ = compare(*words, code=code, EVAL=str(code))
        assert [call[0] for call in calls] == ["eval"]
    assert trained(compare(*words, "--skip-bad", code=1, EVAL="1")[0]) == [
        "single",
        "multi",
    ]  # eval's own code at the end


@pytest.mark.parametrize(
    "words, message",
    [
        (("--config", "none.yaml"), "error: --config: no such file: 'none.yaml'"),
        (("--config=none.yaml",), "error: --config: no such file: 'none.yaml'"),
        (("--config",), "error: --config: no such file: ''"),
        (("--config", "run.yaml"), "error: say what to evaluate on: -- preferences FILE"),
        (("--config", "run.yaml", "--"), "error: say what to evaluate on: -- preferences FILE"),
        (("--out",), "error: --out needs a folder"),
        (("--mode", "isolated"), "error: --mode is set by the comparison"),
        (("--output-dir=o",), "error: --output-dir is set by the comparison"),
        (("--resume_from_checkpoint", "last"), "error: --resume_from_checkpoint is set by the comparison"),
        (("--", "preferences", "f.jsonl", "--judge", "length"), "error: --judge and --out are set by the comparison"),
        (("--", "--partial", "preferences", "f.jsonl"), "error: behind -- the benchmark comes first, got --partial"),
    ],
)
def test_mistakes_of_the_comparison_are_one_line(words, message, compare, run_file, tmp_path):
    calls, text = compare(*words, code=2)
    assert calls == [] and text.startswith(message) and text.count("\n") == 1
    assert not (tmp_path / "comparison").exists()


def test_the_comparison_says_how_it_is_used(compare):
    calls, text = compare("--help")
    assert calls == [] and "examples/compare.sh [--config FILE.yaml]" in text and "set -e" not in text


# What stands for `yojo` where its commands are run: the process of the test, which has loaded everything, runs them.
CLIENT = """
import json, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    server.sendall(json.dumps(sys.argv[2:]).encode() + b"\\n")
    code, text = json.loads(server.makefile().readline())
print(text, end="")
sys.exit(code)
"""


@pytest.fixture()
def compare_here(accelerate_state, tmp_path, monkeypatch):
    """Function (*words) -> (first words of the commands that this process has run, the output)."""
    from typer.testing import CliRunner

    from yojo.cli import app

    monkeypatch.chdir(tmp_path)
    (tmp_path / "client.py").write_text(CLIENT)

    def run(*words):
        calls = []
        with tempfile.TemporaryDirectory(prefix="yojo-") as folder, socket.socket(socket.AF_UNIX) as server:
            server.bind(f"{folder}/socket")  # a short name: a socket's may have some hundred characters
            server.listen()
            server.settimeout(0.1)
            yojo = {"YOJO": f"{sys.executable} {tmp_path / 'client.py'} {folder}/socket"}
            command = ["bash", EXAMPLES / "compare.sh", *map(str, words)]
            with open(tmp_path / "printed", "w") as file:
                script = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | yojo)
            while script.poll() is None:
                try:
                    client, _ = server.accept()
                except TimeoutError:
                    continue
                with client, client.makefile("rw") as lines:
                    asked = json.loads(lines.readline())
                    done = CliRunner().invoke(app, asked)
                    calls.append(asked[0])
                    lines.write(json.dumps([done.exit_code, done.output]) + "\n")
        printed = (tmp_path / "printed").read_text()
        assert script.returncode == 0, printed
        return calls, printed

    return run


def test_the_comparison_runs_whole_and_a_second_time_trains_nothing(compare_here, compare, preferences, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {BACKBONE}\ntrain_data: {preferences}\nmode: isolated\npermutations: 2\nmax_steps: 2\nlora_r: 4\n"
        "per_device_train_batch_size: 2\ndataloader_num_workers: 0\nplots: false\nuse_cpu: true\n"
    )
    words = ("--config", config, "--out", "my runs", "--", "preferences", preferences, "--draws", 50, "--workers", 0)
    calls, text = compare_here(*words)
    assert calls == ["eval", "train", "train", "eval"]
    assert "Judges compared" in text and "multi - single" in text
    report = json.loads((tmp_path / "my runs/preferences/report.json").read_text())
    judges = {judge["name"]: judge for judge in report["judges"]}
    assert list(judges) == ["multi", "single", "multi-permutations", "multi-isolated"]
    assert {name: judge["orders"] for name, judge in judges.items()} == {
        "multi": 4, "single": None, "multi-permutations": 4, "multi-isolated": None,
    }  # fmt: skip
    for judge in judges.values():
        assert judge["order"]["items"] == 8 and judge["figures"]["estimates"]["top1"]["count"] == 8
    first = report["comparisons"][0]
    assert (first["first"], first["second"], first["items"]) == ("multi", "single", 8)
    assert first["difference"]["low"] <= first["difference"]["value"] <= first["difference"]["high"]
    own = {
        name: json.loads((tmp_path / "my runs" / name / "yojo_config.json").read_text()) for name in ("multi", "single")
    }
    settings = {name: [one["config"][key] for key in ("mode", "permutations", "loss")] for name, one in own.items()}
    assert settings == {"multi": ["comparative", 2, "best"], "single": ["isolated", 1, "bradley_terry"]}
    calls, text = compare(*words)  # by the stub: nothing but the table is asked for
    assert [call[0] for call in calls] == ["eval"]
    assert "my runs/single is there" in text and "my runs/multi is there" in text
