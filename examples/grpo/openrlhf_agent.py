r"""OpenRLHF (0.11) with a reward of whole groups: an agent that has a YOJO judge score all samples of a prompt together, images too.

    ray job submit --address=http://127.0.0.1:8265 \
        --runtime-env-json='{"env_vars": {"YOJO_JUDGE": "/models/my-reward-model", "YOJO_DEVICE": "cuda"}}' \
        -- python -m openrlhf.cli.train_ppo_ray --train.agent_func_path examples/grpo/openrlhf_agent.py \
        --actor.model_name_or_path Qwen/Qwen3-VL-4B-Instruct --algo.advantage.estimator group_norm \
        --rollout.n_samples_per_prompt 8 --data.prompt_dataset prompts.jsonl --data.input_key prompt --data.apply_chat_template \
        --data.image_key images --data.max_images_per_prompt 1 ...

Each vLLM engine's actor loads the judge beside its engine: leave it room with --vllm.gpu_memory_utilization. Without images a
server does as well, one for all engines:

    python -m yojo.rewards.openrlhf --judge my-reward-model --group-size 8 --tokenizer Qwen/Qwen3-4B --port 5000
    python -m openrlhf.cli.train_ppo_ray --reward.remote_url http://127.0.0.1:5000/get_reward \
        --rollout.n_samples_per_prompt 8 --eval.n_samples_per_prompt 8 ...
"""

import os

from openrlhf.utils.agent import SingleTurnAgentExecutor

from yojo.rewards.openrlhf import GroupAgent


class AgentExecutor(GroupAgent, SingleTurnAgentExecutor):
    """What OpenRLHF loads by this name, without arguments."""

    def __init__(self):
        super().__init__(os.environ["YOJO_JUDGE"], device=os.environ.get("YOJO_DEVICE"))
