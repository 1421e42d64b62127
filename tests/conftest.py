"""What holds for every test: the native libraries are there, nothing is fetched, randomness and threads are fixed."""

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("PYFASTPEFT_REQUIRE_NATIVE", "1")  # 0 tests what there is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic mode, which poisons memory, asks for

settings.register_profile("repeatable", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("repeatable")

torch.set_num_threads(min(2, os.cpu_count()))


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For models so small that they lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
