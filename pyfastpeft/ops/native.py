"""Loads the op library that csrc/ops is built into. AVAILABLE tells whether it is there, WHY_NOT why it is not."""

import os
from pathlib import Path

import torch

from .dispatch import UNAVAILABLE

AVAILABLE = False
WHY_NOT = ""

if (_level := os.environ.get("PYFASTPEFT_CPU_ISA")) not in (None, "", "baseline", "avx2", "avx512"):
    raise ValueError(f"PYFASTPEFT_CPU_ISA is {_level!r}; it must be baseline, avx2 or avx512")

_libraries = sorted((Path(__file__).parent.parent).glob("_ops*.so"))
if not _libraries:
    WHY_NOT = "the op library is not built: install from source with a C++ compiler and torch present"
else:
    try:
        torch.ops.load_library(str(_libraries[0]))
        AVAILABLE = True
    except OSError as error:
        WHY_NOT = f"the op library {_libraries[0].name} does not load: {error}"

if not AVAILABLE:
    UNAVAILABLE["cpu"] = WHY_NOT
    if os.environ.get("PYFASTPEFT_REQUIRE_NATIVE") == "1":
        raise ImportError(f"PYFASTPEFT_REQUIRE_NATIVE=1, but {WHY_NOT}")
