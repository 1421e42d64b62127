"""Compiles what the launchers ask for, for targets that are not here.

The launchers run on meta tensors under a driver that claims to be the target; Triton's cache hook takes down every
kernel they want with its signature, and nothing is launched. So signatures and options are the launchers' own.
"""

import re
import subprocess
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


class Target(NamedTuple):
    name: str
    gpu: GPUTarget
    shared: int  # bytes of shared memory that one block may have
    device: int  # an index that no device has


TARGETS = {
    name: Target(name, gpu, shared, 1000 + i)
    for i, (name, gpu, shared) in enumerate(
        [
            ("sm_80", GPUTarget("cuda", 80, 32), 101_376),  # sm_86 and sm_89 have no more; all but float64 is as there
            ("sm_90", GPUTarget("cuda", 90, 32), 232_448),
            ("sm_100", GPUTarget("cuda", 100, 32), 232_448),
            ("gfx942", GPUTarget("hip", "gfx942", 64), 65_536),
        ]
    )
}


# What the PTX of a kernel has to hold: tensor cores fed from shared memory, tiles copied by descriptors.
WANTED = {
    ("concat_linear_kernel", "sm_90"): ("wgmma.mma_async", "cp.async.bulk.tensor"),
    ("concat_linear_kernel", "sm_100"): ("tcgen05.mma", "cp.async.bulk.tensor"),
}
BY_WARPGROUPS = ("linear_kernel", "multi_linear_kernel", "ia3_linear_kernel")


class Driver:
    """As much of a Triton driver as a launch needs before it compiles."""

    def __init__(self, target: Target):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target.gpu

    def get_current_device(self) -> int:
        return self.target.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Kernel(NamedTuple):
    """One kernel as a launcher asked for it."""

    name: str
    source: ASTSource
    constants: dict  # of its constexpr parameters
    options: dict
    target: Target

    def __str__(self) -> str:
        blocks = {n: v for n, v in self.constants.items() if n.startswith("BLOCK") or n == "PRECISION"}
        types = [t for t in self.source.signature.values() if t.startswith("*")]
        return f"{self.name} {' '.join(types)} {blocks} {self.options} on {self.target.name}"


def kernels_of(launch: Callable[[], None], target: Target) -> dict[str, Kernel]:
    """Every distinct kernel that `launch` would run on `target`, by what tells it from others."""
    found = {}

    def take_down(*, key, fn, compile, **_):
        function = fn.jit_function
        source = ASTSource(function, compile["signature"], compile["constants"], compile["configs"][0])
        constants = {function.arg_names[path[0]]: value for path, value in compile["constants"].items()}
        options = {name: compile[name] for name in ("num_warps", "num_stages")}
        found[str(key)] = Kernel(function.__name__, source, constants, options, target)
        return True  # neither compile nor launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.runtime.driver, "_active", Driver(target))
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", take_down)
        patch.setattr(torch.version, "hip", "7.0" if target.gpu.backend == "hip" else None)
        launch()
    return found


def by_warpgroups(kernel: Kernel) -> bool:
    """Whether Hopper's wgmma has to form all products: of 16-bit activations by left tiles of at least 64 rows."""
    if kernel.target.name != "sm_90" or kernel.name not in BY_WARPGROUPS:
        return False
    return kernel.source.signature["x"] in ("*bf16", "*fp16") and kernel.constants["BLOCK_N"] >= 64


def faults(kernel: Kernel) -> list[str]:
    """Compiles it. What is wrong with the machine code: spills, too much shared memory, or, on Hopper, mma.sync where
    there has to be wgmma, or a wgmma whose left operand is in registers, which ptxas before 13.3 may overwrite too
    early (triton #9433, #11781)."""
    try:
        compiled = triton.compile(kernel.source, target=kernel.target.gpu, options=kernel.options)
    except Exception as error:
        return [f"{kernel}: {error!r}"]
    figures = {"bytes of shared memory too many": max(0, compiled.metadata.shared - kernel.target.shared)}
    if kernel.target.gpu.backend == "hip":
        assembly = compiled.asm["amdgcn"]
        for name in ("vgpr_spill_count", "private_segment_fixed_size"):
            figures[name] = int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))
    else:
        figures |= _usage(compiled.asm["cubin"])
        ptx = compiled.asm["ptx"]
        figures["left operands of wgmma in registers"] = len(re.findall(r"wgmma\.mma_async[^{]*\{[^}]*\},\s*\{", ptx))
        wanted = WANTED.get((kernel.name, kernel.target.name), ())
        if by_warpgroups(kernel):
            wanted = ("wgmma.mma_async",)
            figures["products by mma.sync"] = ptx.count("mma.sync")
        figures |= {f"{instruction} missing": instruction not in ptx for instruction in wanted}
    return [f"{kernel}: {count} {name}" for name, count in figures.items() if count]


def _usage(cubin: bytes) -> dict[str, int]:
    """Memory of a thread's own. Registers spill to its stack: where there is none, no load or store is local."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {f"{name.lower()} bytes": int(re.search(rf"{name}:(\d+)", usage).group(1)) for name in ("STACK", "LOCAL")}
