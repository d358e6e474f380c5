"""Train a reward model with transformers' own Trainer: python examples/stock_trainer.py MODEL DATA.jsonl OUT

MODEL is a vision-language model of transformers, DATA.jsonl has a preference a line, as `yojo.data.load` reads them.
`yojo.RewardTrainer` does more (rows of a token budget, balanced processes, ranking metrics); this shows that less will do.
"""

import argparse

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

    processor = load_processor(options.model)  # AutoProcessor, also where torchvision is missing
    model = transformers.AutoModelForImageTextToText.from_pretrained(options.model, dtype="auto")
    model = yojo.patch(model, processor)
    lora = LoraConfig(r=64, lora_alpha=64, target_modules=lora_targets(model), modules_to_save=["score"])
    model = get_peft_model(model, lora)

    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=options.out,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,  # examples that share a row
            learning_rate=1e-4,
            logging_steps=10,
            report_to="none",
            save_strategy="no",
            label_names=["rankings"],
            remove_unused_columns=False,  # an example has no columns
        ),
        train_dataset=yojo.data.load(options.data),
        data_collator=yojo.Collator(processor, model),
    )
    trainer.train()
    yojo.RewardModel(model, processor).save_pretrained(options.out)


if __name__ == "__main__":
    main()
