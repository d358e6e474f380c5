"""Best of N at training time, on digits and a CPU: sample N answers, fine-tune on the one the reward model likes best, repeat."""

import random
import sys

import torch

from yojo.demo import digits
from yojo.demo.backbone import load_backbone
from yojo.demo.pretrain import prompt_text
from yojo.demo.reward import load_reward_model
from yojo.rewards import Group, GroupScorer

N, IMAGES, ROUNDS = 4, 64, int(sys.argv[1]) if len(sys.argv) > 1 else 30
train, held_out = digits.load_digits_split()
policy, processor = load_backbone()
question = prompt_text(processor, digits.PROMPT)


def sample(images, n):
    batch = processor(text=[question] * len(images), images=images, return_tensors="pt")
    made = policy.generate(**batch, do_sample=True, num_return_sequences=n, max_new_tokens=12)
    texts = processor.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[at : at + n] for at in range(0, len(texts), n)]


def accuracy():
    answers = sample([image for image, _ in held_out], 2)
    right = [
        digits.named_digits(a) == {digit} for both, (_, digit) in zip(answers, held_out, strict=True) for a in both
    ]
    return f"{sum(right) / len(right):.1%} of the sampled answers are right"


def loss(images, answers):
    ends = [answer + "<|im_end|>" for answer in answers]
    text = [question + end for end in ends]
    batch = processor(text=text, images=images, padding=True, padding_side="left", return_tensors="pt")
    lengths = torch.tensor([len(ids) for ids in processor.tokenizer(ends)["input_ids"]])
    width = batch["input_ids"].shape[1]
    in_prompt = torch.arange(width) < width - lengths[:, None]
    return policy(**batch, labels=batch["input_ids"].masked_fill(in_prompt, -100)).loss


torch.manual_seed(0)
for weight in policy.parameters():  # a captioner that has forgotten some of what it knew
    weight.data += torch.randn_like(weight) * 0.04 * (weight.ndim > 1)
print("before:", accuracy())
scorer, rng = GroupScorer(load_reward_model()), random.Random(0)
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
for number in range(1, ROUNDS + 1):
    images = [image for image, _ in rng.sample(train, IMAGES)]
    groups = [Group(digits.PROMPT, a, images=[image]) for image, a in zip(images, sample(images, N), strict=True)]
    rewards = [one.rewards for one in scorer.score(groups, draw=number)]  # four answers a pass, many passes a row
    best = [group.completions[own.index(max(own))] for group, own in zip(groups, rewards, strict=True)]
    loss(images, best).backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"round {number}: mean reward {sum(map(sum, rewards)) / N / IMAGES:.3f}", flush=True)
print("after:", accuracy())
