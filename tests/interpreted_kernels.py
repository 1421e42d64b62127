"""What the Triton kernels promise beyond test_ops*.py; run by test_triton_interpreter.py under TRITON_INTERPRET=1."""

import functools
import itertools
import math

import pytest
import torch
from error_rule import (
    DTYPES,
    MIXED,
    assert_error_rule,
    bottleneck_inputs,
    group_inputs,
    lora_inputs,
    multi_layer_inputs,
    multi_lora_inputs,
    random,
)
from op_cases import (
    assert_bottleneck,
    assert_dora,
    assert_multi_lora,
    assert_multi_lora_linear,
    dora_inputs,
    group,
    lora,
    plain_group,
    plain_lora,
    raw_arguments,
)

from benchmarks import measure, tune
from pyfastpeft import ops
from pyfastpeft.kernels import blocks
from pyfastpeft.kernels import lora as lora_kernels
from pyfastpeft.kernels import multi_lora as multi_lora_kernels
from pyfastpeft.kernels.multi_lora import SCAN
from pyfastpeft.ops import reference, schemas

dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES + MIXED)
triton_ops = torch.ops.pyfastpeft_triton


@pytest.fixture(autouse=True)
def _triton():
    with ops.use_backend("triton"):
        yield


# --- every block size, strides ---


@dtypes
def test_many_tokens_through_strided_tensors(dtype, adapter_dtype):
    """Several tiles each way, a rank of several blocks; x is a slice of columns, weight the transpose of a Conv1D's."""
    # K = 64, since torch's own bfloat16 linear on a CPU lets what lies between rows into its result at some others.
    inputs = lora_inputs(130, 64, 150, 33, dtype, adapter_dtype)
    inputs["x"] = random(130, 75, dtype=dtype)[:, 2:66].detach().requires_grad_()
    inputs["weight"] = random(64, 150, dtype=dtype, grad=False).T
    assert_error_rule(lora, plain_lora, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7, 5, 256), (17, 257, 31, 129), (255, 31, 33, 1)])
def test_odd_shapes(dtype, shape):
    assert_error_rule(lora, plain_lora, lora_inputs(*shape, dtype))


@dtypes
def test_many_tokens_through_a_wide_bottleneck(dtype, adapter_dtype):
    """Several tiles each way; ds is formed apart from dup."""
    inputs = bottleneck_inputs(70, 75, 140, 40, dtype, adapter_dtype)
    inputs["residual"] = random(140, 70, dtype=dtype).T.detach().requires_grad_()
    assert_bottleneck(inputs, activation="gelu_tanh")


@dtypes
def test_many_tokens_through_a_group(dtype, adapter_dtype):
    """s and ds are read by columns that begin at odd ranks."""
    assert_error_rule(group, plain_group, group_inputs(70, 64, [(140, 20), (50, 33), (33, 3)], dtype, adapter_dtype))


@dtypes
def test_many_tokens_through_dora(dtype, adapter_dtype):
    assert_dora(dora_inputs(70, 64, 140, 20, dtype, adapter_dtype))


@dtypes
def test_many_tokens_of_few_adapters(dtype, adapter_dtype):
    inputs = multi_lora_inputs(150, 70, 140, 33, 2, dtype, adapter_dtype)
    assert_multi_lora(inputs, torch.randint(-1, 2, (150,)), torch.tensor([0.7, -1.3]), torch.tensor([33, 18]))


def test_more_adapters_than_one_scan_of_the_segments():
    num_adapters = 2 * SCAN.value + 3
    slots = torch.tensor([num_adapters - 1, 0, -1, SCAN.value, 5, SCAN.value - 1, num_adapters - 1])
    assert_multi_lora(multi_lora_inputs(7, 20, 9, 2, num_adapters, torch.float32), slots, torch.randn(num_adapters))


def test_tokens_of_no_segment_are_left_alone():
    """Slots out of range, where nobody looks: order goes on after segments[L]."""
    x, many_A, many_B = random(6, 8, grad=False), random(2, 3, 8, grad=False), random(2, 5, 3, grad=False)
    order, segments = torch.tensor([4, 0, 2, 5, 1, 3]), torch.tensor([1, 3, 4])
    common = many_A, many_B, torch.tensor([0.5, 2.0]), None, order, segments
    dy = random(6, 5, grad=False)
    results = []
    for namespace in (triton_ops, reference):
        y, s, dx = torch.ones(6, 5), torch.zeros(6, 3), torch.full((6, 8), float("nan"))
        namespace.multi_lora_forward(x, None, None, *common, y, s)
        namespace.multi_lora_backward(dy, x, None, *common, s, dx, None, None)
        assert (y[[4, 1, 3]] == 1).all()
        assert not dx[[4, 1, 3]].any()
        results.append((y, dx))
    torch.testing.assert_close(*results)


