"""The list of benchmarks, and how their data are downloaded."""

import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from yojo.data import DataError
from yojo.evaluation import benchmarks


def test_every_name_is_a_benchmark():
    assert len(benchmarks.names()) == len(set(benchmarks.names())) == 16
    for name in benchmarks.names():
        found = benchmarks.get(name)
        assert found.name == name and found.title and found.notes and found.headline
        assert all(20 < value < 100 for value in found.published.values())
        assert not set(found.fields) & set(found.optional)


def test_published_figures_are_those_of_the_papers_table():
    table = {
        "Molmo2-4B RM": [82.2, 73.2, 92.4, 62.5, 66.3, 50.7], "Qwen3-VL-4B RM": [63.3, 71.2, 84.7, 58.8, 64.9, 47.5],
        "GPT-5 as judge": [75.0, 64.6, 71.8, 87.1, 68.2, 50.1],
        "Skywork-VL-Reward 7B": [69.0, 74.2, 72.4, 52.9, 62.9, 46.7],
        "IXC-2.5-Reward 7B": [70.0, 66.6, 71.2, 55.0, 57.1, 48.7],
    }  # fmt: skip
    means = dict(zip(table, [71.2, 65.1, 69.5, 63.0, 61.4], strict=True))
    columns = [
        "vl-rewardbench", "multimodal-rewardbench", "mm-rlhf-rewardbench", "mr2bench-image-4", "videorewardbench",
        "mr2bench-video-4",
    ]  # fmt: skip
    for model, figures in table.items():
        found = [benchmarks.get(name).published[model] for name in columns]
        assert found == figures
        assert sum(found) / 6 == pytest.approx(means[model], abs=0.06)
    assert [name for name in benchmarks.names() if benchmarks.get(name).published] != []
    assert {name for name in benchmarks.names() if benchmarks.get(name).published} == set(columns)


def test_published_counts_add_up():
    totals = {
        "vl-rewardbench": 1250, "rewardbench2": 1865, "judgebench": 620, "judgebench-gpt": 350, "judgebench-claude": 270,
        "mmrb2": 4000,
    }  # fmt: skip
    for name, total in totals.items():
        assert sum(benchmarks.get(name).counts.values()) == total


def test_an_unknown_name_lists_those_there_are():
    with pytest.raises(
        ValueError, match="no benchmark 'VL_RewardBench'; did you mean vl-rewardbench.*Known: vl-rewardbench, mult"
    ):
        benchmarks.get("VL_RewardBench")
    with pytest.raises(ValueError, match="did you mean .*judgebench"):
        benchmarks.open_benchmark("judge-bench", [])
    with pytest.raises(ValueError, match=r"no benchmark 'zzz'\. Known: "):
        benchmarks.get("zzz")
    with pytest.raises(ValueError, match="no benchmark None"):
        benchmarks.get(None)


def test_importing_benchmarks_loads_nothing_heavy():
    heavy = "torch", "scipy", "pyarrow", "huggingface_hub", "transformers"
    code = f"import sys; from yojo.evaluation import benchmarks; print([m for m in {heavy} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# ---- download ----


@pytest.fixture
def asked(monkeypatch):
    calls = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda *args, **options: calls.append((args, options)) or options["local_dir"],
    )
    return calls


def test_a_download_asks_for_the_benchmarks_files(asked, tmp_path):
    assert benchmarks.download("mm-rlhf-rewardbench", tmp_path / "data", revision="v1") == tmp_path / "data"
    assert benchmarks.download("mr2bench-image", str(tmp_path)) == tmp_path
    ((repo,), options), ((other,), more) = asked
    assert repo == "yifanzhang114/MM-RLHF-RewardBench" and options == {
        "repo_type": "dataset", "revision": "v1", "local_dir": tmp_path / "data",
        "allow_patterns": ["mm_reward_bench.jsonl", "images/*"],
    }  # fmt: skip
    assert other == "yinuoy/MR2Bench" and more["allow_patterns"] is None and more["revision"] is None


def test_a_benchmark_that_is_not_on_the_hub_says_where_it_is(asked, tmp_path):
    with pytest.raises(ValueError, match="Multimodal RewardBench is not on the Hugging Face hub.*facebookresearch"):
        benchmarks.download("multimodal-rewardbench", tmp_path)
    with pytest.raises(ValueError, match="no benchmark"):
        benchmarks.download("nothing", tmp_path)
    assert asked == []


@pytest.mark.parametrize(
    "kind, message",
    [
        (GatedRepoError, "is gated: accept its conditions at https://huggingface.co/datasets/allenai/reward-bench-2"),
        (RepositoryNotFoundError, "reward-bench-2 is not there, or needs a login"),
        (RevisionNotFoundError, "has no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(kind, message, monkeypatch, tmp_path):
    class Refused(kind):
        def __init__(self):
            Exception.__init__(self, "refused")

    def refuse(*_, **__):
        raise Refused

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(DataError, match=message):
        benchmarks.download("rewardbench2", tmp_path, revision="v9")
