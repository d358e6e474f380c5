"""A policy on the reward model's own backbone: one set of weights in memory, and neither sees that the other is there."""

import copy
import importlib.util
import pickle
import random
import threading

import peft
import pytest
import real_processors
import saved_cases
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from trl_cases import checksum, logged, lora, make_policy, make_trainer, trained_weights

import yojo
from yojo.demo import digits
from yojo.demo.backbone import BACKBONE, load_backbone
from yojo.demo.pretrain import training_batch
from yojo.demo.reward import load_reward_model
from yojo.rewards.sharing import share

ANSWERS = ["It is a 3.", "This is a seven.", "A zero.", "eight"]


@pytest.fixture()
def reward_model():
    return load_reward_model()


@pytest.fixture(scope="module")
def sample():
    return digits.load_digits_split()[1][0]


@pytest.fixture(scope="module")
def score(sample):
    """Function judge -> its scores of some answers to one image."""
    return lambda judge: judge.score(digits.PROMPT, ANSWERS, images=[sample[0]])


@pytest.fixture(scope="module")
def batch():
    """[6] rows of captioning, with labels."""
    return training_batch(load_backbone()[1], digits.load_digits_split()[0][:6], random.Random(0))


def storages(*models):
    """dict: where memory of weights begins -> its bytes, each once."""
    found = {}
    for model in models:
        for parameter in model.parameters():
            storage = parameter.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found


def trained(policy, batch, steps=3, between=lambda: None):
    """(losses, gradients of each step) of a policy that takes some steps; `between` is called wherever it may disturb."""
    weights = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-2)
    policy.train()
    losses, gradients = [], []
    for _ in range(steps):
        between()
        loss = policy(**batch).loss
        between()
        loss.backward()
        between()
        losses.append(loss.item())
        gradients.append({name: p.grad.clone() for name, p in weights.items()})
        optimizer.step()
        optimizer.zero_grad()
    policy.eval()
    return losses, gradients


