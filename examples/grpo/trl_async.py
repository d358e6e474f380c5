"""TRL's AsyncGRPOTrainer with rewards of whole groups; the judge is behind an endpoint, since rewards are made in a process without a GPU.

    YOJO_JUDGE=openai:MODEL@http://host:8001/v1 accelerate launch examples/grpo/trl_async.py prompts.jsonl --model Qwen/Qwen3-4B

beside the vLLM server that TRL's page on the trainer tells to start. prompts.jsonl has lines such as {"prompt": [{"role": "user",
"content": "Which digit comes after six?"}]}; a column `image` reaches the judge, but not the policy, which TRL shows text alone.
"""

import argparse
import os

GROUP = 8


def make_reward():
    """What goes into the process that scores: its judge is an address there, no model."""
    from yojo.judges import load_judge
    from yojo.rewards import AsyncGroupReward

    # Less than the 300 s after which TRL takes a process that is silent for hung, so that the error says what is wrong.
    return AsyncGroupReward(load_judge(os.environ["YOJO_JUDGE"]), group_size=GROUP, deadline=240)


def main():
    """Train; TRL starts the process that scores from this file, so nothing but definitions stands outside of functions."""
    from datasets import load_dataset
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    parser = argparse.ArgumentParser()
    parser.add_argument("prompts", help="JSONL")
    parser.add_argument("--model", default="Qwen/Qwen3-4B")
    parser.add_argument("--out", default="grpo-async")
    options = parser.parse_args()
    dataset = load_dataset("json", data_files=options.prompts, split="train")
    args = AsyncGRPOConfig(output_dir=options.out, num_generations=GROUP)
    AsyncGRPOTrainer(options.model, reward_funcs=make_reward(), args=args, train_dataset=dataset).train()


if __name__ == "__main__":
    main()
