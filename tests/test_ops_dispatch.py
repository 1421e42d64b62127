"""Which backend runs an op: the dispatch table, and the choice for CUDA tensors."""

import functools
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from error_rule import lora_inputs
from op_cases import lora

from pyfastpeft import ops
from pyfastpeft.ops import choice, dispatch, native

HALVES = torch.bfloat16, torch.float16

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


# --- dispatch ---


def test_the_cpu_backend_is_chosen_where_it_is_built():
    assert native.AVAILABLE
    assert dispatch.select("lora_forward", (torch.empty(1, 1),)).backend == "cpu"
    assert dispatch.select("lora_forward", (torch.empty(1, 1, device="meta"),)).backend == "addmm"


def test_a_forced_backend_that_cannot_serve_says_why(monkeypatch):
    inputs = lora_inputs(3, 4, 5, 2, torch.float32)
    with (
        ops.use_backend("triton"),
        pytest.raises(RuntimeError, match=r"triton.*forced.*cpu.*takes devices \('cuda',\)"),
    ):
        lora(**inputs)
    monkeypatch.setattr(dispatch, "_forced", "cuda")
    monkeypatch.setitem(dispatch.UNAVAILABLE, "cuda", "built without it")
    with pytest.raises(RuntimeError, match=r"cuda: (built without it|takes devices \('cuda',\))"):
        lora(**inputs)
    with pytest.raises(ValueError, match="name is 'fast'; it must be one of"), ops.use_backend("fast"):
        pass


def test_threads_that_leave_their_backends_out_of_order_leave_none_behind():
    before = dispatch.forced_backend()
    first, second = ops.use_backend("reference"), ops.use_backend("addmm")
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        one.submit(first.__enter__).result()
        other.submit(second.__enter__).result()
        assert dispatch.forced_backend() == "addmm"
        one.submit(first.__exit__, None, None, None).result()
        assert dispatch.forced_backend() == "addmm"
        other.submit(second.__exit__, None, None, None).result()
    assert dispatch.forced_backend() == before


def test_the_backward_pass_runs_where_the_forward_pass_was_forced_to():
    inputs = lora_inputs(3, 4, 5, 2, torch.float32)
    with ops.use_backend("reference"):
        out = lora(**inputs)
    rows = dispatch.TABLE["lora_backward"]
    assert next(row.backend for row in rows if "cpu" in (row.devices or ("cpu",))) == "cpu"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch.TABLE, "lora_backward", [row for row in rows if row.backend == "reference"])
        out.sum().backward()
    assert inputs["lora_A"].grad.any()


def test_meta_tensors_give_shapes():
    inputs = {n: t.to("meta") for n, t in lora_inputs(3, 4, 5, 2, torch.float32).items()}
    assert lora(**inputs).shape == (3, 5)
    y = torch.zeros(3, 5, device="meta")
    assert ops.lora_delta_(y, inputs["x"], inputs["lora_A"], inputs["lora_B"], 0.5).shape == (3, 5)


# --- the choice for CUDA tensors ---


def lora_arguments(dtype=torch.bfloat16, m=8192, k=4096, n=4096, r=16, adapters=None, weight=True, seed=None):
    x, w, s = (torch.empty(shape, dtype=dtype, device="meta") for shape in ((m, k), (n, k), (m, r)))
    lora_A, lora_B = (torch.empty(shape, dtype=adapters or dtype, device="meta") for shape in ((r, k), (n, r)))
    return x, w if weight else None, None, lora_A, lora_B, 1.0, 0.0, seed, x, s


def test_operands_are_described_by_kind_and_sizes():
    described = functools.partial(choice.described, "lora_forward")
    assert described(lora_arguments(m=7, n=64)) == ("bfloat16, adapters bfloat16", (7, 4096, 64, 16, 1))
    kind, sizes = described(lora_arguments(adapters=torch.float32, weight=False, seed=torch.zeros(1)))
    assert kind == "bfloat16, no weight, adapters float32, dropout"
    assert sizes == (8192, 4096, 4096, 16, 1)
    many = [torch.empty(shape, device="meta") for shape in ((64, 48), (5, 8, 48), (5, 32, 8), (5,))]
    sizes = 64, 48, 32, 8, 5
    assert choice.described("multi_lora_forward", (many[0], None, None, *many[1:])) == (
        *("float32, no weight, adapters float32", sizes),
    )
    weight = torch.empty(32, 48, device="meta")
    assert choice.described("multi_lora_forward", (many[0], weight, None, *many[1:])) == (
        *("float32, adapters float32", sizes),
    )
    x, weight, ia3_l = (torch.empty(shape, device="meta") for shape in ((3, 5), (4, 5), (5,)))
    assert choice.described("ia3_forward", (x, weight, None, ia3_l, True, x, None)) == ("float32, ff", (3, 5, 4, 1, 1))


