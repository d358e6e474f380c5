"""Tokenizers trained here, and chat templates, as the families' own processors have them."""

import collections
import math

import tokenizers
import transformers

CORPUS = (
    "The first digit is a seven and the second one is a two, drawn with a thin pen.",
    "What is shown in the picture? A cat sits on the mat; a dog runs to the left.",
    "Which of the two images is brighter? The colour of the first is a dull red, 0123456789.",
    "you are shown the following video: frame from 00:01 <5.0 seconds> assistant user system model User Assistant",
)


def byte_tokenizer(special, named=(), **options):
    """A byte-level BPE of a few merges.

    Args:
        special: special tokens, names beside them.
        named: dict name -> special token, which become attributes of the tokenizer (`image_token` and the like).
        **options: eos_token and others of `PreTrainedTokenizerFast`.
    """
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return _fast(backend, special, named, **options)


def marked_tokenizer(special, named=(), prepend="never", **options):
    """A Unigram with a space marker, as SentencePiece makes them: pieces of words by how often they stand in the corpus.

    (The trainer of tokenizers gives other pieces in every process.)

    Args:
        special, named, **options: as `byte_tokenizer`.
        prepend: whether text gets a marker in front ("first", "always") or not ("never").
    """
    counts = collections.Counter(map(chr, range(33, 127)))  # every sign is there at least once
    for word in " ".join(CORPUS).split():
        marked = f"▁{word}"
        counts.update(marked[i:j] for i in range(len(marked)) for j in range(i + 1, min(i + 6, len(marked)) + 1))
    pieces = sorted(piece for piece, count in counts.items() if len(piece) == 1 or count > 1)
    total = sum(counts[piece] for piece in pieces)
    vocabulary = [("<unk>", 0.0), ("\n", -2.0), *((piece, math.log(counts[piece] / total)) for piece in pieces)]
    backend = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=prepend)
    backend.decoder = tokenizers.decoders.Metaspace(replacement="▁", prepend_scheme=prepend)
    return _fast(backend, special, named, unk_token="<unk>", **options)


def _fast(backend, special, named, **options):
    named = dict(named)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, extra_special_tokens=named, **options)
    rest = [token for token in special if token not in named.values()]
    made.add_special_tokens({"additional_special_tokens": rest}, replace_extra_special_tokens=False)
    return made


CONTENT = "{%- macro parts(content) -%}{%- if content is string -%}{{ content }}{%- else -%}"
CONTENT += "{%- for part in content -%}{%- if part.type == 'image' -%}IMAGE{%- elif part.type == 'video' -%}VIDEO"
CONTENT += "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endmacro -%}"


def chatml(image, video, system=None):
    """Turns of <|im_start|>role, a line break, content and <|im_end|>; a system turn where none is given, or not."""
    template = CONTENT.replace("IMAGE", image).replace("VIDEO", video)
    if system:
        template += "{%- if messages[0].role != 'system' -%}<|im_start|>system\n" + system + "<|im_end|>\n{% endif -%}"
    template += "{%- for m in messages -%}<|im_start|>{{ m.role ~ '\n' ~ parts(m.content) }}<|im_end|>{{ '\n' }}"
    return template + "{%- endfor -%}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"


QWEN = ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")


ALTERNATE = (
    "{%- for m in messages -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) or m.role == 'system' -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}{%- endfor -%}"
)


# Images before all text, numbered where there are several; a blank before the assistant's turn that its generation
# prompt does not have.
MOLMO2 = (
    ALTERNATE + "{%- set count = namespace(images=0, seen=0) -%}"
    "{%- for m in messages -%}{%- if m.content is not string -%}{%- for p in m.content -%}{%- if p.type == 'image' -%}"
    "{%- set count.images = count.images + 1 -%}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{%- if m.content is not string -%}{%- for p in m.content -%}{%- if p.type == 'image' -%}"
    "{%- set count.seen = count.seen + 1 -%}{%- if count.images > 1 -%}{{ 'Image ' ~ count.seen }}{%- endif -%}"
    "{{ '<|image|>' }}{%- elif p.type == 'video' -%}{{ '<|video|>' }}{%- endif -%}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{ ' ' if m.role == 'assistant' and not loop.first }}<|im_start|>{{ m.role }}\n"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for p in m.content -%}{{ p.text if p.type == 'text' }}"
    "{%- endfor -%}{%- endif -%}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)


GEMMA3 = (
    "{{ bos_token }}{%- set turns = messages -%}{%- set first = '' -%}"
    "{%- if messages[0].role == 'system' -%}{%- set first = messages[0].content[0].text ~ '\n\n' -%}"
    "{%- set turns = messages[1:] -%}{%- endif -%}"
    "{%- for m in turns -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\n' ~ (first if loop.first) }}"
    "{%- if m.content is string -%}{{ m.content | trim }}{%- else -%}{%- for p in m.content -%}"
    "{{ '<start_of_image>' if p.type == 'image' else p.text | trim }}{%- endfor -%}{%- endif -%}"
    "{{ '<end_of_turn>\n' }}{%- endfor -%}{{ '<start_of_turn>model\n' if add_generation_prompt }}"
)


# Images first; text behind a line break; the generation prompt has no blank behind the role.
LLAVA_ONEVISION = (
    "{%- for m in messages -%}<|im_start|>{{ m.role ~ ' ' }}"
    "{%- if m.content is string -%}{{ '\n' ~ m.content }}{%- else -%}"
    "{%- for p in m.content -%}{{ '<image>' if p.type == 'image' }}{%- endfor -%}"
    "{%- for p in m.content -%}{{ '<video>' if p.type == 'video' }}{%- endfor -%}"
    "{%- for p in m.content -%}{{ '\n' ~ p.text if p.type == 'text' }}{%- endfor -%}{%- endif -%}<|im_end|>"
    "{%- endfor -%}{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


# ":" before an image and ": " before text; the generation prompt ends without the blank.
IDEFICS3 = (
    "<|im_start|>{%- for m in messages -%}{{ m.role | capitalize }}{{ ':' if m.content[0].type == 'image' else ': ' }}"
    "{%- for p in m.content -%}{{ '<image>' if p.type == 'image' else ('<video>' if p.type == 'video' else p.text) }}"
    "{%- endfor -%}<end_of_utterance>\n{% endfor -%}{{ 'Assistant:' if add_generation_prompt }}"
)


MISTRAL3 = (
    "{{ bos_token }}{%- set turns = messages -%}{%- set system = 'You are a careful model.' -%}"
    "{%- if messages[0].role == 'system' -%}{%- set system = messages[0].content[0].text -%}"
    "{%- set turns = messages[1:] -%}{%- endif -%}{{ '[SYSTEM_PROMPT]' ~ system ~ '[/SYSTEM_PROMPT]' }}"
    "{%- for m in turns -%}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('roles must alternate') }}{%- endif -%}{{ '[INST]' if m.role == 'user' }}"
    "{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for p in m.content -%}"
    "{{ '[IMG]' if p.type == 'image' else p.text }}{%- endfor -%}{%- endif -%}"
    "{{ '[/INST]' if m.role == 'user' else eos_token }}{%- endfor -%}"
)


# An empty block of thoughts before the answer, which the generation prompt does not have.
QWEN3 = (
    "{%- for m in messages -%}<|im_start|>{{ m.role ~ '\n' }}"
    "{{ '<think>\n\n</think>\n\n' if m.role == 'assistant' and loop.last }}{{ m.content }}<|im_end|>\n{% endfor -%}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)
