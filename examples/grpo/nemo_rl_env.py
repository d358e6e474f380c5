r"""A YOJO reward model as an environment of NeMo-RL; run from NeMo-RL's folder, where its examples lie:

python /path/to/examples/grpo/nemo_rl_env.py examples/run_vlm_grpo.py --config examples/configs/vlm_grpo_3B.yaml \
    policy.generation.vllm_cfg.async_engine=false grpo.num_generations_per_prompt=8 \
    ++data.train.env_name=yojo ++env.yojo.judge=/path/to/my-reward-model ++env.yojo.group_size=8 \
    ++data.validation.env_name=yojo_val ++env.yojo_val.judge=/path/to/my-reward-model ++env.yojo_val.group_size=1

Images come in the first user turn of the message log. run_vlm_grpo.py makes every environment under the name "vlm"; run_grpo.py,
whose prompts are text, wants YOJO_ENV=yojo,yojo_val and a data processor that keeps the messages in extra_env_info["prompt"].
Each of the two environments has a judge of its own, on a GPU of its own unless YOJO_NUM_GPUS says otherwise.
"""

import os
import runpy
import sys

from yojo.rewards import nemo_rl

if __name__ == "__main__":
    for name in os.environ.get("YOJO_ENV", "vlm").split(","):
        nemo_rl.register(name, num_gpus=float(os.environ.get("YOJO_NUM_GPUS", 1)))
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
