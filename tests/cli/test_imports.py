"""What importing loads, and import paths of before: nothing heavy, and nothing broken."""

import pickle
import subprocess
import sys

import pytest
import transformers

import yojo
from yojo.cli.training import _OFTEN
from yojo.training.arguments import RewardTrainingArguments

HEAVY = {"accelerate", "datasets", "huggingface_hub", "matplotlib", "numpy", "PIL", "peft", "pyarrow", "safetensors"}
HEAVY |= {"sklearn", "tokenizers", "torch", "torchvision", "transformers", "triton", "yaml", "yojo_kernels"}


def loaded(code):
    """Top-level modules that some code loads in a new process, the standard library's and site's left out."""
    code = (
        f"import sys; before = set(sys.modules)\n{code}\nprint(*{{n.split('.')[0] for n in set(sys.modules) - before}})"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split()) - set(sys.stdlib_module_names)


def test_importing_yojo_loads_no_library():
    assert loaded("import yojo; dir(yojo)") == {"yojo"}


@pytest.mark.parametrize(
    "command",
    [
        "",
        "demo",
        "score",
        "best",
        "pairs",
        "filter",
        "serve",
        "eval",
        "rank",
        "train",
        "import",
        "export",
        "merge",
        "profile",
        "info",
        "data",
        "data check",
    ],
)
def test_help_loads_nothing_heavy(command):
    words = [*command.split(), "--help"]
    code = f"sys.argv = ['yojo', *{words!r}]\nfrom yojo.cli import main\ntry: main()\nexcept SystemExit: pass"
    assert not loaded(code) & HEAVY


def test_training_help_names_options_that_exist():
    fields = RewardTrainingArguments.__dataclass_fields__
    assert [name for name in _OFTEN if name not in fields] == []
    assert set(transformers.TrainingArguments.__dataclass_fields__) <= set(fields)


@pytest.mark.parametrize("name", sorted(yojo._MOVED))
def test_modules_of_before_are_found(name):
    code = f"import yojo.{name} as module, yojo; assert module is yojo.{name}"
    exec(code)
    homes = [__import__(f"yojo.{home}", fromlist=["x"]) for home in yojo._MOVED[name]]
    module = getattr(yojo, name)
    for home in homes:
        for symbol, value in vars(home).items():
            if getattr(value, "__module__", None) == home.__name__ and not symbol.startswith("_"):
                assert getattr(module, symbol) is value
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_documented_paths_of_before():
    from yojo.adapters import lora_targets  # noqa: F401
    from yojo.checkpoint import import_mr2rm, load_pretrained, merge, push_to_hub, replaced_folder, save_pretrained  # noqa: F401
    from yojo.flops import batch_flops, scoring_flops  # noqa: F401
    from yojo.processors import load_processor  # noqa: F401
    from yojo.prompts import unseen  # noqa: F401
    from yojo.released import export_mr2rm  # noqa: F401

    from yojo.data import Mixture, Records, draw_responses, load, take_responses  # noqa: F401

    assert yojo.videos.Video is yojo.Video


def test_a_pickle_of_before_is_read(tmp_path):
    """transformers pickles the arguments of a run into training_args.bin."""
    new = pickle.dumps(RewardTrainingArguments(str(tmp_path), use_cpu=True, row_tokens=77), protocol=0)
    old = new.replace(b"yojo.training.arguments", b"yojo.arguments")
    assert old != new and pickle.loads(old).row_tokens == 77
