"""How the libraries of csrc/ are compiled and linked, with ninja. setup.py calls this; run by itself it builds all of
them in place, for which no setuptools is needed, with --missing those that are not there or of no use here.

CXX and CXXFLAGS mean what they always do; nvcc reads NVCC_APPEND_FLAGS instead of the latter. The CUDA kernels are
built where nvcc is present and torch is one for CUDA; PYFASTPEFT_CUDA=1 or 0 decides instead, PYFASTPEFT_CUDA_ARCHS="80
90a" for which GPUs. gemm_sm90.cu is for Hopper alone and needs CUTLASS's headers (package nvidia-cutlass).
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

# psabi is about vectors passed to functions, and all of ours are inlined; GCC 12's AVX512 headers trip the last.
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", *WARNINGS]
STABLE_ABI = ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
HOPPER = "_sm90.cu"
SOURCES = {"_ops": "csrc/ops/**/*.cpp", "_ops_cuda": "csrc/ops/cuda/*.cu", "_host": "csrc/host/*.cpp"}
HEADERS = {
    "_ops": ("csrc/*.h", "csrc/ops/*.h", "csrc/ops/cpu/*"),
    "_ops_cuda": ("csrc/ops/*.h", "csrc/ops/cuda/*", "csrc/ops/cpu/kernels.h"),
    "_host": ("csrc/*.h",),
}


def file_name(name: str) -> str:
    """Of the library `name` in pyfastpeft/. _host alone is for one version of Python."""
    return f"{name}{sysconfig.get_config_var('EXT_SUFFIX') if name == '_host' else '.so'}"


def state(name: str, root: Path = Path()) -> str:
    """Hexadecimal digits that change with the sources of the library `name`, which holds them as its build ID."""
    files = {path for pattern in (SOURCES[name], *HEADERS[name]) for path in root.glob(pattern)}
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files))).hexdigest()[:32]


def current(name: str, library: Path, root: Path = Path()) -> bool:
    """Whether this file is the library `name`, built from the sources that are here."""
    return bytes.fromhex(state(name, root)) in library.read_bytes()


def loads(library: Path) -> bool:
    import torch  # noqa: F401  brings what ours are linked with

    try:
        ctypes.CDLL(str(library.absolute()))
    except OSError:
        return False
    return True


def built(name: str, sources: list[str], kept: Path | None = None) -> str | None:
    """`build`, but for what is missing: that is told, also where the file `kept` stays in its place, and is an error
    only where the environment asks for the library."""
    try:
        return build(name, sources)
    except LookupError as why:
        required = "PYFASTPEFT_CUDA" if name == "_ops_cuda" else "PYFASTPEFT_REQUIRE_NATIVE"
        if os.environ.get(required) == "1":
            raise SystemExit(f"{required}=1, but pyfastpeft.{name} cannot be built: {why}") from None
        told = f"keeps {kept} as it is" if kept and kept.exists() else f"is built WITHOUT pyfastpeft.{name}"
        print(f"\n*** pyfastpeft {told}: {why}\n", file=sys.stderr, flush=True)
        return None


def build(name: str, sources: list[str]) -> str:
    """The path of the library `name`, built. Objects stay in build/, so that only what changed is compiled again.

    Raises LookupError, telling what is missing.
    """
    if platform.system() != "Linux":
        raise LookupError("native code is for Linux; the PyTorch reference serves this platform")
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(compiler[0]):
        raise LookupError(f"there is no C++ compiler {compiler[0]!r} (install one or set CXX)")
    if not (ninja := shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH')}")):
        raise LookupError("ninja is not installed here")
    compile_command, link_command = _commands(name, compiler)
    if name == "_ops_cuda" and not find_spec("cutlass_library"):
        print(
            "*** pyfastpeft's CUDA kernels are built WITHOUT CUTLASS: nvidia-cutlass is not installed here", flush=True
        )
        sources = [source for source in sources if not source.endswith(HOPPER)]
    folder = f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}/pyfastpeft.{name}"
    objects = {f"{folder}/{Path(source).with_suffix('.o')}": source for source in sources}
    rules = f"""builddir = {folder}
rule compile
  command = {shlex.join(compile_command)} $gpus -MMD -MF $out.d -c $in -o $out
  deps = gcc
  depfile = $out.d
  description = compile $in
