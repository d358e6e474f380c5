"""ms-swift: rewards of whole groups for its GRPO trainer, as a function of `--reward_funcs` or a plugin of a `--reward_model`."""

import asyncio
import base64
import json
import os

from yojo.inputs.lookup import find_image, find_videos
from yojo.inputs.messages import TAGS
from yojo.judges.loading import has_model, load_judge
from yojo.reward_model import RewardModel
from yojo.rewards.group import GroupReward
from yojo.rewards.rows import Row
from yojo.rewards.threads import in_thread

_COLUMNS = ("images", "videos", "audios", "objects", "tools", "is_truncated", "rollout_infos")
ENCODED = 2000  # characters from which on ms-swift takes a string for base64 rather than a path


class _Swift(GroupReward):
    """What ms-swift's two ways in have in common: how its rows are read."""

    def __init__(self, judge, *, allow_urls=False, **options):
        for treatment in ("empty", "truncated", "forged"):
            if options.get(treatment) == "none":
                raise ValueError(
                    f"{treatment}='none': ms-swift counts a reward that is not there as 0; say 'lowest', or a number"
                )
        super().__init__(judge, **options)
        self.allow_urls = allow_urls

    def _rows(self, trainer, prompts, completions, completion_ids, columns):
        if len(prompts) != len(completions):
            raise ValueError(f"{len(completions)} completions for {len(prompts)} lists of messages")
        columns = {name: columns[name] for name in _COLUMNS if columns.get(name) is not None}
        for name, values in columns.items():
            if not isinstance(values, (list, tuple)) or len(values) != len(prompts):
                count = f" of {len(values)}" if hasattr(values, "__len__") else ""
                raise ValueError(
                    f"the column {name!r} must be a list of {len(prompts)} values, got {type(values).__name__}{count}"
                )
        if "is_truncated" not in columns and self.scorer.truncated != "score":
            raise ValueError(
                f"truncated={self.scorer.truncated!r} needs the column is_truncated, which tells what is truncated"
            )
        rows = []
        for place, (messages, completion) in enumerate(zip(prompts, completions, strict=True)):
            own = {name: values[place] for name, values in columns.items()}
            try:
                rows.append(self._row(messages, completion, own))
            except (TypeError, ValueError) as error:
                raise type(error)(f"row {place}: {error}") from None
        return rows

    def _row(self, messages, completion, own):
        if not isinstance(completion, str):
            raise TypeError(f"a completion must be a string, got {type(completion).__name__}")
        if not messages or messages[-1]["role"] != "assistant" or messages[-1]["content"] != completion:
            raise ValueError("the messages must end with the completion as the assistant's turn")
        if (turns := (own.get("rollout_infos") or {}).get("num_turns", 1)) > 1:
            raise ValueError(f"a rollout of {turns} turns: there is no one prompt that the group's completions share")
        for name in ("audios", "objects"):
            if own.get(name):
                raise ValueError(f"the column {name!r} is filled, and the judge would see nothing of it")
        prompt, images = messages[:-1], own.get("images") or []
        if images and any(TAGS["image"] in str(turn["content"]) for turn in prompt if turn["role"] == "assistant"):
            raise ValueError(
                "a tag <image> in a turn of the assistant, which ms-swift fills with an image and the judge does not"
            )
        return Row(
            prompt=prompt,
            images=[self._image(image, f"image {n}") for n, image in enumerate(images)],
            videos=find_videos(own.get("videos") or [], None, ""),
            text=completion if self.text is None else self.text(completion),
            truncated=own.get("is_truncated"),
            tools=_tools(own.get("tools")),
            literal_tags=False,  # ms-swift's places of images and videos
        )

    def _image(self, image, name):
        """An image as `yojo.Example` takes it: of {"bytes", "path"}, a path, base64, a data URL, or an object."""
        source = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
        if isinstance(source, str) and not source.startswith(("data:", "http://", "https://")):
            if len(source) > ENCODED:
                return base64.b64decode(source, validate=True)
            root = os.environ.get("ROOT_IMAGE_DIR")
            return find_image(source, root if root and not os.path.exists(source) else "", False, name)
        return find_image(source, "", self.allow_urls, name)