def test_ranks_out_of_range_are_held_within_it(small_tiles):
    """On a device nobody looks at their values. Nothing is written beside s, which lies between other rows."""
    x, weight, dy = (random(*shape, grad=False) for shape in ((20, 24), (10, 24), (20, 10)))
    lora_A, lora_B = random(3, 8, 24, grad=False), random(3, 10, 8, grad=False)
    routing = ops.route(torch.arange(20) % 4 - 1, 3)

    def run(weight, *ranks):
        around, y = torch.full((22, 8), -7.0), torch.zeros(20, 10)
        s, gradients = around[1:-1], [torch.empty_like(tensor) for tensor in (x, lora_A, lora_B)]
        branch = lora_A, lora_B, torch.tensor([0.5, 2.0, -1.0]), torch.tensor(ranks), *routing
        triton_ops.multi_lora_forward(x, weight, None, *branch, y, s)
        triton_ops.multi_lora_backward(dy, x, weight, *branch, s, *gradients)
        assert (around[[0, -1]] == -7).all()
        return y, s, *gradients

    for base in (None, weight):
        assert all(map(torch.equal, run(base, -5, 2**40, 9), run(base, 0, 8, 8)))


def test_unused_ranks_get_zero_gradients_from_nan_too():
    inputs = multi_lora_inputs(4, 8, 5, 3, 1, torch.float32)
    with torch.no_grad():
        inputs["x"][1] = float("nan")
    slots, ranks = torch.zeros(4, dtype=torch.int64), torch.tensor([2])
    y = inputs.pop("y").detach()
    ops.multi_lora(y, **inputs, slots=slots, scaling=1.0, ranks=ranks).sum().backward()
    assert inputs["lora_A"].grad[0, :2].isnan().all()
    assert inputs["lora_B"].grad[0, :, :2].isnan().all()
    assert not inputs["lora_A"].grad[0, 2:].any()
    assert not inputs["lora_B"].grad[0, :, 2:].any()


@pytest.fixture
def small_tiles(monkeypatch):
    """A layer under many adapters goes in tiles of 16 positions, however few tokens an adapter has."""
    rows = [(blocks.ANY, blocks.entry(16, 16, 32, 4, 1))]
    monkeypatch.setitem(blocks.BLOCKS, "multi_linear", {kind: rows for kind in blocks.BLOCKS["multi_linear"]})


def without_factor_gradients(inputs):
    """They are formed by kernels that know no tiles."""
    return {name: t.detach().requires_grad_(name == "x") for name, t in inputs.items()}


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.bfloat16, None), (torch.float16, torch.float32)])
def test_tiles_that_several_adapters_meet_in(small_tiles, dtype, adapter_dtype):
    slots = torch.cat([torch.full((9,), 3), torch.randint(-1, 4, (21,))])
    inputs = without_factor_gradients(multi_layer_inputs(30, 40, 20, 20, 4, dtype, adapter_dtype))
    assert_multi_lora_linear(inputs, slots, torch.randn(4), torch.tensor([20, 0, 3, 17]))


def test_tiles_among_more_adapters_than_one_scan_of_the_segments(small_tiles):
    num_adapters = 2 * SCAN.value + 3
    slots = torch.tensor([num_adapters - 1, 0, -1, SCAN.value, 5, SCAN.value - 1, num_adapters - 1])
    inputs = without_factor_gradients(multi_layer_inputs(7, 20, 9, 2, num_adapters, torch.float32))
    assert_multi_lora_linear(inputs, slots, torch.randn(num_adapters))


def test_tiles_of_no_adapter_and_rows_that_lie_apart(small_tiles):
    inputs = without_factor_gradients(multi_layer_inputs(50, 40, 30, 3, 2, torch.float32))
    inputs |= {"x": random(50, 75)[:, 2:42].detach().requires_grad_(), "weight": random(40, 30, grad=False).T}
    assert_multi_lora_linear(inputs, torch.tensor([-1] * 40 + [1] * 10), torch.randn(2))
    assert_multi_lora_linear(inputs, torch.full((50,), -1), torch.randn(2))


def test_a_bad_adapter_in_a_tile_of_several_reaches_its_own_tokens_alone(small_tiles):
    inputs = {n: t.detach() for n, t in multi_layer_inputs(20, 24, 40, 4, 3, torch.float32).items()}
    inputs["lora_B"][1, 3] = float("inf")
    slots = torch.arange(20) % 4 - 1
    y = ops.multi_lora_linear(**inputs, slots=slots, scaling=0.5)
    assert torch.equal(~torch.isfinite(y), (slots == 1)[:, None] & (torch.arange(40) == 3))


