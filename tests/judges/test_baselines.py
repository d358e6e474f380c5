"""What a judge is and what it gives; baselines; judges by their names."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import tiny
import torch
import transformers
from saved_cases import adapted, backbone, scores
from turn_cases import text_model, tokenizer_of_kind

import yojo
from yojo.judges import Classifier, Judge, Length, Place, Random, checked_scores, fingerprint_of, load_judge
from yojo.judges.loading import BASELINES

ONE = yojo.Example("How many?", ["Two.", "I see three of them.", "née"], id="one")
OTHER = yojo.Example("Which?", ["This one."])


def test_importing_judges_loads_nothing_heavy():
    code = "import sys, yojo; yojo.judges, dir(yojo.judges); print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "False"]
    assert {"Classifier", "load_judge", "Random"} <= set(dir(yojo.judges)) and "judges" in yojo.__all__
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        yojo.judges.Nothing  # noqa: B018


# ---- judges ----


class Mine:
    def __init__(self, found):
        self.found = found

    def score_many(self, examples):
        return self.found


def test_what_a_judge_is():
    assert isinstance(Mine([]), Judge) and isinstance(Length(), Judge) and not isinstance(object(), Judge)
    assert fingerprint_of(Place()) == {"judge": "Place", "last": False}
    with pytest.raises(TypeError, match=r"Mine has no fingerprint\(\): give it such a method.*or pass fingerprint="):
        fingerprint_of(Mine([]))
    for wrong in (None, {}, "mine"):
        judge = Mine([])
        judge.fingerprint = lambda wrong=wrong: wrong
        with pytest.raises(TypeError, match=r"Mine.fingerprint\(\) must return a dict"):
            fingerprint_of(judge)


@pytest.mark.parametrize(
    "found",
    [
        [[1, 2, 3.5], [4]],
        (row for row in ([1, 2, 3.5], (4,))),
        [np.array([1, 2, 3.5]), np.array([4])],
        [np.array([3.5, 2, 1])[::-1], np.array([4], ">f4")],
        [np.array([1, 2.0, 3.5], object), np.frombuffer(np.array([4], np.float32).tobytes(), np.float32)],
        [torch.tensor([1, 2, 3.5], dtype=torch.float64, requires_grad=True), torch.tensor([4], dtype=torch.bfloat16)],
    ],
)
def test_scores_in_one_form(found):
    made = checked_scores([ONE, OTHER], found)
    assert [row.tolist() for row in made] == [[1.0, 2.0, 3.5], [4.0]]
    assert all(row.dtype == torch.float32 and not row.requires_grad for row in made)


@pytest.mark.parametrize(
    "found, error, message",
    [
        ([[1, 2, 3]], ValueError, "gave scores for 1 examples, it was asked for 2"),
        ([[1, 2], [4]], ValueError, "example 'one': the judge gave 2 scores for 3 responses"),
        ([[1, 2, 3], [[4]]], ValueError, r"example: the judge gave scores of shape \[1, 1\] for 1 responses"),
        ([[1, 2, 3], 4], ValueError, r"example: the judge gave scores of shape \[\] for 1 responses"),
        ([["a", 2, 3], [4]], TypeError, "example 'one': the judge's scores are no numbers"),
        ([[1, 2, 3], None], TypeError, "example: the judge's scores are no numbers"),
        ([[1, 2j, 3], [4]], TypeError, "example 'one': the judge's scores are no numbers.*complex"),
        ([np.array([1, 2j, 3]), [4]], TypeError, "example 'one': the judge's scores are no numbers.*complex"),
        ([np.array(["1", "2", "3"]), [4]], TypeError, "example 'one': the judge's scores are no numbers"),
        (None, TypeError, "must return a list with N scores for each example, got NoneType"),
        ({"scores": [1]}, TypeError, "must return a list with N scores for each example, got dict"),
    ],
)
def test_scores_that_do_not_fit(found, error, message):
    with pytest.raises(error, match=message):
        checked_scores([ONE, OTHER], Mine(found).score_many([ONE, OTHER]))


# ---- baselines ----


@pytest.mark.parametrize(
    "judge, expected",
    [
        (Length(), [[4, 20, 3], [9]]),
        (Length("words"), [[1, 5, 1], [2]]),
        (Length("words", shortest=True), [[-1, -5, -1], [-2]]),
        (Place(), [[0, -1, -2], [0]]),
        (Place(last=True), [[0, 1, 2], [0]]),
    ],
)
def test_length_and_place(judge, expected):
    found = judge.score_many(iter([ONE, OTHER]))
    assert [row.tolist() for row in found] == expected and all(row.dtype == torch.float32 for row in found)
    assert judge.fingerprint() == json.loads(json.dumps(judge.fingerprint()))
    assert eval(repr(judge)) == judge


def test_bad_baselines():
    for make, error, message in (
        (lambda: Length("tokens"), ValueError, "unit must be one of characters, words, got 'tokens'"),
        (lambda: Length(shortest=1), TypeError, "shortest must be a bool"),
        (lambda: Place("last"), TypeError, "last must be a bool"),
        (lambda: Random("0"), TypeError, "seed must be an int"),
        (lambda: Random(True), TypeError, "seed must be an int"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_chance_depends_on_content_alone():
    (first,) = Random(3).score_many([ONE])
    assert first.tolist() == Random(3).score_many([OTHER, ONE])[1].tolist()
    shorter = dataclasses.replace(ONE, responses=ONE.responses[:2], rankings=[2, 1], id="another id")
    assert Random(3).score_many([shorter])[0].tolist() == first[:2].tolist()  # company does not count
    for other in (
        Random(4).score_many([ONE])[0],
        Random(3).score_many([dataclasses.replace(ONE, prompt="How many are there?")])[0],
        Random(3).score_many([dataclasses.replace(ONE, responses=[*ONE.responses[1:], ONE.responses[0]])])[0],
        Random(3).score_many([dataclasses.replace(ONE, responses=[f"{text}!" for text in ONE.responses])])[0],
    ):
        assert not set(other.tolist()) & set(first.tolist())
    assert len(set(Random().score_many([yojo.Example("?", ["a"] * 4)])[0].tolist())) == 4  # places count
    # A figure that no later version may change: scores of a seed are compared over years.
    assert Random(3).score_many([OTHER])[0].tolist() == [PINNED]
    assert Random(3).fingerprint() != Random(4).fingerprint() and eval(repr(Random(3))) == Random(3)


PINNED = 0.05642545223236084


def test_chance_sees_pictures_and_is_uniform(samples, tmp_path):
    (one, _), (other, _) = samples[:2]
    made = [yojo.Example("Which?", ["a", "b"], images=[image]) for image in (one, other, one)]
    first, second, third = (row.tolist() for row in Random().score_many(made))
    assert first == third != second
    with pytest.raises(ValueError, match="example 'x': .*nowhere.png"):
        Random().score_many([yojo.Example("?", ["a"], images=[tmp_path / "nowhere.png"], id="x")])
    many = torch.cat(Random(1).score_many([yojo.Example(str(n), ["a", "b", "c", "d"]) for n in range(1000)]))
    assert 0 <= many.min() and many.max() < 1 and abs(many.mean() - 0.5) < 0.02 and abs(many.std() - 12**-0.5) < 0.01
    assert len(set(many.tolist())) > 3990


# ---- by name ----


@pytest.mark.parametrize(
    "name, judge",
    [
        ("length", Length()),
        ("length:characters", Length()),
        ("length:words", Length("words")),
        ("length:shortest", Length(shortest=True)),
        ("length:shortest:words", Length("words", shortest=True)),
        ("place", Place()),
        ("place:first", Place()),
        ("place:last", Place(last=True)),
        ("random", Random(0)),
        ("random:7", Random(7)),
    ],
)
def test_baselines_by_name(name, judge):
    assert load_judge(name, device="cpu") == judge


@pytest.mark.parametrize("name", ["length:tokens", "length:words:words", "length:words:characters", "place:middle"])
@pytest.mark.parametrize("more", ["", "random:one", "random:1:2"])
def test_baselines_that_do_not_exist(name, more):
    with pytest.raises(ValueError, match="is no baseline; there are length, length:words, .*random:SEED"):
        load_judge(more or name)


@pytest.mark.parametrize("name", ["length#isolated", "place#permutations=4"])
def test_baselines_have_no_modes(name):
    with pytest.raises(ValueError, match=f"{name.partition('#')[0]} is a baseline, which has no modes"):
        load_judge(name)


def test_a_folder_with_the_name_of_a_baseline(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "length").mkdir()
    with pytest.raises(
        ValueError, match=r"'length' is a baseline, and there is a folder .* write \./length .*characters"
    ):
        load_judge("length")
    assert load_judge("length:characters") == Length() and load_judge("place") == Place()
    for folder in ("./length", tmp_path / "length"):
        with pytest.raises(ValueError, match="length is no YOJO reward model: it has no yojo_config.json"):
            load_judge(folder)


def test_options_that_a_baseline_has_not():
    for options in ({"base_model": "x"}, {"dtype": "float32"}, {"max_length": 5}):
        with pytest.raises(ValueError, match="is given, and the baseline place has no model"):
            load_judge("place", **options)
    assert set(BASELINES) >= {"length", "place", "random"}


def test_what_is_no_judge(tmp_path):
    with pytest.raises(ValueError, match="no such folder: "):
        load_judge(tmp_path / "nowhere")
    backbone().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is no YOJO reward model"):
        load_judge(tmp_path)
    for dtype in ("bf16", "int8", 7):
        with pytest.raises(ValueError, match="dtype must be a float dtype of torch"):
            load_judge(tmp_path, dtype=dtype)


def test_reward_models_by_name(tmp_path):
    backbone().save_pretrained(tmp_path / "base")
    reward_model = adapted(tmp_path / "base")
    reward_model.save_pretrained(tmp_path / "adapter")
    loaded = load_judge(tmp_path / "adapter", max_length=30)
    assert isinstance(loaded, yojo.RewardModel) and torch.equal(scores(loaded), scores(reward_model))
    with pytest.raises(ValueError, match="more than max_length=30"):
        loaded.score("which one is it, of all of these?", ["this"])
    assert load_judge(str(tmp_path / "adapter"), dtype="bfloat16").model.dtype == torch.bfloat16
    backbone(seed=4).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="adapter trained on other weights"):
        load_judge(tmp_path / "adapter", base_model=str(tmp_path / "other"))
    load_judge(tmp_path / "adapter", base_model=str(tmp_path / "other"), check_base=False)
    # A checkpoint of transformers' Trainer.
    kind = tokenizer_of_kind("bytes", "chatml")
    made = text_model(kind, mode="isolated", head_dim=8)
    made.model.save_pretrained(tmp_path / "checkpoint")
    kind.save_pretrained(tmp_path / "checkpoint")
    assert torch.equal(
        load_judge(tmp_path / "checkpoint").score("is it?", ["yes", "no"]), made.score("is it?", ["yes", "no"])
    )


def test_classifiers_by_name(tmp_path):
    kind = tokenizer_of_kind("bytes", "chatml")
    config = transformers.LlamaConfig(**(tiny.TEXT | dict(vocab_size=len(kind), num_labels=1)))
    tiny.randomise(transformers.AutoModelForSequenceClassification.from_config(config), 0).save_pretrained(tmp_path)
    kind.save_pretrained(tmp_path)
    loaded = load_judge(str(tmp_path), dtype="float32", max_length=40)
    assert isinstance(loaded, Classifier) and loaded.max_length == 40
    assert [len(row) for row in loaded.score_many([ONE, OTHER])] == [3, 1]
    with pytest.raises(ValueError, match="base_model is given, but .* holds a full model, a sequence classifier"):
        load_judge(tmp_path, base_model="x")
