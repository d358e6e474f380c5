"""Templates that open the assistant's turn as released ones do, and fast tokenizers trained here to tokenise them."""

import functools

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

import yojo

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|pad|>", "<end_of_utterance>"]
THOUGHTS = ["<think>", "</think>"]  # added, not flagged special, as in Qwen3

_TEXT = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endif %}"
)

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # SmolVLM, Idefics 3: a blank before the text, none at the end of the generation prompt.
    "smolvlm": "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}",
    # Qwen3: thoughts are parsed out of the answer, and written before it even where there are none.
    "qwen3": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% set t = '' %}{% set c = m.content %}"
    "{% if '</think>' in c %}{% set t = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<think>\n{{ t.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # Qwen3's thinking models: the generation prompt opens the thoughts.
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n\n</think>\n\n"
    "{{ m.content }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
    # DeepSeek R1: thoughts are dropped from the answer, and opened by the generation prompt.
    "deepseek": "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}<|assistant|>"
    "{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}",
    "llava_onevision": "{% for m in messages %}<|im_start|>{{ m.role }} {{ '\n' }}{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "molmo2": "{% for m in messages %}{% if not loop.first %} {% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    # Gemma 3, Llama 3: blanks around a text are taken away.
    "gemma3": "<s>{% for m in messages %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
    "zephyr": "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]{% else %} {{ m.content }} </s>"
    "{% endif %}{% endfor %}",
    "vicuna": "{% for m in messages %}{{ 'USER' if m.role == 'user' else 'ASSISTANT' }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
    # No generation prompt at all.
    "headless": "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}",
}

CORPUS = [
    "The cat sat on the mat. What is it? A dog, a house and a bird.\n\nIt is good, better than the other one.",
    "user\nassistant\nAssistant: User: model USER ASSISTANT [INST] [/INST] one two three four five   six\n\nseven",
    "yes no maybe; the answer is 42! Good idea. ein Hase, l'été, 猫がいる。 def f(x):\n    return x + 1\n",
] * 4


@functools.cache
def _trained(kind):
    if kind == "bytes":  # GPT-2, Qwen, Llama 3
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    elif kind == "unigram":  # T5, XLM-R: every text begins with the space marker
        backend = tokenizers.Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Metaspace(prepend_scheme="always")
        trainer = trainers.UnigramTrainer(
            vocab_size=220, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
        )
    else:
        backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
        if kind == "llama2":  # each stretch between special tokens begins with the marker
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:  # "first", Mistral and Llama 2 as converted later: the text's very first word alone
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        trainer = trainers.BpeTrainer(
            vocab_size=220, special_tokens=["<unk>"], initial_alphabet=["\n"], show_progress=False
        )
    # As SentencePiece does, without tokens that hold a line break and something else.
    lines = kind in ("llama2", "first")
    backend.train_from_iterator([line for text in CORPUS for line in text.split("\n")] if lines else CORPUS, trainer)
    return backend.to_str()


KINDS = ("bytes", "unigram", "llama2", "first")


def tokenizer_of_kind(kind, template=None, special=SPECIAL, added=THOUGHTS):
    """A fast tokenizer of one of `KINDS`, with the chat template of that name."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_trained(kind)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<|pad|>",
        **({} if kind == "bytes" else {"unk_token": "<unk>"}),
        extra_special_tokens=list(special),
    )
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=False, normalized=False) for token in added])
    if template is not None:
        tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


def rendered_ids(tokenizer, prompt, response):
    """(ids of the conversation up to the answer's end, whether a token crosses that end); the answer may be trimmed."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    at = text.rfind(response)
    kept = response if at >= 0 else response.strip()
    end = (at if at >= 0 else text.rfind(kept)) + len(kept)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    pairs = list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))
    return [i for i, (_, stop) in pairs if stop <= end], any(start < end < stop for _, (start, stop) in pairs)


def image_processor(template):
    """A real Qwen3-VL processor with the template of another family and a byte-level vocabulary."""
    from yojo.demo.backbone import build_processor
    from yojo.inputs.processors import image_only

    special = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = tokenizer_of_kind("bytes", special=(*SPECIAL, *special))
    template = TEMPLATES[template].replace("{{ m.content }}", _IMAGES)
    return image_only(transformers.Qwen3VLProcessor)(
        build_processor().image_processor, tokenizer, chat_template=template
    )


def text_model(tokenizer, **options):
    config = transformers.Qwen3Config(
        vocab_size=480,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)
    return yojo.RewardModel(yojo.patch(model, tokenizer, **options), tokenizer)


def merging_tokenizer():
    """A byte-level BPE in which line breaks merge with a full stop before them, as in the large models' vocabularies."""
    import tokenizers
    import transformers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(
                tokenizers.Regex(r" ?[^\s\w<|>]+[\r\n]*|\s*[\r\n]+| ?\w+|[<|>]|\s+"), behavior="isolated"
            ),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    text = ["yes.\n\n", "no.\n\n", "one two\n\n\n", "three four.\n\n", "user\nassistant\n", "\n\n\n", "fine.\n"] * 30
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(text, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|pad|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return made


_IMAGES = (
    "{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{% if p.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}"
)
