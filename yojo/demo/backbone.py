"""The demonstration's backbone: a Qwen3-VL of about a million parameters with a word-level tokenizer."""

import re
from pathlib import Path

from yojo.demo import digits
from yojo.inputs.processors import image_only, load_processor

BACKBONE = Path(__file__).parent / "backbone"

PATCH_SIZE = 8
MERGE_SIZE = 2

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<unk>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# A line break, a single numeral, a word, or any other sign.
TOKEN_PATTERN = r"\n|\d|[^\W\d]+|[^\w\s]"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string -%}
{{ message.content }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part -%}
<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' or 'text' in part -%}
{{ part.text }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""

# Words that people may well write about a picture of a digit. Pre-training never shows most of them, but a reward
# model trained on sentences that use them can learn them, where a tokenizer without them would only see <unk>.
COMMON_WORDS = """
a about above across actually after again against all almost alone along already also although always am among an and
another answer any anyone anything appear appears are area around as ask at away back background bad be because become
been before began begin behind being believe below best better between big black blue both bottom bright brown but by
call called came can cannot caption centre center certain certainly change character child circle clear clearly close
closed colour color come complete completely confident contain contains correct correctly could count curve curved
dark definitely depicted depicts describe did different digit digits dim display displayed displays do does doing done
doubt down draw drawing drawn each easy eight either else empty end enough entirely even ever every everything exactly
example explain eye eyes face fact faint false far few figure find fine first five follow following for found four from
full gave get give given go going gone good got grade gray great green grey guess had half hand handwriting handwritten
happy hard has have having he hello help her here hers high him his hold horizontal how however human i idea identify
if image images in indeed ink inside instead interesting into is it its itself job just keep kind know known large last
later least left less let letter letters light like likely line lines little long look looked looking looks loop loops
lot low made main make makes man many mark marks matter may maybe me mean means middle might mine mistake more most much
must my name narrow near nearly need never new next nice night nine no none nor not note nothing now number numbers
numeral numerals obvious obviously odd of off often ok okay old on once one only open or orange order other our out
outside over own paper part pen pencil people perhaps person photo photograph picture pictures piece pink pixel pixels
place plain please point possible possibly present pretty probably problem purple put question quite rather read reading
reads real really reason recognise recognize red represents response result right round row said same sample saw say
saying says scan score second see seem seems seen sense sentence set seven several shape shaped sharp she short should
show showing shown shows side sign similar simple simply since single six size sketch slightly small so some somebody
someone something sorry square stands start still straight stroke strokes such suggests sure surely symbol take tell ten
text than thank thanks that the their them then there these they thick thin thing things think third this those though
thought three through time tiny to today together told too top toward true truth try turn twice two under understand
unlikely unsure until up upon upper us use used value very view visible want was way we well went were what whatever
when where whether which while white who whole whose why wide will with within without woman word words work would
write writes writing written wrong wrote yellow yes yet you your zero
"""


def build_tokenizer():
    """The word-level tokenizer: lower case, one token per word, numeral or punctuation mark.

    Returns:
        A `transformers.PreTrainedTokenizerFast`; it pads with <|endoftext|> and ends a turn with <|im_end|>.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: row for row, token in enumerate((*SPECIAL_TOKENS, *_words()))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token.startswith(("<|im_s", "<|v", "<|image"))],
        clean_up_tokenization_spaces=True,
        model_max_length=1024,
    )


def build_processor():
    """The processor: a `Qwen3VLProcessor` for images, which makes every square image four image tokens."""
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLProcessor

    pixels = digits.IMAGE_SIZE**2
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH_SIZE,
        merge_size=MERGE_SIZE,
        temporal_patch_size=2,
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return image_only(Qwen3VLProcessor)(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_model(seed):
    """The untrained model, in float32.

    Args:
        seed: of the initial weights; torch's global random state is left as it was.

    Returns:
        A `transformers.Qwen3VLForConditionalGeneration` whose token ids are those of `build_tokenizer()`.
    """
    import torch
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = build_tokenizer()
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": None,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH_SIZE,
            "spatial_merge_size": MERGE_SIZE,
            "temporal_patch_size": 2,
            "out_hidden_size": 128,
            "num_position_embeddings": (digits.IMAGE_SIZE // PATCH_SIZE) ** 2,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.generation_config.pad_token_id = ids["<|endoftext|>"]
    return model


def load_backbone():
    """The pre-trained model and its processor, as shipped with the package.

    Returns:
        (model, processor): a `Qwen3VLForConditionalGeneration` in float32 and evaluation mode, and its
        `Qwen3VLProcessor`.
    """
    import torch
    from transformers import Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(BACKBONE, dtype=torch.float32)
    return model, load_processor(BACKBONE)


def _words():
    """Everything the tokenizer knows besides special tokens, in a fixed order."""
    phrases = " ".join((*digits.QUESTIONS, *digits.TEMPLATES, *digits.WORDS)).replace("{n}", "").replace("{a}", "")
    signs = ["\n", *"0123456789", *".,!?:;-'\"()/&%+=*#", "user", "assistant", "system"]
    words = re.findall(TOKEN_PATTERN, phrases.lower() + COMMON_WORDS)
    return list(
        dict.fromkeys(
            [
                *signs,
                *words,
                *["s", "t", "d", "ll", "re", "ve", "m", "isn", "doesn", "don", "didn", "wasn", "aren", "won"],
            ]
        )
    )
