"""The benchmark suite in its tiny form, end to end; and that what is wrong is refused rather than timed."""

import json
import os
import platform
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pytest_benchmark")

from benchmarks import choose, groups, machine, measure, providers, report, shapes
from benchmarks.figures import Figure
from benchmarks.providers import Call, Provider
from pyfastpeft.ops import choice, dispatch, lora, schemas, use_backend

ROOT = Path(__file__).parent.parent
TINY = measure.EFFORT["tiny"]
TRAINED = shapes.Lora(M=6, K=40, N=24, rank=4, backward=True)
DROPPED = shapes.Lora(M=64, K=64, N=24, rank=4, backward=True, dropout=0.1)

WRONG_PROVIDER = """
from benchmarks import providers

def build(problem, adapters):
    call = providers.build_ours(problem, adapters)
    return call._replace(forward=lambda: 1.01 * call.forward())

everybody = providers.providers
wrong = providers.Provider("wrong-fp32", build, "fp32")
providers.providers = lambda case, device: [*everybody(case, device), wrong]
"""


def run(*arguments, path=()):
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}  # xdist's
    env = inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    command = [sys.executable, "-m", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


def test_suite_end_to_end(tmp_path):
    (tmp_path / "wrong_provider.py").write_text(WRONG_PROVIDER)
    results = tmp_path / "tiny.json"
    done = run("benchmarks", "--size", "tiny", "--json", results, "--", "-p", "wrong_provider", path=[tmp_path])
    assert done.returncode == 1, done.stdout + done.stderr  # the wrong provider's entries fail, and they alone
    found = json.loads(results.read_text())
    entries = {(each["group"], each["extra_info"]["provider"]): each for each in found["benchmarks"]}
    cases = [case for op in shapes.CASES for case in shapes.cases(op, "tiny", machine.device())]
    expected = {(case.name, each.name) for case in cases for each in providers.providers(case, machine.device())}
    assert set(entries) == expected
    for (_, name), entry in entries.items():
        info = entry["extra_info"]
        assert info["seconds"]["p20"] <= info["seconds"]["median"] <= info["seconds"]["p80"]
        assert info["rounds"] == entry["stats"]["rounds"] == TINY.rounds
        assert entry["stats"]["median"] == pytest.approx(info["seconds"]["median"], rel=1e-3)
        assert bool(info["errors"]) == (name != "base")
        assert "data" not in entry["stats"]
    for case in cases:
        assert f"wrong-fp32 on {case.name}: Wrong: output has relative error" in done.stdout
        assert f"| {case.label} |" in done.stdout
    assert found["machine_info"]["versions"]["torch"] == torch.__version__
    assert str(ROOT) not in results.read_text()
    assert "node" not in found["machine_info"]
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the cap is of x86-64 CPUs")
def test_figures_as_an_avx2_machine(tmp_path):
    results = tmp_path / "figures.json"
    done = run("benchmarks.figures", "--tiny", "--isa", "avx2", "--json", results)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(results.read_text())
    assert found["machine_info"]["isa"] == "avx2"
    assert found["machine_info"]["isa_capped"]
    assert len(found["figures"]) == 6 * 2 + 3 * 2 + 3 + 1 + 1
    assert all(figure["rounds"] >= 1 and isinstance(figure["met"], bool) for figure in found["figures"])
    assert report.markdown(found) in done.stdout


def off(problem, adapters):
    leaves = problem.leaves(adapters)
    return Call(lambda: 1.001 * problem.formula(problem.weight, None, *leaves), leaves)


def unwritten(problem, adapters):
    leaves = problem.leaves(adapters)
    hole = torch.zeros(problem.case.M, problem.case.N)
    hole[-1, -1] = torch.nan
    return Call(lambda: problem.formula(problem.weight, None, *leaves) + hole, leaves)


def small_gradient(problem, adapters):
    x, lora_A, lora_B = leaves = problem.leaves(adapters)
    return Call(
        lambda: problem.formula(problem.weight, None, x, 0.99 * lora_A + 0.01 * lora_A.detach(), lora_B), leaves
    )


def no_dropout(problem, adapters):
    leaves = problem.leaves(adapters)
    return Call(lambda: problem.formula(problem.weight, None, *leaves), leaves)


def two_masks(problem, adapters):
    leaves = problem.leaves(adapters)

    def forward():
        first, second = (F.dropout(torch.ones_like(problem.x), problem.case.dropout) for _ in range(2))
        y = problem.formula(problem.weight, second, *leaves)
        return y + (problem.formula(problem.weight, first, *leaves) - y).detach()

    return Call(forward, leaves)


def broken(problem, adapters):
    raise RuntimeError("no kernel image")


def one_mask(problem, adapters):
    leaves = problem.leaves(adapters)

    def forward():
        factor = F.dropout(torch.ones_like(problem.x), problem.case.dropout)
        return problem.formula(problem.weight, factor, *leaves)

    return Call(forward, leaves)


@pytest.mark.parametrize(
    ("case", "build", "why"),
    [
        (TRAINED, off, "output has relative error 0.001; torch's own plus tolerance is"),
        (TRAINED, unwritten, "output has relative error nan"),
        (TRAINED, small_gradient, "gradient 0 of the adapter has relative error 0.01"),
        (DROPPED, no_dropout, "dropout keeps 1.0000 of x"),
        (DROPPED, two_masks, "output has relative error"),
        (TRAINED, broken, "RuntimeError: no kernel image"),
    ],
)
def test_wrong_providers_are_refused(case, build, why, capsys):
    contenders = [Provider("base", providers.build_base), Provider("wrong", build, "fp32")]
    found = measure.measure(case, "cpu", TINY, contenders)
    assert why in found["wrong"].refused
    assert ("in broken\n" in capsys.readouterr().err) == (build is broken)  # where it was raised
    assert not found["wrong"].seconds
    assert len(found["base"].seconds) == TINY.rounds


def test_right_dropout_is_accepted():
    found = measure.measure(DROPPED, "cpu", TINY, [Provider("right", one_mask, "fp32")])["right"]
    assert not found.refused
    assert set(found.errors) == {"output", "gradient of x", "gradient 0 of the adapter", "gradient 1 of the adapter"}


@pytest.mark.parametrize("kind", [shapes.Lora, shapes.LoraDelta, shapes.Dora])
def test_a_mask_of_torch_is_timed_where_no_kernel_draws_one(kind, monkeypatch):
    monkeypatch.setattr(lora, "dropout_seed", lambda x, p: None if p == 0 else pytest.fail("a seed was drawn"))
    case = kind(M=64, K=64, N=24, rank=4, dtype="bf16", backward=True, dropout=0.1)
    provider = next(each for each in providers.ours(case, "cuda", "fp32") if each.backend == "addmm")
    assert provider.build is providers.build_kept_mask
    assert not measure.measure(case, "cpu", TINY, [provider])[provider.name].refused


def test_rounds_are_interleaved():
    met = []
    runs = {Provider(name, None): lambda name=name: met.append(name) for name in "abc"}
    seconds = measure.interleave(runs, TINY, "cpu")
    assert [len(each) for each in seconds.values()] == [TINY.rounds] * 3
    rounds = met[len(met) - 3 * TINY.rounds :]
    assert all(sorted(rounds[i : i + 3]) == ["a", "b", "c"] for i in range(0, len(rounds), 3))


def test_memory_is_weighed():
    problem = providers.problem(TRAINED, "cpu")
    kept = F.linear(problem.x, problem.weight).exp  # exp keeps its result, F.linear only the frozen weight
    assert measure.saved_bytes(kept, [problem.weight]) == TRAINED.M * TRAINED.N * 4
    assert measure.saved_bytes(lambda: F.linear(problem.x, problem.weight), [problem.weight]) == 0
    assert measure.peak_bytes(lambda: torch.empty(1000).neg().neg_(), "cpu") == 8000


@pytest.mark.parametrize("tokens", [1, 5, 32, 64])
def test_popularity_mixes(tokens):
    mixes = {mix: shapes.popularity(mix, tokens) for mix in ("distinct", "uniform", "skewed", "identical")}
    assert all(sum(counts) == tokens and min(counts) > 0 for counts in mixes.values())
    assert len(mixes["distinct"]) == tokens
    assert max(mixes["uniform"]) - min(mixes["uniform"]) <= 1
    assert list(mixes["skewed"]) == sorted(mixes["skewed"], reverse=True)
    assert mixes["identical"] == (tokens,)


@pytest.mark.parametrize("backward", [False, True])
def test_an_adapter_alone_and_its_base_make_the_flop_of_the_layer(backward):
    shape = dict(M=6, K=40, N=24, backward=backward)
    routed = dict(counts=(2, 4), ranks=(8, 16), **shape)
    for alone, layer in (
        (shapes.LoraDelta(**shape), shapes.Lora(**shape)),
        (shapes.MultiLora(**routed), shapes.MultiLoraLinear(**routed)),
    ):
        assert alone.work(4)[0] + alone.base_work()[0] == layer.work(4)[0]


@pytest.mark.parametrize(
    ("relation", "values", "met"),
    [("<=", [1, 2, 9], True), ("<=", [1, 3, 3], False), (">=", [1, 2, 2], True), (">=", [], None)],
)
def test_a_figure_is_met_by_its_median(relation, values, met):
    assert Figure("figure", relation, 2.0, values).as_dict()["met"] is met


def test_tables_go_between_their_markers():
    text = f"before\n{report.START}\nold\n{report.END}\nafter"
    assert report.insert(text, "new") == f"before\n{report.START}\n\nnew\n\n{report.END}\nafter"
    with pytest.raises(ValueError, match="benchmark table start"):
        report.insert("no markers", "new")


# --- the table of choices ---


def entry(case, provider, adapters, median):
    """What the suite writes of a provider on a case."""
    info = {"provider": f"{provider}-{adapters}", "seconds": {"median": median}, "mode": case.mode}
    operands = {"operands": choose.operands(case, adapters)} if provider != "peft" else {}
    return {"group": case.name, "extra_info": info | operands}


def test_the_table_of_choices_comes_from_results_on_a_gpu(tmp_path, capsys):
    forward = shapes.Lora(M=8, K=64, N=48, dtype="bf16", mode="graph")
    eager = shapes.IA3(M=3, K=5, N=4, feedforward=True, mode="eager")
    results = {
        "machine_info": {"architecture": "sm_90"},
        "benchmarks": [
            entry(forward, "peft", "16bit", 1.0),
            entry(forward, "triton", "16bit", 3.0),
            entry(forward, providers.OUR_ADDMM, "16bit", 2.0),
            entry(forward, "triton", "fp32", 2.0),
            entry(eager, "reference", "fp32", 2.0),
        ],
    }
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    (tmp_path / "cpu.json").write_text(json.dumps({"machine_info": {}, "benchmarks": []}))
    table = tmp_path / "choices.json"
    table.write_text(json.dumps({"sm_80": [], "sm_90": [{"old": 1}]}))
    choose.main([str(tmp_path / "gpu.json"), "--into", str(table)])
    sizes = [8, 64, 48, 16, 1]
    assert json.loads(table.read_text()) == {
        "sm_80": [],
        "sm_90": [
            {"op": "lora_forward", "kind": f"bfloat16, adapters {adapters}", "sizes": sizes, "backends": backends}
            for adapters, backends in (("bfloat16", ["addmm", "triton"]), ("float32", ["triton"]))
        ],
    }
    with pytest.raises(SystemExit):
        choose.main([str(tmp_path / "cpu.json"), "--into", str(table)])
    assert "does not come from a GPU" in capsys.readouterr().err


def test_a_case_decides_all_ops_that_it_runs_unless_another_times_one_more_closely():
    shape = dict(M=8, K=64, N=48, mode="graph")
    trained, dropped = (shapes.Dora(**shape, backward=True, dropout=p) for p in (0.0, 0.1))
    first = {"benchmarks": [entry(trained, "triton", "fp32", 1.0), entry(dropped, "cuda", "fp32", 1.0)]}
    second = {"benchmarks": [entry(shapes.Dora(**shape), "addmm", "fp32", 1.0), entry(dropped, "triton", "fp32", 0.5)]}
    found = {(each["op"], each["kind"].endswith("dropout")): each["backends"] for each in choose.entries(first, second)}
    assert found == {
        ("dora_norm", False): ["addmm"],
        ("dora_forward", False): ["addmm"],
        ("dora_backward", False): ["triton"],
        ("dora_forward", True): ["cuda"],
        ("dora_backward", True): ["cuda"],
    }


@pytest.fixture
def chosen(monkeypatch, request):
    """choice.ranking after the quick suite has run on a GPU, or so many turns of it, the fastest backend being named
    after a case's M."""
    turns = getattr(request, "param", None)
    cases = shapes.all_cases("quick", "cuda")[: turns and turns * len(shapes.CASES)]
    cases = [case for case in cases if case.mode == "graph"]
    benchmarks = [entry(case, f"M{case.M}", adapters, 1.0) for case in cases for adapters in ("fp32", "16bit")]
    choice._ranking.cache_clear()
    monkeypatch.setattr(choice, "measured", {"sm_90": choose.entries({"benchmarks": benchmarks})})
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_90")
    yield choice.ranking
    choice._ranking.cache_clear()


def asked_for(op, dtypes, M=64, L=8):
    """Raw arguments of `op`, as far as `choice` reads them, of every kind that the ops may ask for with activations of
    these dtypes: adapters of the same and of float32; with what may be None and without; feedforward or not."""
    K, N, r = 4096, 4096, 16
    stack = (L,) if op.startswith("multi_lora") else ()
    schema = schemas.SCHEMAS[op]
    flags = {
        "weight": (True, False) if "Tensor? weight," in schema else (True,),
        "seed": (False, True) if "Tensor? seed," in schema else (False,),
        "feedforward": (True, False) if "bool feedforward" in schema else (False,),
    }
    for dtype, mixed, weight, seed, feedforward in product(dtypes, (False, True), *flags.values()):
        adapters = torch.promote_types(dtype, torch.float32) if mixed else dtype
        x, w = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((M, K), (N, K)))
        down, up = (torch.empty(*stack, *shape, dtype=adapters, device="meta") for shape in ((r, K), (N, r)))
        tokens = torch.empty(M, dtype=torch.int64, device="meta")
        given = {"x": x, "dy": x, "dys": [x], "slots": tokens, "seed": tokens[:1] if seed else None}
        given |= {"weight": w if weight else None, "weights": [w], "feedforward": feedforward}
        given |= {"lora_A": down, "down": down, "lora_B": up, "up": up, "lora_Bs": [up]}
        yield tuple(given.get(name) for name in choice.NAMES[op])


