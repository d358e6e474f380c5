"""The examples of rewards run as they are, a step or a round each."""

import os
import pickle
import re
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import load_peft_weights
from trl.experimental.async_grpo import AsyncGRPOConfig

from yojo.demo.backbone import load_backbone
from yojo.rewards import AsyncGroupReward

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def run(script, *arguments):
    """What a script prints, in a process that has loaded nothing else."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(script), *map(str, arguments)]
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_their_commands_can_be_pasted_into_a_shell():
    """A doubled backslash at the end of a line would be an argument, and end the command."""
    for script in sorted(EXAMPLES.rglob("*.py")):
        assert not re.search(r"\\\\$", script.read_text(), re.MULTILINE), script.name


def test_best_of_n_at_training_time():
    script = EXAMPLES / "best_of_n_training.py"
    said = run(script, 2)
    shares = [float(share) / 100 for share in re.findall(r"([\d.]+)% of the sampled answers are right", said)]
    assert len(shares) == 2 and 0.6 < shares[0] < 0.95 and shares[1] > 0.6
    rewards = [float(reward) for reward in re.findall(r"round \d: mean reward (-?[\d.]+)", said)]
    assert len(rewards) == 2 and all(-15 < reward < 15 for reward in rewards)


def test_grpo_under_trl(tmp_path):
    """The policy's adapter that it saves has been trained, and goes on the captioner it was trained on."""
    said = run(EXAMPLES / "grpo" / "trl_digits.py", "--steps", 5, "--out", tmp_path)
    assert "'yojo/spread': " in said and "'reward': " in said
    weights = load_peft_weights(tmp_path)
    assert any(weight.abs().max() > 0 for name, weight in weights.items() if "lora_B" in name)
    policy = PeftModel.from_pretrained(load_backbone()[0], tmp_path)
    with torch.no_grad():
        assert policy(input_ids=torch.tensor([[5, 20, 30]])).logits.isfinite().all()


def test_the_reward_of_the_asynchronous_trainer_goes_into_another_process(monkeypatch):
    monkeypatch.setenv("YOJO_JUDGE", "openai:judge@http://127.0.0.1:9/v1")
    made = runpy.run_path(str(EXAMPLES / "grpo" / "trl_async.py"))["make_reward"]()
    found = pickle.loads(pickle.dumps(made))
    assert isinstance(found, AsyncGroupReward) and found.judge.fingerprint() == made.judge.fingerprint()
    assert AsyncGRPOConfig(output_dir="x", use_cpu=True, bf16=False).num_generations == found.group_size
    assert found.scorer.deadline < AsyncGRPOConfig(output_dir="x", use_cpu=True, bf16=False).heartbeat_stale_after_s