@pytest.fixture
def measured(monkeypatch):
    """choice.ranking on a GPU of architecture sm_90 with two measured shapes."""
    kind = "bfloat16, adapters bfloat16"
    entries = [
        {"op": "lora_forward", "kind": kind, "sizes": [16, 4096, 4096, 16, 1], "backends": ["triton", "addmm"]},
        {
            "op": "lora_forward",
            "kind": kind,
            "sizes": [8192, 4096, 4096, 16, 1],
            "backends": ["cuda", "addmm", "triton"],
        },
    ]
    choice._ranking.cache_clear()
    monkeypatch.setattr(choice, "measured", {"sm_90": entries})
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_90")
    yield functools.partial(choice.ranking, "lora_forward")
    choice._ranking.cache_clear()


def test_the_nearest_measured_shape_decides(measured):
    assert measured(lora_arguments(m=64)) == ("triton", "addmm", "reference")
    assert measured(lora_arguments(m=2048, n=14336)) == ("cuda", "addmm", "triton", "reference")


def test_float16_goes_where_bfloat16_goes(measured):
    assert measured(lora_arguments(torch.float16, m=64)) == measured(lora_arguments(m=64))
    kinds = {choice.described("lora_forward", lora_arguments(d, adapters=torch.float32))[0] for d in HALVES}
    assert kinds == {"bfloat16, adapters float32"}


def test_a_group_goes_where_one_of_its_layers_goes(measured):
    x, _, _, lora_A, lora_B, *_ = lora_arguments(m=20)
    weights = [torch.empty(4096, 4096, dtype=torch.bfloat16, device="meta")] * 3
    args = x, weights, [None] * 3, torch.cat([lora_A] * 3), [lora_B] * 3, [1.0] * 3, 0.0, None, [x] * 3, x
    assert choice.described("lora_group_forward", args) == ("bfloat16, adapters bfloat16", (20, 4096, 4096, 48, 1))
    assert choice.ranking("lora_group_forward", args) == ("triton", "addmm", "reference")
    backward = [x] * 3, x, weights, args[3], args[4], [1.0] * 3, 0.0, None, x, x, None, []
    assert choice.described("lora_group_backward", backward) == choice.described("lora_group_forward", args)
    for tokens, backend in ((16, "triton"), (8192, "cuda")):
        on_gpu = SimpleNamespace(device=torch.device("cuda"), dtype=x.dtype, shape=(tokens, 4096))
        rows = any(row.backend == backend for row in dispatch.TABLE["lora_group_forward"])
        assert dispatch.preferred("lora_group_forward", (on_gpu, *args[1:])) == rows
    assert dispatch.preferred("lora_group_forward", (torch.empty(2, 3),))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_compiled_graph_chooses_too(measured, dtype):
    args = lora_arguments(dtype, m=16)

    def function(x):
        return x * ["triton", "cuda"].index(measured((args[0], *args[1:]))[0])

    assert torch.compile(function, fullgraph=True, backend="eager")(torch.ones(1)) == 1  # as for many tokens


def test_what_no_gpu_has_run_is_not_chosen(measured, monkeypatch):
    assert measured(lora_arguments(adapters=torch.float32)) == choice.RULE
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_80")
    assert measured(lora_arguments()) == choice.RULE
    assert not {"cuda", "triton"} & set(choice.RULE)


def test_a_row_that_does_not_fit_gives_way_and_a_forced_one_says_what_it_lacks(monkeypatch):
    rows = dispatch.TABLE["lora_forward"]
    lacking = [row._replace(fits=lambda *args: "K must be even") if row.backend == "cpu" else row for row in rows]
    monkeypatch.setitem(dispatch.TABLE, "lora_forward", lacking)
    inputs = lora_inputs(3, 4, 5, 2, torch.float32)
    args = tuple(inputs.values())
    assert dispatch.select("lora_forward", args).backend == "addmm"
    assert dispatch.select("lora_forward", args, backend="cpu").backend == "addmm"
    with ops.use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' is forced .*cpu: K must be even"):
        dispatch.select("lora_forward", args)