# --- tensor descriptors ---


@pytest.fixture
def descriptors(monkeypatch):
    """Tensor descriptors are taken wherever they fit, by three programs in tiles that a test can fill. Counts the
    launches."""
    launches = []
    launch = lora_kernels.concat_linear_kernel.__getitem__

    class Kernel:
        def __getitem__(self, grid):
            launches.append(grid)
            return launch(grid)

    monkeypatch.setattr(lora_kernels, "concat_linear_kernel", Kernel())
    monkeypatch.setattr(lora_kernels, "tensor_descriptors", lambda: True)
    monkeypatch.setattr(lora_kernels, "processors", lambda device: 3)
    monkeypatch.setitem(blocks.BLOCKS, "concat_linear", {"half": [(blocks.ANY, blocks.entry(32, 16, 32, 4, 1))]})
    return launches


halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@halves
@pytest.mark.parametrize("shape", [(50, 72, 56, 5), (33, 32, 16, 16), (40, 40, 72, 40)])
def test_linear_by_tensor_descriptors(descriptors, dtype, shape):
    assert_error_rule(lora, plain_lora, lora_inputs(*shape, dtype))
    assert len(descriptors) == 2  # forward and dx


@halves
def test_linear_by_tensor_descriptors_of_strided_tensors(descriptors, dtype):
    """x is a slice of columns, weight the transpose of a Conv1D's."""
    inputs = lora_inputs(50, 64, 48, 8, dtype)
    inputs["x"] = random(50, 80, dtype=dtype)[:, 8:72].detach().requires_grad_()
    inputs["weight"] = random(64, 48, dtype=dtype, grad=False).T
    assert_error_rule(lora, plain_lora, inputs)
    assert len(descriptors) == 2


def test_linear_by_tensor_descriptors_of_a_part_of_s(descriptors):
    """s is a slice of columns, as in a group of layers that share x."""
    x, weight, lora_B = (random(*shape, dtype=torch.float16, grad=False) for shape in ((40, 32), (24, 32), (24, 5)))
    s, y = random(40, 12, grad=False)[:, 4:9], torch.full((40, 24), float("nan"), dtype=torch.float16)
    lora_kernels.linear(x, weight, None, s, lora_B, y, 0.7)
    exact = x.double() @ weight.double().T + 0.7 * s.double() @ lora_B.double().T
    assert (y - exact).norm() < 4e-4 * exact.norm()
    assert len(descriptors) == 1


def test_dora_by_tensor_descriptors(descriptors):
    assert_dora(dora_inputs(40, 64, 56, 20, torch.bfloat16))
    assert len(descriptors) == 2


@pytest.mark.parametrize("shape", [(40, 33, 56, 8), (40, 32, 55, 8)])
def test_what_tensor_descriptors_do_not_take_goes_by_pointers(descriptors, shape):
    assert_error_rule(lora, plain_lora, lora_inputs(*shape, torch.bfloat16))
    inputs = lora_inputs(40, 64, 48, 8, torch.bfloat16)
    inputs["x"] = random(40, 73, dtype=torch.bfloat16)[:, 1:65].detach()
    assert_error_rule(lora, plain_lora, inputs)
    assert_error_rule(lora, plain_lora, lora_inputs(40, 64, 48, 8, torch.bfloat16, torch.float32))
    assert not descriptors


# --- one launch ---


@pytest.fixture
def counters(monkeypatch):
    """One launch is taken, as where it was measured to be the faster one. Its counters, the same for every call."""
    monkeypatch.setitem(blocks.BLOCKS, "multi_lora", {"half": [(blocks.ANY, blocks.entry(16, 64, 128, 4, 4))]})
    zeros = torch.zeros(64, dtype=torch.int32)
    monkeypatch.setattr(multi_lora_kernels, "counters_on", lambda device, count: zeros if count <= 64 else None)
    return zeros


