"""Block sizes from tuning/: how `python -m benchmarks.tune` makes the file, and how the launchers take it."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from triton.backends.compiler import GPUTarget

from benchmarks import tune
from pyfastpeft.kernels import blocks

HERE = GPUTarget("cuda", 90, 32)
half, single = torch.bfloat16, torch.float32


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty tuning/ and a GPU that there is not."""
    monkeypatch.setattr(blocks, "TUNING", tmp_path / "tuning")
    monkeypatch.setattr(blocks, "target", lambda: HERE)
    blocks.measured.cache_clear()
    yield tmp_path / "tuning"
    blocks.measured.cache_clear()


def timer(case, adapters, kernel, entries, use):
    """Time grows with the blocks' distance from a tile of the problem's size; concat_linear pays from 2048 tokens on;
    of the linear kernel nothing runs for 64 tokens and one candidate is infinite."""
    seconds = []
    for entry in entries:
        use(entry)
        taken = blocks.blocks(kernel, half, case.M, case.N, half)
        assert taken == entry, "the launchers do not take what is timed"
        if entry is None:
            seconds.append(5.0 if case.M < 2048 else 1e9)
        elif kernel == "linear" and case.M == 64:
            seconds.append(math.inf)
        else:
            seconds.append(10 + abs(entry["BLOCK_M"] - min(case.M, 128)) + entry["num_stages"] + case.K / 1e6)
    return seconds


def test_the_best_candidates_are_written_and_taken(folder):
    path = blocks.tuning_file(HERE)
    assert path == folder / "sm_90.json"
    table = {}
    for kernel in ("linear", "concat_linear"):
        table |= tune.tune(kernel, "bf16", "16bit", timer)
        tune.write(path, table, {"gpu": "none"})
        blocks.measured.cache_clear()
    text = path.read_text()
    assert json.loads(text) == {"origin": {"gpu": "none"}, "blocks": table}
    assert max(map(len, text.split("\n"))) < 200

    best = blocks.blocks("linear", half, 3000, 5000, half, rank=8)
    assert (best["BLOCK_M"], best["num_stages"], best["BLOCK_R"]) == (128, 2, 16)
    assert blocks.blocks("linear", half, 10**6, 10**6, half)["BLOCK_M"] == 128
    assert blocks.blocks("linear", half, 5, 5, half)["BLOCK_M"] == 16
    # What was not measured at 64 tokens follows from 512.
    assert blocks.blocks("linear", half, 64, 1024, half) == blocks.blocks("linear", half, 512, 1024, half)
    assert blocks.blocks("concat_linear", half, 1024 + 512, 4096, half) is not None
    assert blocks.blocks("concat_linear", half, 512, 4096, half) is None
    # Other kernels, operands and architectures follow the rule.
    for kernel, dtype in (("shrink", half), ("linear", single)):
        assert blocks.blocks(kernel, dtype, 64, 64, dtype) == rule(kernel, dtype, 64, dtype)


def test_kernels_that_are_not_for_the_operands_are_passed_over(folder):
    for kernel in ("concat_linear", "ia3_linear"):
        assert tune.tune(kernel, "bf16", "fp32", timer) == {}
    assert tune.tune("concat_linear", "fp32", "fp32", timer) == {}


def test_spills_are_those_of_the_same_blocks(monkeypatch):
    def compiled(depth, stages, spilled):
        source = SimpleNamespace(constants={(1,): 16, (2,): depth})
        return SimpleNamespace(src=source, metadata=SimpleNamespace(num_warps=4, num_stages=stages), n_spills=spilled)

    cache = dict(enumerate([compiled(64, 3, 0), compiled(64, 4, 8), compiled(32, 3, None)]))
    function = SimpleNamespace(arg_names=["x", "BLOCK_M", "BLOCK_K"], device_caches={0: (cache, {}, None)})
    monkeypatch.setitem(tune.KERNELS, "shrink", function)
    found = [tune.spills("shrink", blocks.entry(16, 0, *sizes)) for sizes in ((64, 4, 3), (64, 4, 4), (32, 4, 3))]
    assert found == [False, True, False]


def rule(kernel, dtype, tokens, adapters):
    return next(sizes for most, sizes in blocks.BLOCKS[kernel][blocks.kind(dtype, adapters)] if tokens <= most)


def test_a_second_run_keeps_what_it_does_not_measure(folder):
    first = {"linear": {"half": [[None, None, blocks.entry(16, 32, 64, 4, 2)]]}}
    second = {"linear": {"single": [[None, None, blocks.entry(32, 32, 64, 4, 2)]]}, "shrink": {"half": []}}
    for table in (first, second):
        tune.write(blocks.tuning_file(HERE), table, {})
    found = blocks.measured(HERE)
    assert found == {"linear": first["linear"] | second["linear"], "shrink": second["shrink"]}


def test_nothing_measured_leaves_the_rule(folder):
    assert not folder.exists()
    for kernel, kinds in blocks.BLOCKS.items():
        if "half" in kinds:
            for tokens in (1, 64, 5000):
                assert blocks.blocks(kernel, half, tokens, 64, half) == rule(kernel, half, tokens, half)


def test_every_candidate_is_tried_once_and_the_rules_own_first():
    for kernel in tune.CANDIDATES:
        for tokens in tune.TOKENS:
            own = rule(kernel, half, tokens, half)
            entries = tune.candidates(kernel, own, tokens)
            assert entries[0] == own
            assert all(entry not in entries[:i] for i, entry in enumerate(entries))
            assert len(entries) < 30


def test_committed_files_hold_what_the_launchers_read():
    for path in blocks.TUNING.glob("*.json"):
        found = json.loads(path.read_text())
        assert found["origin"]["gpu"]
        for kernel, kinds in found["blocks"].items():
            (_, known), *_ = reversed(blocks.BLOCKS[kernel]["half"])
            for rows in kinds.values():
                for _, _, sizes in rows:
                    assert sizes is None or sizes.keys() == known.keys()


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(tune.machine, "device", lambda: "cpu")
    with pytest.raises(SystemExit, match="torch sees no GPU"):
        tune.main()
