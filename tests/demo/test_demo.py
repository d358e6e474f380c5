"""The demonstration: what ships, what the commands print, and that it learns."""

import importlib.metadata
import json
import random

import pytest
import torch
from typer.testing import CliRunner

from yojo.cli import app
from yojo.demo import digits, reward, run


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """(path, label) of a held-out image."""
    image, label = digits.load_digits_split()[1][0]
    path = tmp_path_factory.mktemp("image") / "digit.png"
    image.save(path)
    return path, label


def test_answers_have_one_right_one_and_wording_tells_nothing():
    rng = random.Random(0)
    places = [0] * 4
    for _ in range(400):
        label = rng.randrange(10)
        responses, rankings = digits.answers(label, 4, rng)
        named = [digits.named_digits(text) for text in responses]
        assert [len(one) for one in named] == [1] * 4 and len(set().union(*named)) == 4
        assert [rank == 1 for rank in rankings] == [one == {label} for one in named]
        places[rankings.index(1)] += 1
    assert min(places) > 60  # the right one stands anywhere


def test_the_split_is_fixed_and_held_out():
    train, held_out = digits.load_digits_split()
    assert (len(train), len(held_out)) == (1437, 360)
    seen = {image.tobytes() for image, _ in train}
    assert sum(image.tobytes() in seen for image, _ in held_out) == 0


def test_the_shipped_reward_model_is_right_on_held_out_digits():
    reward_model = reward.load_reward_model()
    _, held_out = digits.load_digits_split()
    examples = reward.make_examples(held_out, len(held_out), seed=123)
    assert reward.best_of_n(reward_model.score_many(examples), examples) >= 0.9


def test_the_demo_runs_and_writes_its_figures(tmp_path):
    """A short run: the figures are there and consistent; what they reach is for `yojo demo` to show."""
    figures = run.run(out=tmp_path, json_file=tmp_path / "figures.json", steps=2, save=tmp_path / "model")
    assert json.loads((tmp_path / "figures.json").read_text()) == figures
    assert set(figures["accuracy"]) == {"comparative", "isolated", "single"}
    # After two steps scores differ by little more than rounding, which may decide a few of 360 images.
    assert figures["accuracy"]["single"] == pytest.approx(figures["accuracy"]["isolated"], abs=0.01)
    assert list(figures["speedup"]) == list(figures["seconds"]) == ["1", "2", "4", "8", "16"]
    for count, tokens in figures["tokens"].items():
        assert tokens["comparative"] == tokens["isolated"] <= tokens["single"]
        if int(count) > 1:
            assert figures["flops"][count]["isolated"] < figures["flops"][count]["single"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert "/" not in json.loads((tmp_path / "model" / "yojo_config.json").read_text())["base_model"]


def test_score_prints_best_first_and_json_in_order(picture):
    path, label = picture
    wrong = (label + 3) % 10
    arguments = ["score", str(path), "--prompt", digits.PROMPT]
    arguments += ["--response", f"It is a {wrong}.", "--response", f"The digit is {label}."]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.stdout.splitlines() if line[:1] in "+-"]
    assert lines[0].endswith(f"The digit is {label}.") and len(lines) == 2
    result = CliRunner().invoke(app, [*arguments, "--json"])
    scores = json.loads(result.stdout.splitlines()[-1])["scores"]
    assert [row["response"] for row in scores] == [f"It is a {wrong}.", f"The digit is {label}."]
    assert scores[1]["score"] > scores[0]["score"]


def test_score_takes_a_model_folder(picture, make_reward_model, tmp_path):
    reward_model = make_reward_model(mode="isolated")
    reward_model.save_pretrained(tmp_path)
    arguments = ["score", str(picture[0]), "--prompt", "p", "--response", "7", "--model", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments)
    got = json.loads(result.stdout.splitlines()[-1])
    assert got["mode"] == "isolated"
    expected = reward_model.score("p", ["7"], images=[picture[0]])
    assert torch.tensor(got["scores"][0]["score"]) == pytest.approx(float(expected[0]), abs=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        (["missing.png"], "no such file: missing.png"),
        (["--response", " "], "response 1 is empty"),
        (["--model", "./nowhere"], "no such folder: ./nowhere"),
    ],
)
def test_score_says_what_is_wrong(picture, change, message):
    image = change[0] if not change[0].startswith("-") else str(picture[0])
    options = change if change[0].startswith("-") else []
    result = CliRunner().invoke(app, ["score", image, "--prompt", "p", "--response", "7", *options])
    assert result.exit_code == 2 and f"error: {message}" in result.output.replace("example 0: ", "").replace(
        "example: ", ""
    ).replace("image 0: ", "")


def test_info_names_versions_and_implementations():
    result = CliRunner().invoke(app, ["info"])
    assert result.exit_code == 0
    assert f"torch         {importlib.metadata.version('torch')}\n" in result.stdout
    assert "multi_response_attention: segments (" in result.stdout
    assert "decoder layers: none (layers are fused on CUDA devices" in result.stdout


def test_commands_refuse_unknown_options():
    assert CliRunner().invoke(app, ["demo", "--epochs", "3"]).exit_code == 2
    assert CliRunner().invoke(app, ["score"]).exit_code == 2
