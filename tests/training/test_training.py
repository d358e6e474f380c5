"""The patched model in the training loops people have: Trainer, PEFT, accelerate; two processes are in test_parallel."""

import pytest
import torch

import yojo
from yojo.demo import digits
from yojo.demo.reward import make_examples


@pytest.fixture(scope="module")
def training_examples():
    return make_examples(digits.load_digits_split()[0], 64, seed=0)


def test_a_stock_trainer_trains_and_evaluates(make_reward_model, training_examples, tmp_path):
    from transformers import Trainer, TrainingArguments

    reward_model = make_reward_model()

    def metrics(prediction):
        best = prediction.predictions.argmax(1)
        return {"best_of_n": float((prediction.label_ids[range(len(best)), best] == 1).mean())}

    trainer = Trainer(
        model=reward_model.model,
        args=TrainingArguments(
            output_dir=tmp_path,
            max_steps=12,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=3,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            dataloader_num_workers=1,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            label_names=["rankings"],
            use_cpu=True,
        ),
        train_dataset=training_examples[:8],
        eval_dataset=training_examples[:8],
        data_collator=reward_model.collator,
        compute_metrics=metrics,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # 8 examples seen 12 times over: a model that learns fits them.
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert 0 <= after["eval_best_of_n"] <= 1


def test_a_trained_adapter_survives_saving(make_reward_model, training_examples, tmp_path):
    from peft import LoraConfig, get_peft_model

    from yojo.demo.backbone import BACKBONE

    reward_model = make_reward_model()
    reward_model.model.config.name_or_path = str(BACKBONE)
    model = get_peft_model(
        reward_model.model,
        LoraConfig(
            r=4,
            target_modules=["q_proj", "v_proj"],
            modules_to_save=["score"],
            trainable_token_indices={"embed_tokens": [reward_model.collator.separator_id]},
        ),
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = reward_model.collator(training_examples[:8])
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    trained = yojo.RewardModel(model, reward_model.processor)
    trained.save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    got, expected = loaded.score_many(training_examples[:8]), trained.score_many(training_examples[:8])
    assert all(map(torch.equal, got, expected))


def test_accelerate_with_mixed_precision_keeps_scores_in_float32(
    accelerate_state, make_reward_model, training_examples
):
    from accelerate import Accelerator

    reward_model = make_reward_model()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    loader = torch.utils.data.DataLoader(training_examples[:8], batch_size=4, collate_fn=reward_model.collator)
    optimizer = torch.optim.AdamW(reward_model.model.parameters(), lr=1e-4)
    model, optimizer, loader = accelerator.prepare(reward_model.model, optimizer, loader)
    for batch in loader:
        output = model(**batch)
        assert output.scores.dtype == torch.float32 and output.loss.isfinite()
        accelerator.backward(output.loss)
        optimizer.step()
    assert accelerator.unwrap_model(model) is reward_model.model
