"""Builds csrc/ into pyfastpeft/_ops.so and _ops_cuda.so (torch's stable ABI, no Python in them) and pyfastpeft._host
(pybind11); csrc/libraries.py says how.

Each is left out, saying so, where what it needs is missing: Linux, a C++20 compiler and ninja; torch's headers for the
first two, nvcc for the second, pybind11's headers for _host. PYFASTPEFT_REQUIRE_NATIVE=1 makes that an error, for
_ops_cuda only where PYFASTPEFT_CUDA=1 asks for it.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

os.chdir(Path(__file__).parent)
sys.path.insert(0, "csrc")
import libraries  # noqa: E402

VERSION = re.search(r'__version__ = "(.+)"', Path("pyfastpeft/__init__.py").read_text()).group(1)
PACKAGES = "cli", "integrations", "kernels", "layers", "methods", "ops"


class NinjaBuild(build_ext):
    def run(self):
        self.keeps = self.inplace  # a library that cannot be built leaves the one that is there
        super().run()

    def get_ext_filename(self, fullname):
        package, _, name = fullname.rpartition(".")
        return os.path.join(*package.split("."), libraries.file_name(name))

    def build_extension(self, ext):
        kept = Path(self.get_ext_filename(ext.name)) if self.keeps else None
        if library := libraries.built(ext.name.rpartition(".")[2], ext.sources, kept):
            self.mkpath(os.path.dirname(self.get_ext_fullpath(ext.name)))
            self.copy_file(library, self.get_ext_fullpath(ext.name))


setup(
    version=VERSION,
    packages=["pyfastpeft", *map("pyfastpeft.{}".format, PACKAGES)],
    package_data={"pyfastpeft.kernels": ["tuning/*.json"], "pyfastpeft.ops": ["choices.json"]},
    ext_modules=[
        Extension(f"pyfastpeft.{name}", sorted(map(str, Path().glob(sources))), optional=True)
        for name, sources in libraries.SOURCES.items()
    ],
    cmdclass={"build_ext": NinjaBuild},
)
