"""The model card that `save_pretrained` writes: where a reward model comes from, what it computes, how to load it."""

import json
from pathlib import Path

from yojo.files.saved import CARD_FILE, CARD_SIGN, has_foreign_card

_KEYS = ("data", "metrics", "notes")


def check(provenance):
    """Raise a TypeError where provenance is not a dict with text keys."""
    if provenance is None:
        return
    if not isinstance(provenance, dict) or not all(isinstance(key, str) for key in provenance):
        raise TypeError(f"provenance must be a dict of what the card should say, got {type(provenance).__name__}")
    if not isinstance(provenance.get("metrics", {}), dict):
        raise TypeError(f"provenance['metrics'] must be a dict of figures, got {provenance['metrics']!r}")


def leave_out(staging):
    """No card in a folder that is being written, not even PEFT's."""
    (staging / CARD_FILE).unlink(missing_ok=True)


def write(staging, folder, description, provenance=None):
    """Write the card into a folder that is being written, unless the one it replaces has a card of other origin.

    Args:
        staging: the folder being written.
        folder: the one it will replace.
        description: what `yojo_config.json` will hold.
        provenance: see `yojo.saving.save.save_pretrained`.
    """
    if has_foreign_card(folder):
        leave_out(staging)
    else:
        (staging / CARD_FILE).write_text(text(description, provenance))


def text(description, provenance=None):
    """The card of a description: markdown with the hub's metadata on top; the license is left to the user."""
    provenance = provenance or {}
    config, base = description["config"], description["base_model"]
    metadata = ["library_name: yojo", "tags:", "- reward-model", "- yojo"]
    if base and not base.startswith((".", "/", "~")) and base.count("/") == 1:
        metadata.append(f"base_model: {base}")
    kind = "an adapter" if description["adapter"] else "a full model"
    lines = [
        "---",
        *metadata,
        "---",
        CARD_SIGN,
        "",
        "# Reward model",
        "",
        f"Scores N responses to one prompt in one forward pass, {config['mode']} mode; {kind} of class "
        f"`{description['model_class']}` ({description['dtype']}).",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {_name(base)} |",
        *(f"| {name} | {_cell(value)} |" for name, value in config.items()),
    ]
    if description.get("quantization"):
        quantization = description["quantization"]
        bits = next((n for n in ("4", "8") if quantization.get(f"load_in_{n}bit")), None)
        method = quantization.get("quant_method", "yes")
        lines.append(f"| quantization | {method}{f', {bits} bit' if bits else ''} |")
    if description.get("date"):
        lines.append(f"| date that the chat template prints | {description['date']} |")
    lines += [f"| {name} | {version} |" for name, version in description["made_with"].items()]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "import yojo",
        "",
        'reward_model = yojo.RewardModel.from_pretrained("this folder or its name on the hub")',
        'reward_model.score("What is shown?", ["A cat.", "A dog."], images=["picture.png"])',
        "```",
        "",
    ]
    if "data" in provenance:
        lines += ["## Data", "", _paragraph(provenance["data"]), ""]
    if provenance.get("metrics"):
        lines += ["## Figures", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {_cell(value)} |" for name, value in provenance["metrics"].items()] + [""]
    rest = {name: value for name, value in provenance.items() if name not in _KEYS}
    if rest:
        lines += ["## Origin", "", *(f"- {name}: {_paragraph(value)}" for name, value in rest.items()), ""]
    if "notes" in provenance:
        lines += ["## Notes", "", _paragraph(provenance["notes"]), ""]
    lines += [
        "## License",
        "",
        "To be stated by whoever publishes the model; the base model's license applies too.",
        "",
    ]
    return "\n".join(lines)


def _name(base):
    """A hub name as it is, a local folder by its last part alone: where it lay is nobody's business."""
    if not base:
        return "not recorded"
    return base if base.count("/") == 1 and not base.startswith((".", "/", "~")) else Path(base).name


def _cell(value):
    return str(value).replace("|", "\\|").replace("\n", " ")


def _paragraph(value):
    return value if isinstance(value, str) else json.dumps(value, default=str)