@halves
@pytest.mark.parametrize("shape", [(20, 40, 56, 40, 2), (9, 2100, 70, 17, 3), (1, 1, 1, 1, 1)])
def test_multi_lora_in_one_launch(monkeypatch, counters, dtype, shape):
    """What two launches give; counters are zero again, so that a second call does the same."""
    tokens, k, n, rank, num_adapters = shape
    x, lora_A, lora_B, y = (
        random(*size, dtype=dtype, grad=False)
        for size in ((tokens, k), (num_adapters, rank, k), (num_adapters, n, rank), (tokens, n))
    )
    ranks = torch.randint(0, rank + 1, (num_adapters,))
    slots = torch.randint(-1, num_adapters, (tokens,))
    slots[0], ranks[0] = 0, rank
    order, segments = ops.route(slots, num_adapters)
    arguments = lora_A, lora_B, torch.linspace(-1, 2, num_adapters), ranks, order, segments

    def run():
        out, s = y.clone(), torch.full((tokens, rank), float("nan"))
        multi_lora_kernels.multi_lora_forward(x, None, None, *arguments, out, s)
        used = (slots[:, None] >= 0) & (torch.arange(rank) < ranks[slots][:, None])
        return out, s[used]

    with monkeypatch.context() as patch:
        patch.setattr(multi_lora_kernels, "_together", lambda *_: False)
        two = run()
    monkeypatch.setattr(multi_lora_kernels, "_shrink", None)  # the first of two
    once, again = run(), run()
    assert not counters.any()
    torch.testing.assert_close(once, two, rtol=2e-3 if dtype == torch.float16 else 1e-2, atol=1e-2)
    assert all(map(torch.equal, once, again))


def test_one_launch_beside_the_base_layer(counters):
    inputs = multi_layer_inputs(20, 40, 56, 16, 3, torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multi_lora_kernels, "_expand", None)
        y = ops.multi_lora_linear(
            **{n: t.detach() for n, t in inputs.items()}, slots=torch.arange(20) % 4 - 1, scaling=0.5
        )
    assert torch.isfinite(y).all()
    assert_multi_lora_linear(inputs, torch.arange(20) % 4 - 1, torch.tensor([0.7, -1.3, 0.4]))


def test_counters_are_zeros():
    assert multi_lora_kernels.counters_on(torch.device("cpu"), 7).tolist() == [0] * 7


# --- dropout ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 123456789012345, -5])
@pytest.mark.parametrize("p", [2.0**-32, 0.3, 0.99])
def test_all_three_uses_of_the_mask_drop_what_the_reference_drops(dtype, seed, p):
    m, k = 21, 150
    seed, wide = torch.tensor([seed]), reference.accumulation(dtype)
    factor = reference.dropout_factor(seed, p, m, k, wide)
    x, ones = torch.ones(m, k, dtype=dtype), torch.ones(1, k, dtype=dtype)
    s = torch.empty(m, k, dtype=wide)
    y = torch.zeros(m, 1, dtype=dtype)
    triton_ops.lora_forward(
        x, None, None, torch.eye(k, dtype=dtype), torch.zeros(1, k, dtype=dtype), 1.0, p, seed, y, s
    )
    torch.testing.assert_close(s, factor)
    dx = torch.empty(m, k, dtype=dtype)
    one = torch.ones(1, 1, dtype=dtype)
    triton_ops.lora_backward(y + 1, None, None, ones, one, 1.0, p, seed, None, dx, None, None)
    torch.testing.assert_close(dx, factor.to(dtype))
    dlora_A, eye = torch.empty(m, k, dtype=dtype), torch.eye(m, dtype=dtype)
    triton_ops.lora_backward(eye, x, None, dlora_A, eye, 1.0, p, seed, None, None, dlora_A, None)
    torch.testing.assert_close(dlora_A, factor.to(dtype))


# --- gradients ---


def test_gradcheck():
    double = functools.partial(random, dtype=torch.float64)
    check = functools.partial(torch.autograd.gradcheck, fast_mode=True)
    x, weight, bias, lora_A, lora_B = double(2, 3, 5), double(4, 5), double(4), double(2, 5), double(4, 2)

    def dropped(*args):
        torch.manual_seed(7)
        return ops.lora_linear(*args, 0.7, 0.4)

    assert check(dropped, (x, weight, bias, lora_A, lora_B))
    y = double(2, 3, 4)
    assert check(lambda y, *a: ops.lora_delta_(y.clone(), *a, 0.7), (y, x, lora_A, lora_B))
    for feedforward in (False, True):
        ia3 = functools.partial(ops.ia3_linear, feedforward=feedforward)
        assert check(ia3, (x, weight, bias, double(5 if feedforward else 4)))
    for activation in reference.ACTIVATIONS:
        branch = lora_A, double(2), lora_B, double(4), double(1)
        assert check(functools.partial(ops.bottleneck, activation=activation), (x, y, *branch))
    routing = torch.tensor([1, -1, 0, 2, 2, 0]), torch.tensor([0.5, -1.0, 2.0]), torch.tensor([2, 1, 2])
    multi = lambda y, *a: ops.multi_lora(y.clone(), *a, *routing)  # noqa: E731
    assert check(multi, (y, x, double(3, 2, 5), double(3, 4, 2)))


