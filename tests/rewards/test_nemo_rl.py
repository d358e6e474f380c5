"""NeMo-RL: the documented call of an environment and its reply, since it has no release that installs on a CPU.

`EnvironmentReturn`, the registries and what becomes of a reply are those of NVIDIA-NeMo/RL at 7ea279a (August 2026):
nemo_rl/environments/interfaces.py, nemo_rl/environments/utils.py and `calculate_rewards` in nemo_rl/experience/rollouts.py.
"""

import sys
import types
import typing

import pytest
import torch

from tests import reward_cases
from tests.reward_cases import Failing, Watched, picture
from yojo.demo import digits
from yojo.rewards import RewardError, nemo_rl
from yojo.rewards.nemo_rl import YojoEnvironment


class EnvironmentReturn(typing.NamedTuple):
    """As NeMo-RL declares it."""

    observations: list
    metadata: list
    next_stop_strings: list
    rewards: torch.Tensor
    terminateds: torch.Tensor
    answers: list | None


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Modules of NeMo-RL's names, with what an environment needs of them; the two registries."""
    modules = {
        "nemo_rl.environments.interfaces": {"EnvironmentReturn": EnvironmentReturn},
        "nemo_rl.environments.utils": {"ENV_REGISTRY": {"vlm": {"actor_class_fqn": "nemo_rl.environments.vlm"}}},
        "nemo_rl.distributed.ray_actor_environment_registry": {"ACTOR_ENVIRONMENT_REGISTRY": {}},
        "nemo_rl.distributed.virtual_cluster": {"PY_EXECUTABLES": types.SimpleNamespace(SYSTEM="python")},
    }
    for name in ("nemo_rl", "nemo_rl.environments", "nemo_rl.distributed"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, values in modules.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def environment(judge, size=2, **options):
    made = YojoEnvironment({"judge": "length", "group_size": size, **options})
    made.reward.scorer.judge = judge
    return made


def log(text, completion, *images):
    """A message log as its rollouts hand it over: roles and contents alone."""
    content = [{"type": "image", "image": image} for image in images] + [{"type": "text", "text": text}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": completion}]


def rewards_of(made, logs, metadata=None):
    """What NeMo-RL's `calculate_rewards` makes of a reply."""
    metadata = [{"ground_truth": "7"} for _ in logs] if metadata is None else metadata
    observations, kept, stops, rewards, terminateds, answers = made.step(logs, metadata)
    assert kept == metadata and stops == [None] * len(logs) and all(terminateds.bool().tolist())
    assert [one["content"] for one in observations] == [""] * len(logs)
    assert answers == [one[-1]["content"] for one in logs]
    assert rewards.shape == (len(logs),) and rewards.dtype == torch.float32
    return torch.stack([rewards[i] for i in range(len(logs))]).tolist()


def test_rewards_are_the_judges_scores_of_whole_groups(make_reward_model):
    judge = make_reward_model(layers=1)  # comparative: of whole groups, in the order they came in
    texts = [["It is a 3.", "This is a seven.", "A digit."], ["It is a 5.", "It is a 0.", "Nothing."]]
    images = reward_cases.pictures()[:2]
    made = environment(judge, 3, order="given")
    logs = [log(digits.PROMPT, text, image) for own, image in zip(texts, images, strict=True) for text in own]
    expected = [
        score
        for own, image in zip(texts, images, strict=True)
        for score in judge.score(digits.PROMPT, own, images=[image]).tolist()
    ]
    assert rewards_of(made, logs) == pytest.approx(expected, abs=2e-6)
    batch, metrics = made.global_post_process_and_metrics({"rewards": 1})
    assert batch == {"rewards": 1} and metrics["yojo/score"] == pytest.approx(sum(expected) / 6)


def test_the_prompt_is_all_that_stands_in_front_of_the_completion():
    judge = Watched()
    before = [{"role": "system", "content": "Be brief."}, *log("Hello", "Hi")]
    rewards_of(environment(judge, 1), [[*before, *log("What?", "abc")]])
    (example,) = judge.seen[0]
    assert [turn["role"] for turn in example.prompt] == ["system", "user", "assistant", "user"]
    assert list(example.responses) == ["abc"]


def test_one_question_about_two_pictures_is_two_groups():
    judge = Watched()
    images = [picture("red"), picture("blue")]
    rewards_of(environment(judge), [log("What?", text, image) for text in "ab" for image in images])
    assert [example.prompt[0]["content"][0]["image"] for example in judge.seen[0]] == images
    with pytest.raises(ValueError, match="an incomplete group: 1 completions"):
        environment(judge).step([log("What?", "a", image) for image in images], [{}, {}])


def test_asynchronous_rollouts_are_an_error_and_validation_has_a_size_of_its_own():
    with pytest.raises(ValueError, match="one completion, and groups of 2: asynchronous rollouts"):
        environment(Watched()).step([log("What?", "a")], [{}])
    assert rewards_of(environment(Watched(), 1), [log("What?", "abc")]) == [3.0]


def test_a_prompt_that_has_a_template_in_it():
    logs = [
        [
            {"role": "user", "content": "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"},
            {"role": "assistant", "content": text},
        ]
        for text in ("a", "bb")
    ]
    with pytest.raises(ValueError, match=r"row 0: a chat template has been put into the prompt.*extra_env_info"):
        environment(Watched()).step(logs, [{}, {}])
    judge = Watched()
    rewards_of(environment(judge), logs, [{"prompt": [{"role": "user", "content": "What?"}]}] * 2)
    assert judge.seen[0][0].prompt == [{"role": "user", "content": "What?"}]


@pytest.mark.parametrize(
    "changed, match",
    [
        ([{"role": "user", "content": "What?"}], "row 1: the messages must end with the assistant's completion"),
        (
            [*log("What?", "a"), {"role": "environment", "content": "no"}, *log("", "b")[1:]],
            "row 1: an environment has",
        ),
        (log("What?", ["a"]), "row 1: the messages must end with the assistant's completion, a string"),
        (log("What?", "a", "http://host/a.png"), "row 1: image: http://host/a.png is a URL"),
    ],
)
def test_logs_that_cannot_be_judged(changed, match):
    with pytest.raises(ValueError, match=match):
        environment(Watched()).step([log("What?", "a"), changed], [{}, {}])


def test_errors_are_errors(monkeypatch):
    monkeypatch.setattr("yojo.rewards.scorer.PAUSE", 0.0)
    with pytest.raises(RewardError, match="the line is down"):
        environment(Failing()).step([log("What?", "a"), log("What?", "b")], [{}, {}])
    with pytest.raises(ValueError, match="row 0: nothing of its group can be judged"):
        environment(Watched()).step([log("What?", ""), log("What?", " ")], [{}, {}])


@pytest.mark.parametrize(
    "config, match",
    [
        ({"judge": "length"}, "judge and group_size must be a name and an int, got 'length' and None"),
        ({"judge": "length", "group_size": 2, "empty": "none"}, "empty='none': NeMo-RL has no sample"),
        ({"judge": "length", "group_size": 2, "truncated": "lowest"}, "truncated: NeMo-RL does not tell"),
        ({"judge": "length", "group_size": 2, "sead": 1}, "sead"),
    ],
)
def test_configuration(config, match):
    with pytest.raises((TypeError, ValueError), match=match):
        YojoEnvironment(config)


def test_registered_it_is_found_where_nemo_rl_looks(installed):
    pytest.importorskip("ray")
    nemo_rl.register("vlm", num_gpus=0.5)
    name = installed["nemo_rl.environments.utils"]["ENV_REGISTRY"]["vlm"]["actor_class_fqn"]
    module, _, attribute = name.rpartition(".")
    assert hasattr(getattr(sys.modules[module], attribute), "options")  # an actor of Ray
    actors = installed["nemo_rl.distributed.ray_actor_environment_registry"]["ACTOR_ENVIRONMENT_REGISTRY"]
    assert actors == {name: "python"}
