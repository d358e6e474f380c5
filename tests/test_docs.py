"""What the documentation says is true: snippets run, commands exist, links lead somewhere, made pages are up to date."""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import json
import os
import re
import shlex
import sys
from pathlib import Path

import datasets
import pytest
import real_processors
import torch
import trl
from PIL import Image

import yojo
from tests.serving.serving_cases import engine_of, listening
from yojo.demo.backbone import BACKBONE
from yojo.serving.schemas import GroupRequest, ScoreRequest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

import arguments  # noqa: E402  beside the pages
import pages  # noqa: E402

EVERY = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(DOCS.glob("*.md"))
# The log tells what was tried when, and the results say themselves how they were made.
RUN = [path for path in EVERY if path.name not in ("CHANGELOG.md", "log.md", "benchmarks.md")]
SHOWN = {path: str(path.relative_to(ROOT)) for path in EVERY}


# ---- blocks of code ----


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: page, number of its first line, language ("" for commands), text."""

    page: str
    line: int
    language: str
    text: str


def blocks():
    for path in RUN:
        lines, start = path.read_text().splitlines(), None
        for number, line in enumerate(lines, 1):
            if line.startswith("```") and start is None:
                start = number
            elif line == "```":
                text = "\n".join(lines[start : number - 1])
                yield Block(SHOWN[path], start + 1, lines[start - 1].removeprefix("```"), text)
                start = None
        assert start is None, f"{path}:{start}: the block is not closed"


BLOCKS = list(blocks())
LANGUAGES = {"python", "json", "yaml", "", "bash", "text", "diff"}


def of(*languages):
    return [block for block in BLOCKS if block.language in languages]


def test_blocks_name_a_language_that_is_tested():
    names = {block.language for block in BLOCKS}
    assert {name for name in names if not name.startswith("{")} <= LANGUAGES
    assert {name for name in names if name.startswith("{")} <= {"{toctree}"}


def added_rows():
    """The rows that diffs add to files of `yojo/families/`, evaluated there."""
    for block in of("diff"):
        module, lines = None, []
        for line in [*block.text.splitlines(), "@@"]:
            if line.startswith("+"):
                lines.append(line[1:])
            elif line.startswith(("@@", "---")):
                if module is not None and lines:
                    yield from eval(f"({chr(10).join(lines)})", dict(vars(module)))
                lines = []
                if line.startswith("---"):
                    path = line.removeprefix("--- a/").removesuffix(".py")
                    named = path.startswith("yojo/families/")
                    module = importlib.import_module(path.replace("/", ".")) if named else None


def test_the_rows_of_a_family_in_a_diff_are_its_rows():
    from yojo import families

    rows = list(added_rows())
    assert [row.name for row in rows if isinstance(row, families.Family)] == ["Qwen2", "Qwen3-VL"]
    for row in rows:
        if isinstance(row, families.Decoder):
            assert row in families.DECODERS
        elif row.name != "Qwen2":
            (known,) = [family for family in families.FAMILIES if family.name == row.name]
            assert row == dataclasses.replace(known, tower=dataclasses.replace(known.tower, also=()))


# ---- Python ----


@pytest.fixture()
def here(tmp_path, samples, monkeypatch):
    """A folder with the files that snippets name, which is the working directory."""
    image = samples[0][0]
    for name in ("picture.jpg", "three.png", "a.png"):
        image.save(tmp_path / name)
    for number in range(1, 5):
        Image.new("RGB", (32, 24), (40 * number, 80, 120)).save(tmp_path / f"frame-{number}.png")
    record = {
        "prompt": "Which digit is shown?",
        "image": "a.png",
        "responses": ["It is a 3.", "A two."],
        "rankings": [1, 2],
    }
    (tmp_path / "train.jsonl").write_text(3 * (json.dumps(record) + "\n"))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture()
def hub(monkeypatch, backbone):
    """Names on the hub are the demonstration's backbone, on the CPU in float32."""
    import transformers

    model, processor = backbone

    def stands_for(auto, local):
        original = auto.from_pretrained

        def load(name, **options):
            return copy.deepcopy(local) if name == "Qwen/Qwen3-VL-4B-Instruct" else original(name, **options)

        monkeypatch.setattr(auto, "from_pretrained", load)

    stands_for(transformers.AutoModelForImageTextToText, model)
    stands_for(transformers.AutoProcessor, processor)


