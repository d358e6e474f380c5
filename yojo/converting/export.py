"""Reward models for other tools: the released code's layout, and stock sequence classifiers as TRL uses them."""

import copy
import dataclasses

import torch

from yojo.config import YojoConfig
from yojo.converting.merge import merged
from yojo.converting.released import export_mr2rm
from yojo.files import saved
from yojo.files.folders import replaced_folder
from yojo.inputs.example import Example
from yojo.patching import dates
from yojo.patching.separator import folded
from yojo.patching.state import patched_base, tokenizer_of
from yojo.reward_model import RewardModel
from yojo.saving.load import load_pretrained

FORMATS = ("mr2rm", "trl")

# Wrapped around a chat template: a conversation that ends with the assistant's turn becomes its prompt, the generation
# prompt, the answer and the ending. Expressions rather than blocks at the seams, so that no line break of the template
# itself is trimmed.
_BEFORE = (
    "{%% set yojo_ending = '' %%}{%% if messages and messages[-1]['role'] == 'assistant' and not add_generation_prompt %%}"
    "{%% set yojo_answer = messages[-1]['content'] %%}"
    "{%% set yojo_answer = yojo_answer if yojo_answer is string else yojo_answer | map(attribute='text') | join %%}"
    "{%% set yojo_ending = yojo_answer ~ %s %%}{%% set messages = messages[:-1] %%}"
    "{%% set add_generation_prompt = true %%}{%% endif %%}{{ '' }}"
)
_BEHIND = "{{ yojo_ending }}"


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an export gives.

    Attributes:
        format: "mr2rm" or "trl".
        bias: what has to be added to the exported model's scores to make them the reward model's; 0.0 for "mr2rm".
    """

    format: str
    bias: float = 0.0


def export(path, out, *, format, base_model=None, check_base=True, check_files=True):
    """Write a saved reward model in the format of another tool.

    Args:
        path: folder or hub name of a reward model.
        out: folder.
        format: "mr2rm" (see `yojo.converting.released.export_mr2rm`) or "trl" (see `export_trl`; an adapter is merged first).
        base_model: for an adapter, where its base model lies if not where it was when the adapter was saved.
        check_base, check_files: as for `yojo.saving.load.load_pretrained`.

    Returns:
        `Exported`.

    Raises:
        ValueError: a format or a model that cannot be exported, with the reason.
    """
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    path = saved.local_folder(path)
    options = {"base_model": base_model, "check_base": check_base, "check_files": check_files}
    description = saved.read_description(path)
    if format == "mr2rm":
        reward_model = RewardModel(*load_pretrained(path, **options))
        export_mr2rm(reward_model, out)
        return Exported(format)
    _check_settings(YojoConfig.from_saved(description["config"]))
    if description["adapter"]:
        reward_model = merged(path, **options)
    else:
        reward_model = RewardModel(*load_pretrained(path, **options))
    return Exported(format, export_trl(reward_model, out))


def export_trl(reward_model, out):
    """Write a reward model as a stock `AutoModelForSequenceClassification` with one label, as TRL's reward tools use it.

    Its score is the `score` layer's output at the last token that is no padding. The tokenizer's chat template is
    changed: a conversation that ends with the assistant's turn is rendered as its prompt, the generation prompt, the
    answer and the separator, so that `tokenizer.apply_chat_template(messages)` is what our own scores are read from.
    (A tokenizer that merges the prompt's end with the answer's beginning into one token, an answer that holds special
    tokens, or blanks around it that the template takes away give other tokens and so other scores.)

    Args:
        reward_model: a `yojo.RewardModel` in isolated mode, with the linear head, the pooling "separator" or "last", and
            a text-only backbone that transformers has a sequence classifier for; no adapter.
        out: folder.

    Returns:
        float: the constant that TRL's layer, which has no bias, lacks: our score is the classifier's plus this. It
        changes no comparison.

    Raises:
        ValueError: a model for which no such classifier exists, with the reason.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING as KNOWN

    base, config = patched_base(reward_model.model, "export"), reward_model.config
    _check_settings(config)
    if base is not reward_model.model:
        raise ValueError(
            "the model is wrapped, by PEFT perhaps: merge its adapter first (yojo merge), and export the result"
        )
    tokenizer = tokenizer_of(reward_model.processor)
    name = type(base).__name__
    if tokenizer is not reward_model.processor or type(base.config) not in KNOWN:
        raise ValueError(f"transformers has no sequence classifier for {name} with the images and videos it takes")
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template that could be changed to end with the separator")
    if isinstance(tokenizer.chat_template, dict):
        raise ValueError("the tokenizer has several chat templates; leave the one that prompts are rendered with")
    settings = copy.deepcopy(base.config)
    settings.__dict__.pop("yojo", None)
    settings.num_labels = 1
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None or tokenizer.pad_token == config.separator:
        raise ValueError("the tokenizer has no padding token, and the classifier tells the last token by it")
    settings.pad_token_id = tokenizer.pad_token_id
    settings._attn_implementation = base.yojo.stock_attention
    with torch.device("meta"):
        model = KNOWN[type(base.config)](settings)
    scale = base.score.scale
    backbone = model.base_model_prefix
    state = {f"{backbone}.{key}": value for key, value in base.base_model.state_dict().items()}
    embedding = next(name for name, module in base.named_modules() if module is base.get_input_embeddings())
    if f"{embedding}.weight" not in state:
        raise ValueError(f"{type(model).__name__} and {name} name their embedding differently")
    state[f"{embedding}.weight"] = folded(
        base.get_input_embeddings(),
        state[f"{embedding}.weight"],
        reward_model.collator.separator_id,
        base.score.separator_delta,
    )
    state["score.weight"] = (base.score.weight2.detach() / scale).to(base.dtype)
    expected = set(model.state_dict())
    if set(state) != expected:
        differing = sorted(set(state) ^ expected)
        raise ValueError(f"{type(model).__name__} and {name} have different weights: {', '.join(differing[:5])}")
    bias = base.score.bias2.item() / scale
    ending = config.separator if config.pooling == "separator" else ""
    before = _BEFORE % ("'" + ending.replace("\\", "\\\\").replace("'", "\\'") + "'")
    template = dates.template_options(reward_model.processor).get("chat_template", tokenizer.chat_template)
    tokenizer.chat_template = before + template.removesuffix("\n") + _BEHIND
    _check_turn(reward_model, tokenizer)
    with replaced_folder(out, mark="config.json") as staging:
        model.to(base.dtype).save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
        if not saved.has_foreign_card(out):
            (staging / saved.CARD_FILE).write_text(_text(type(model).__name__, bias))
    return bias


