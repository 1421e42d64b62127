"""The op tests again with the CPU kernels held to an instruction set, in a process of its own: it is chosen once.

A lower one also takes 16-bit base products through our own loops, as a CPU without AVX512-BF16 does;
PYFASTPEFT_CPU_MATMUL does that to those in float32.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pyfastpeft  # noqa: F401 - loads the op library

LEVELS = ["baseline", "avx2", "avx512"]
TESTS = Path(__file__).parent
OPS = sorted(TESTS.glob("test_ops*.py"))


@pytest.mark.parametrize("level", LEVELS)
def test_ops_on_an_instruction_set(level):
    best = torch.ops.pyfastpeft.cpu_capability()
    if LEVELS.index(level) > LEVELS.index(best):
        pytest.skip(f"this CPU has no {level}")
    select = "cpu and not compiles and not gradcheck and not any_shape"
    if level == best:  # which the other tests run on, by torch's products or by ours
        select = "cpu and (lora_linear or dora_linear or several_blocks or group or frozen)"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OPS, "-k", select]
    env = os.environ | {"PYFASTPEFT_CPU_ISA": level, "PYFASTPEFT_CPU_MATMUL": "own"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    own = "pyfastpeft.ops.frozen.prefers_own_linear(torch.ones(1))"
    probe = f"import torch, pyfastpeft; print(torch.ops.pyfastpeft.cpu_capability(), {own})"
    assert subprocess.check_output([sys.executable, "-c", probe], env=env, text=True).split() == [level, "True"]


@pytest.mark.parametrize("name", ["PYFASTPEFT_BACKEND", "PYFASTPEFT_CPU_ISA", "PYFASTPEFT_CPU_MATMUL"])
def test_a_name_that_is_none_is_an_error(name):
    command = [sys.executable, "-c", "import pyfastpeft"]
    done = subprocess.run(command, env=os.environ | {name: "mkl"}, capture_output=True, text=True, check=False)
    assert f"ValueError: {name} is 'mkl'; it must be " in done.stderr
