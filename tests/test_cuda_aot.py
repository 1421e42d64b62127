"""Every CUDA source compiled for GPUs that are not here: what the machine code holds, and that the library loads.

The library is built without CUTLASS, in build/aot; of what stands on CUTLASS the machine code alone is compiled, unless
the build has it.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

knobs = pytest.importorskip("triton.knobs", reason="cuobjdump comes with the package triton")
from pyfastpeft.ops import native  # noqa: E402

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "csrc"))
import libraries  # noqa: E402

SOURCES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc/ops/cuda").glob("*.cu"))
HOPPER = "csrc/ops/cuda/gemm_sm90.cu"
# What the kernels that pass over activations or factors move 16 bytes at a time, where they have a parameter for that.
WIDE = {
    "shrink_kernel": ("LDGSTS", "LDS"),
    "gradient_kernel": ("LDGSTS", "STG"),
    "expand_kernel": ("LDG", "STG"),
    "sum_gradient_kernel": ("LDG",),
    "scale_kernel": ("LDG", "STG"),
    "scale_and_sum_kernel": ("LDG", "STG"),
    "fused_kernel": ("LDGSTS", "LDG"),
    "decode_kernel": ("LDG", "STG"),
    "multi_shrink_kernel": ("LDG",),
    "multi_expand_kernel": ("STG",),
    "multi_gradient_kernel": ("LDG",),
}


class Kernel(NamedTuple):
    """One kernel for one GPU."""

    gpu: str
    name: str  # mangled
    usage: dict[str, int]  # registers, and bytes of memory of a thread's own and of static shared memory
    instructions: list[str]

    def of(self, family: str) -> list[str]:
        return [i for i in self.instructions if i.split(".")[0] == family]


@pytest.fixture(scope="module")
def library():
    """The path of the library, built without CUTLASS."""
    folder = ROOT / "build/aot"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "csrc").is_symlink() or (folder / "csrc").symlink_to("../../csrc")
    find_spec = libraries.find_spec
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYFASTPEFT_CUDA", "1")
        patch.setenv("NVCC_APPEND_FLAGS", "-Xcompiler -O0")  # what the host does is not looked at
        for name in ("CXX", "CXXFLAGS", "PYFASTPEFT_CUDA_ARCHS"):
            patch.delenv(name, raising=False)
        patch.setattr(libraries, "find_spec", lambda name: None if name == "cutlass_library" else find_spec(name))
        try:
            command, _ = libraries._commands("_ops_cuda", ["g++"])
        except LookupError as why:
            pytest.skip(str(why))
        assert "-DPYFASTPEFT_CUTLASS" not in command
        return folder / libraries.build("_ops_cuda", SOURCES)


@pytest.fixture(scope="module")
def kernels(library):
    return [kernel for path in library.parent.rglob("*.o") for kernel in kernels_of(path)]


@pytest.fixture(scope="module")
def products():
    """The kernels of the source for Hopper alone."""
    if libraries.find_spec("cutlass_library") is None:
        pytest.skip("nvidia-cutlass is not installed here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PYFASTPEFT_CUDA", "1")
        try:
            command, _ = libraries._commands("_ops_cuda", ["g++"])
        except LookupError as why:
            pytest.skip(str(why))
        return kernels_of(machine_code(command))


def machine_code(command):
    """The path of what the source for Hopper becomes: the build's object, or the machine code in it, if they are not
    outdated."""
    folder = next(ROOT.glob("build/*/pyfastpeft._ops_cuda"), ROOT / "build/aot")
    paths = [folder / Path(HOPPER).with_suffix(".o"), ROOT / "build/aot/gemm_sm90.cubin"]
    changed = max(path.stat().st_mtime for path in [ROOT / HOPPER, *ROOT.glob("csrc/ops/cuda/gemm*.h")])
    for path in paths:
        if path.exists() and path.stat().st_mtime > changed:
            return path
    paths[-1].parent.mkdir(parents=True, exist_ok=True)
    options = [*libraries.gpus(HOPPER).split(), "-cubin", HOPPER, "-o", paths[-1]]
    subprocess.run([*command, *options], check=True)
    return paths[-1]


def kernels_of(path):
    def dump(option):
        command = [knobs.nvidia.cuobjdump.path, option, str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        gpus = re.split(r"arch = (\w+)", text)[1:] or ["sm_90a", text]
        return zip(gpus[::2], gpus[1::2])

    usage = {}
    for gpu, text in dump("-res-usage"):
        for name, figures in re.findall(r"Function (\w+):\s*\n\s*(REG:.*)", text):
            usage[gpu, name] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", figures)}
    found = []
    for gpu, text in dump("-sass"):
        for part in text.split("Function : ")[1:]:
            name, code = part.split(None, 1)
            instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", code)
            found.append(Kernel(gpu, name, usage[gpu, name], instructions))
    return found


def spilling(kernels):
    own = [k for k in kernels if k.usage["STACK"] or k.usage["LOCAL"] or k.of("LDL") or k.of("STL")]
    return [(k.gpu, k.name, k.usage) for k in own]


def test_every_kernel_is_there_for_every_gpu(kernels):
    for part in ("", *WIDE):
        assert {kernel.gpu for kernel in kernels if part in kernel.name} == {"sm_80", "sm_90a"}, part


def test_nothing_spills(kernels):
    assert not spilling(kernels)


def test_shared_memory_is_dynamic(kernels):
    """So that it is all in what launches ask for, which test_cuda_emulator.py holds against what a block may have."""
    system = {"sm_80": 0, "sm_90a": 1024}  # CUDA's own, which comes on top of the 227 KiB of a block
    assert not [(k.gpu, k.name, k.usage) for k in kernels if k.usage["SHARED"] != system[k.gpu]]


def test_low_rank_kernels_use_tensor_cores(kernels):
    low_rank = [k for k in kernels if re.search(r"\d(shrink|gradient|expand)_kernel", k.name)]
    assert low_rank
    assert not [kernel.name for kernel in low_rank if not kernel.of("HMMA")]


@pytest.mark.parametrize("part", WIDE)
def test_memory_is_moved_16_bytes_at_a_time(kernels, part):
    for kernel in kernels:
        found = re.search(rf"\d{part}(?:I\w*?Lb(\d)E)?", kernel.name)  # its first flag is `vector`
        if found and found[1] != "0":
            for family in WIDE[part]:
                assert any("128" in i.split(".") for i in kernel.of(family)), (kernel.name, kernel.of(family)[:4])


def test_products_on_hopper(products):
    assert len(products) == 4
    assert not spilling(products)
    for kernel in products:
        assert kernel.gpu == "sm_90a"
        # Four products of 64 x 256 x 16 are a tile's depth, on entry, in the loop and in the tail, of which one or two
        # may do. Two operands of the base are loaded and two of the tail.
        assert len(kernel.of("HGMMA")) == 4 + 4 + (4 + 2 + 1), kernel.name
        assert len(kernel.of("UTMALDG")) >= 4, kernel.name
        assert kernel.of("UTMASTG"), kernel.name


def test_products_on_hopper_load_their_operands(tmp_path, monkeypatch):
    """And multiply no more of the tail than there is: CUTLASS's own code, with ours in it, on the CPU."""
    monkeypatch.setenv("PYFASTPEFT_CUDA", "1")
    try:
        nvcc, cutlass = libraries._nvcc(), libraries._folder("cutlass_library", "source/include")
    except LookupError as why:
        pytest.skip(str(why))
    told = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], check=True, capture_output=True, text=True)
    folders = [cutlass, *re.findall(r'"(?:-I)?(/[^"]+/include(?:/cccl)?)"', told.stderr)]  # and those of the toolkit
    own, program = ROOT / "tests/cuda_emulator/producer", tmp_path / "producer"
    flags = ["-std=c++20", "-O1", "-DNDEBUG", "-fpermissive", f"-I{own}", f"-I{ROOT / 'csrc'}"]
    flags += [part for folder in folders for part in ("-isystem", folder)]
    subprocess.run(["g++", *flags, own / "producer.cpp", "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_library_loads_and_says_that_there_is_no_device(library):
    if torch.cuda.is_available():
        pytest.skip("there is a device here")
    script = """
import sys, torch
for path in sys.argv[1:]:
    torch.ops.load_library(path)
print(torch.ops.pyfastpeft.cuda_capability())
"""
    ops = Path(native.__file__).parent.parent / "_ops.so"
    said = subprocess.run([sys.executable, "-c", script, ops, library], check=True, capture_output=True, text=True)
    assert re.match(r"CUDA \d+\.\d+, no CUTLASS; no device: \w+", said.stdout), said.stdout
    assert libraries.current("_ops_cuda", library, ROOT)
