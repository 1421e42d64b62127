"""Every CUDA source compiled for GPUs that are not here: what the machine code holds, and that the library loads."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

knobs = pytest.importorskip("triton.knobs", reason="cuobjdump comes with the package triton")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import libraries  # noqa: E402

SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/ops/cuda").glob("*.cu"))
# What kernels that read and write whole activations or factors do 16 bytes at a time, by a part of their names.
WIDE = {
    "shrink_kernel": ("LDGSTS", "LDS"),
    "gradient_kernel": ("LDGSTS", "STG"),
    "expand_kernel": ("LDG", "STG"),
    "sum_gradient_kernel": ("LDG",),
}


class Kernel(NamedTuple):
    """One kernel for one GPU."""

    gpu: str
    name: str  # mangled
    usage: dict[str, int]  # registers, and bytes of memory of a thread's own
    instructions: list[str]


@pytest.fixture(scope="module")
def library():
    """The path of the library, built in build/ from the objects that are there and those that are not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYFASTPEFT_CUDA", "1")
        patch.delenv("PYFASTPEFT_CUDA_ARCHS", raising=False)
        patch.delenv("CXXFLAGS", raising=False)
        patch.chdir(ROOT)
        try:
            libraries._commands("_ops_cuda", ["g++"])
        except LookupError as why:
            pytest.skip(str(why))
        return ROOT / libraries.build("_ops_cuda", SOURCES)


@pytest.fixture(scope="module")
def kernels(library):
    return list(_kernels(library))


def _kernels(library):
    def dump(option):
        command = [knobs.nvidia.cuobjdump.path, option, str(library)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    usage = {}
    for cubin in dump("-res-usage").split("\nFatbin elf code:")[1:]:
        gpu = re.search(r"arch = (\w+)", cubin).group(1)
        for name, figures in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", cubin):
            usage[gpu, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", figures)}
    for cubin in dump("-sass").split("\nFatbin elf code:")[1:]:
        gpu = re.search(r"arch = (\w+)", cubin).group(1)
        for part in cubin.split("Function : ")[1:]:
            name = part.split(None, 1)[0]
            yield Kernel(gpu, name, usage[gpu, name], re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", part))


def test_every_source_is_there_for_every_gpu(kernels):
    assert {kernel.gpu for kernel in kernels} == {"sm_80", "sm_90a"}
    for part in WIDE:
        assert {kernel.gpu for kernel in kernels if part in kernel.name} == {"sm_80", "sm_90a"}, part


def test_nothing_spills(kernels):
    spilling = [k for k in kernels if k.usage["STACK"] or k.usage["LOCAL"] or {"LDL", "STL"} & _families(k)]
    assert not spilling, [(k.gpu, k.name, k.usage) for k in spilling]


def test_products_on_hopper_use_its_tensor_cores(kernels):
    products = [kernel for kernel in kernels if "cutlass" in kernel.name]
    if libraries.find_spec("cutlass_library") is None:
        pytest.skip("nvidia-cutlass is not installed here")
    assert len(products) == len([source for source in SOURCES if source.endswith(libraries.HOPPER)])
    assert {product.gpu for product in products} == {"sm_90a"}
    for product in products:
        assert {"HGMMA", "UTMALDG", "UTMASTG"} <= _families(product), product.name
        # Loads of the two operands of the base product, and of the two of the tail.
        assert sum(i.startswith("UTMALDG") for i in product.instructions) >= 4, product.name


def test_low_rank_kernels_use_tensor_cores(kernels):
    for kernel in kernels:
        if any(part in kernel.name for part in ("12shrink_kernel", "gradient_kernelILi", "expand_kernel")):
            assert "HMMA" in _families(kernel), kernel.name


@pytest.mark.parametrize("part", WIDE)
def test_memory_is_moved_16_bytes_at_a_time(kernels, part):
    for kernel in kernels:
        if re.search(rf"\d{part}", kernel.name):
            for family in WIDE[part]:
                some = [i for i in kernel.instructions if i.split(".")[0] == family]
                assert any("128" in i.split(".") for i in some), (kernel.name, family, some[:4])


def test_the_library_loads_and_says_that_there_is_no_device(library):
    if torch.cuda.is_available():
        pytest.skip("there is a device here")
    from pyfastpeft.ops import native

    script = """
import sys, torch
for path in sys.argv[1:]:
    torch.ops.load_library(path)
print(torch.ops.pyfastpeft.cuda_capability())
"""
    ops = Path(native.__file__).parent.parent / "_ops.so"
    command = [sys.executable, "-c", script, ops, library]
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    assert re.match(r"CUDA \d+\.\d+, (no )?CUTLASS; no device: \w+", said), said


def _families(kernel):
    return {instruction.split(".")[0] for instruction in kernel.instructions}
