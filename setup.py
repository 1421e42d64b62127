"""Builds csrc/ into pyfastpeft/_ops.so (torch's stable ABI, no Python in it) and pyfastpeft._host (pybind11).

Either is left out, saying so, where what it needs is missing: Linux, a C++20 compiler and ninja; torch's headers for
_ops, pybind11's for _host. PYFASTPEFT_REQUIRE_NATIVE=1 makes that an error. CXX and CXXFLAGS mean what they always do.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)
VERSION = re.search(r'__version__ = "(.+)"', Path("pyfastpeft/__init__.py").read_text()).group(1)
PACKAGES = "cli", "integrations", "kernels", "layers", "methods", "ops"
# psabi is about vectors passed to functions, and all of ours are inlined; GCC 12's AVX512 headers trip the last.
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-maybe-uninitialized"]
FLAGS = ["-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", *WARNINGS]


def folder_of(package: str) -> str:
    """Where an installed package lies. It is found, not imported."""
    if (spec := find_spec(package)) is None:
        raise LookupError(f"{package} is not installed here (install it first; give pip --no-build-isolation)")
    return spec.submodule_search_locations[0]


def torch_flags() -> tuple[list[str], list[str]]:
    """Flags to compile with and flags to link with."""
    torch, stable_abi = folder_of("torch"), ["-DTORCH_STABLE_ONLY", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    return ["-isystem", f"{torch}/include", *stable_abi], [f"-L{torch}/lib", "-ltorch_cpu"]


def pybind11_flags() -> tuple[list[str], list[str]]:
    return ["-isystem", f"{folder_of('pybind11')}/include", "-isystem", sysconfig.get_path("include")], []


class NinjaBuild(build_ext):
    def get_ext_filename(self, fullname):
        name = super().get_ext_filename(fullname)
        return name.removesuffix(sysconfig.get_config_var("EXT_SUFFIX")) + ".so" if fullname.endswith("_ops") else name

    def build_extension(self, ext):
        try:
            library = self.build_library(ext)
        except LookupError as why:
            if os.environ.get("PYFASTPEFT_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"PYFASTPEFT_REQUIRE_NATIVE=1, but {ext.name} cannot be built: {why}") from None
            print(f"\n*** pyfastpeft is built WITHOUT {ext.name}: {why}\n", file=sys.stderr, flush=True)
        else:
            self.mkpath(os.path.dirname(self.get_ext_fullpath(ext.name)))
            self.copy_file(library, self.get_ext_fullpath(ext.name))

    def build_library(self, ext) -> str:
        """The path of the built library. Objects stay in build/, so that only what changed is compiled again."""
        if platform.system() != "Linux":
            raise LookupError("native code is for Linux; the PyTorch reference serves this platform")
        compiler = shlex.split(os.environ.get("CXX", "g++"))
        if not shutil.which(compiler[0]):
            raise LookupError(f"there is no C++ compiler {compiler[0]!r} (install one or set CXX)")
        if not (ninja := shutil.which("ninja", path=f"{sysconfig.get_path('scripts')}:{os.environ.get('PATH')}")):
            raise LookupError("ninja is not installed here")
        includes, links = torch_flags() if ext.name.endswith("_ops") else pybind11_flags()
        flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-std=c++20", "-DNDEBUG", "-Icsrc", *includes]
        folder = f"build/{sysconfig.get_platform()}-{sys.implementation.cache_tag}/{ext.name}"
        objects = {f"{folder}/{Path(source).with_suffix('.o')}": source for source in ext.sources}
        rules = f"""builddir = {folder}
rule compile
  command = {shlex.join([*compiler, *flags])} -MMD -MF $out.d -c $in -o $out
  deps = gcc
  depfile = $out.d
  description = compile $in
rule link
  command = {shlex.join(compiler)} -shared $in {shlex.join(links)} -o $out
  description = link $out
build {folder}/library.so: link {" ".join(objects)}
""" + "".join(f"build {target}: compile {source}\n" for target, source in objects.items())
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, "build.ninja").write_text(rules)
        if subprocess.run([ninja, "-f", f"{folder}/build.ninja"]).returncode:
            raise LookupError("the compiler failed (its messages are above)")
        return f"{folder}/library.so"


setup(
    version=VERSION,
    packages=["pyfastpeft", *map("pyfastpeft.{}".format, PACKAGES)],
    package_data={"pyfastpeft.kernels": ["tuning/*.json"]},
    ext_modules=[
        Extension("pyfastpeft._ops", sorted(map(str, Path("csrc/ops").rglob("*.cpp"))), optional=True),
        Extension("pyfastpeft._host", sorted(map(str, Path("csrc/host").rglob("*.cpp"))), optional=True),
    ],
    cmdclass={"build_ext": NinjaBuild},
)
