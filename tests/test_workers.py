"""What `make gpu` relies on, without a GPU: what hangs, dies or breaks CUDA costs itself alone; figures of GPUs."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks.worker import Worker, WorkerLost, serve
from csrc import libraries

ROOT = Path(__file__).parent.parent

TESTS = """
import os, sys, time, types
import pytest

def test_passes():
    pass

def test_fails():
    assert 1 + 1 == 3, "the sum is off"

def test_skips():
    pytest.skip("not here")

def test_dies():
    os.write(2, b"terminate called\\n")
    os.abort()

@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("backend", ["slow"])
def test_hangs(backend, number):
    time.sleep(1000)

def test_breaks_cuda():
    def synchronize():
        raise RuntimeError("CUDA error: an illegal memory access was encountered\\nSearch for it")
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)

def test_finds_cuda_whole():
    assert "torch" not in sys.modules
"""


def run_in_workers(tmp_path, text, *options):
    (tmp_path / "test_some.py").write_text(text)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    command = [sys.executable, ROOT / "tests" / "run_in_workers.py", tmp_path / "test_some.py", *options]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(list(map(str, command)), env=inherited, **streams, text=True, timeout=120)
    return done.returncode, done.stdout.splitlines()


def test_a_bad_test_costs_itself_alone(tmp_path):
    status, said = run_in_workers(tmp_path, TESTS, "--processes", "1", "--patience", "8")
    assert status == 1
    assert said[-1].startswith("5 failed, 1 not run, 2 passed, 1 skipped in ")
    assert {line.partition(":")[0]: line.partition(": ")[2] for line in said if line.startswith("FAILED")} == {
        "FAILED test_fails": "AssertionError: the sum is off",
        "FAILED test_dies": "it died: SIGABRT",
        "FAILED test_hangs[slow-1] and 1 more": "it did nothing for 8 s and was killed",
        "FAILED test_hangs[slow-3]": "2 of its kind hung",
        "FAILED test_breaks_cuda": "RuntimeError: it passed; after it RuntimeError: CUDA error: an illegal memory "
        "access was encountered",
    }
    assert "skipped 1: Skipped: not here" in said
    assert "def test_fails():" in said  # in full
    assert "terminate called" in said


def test_the_run_ends_in_time(tmp_path):
    slow = "import time\nimport pytest\n@pytest.mark.parametrize('i', range(9))\ndef test_it(i):\n    time.sleep(3)\n"
    status, said = run_in_workers(tmp_path, slow, "--processes", "2", "--seconds", "3")
    assert status == 1
    assert "FAILED test_it[" in said[-2]
    assert "time was up" in said[-2]


def test_tests_that_cannot_be_collected_are_told(tmp_path):
    status, said = run_in_workers(tmp_path, "import nothing_of_that_name\n")
    assert status == 1
    assert said[-1] == "no tests were run: pytest ended with INTERRUPTED: its log tells why"
    assert any("No module named 'nothing_of_that_name'" in line for line in said)


def answers(connection):
    def answer(message, tell):
        tell("there")
        if message == "raise":
            raise ValueError("at 3:4:\n  some source\nwhat is wrong")
        return message, os.getpid()

    serve(connection, answer)


def test_a_process_is_kept_until_it_is_lost(capfd):
    worker = Worker(answers)
    first, again = (worker.ask("hello", 60) for _ in range(2))
    assert first == again
    assert first[0] == "hello"
    with pytest.raises(WorkerLost, match="ValueError: what is wrong") as lost:
        worker.ask("raise", 60)
    assert lost.value.at == "there"
    assert ", in answer\n" in capfd.readouterr().err  # where it was raised
    assert worker.ask("hello", 60)[1] != first[1]
    worker.process.kill()
    with pytest.raises(WorkerLost, match="it died"):
        worker.ask("hello", 60)
    worker.close()


# --- measurements ---


class Scripted:
    """In place of a process that measures: `fate` says for a provider's name what comes of it."""

    def __init__(self, fate):
        self.fate, self.asked = fate, []

    def ask(self, message, patience):
        from benchmarks.measure import Result

        case, _, _, contenders, _ = message
        self.asked.append([provider.name for provider in contenders])
        for provider in contenders:
            if provider.name in self.fate:
                raise WorkerLost(self.fate[provider.name], provider.name)
        seconds = {"base": 1.0, "cuda-16bit": 1.1, "triton-16bit": 1.05, "copy": 0.5}
        return {p.name: Result(case, p, seconds=[seconds.get(p.name, 2.0)] * 3) for p in contenders}

    def close(self):
        pass


def test_a_provider_that_is_lost_is_left_out_and_the_others_are_measured():
    from benchmarks.measure import EFFORT, Measurer
    from benchmarks.providers import Provider
    from benchmarks.shapes import Lora

    measurer = Measurer("cuda")
    measurer.worker = Scripted({"cuda-16bit": "it did nothing for 60 s and was killed"})
    contenders = [Provider(name, None) for name in ("base", "cuda-16bit", "triton-16bit")]
    for M in (16, 32, 64):
        found = measurer(Lora(M=M, K=64, N=64, dtype="bf16"), EFFORT["quick"], contenders)
        assert found["triton-16bit"].seconds == [1.05] * 3
        assert not found["base"].refused
        assert "it did nothing for 60 s" in found["cuda-16bit"].refused
    assert "is not tried on lora_linear again: cuda-16bit on lora_linear bf16" in found["cuda-16bit"].refused
    assert list(map(len, measurer.worker.asked)) == [3, 2, 3, 2, 2]


