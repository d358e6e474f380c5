"""Train a reward model with nothing but PyTorch and PEFT: python examples/plain_loop.py MODEL DATA.jsonl OUT"""

import argparse

import torch
import transformers
from peft import LoraConfig, get_peft_model

import yojo
from yojo.inputs.processors import load_processor
from yojo.training.adapters import lora_targets


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = load_processor(options.model)  # AutoProcessor, also where torchvision is missing
    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    model = yojo.patch(model, processor)
    lora = LoraConfig(r=64, lora_alpha=64, target_modules=lora_targets(model), modules_to_save=["score"])
    model = get_peft_model(model, lora)
    model.to(device).train()
    collator = yojo.Collator(processor, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loader = torch.utils.data.DataLoader(
        yojo.data.load(options.data), batch_size=options.batch_size, shuffle=True, drop_last=True, collate_fn=collator
    )

    step = 0
    while step < options.steps:
        for batch in loader:
            batch = {name: value.to(device) for name, value in batch.items()}
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == options.steps:
                print(f"step {step}: loss {loss.item():.4f}")
            if step == options.steps:
                break
    yojo.RewardModel(model, processor).save_pretrained(options.out)


if __name__ == "__main__":
    main()
