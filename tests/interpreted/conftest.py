"""Kernels on the CPU under Triton's interpreter, which has to be asked for before Triton is imported."""

import dataclasses
import functools
import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
from packaging.version import Version

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
elif os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already: run these tests alone, as `make test` does")


def refused(triton, numpy):
    """Why these versions cannot interpret, or None: the interpreter asked for int() of arrays, which numpy has given up."""
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return f"the interpreter of Triton {triton} does not run with numpy {numpy}: numpy below 2.4, or Triton 3.7"
    return None


def quicken():
    """Half of the interpreter's work comes to nothing, and is left out; `STOCK_INTERPRETER=1` leaves it in, as `make soak` does.

    The language is made over when a kernel begins, and not again in each function that it calls: Triton goes through all
    names of `triton.language` there, and changes none that it has changed for the kernel. And sums of integers are not made
    once more with 64 bits: whether they overflowed is asked in `debug` alone, which kernels are not launched with.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not hasattr(interpreter, "_LangPatchScope"):  # another Triton does it in another way
        return
    options = interpreter.interpreter_builder.options
    if not options.debug:
        interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    patch, call = interpreter._patch_lang, interpreter.GridExecutor.__call__
    made_over = None  # modules of the language, while a kernel runs

    @functools.cache
    def seen_by(function):
        found = function.__globals__.values()
        langs = ("tl", tl), ("core", tl.core)
        return frozenset(name for name, lang in langs if any(value is lang for value in found))

    def run_kernel(self, *args, **kwargs):
        nonlocal made_over
        kept, made_over = made_over, frozenset()
        try:
            return call(self, *args, **kwargs)
        finally:
            made_over = kept

    def patch_lang(function):
        nonlocal made_over
        seen = seen_by(function)
        if made_over is not None and seen and seen <= made_over:
            return interpreter._LangPatchScope()  # with nothing to put back
        scope = patch(function)
        if made_over is not None:
            made_over |= seen
        return scope

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_lang, run_kernel


if os.environ.get("STOCK_INTERPRETER") != "1":
    quicken()


def pytest_collection_modifyitems(items):
    reason = refused(*map(importlib.metadata.version, ("triton", "numpy")))
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))
