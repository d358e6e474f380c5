"""Reward models to save: with adapters, and on backbones that lie in folders."""

import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny import finished

import yojo


def with_adapter(reward_model, backbone_path):
    """The same reward model with a LoRA adapter that does something, as a PEFT user would wrap it."""
    from peft import LoraConfig, get_peft_model

    reward_model.model.config.name_or_path = str(backbone_path)
    separator = reward_model.collator.separator_id
    config = LoraConfig(
        r=4,
        target_modules=r".*language_model.*\.(q_proj|v_proj)",
        modules_to_save=["score"],
        trainable_token_indices={"embed_tokens": [separator]},
    )
    model = get_peft_model(reward_model.model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
                assert "lora" in name or "score" in name or "token" in name
    return yojo.RewardModel(model.eval(), reward_model.processor)


def tokenizer():
    """One token for each byte, of the kind that Qwen2's own tokenizer is."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<pad>")


def backbone(seed=0, **options):
    sizes = dict(vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.Qwen2Config(**(sizes | {"num_key_value_heads": 1, "max_position_embeddings": 128} | options))
    return finished(transformers.Qwen2ForCausalLM(config), seed=seed)


def patched(path, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, **options)
    processor = tokenizer()
    model = yojo.patch(model.eval(), processor, mode="isolated", head_dim=8)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model, processor


def adapted(path, config=None, **options):
    model, processor = patched(path)
    return yojo.RewardModel(moved(get_peft_model(model, config or lora(), **options)).eval(), processor)


def scores(reward_model):
    return reward_model.score(PROMPT, RESPONSES)


PROMPT, RESPONSES = "which one?", ["a six", "it is a nine"]


def lora(**options):
    return LoraConfig(**({"r": 2, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["score"]} | options))


def moved(model, words=("lora_", "ia3_"), seed=2):
    """Adapters begin without effect: give them one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(word in name for word in words):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model
