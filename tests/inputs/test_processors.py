"""Processors from folders: what is saved comes back, in every layout, and a video part is never lost without a word."""

import json
import logging
import pickle
import subprocess
import sys

import numpy as np
import pytest
import real_processors
import torch
import transformers

from yojo.inputs.processors import image_only, load_processor, save_processor

pytest.importorskip("torchvision")

WITH_VIDEO = ["Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Molmo2", "LLaVA-OneVision", "InternVL", "SmolVLM"]
FAMILIES = [family for family in real_processors.FAMILIES if not family.endswith("(text)")]
SETTINGS = "no settings for the video part"


def turn(*parts):
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "What is shown?"}]}]


def outputs(processor, kind):
    """What a processor makes of one image, or of the frames of one video."""
    if kind == "image":
        picture = real_processors.image(40, 22, 1)
        if processor.chat_template is None:
            return dict(processor(text=["<image>What is shown?"], images=[[picture]], return_tensors="pt"))
        turns, options = turn({"type": "image", "image": picture}), {}
    else:
        video = np.stack([np.asarray(frame) for frame in real_processors.frames(4)])
        metadata = dict(total_num_frames=4, fps=1.0, frames_indices=[0, 1, 2, 3], duration=4.0)
        turns = turn({"type": "video", "video": video})
        options = {"processor_kwargs": {"video_metadata": [metadata], "do_sample_frames": False}}
    made = processor.apply_chat_template(
        turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
    )
    return {name: value for name, value in made.items() if name != "video_metadata"}


def same(processor, other, kind):
    ours, theirs = outputs(processor, kind), outputs(other, kind)
    assert ours.keys() == theirs.keys() and any(name.startswith("pixel") for name in ours)
    for name, value in theirs.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(ours[name], value), name
        else:
            assert ours[name] == value, name


def old_layout(processor, config, folder, *, own_file, video_file):
    """Write a folder as transformers did before 5: a file for each part, perhaps one for the processor's own settings."""
    name = type(processor).__name__
    folder.mkdir(exist_ok=True)
    processor.tokenizer.save_pretrained(folder)
    config.save_pretrained(folder)

    def write(file, content):
        (folder / file).write_text(json.dumps(content))

    write(
        "preprocessor_config.json", json.loads(processor.image_processor.to_json_string()) | {"processor_class": name}
    )
    if processor.chat_template is not None:
        write("chat_template.json", {"chat_template": processor.chat_template})
    if own_file:
        own = {key: value for key, value in processor.to_dict().items() if not isinstance(value, dict)}
        write("processor_config.json", own | {"processor_class": name})
    if video_file:
        write("video_preprocessor_config.json", json.loads(processor.video_processor.to_json_string()))
    return folder


def with_shared_settings(family):
    """(processor, config) of a family whose video part has the settings of its images, as folders of one file hold them."""
    config, processor = real_processors.config_of(family), real_processors.processor_of(family)
    if family in WITH_VIDEO:
        settings = processor.image_processor.to_dict()
        settings.pop("image_processor_type")
        processor.video_processor = type(processor.video_processor)(**settings)
    return processor, config


def check(processor, expected, family):
    assert type(processor) is type(expected)
    same(processor, expected, "image")
    if family in WITH_VIDEO:
        assert type(processor.video_processor) is type(expected.video_processor)
        same(processor, expected, "video")


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_comes_back(family, tmp_path, caplog):
    processor = real_processors.processor_of(family)
    processor.save_pretrained(tmp_path)
    check(load_processor(tmp_path), processor, family)
    assert SETTINGS not in caplog.text


# Processors with settings beside those of their parts, which older folders hold in processor_config.json.
OWN = ["Gemma 3", "InternVL", "LLaVA-OneVision", "SmolVLM", "Idefics 3", "Mistral 3"]


@pytest.mark.parametrize(
    "family, own_file", [*((f, True) for f in FAMILIES), *((f, False) for f in FAMILIES if f not in OWN)]
)
def test_one_file_for_images_and_videos(family, own_file, tmp_path, caplog):
    processor, config = with_shared_settings(family)
    old_layout(processor, config, tmp_path, own_file=own_file, video_file=False)
    check(load_processor(tmp_path), processor, family)
    # transformers would make Qwen3-VL's videos with the processor of Qwen2-VL, whose name its image processor has.
    assert (SETTINGS in caplog.text) == (family == "Qwen3-VL")


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_file_for_each_part(family, tmp_path, caplog):
    processor, config = real_processors.processor_of(family), real_processors.config_of(family)
    old_layout(processor, config, tmp_path, own_file=True, video_file=True)
    check(load_processor(tmp_path), processor, family)
    assert SETTINGS not in caplog.text


