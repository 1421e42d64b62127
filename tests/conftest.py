"""What holds for every test: the native libraries are there, nothing is fetched, randomness and threads are fixed."""

import os
from contextlib import suppress

import pytest
import torch

os.environ.setdefault("PYFASTPEFT_REQUIRE_NATIVE", "1")  # 0 tests what there is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode, which poisons memory, asks for

with suppress(ImportError):  # a GPU machine may lack it; the tests that `make gpu` runs do not ask for it
    from hypothesis import settings

    settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
    settings.load_profile("repeatable")

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ  # other workers have the other cores
torch.set_num_threads(1 if PARALLEL else min(2, os.cpu_count()))
# Files that take longest, in the order in which `make test` hands files to its workers.
FIRST = (
    *("test_triton_interpreter", "test_cuda_aot", "test_packaging", "test_ops_lora", "test_triton_aot", "test_demo"),
    *("test_ops_multi_lora", "test_ops_native_calls", "test_ops", "test_ops_bottleneck", "test_ops_dora"),
    *("test_cuda_emulator", "test_peft_groups", "test_peft_lifecycle", "test_adapt", "test_benchmarks"),
)


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("slow") and os.environ.get("PYFASTPEFT_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="slow: make test SLOW=1"))
    place = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.module.__name__, len(FIRST)))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def on_backend(request):
    """For tests of ops: they run on the backend that they are parametrised with, if there is one."""
    from pyfastpeft import ops

    if "backend" in request.fixturenames:
        with ops.use_backend(request.getfixturevalue("backend")):
            yield
    else:
        yield


@pytest.fixture
def no_kernels(monkeypatch):
    """Torch's own operations run every op, as on a GPU whose kernels nobody has measured."""
    from pyfastpeft.ops import choice, dispatch

    for op, rows in dispatch.TABLE.items():
        monkeypatch.setitem(dispatch.TABLE, op, [row for row in rows if row.backend in choice.RULE])


@pytest.fixture(scope="module")
def two_threads():
    """For what runs in parallel itself, whatever else runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count()))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that they lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
