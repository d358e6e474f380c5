"""Chat templates that print today's date get the day the model was patched on: scores do not change overnight.

Mistral Small, Llama 3.2, Granite and others ask `strftime_now` for the date. The day is settled once, when a model is
patched with such a processor, goes with the processor from then on, and is saved with the model.
"""

import copy
import datetime
import functools
import logging
import re

logger = logging.getLogger(__name__)

_CLOCK = re.compile(r"\bstrftime_now\b")
_DAY = "yojo_date"  # of a processor: the day its template prints, ISO
_DIRECTIVES = "aAwdbBmyYHIpMSfzZjUWcxXGuVDFTRehCnt"


def has_clock(processor):
    """Whether a chat template of this processor (or tokenizer) asks for the date."""
    templates = getattr(processor, "chat_template", None)
    templates = templates.values() if isinstance(templates, dict) else [templates]
    return any(isinstance(template, str) and _CLOCK.search(template) for template in templates)


def date_of(processor):
    """The day a processor's template prints, a `datetime.date`; None where none is settled."""
    day = getattr(processor, _DAY, None)
    return None if day is None else datetime.date.fromisoformat(day)


def settle(processor, date=None):
    """Settle the day that a processor's template prints, for good; one without a clock has none.

    Args:
        processor: a processor or tokenizer.
        date: `datetime.date` or ISO string, in place of whatever was settled before; None keeps that, else takes today.

    Returns:
        `datetime.date`, or None for a template that asks for none.
    """
    if not has_clock(processor):
        return None
    if date is None:
        date = date_of(processor) or datetime.date.today()
    day = date if isinstance(date, str) else date.isoformat()
    datetime.date.fromisoformat(day)
    setattr(processor, _DAY, day)
    return date_of(processor)


def settle_saved(processor, description, path):
    """Settle the day a saved model says; a model saved before models had one gets today, with a warning."""
    if not has_clock(processor):
        return
    if description.get("date") is None:
        logger.warning(
            "the chat template of %s prints today's date, and the model was saved without one: its scores depend on the "
            "day; they are today's, and stay so if the model is saved again",
            path,
        )
    settle(processor, description.get("date"))


def agree(state, processor):
    """Let a patched model and its processor print the same day.

    Args:
        state: `model.yojo` of the patched model.
        processor: its processor or tokenizer.

    Raises:
        ValueError: both have one, and they differ.
    """
    if not has_clock(processor):
        return
    if state.date is None:
        state.date = settle(processor)
    known = date_of(processor)
    if known is not None and known != state.date:
        raise ValueError(
            f"the chat template prints a date: this processor belongs to a model of {known}, the model to one of "
            f"{state.date}, and its scores would change: take the processor that was loaded or patched with the model"
        )
    settle(processor, state.date)


@functools.cache
def say(date):
    """Say once that saved models go on printing a day."""
    logger.warning(
        "the chat template prints today's date, on which scores depend: the model is saved with %s, which it goes on printing",
        date,
    )


def template_options(processor, tools=None):
    """What `apply_chat_template` must be told so that the template prints the settled day, keyword arguments."""
    date = date_of(processor)
    if date is None or not has_clock(processor):
        return {}
    template = processor.chat_template
    if isinstance(template, dict):  # as transformers chooses
        template = template["tool_use"] if tools and "tool_use" in template else template.get("default")
    if not isinstance(template, str):
        return {}
    return {"chat_template": _pinned(template, date)}


def pinned(processor):
    """The processor for tools that know nothing of settled days: a shallow copy whose template prints it itself."""
    options = template_options(processor)
    if not options:
        return processor
    twin = copy.copy(processor)
    twin.chat_template = options["chat_template"]
    return twin


@functools.lru_cache(maxsize=64)
def _pinned(template, date):
    """The template behind a macro that stands for transformers' `strftime_now`, at midnight of one day.

    What the caller hands to a template must be plain data, functions are not; so the macro is written in Jinja.
    """
    moment = datetime.datetime(date.year, date.month, date.day)
    values = {letter: moment.strftime(f"%{letter}") for letter in _DIRECTIVES}
    values["%"] = "%"
    for letter in "dmHIMSjyUWe":  # glibc: %-d is the number without zeros in front
        values[f"-{letter}"] = values[letter].strip().lstrip("0") or "0"
    table = ", ".join(f"{key!r}: {_quoted(value)}" for key, value in values.items())
    return _MACRO.replace("TABLE", table) + template


def _quoted(text):
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n").replace("\t", "\\t") + "'"


# Its last line break is taken away with the block, so that the template begins at a line's start, as before.
_MACRO = (
    "{%- macro strftime_now(format) -%}"
    "{%- set table = {TABLE} -%}{%- set at = namespace(mark='') -%}"
    "{%- for letter in format -%}"
    "{%- if not at.mark -%}{%- if letter == '%' -%}{%- set at.mark = '%' -%}{%- else -%}{{ letter }}{%- endif -%}"
    "{%- elif at.mark == '%' and letter == '-' -%}{%- set at.mark = '%-' -%}"
    "{%- else -%}{{ table.get(at.mark[1:] + letter, at.mark + letter) }}{%- set at.mark = '' -%}{%- endif -%}"
    "{%- endfor -%}{{ at.mark }}{%- endmacro %}\n"
)