def test_the_sampling_of_released_smolvlm_folders(tmp_path):
    """Their one file has the settings of videos in a block of their own."""
    processor, config = with_shared_settings("SmolVLM")
    old_layout(processor, config, tmp_path, own_file=True, video_file=False)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    sampling = {"fps": 3, "max_frames": 5, "video_size": {"longest_edge": 16}}
    file.write_text(json.dumps(settings | {"video_sampling": sampling, "size": {"longest_edge": 32}}))
    loaded = load_processor(tmp_path)
    expected = transformers.AutoProcessor.from_pretrained(tmp_path)
    for one in (loaded.video_processor, expected.video_processor):
        assert (one.fps, one.num_frames) == (3, 5)
    check(loaded, expected, "SmolVLM")
    loaded.save_pretrained(tmp_path / "again")
    again = load_processor(tmp_path / "again")
    assert (again.video_processor.fps, again.video_processor.num_frames) == (3, 5)
    check(again, expected, "SmolVLM")


def test_a_folder_without_the_models_config(tmp_path):
    processor, config = with_shared_settings("InternVL")
    old_layout(processor, config, tmp_path, own_file=True, video_file=False)
    (tmp_path / "config.json").unlink()
    check(load_processor(tmp_path), processor, "InternVL")


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_a_video_part_without_settings_is_named(family, tmp_path, caplog):
    processor = real_processors.processor_of(family)
    processor.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    del settings["video_processor"]
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        loaded = load_processor(tmp_path)
    assert f"{tmp_path} has {SETTINGS} of its {type(processor).__name__}" in caplog.text
    assert getattr(loaded, "video_processor", None) is None
    same(loaded, processor, "image")
    caplog.clear()
    loaded.save_pretrained(tmp_path / "again")  # says that there is none, so nothing is lost from here on
    again = load_processor(tmp_path / "again")
    same(again, processor, "image")
    assert not caplog.records


@pytest.mark.parametrize("family", WITH_VIDEO)
def test_image_only_is_the_same_processor_without_videos(family):
    processor = real_processors.processor_of(family)
    cls = image_only(type(processor))
    own = {name: value for name, value in processor.to_dict().items() if not isinstance(value, dict)}
    own.pop("processor_class")
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer}
    if family == "SmolVLM":  # an argument without a default
        parts["video_processor"] = None
    made = cls(**parts, chat_template=processor.chat_template, **own)
    for one in (made, pickle.loads(pickle.dumps(made))):
        assert isinstance(one, type(processor)) and getattr(one, "video_processor", None) is None
        same(one, processor, "image")


def test_image_only_outlives_a_class_that_looks_attributes_up_without_end(monkeypatch):
    """As ms-swift's patch of the processor's class does, in classes that inherit it."""
    processor = real_processors.processor_of("Qwen3-VL")
    cls = type(processor)
    made = image_only(cls)(processor.image_processor, processor.tokenizer, chat_template=processor.chat_template)
    monkeypatch.setattr(cls, "__getattr__", lambda self, n: super(type(self), self).__getattr__(n), raising=False)
    with pytest.raises(AttributeError, match="'Qwen3VLProcessor' object has no attribute 'nothing'"):
        made.nothing  # noqa: B018
    assert getattr(made, "video_processor", None) is None


def test_options_reach_the_parts_that_know_them(tmp_path):
    processor, config = with_shared_settings("Qwen2-VL")
    processor.save_pretrained(tmp_path / "new")
    old_layout(processor, config, tmp_path / "old", own_file=True, video_file=False)
    expected = transformers.AutoProcessor.from_pretrained(tmp_path / "new", max_pixels=256, padding_side="left")
    assert outputs(expected, "image")["pixel_values"].shape[0] < outputs(processor, "image")["pixel_values"].shape[0]
    for layout in ("new", "old"):
        loaded = load_processor(tmp_path / layout, max_pixels=256, padding_side="left")
        check(loaded, expected, "Qwen2-VL")
        assert loaded.tokenizer.padding_side == "left"
    real_processors.processor_of("LLaVA-OneVision").save_pretrained(tmp_path / "ov")
    assert load_processor(tmp_path / "ov", num_image_tokens=7).num_image_tokens == 7


@pytest.mark.parametrize("family", ["Qwen2-VL", "Gemma 3", "Qwen3 (text)"])
def test_an_option_that_nothing_knows_is_an_error(family, tmp_path):
    processor = real_processors.processor_of(family)
    processor.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"no part of {type(processor).__name__} knows the option 'max_pixel'.*padding"
    ):
        load_processor(tmp_path, max_pixel=256)
    load_processor(tmp_path, padding_side="left", revision="main", bos_token="<bos>", use_fast=True)