def scripted_figures(monkeypatch, fate, seconds=float("inf")):
    """The figures as on a machine with all backends, and the entries that go with them."""
    from benchmarks import providers
    from benchmarks.figures import cuda

    monkeypatch.setattr(providers, "backends", lambda op, device: ["cuda", "triton", "addmm", "reference"])
    make = cuda.Bench.__init__

    def scripted(self, *arguments):
        make(self, *arguments)
        self.measurer.worker = Scripted(fate)

    monkeypatch.setattr(cuda.Bench, "__init__", scripted)
    entries = []
    return [figure.as_dict() for figure in cuda.measured(False, seconds, entries)], entries


def test_the_best_backend_makes_the_figure(monkeypatch, tmp_path):
    figures, entries = scripted_figures(monkeypatch, {})
    assert len(figures) == 4 * 3 + 2 + 2 * 2 + 4
    by_name = {figure["figure"]: figure for figure in figures}
    first = by_name["lora_linear bf16 forward 4096x4096 M8192 r16 graph: time over base"]
    assert (first["median"], first["met"], first["needed"]) == (1.05, True, "<= 1.08 x")
    assert first["note"] == "triton 1.05; cuda 1.1; our-addmm 2"
    wide = by_name["lora_linear bf16 forward 4096x14336 M8192 r16 graph: time over base"]
    assert (wide["median"], wide["met"]) == (1.05, False)
    trained = by_name["lora_linear bf16 forward+backward 8192x8192 M8192 r16 graph: speed over peft, 16-bit adapters"]
    assert trained["median"] == pytest.approx(2 / 1.05)
    one = by_name["multi_lora_linear bf16 forward 4096x4096 M64 r16 L1 graph: time over base"]
    assert one["note"].startswith("triton 1.05; lora_linear triton 1.05; cuda 1.1")
    added = [figure for name, figure in by_name.items() if name.startswith("ia3_linear")]
    assert [figure["median"] for figure in added] == [pytest.approx(0.1)] * 4

    from benchmarks import choose

    results = tmp_path / "figures.json"
    info = {"architecture": "sm_90"}
    results.write_text(json.dumps({"machine_info": info, "figures": figures, "benchmarks": entries}))
    choose.main([str(results), "--into", str(tmp_path / "table.json")])
    rows = json.loads((tmp_path / "table.json").read_text())["sm_90"]
    of_training = [r for r in rows if r["op"] == "lora_backward" and r["sizes"][1:3] == [4096, 14336]]
    assert [row["backends"] for row in of_training] == [["triton", "cuda", "addmm"]]
    assert len(rows) == 4 * 2 + 2 + 1 + 2 + 4


def test_a_backend_that_fails_leaves_a_reason_and_the_rest(monkeypatch):
    figures, _ = scripted_figures(monkeypatch, {"triton-16bit": "it died: SIGSEGV", "copy": "it did nothing"})
    first = figures[0]
    assert (first["median"], first["met"]) == (1.1, False)
    assert "cuda 1.1; our-addmm 2; triton-16bit on lora_linear bf16 forward 4096x4096 M8192" in first["note"]
    added = [figure for figure in figures if figure["figure"].startswith("ia3_linear")]
    assert all(figure["met"] is False and "median" not in figure for figure in added)
    assert all("it did nothing" in figure["note"] for figure in added)
    apart = next(figure for figure in figures if "one launch" in figure["figure"])
    assert "triton-16bit" in apart["note"]
    late, entries = scripted_figures(monkeypatch, {}, seconds=-1)
    assert entries == []
    assert all(figure["met"] is False and "time was up" in figure["note"] for figure in late)


def test_figures_of_gpus_run_on_small_shapes(monkeypatch):
    """On the CPU, where our backend there takes the place of the others."""
    from benchmarks import report
    from benchmarks.figures import cuda

    monkeypatch.setattr(cuda, "LAYERS", cuda.LAYERS[:2])
    entries = []
    figures = [figure.as_dict() for figure in cuda.measured(True, float("inf"), entries, "cpu")]
    assert len(figures) == 2 * 3 + 2 + 2 + 4  # no two ways of launching
    for figure in figures:
        assert figure["note"].startswith(("cpu ", "lora_linear cpu ")), figure
        assert figure["rounds"] in (1, 3)
        assert report.figure_row(figure).count("|") == 3
    saved = next(figure for figure in figures if "bytes saved" in figure["figure"])
    assert (saved["median"], saved["met"]) == (1.0, True)
    assert {entry["extra_info"]["op"] for entry in entries} == {"lora_linear", "ia3_linear", "multi_lora_linear"}
    assert all(entry["extra_info"]["ours"] for entry in entries if "operands" in entry["extra_info"])


