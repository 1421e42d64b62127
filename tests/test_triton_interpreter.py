"""The Triton kernels on CPU tensors, under Triton's interpreter.

In processes of their own, since triton reads TRITON_INTERPRET when it is imported.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the package triton is not installed")

TESTS = Path(__file__).parent
OPS = sorted(TESTS.glob("test_ops*.py"))
SLOW = "gradcheck or compiles or takes_any_shape"  # interpreted_kernels.py has its own
RUNS = {
    "ops": [*OPS, "-k", f"triton and not ({SLOW})"],
    "interpreted_kernels.py": [TESTS / "interpreted_kernels.py"],
}


@pytest.fixture(scope="module")
def processes():
    """All runs at once, each on one thread."""
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYFASTPEFT_TEST_BACKENDS": "triton",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), *sys.path]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "interpreter", "-p", "no:cacheprovider"]
    started = {
        name: subprocess.Popen(
            [*command, *arguments],
            cwd=TESTS.parent,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, arguments in RUNS.items()
    }
    yield started
    for process in started.values():
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("name", RUNS)
def test_kernels_under_the_interpreter(processes, name):
    report, _ = processes[name].communicate()
    passed = re.search(r"(\d+) passed", report)
    assert processes[name].returncode == 0, report
    assert passed is not None, report
    assert int(passed.group(1)) > 50, report