def assert_same_tensors(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_backbone_is_in_memory_once(reward_model):
    alone, stock = storages(reward_model.model), storages(load_backbone()[0])
    policy, judge = share(reward_model, lora())
    adapter = sum(p.nbytes for p in policy.parameters() if p.requires_grad)
    both = storages(reward_model.model, policy)
    assert sum(both.values()) == sum(alone.values()) + adapter
    assert judge.shared_bytes() >= sum(stock.values())
    # Apart, the policy has a backbone of its own.
    apart = storages(reward_model.model, make_policy())
    assert sum(apart.values()) == sum(both.values()) + sum(stock.values())


def test_scores_are_the_reward_models_own_before_while_and_after_the_policy_trains(reward_model, score, batch):
    before, was = score(load_reward_model()), checksum(reward_model.model)
    policy, judge = share(reward_model, lora())
    seen = [score(judge)]
    trained(policy, batch, between=lambda: seen.append(score(judge)))
    with torch.no_grad():
        moved = (policy(**batch).logits - make_policy()(**batch).logits).abs().max()
    assert moved > 1e-2  # the policy did train
    seen.append(score(judge))
    assert len(seen) == 11 and all(torch.equal(scores, before) for scores in seen)
    assert checksum(reward_model.model) == was
    assert torch.equal(score(reward_model), before)


def test_the_policy_is_one_on_a_stock_backbone_of_its_own(reward_model, score, batch):
    """To the bit: adapters as they begin, logits, what is generated, losses, gradients, weights after steps."""
    torch.manual_seed(5)
    policy, judge = share(reward_model, lora())
    own = make_policy(seed=5)
    assert type(policy) is type(own) and type(policy.get_base_model()) is type(own.get_base_model())
    assert not hasattr(policy.get_base_model(), "yojo") and not hasattr(policy.get_base_model(), "score")
    assert policy.config.to_dict() == own.config.to_dict()
    assert_same_tensors(trained_weights(policy), trained_weights(own))
    assert_same_tensors(policy.state_dict(), own.state_dict())

    losses, gradients = trained(policy, batch, between=lambda: score(judge))
    own_losses, own_gradients = trained(own, batch)
    assert losses == own_losses and len(set(losses)) == len(losses)
    for mine, others in zip(gradients, own_gradients, strict=True):
        assert_same_tensors(mine, others)
    assert_same_tensors(policy.state_dict(), own.state_dict())

    inputs = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(policy(**inputs).logits, own(**inputs).logits)
    drawn = []
    for model in (policy, own):
        torch.manual_seed(1)
        drawn.append(model.generate(**inputs, max_new_tokens=6, do_sample=True))
    assert torch.equal(*drawn)


def test_threads_score_while_the_policy_trains(reward_model, score, batch):
    torch.manual_seed(5)
    policy, judge = share(reward_model, lora(lora_dropout=0.0))
    before, own = score(judge), make_policy(seed=5)
    stop, scored, seen, failed = threading.Event(), threading.Semaphore(0), [], []

    def judge_on():
        try:
            while not stop.is_set():
                seen.append(score(judge))
                scored.release()
        except Exception as error:
            failed.append(error)

    thread = threading.Thread(target=judge_on)
    thread.start()
    try:
        # However threads take turns, neither runs ahead of the other one: training waits for a score wherever it may disturb.
        losses, _ = trained(policy, batch, steps=6, between=lambda: failed or scored.acquire(timeout=60))
    finally:
        stop.set()
        thread.join()
    assert not failed and len(seen) >= 3 * 6
    assert all(torch.equal(scores, before) for scores in seen)
    assert losses == trained(own, batch, steps=6)[0]


def test_only_the_policys_adapter_trains(reward_model):
    policy, _ = share(reward_model, lora())
    names = list(trained_weights(policy))
    assert names and all(".default." in name and "lora_" in name for name in names)
    with pytest.raises(RuntimeError, match="does not require grad"):
        policy.disable_adapter_layers()
        policy(input_ids=torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_training_mode_checkpointing_and_hooks_of_the_policy_are_its_own(reward_model, score, batch):
    before = score(reward_model)
    policy, judge = share(reward_model, lora(lora_dropout=0.5))
    policy.gradient_checkpointing_enable({"use_reentrant": False})
    policy.enable_input_require_grads()
    policy.train()
    policy.get_base_model().get_input_embeddings().register_forward_hook(lambda module, args, output: output * 0)
    with policy.disable_adapter():
        assert torch.equal(score(judge), before)
    assert policy.training and not reward_model.model.training
    policy(**batch).loss.backward()
    assert torch.equal(score(judge), before)
    assert not reward_model.model.get_base_model().is_gradient_checkpointing


def test_an_adapter_is_saved_by_itself_and_goes_on_the_plain_base(reward_model, batch, tmp_path):
    policy, _ = share(reward_model, lora())
    trained(policy, batch)
    policy.save_pretrained(tmp_path)
    saved = peft.utils.load_peft_weights(tmp_path)
    assert all("lora_" in name for name in saved)  # no embedding, no value head
    config = LoraConfig.from_pretrained(tmp_path)
    assert config.base_model_name_or_path == str(BACKBONE)
    loaded = PeftModel.from_pretrained(load_backbone()[0], tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, policy(**batch).logits)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 0.3)])
def test_merged_adapters_never_reach_the_reward_model(reward_model, score, batch, dtype, atol):
    """TRL merges the policy's adapter whenever it hands weights to vLLM, and takes it out again."""
    reward_model.model.to(dtype)
    before, was = score(reward_model), checksum(reward_model.model)
    policy, judge = share(reward_model, lora())
    trained(policy, batch, steps=1)
    inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    with torch.no_grad():
        logits, shared = policy(**inputs).logits, judge.shared_bytes()
        for _ in range(3):
            policy.merge_adapter()
            assert torch.equal(score(judge), before)
            assert judge.shared_bytes() < shared
            merged = policy(**inputs).logits
            assert not torch.equal(merged, logits) and (merged - logits).abs().max() < atol
            policy.unmerge_adapter()
        assert torch.equal(policy(**inputs).logits, logits)
    assert judge.shared_bytes() == shared
    assert checksum(reward_model.model) == was
    whole = policy.merge_and_unload()
    with torch.no_grad():
        assert torch.equal(whole(**inputs).logits, merged)
    assert torch.equal(score(judge), before) and checksum(reward_model.model) == was


def test_a_policy_that_moves_has_weights_of_its_own(reward_model, score):
    before = score(reward_model)
    policy, judge = share(reward_model, lora())
    policy.to(torch.bfloat16)
    assert judge.shared_bytes() == 0
    assert torch.equal(score(judge), before)
    assert policy.get_input_embeddings().weight.dtype is torch.bfloat16


# ---- reward models of other makes ----


