"""Messages of trainers: images and videos in their parts, as the judge takes them."""

import io

import pytest

from tests.reward_cases import picture
from yojo.inputs.videos import Video
from yojo.rewards.parts import taken


def test_parts_hold_what_the_judge_takes(tmp_path):
    red, file = picture("red"), io.BytesIO()
    red.save(file, "PNG")
    red.save(tmp_path / "red.png")
    parts = [
        {"type": "image", "image": red, "bytes": file.getvalue(), "path": None, "max_pixels": 1000},
        {"type": "image", "bytes": file.getvalue(), "path": "lost.png"},
        {"type": "image", "image": f"file://{tmp_path}/red.png"},
        {"type": "text", "text": "What?"},
        {"type": "video", "video": [str(tmp_path / "red.png")] * 2, "fps": 2.0},
    ]
    (turn,) = taken([{"role": "user", "content": parts}])
    found = [part.get("image") for part in turn["content"][:3]]
    assert found == [red, file.getvalue(), str(tmp_path / "red.png")]
    assert turn["content"][3] == parts[3]
    assert turn["content"][4] == {"type": "video", "video": Video([str(tmp_path / "red.png")] * 2)}
    with pytest.raises(ValueError, match="a part of type video has video_start"):
        taken([{"role": "user", "content": [{"type": "video", "video": "a.mp4", "video_start": 1}]}])


def test_urls_and_files_that_are_not_there():
    for source, match in (("http://host/a.png", "is a URL"), ("there-is-none.png", "no such file")):
        with pytest.raises(ValueError, match=match):
            taken([{"role": "user", "content": [{"type": "image", "image": source}]}])