class SwiftReward(_Swift):
    """A reward function of ms-swift, for a file of `--external_plugins`: `orms["yojo"] = functools.partial(SwiftReward, judge=...)`.

    The prompt is what the policy was given, system prompt and earlier turns included; tags `<image>` and `<video>` are places.
    Groups are those of prompt, tools and the content of the images: ms-swift's `prompt_id` knows the messages alone. A rollout of
    several turns, audio and grounding objects are errors; so is what becomes None, which ms-swift counts as reward 0. An
    error ends the training.

    Args:
        args: the trainer's arguments, which ms-swift hands over: `num_generations` is the size of a group.
        judge: its name (see `yojo.judges.load_judge`), loaded here on this process's device; or anything with `score_many`.
        group_size: completions of a prompt, where there are no `args`.
        **options: as for `yojo.GroupReward`; and allow_urls, to fetch images from http(s) URLs, anew for each completion.

    Raises:
        TypeError, ValueError: an argument that does not fit the above.
    """

    def __init__(self, args=None, *, judge, group_size=None, **options):
        if args is not None:
            group_size = _size(args, group_size)
        super().__init__(_loaded(judge), group_size=group_size, **options)

    def __call__(self, completions, *, messages, trainer_state=None, **columns):
        """The rewards of some rows.

        Args:
            completions: list of R strings.
            messages: list of R conversations, each with its completion as the last turn.
            trainer_state: transformers' `TrainerState`, or None.
            columns: dict of lists of R values, of which `images`, `videos`, `tools` and `is_truncated` are read.

        Returns:
            list of R floats, or None in a group of which nothing could be judged.

        Raises:
            RewardError, TypeError, ValueError: as for `yojo.GroupReward`.
        """
        return super().__call__(messages, completions, trainer_state=trainer_state, **columns)


class AsyncSwiftReward(SwiftReward):
    """`SwiftReward` to be awaited, for judges behind a network: the trainer's other asynchronous rewards run meanwhile."""

    async def __call__(self, completions, *, messages, trainer_state=None, **columns):
        """As `SwiftReward.__call__`."""
        exchange = self._begin()  # before anything is awaited: every process makes it at the same point
        arguments = messages, completions, None, trainer_state, None, None, columns
        return await asyncio.wrap_future(in_thread(self._rewards, exchange, *arguments))


class SwiftPlugin(_Swift):
    """A plugin for a reward model that ms-swift loads: `rm_plugins["yojo"] = functools.partial(SwiftPlugin, group_size=8)`.

    The backbone that ms-swift has loaded from `--reward_model` is patched and scores; there is no second one. A model that is
    sharded (ZeRO-3, FSDP) is refused, since processes score different numbers of groups: use `SwiftReward`.

    Args:
        model, template: what ms-swift hands over.
        group_size: completions of a prompt, ms-swift's `num_generations`, which plugins are not told.
        folder: of the reward model, an adapter of `model`, say; None: where `model` lies.
        **options: as for `SwiftReward`.

    Raises:
        TypeError, ValueError: an argument that does not fit; a folder that is none of a reward model, or of another backbone.
    """

    def __init__(self, model, template=None, *, group_size, folder=None, **options):
        from transformers.integrations import is_deepspeed_zero3_enabled

        if is_deepspeed_zero3_enabled() or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
            raise ValueError(
                "a reward model in shards (ZeRO-3, FSDP) cannot score whole groups: pass it to --reward_funcs instead"
            )
        folder = folder or getattr(model, "model_dir", None) or model.config.name_or_path
        super().__init__(RewardModel.from_pretrained(folder, model=_stock(model)), group_size=group_size, **options)

    def __call__(self, inputs, *, messages=None, trainer_state=None, **columns):
        """The rewards of some rows.

        Args:
            inputs: list of R dicts, the rows.
            messages, trainer_state, columns: as for `SwiftReward`.

        Returns, raises:
            As `SwiftReward.__call__`.
        """
        messages = [row["messages"] for row in inputs]
        completions = [conversation[-1]["content"] for conversation in messages]
        return super().__call__(messages, completions, trainer_state=trainer_state, **columns)


def _stock(model):
    """A model with the methods of its classes: of some families ms-swift replaces those that training its own way needs."""
    for module in model.modules():
        if not hasattr(module, "_hf_hook"):  # which puts a module's weights where they belong
            for name in ("forward", "_deepstack_process"):
                vars(module).pop(name, None)
    return model


def _size(args, group_size):
    size = args.num_generations
    if group_size not in (None, size):
        raise ValueError(f"group_size is {group_size}, and ms-swift's num_generations is {size}: leave group_size out")
    evaluated = getattr(args, "num_generations_eval", None) or size
    if evaluated != size and str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
        raise ValueError(
            f"num_generations is {size} and num_generations_eval {evaluated}, and ms-swift does not tell a reward which of them "
            "its rows are of: make them equal, or set --eval_strategy no"
        )
    return size


def _loaded(judge):
    """A judge, loaded on the device of this process if it has a model and is given by its name."""
    import torch

    if not isinstance(judge, (str, os.PathLike)):
        return judge
    on_gpu = torch.cuda.is_available() and has_model(os.fspath(judge))
    return load_judge(judge, device=f"cuda:{torch.cuda.current_device()}" if on_gpu else None)


def _tools(tools):
    """ms-swift's tools, JSON or parsed, as a list of dicts; None where there are none."""
    tools = json.loads(tools) if isinstance(tools, str) and tools else tools
    return [json.loads(tool) if isinstance(tool, str) else tool for tool in tools] if tools else None