def test_the_suite_has_the_layers_of_the_figures_and_a_quick_form():
    from benchmarks import shapes
    from benchmarks.figures import cuda

    full = shapes.cases("lora_linear", "full", "cuda")
    for backward in (False, True):
        sides = {(case.K, case.N) for case in full if case.M == cuda.TOKENS and case.backward == backward}
        assert sides == {(K, N) for K, N, *_ in cuda.LAYERS}
    for op in shapes.CASES:
        quick = shapes.cases(op, "quick", "cuda")
        assert [case.mode for case in quick] == ["graph"] * (len(quick) - 1) + ["eager"]
    decoded = [case for case in shapes.cases("multi_lora", "quick", "cuda") if case.M == 64 and not case.mix]
    assert {len(case.counts) for case in decoded} == {1, 8, 64}


# --- make gpu ---


@pytest.fixture
def parts(monkeypatch, tmp_path):
    """Runs these parts as `make gpu` does; (exit status, what it says)."""
    from benchmarks import gpu

    monkeypatch.setenv("OUT", str(tmp_path / "out"))

    def run(capsys, *given):
        monkeypatch.setattr(
            gpu, "PARTS", [gpu.Part(n, s, lambda out, seconds, code=code: ["-c", code], 40) for n, s, code in given]
        )
        return gpu.main(), capsys.readouterr().out

    monkeypatch.setattr(gpu, "KILLED", 1)
    return run


def test_every_part_of_make_gpu_has_its_turn(parts, capsys, tmp_path):
    child = f"import subprocess; p = subprocess.Popen(['sleep', '100']); open('{tmp_path}/pid', 'w').write(str(p.pid))"
    status, said = parts(
        capsys,
        ("build", 20, "print('x' * 50); print('the end'); exit(3)"),
        ("tests", 10, f"print('begun', flush=True); {child}; p.wait()"),
        ("figures", 20, "import os; print(os.environ['PYTHONPATH'])"),
    )
    assert status == 1
    state = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    lines = [line.partition(" after ")[0] for line in said.splitlines()]
    assert lines[:4] == ["== build: exit status 3", "the end", "== tests: ended by its limit of 10 s", "begun"]
    assert "== figures: done" in lines
    assert lines[-1] == f"== failed: build, tests; results are in {tmp_path / 'out'}"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["build.log", "figures.log", "tests.log"]


def test_make_gpu_uses_what_was_built_from_these_sources(tmp_path):
    """And puts aside what was not, or does not load. What it cannot build is missing then."""
    script = f"""
import sys
from csrc import libraries
libraries.__file__ = {str(tmp_path / "csrc/libraries.py")!r}
libraries.built = lambda name, sources, kept: {{"_host": __file__}}.get(name)
sys.exit(libraries.main())
"""
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    (tmp_path / "pyfastpeft").mkdir()
    path = {name: tmp_path / "pyfastpeft" / libraries.file_name(name) for name in libraries.SOURCES}
    library = (ROOT / "pyfastpeft/_ops.so").read_bytes()
    path["_ops"].write_bytes(library)
    path["_ops_cuda"].write_bytes(bytes.fromhex(libraries.state("_ops_cuda", ROOT)))  # and nothing that loads
    path["_host"].write_bytes(library)
    (tmp_path / "build.py").write_text(script)
    done = subprocess.run(
        [sys.executable, tmp_path / "build.py", "--missing"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("is used as it is") == 1
    assert done.stdout.count("is of other sources or does not load") == 2
    assert path["_ops"].read_bytes() == library
    assert path["_host"].read_text() == script
    assert not path["_ops_cuda"].exists()
    assert path["_ops_cuda"].with_suffix(".old").exists()


@pytest.mark.parametrize("stale", [None, "_ops", "_ops_cuda"])
def test_kernels_of_other_sources_are_told(monkeypatch, capsys, stale):
    import torch

    from benchmarks import machine

    monkeypatch.setattr(machine, "native", types.SimpleNamespace(AVAILABLE=True, CUDA_AVAILABLE=True))
    monkeypatch.setattr(torch.ops.pyfastpeft, "cuda_capability", lambda: "CUDA 13.0, CUTLASS; sm_90", raising=False)
    monkeypatch.setattr(machine.libraries, "current", lambda name, *paths: name != stale)
    monkeypatch.setattr(machine, "describe", lambda: {"device": "cuda"})
    monkeypatch.setattr(machine, "title", lambda found: "a GPU")
    assert machine.main() == (stale is not None)
    told = f"pyfastpeft/{stale}.so was built from other sources"
    assert (told in capsys.readouterr().out) == (stale is not None)


def test_make_gpu_stops_where_there_is_no_gpu(parts, capsys):
    status, said = parts(capsys, ("build", 20, ""), ("look", 20, "exit('no GPU')"), ("tests", 20, ""))
    assert status == 1
    assert "no GPU" in said
    assert "== tests" not in said
    status, said = parts(capsys, ("build", 20, ""), ("look", 20, ""))
    assert status == 0
    assert "== all parts came through" in said