@pytest.mark.parametrize("chosen", [2, None], indirect=True)
@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_the_quick_suite_decides_every_kind_of_operands(op, chosen):
    found = {choice.described(op, args)[0]: chosen(op, args) for args in asked_for(op, (torch.bfloat16, torch.float16))}
    assert not [kind for kind, ranking in found.items() if ranking == choice.RULE]


@pytest.mark.parametrize("op", [op for op in schemas.SCHEMAS if op != "group_tokens"])  # which sees no activations
def test_what_tensor_cores_do_not_multiply_stays_with_the_rule(op, chosen):
    """Activations in float32 and float64, in which the suite times nothing on a GPU."""
    assert {chosen(op, args) for args in asked_for(op, (torch.float32, torch.float64))} == {choice.RULE}


@pytest.mark.parametrize(
    ("op", "tokens", "nearest"),
    [
        ("lora_forward", (1, 20, 65, 250, 260, 1000, 8192), (1, 32, 128, 128, 512, 512, 2048)),
        ("multi_lora_forward", (64, 129, 362, 2048), (64, 256, 256, 2048)),
        ("ia3_forward", (1, 32, 200, 2048), (32, 32, 32, 2048)),
    ],
)
def test_every_regime_of_tokens_has_an_entry(op, tokens, nearest, chosen):
    for M, expected in zip(tokens, nearest):
        for L in (8, 64):
            weighted = next(asked_for(op, [torch.bfloat16], M, L))
            assert chosen(op, weighted)[0] == f"M{expected}"


@pytest.mark.parametrize("adapters", ["fp32", "16bit"])
@pytest.mark.parametrize("case", [c for op in shapes.CASES for c in shapes.cases(op, "tiny", "cpu")], ids=str)
def test_the_suite_knows_operands_as_the_ops_do(case, adapters, monkeypatch):
    if adapters not in providers.problem(case, "meta").adapters:
        return
    seen, problem = [], providers.problem(case, "cpu")
    call = providers.build_ours(problem, adapters)
    monkeypatch.setattr(dispatch, "run", lambda op, *args, **rest: seen.append((op, *choice.described(op, args))))
    with use_backend("reference"):
        measure.step(problem, call)()
    expected = [{"op": op, "kind": kind, "sizes": list(sizes)} for op, kind, sizes in seen]
    assert choose.operands(case, adapters) == expected


@pytest.mark.parametrize("run", groups.RUNS)
def test_groups_are_timed_in_rounds(run):
    ratios = groups.contest([12, 5], torch.bfloat16, 3, run, measure.Effort(0.0, 2, 0.0))
    assert len(ratios) == 2
    assert all(ratio > 0 for ratio in ratios)
