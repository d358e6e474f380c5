"""`yojo score` with and without images, and options that are obeyed or refused by name."""

import json

import huggingface_hub
import pytest
import torch
from endpoint_cases import Endpoint, by_length, said
from saved_cases import adapted, backbone, patched
from typer.testing import CliRunner

import yojo
from yojo.cli import app
from yojo.demo.backbone import BACKBONE
from yojo.judges import loading
from yojo.training import recipe


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    backbone().save_pretrained(folder / "base")
    yojo.RewardModel(*patched(folder / "base")).save_pretrained(folder / "rm")
    adapted(folder / "base").save_pretrained(folder / "adapter")
    return folder


def call(*words):
    return CliRunner().invoke(app, ["score", *map(str, words)])


ASKED = ("--prompt", "which one?", "--response", "a six", "--response", "a nine")


def test_text_is_scored_without_an_image(text_model):
    done = call(*ASKED, "--model", text_model / "rm", "--json")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    expected = yojo.RewardModel.from_pretrained(text_model / "rm").score("which one?", ["a six", "a nine"])
    assert torch.allclose(torch.tensor([row["score"] for row in line["scores"]]), expected)
    assert line["images"] == line["videos"] == [] and "image" not in line


def test_another_base_model_is_an_error_unless_it_is_meant(text_model, tmp_path):
    backbone(seed=5).save_pretrained(tmp_path / "other")
    words = (*ASKED, "--model", text_model / "adapter", "--base-model", tmp_path / "other")
    done = call(*words)
    assert done.exit_code == 2 and "trained on other weights" in done.stderr and "Traceback" not in done.stderr
    assert call(*words, "--no-check-base").exit_code == 0


def test_several_images_are_taken_in_their_order(tmp_path, monkeypatch):
    from PIL import Image

    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    seen = []

    class Model:
        config = yojo.YojoConfig()

        def score_many(self, examples):
            seen.extend(examples)
            return [torch.zeros(2)]

    monkeypatch.setattr(loading, "load_judge", lambda *args, **options: Model())
    a, b, c = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    done = call(a, *ASKED, "--model", "m", "--image", b, "--image", c, "--video", a, "--video", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["images"] == [str(a), str(b), str(c)] and line["videos"] == [str(a), str(tmp_path)]
    assert [str(image) for image in seen[0].images] == line["images"] and len(seen[0].videos) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (ASKED, "without --model the digits demonstration's model scores"),
        ((*ASKED, "--image", "no.png"), "no such file: no.png"),
        ((*ASKED, "--base-model", "b"), "--base-model is given without --model"),
        ((*ASKED, "--model", "./nowhere"), "no such folder"),
    ],
)
def test_mistakes_are_one_line(words, message):
    done = call(*words)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_a_name_that_is_nothing_is_named(monkeypatch):
    def fetch(name):
        raise FileNotFoundError("Cannot find an appropriate cached snapshot folder")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    done = call(*ASKED, "--model", "out/reward-model")
    assert done.exit_code == 2 and "out/reward-model is no folder here, and cannot be fetched" in done.stderr


# ---- the processor's options ----


def parse(model, options):
    flags = ["--model", str(model), "--train_data", "x.jsonl", "--output_dir", "out", "--use_cpu", "true"]
    return recipe.parse([*flags, "--processor_options", options])[:2]


def test_processor_options_are_obeyed_or_refused(make_reward_model, tmp_path):
    make_reward_model().save_pretrained(tmp_path / "rm")
    for model in (BACKBONE, tmp_path / "rm"):
        _, processor = recipe.load_model(*parse(model, '{"max_pixels": 4096}'))
        assert processor.image_processor.size.longest_edge == 4096
        with pytest.raises(ValueError, match="knows the option 'max_pixel': .* did you mean max_pixels"):
            recipe.load_model(*parse(model, '{"max_pixel": 4096}'))
    for wrong, message in (("[1]", "must be an object"), ("{", "must be JSON")):
        with pytest.raises(ValueError, match=f"processor_options {message}"):
            parse(BACKBONE, wrong)


# ---- a model behind an endpoint ----


def test_a_judge_behind_an_endpoint(tmp_path):
    with Endpoint(by_length) as endpoint:
        name = f"openai:m@{endpoint.url}#pairwise"
        done = call(*ASKED, "--model", name, "--json")
        assert done.exit_code == 0, done.output
        rows = json.loads(done.stdout.splitlines()[-1])["scores"]
        assert [row["score"] for row in rows] == [0, 1]
        (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": "q", "responses": ["a", "bbb", "cc"]}) + "\n")
        done = call(tmp_path / "in.jsonl", "--model", name, "--out", tmp_path / "out.jsonl")
        assert done.exit_code == 0, done.output
        assert json.loads((tmp_path / "out.jsonl").read_text())["scores"] == [0, 2, 1]


@pytest.mark.parametrize(
    "answer, message",
    [
        (said(None, refusal="no"), "error: the judge gave no verdict: it refuses: no"),
        ((401, {}, "who are you?"), "status 401: who are you?"),
        ((400, {}, "what?"), "the request is refused, status 400: what?"),
    ],
)
def test_what_an_endpoint_says_is_one_line(answer, message, tmp_path):
    with Endpoint(lambda body: answer) as endpoint:
        done = call(*ASKED, "--model", f"openai:m@{endpoint.url}")
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
