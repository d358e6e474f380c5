"""GRPO with a reward of whole groups under TRL, on digits and a CPU: python examples/grpo/trl_digits.py [--steps 20]"""

import argparse

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

import yojo
from yojo.demo import digits
from yojo.demo.backbone import load_backbone
from yojo.demo.reward import LORA_TARGETS, load_reward_model

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--out", default="grpo-digits")
options = parser.parse_args()

policy, processor = load_backbone()  # a captioner of handwritten digits; any vision-language model will do
question = [{"role": "user", "content": digits.PROMPT}]
dataset = Dataset.from_list([{"prompt": question, "image": image} for image, _ in digits.load_digits_split()[0]])

torch.manual_seed(0)
reward = yojo.GroupReward(load_reward_model())  # or yojo.RewardModel.from_pretrained("my-reward-model")
trainer = GRPOTrainer(
    policy,
    reward_funcs=reward,  # all completions of a prompt and its image in one pass
    args=GRPOConfig(
        output_dir=options.out,
        num_generations=8,
        per_device_train_batch_size=32,
        max_completion_length=16,
        max_steps=options.steps,
        learning_rate=1e-3,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
    ),
    train_dataset=dataset,
    processing_class=processor,
    peft_config=LoraConfig(r=16, target_modules=LORA_TARGETS),
)
trainer.train()
trainer.save_model(options.out)
