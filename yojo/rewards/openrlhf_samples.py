"""What OpenRLHF hands over with a sample, and takes for it: the question, the reward, what is logged."""

from yojo.rewards.scorer import GroupScorer, RewardError

PROMPTS = ("template", "label", "text")


def scorer_of(judge, *, device=None, dtype=None, base_model=None, **options):
    """A `GroupScorer` for a trainer that takes a number for each sample and nothing else.

    Args:
        judge: a judge, or its name.
        device, dtype, base_model: as for `yojo.judges.load_judge`, with a name.
        **options: of `GroupScorer`.
    """
    for name in ("empty", "truncated", "forged"):
        if options.get(name) == "none":
            raise ValueError(
                f"{name}='none' leaves a sample without a reward, which OpenRLHF does not know: use 'lowest', or a number"
            )
    if isinstance(judge, str):
        from yojo.judges import load_judge

        judge = load_judge(judge, device=device, dtype=dtype, base_model=base_model)
    elif (device, dtype, base_model) != (None, None, None):
        raise ValueError(
            "device, dtype and base_model are for a judge that is loaded by its name; this one is there already"
        )
    return GroupScorer(judge, **options)


def question(how, asked_by, prompt, label, images=0):
    """What the judge is asked, of what OpenRLHF hands over.

    Args:
        how: one of `PROMPTS`.
        asked_by: `AskedBy` of the policy's processor, for "template".
        prompt: str, the policy's prompt.
        label: the value of the column `--data.label_key`.
        images: how many the prompt shows.

    Returns:
        a string or chat messages, as for `yojo.Example`.

    Raises:
        ValueError: it cannot be told.
    """
    if how == "text":
        return prompt
    if how == "label":
        if not label or not isinstance(label, (str, list)):
            raise ValueError(
                "prompt='label', and the label is no question and no list of chat messages: name the column that holds it, "
                f"--data.label_key COLUMN; got {label!r:.200}"
            )
        return label
    try:
        return asked_by.messages(prompt, images)
    except ValueError as error:
        raise ValueError(
            f"{error}; with prompts of several turns have the messages as labels (--data.label_key, prompt='label'); made without "
            "--data.apply_chat_template, they are prompt='text'"
        ) from None


def given(found):
    """The reward of a `Reward` as a float, where there is one."""
    if found.reward is None:
        raise RewardError(
            "none of the group's completions was judged (they are all empty, truncated or forged), so that there is no lowest "
            "reward; a number as their treatment, such as empty=-1.0, gives one"
        )
    return float(found.reward)


def logs(found):
    """What OpenRLHF logs beside the reward: numbers, of the same names for every sample."""
    return {
        "yojo_group_size": float(found.group_size),
        "yojo_missing": float(found.missing),
        "yojo_not_judged": float(found.treated is not None),
        "yojo_seconds": float(found.seconds),
    }
