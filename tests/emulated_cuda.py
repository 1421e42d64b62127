"""The ops of csrc/ops/cuda on CPU tensors, by the emulator in cuda_emulator/, whose cuda_runtime.h tells what it shows.

`library()` compiles it with g++, once for a state of the sources; `load()` puts its ops into the dispatch table as
backend "cuda" for CPU tensors. With PYFASTPEFT_EMULATOR_RACES=1, in a process that preloads libtsan.so, races of a
kernel's threads are told with their lines.
"""

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
EMULATOR = Path(__file__).parent / "cuda_emulator"
NAMESPACE = "pyfastpeft_emulated"
RACES = os.environ.get("PYFASTPEFT_EMULATOR_RACES") == "1"

FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
FLAGS += ["-Wno-maybe-uninitialized", "-Wno-unused-variable", "-ftrivial-auto-var-init=pattern", "-ffp-contract=fast"]
FLAGS += ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-Dpyfastpeft={NAMESPACE}"]
FLAGS += ["-DPYFASTPEFT_CUTLASS"]


def library() -> Path:
    """The path of the emulated library, built where its sources have changed."""
    folder = ROOT / "build" / ("emulated_races" if RACES else "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:  # test processes wait for the first
        fcntl.flock(lock, fcntl.LOCK_EX)
        return built(folder)


def built(folder: Path) -> Path:
    sources = [p for p in sorted((ROOT / "csrc/ops/cuda").glob("*.cu")) if not p.name.endswith("_sm90.cu")]
    sources += [*sorted(EMULATOR.glob("*.cpp")), ROOT / "csrc/ops/schema.cpp"]
    headers = [*sorted(EMULATOR.rglob("*.h")), *sorted((ROOT / "csrc").rglob("*.h"))]
    include = Path(torch.__file__).parent / "include"
    flags = [*FLAGS, f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}", "-isystem", str(include)]
    flags += ["-DEMULATOR_FINDS_RACES", "-g1"] if RACES else []
    common = b"".join(map(Path.read_bytes, headers)) + " ".join([*flags, torch.__version__]).encode()

    def compiled(source):
        state = hashlib.sha256(common + source.read_bytes()).hexdigest()[:16]
        if not (target := folder / f"{source.stem}-{state}.o").exists():
            for old in folder.glob(f"{source.stem}-*.o"):
                old.unlink(missing_ok=True)
            sanitize = ["-fsanitize=thread"] if RACES and source.suffix == ".cu" else []
            run(["g++", *flags, *sanitize, "-x", "c++", "-c", source, "-o", target.with_suffix(".part")])
            target.with_suffix(".part").rename(target)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = [future.result() for future in [pool.submit(compiled, source) for source in sources]]
    state = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
    if not (target := folder / f"library-{state}.so").exists():
        for old in folder.glob("library-*.so"):
            old.unlink(missing_ok=True)
        lib = Path(torch.__file__).parent / "lib"
        sanitize = ["-fsanitize=thread"] if RACES else []
        run(["g++", "-shared", *sanitize, *objects, f"-L{lib}", "-ltorch_cpu", "-o", target])
    return target


def run(command):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stderr}")


def load() -> None:
    """Register the emulated ops as rows of backend "cuda" for CPU tensors."""
    from pyfastpeft.ops import cuda, dispatch, schemas

    torch.ops.load_library(str(library()))
    for op in schemas.SCHEMAS:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op}", "CPU"):
            dtypes = (torch.int64,) if op == "group_tokens" else dispatch.FLOATS
            dispatch.register(op, "cuda", ("cpu",), schemas.native(op, NAMESPACE), dtypes, getattr(cuda, op))


@contextmanager
def loaded() -> Iterator[None]:
    """In here the rows are in the table, and every device counts as one that runs them."""
    from pyfastpeft.ops import cuda, dispatch

    before = {op: list(rows) for op, rows in dispatch.TABLE.items()}
    load()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_tensor_cores", lambda device: "")
        yield
    dispatch.TABLE.update(before)
