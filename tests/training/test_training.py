"""The patched model in the training loops people have: Trainer, accelerate, DistributedDataParallel."""

import os
import subprocess
import sys
import textwrap

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
            max_steps=20,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            dataloader_num_workers=1,
            learning_rate=1e-3,
            report_to="none",
            save_strategy="no",
            label_names=["rankings"],
            use_cpu=True,
        ),
        train_dataset=training_examples[:16],
        eval_dataset=training_examples[:16],
        data_collator=reward_model.collator,
        compute_metrics=metrics,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    # 16 examples seen 20 times over: a model that learns fits them.
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


def test_two_processes_give_the_gradient_of_the_whole_batch(tmp_path):
    """DistributedDataParallel over gloo: each process packs its own half; equal halves make equal means."""
    script = tmp_path / "worker.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, torch, torch.distributed as dist, yojo
            from torch.nn.parallel import DistributedDataParallel
            from yojo.demo import digits
            from yojo.demo.backbone import load_backbone
            from yojo.demo.reward import make_examples

            torch.set_num_threads(1)
            dist.init_process_group("gloo")
            torch.manual_seed(0)
            model, processor = load_backbone()
            yojo.patch(model.eval(), processor)
            collator = yojo.Collator(processor, model)
            examples = make_examples(digits.load_digits_split()[0], 8, seed=0)
            model(**collator(examples)).loss.backward()
            whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            parallel = DistributedDataParallel(model, find_unused_parameters=True)
            assert yojo.patch(parallel) is parallel
            rank = dist.get_rank()
            parallel(**collator(examples[4 * rank : 4 * rank + 4])).loss.backward()
            # The last bias shifts all scores alike, so its gradient is zero but for the rounding of the others.
            rounding = 8 * torch.finfo(torch.float32).eps * max(g.abs().max() for g in whole.values())
            for name, gradient in whole.items():
                error = (model.get_parameter(name).grad - gradient).abs().max()
                assert error <= max(1e-4 * gradient.abs().max(), rounding), (name, error, rounding)
            dist.destroy_process_group()
            """
        )
    )
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        check=True,
        env=environment,
        timeout=300,
    )
