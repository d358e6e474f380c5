"""A few fixed examples and the scores that a model gave them when it was saved: whoever loads it can see that it still gives them.

Hashes tell one file from another; this tells that all of it together, weights, template, processor, library and device, still
scores as it did. One example is a conversation with several turns, the other shows an image, where the processor takes any.
The texts are stored beside their scores; the pixels are computed (`picture`), by a rule that has a number.
"""

import contextlib
import dataclasses
import logging
import sys

import numpy as np
import torch

from yojo.files.saved import CONFIG_FILE, local_folder, read_description
from yojo.inputs.example import Example
from yojo.inputs.packing import Collator, pack_in_parts
from yojo.patching import devices
from yojo.patching.state import patched_base
from yojo.saving.parts import adapter_of

logger = logging.getLogger(__name__)

KEY = "known_scores"  # in yojo_config.json
RULE = 1  # of the examples below; others, or other pixels, get another number
TURNS = [
    {"role": "user", "content": "Is a whale a fish? ¿Y un delfín? 鲸鱼呢？"},
    {"role": "assistant", "content": "No, both of them are mammals."},
    {"role": "user", "content": "Which one is larger?"},
]
ANSWERS = [
    "A whale.",
    "Both look the same: 🐋.",
    "The dolphin is the larger one, as you can see when they are side by side.",
]
QUESTION = "Which colour is bright in this picture, and where?"
COLOURS = [
    "Blue, in the middle.",
    "I see no picture here, none at all.",
    "Some red at the left, and more of the green to the right.",
]

# By dtype, for examples of text and for those with an image: a score may be off by so much, times the largest stored score of
# its example where that is above 1. Where the figures come from stands at `check`.
BOUNDS = {"float64": (1e-4, 1e-2), "float32": (1e-4, 1e-2), "float16": (1e-2, 2e-2), "bfloat16": (8e-2, 8e-2)}
_SHARDED = {"FullyShardedDataParallel", "FSDPModule"}


@dataclasses.dataclass(frozen=True)
class Known:
    """Whether a model gives the scores that it gave when it was saved.

    Attributes:
        ok: it does, or none are stored.
        stored: whether there are scores to compare with.
        reason: a sentence: what was found, or why there is nothing to compare with.
        difference: how far the score is off that is furthest off, measured by its bound; None where nothing was compared.
        bound: what that difference may be at most; None likewise.
    """

    ok: bool
    stored: bool
    reason: str
    difference: float | None = None
    bound: float | None = None