def _check_settings(config):
    if config.mode != "isolated":
        raise ValueError(
            f"the model has mode={config.mode!r}, where a score depends on the responses before it; a sequence classifier "
            "sees one response at a time: only mode='isolated' can be exported to TRL"
        )
    if config.head != "linear":
        raise ValueError(
            f"the model has head={config.head!r}; a sequence classifier has one linear layer: only head='linear' can be "
            "exported to TRL"
        )
    if config.pooling not in ("separator", "last"):
        raise ValueError(
            f"the model has pooling={config.pooling!r}; a sequence classifier reads the last token: only "
            "pooling='separator' or 'last' can be exported to TRL"
        )


def _check_turn(reward_model, tokenizer):
    """Refuse a template that puts something else before an answer than the generation prompt, as our scores have it."""
    question, answer, collator = "What is it?", "A test.", reward_model.collator
    ours = collator.encode(Example(question, [answer]))
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    theirs = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    wanted = [*ours.prompt_ids.tolist(), *ours.responses[0]]
    if list(theirs) != (wanted if reward_model.config.pooling == "separator" else wanted[:-1]):
        raise ValueError(
            "the chat template puts something else before an answer than its generation prompt, which the model was trained "
            "with (turn='template') and a template that is made of the generation prompt cannot say; train with "
            "turn='generation_prompt' to export to TRL"
        )


def _text(name, bias):
    return f"""{saved.CARD_SIGN}

# Reward model

A `{name}` with one label, made from a YOJO reward model. Render prompt and answer with the tokenizer's chat template, the
answer as the last turn; the logit is the score. The reward model's own score is the logit plus {bias!r}.

## License

To be stated by whoever publishes the model; the base model's license applies too.
"""
