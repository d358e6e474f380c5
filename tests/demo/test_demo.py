"""The demonstration: what ships, what the commands print, and that it learns."""

import importlib.metadata
import json
import random
import re
import subprocess
import sys
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

from yojo.cli import app
from yojo.demo import digits, progress, reward, run


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


def test_the_demo_runs_and_writes_its_figures(tmp_path, monkeypatch):
    """A short run: the figures are there and consistent; what they reach is for `yojo demo` to show."""
    monkeypatch.setattr(run, "Progress", partial(progress.Progress, every=0))
    figures_file, model = tmp_path / "figures.json", tmp_path / "model"
    options = ["--steps", "6", "--images", "24", "--rounds", "1", "--out", tmp_path, "--json", figures_file]
    result = CliRunner().invoke(app, ["demo", *map(str, options), "--save", str(model)])
    assert result.exit_code == 0, result.output
    figures = json.loads(figures_file.read_text())
    assert set(figures["accuracy"]) == {"comparative", "isolated", "single"}
    # After six steps scores differ by little: rounding may decide which is best, but moves none by more than this.
    assert figures["single_difference"] < 1e-4 and figures["single_images"] == figures["held_out_images"] == 24
    assert figures["accuracy"]["single"] == pytest.approx(figures["accuracy"]["isolated"], abs=0.09)
    assert figures["isolated_on_single_images"] == figures["accuracy"]["isolated"]
    assert list(figures["speedup"]) == list(figures["seconds"]) == ["1", "2", "4", "8", "16"]
    for count, tokens in figures["tokens"].items():
        assert tokens["comparative"] == tokens["isolated"] <= tokens["single"]
        if int(count) > 1:
            assert figures["flops"][count]["isolated"] < figures["flops"][count]["single"]
    assert (tmp_path / "demo.png").stat().st_size > 10_000
    assert "/" not in json.loads((model / "yojo_config.json").read_text())["base_model"]

    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{figures['cpu']}; cores: {figures['cores']}; OMP_NUM_THREADS: ")
    assert f"torch {importlib.metadata.version('torch')}, transformers {figures['transformers']}" in lines[0]
    assert lines[1] == "expected time: twice 6 steps of training"
    assert lines[2:7] == [f"loading {name}" for name in ("torch", "transformers", "peft", "sklearn", "matplotlib")]
    for mode in run.MODES:
        steps = [line for line in lines if line.startswith(f"{mode}: step ")]
        assert re.fullmatch(rf"{mode}: step 5 of 6, loss \d\.\d+, \d+ s, about \d+ s of training left", steps[0]), steps
        assert any(line.startswith(f"{mode}: trained in ") and "scoring 24 held-out images" in line for line in lines)
    prepared = [
        [line for line in lines if line.startswith(f"{mode}: preparing image ")] for mode in ("isolated", "comparative")
    ]
    assert len(prepared[0]) == 191 and prepared[0][-1] == "isolated: preparing image 192 of 192"
    assert 50 < len(prepared[1]) < 190  # the others are known
    assert sum(line.startswith("single: scoring image ") for line in lines) == 23
    assert [line.split()[-2] for line in lines if line.startswith("measuring ")] == ["1", "2", "4", "8", "16"]


def test_the_first_line_is_there_before_anything_is_loaded(tmp_path):
    """In a pipe, too, and with the time that it takes."""
    code = (
        "import sys, importlib.abc\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'sklearn', 'matplotlib', 'peft'): import os; os._exit(7)\n"
        "sys.meta_path.insert(0, Stop())\n"
        "sys.argv = ['yojo', 'demo']\n"
        "from yojo.cli import main\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 7, result.stderr  # without a flush of what was printed
    lines = result.stdout.splitlines()
    assert lines[0] == progress.machine()
    assert lines[1:] == ["expected time: about 2 to 3 minutes on two cores", "loading torch"]


def test_progress_shows_now_and_then(capsys, monkeypatch):
    """After a second what is measured so far, then a line every few seconds, and the last; the time left counts what follows."""
    clock = iter([0.0, 1.0, 2.0, 6.0, 7.0, 7.5])  # of each call
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    report = progress.Progress("isolated", ahead=50)
    report("step", 0, 50)
    for done in (10, 20, 30, 40, 50):
        report("step", done, 50, 0.5)
    assert capsys.readouterr().out.splitlines() == [
        "isolated: step 10 of 50, loss 0.500, 1 s, about 9 s of training left",
        "isolated: step 30 of 50, loss 0.500, 6 s, about 14 s of training left",
        "isolated: step 50 of 50, loss 0.500, 8 s, about 8 s of training left",
    ]


@pytest.mark.parametrize("mode", run.MODES)
def test_examples_encoded_once_are_what_the_collator_makes_of_them(make_reward_model, mode):
    collator = make_reward_model(mode=mode).collator
    samples = digits.load_digits_split()[0][:3]
    examples = reward.make_examples(samples, 7, seed=0)
    known = {}
    found = reward.encode(collator, samples, examples[:4], known) + reward.encode(
        collator, samples, examples[4:], known
    )
    for one, other in zip(found, [collator.encode(example) for example in examples], strict=True):
        assert one.name == other.name
        for field in set(vars(one)) - {"name"}:
            torch.testing.assert_close(getattr(one, field), getattr(other, field), rtol=0, atol=0)


def test_the_separator_begins_as_a_full_stop(make_reward_model):
    reward_model = make_reward_model(mode="isolated")
    model, processor = reward_model.model, reward_model.processor
    reward._start_separator(model, processor)
    stop, separator = processor.tokenizer.convert_tokens_to_ids([".", model.yojo.config.separator])
    embeddings = model.get_input_embeddings().weight
    torch.testing.assert_close(embeddings[separator] + model.score.separator_delta, embeddings[stop])
    torch.testing.assert_close(model.get_input_embeddings()(torch.tensor(separator)), embeddings[stop])


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
