"""The scripts in examples/ run as they are, and what they save scores; accelerate reads the configurations."""

import json
import os
import runpy
import subprocess
import sys
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
        found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
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
