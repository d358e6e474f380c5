"""Kernels on the CPU under Triton's interpreter, which has to be asked for before Triton is imported."""

import os
import sys

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
elif os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already: run these tests alone, as `make test` does")