def test_a_hub_name_is_read_as_a_folder(tmp_path, caplog):
    """From the cache, laid out as the hub's own client does."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--me--mine"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    (repository / "snapshots").mkdir()
    processor, config = with_shared_settings("Qwen3-VL")  # for which AutoProcessor alone would not do
    old_layout(processor, config, repository / "snapshots" / revision, own_file=True, video_file=False)
    loaded = load_processor("me/mine", cache_dir=str(tmp_path), local_files_only=True)
    check(loaded, processor, "Qwen3-VL")
    assert SETTINGS in caplog.text
    with pytest.raises(ValueError, match="no part of Qwen3VLProcessor knows the option 'max_pixel'"):
        load_processor("me/mine", cache_dir=str(tmp_path), local_files_only=True, max_pixel=3)


PIL = [family for family in FAMILIES if family != "Molmo2"]  # its images need torchvision


@pytest.mark.parametrize("family", PIL)
def test_images_are_resized_as_where_the_processor_was_saved(family, tmp_path, caplog):
    processor = real_processors.processor_of(family)
    settings = processor.image_processor.to_dict()
    settings.pop("image_processor_type")
    of_pillow = real_processors.processor_of(family)
    of_pillow.image_processor = getattr(transformers, f"{type(processor.image_processor).__name__}Pil")(**settings)
    if family == "PaliGemma":
        of_pillow.image_processor.image_seq_length = 4
    else:  # SigLIP's two agree on this image
        pixels = [outputs(one, "image")["pixel_values"] for one in (processor, of_pillow)]
        assert not torch.equal(*pixels)
    for name, one in (("torchvision", processor), ("pil", of_pillow)):
        save_processor(one, tmp_path / name)
        loaded = load_processor(tmp_path / name)
        assert type(loaded.image_processor) is type(one.image_processor)
        same(loaded, one, "image")
    chosen = load_processor(tmp_path / "pil", use_fast=True)
    assert type(chosen.image_processor) is type(processor.image_processor)
    assert not caplog.records


def test_a_tokenizer_is_saved_as_it_is(tmp_path):
    tokenizer = real_processors.processor_of("Qwen3 (text)")
    save_processor(tokenizer, tmp_path)
    assert load_processor(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_folders_that_hold_no_processor(tmp_path):
    with pytest.raises(ValueError, match="holds neither a processor nor a tokenizer"):
        load_processor(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"processor_class": ')
    with pytest.raises(ValueError, match=r"processor_config\.json is not valid JSON"):
        load_processor(tmp_path)


WITHOUT_TORCHVISION = """
import sys
sys.modules["torchvision"] = None  # as if it were not installed, before anything looks for it
sys.path.insert(0, sys.argv[1])
import pickle
import transformers
import yojo
from PIL import Image
from yojo.inputs.processors import load_processor

assert not transformers.utils.is_torchvision_available()
for folder in sys.argv[2:]:
    processor = load_processor(folder)
    assert type(processor.image_processor).__name__.endswith("Pil"), processor.image_processor
    assert getattr(processor, "video_processor", None) is None
    picture = Image.new("RGB", (40, 22), (200, 40, 90))
    turns = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]
    for one in (processor, pickle.loads(pickle.dumps(processor))):
        made = one.apply_chat_template(
            turns, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        print(folder, made["input_ids"].tolist())
"""


def test_without_torchvision_images_go_on(tmp_path):
    """In a process of its own: transformers looks for torchvision once."""
    folders, expected = [], []
    picture = real_processors.Image.new("RGB", (40, 22), (200, 40, 90))
    turns = [
        {"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}
    ]
    for family in ("Qwen2.5-VL", "Qwen3-VL", "LLaVA-OneVision", "InternVL", "SmolVLM", "Gemma 3"):
        processor, folder = real_processors.processor_of(family), tmp_path / family
        save_processor(processor, folder)
        made = processor.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=True)
        folders.append(str(folder))
        ids = [list(ids) for ids in made["input_ids"]]
        expected += [f"{folder} {ids}"] * 2
    processor, config = with_shared_settings("LLaVA-OneVision")
    old = old_layout(processor, config, tmp_path / "old", own_file=True, video_file=False)
    expected += [line.replace("LLaVA-OneVision", "old") for line in expected if "LLaVA" in line]
    command = [
        sys.executable,
        "-c",
        WITHOUT_TORCHVISION,
        real_processors.__file__.rsplit("/", 1)[0],
        *folders,
        str(old),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == expected
    for folder in (*folders[:5], str(old)):
        assert f"torchvision is not installed: {folder} is loaded without its video part" in done.stderr
    for folder in folders:
        assert f"{folder} was saved where torchvision resizes its images, and here Pillow does" in done.stderr
