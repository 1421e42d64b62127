"""Loads the libraries that csrc/ops is built into: that of the CPU, which declares the ops, and that of CUDA.

AVAILABLE and CUDA_AVAILABLE say whether they are loaded, WHY_NOT and CUDA_WHY_NOT why they are not.
"""

import os
from pathlib import Path

import torch

from .dispatch import UNAVAILABLE

if (_whose := os.environ.get("PYFASTPEFT_CPU_MATMUL")) not in (None, "", "own", "torch"):
    raise ValueError(f"PYFASTPEFT_CPU_MATMUL is {_whose!r}; it must be own or torch")
if (_level := os.environ.get("PYFASTPEFT_CPU_ISA")) not in (None, "", "baseline", "avx2", "avx512"):
    raise ValueError(f"PYFASTPEFT_CPU_ISA is {_level!r}; it must be baseline, avx2 or avx512")


def _load(name: str, how: str) -> str:
    """Why the library is not loaded; "" if it is."""
    if not (path := Path(__file__).parent.parent / name).exists():
        return f"the op library {name} is not built: {how}"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the op library {name} does not load: {error}"
    return ""


WHY_NOT = _load("_ops.so", "install from source with a C++ compiler and torch present")
AVAILABLE = not WHY_NOT
CUDA_WHY_NOT = WHY_NOT or _load("_ops_cuda.so", "install from source with nvcc and a torch for CUDA present")
CUDA_AVAILABLE = not CUDA_WHY_NOT

if CUDA_WHY_NOT:
    UNAVAILABLE["cuda"] = CUDA_WHY_NOT
if WHY_NOT:
    UNAVAILABLE["cpu"] = WHY_NOT
    if os.environ.get("PYFASTPEFT_REQUIRE_NATIVE") == "1":
        raise ImportError(f"PYFASTPEFT_REQUIRE_NATIVE=1, but {WHY_NOT}")