@pytest.mark.parametrize("rank", [3, 40])
@pytest.mark.parametrize("op", [name for name in schemas.SCHEMAS if name.endswith("_backward")])
def test_every_choice_of_gradients(op, rank):
    """Gradients asked for together or alone are the same, whichever way the launcher takes to them."""
    m, k, n = 20, 30, 25
    dy, x, weight, s = (random(*shape, grad=False) for shape in ((m, n), (m, k), (n, k), (m, rank)))
    lora_A, lora_B = random(2, rank, k, grad=False), random(2, n, rank, grad=False)
    arguments, shapes = {
        "lora_backward": ((dy, x, weight, lora_A[0], lora_B[0], 0.7, 0.0, None, s), [(m, k), (rank, k), (n, rank)]),
        "dora_backward": (
            (dy, x, weight, lora_A[0], lora_B[0], random(n, grad=False), 0.7, 0.0, None, s, random(m, n, grad=False)),
            [(m, k), (rank, k), (n, rank), (n,)],
        ),
        "bottleneck_backward": (
            (dy, x, lora_A[0], random(rank, grad=False), lora_B[0], 0.7, "gelu", s, False),
            [(m, k), (rank, k), (rank,), (n, rank)],
        ),
        "multi_lora_backward": (
            (
                dy,
                x,
                weight,
                lora_A,
                lora_B,
                torch.tensor([0.7, 2.0]),
                None,
                torch.arange(m),
                torch.tensor([2, 9, m]),
                s,
            ),
            [(m, k), (2, rank, k), (2, n, rank)],
        ),
        "lora_group_backward": (
            (
                *([dy, dy[:, 3:]], x, [weight, weight[3:]], lora_A.flatten(0, 1), [lora_B[0], lora_B[1, 3:]]),
                *([0.7, 2.0], 0.0, None, torch.cat([s, -s], 1)),
            ),
            [(m, k), (2 * rank, k), [(n, rank), (n - 3, rank)]],
        ),
        "ia3_backward": ((dy, x, weight, random(k, grad=False), True, None), [(m, k), (k,)]),
    }[op]
    expected = [poisoned(shape) for shape in shapes]
    getattr(reference, op)(*arguments, *expected)
    for wanted in itertools.product([False, True], repeat=len(shapes)):
        nothing = ([] if isinstance(shape, list) else None for shape in shapes)
        outputs = [poisoned(shape) if want else none for shape, want, none in zip(shapes, wanted, nothing)]
        getattr(triton_ops, op)(*arguments, *outputs)
        for output, exact in zip(outputs, expected):
            if output is not None and output != []:
                torch.testing.assert_close(output, exact)


def poisoned(shape):
    return [poisoned(one) for one in shape] if isinstance(shape, list) else torch.full(shape, float("nan"))


def test_two_runs_are_bit_identical_where_sums_are_split():
    def run():
        inputs = lora_inputs(200, 900, 40, 8, torch.float32)
        out = lora(**inputs) + ops.ia3_linear(inputs["x"], inputs["weight"], inputs["bias"], ia3_l := random(40), False)
        out.square().sum().backward()
        return [out, *(t.grad for t in (*inputs.values(), ia3_l) if t.requires_grad)]

    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(run())
    assert all(torch.equal(one, other) for one, other in zip(*runs))


# --- tuning ---


def test_candidates_are_timed_when_they_are_right(capsys):
    """tune's own timing on the interpreter: an entry that cannot run is left out."""
    good, bad = blocks.entry(16, 16, 16, 4, 1), blocks.entry(16, 17, 16, 4, 1)
    table = {}

    def use(entry):
        table["linear"] = {"single": [[None, None, entry]]}

    with tune.chosen(table):
        case = tune.case_of("linear", 5, 32, "fp32", mode="")
        seconds = tune.median_seconds(case, "fp32", "linear", [bad, good], use, "cpu", measure.EFFORT["tiny"])
    assert seconds[0] == math.inf
    assert 0 < seconds[1] < math.inf
    assert "'BLOCK_N': 17" in capsys.readouterr().err


# --- registration ---


@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_opcheck(op):
    torch.library.opcheck(getattr(triton_ops, op).default, raw_arguments()[op])


def test_compiles_as_one_graph():
    inputs = lora_inputs(3, 8, 6, 2, torch.float32)
    expected = lora(**inputs)
    torch.testing.assert_close(torch.compile(lora, fullgraph=True, backend="aot_eager")(**inputs), expected)