rule link
  command = {link_command}
  description = link $out
build {folder}/library.so: link {" ".join(objects)}
"""
    for it, source in objects.items():
        rules += f"build {it}: compile {source}\n  gpus = {gpus(source)}\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    Path(folder, "build.ninja").write_text(rules)
    if subprocess.run([ninja, "-f", f"{folder}/build.ninja"]).returncode:
        raise LookupError("the compiler failed (its messages are above)")
    return f"{folder}/library.so"


def _commands(name: str, compiler: list[str]) -> tuple[list[str], str]:
    """What compiles a source of library `name`, and ninja's command that links it."""
    common = ["-std=c++20", "-DNDEBUG", "-Icsrc"]
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    link = f"-shared $in -Xlinker --build-id=0x{state(name)} -o $out"
    if name == "_host":
        includes = ["-isystem", _folder("pybind11", "include"), "-isystem", sysconfig.get_path("include")]
        return [*compiler, *flags, *common, *includes], f"{shlex.join(compiler)} {link}"
    common += ["-isystem", _folder("torch", "include"), *STABLE_ABI]
    library = shlex.quote(f"-L{_folder('torch', 'lib')}")
    if name == "_ops":
        return [*compiler, *flags, *common], f"{shlex.join(compiler)} {link} {library} -ltorch_cpu"
    nvcc = [_nvcc(), "-ccbin", compiler[0], "--cudart=static", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    # libtorch brings what tells the current stream, where it is one for CUDA.
    links = f"{library} -Xlinker --no-as-needed -ltorch -ltorch_cpu"
    return [*nvcc, *common, *cuda_flags()], f"{shlex.join(nvcc)} {link} {links}"


def cuda_flags() -> list[str]:
    """nvcc's options for our sources, whatever it makes of them. NDEBUG is no matter of taste: with CUTLASS's
    assertions ptxas serialises wgmma."""
    flags = ["-O3", "--expt-relaxed-constexpr"]
    if find_spec("cutlass_library"):
        flags += ["-isystem", _folder("cutlass_library", "source/include"), "-DPYFASTPEFT_CUTLASS"]
    return flags


def gpus(source: str) -> str:
    """nvcc's options for the GPUs that a source is compiled for. PTX of the oldest serves those that come later."""
    if not source.endswith(".cu"):
        return ""
    archs = ["90a"] if source.endswith(HOPPER) else os.environ.get("PYFASTPEFT_CUDA_ARCHS", "80 90a").split()
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*targets, *(f"-gencode=arch=compute_{a},code=compute_{a}" for a in archs[:1] if a.isdigit())])


def _folder(package: str, inside: str) -> str:
    """A folder of an installed package, which is found, not imported."""
    if (spec := find_spec(package)) is None:
        raise LookupError(f"{package} is not installed here (install it first; give pip --no-build-isolation)")
    return f"{spec.submodule_search_locations[0]}/{inside}"


def _nvcc() -> str:
    wanted = os.environ.get("PYFASTPEFT_CUDA")
    if wanted == "0":
        raise LookupError("PYFASTPEFT_CUDA=0 forbids to build it")
    if wanted != "1" and not Path(_folder("torch", "lib"), "libtorch_cuda.so").exists():
        raise LookupError("this torch is not one for CUDA (PYFASTPEFT_CUDA=1 builds it all the same)")
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('PATH')}:{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")
    if not nvcc:
        raise LookupError("there is no nvcc (install the CUDA toolkit or set CUDA_HOME)")
    return nvcc


def main() -> int:
    """0 where all libraries are there afterwards."""
    os.chdir(Path(__file__).parent.parent)
    missing = False
    for name, pattern in SOURCES.items():
        target = Path("pyfastpeft", file_name(name))
        if "--missing" in sys.argv and target.exists():
            if current(name, target) and loads(target):
                print(f"{target} is used as it is", flush=True)
                continue
            kept = target.rename(target.with_suffix(".old"))
            print(f"\n*** {target} is of other sources or does not load: it is {kept} now\n", flush=True)
        if library := built(name, sorted(map(str, Path().glob(pattern))), target):
            shutil.copy(library, target)
        missing |= not target.exists()
    return int(missing)


if __name__ == "__main__":
    sys.exit(main())
