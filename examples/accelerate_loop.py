"""Train a reward model in a loop of one's own with accelerate, on one device or many:
accelerate launch examples/accelerate_loop.py MODEL DATA.jsonl OUT
"""

import argparse

import accelerate
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

    accelerator = accelerate.Accelerator()
    processor = load_processor(options.model)  # AutoProcessor, also where torchvision is missing
    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    model = yojo.patch(model, processor)
    lora = LoraConfig(r=64, lora_alpha=64, target_modules=lora_targets(model), modules_to_save=["score"])
    model = get_peft_model(model, lora)
    collator = yojo.Collator(processor, model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    loader = torch.utils.data.DataLoader(
        yojo.data.load(options.data), batch_size=options.batch_size, shuffle=True, drop_last=True, collate_fn=collator
    )
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    step = 0
    while step < options.steps:
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 10 == 0 or step == options.steps:
                accelerator.print(f"step {step}: loss {accelerator.reduce(loss.detach(), 'mean').item():.4f}")
            if step == options.steps:
                break
    if accelerator.is_main_process:
        yojo.RewardModel(accelerator.unwrap_model(model), processor).save_pretrained(options.out)
    accelerator.wait_for_everyone()


if __name__ == "__main__":
    main()
