"""Requests as clients send them -> `Asked`: counts and lengths within limits, every image read."""

import asyncio
import json
import logging

from yojo.inputs import messages
from yojo.serving.errors import ApiError, without_text
from yojo.serving.requests import hold
from yojo.serving.roles import Asked, strings_in

logger = logging.getLogger(__name__)

# A part that says where an image is holds one of these beside its type.
MEDIA = messages.KINDS


class Reader:
    """Makes `Asked` of requests.

    Args:
        settings: `yojo.serving.settings.Settings`.
        media: `yojo.serving.media.Media`.
    """

    def __init__(self, settings, media):
        self.limits, self.media, self._logs = settings.limits, media, settings.log_text

    async def asked(self, prompt, responses, images=(), videos=(), tools=None, literal_tags=False, details=False):
        """An `Asked` of what a request holds.

        Args:
            prompt: string or list of chat messages.
            responses: list of strings.
            images: list of strings, as `Media.read` takes them, or bytes.
            videos: list of objects with frames and fps.
            tools, literal_tags, details: as in `Asked`.

        Raises:
            ApiError: something is too much, or cannot be read.
        """
        limits = self.limits
        _at_most(len(responses), limits.responses, "too_many_responses", "responses", "responses")
        if not responses:
            raise ApiError(422, "no_responses", "there are no responses: at least one is needed", "responses")
        prompt = self._clean(prompt)
        self._check_texts(prompt, responses, tools)
        self.log(prompt, responses)
        frames = [
            (f"videos.{n}.frames.{m}", one) for n, video in enumerate(videos) for m, one in enumerate(video.frames)
        ]
        inline = list(_inline(prompt))
        listed = [(f"images.{n}", one) for n, one in enumerate(images)]
        sources = [*listed, *frames, *inline]
        _at_most(len(sources), limits.images, "too_many_images", "images, frames of videos among them", "images")
        for n, video in enumerate(videos):
            if not video.frames:
                raise ApiError(422, "no_frames", "a video has no frames", f"videos.{n}.frames")
        read = await self._all(sources)
        return Asked(
            _filled(prompt, read),
            list(responses),
            [read[field] for field, _ in listed],
            [
                ([read[f"videos.{n}.frames.{m}"] for m in range(len(video.frames))], video.fps)
                for n, video in enumerate(videos)
            ],
            tools,
            literal_tags,
            details,
        )

    async def _all(self, sources):
        """dict: field -> bytes of its image; the first that cannot be read ends the others."""
        tasks = [asyncio.ensure_future(self._read(source, field)) for field, source in sources]
        try:
            return {field: await task for (field, _), task in zip(sources, tasks, strict=True)}
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def log(self, prompt, responses):
        """Write what a user has written into the log, where `Settings.log_text` allows it: a line, whatever it holds."""
        if self._logs:
            logger.info("prompt=%s responses=%s", json.dumps(_without_media(prompt)), json.dumps(list(responses)))

    async def _read(self, source, field):
        if isinstance(source, bytes):
            return source
        if not isinstance(source, str):
            raise ApiError(
                422, "invalid_image", "an image must be a string: a data URL, base64, a path or a URL", field
            )
        data = await self.media.read(source, field)
        hold(len(data))
        return data

    def _clean(self, prompt):
        if isinstance(prompt, str):
            return prompt
        try:
            return messages.clean(prompt)
        except (TypeError, ValueError) as error:
            raise ApiError(422, "invalid_messages", without_text(str(error), strings_in(prompt)), "prompt") from None

    def _check_texts(self, prompt, responses, tools):
        total = 0
        texts = [("prompt", text) for text in strings_in(_without_media(prompt))]
        texts += [(f"responses.{n}", text) for n, text in enumerate(responses)]
        texts += [("tools", text) for text in strings_in(tools)]
        for field, text in texts:
            _at_most(len(text), self.limits.characters, "text_too_long", "characters in one text", field)
            total += len(text)
        _at_most(total, self.limits.all_characters, "text_too_long", "characters in all texts", None)


def _at_most(count, limit, code, what, field):
    if count > limit:
        raise ApiError(413, code, f"{count} {what}, and {limit} are the most; nothing is ever cut", field)


def _inline(prompt):
    """(field, source) of the images that stand in parts of messages."""
    for n, turn in enumerate(prompt if isinstance(prompt, list) else ()):
        for m, part in enumerate(turn["content"] if isinstance(turn["content"], list) else ()):
            field = f"prompt.{n}.content.{m}"
            if isinstance(part, dict) and part["type"] == "video" and part.get("video") is not None:
                raise ApiError(
                    422,
                    "video_in_part",
                    "a video's frames go into the field videos; its part says where it stands",
                    field,
                )
            if isinstance(part, dict) and part["type"] == "image" and part.get("image") is not None:
                yield field, part["image"]


def _without_media(prompt):
    if isinstance(prompt, str):
        return prompt
    return [
        {
            **turn,
            "content": [
                {key: value for key, value in part.items() if key not in MEDIA} if isinstance(part, dict) else part
                for part in turn["content"]
            ]
            if isinstance(turn["content"], list)
            else turn["content"],
        }
        for turn in prompt
    ]


def _filled(prompt, read):
    """Messages with the images that were read in their parts."""
    if isinstance(prompt, str):
        return prompt
    return [
        {
            **turn,
            "content": [
                {**part, "image": read[f"prompt.{n}.content.{m}"]} if f"prompt.{n}.content.{m}" in read else part
                for m, part in enumerate(turn["content"])
            ]
            if isinstance(turn["content"], list)
            else turn["content"],
        }
        for n, turn in enumerate(prompt)
    ]
