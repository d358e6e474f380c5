"""What libraries say to their callers does not reach the screen of ours; what we say does."""

import os
import subprocess
import sys

import pytest

QUIET = """
import logging, sys, warnings
from yojo.cli import quiet
quiet.be_quiet()
"""
WARNS = """
warnings.simplefilter("always")  # as libraries do
warnings.warn("a library's warning")
warnings.warn("a library's future", FutureWarning)
logging.getLogger("yojo.inputs.prompts").warning("our line")
"""
WITH_LIBRARIES = f"""{QUIET}
transformers = quiet.quiet_transformers()
{WARNS}
for name in ("peft.tuners", "accelerate", "transformers.trainer", "torch.distributed"):
    logging.getLogger(name).warning("a library's line")
for name in ("accelerate", "transformers.trainer"):
    logging.getLogger(name).error("an error in " + name)
from transformers import Trainer
assert transformers.utils.logging.get_logger("transformers.trainer").getEffectiveLevel() <= logging.WARNING
"""


def said(code, *options, **environment):
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stderr


def test_our_lines_are_shown_and_errors():
    assert said(WITH_LIBRARIES).splitlines() == [
        "our line",
        "an error in accelerate",
        "an error in transformers.trainer",
    ]


@pytest.mark.parametrize(
    "code, options, environment",
    [
        (QUIET + WARNS, ["-W", "default"], {}),
        (QUIET + WARNS, [], {"PYTHONWARNINGS": "default"}),
        pytest.param(WITH_LIBRARIES, ["-W", "default"], {}, marks=pytest.mark.soak),
    ],
)
def test_whoever_asks_for_warnings_gets_them(code, options, environment):
    text = said(code, *options, **environment)
    assert "a library's warning" in text and "our line" in text
