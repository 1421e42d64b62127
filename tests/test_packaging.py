"""The sdist, the wheel and the editable installation, each imported from a clean environment outside the tree."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SITE = sysconfig.get_path("purelib")
PACKAGE = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("pyfastpeft/**/*.py")}
KERNELS = {f"pyfastpeft/kernels/{path.name}" for path in ROOT.glob("kernels/*.py")}
# What benchmarks.choose and benchmarks.tune leave, the latter for a GPU that there is not.
MEASURED = {"pyfastpeft/ops/choices.json", "pyfastpeft/kernels/tuning/sm_0.json"}
DATA = {f"pyfastpeft/kernels/tuning/{path.name}" for path in ROOT.glob("kernels/tuning/*.json")} | MEASURED


def run(*command, **environment):
    """The output of a command; its errors too. Native libraries are required unless the environment says otherwise."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "CXXFLAGS")}
    env["PATH"] = f"{sysconfig.get_path('scripts')}:{env['PATH']}"  # ninja
    env |= {"PYFASTPEFT_REQUIRE_NATIVE": "1", "CXXFLAGS": "-O0"} | environment
    done = subprocess.run(list(map(str, command)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def copy_of_tree(folder):
    """The sources alone, in a folder whose name holds a space."""
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "*.so", "__pycache__")
    return Path(shutil.copytree(ROOT, folder / "the sources", symlinks=True, ignore=ignored))


@pytest.fixture
def tree(tmp_path):
    return copy_of_tree(tmp_path)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """(sdist, wheel), the wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    sources = copy_of_tree(out)
    for measured in MEASURED:
        (sources / measured).parent.mkdir(exist_ok=True)
        (sources / measured).write_text("{}")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, sources)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


def clean_python(folder, see=SITE, **options):
    """The Python of a new environment that sees the packages in `see` and none of this tree."""
    venv.create(folder, **options)
    python = folder / "bin/python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    Path(site, "see.pth").write_text(f"{see}\n")
    return python


def pip(python, *arguments, **environment):
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    return run(*pip, *arguments, "--no-index", "--no-deps", "--no-build-isolation", **environment)


def doctor(python, **environment):
    """What the installed command tells of itself, run outside the tree."""
    findings = json.loads(run(python.parent / "pyfastpeft", "doctor", "--json", **environment))
    return findings, {check["backend"]: check["ok"] for check in findings["checks"]}


def test_the_wheel_holds_the_package_and_nothing_else(distributions):
    names = zipfile.ZipFile(distributions[1]).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pyfastpeft"}
    assert {name for name in names if name.endswith(".py")} == PACKAGE | KERNELS
    assert {name for name in names if name.endswith(".json")} == DATA
    libraries = sorted(name for name in names if name.endswith(".so"))
    assert libraries == [f"pyfastpeft/_host{sysconfig.get_config_var('EXT_SUFFIX')}", "pyfastpeft/_ops.so"]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_sdist_holds_all_sources(distributions):
    with tarfile.open(distributions[0]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/**/*") if path.is_file()}
    assert sources | PACKAGE | KERNELS | DATA | {"setup.py", "pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "demo", "build")) or ".so" in name]


@pytest.mark.parametrize("kind", [0, 1], ids=["sdist", "wheel"])
def test_an_installation_runs_the_native_ops(distributions, tmp_path, kind):
    python = clean_python(tmp_path / "env")
    pip(python, "install", "--ignore-installed", distributions[kind])
    findings, checks = doctor(python)
    assert Path(findings["location"]).is_relative_to(tmp_path)
    assert findings["host"]["available"]
    assert checks["cpu"]
    assert checks["reference"]


def test_an_editable_installation_builds_the_libraries(tree, tmp_path):
    python = clean_python(tmp_path / "env", with_pip=True)  # the pip that came with this Python, old as it may be
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    run(python, "-m", "pip", "uninstall", "-y", "setuptools")  # some bring one that is too old
    run(python, "-m", "pip", "install", *options, "-e", tree)
    findings, checks = doctor(python)
    assert Path(findings["location"]) == tree / "pyfastpeft"
    assert findings["host"]["available"]
    assert checks["cpu"]
    again = run(python, tree / "setup.py", "build_ext", "--inplace")
    assert again.count("no work to do") == 2


def check_without_native(wheel, tmp_path):
    python = clean_python(tmp_path / "env")
    pip(python, "install", "--ignore-installed", wheel)
    findings, checks = doctor(python, PYFASTPEFT_REQUIRE_NATIVE="0")
    assert checks == {"addmm": True, "reference": True}
    assert "not built" in next(row["why_not"] for row in findings["backends"] if row["backend"] == "cpu")


def test_a_build_without_torch_says_so_and_runs_the_reference(tree, tmp_path):
    (tmp_path / "see").mkdir()
    for path in Path(SITE).iterdir():
        if path.name.partition("-")[0] in ("setuptools", "_distutils_hack", "pybind11", "ninja"):
            (tmp_path / "see" / path.name).symlink_to(path)
    builder = clean_python(tmp_path / "builder", see=tmp_path / "see")
    said = pip(builder, "wheel", "-v", "-w", tmp_path, tree, PYFASTPEFT_REQUIRE_NATIVE="0")
    assert "WITHOUT pyfastpeft._ops: torch is not installed here" in said
    assert "WITHOUT pyfastpeft._host" not in said
    check_without_native(next(tmp_path.glob("*.whl")), tmp_path)


def test_a_build_without_a_compiler_says_so_and_runs_the_reference(tree, tmp_path):
    said = pip(sys.executable, "wheel", "-v", "-w", tmp_path, tree, PYFASTPEFT_REQUIRE_NATIVE="0", CXX="/nowhere/g++")
    for name in ("_ops", "_host"):
        assert f"WITHOUT pyfastpeft.{name}: there is no C++ compiler '/nowhere/g++'" in said
    wheel = next(tmp_path.glob("*.whl"))
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]
    check_without_native(wheel, tmp_path)


@pytest.mark.parametrize("cause", [{"CXX": "/nowhere/g++"}, {"CXXFLAGS": "-no-such-option"}], ids=["none", "failing"])
def test_required_libraries_that_cannot_be_built_fail_the_build(tree, cause):
    with pytest.raises(AssertionError, match=r"PYFASTPEFT_REQUIRE_NATIVE=1, but pyfastpeft\._ops cannot be built"):
        run(sys.executable, tree / "setup.py", "build_ext", **cause)
