"""Where and with what a result was measured (`python -m benchmarks.machine` prints it); and running as a machine with a
smaller instruction set."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

import pyfastpeft
from csrc import libraries
from pyfastpeft.cli.doctor import installed
from pyfastpeft.ops import choice, dispatch, native

# The last one caps our own kernels and tells them that 16-bit products are slow here.
ISA_CAPS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "PYFASTPEFT_CPU_ISA": "avx2",
    }
}
FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "sve", "sve2", "bf16")


def cap_isa(isa: str | None) -> None:
    """Run this program again, in this process, with torch's and our own kernels capped: both read the cap once."""
    if isa is None or isa_cap() == isa:
        return
    # The keys of inductor's cache do not hold the cap, and a kernel compiled for another width gives wrong results.
    caches = Path(tempfile.gettempdir(), f"torchinductor-{isa}-{os.getuid()}")
    environment = {**os.environ, **ISA_CAPS[isa], "TORCHINDUCTOR_CACHE_DIR": str(caches)}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def isa_cap() -> str | None:
    """The cap that this process runs under, if any."""
    for isa, caps in ISA_CAPS.items():
        if all(os.environ.get(name) == value for name, value in caps.items()):
            return isa
    return None


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def fast_16bit() -> bool:
    """Whether the CPU that this process may use multiplies bf16 matrices in hardware."""
    return isa_cap() is None and bool({"avx512_bf16", "amx_bf16", "bf16"} & set(_cpu()["flags"]))


def describe() -> dict:
    """What a reader of a result needs to know about its origin; no host name, no paths."""
    found = {
        "device": device(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "isa": isa_cap() or torch.backends.cpu.get_cpu_capability().lower(),
        "isa_capped": isa_cap() is not None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {"torch": torch.__version__, **{name: installed(name) for name in ("triton", "peft", "numpy")}},
        "backends": [name for name in dispatch.BACKENDS if name not in dispatch.UNAVAILABLE],
        "commit": os.environ.get("PYFASTPEFT_COMMIT") or _commit(),
    }
    found["versions"]["pyfastpeft"] = pyfastpeft.__version__
    if found["device"] == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["architecture"] = choice.architecture(0)
        found["driver"] = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0]
        found["versions"]["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
    return found


def title(machine: dict) -> str:
    """One line on a machine that `describe` described."""
    if machine["device"] == "cuda":
        where = f"{machine['gpu']}, driver {machine['driver']}"
    else:
        capped = " (capped)" if machine["isa_capped"] else ""
        where = f"{machine['cpu']['model']}, {machine['threads']} threads, {machine['isa']}{capped}"
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    return f"{where}; {versions}"


def _cpu() -> dict:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.+)$", text, re.MULTILINE)
    present = set(flags.group(1).split()) if flags else set()
    return {
        "model": model.group(1) if model else platform.processor() or platform.machine(),
        "flags": [flag for flag in FLAGS if flag in present],
    }


def _commit() -> str:
    return _git("rev-parse", "HEAD") + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*arguments: str) -> str:
    return _output("git", "-C", str(Path(__file__).parent), *arguments)


def _output(*command: str) -> str:
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def main() -> int:
    """Tells what the benchmarks and the GPU tests have here; 1 where that is no GPU, or kernels of other sources."""
    found = describe()
    print(title(found))
    for name in dispatch.BACKENDS:
        ops = sum(any(row.backend == name for row in rows) for rows in dispatch.TABLE.values())
        print(f"{name}: {dispatch.UNAVAILABLE.get(name) or f'{ops} of {len(dispatch.TABLE)} ops'}")
    if native.CUDA_AVAILABLE:
        print(f"_ops_cuda: {torch.ops.pyfastpeft.cuda_capability()}")
    root = Path(__file__).parent.parent
    for name, available in (("_ops", native.AVAILABLE), ("_ops_cuda", native.CUDA_AVAILABLE)):
        library = root / "pyfastpeft" / libraries.file_name(name)
        if available and not libraries.current(name, library, root):
            print(f"pyfastpeft/{library.name} was built from other sources: remove it, or build it again")
            return 1
    if found["device"] == "cuda":
        return 0
    try:
        torch.cuda.init()
        why = "it sees none"
    except Exception as error:
        why = str(error).partition("\n")[0]
    print(f"no GPU for torch {torch.__version__} ({why}): tests of kernels, figures and benchmarks on CUDA need one")
    return 1


if __name__ == "__main__":
    sys.exit(main())