def test_a_reward_model_without_adapter_shares_its_own_backbone(make_reward_model, backbone, sample):
    """Only its head was trained, say; or all of it, and then the policy starts from what it has become."""
    reward_model = make_reward_model()
    before = reward_model.score(digits.PROMPT, ANSWERS, images=[sample[0]])
    policy, judge = share(reward_model, lora())
    assert_same_tensors(
        {name: weight for name, weight in policy.state_dict().items() if "lora" not in name},
        {n: w for n, w in get_peft_model(copy.deepcopy(backbone[0]), lora()).state_dict().items() if "lora" not in n},
    )
    assert torch.equal(judge.score(digits.PROMPT, ANSWERS, images=[sample[0]]), before)
    assert reward_model.model.yojo.separator_id is not None  # it stayed patched
    assert not any(w.requires_grad for n, w in reward_model.model.named_parameters() if not n.startswith("score."))


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Gemma 3", "SmolVLM", "LLaVA-OneVision"])
def test_other_families(family):
    stock = real_processors.build(family)[0]
    model, processor = real_processors.build(family)
    yojo.patch(model, processor, mode="isolated", head_dim=16)
    reward_model = yojo.RewardModel(model, processor)
    picture, answers = real_processors.image(20, 16, 0), ["one cat", "a dog on a sofa"]
    model.requires_grad_(False)  # as `share` does: torch multiplies by a weight that takes gradients in another way
    before = reward_model.score("what is it", answers, images=[picture])
    config = LoraConfig(target_modules=r".*(q_proj|v_proj)")
    torch.manual_seed(0)
    policy, judge = share(reward_model, config)
    torch.manual_seed(0)
    own = get_peft_model(stock, copy.deepcopy(config))
    assert_same_tensors(policy.state_dict(), own.state_dict())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(0.05)
                own.get_parameter(name).fill_(0.05)
        ids = torch.tensor([[5, 20, 30, 40, 50]])
        ids = ids % min(policy.get_input_embeddings().weight.shape[0], 60)
        assert torch.equal(judge.score("what is it", answers, images=[picture]), before)
        assert torch.equal(policy(input_ids=ids).logits, own(input_ids=ids).logits)
    assert torch.equal(judge.score("what is it", answers, images=[picture]), before)


@pytest.mark.parametrize("loaded", [False, True])
def test_a_separator_in_a_spare_row_stays_out_of_the_policy(tmp_path, loaded):
    """The stock row is there again, in an embedding of the policy's own, and the reward model keeps the separator's."""
    stock = saved_cases.backbone()
    stock.save_pretrained(tmp_path / "base")
    reward_model = saved_cases.adapted(tmp_path / "base")
    if loaded:
        reward_model.save_pretrained(tmp_path / "saved")
        reward_model = yojo.RewardModel.from_pretrained(tmp_path / "saved")
    before, was = saved_cases.scores(reward_model), checksum(reward_model.model)
    policy, judge = share(reward_model, saved_cases.lora(modules_to_save=None))
    for name, weight in stock.state_dict().items():
        mine = policy.state_dict()
        found = f"base_model.model.{name}"
        assert torch.equal(mine[found if found in mine else found.replace("proj.", "proj.base_layer.")], weight), name
    assert torch.equal(saved_cases.scores(judge), before) and checksum(reward_model.model) == was
    embedding = policy.get_input_embeddings().weight
    assert judge.shared_bytes() == sum(storages(stock).values()) - embedding.nbytes


def test_an_adapter_with_the_separators_row_and_modules_of_its_own(tmp_path, make_reward_model, backbone, sample):
    reward_model = saved_cases.with_adapter(make_reward_model(), BACKBONE)
    before = reward_model.score(digits.PROMPT, ANSWERS, images=[sample[0]])
    torch.manual_seed(0)
    policy, judge = share(reward_model, lora(modules_to_save=["merger"]))
    own = make_policy(config=lora(modules_to_save=["merger"]))
    assert_same_tensors(policy.state_dict(), own.state_dict())
    assert any("modules_to_save" in name for name in trained_weights(policy))
    assert torch.equal(judge.score(digits.PROMPT, ANSWERS, images=[sample[0]]), before)


def test_a_policy_may_train_rows_of_the_embedding_in_a_copy(reward_model, score, batch):
    before = score(reward_model)
    policy, judge = share(reward_model, lora(modules_to_save=["embed_tokens"]))
    trained(policy, batch, steps=1)
    assert torch.equal(score(judge), before)
    policy, judge = share(reward_model, lora(trainable_token_indices={"embed_tokens": [5, 6]}))
    trained(policy, batch, steps=1)
    assert torch.equal(score(judge), before)


# ---- what cannot be shared ----


