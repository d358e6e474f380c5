r"""A YOJO reward model in ms-swift's GRPO trainer: as a reward function, or as the reward model that ms-swift loads.

YOJO_JUDGE=my-reward-model swift rlhf --rlhf_type grpo --model Qwen/Qwen3-VL-4B-Instruct --dataset prompts.jsonl \
    --num_generations 8 --external_plugins examples/grpo/swift_plugin.py --reward_funcs yojo

YOJO_GROUP_SIZE=8 swift rlhf --rlhf_type grpo --model Qwen/Qwen3-VL-4B-Instruct --dataset prompts.jsonl \
    --num_generations 8 --external_plugins examples/grpo/swift_plugin.py \
    --reward_model my-reward-model --reward_model_plugin yojo

The first takes any judge by its name (a folder, "FOLDER#isolated", "openai:MODEL@URL"), the second a folder with a full model.
prompts.jsonl has lines such as {"messages": [{"role": "user", "content": "<image>Which digit is shown?"}], "images": ["three.png"]}.
"""

import functools
import os

from swift.rewards import orms, rm_plugins

from yojo.rewards.swift import SwiftPlugin, SwiftReward

if "YOJO_JUDGE" in os.environ:
    orms["yojo"] = functools.partial(SwiftReward, judge=os.environ["YOJO_JUDGE"])
if "YOJO_GROUP_SIZE" in os.environ:
    rm_plugins["yojo"] = functools.partial(SwiftPlugin, group_size=int(os.environ["YOJO_GROUP_SIZE"]))
