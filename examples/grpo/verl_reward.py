r"""A YOJO reward model in verl's reward loop, beside another reward; by itself it needs no file but verl's command line:

python -m verl.trainer.main_ppo algorithm.adv_estimator=grpo data.train_files=train.parquet data.val_files=test.parquet \
    actor_rollout_ref.model.path=Qwen/Qwen3-VL-4B-Instruct actor_rollout_ref.rollout.n=8 \
    reward.reward_manager.source=importlib reward.reward_manager.module.path=pkg://yojo.rewards.verl \
    reward.reward_manager.name=YojoRewardManager +reward.reward_kwargs.yojo.judge=my-reward-model \
    +reward.reward_kwargs.yojo.num_gpus=1 +reward.reward_kwargs.yojo.deadline=900

Leave the judge's GPU out of trainer.n_gpus_per_node. With this file instead, module.path=examples/grpo/verl_reward.py and
name=JudgedAndCorrect, a tenth of a right answer's reward is added to the judge's.
"""

from yojo.rewards.verl import YojoRewardManager


class JudgedAndCorrect(YojoRewardManager):
    """The judge's reward of a rollout, and 0.1 where it has the row's `reward_model.ground_truth` in it."""

    async def run_single(self, data):
        found = await super().run_single(data)
        row = data[0]
        text = self.tokenizer.decode(row.batch["responses"], skip_special_tokens=True)
        right = float(str(row.non_tensor_batch["reward_model"]["ground_truth"]) in text)
        return {
            "reward_score": found["reward_score"] + 0.1 * right,
            "reward_extra_info": {**found["reward_extra_info"], "acc": right},
        }