@pytest.mark.parametrize(
    "config, message",
    [
        (lora(bias="all"), "trains weights of the backbone, which are the reward model's, too .*bias.*modules_to_save"),
        (lora(init_lora_weights="pissa"), "changes .*init_lora_weights=True"),
    ],
)
def test_an_adapter_that_trains_or_changes_the_backbone_is_refused(reward_model, score, config, message):
    before, was = score(reward_model), checksum(reward_model.model)
    with pytest.raises(ValueError, match=message):
        share(reward_model, config)
    assert torch.equal(score(reward_model), before) and checksum(reward_model.model) == was


def test_a_merged_or_disabled_adapter_of_the_reward_model_is_refused(reward_model):
    reward_model.model.merge_adapter()
    with pytest.raises(ValueError, match="merged into its backbone .default.*unmerge_adapter"):
        share(reward_model, lora())
    reward_model.model.unmerge_adapter()
    reward_model.model.disable_adapter_layers()
    with pytest.raises(ValueError, match="disabled"):
        share(reward_model, lora())


def test_a_reward_model_whose_backbone_was_changed_is_refused(tmp_path):
    saved_cases.backbone().save_pretrained(tmp_path)
    reward_model = saved_cases.adapted(tmp_path)
    with torch.no_grad():
        reward_model.model.get_parameter("base_model.model.model.norm.weight").mul_(1.5)
    with pytest.raises(ValueError, match="trained beside the adapter.*model.norm.weight"):
        share(reward_model, saved_cases.lora(modules_to_save=None))


def test_wrong_arguments(reward_model):
    with pytest.raises(TypeError, match="reward_model must be a yojo.RewardModel, got Linear"):
        share(torch.nn.Linear(2, 2), lora())
    with pytest.raises(TypeError, match="shares a backbone already: share its reward_model"):
        share(share(reward_model, lora())[1], lora())
    with pytest.raises(TypeError, match="adapter must be a PEFT config, .*got dict"):
        share(reward_model, {"r": 4})
    with pytest.raises(TypeError, match="does not go into another process.*load_judge"):
        pickle.dumps(share(reward_model, lora())[1])


def test_no_score_where_the_policy_begins_to_train_the_backbone(reward_model, score):
    policy, judge = share(reward_model, lora())
    policy.requires_grad_(True)
    with pytest.raises(RuntimeError, match="policy trains weights of the backbone"):
        score(judge)


def test_no_score_where_shared_weights_have_changed(reward_model, score):
    """Whatever wrote into them: `.data` and the optimizer of another model tell no counter."""
    policy, judge = share(reward_model, lora())
    weight = policy.get_base_model().get_decoder().layers[1].mlp.up_proj.base_layer.weight
    weight.data += 1e-3
    with pytest.raises(RuntimeError, match="have changed .*layers.1.mlp.up_proj"):
        score(judge)
    with pytest.raises(RuntimeError, match="have changed"):
        yojo.GroupReward(judge, group_size=2, retries=0)(["a question"] * 2, ["one", "two"])


# ---- TRL ----


needs_trl = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed")


@needs_trl
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_with_one_backbone_goes_as_with_two(reward_model, beta, tmp_path, accelerate_state):
    """TRL's own trainer, its reference adapter and gradient checkpointing with it: the same figures to the bit."""
    was = checksum(reward_model.model)
    torch.manual_seed(3)
    policy, judge = share(reward_model, lora())
    runs = []
    for model, by in ((policy, judge), (make_policy(seed=3), load_reward_model())):
        trainer = make_trainer(tmp_path, model, yojo.GroupReward(by), beta=beta, max_steps=3)
        trainer.train()
        runs.append((logged(trainer), trained_weights(trainer.model)))
        assert list(trainer.model.peft_config) == (["default", "ref"] if beta else ["default"])
    (logs, weights), (own_logs, own_weights) = runs
    assert logs == own_logs and len(logs) == 3
    assert_same_tensors(weights, own_weights)
    assert any(entry["grad_norm"] > 0 for entry in logs)
    if beta:
        assert any(entry["kl"] > 0 for entry in logs)
    assert checksum(reward_model.model) == was
    judge.check()


@needs_trl
def test_saved_by_trl_it_loads_on_the_plain_base(reward_model, tmp_path, accelerate_state):
    policy, judge = share(reward_model, lora())
    trainer = make_trainer(tmp_path, policy, yojo.GroupReward(judge), max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    base = transformers.AutoModelForImageTextToText.from_pretrained(BACKBONE, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "saved")
    ids = torch.tensor([[5, 20, 30]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(input_ids=ids).logits, policy.eval()(input_ids=ids).logits)