def given(page, backbone, samples):
    """What a page's snippets take for granted."""
    model, processor = copy.deepcopy(backbone)
    if page == "README.md":
        image, _ = samples[0]
        responses = ["It is a 3.", "This is a seven.", "A two.", "Nine."]
        question = [{"role": "user", "content": "Which digit is shown?"}]
        return {
            "preferences": [("Which digit is shown?", responses, image, [2, 1, 3, 4])] * 2,
            "policy": model,
            "dataset": datasets.Dataset.from_list([{"prompt": question, "image": image}]),
        }
    if page == "docs/scoring.md":
        return {"yojo": yojo, "reward_model": real_processors.reward_model("Qwen3-VL", "isolated")[0]}
    if page == "docs/files.md":
        reward_model = real_processors.reward_model("Qwen3-VL", "isolated")[0]
        records = [{"prompt": f"Which is {n}?", "responses": ["This one.", "That one."]} for n in range(4)]
        Path("candidates.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        reward_model.save_pretrained("my-reward-model")
        return {"yojo": yojo, "reward_model": reward_model}
    if page in ("docs/evaluation.md", "docs/rankings.md"):
        reward_model = real_processors.reward_model("Qwen3-VL", "comparative")[0]
        records = [
            {"prompt": f"Which is {n}?", "responses": ["This one.", "That."], "rankings": [1, 2]} for n in range(4)
        ]
        Path("held_out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        examples = [yojo.Example(record["prompt"], record["responses"]) for record in records]
        return {"yojo": yojo, "reward_model": reward_model, "examples": examples}
    if page == "docs/rl.md":
        question, (image, _) = [{"role": "user", "content": "Which digit is shown?"}], samples[0]
        dataset = datasets.Dataset.from_list([{"prompt": question, "image": image}])
        reward_model = yojo.RewardModel(yojo.patch(model, processor), processor)
        reward_model.save_pretrained("my-reward-model")
        policy, _ = copy.deepcopy(backbone)
        return {"policy": policy, "processor": processor, "dataset": dataset}
    if page == "docs/attention.md":
        return {
            "query": torch.randn(290, 4, 16),
            "key": torch.randn(290, 2, 16),
            "value": torch.randn(290, 2, 16),
            "hidden": torch.randn(290, 8),
            "rows": torch.tensor([119, 169, 189, 254]),
            "weight1": torch.randn(6, 8),
            "bias1": torch.randn(6),
            "weight2": torch.randn(1, 6),
            "bias2": torch.randn(1),
            "rankings": torch.tensor([1, 2, 3, 1]),
            "offsets": torch.tensor([0, 3, 4], dtype=torch.int32),
        }
    if page == "docs/costs.md":
        return {"model": yojo.patch(model, processor)}
    return {"model": model, "processor": processor}


@pytest.mark.parametrize("page", sorted({block.page for block in of("python")}))
def test_the_snippets_of_a_page_run_one_after_the_other(page, here, hub, backbone, samples, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(
        trl, "GRPOConfig", functools.partial(trl.GRPOConfig, use_cpu=True, bf16=False, report_to="none")
    )
    names = {"__name__": "snippet", **given(page, backbone, samples)}
    with contextlib.ExitStack() as stack:
        if page == "docs/serving.md":
            names["url"] = stack.enter_context(listening(engine_of())).url
        for block in of("python"):
            if block.page == page:
                exec(compile("\n" * (block.line - 1) + block.text, str(ROOT / page), "exec"), names)
    if page == "README.md":
        assert names["reward_model"].config.mode == "isolated" and (here / "my-reward-model").is_dir()
    if page == "docs/attention.md":
        assert names["output"].shape == (290, 4, 16) and names["loss"].isfinite() and (here / "tiles.png").is_file()
    if page == "docs/scoring.md":
        assert len(names["examples"]) == 2 and names["scores"].isfinite().all()


@pytest.mark.parametrize("block", of("json"), ids=lambda block: f"{block.page}:{block.line}")
def test_records_are_read(block, here, samples):
    records = [json.loads(line) for line in block.text.splitlines()]
    (here / "images").mkdir()
    samples[0][0].save(here / "images" / "7.png")
    (here / "records.jsonl").write_text(block.text)
    assert [len(example.responses) for example in yojo.data.load("records.jsonl")] == [
        len(r["responses"]) for r in records
    ]


def test_yaml_is_read():
    import yaml

    for block in of("yaml"):
        assert yaml.safe_load(block.text), block


# ---- commands ----


def commands():
    """(words, where) of every command line; a backslash at the end of a line goes on in the next."""
    for block in of("", "bash"):
        text = block.text.replace("\\\n", " ")
        for number, line in enumerate(text.splitlines()):
            if words := shlex.split(line, comments=True):
                yield words, f"{block.page}:{block.line + number}"


def unwrapped(words):
    """The command itself: without variables before it, and without the launcher of several processes."""
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    if words[0] in ("torchrun", "accelerate"):
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        words = ["python", *words[words.index("-m") :]]
    if words[:3] == ["python", "-m", "yojo.cli"]:
        words = ["yojo", *words[3:]]
    if words[:3] == ["python", "-m", "pytest"]:
        words = words[2:]
    return words


def check_yojo(words):
    """The command exists and takes these options."""
    name = " ".join(words[:2]) if words[0] == "data" else words[0]
    rest = words[len(name.split()) :]
    found = dict(pages.commands())
    assert name in found, f"there is no command yojo {name}"
    if name == "train":
        return check_training(rest)
    known = {option for one in found[name].params for option in (*one.opts, *one.secondary_opts)}
    unknown = [word for word in rest if word.startswith("--") and word not in known]
    assert not unknown, f"yojo {name} has no {', '.join(unknown)}"
    missing = [one.name for one in found[name].params if one.required and one.param_type_name == "option"]
    missing = [one for one in missing if f"--{one.replace('_', '-')}" not in rest and "..." not in rest]
    assert not missing, f"yojo {name} needs {', '.join(missing)}"


def check_training(words):
    """`yojo train`'s options, and its file where it is one of ours."""
    from yojo.training import recipe

    if "examples/" not in " ".join(words):
        words = [word.replace("run.yaml", "examples/digits.yaml") for word in words]
    recipe.parse(words)


def check_make(words):
    """The target exists."""
    text = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", text, re.MULTILINE)) | set(
        re.findall(r"^GPU_PORTIONS := (.*)$", text, re.M)[0].split()
    )
    wanted = [word for word in words if "=" not in word and not word.startswith("-")]
    assert set(wanted) <= targets, f"make has no {set(wanted) - targets}"


def check_pip(words):
    """Extras that are asked of us exist."""
    text = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = re.findall(r"^([\w-]+) = ", text, re.MULTILINE)
    for word in words:
        if found := re.fullmatch(r"(?:\.|yojo)\[(.*)\]", word):
            assert set(found[1].split(",")) <= set(extras), f"there is no extra {found[1]}"


def check_python(words):
    """The module or script exists and names its options."""
    place = importlib.util.find_spec(words[1]).origin if words[0] == "-m" else ROOT / words[0]
    text = Path(place).read_text()
    for word in words[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, f"{place} knows no {word}"


def check_pytest(words):
    """The files exist, tests of that name are in them, and options of ours are known."""
    ours = (ROOT / "bench" / "conftest.py").read_text()
    files = [word for word in words if not word.startswith("-") and "/" in word or word == "bench"]
    assert all((ROOT / word).exists() for word in files), files
    for word in words:
        assert not word.startswith("--") or f'"{word}"' in ours or word == "--benchmark-only", word
    if "-k" in words:
        (file,) = files
        wanted = words[words.index("-k") + 1].split(" and ")[0]
        text = (ROOT / file).read_text()
        assert wanted in text or wanted in (ROOT / "tests" / "tiny.py").read_text(), f"{file} has no test {wanted}"


def check_curl(words):
    """The server has an endpoint there, and takes what it is sent."""
    (url,) = [word for word in words if word.startswith("localhost:8000/")]
    body = json.loads(words[words.index("-d") + 1])
    schema = {"/group": GroupRequest, "/score": ScoreRequest}[url.removeprefix("localhost:8000")]
    schema.model_validate(body)


CHECKS = {
    "curl": check_curl,
    "yojo": check_yojo,
    "make": check_make,
    "python": check_python,
    "pytest": check_pytest,
    "pip": check_pip,
}


@pytest.mark.parametrize("page", sorted({block.page for block in of("", "bash")}))
def test_commands_exist(page, here, monkeypatch):
    for words, where in commands():
        if where.rpartition(":")[0] == page:
            name, *rest = unwrapped(words)
            assert name in CHECKS, (
                f"{where}: nothing checks {name}: say in tests/test_docs.py how, or mark the block as text"
            )
            try:
                CHECKS[name](rest)
            except (AssertionError, TypeError, ValueError) as error:
                raise AssertionError(f"{where}: {' '.join(words)}: {error}") from error


def test_quick_commands_run(here):
    """In the order of the pages: the digits as files, a look at them, scores, versions."""
    from typer.testing import CliRunner

    from yojo.cli import app

    wanted = ("yojo demo --data", "yojo score three.png", "yojo info")
    done = {}
    for words, where in commands():
        line = " ".join(words)
        if line.startswith(wanted) and line not in done:
            done[line] = CliRunner().invoke(app, words[1:])
            assert done[line].exit_code == 0, f"{where}: {line}: {done[line].output}"
    assert len(done) >= len(wanted)
    scores = next(result.stdout for line, result in done.items() if line.startswith("yojo score"))
    assert scores.count("\n") == 2 and "It is a 3." in scores
    assert sum(1 for _ in open("digits/train.jsonl")) > 100


# ---- links ----


def anchors(text):
    """Anchors of a page's headings, as repositories' pages and the site have them."""
    found = set()
    for line in re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        if line.startswith("#"):
            title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", line.lstrip("#").strip()).lower()
            anchor = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            found.add(
                f"{anchor}-{sum(one.rpartition('-')[0] == anchor for one in found) + 1}" if anchor in found else anchor
            )
    return found


@pytest.mark.parametrize("path", EVERY, ids=SHOWN.get)
def test_links_and_pictures_are_there(path):
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), f"{SHOWN[path]}: there is no {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{SHOWN[path]}: {name or SHOWN[path]} has no heading #{anchor}"


@pytest.mark.parametrize("path", [path for path in RUN if path.name != "families.md"], ids=SHOWN.get)
def test_files_that_are_named_are_there(path):
    for name in re.findall(
        r"`((?:yojo|yojo_kernels|bench|tests|docs|examples)/[\w/.-]+\.(?:py|md|yaml|jsonl?))`", path.read_text()
    ):
        assert (ROOT / name).is_file(), f"{SHOWN[path]}: there is no {name}"


def test_modules_that_are_named_have_that():
    """`yojo.costs.flops` and the like; names of before work still, but no page says them."""
    import pkgutil

    for path in RUN:
        for name in re.findall(r"`((?:yojo|yojo_kernels)(?:\.\w+)+)[`(]", path.read_text()):
            moved = not (ROOT / "yojo" / name.split(".")[1]).is_dir() and name.split(".")[1] in yojo._MOVED
            assert not moved, f"{SHOWN[path]}: {name} stands elsewhere now"
            pkgutil.resolve_name(name)


def test_the_readme_is_short_and_names_the_rooms():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    for marker in ("<!-- families -->\n", "<!-- /families -->\n", "<!-- benchmarks -->\n", "<!-- /benchmarks -->\n"):
        assert text.count(marker) == 1
    (tree,) = [block.text for block in of("text") if block.page == "README.md"]
    for room in (room for floor in pages.floors() for room in floor):
        name = room.removeprefix("yojo.")
        assert re.search(rf"^ *{name}(/|\.py) ", tree, re.MULTILINE), f"the tree of the README has no {room}"
    named = re.findall(r"^  ([\w/.]+) ", tree, re.MULTILINE)
    assert [name for name in named if not (ROOT / "yojo" / name).exists()] == []


# ---- pages made of the code, docstrings ----


def test_made_pages_are_up_to_date():
    assert [path.name for path in pages.stale()] == [], "run python docs/pages.py"


def test_every_argument_is_documented_and_every_documented_one_is_there():
    assert arguments.problems() == []


@pytest.mark.parametrize(
    "source, expected",
    [
        ('def f(a, *, b=1):\n    """F.\n\n    Args:\n        a: one.\n    """', "the argument 'b' is not documented"),
        ('def f(a):\n    """F.\n\n    Args:\n        a, c: two.\n    """', "'c' is documented, and there is no such argument"),
        ('def f(a):\n    """F.\n\n    Args:\n        a: one.\n        a: two.\n    """', "the argument 'a' is documented twice"),
        ('def f(a, b, *c, **d):\n    """F.\n\n    Args:\n        a, b: one: two.\n            x: y.\n        *c, **d: more.\n    """', None),
        ('@dataclass\nclass F:\n    """F.\n\n    Attributes:\n        a: one.\n    """\n    a: int\n    b: int', "the attribute 'b' is not documented"),
    ],
)  # fmt: skip
def test_the_check_of_arguments_finds(source, expected):
    import ast

    found = list(arguments.disagreements(ast.parse(source).body[0]))
    assert found == ([] if expected is None else [expected])


def test_the_check_of_arguments_finds_what_is_on_no_page(tmp_path):
    (tmp_path / "yojo.rst").write_text(".. autofunction:: yojo.patch\n\n.. autofunction:: yojo.mend\n")
    found = arguments.problems(api=tmp_path)
    assert "yojo.mend: is on an API page, and is nowhere defined" in found
    assert "yojo.unpatch: is on no API page" in found and "yojo.patch: is on no API page" not in found


def test_the_backbone_stands_for_the_hub():
    """What the snippets run on ships with the package."""
    assert BACKBONE.is_dir() and os.environ.get("HF_HUB_OFFLINE") == "1"