def picture():
    """The pixels of rule 1, from integers alone: slopes and a grid, which resizing and cropping leave something of.

    Returns:
        array [48, 64, 3] of uint8.
    """
    y, x = np.mgrid[:48, :64]
    red = 3 * x + y
    green = 255 - 4 * y + x // 2
    blue = 40 * (x // 8 % 2 + y // 8 % 2) + x * y // 16
    return np.stack([red, green, blue], axis=-1).clip(0, 255).astype(np.uint8)


def take(reward_model, state_dict=None):
    """Score the examples with a model that is about to be saved, in the mode it is saved with.

    One pass without gradients over one row of a few hundred tokens. Nothing of the model changes, no random number is drawn,
    nothing is compiled, no other process is waited for, and whatever goes wrong is a reason and no error.

    Args:
        reward_model: a `yojo.RewardModel`.
        state_dict: what `save_pretrained` was given; weights that come from outside are not those that a pass would use.

    Returns:
        dict, as JSON has it: `rule`; `mode`, `permutations` and `dtype` of the pass; `examples`, a list of dicts with `name`,
        `prompt`, `responses`, `images` (how many) and `scores` (float32, exactly); and `left_out`, name -> reason. Or `rule` and
        the `reason` why there are none.
    """
    try:
        base = patched_base(reward_model.model, "save_pretrained")
        model = _inside(reward_model.model)
        obstacle = _obstacle(model, base, state_dict)
        if obstacle is not None:
            logger.info("a model is saved without known scores: %s", obstacle)
            return {"rule": RULE, "reason": obstacle}
        with _as_it_is():
            return _taken(model, base, reward_model.processor)
    except Exception as error:
        logger.warning("a model is saved without known scores: %s: %s", type(error).__name__, error)
        return {"rule": RULE, "reason": f"scoring them failed with {type(error).__name__}"}  # its text may hold paths


def describe(path):
    """What is stored with a saved model.

    Args:
        path: folder that `save_pretrained` wrote, or a hub name.

    Returns:
        dict, what `take` gave; None for a model that was saved without, and for a trainer's checkpoint.

    Raises:
        ValueError: no such folder, or one whose settings are damaged.
    """
    path = local_folder(path)
    return read_description(path).get(KEY) if (path / CONFIG_FILE).is_file() else None


def check(reward_model, source):
    """Score the stored examples again, in the mode in which they were, and compare.

    What rounding does was measured on a CPU with the demonstration's model, the tiny models of tests/real_processors.py (twelve
    families, both modes), and text models of 8 and 28 layers with random weights, relative to an example's largest score or 1. Float32: 1.5e-6 between the reference and the
    attention that CPUs have, 5e-7 between one and two threads, 2e-7 alone or in a row; `tests/test_stored_scores.py` saw 1.1e-5
    without vector instructions. Pixels weigh more: torchvision's resizing without vector instructions moved a score by 1.2e-3,
    Pillow's in its place by 5.2e-3. Bfloat16: 1.7e-2 between implementations, 3.8e-2 from float32; float16: 4.3e-3. The bounds
    (`BOUNDS`) are twice that or more: 1e-4 in float32, 0.01 with an image, 0.08 in bfloat16, 0.01 in float16, 0.02 with an image;
    of two dtypes, the larger one. GPUs were not measured.

    With a fault in them, the same models moved in float32 by 0.13 and more for one matrix with its rows exchanged, 0.28 for another
    head or another separator's row, 0.05 for another image mean, and 0.05 for three line breaks less in the chat template. What
    is as small as that stays within the bounds of bfloat16, and a weight that is off by a percent, or another filter of resizing,
    within some others: for those, the folder has hashes.

    Args:
        reward_model: a `yojo.RewardModel`, in whatever mode; it stays in it.
        source: the folder it was saved in (or hub name), or what that folder's yojo_config.json holds, a dict.

    Returns:
        `Known`. A model that was saved without known scores is ok, and says so.

    Raises:
        ValueError: no such folder, or one whose settings are damaged.
    """
    stored = source.get(KEY) if isinstance(source, dict) else describe(source)
    if stored is None:
        return Known(True, False, "the model was saved without known scores, so there is nothing to compare with")
    if isinstance(stored, dict) and "reason" in stored:
        return Known(True, False, f"no scores were stored when the model was saved: {stored['reason']}")
    try:
        if stored["rule"] != RULE:
            return Known(False, True, f"the known scores follow rule {stored['rule']}, and this YOJO knows rule {RULE}")
        examples = [_example(one) for one in stored["examples"]]
        expected = [torch.tensor(one["scores"], dtype=torch.float32).reshape(-1) for one in stored["examples"]]
        if not examples or any(known.numel() == 0 or not known.isfinite().all() for known in expected):
            raise ValueError("an example without scores")
        mode = {name: stored[name] for name in ("mode", "permutations")}
        saved_in = stored["dtype"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Known(False, True, f"the known scores in {CONFIG_FILE} are damaged: {type(error).__name__}: {error}")
    try:
        base = patched_base(reward_model.model, "check_known_scores")
        collator = _collator(reward_model.processor, base, **mode)
        encoded = [collator.encode(example, place, rankings=False) for place, example in enumerate(examples)]
        found = _scores(_inside(reward_model.model), base, collator, encoded)
    except Exception as error:
        return Known(False, True, f"the known scores could not be compared, since scoring failed: {error}")
    return _compared(examples, found, expected, saved_in, _name(base.dtype))


def _taken(model, base, processor):
    collator = _collator(processor, base)
    described, encoded, left_out = _encoded(collator)
    scores = []
    try:
        scores = _scores(model, base, collator, encoded) if encoded else []
    except Exception as error:
        if len(encoded) == 1:
            raise
        logger.info("%s is left out of a saved model's known scores: %s", described[-1]["name"], error)
        left_out[described.pop()["name"]] = f"scoring it failed with {type(error).__name__}"
        scores = _scores(model, base, collator, encoded[:-1])
    kept = []
    for one, found in zip(described, scores, strict=True):
        if found.isfinite().all():
            kept.append({**one, "scores": found.tolist()})
        else:
            left_out[one["name"]] = "its scores are not finite"
    if not kept:
        return {"rule": RULE, "reason": "; ".join(f"{name}: {reason}" for name, reason in left_out.items())}
    mode = {"mode": collator.config.mode, "permutations": collator.config.permutations}
    return {"rule": RULE, **mode, "dtype": _name(base.dtype), "examples": kept, "left_out": left_out}


def _encoded(collator):
    """(the examples as they are stored, as tokens, dict of what is left out: name -> reason)."""
    described, encoded, left_out = [], [], {}
    # Not every template takes turns, and the text format "mr2rm" does not.
    for name, prompts, responses, images in (
        ("text", (TURNS, TURNS[-1]["content"]), ANSWERS, 0),
        ("image", (QUESTION,), COLOURS, 1),
    ):
        if images and getattr(collator.processor, "image_processor", None) is None:
            left_out[name] = "the processor takes no images"
            continue
        for prompt in prompts:
            one = {"name": name, "prompt": prompt, "responses": responses, "images": images}
            try:
                encoded.append(collator.encode(_example(one), rankings=False))
            except (TypeError, ValueError) as error:
                logger.info("%s cannot be one of a saved model's known scores: %s", name, error)
                left_out[name] = "the processor or its chat template refuses it"
            else:
                described.append(one)
                left_out.pop(name, None)
                break
    return described, encoded, left_out


def _example(one):
    return Example(one["prompt"], one["responses"], images=[picture()] * one["images"], id=one["name"])


def _collator(processor, base, **mode):
    """A collator of its own, without a longest length, for rows of the model's mode or of another one."""
    collator = Collator(processor, base)
    collator.config = dataclasses.replace(collator.config, **mode)
    return collator


@torch.no_grad()  # not inference mode: what a model keeps of a pass, a later training pass may need
def _scores(model, base, collator, encoded):
    """list of [N] float32 on the CPU, those of one row."""
    device = devices.input_device(base)
    # accelerate's mixed precision stands around the forward of a model in training, and around none that is loaded.
    forward = vars(model).get("_original_forward", model)
    found = []
    with base.yojo.eval_mode.of(model), torch.autocast(device.type, enabled=False):
        for some, batch in pack_in_parts(collator.pack, encoded):
            table = forward(**{name: devices.sent(value, device) for name, value in batch.items()}).scores.float().cpu()
            found += [row[: len(item.responses)] for row, item in zip(table, some, strict=True)]
    return found


def _inside(model):
    """The model, PEFT's wrapper included, without those around it that compile it or wait for other processes."""
    return adapter_of(model) or patched_base(model, "save_pretrained")


def _obstacle(model, base, state_dict):
    """Why a model is not scored when it is saved, or None."""
    if state_dict is not None:
        return "its weights were handed over as a state dict, and those of the model may be shards"
    sharded = any(_SHARDED & {cls.__name__ for cls in type(module).__mro__} for module in model.modules())
    if sharded or any(hasattr(p, "full_tensor") or hasattr(p, "ds_id") for p in model.parameters()):
        return "its weights are shards of several processes, which would all have to score"
    if (getattr(base, "_tp_size", None) or 1) > 1:
        return "its weights are split over several processes, which would all have to score"
    return None


@contextlib.contextmanager
def _as_it_is():
    """Within it nothing is compiled: a save in the midst of training should not take a minute for a graph of its own."""
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def _compared(examples, found, expected, saved_in, dtype):
    where = f"in {dtype}" if dtype == saved_in else f"in {dtype}, stored in {saved_in}"
    worst = None
    for example, scores, known in zip(examples, found, expected, strict=True):
        if scores.shape != known.shape:
            return Known(False, True, f"{example.id} has {len(scores)} scores, and {len(known)} are stored")
        if not scores.isfinite().all():
            return Known(False, True, f"the scores of {example.id} are not finite ({where})")
        bound = _bound(example, known, saved_in, dtype)
        difference = (scores - known).abs()
        at = int(difference.argmax())
        one = float(difference[at]), bound, example.id, at, float(scores[at]), float(known[at])
        if worst is None or one[0] / one[1] > worst[0] / worst[1]:
            worst = one
    difference, bound, name, at, score, known = worst
    if difference <= bound:
        text = f"the model gives its known scores, {difference:.1g} apart at most ({where})"
        return Known(True, True, text, difference, bound)
    text = (
        f"{name}: response {at} scores {score:.6g}, and scored {known:.6g} when the model was saved ({where}), where rounding "
        f"makes {bound:.1g} at most: weights, chat template, processor or separator are not those that were saved"
    )
    return Known(False, True, text, difference, bound)


def _bound(example, known, *dtypes):
    kind = 1 if example.images else 0
    allowed = max(BOUNDS.get(dtype, BOUNDS["bfloat16"])[kind] for dtype in dtypes)
    return allowed * max(1.0, float(known.abs().max()))


def _name(dtype):
    return str(dtype).removeprefix("torch.")
