"""Builds csrc/ into pyfastpeft/_ops.so (torch's stable ABI, no Python in it) and pyfastpeft._host (pybind11), with ninja.

Either is left out, saying so, where what it needs is missing: Linux and a compiler for both, torch's headers for the
first, pybind11 for the second. PYFASTPEFT_REQUIRE_NATIVE=1 turns a missing one into an error.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)
VERSION = re.search(r'__version__ = "(.+)"', Path("pyfastpeft/__init__.py").read_text()).group(1)
FLAGS = "-std=c++20 -O3 -fPIC -ffp-contract=fast -fno-math-errno -fvisibility=hidden -Wall -Wno-psabi -DNDEBUG".split()


def op_library() -> Extension:
    import torch.utils.cpp_extension as torch_cpp

    return Extension(
        "pyfastpeft._ops",
        sorted(map(str, Path("csrc/ops").rglob("*.cpp"))),
        include_dirs=["csrc", *torch_cpp.include_paths()],
        library_dirs=torch_cpp.library_paths(),
        libraries=["torch_cpu", "torch"],
        extra_compile_args=["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"],
        optional=True,
    )


def host_module() -> Extension:
    import pybind11

    includes = ["csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    sources = sorted(map(str, Path("csrc/host").glob("*.cpp")))
    return Extension("pyfastpeft._host", sources, include_dirs=includes, optional=True)


def leave_out(what: str, why: object) -> None:
    if os.environ.get("PYFASTPEFT_REQUIRE_NATIVE") == "1":
        raise SystemExit(f"PYFASTPEFT_REQUIRE_NATIVE=1, but {what} cannot be built: {why}")
    print(f"\n*** pyfastpeft is built WITHOUT {what}: {why}\n", file=sys.stderr, flush=True)


def extensions() -> list[Extension]:
    if platform.system() != "Linux":
        leave_out("native kernels", "they are for Linux; the PyTorch reference serves this platform")
        return []
    found = []
    for make, what in ((op_library, "the op library _ops"), (host_module, "the host module _host")):
        try:
            found.append(make())
        except ImportError as error:
            leave_out(what, f"{error} (install it first, and use pip's --no-build-isolation)")
    return found


class NinjaBuild(build_ext):
    def get_ext_filename(self, name):
        return "pyfastpeft/_ops.so" if name.endswith("_ops") else super().get_ext_filename(name)

    def build_extension(self, ext):
        compiler, ninja = shutil.which(os.environ.get("CXX", "g++")), self.find_ninja()
        if not compiler or not ninja:
            return leave_out(ext.name, f"no {'ninja' if compiler else 'C++ compiler'} (set CXX or extend PATH)")
        folder, target = Path(self.build_temp, ext.name), Path(self.get_ext_fullpath(ext.name)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        flags = [*FLAGS, *ext.extra_compile_args, *(f"-I{path}" for path in ext.include_dirs)]
        links = [*(f"-L{path}" for path in ext.library_dirs), "-Wl,--no-as-needed", *(f"-l{n}" for n in ext.libraries)]
        objects = {f"{folder}/{Path(s).with_suffix('').as_posix().replace('/', '_')}.o": s for s in ext.sources}
        rules = [
            f"rule cc\n command = {compiler} {' '.join(flags)} -MMD -MF $out.d -c $in -o $out\n deps = gcc\n depfile = $out.d",
            f"rule link\n command = {compiler} -shared $in {' '.join(links)} -o $out",
            *(f"build {obj}: cc {source}" for obj, source in objects.items()),
            f"build {target}: link {' '.join(objects)}\n",
        ]
        (folder / "build.ninja").write_text("\n".join(rules))
        target.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([ninja, "-f", folder / "build.ninja"], text=True, capture_output=True)
        print(done.stdout, done.stderr, flush=True)
        if done.returncode:
            leave_out(ext.name, "the compiler failed:\n" + done.stdout)

    @staticmethod
    def find_ninja():
        try:
            from ninja import BIN_DIR
        except ImportError:
            BIN_DIR = ""
        return shutil.which("ninja", path=f"{BIN_DIR}:{os.environ.get('PATH', '')}")


setup(
    version=VERSION,
    packages=["pyfastpeft", "pyfastpeft.integrations", "pyfastpeft.kernels", "pyfastpeft.layers", "pyfastpeft.ops"],
    ext_modules=extensions(),
    cmdclass={"build_ext": NinjaBuild},
)
