"""The CUDA C++ kernels on CPU tensors, in the emulator of cuda_emulator/: the error rule, edges, waiting, repeats."""

import functools
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from error_rule import (
    TOLERANCE,
    assert_error_rule,
    group_inputs,
    lora_inputs,
    multi_layer_inputs,
    multi_lora_inputs,
    poisoned_memory,
    random,
    unfused_ia3,
    unfused_multi_lora,
    unfused_multi_lora_linear,
)

from pyfastpeft import ops
from pyfastpeft.ops import cuda, dispatch, native, reference

if platform.machine() != "x86_64" or not shutil.which("g++") or not native.AVAILABLE:
    pytest.skip("the emulator is for x86-64 and built with g++", allow_module_level=True)

import emulated_cuda
import gpu_cases

SHORT = [torch.bfloat16, torch.float16]
ADAPTERS = [
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with emulated_cuda.loaded(), ops.use_backend("cuda"):
        yield


def test_the_emulator_tells_faults(tmp_path):
    faults = emulated_cuda.EMULATOR / "faults/faults.cpp"
    program, fibers = tmp_path / "faults", emulated_cuda.EMULATOR / "fibers.cpp"
    emulated_cuda.run(["g++", "-std=c++20", f"-I{emulated_cuda.EMULATOR}", faults, fibers, "-o", program])
    environment = os.environ | {"PYFASTPEFT_EMULATED_SMS": "3"}
    said = subprocess.run([program], capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    waiting = "the threads of a kernel wait for each other: "
    assert said[0].startswith(f"{waiting}thread (0, 0, 0) of block (0, 0, 0) (spins)")
    assert said[1].endswith("is not in the mask of its own warp operation")
    assert said[2].startswith(waiting)
    assert said[3].startswith(waiting)
    assert said[4].endswith(" moves 16 bytes at an address that is no multiple of them")
    assert said[5:] == ["ended"]


@pytest.mark.parametrize(("capability", "limit"), [(8, 101_376), (9, 232_448)])
def test_a_block_may_have_so_much_shared_memory(monkeypatch, capability, limit):
    emulated, like = torch.ops.pyfastpeft_emulated, torch.empty(0)
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", str(capability))
    assert emulated.shared_limit(like) == limit
    emulated.launch_with(like, limit, limit)
    with pytest.raises(RuntimeError, match="shared memory: invalid argument"):
        emulated.launch_with(like, limit + 1, 0)
    with pytest.raises(RuntimeError, match="launch: invalid argument"):  # nobody asked for it
        emulated.launch_with(like, 48 * 1024, 48 * 1024 + 1)


def test_a_launch_leaves_others_the_shared_memory_that_they_asked_for():
    torch.ops.pyfastpeft_emulated.launch_between(torch.empty(0), 64 * 1024, 96 * 1024)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
def test_the_largest_operands_fit_into_shared_memory(monkeypatch, adapter_dtype):
    """That of sm_86, than which none from sm_80 on has less. What a launch asks for follows from ranks and numbers of
    adapters."""
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", "8")
    dtypes, most = (torch.bfloat16, adapter_dtype), cuda.MAX_RANK
    for tokens in (64, 70):
        gpu_cases.lora(**lora_inputs(tokens, 8, 8, most, *dtypes)).sum().backward()
        layers = group_inputs(tokens, 8, [(8, most), (8, cuda.MAX_RANKS - most)], *dtypes)
        gpu_cases.group(**layers).sum().backward()
    for tokens, num_adapters in ((64, 64), (128, 128), (300, 2)):
        inputs = multi_layer_inputs(tokens, 8, 8, most, num_adapters, *dtypes)
        out = ops.multi_lora_linear(**inputs, slots=torch.arange(tokens) % num_adapters, scaling=0.5)
    out.sum().backward()


# --- counters ---


def counters_at(stream, capture=0):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYFASTPEFT_EMULATED_CAPTURE", str(capture))
        return torch.ops.pyfastpeft_emulated.counters_at(torch.empty(0), stream)


def test_launches_of_a_stream_share_counters_and_those_of_a_capture_have_others(monkeypatch):
    monkeypatch.setenv("PYFASTPEFT_EMULATED_DEVICE", "1")
    captures = [{counters_at(7, capture) for _ in range(224)} for capture in (5, 6)]
    others = [{counters_at(stream, capture) for _ in range(3)} for stream, capture in ((7, 0), (8, 0), (8, 5))]
    assert [len(found) for found in (*captures, *others)] == [1] * 5
    assert len(set().union(*captures, *others)) == 5
    assert 0 not in set().union(*captures, *others)


def test_where_no_counters_are_left_launches_bring_their_own(monkeypatch):
    inputs = {n: t.detach() for n, t in multi_lora_inputs(20, 40, 48, 8, 2, torch.bfloat16).items()}
    y, slots = inputs.pop("y"), torch.arange(20) % 3 - 1
    before = ops.multi_lora(y.clone(), **inputs, slots=slots, scaling=0.5)
    monkeypatch.setenv("PYFASTPEFT_EMULATED_DEVICE", "2")
    sets = [counters_at(7, capture) for capture in range(1, 20_000)]
    assert len(set(sets)) == sets.index(0) + 1 > 16_000  # each its own, until there are none
    assert counters_at(7, 1) == sets[0]
    assert counters_at(9) == 0
    for _ in range(3):
        assert torch.equal(ops.multi_lora(y.clone(), **inputs, slots=slots, scaling=0.5), before)


# --- what test_gpu.py asks of a GPU ---


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", gpu_cases.REPEATABLE)
def test_runs_are_bit_identical(name, adapter_dtype):
    gpu_cases.assert_repeatable(name, 72, 40, adapter_dtype, "cpu", runs=1)


@pytest.mark.parametrize(("tokens", "included"), [(64, False), (9, True), (64, True), (1064, True)])
def test_slots_may_change_between_replays(monkeypatch, tokens, included):
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPTURE", "1")
    gpu_cases.assert_serves_slots_that_change(tokens, included, "cpu", captured=lambda run: run)


# --- IA3 ---


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize(
    ("dtype", "l_dtype"),
    [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (70, 264, 40), (37, 24, 530)])
def test_ia3_linear(dtype, l_dtype, feedforward, shape):
    m, k, n = shape
    inputs = {
        "x": random(m, k, dtype=dtype),
        "weight": random(n, k, dtype=dtype, grad=False),
        "bias": random(n, dtype=dtype, grad=False),
        "ia3_l": random(k if feedforward else n, dtype=l_dtype or dtype),
    }
    ours, theirs = (functools.partial(f, feedforward=feedforward) for f in (ops.ia3_linear, unfused_ia3))
    assert_error_rule(ours, theirs, inputs)


@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("trains", ["x", "ia3_l"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ia3_one_gradient_alone_from_strided_rows(feedforward, trains, dtype):
    inputs = {
        "x": random(12, 40, dtype=dtype, grad=False)[:, 8:32],
        "weight": random(24, 16, dtype=dtype, grad=False).T,
        "ia3_l": random(24 if feedforward else 16, dtype=dtype, grad=False),
    }
    inputs[trains].requires_grad_()
    ours, theirs = (functools.partial(f, bias=None, feedforward=feedforward) for f in (ops.ia3_linear, unfused_ia3))
    assert_error_rule(ours, theirs, inputs)


# Few tokens go through the fused layer, more through the product for Hopper.
@pytest.mark.parametrize("rows", [12, 70])
@pytest.mark.parametrize("l_dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("biased", [False, True])
def test_ia3_scales_in_the_epilogue_of_the_product(rows, l_dtype, biased):
    """Where the unscaled output is not kept, no pass of its own scales it."""
    inputs = {
        "x": random(rows, 40, dtype=torch.float16),
        "weight": random(24, 40, dtype=torch.float16, grad=False),
        "ia3_l": random(24, dtype=l_dtype, grad=False),
    }
    fixed = {"feedforward": False}
    if biased:
        inputs["bias"] = random(24, dtype=torch.float16, grad=False)
    else:
        fixed["bias"] = None
    ours, theirs = (functools.partial(f, **fixed) for f in (ops.ia3_linear, unfused_ia3))
    assert_error_rule(ours, theirs, inputs)


@pytest.mark.parametrize("rows", [64, 70])
@pytest.mark.parametrize("dtype", SHORT)
def test_ia3_scales_the_sum_with_the_bias_before_it_is_rounded(rows, dtype):
    """Where the bias nearly cancels the product, one that is rounded on its way would show."""
    x = (20 * torch.randn(64) + 0.05 * torch.randn(rows, 64)).to(dtype).requires_grad_()
    weight = (torch.randn(48, 64) / 8).to(dtype)
    inputs = {"x": x, "weight": weight, "bias": -(x.detach() @ weight.T).double().mean(0).to(dtype)}
    inputs["ia3_l"] = 1 + torch.rand(48)
    ours, theirs = (functools.partial(f, feedforward=False) for f in (ops.ia3_linear, unfused_ia3))
    assert_error_rule(ours, theirs, inputs)


# --- few tiles ---


@pytest.mark.parametrize("op", ["lora_linear", "multi_lora_linear", "ia3_linear"])
def test_too_few_tiles_for_the_multiprocessors_go_to_torch(monkeypatch, op):
    """The product of gemm.h rounds once, others twice or more: so their bits differ."""
    x, weight, bias, lora_A, lora_B, ia3_l = (
        random(*shape, dtype=torch.bfloat16, grad=False)
        for shape in [(300, 64), (48, 64), (48,), (8, 64), (48, 8), (48,)]
    )

    def passes(multiprocessors, capability):
        monkeypatch.setenv("PYFASTPEFT_EMULATED_SMS", str(multiprocessors))
        monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", str(capability))
        leaf = x.clone().requires_grad_()
        if op == "ia3_linear":
            y = ops.ia3_linear(leaf, weight, bias, ia3_l, False)
        elif op == "lora_linear":
            y = ops.lora_linear(leaf, weight, bias, lora_A, lora_B, 0.7)
        else:
            slots = routed(torch.zeros(300, dtype=torch.int64), 1)
            y = ops.multi_lora_linear(leaf, weight, bias, lora_A[None], lora_B[None], slots, 0.7)
        return [y, *(torch.autograd.grad(y.float().square().sum(), leaf) if op != "ia3_linear" else ())]

    without = passes(132, 8)
    for few, many, other in zip(passes(132, 9), passes(3, 9), without):
        assert torch.equal(few, other)
        assert not torch.equal(many, other)


# --- gradients whose rows are one and the same ---


@pytest.mark.parametrize("op", ["lora_linear", "multi_lora_linear", "ia3_linear"])
def test_the_gradient_of_a_sum_over_rows_has_one_row(op):
    """No tensor map describes it: the product of gemm.h is not asked."""
    factors = random(8, 24, dtype=torch.bfloat16), random(40, 8, dtype=torch.bfloat16)
    inputs = [random(150, 24, dtype=torch.bfloat16), random(40, 24, dtype=torch.bfloat16, grad=False), None, *factors]
    options = [0.7]
    if op == "multi_lora_linear":
        inputs[3:] = [factor.detach()[None].requires_grad_() for factor in factors]
        options = [routed(torch.zeros(150, dtype=torch.int64), 1), 0.7]
    elif op == "ia3_linear":
        inputs[3:], options = [random(40, dtype=torch.bfloat16)], [False]

    def gradients():
        leaves = [tensor for tensor in inputs if tensor is not None and tensor.requires_grad]
        return torch.autograd.grad(getattr(ops, op)(*inputs, *options).sum(0).float().square().sum(), leaves)

    with ops.use_backend("reference"):
        expected = gradients()
    for mine, theirs in zip(gradients(), expected):
        assert (mine - theirs).norm() <= 2e-2 * theirs.norm()


# --- compiled graphs ---


@pytest.mark.parametrize("askew", [False, True])
def test_compiles_as_one_graph_with_the_same_results(askew):
    """Also where a graph's arguments do not begin at multiples of 16 bytes, which it cannot see when it is made."""
    slots = torch.tensor([0, 1, -1, 1, 0, 0, 1, -1, 0])

    def model(x, weight, bias, lora_A, lora_B, ia3_l, many_A, many_B):
        h = ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7).relu()
        layers = [weight, 2 * weight], [bias, None], [lora_A, 2 * lora_A], [lora_B, 2 * lora_B]
        gate, up = ops.lora_linear_group(h, *layers, [0.7, -1.3])
        h = ops.ia3_linear(h + gate.sigmoid() * up, weight, bias, ia3_l, False)
        y = ops.multi_lora_linear(h, weight, bias, many_A, many_B, slots, 0.5)
        y = ops.multi_lora(y, h, many_A, many_B, ops.route(slots, 2), 0.5)
        return ops.lora_delta_(y, h, lora_A, lora_B, 0.3)

    shapes = (9, 16), (16, 16), (16,), (8, 16), (16, 8), (16,), (2, 8, 16), (2, 16, 8)
    inputs = [random(*shape, dtype=torch.bfloat16, grad=False) for shape in shapes]

    def run(function, gap=0):
        leaves = [torch.cat([t.new_zeros(gap), t.flatten()])[gap:].view(t.shape).requires_grad_() for t in inputs]
        out = function(*leaves)
        return out, *torch.autograd.grad(out.float().square().sum(), leaves)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(compiled, int(askew)), run(model))


# --- multi-LoRA ---


def routed(slots, num_adapters):
    return ops.route(slots.tolist(), num_adapters)


def assert_multi_lora(inputs, slots, scaling, ranks=None, hidden=None):
    """`hidden` holds adapters whose rank rows beyond the true ones are NaN."""
    routing = routed(slots, len(inputs["lora_A"]))

    def fused(y, x, lora_A, lora_B):
        if hidden:
            lora_A = torch.where(torch.isnan(hidden["lora_A"]), hidden["lora_A"], lora_A)
            lora_B = torch.where(torch.isnan(hidden["lora_B"]), hidden["lora_B"], lora_B)
        return ops.multi_lora(y.clone(), x, lora_A, lora_B, routing, scaling, ranks)

    assert_error_rule(fused, functools.partial(unfused_multi_lora, slots=slots, scaling=scaling, ranks=ranks), inputs)


@pytest.mark.parametrize(("dtype", "adapter_dtype"), ADAPTERS)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1, 1, 1), (9, 33, 20, 5, 3), (40, 1096, 264, 16, 7), (20, 72, 300, 72, 2), (150, 96, 130, 8, 3)],
)
def test_multi_lora(dtype, adapter_dtype, shape):
    slots = torch.randint(-1, shape[-1], (shape[0],))
    assert_multi_lora(multi_lora_inputs(*shape, dtype, adapter_dtype), slots, torch.randn(shape[-1]))


# Few tokens go through one kernel, if all sides are multiples of 8, or float32 ranks of 4.
@pytest.mark.parametrize(("dtype", "adapter_dtype"), ADAPTERS)
@pytest.mark.parametrize("shape", [(9, 33, 20, 5, 3), (37, 136, 72, 8, 4), (70, 72, 136, 24, 3), (150, 96, 130, 8, 3)])
def test_multi_lora_linear(dtype, adapter_dtype, shape):
    slots, ranks = torch.randint(-1, shape[-1], (shape[0],)), torch.randint(0, shape[3] + 1, shape[-1:])
    options = {"slots": routed(slots, shape[-1]), "scaling": torch.randn(shape[-1]), "ranks": ranks}
    assert_error_rule(
        functools.partial(ops.multi_lora_linear, **options),
        functools.partial(unfused_multi_lora_linear, **options | {"slots": slots}),
        multi_layer_inputs(*shape, dtype, adapter_dtype),
    )


def in_blocks(*blocks):
    """Slots of blocks of 256 tokens, of one adapter or as given, the last one cut to 88."""
    return torch.cat([torch.full((256,), b) if isinstance(b, int) else b for b in blocks])[:-168]


def but(adapter, others):
    """One adapter in a block, but for some tokens."""
    slots = torch.full((256,), adapter)
    slots[:: 256 // len(others)] = torch.tensor(others)
    return slots


# The base layer's product takes along the branch of blocks of 256 tokens of one adapter.
BLOCKS = {
    "whole": in_blocks(2, 0, 0),
    "some": in_blocks(but(1, [-1]), -1, 2),
    "mixed": in_blocks(torch.arange(256) % 4 - 1, 1, but(0, [2, 1])),
    "none": in_blocks(-1, -1, -1),
}


@pytest.mark.parametrize(("dtype", "adapter_dtype"), ADAPTERS)
@pytest.mark.parametrize("ranked", [False, True])
@pytest.mark.parametrize("blocks", BLOCKS)
def test_multi_lora_linear_of_many_tokens(blocks, ranked, dtype, adapter_dtype):
    slots, rank = BLOCKS[blocks], 16 if dtype == torch.bfloat16 else 12
    ranks = torch.tensor([5, 0, rank, rank]) if ranked else None
    inputs = multi_layer_inputs(len(slots), 72, 40, rank, 4, dtype, adapter_dtype)
    with torch.no_grad():
        for a in range(4):
            unused = 0 if a == 3 else ranks[a] if ranked else rank
            inputs["lora_A"][a, unused:] = torch.nan
            inputs["lora_B"][a, :, unused:] = torch.nan
    options = {"slots": routed(slots, 4), "scaling": torch.randn(4), "ranks": ranks}
    assert_error_rule(
        functools.partial(ops.multi_lora_linear, **options),
        functools.partial(unfused_multi_lora_linear, **options | {"slots": slots}),
        inputs,
    )


@pytest.mark.parametrize(
    "slots", [torch.arange(20) % 4 - 1, torch.arange(100) % 4 - 1, in_blocks(0, but(0, [-1, 1]), 2)]
)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_bad_adapter_reaches_its_own_tokens_alone(slots, value):
    inputs = {n: t.detach() for n, t in multi_layer_inputs(len(slots), 64, 40, 8, 3, torch.bfloat16).items()}
    for bad in ("lora_A", "lora_B"):
        changed = inputs | {bad: inputs[bad].clone()}
        changed[bad][0, 0, 0] = value
        y = ops.multi_lora_linear(**changed, slots=routed(slots, 3), scaling=0.5)
        reached = ~torch.isfinite(y)
        assert reached[slots == 0, 0].all()
        assert not reached[slots != 0].any()


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(45, 64, 80, 16, 30), (300, 136, 72, 40, 4)])
def test_multi_lora_true_ranks_and_idle_adapters(shape, adapter_dtype):
    t, _, _, r, num_adapters = shape
    ranks = torch.randint(0, r + 1, (num_adapters,))
    ranks[0] = 0
    used = torch.randint(0, num_adapters, (3,))
    used[0] = 0
    slots = torch.cat([used, torch.tensor([-1])])[torch.randint(0, 4, (t,))]
    inputs = multi_lora_inputs(*shape, torch.bfloat16, adapter_dtype)
    beyond = torch.arange(r) >= ranks[:, None]
    nan = torch.tensor(torch.nan, dtype=adapter_dtype)
    hidden = {
        "lora_A": torch.where(beyond[:, :, None], nan, inputs["lora_A"].detach()),
        "lora_B": torch.where(beyond[:, None, :], nan, inputs["lora_B"].detach()),
    }
    assert_multi_lora(inputs, slots, torch.randn(num_adapters), ranks, hidden)


@pytest.mark.parametrize("included", [False, True])
@pytest.mark.parametrize("tokens", [20, 300])
def test_ranks_out_of_range_are_held_within_it(tokens, included):
    """On a device nobody looks at their values. Nothing is written beside s, which lies between other rows."""
    inputs = multi_layer_inputs(tokens, 64, 40, 8, 3, torch.bfloat16)
    x, weight, lora_A, lora_B, _ = (tensor.detach() for tensor in inputs.values())
    weight, dy = weight if included else None, random(tokens, 40, dtype=torch.bfloat16, grad=False)
    slots = torch.arange(tokens) % 4 - 1
    slots[: (tokens // 256) * 256] = 2  # a block of one adapter

    def run(*ranks):
        around, y = torch.full((tokens + 2, 8), -7.0), torch.zeros_like(dy)
        s, gradients = around[1:-1], [torch.empty_like(tensor) for tensor in (x, lora_A, lora_B)]
        branch = lora_A, lora_B, torch.tensor([0.5, 2.0, -1.0]), torch.tensor(ranks), *routed(slots, 3)
        dispatch.run("multi_lora_forward", x, weight, None, *branch, y, s)
        dispatch.run("multi_lora_backward", dy, x, weight, *branch, s, *gradients)
        assert (around[[0, -1]] == -7).all()
        return y, s, *gradients

    assert all(map(torch.equal, run(-5, 2**40, 9), run(0, 8, 8)))


def test_decode_among_many_idle_adapters():
    inputs = {n: t.detach() for n, t in multi_lora_inputs(20, 24, 40, 4, 600, torch.bfloat16).items()}
    slots = torch.tensor([0, 599, 300, 255, 256])[torch.randint(0, 5, (20,))]
    assert_multi_lora(inputs | {"y": inputs["y"].requires_grad_()}, slots, torch.randn(600))


def in_margins(tensor, fill=torch.nan):
    """The tensor, as rows in a larger one that holds `fill` elsewhere, and the larger one."""
    rows, columns = tensor.shape
    larger = torch.full((rows + 2, columns + 16), fill, dtype=tensor.dtype)
    inside = larger[1:-1, 8:-8]
    return inside.copy_(tensor), larger


@pytest.mark.parametrize("tokens", [20, 200])
@pytest.mark.parametrize("columns", [72, 75])
def test_nothing_is_read_or_written_beside_the_rows(tokens, columns):
    inputs = {n: t.detach() for n, t in multi_lora_inputs(tokens, columns, columns, 8, 3, torch.bfloat16).items()}
    slots = torch.randint(-1, 3, (tokens,))
    routing = routed(slots, 3)
    x, _ = in_margins(inputs["x"])
    y, around = in_margins(inputs["y"])
    before = around.clone()
    ops.multi_lora(y, x, inputs["lora_A"], inputs["lora_B"], routing, 0.5)
    expected = ops.multi_lora(inputs["y"].clone(), inputs["x"], inputs["lora_A"], inputs["lora_B"], routing, 0.5)
    assert torch.equal(y, expected)
    y.copy_(inputs["y"])
    assert torch.equal(around.view(torch.int16), before.view(torch.int16))


def test_decode_is_the_same_whatever_the_order_of_blocks(monkeypatch):
    inputs = {n: t.detach() for n, t in multi_lora_inputs(24, 1100, 520, 20, 6, torch.float16).items()}
    slots = torch.randint(-1, 6, (24,))

    def run(chosen=slice(None)):
        y, x = inputs["y"][chosen].clone(), inputs["x"][chosen]
        return ops.multi_lora(y, x, inputs["lora_A"], inputs["lora_B"], routed(slots[chosen], 6), 0.7)

    first = run()
    for multiprocessors in (1, 2, 7, 1, 30):
        monkeypatch.setenv("PYFASTPEFT_EMULATED_SMS", str(multiprocessors))
        assert torch.equal(run(), first)
    # A token's result does not depend on the others of its batch.
    chosen = torch.tensor([17, 3, 8])
    assert torch.equal(run(chosen), first[chosen])


def test_tokens_of_unknown_adapters_are_left_alone():
    inputs = {n: t.detach() for n, t in multi_lora_inputs(30, 40, 48, 8, 2, torch.bfloat16).items()}
    slots = torch.randint(-1, 4, (30,))
    order, segments = torch.empty(30, dtype=torch.int64), torch.empty(3, dtype=torch.int64)
    reference.group_tokens(slots, order, segments)
    y = ops.multi_lora(inputs["y"].clone(), *list(inputs.values())[1:], ops.Routing(order, segments), 0.5)
    others = (slots < 0) | (slots >= 2)
    assert torch.equal(y[others], inputs["y"][others])
    known = torch.where(others, -1, slots)
    torch.testing.assert_close(
        y, ops.multi_lora(inputs["y"].clone(), *list(inputs.values())[1:], routed(known, 2), 0.5), rtol=0, atol=0
    )


@pytest.mark.parametrize("shape", [(1, 1), (300, 7), (700, 600)])
def test_group_tokens(shape):
    tokens, num_adapters = shape
    slots = torch.randint(-1, num_adapters + 1, (tokens,))
    ours, theirs = ((torch.full((tokens,), -7), torch.full((num_adapters + 1,), -7)) for _ in range(2))
    dispatch.run("group_tokens", slots, *ours)
    reference.group_tokens(slots, *theirs)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


# --- the fused layer ---


def fused_layer(inputs, scaling=1.0, slots=None, ranks=None, scalings=None, scales_bias=False):
    """(y, s) of csrc/ops/cuda/decode.h; fresh memory is NaN."""
    x, lora_A = inputs["x"], inputs["lora_A"]
    with poisoned_memory():
        y = x.new_empty(len(x), len(inputs["weight"]))
        s = None if lora_A is None else x.new_empty(len(x), lora_A.shape[-2], dtype=torch.float32)
        order, segments = (None, None) if slots is None else routed(slots, len(lora_A))
        took = torch.ops.pyfastpeft_emulated.fused_layer(
            x, inputs["weight"], inputs["bias"], inputs["scale"], scales_bias, lora_A, inputs["lora_B"], scaling,
            scalings, ranks, order, segments, y, s,
        )  # fmt: skip
    return (y, s) if took else None


def layer_inputs(t, k, n, r, dtype, adapter_dtype=None, lead=()):
    return {
        "x": random(t, k, dtype=dtype, grad=False),
        "weight": random(n, k, dtype=dtype, grad=False),
        "bias": random(n, dtype=dtype, grad=False),
        "scale": random(n, grad=False) * n**0.5,
        "lora_A": random(*lead, r, k, dtype=adapter_dtype or dtype, grad=False),
        "lora_B": random(*lead, n, r, dtype=adapter_dtype or dtype, grad=False),
    }


def exact_layer(inputs, scaling, slots=None, ranks=None, scalings=None):
    wide = {name: t if t is None else t.double() for name, t in inputs.items()}
    product = wide["x"] @ wide["weight"].T
    if slots is not None:
        branch = unfused_multi_lora(
            torch.zeros_like(product), wide["x"], wide["lora_A"], wide["lora_B"], slots, scaling * scalings, ranks
        )
        product += branch
    elif wide["lora_A"] is not None:
        product += scaling * wide["x"] @ wide["lora_A"].T @ wide["lora_B"].T
    if wide["scale"] is not None:
        product *= wide["scale"]
    return product if wide["bias"] is None else product + wide["bias"]


def assert_close(ours, exact):
    # Of roundings there is that of s and that of y, where torch has one more of every product.
    bound = 2 * TOLERANCE[ours.dtype] * torch.finfo(ours.dtype).eps * exact.norm()
    assert (ours.double() - exact).norm() <= bound


@pytest.mark.parametrize(("dtype", "adapter_dtype"), ADAPTERS)
@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (13, 1032, 136, 16), (32, 640, 72, 24), (64, 200, 264, 136)])
def test_fused_layer(dtype, adapter_dtype, shape):
    inputs = layer_inputs(*shape, dtype, adapter_dtype)
    y, s = fused_layer(inputs, 0.7)
    assert_close(y, exact_layer(inputs, 0.7))
    torch.testing.assert_close(s, (inputs["x"].double() @ inputs["lora_A"].double().T).float(), rtol=1e-4, atol=1e-4)
    inputs |= {"bias": None, "scale": None}
    assert_close(fused_layer(inputs, -1.3)[0], exact_layer(inputs, -1.3))


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 136, 72, 16, 3), (64, 1096, 264, 24, 9), (64, 1096, 64, 32, 64)])
def test_fused_layer_with_an_adapter_for_each_token(monkeypatch, adapter_dtype, shape):
    t, k, n, r, num_adapters = shape
    inputs = layer_inputs(t, k, n, r, torch.bfloat16, adapter_dtype, (num_adapters,))
    slots, ranks = torch.randint(-1, num_adapters, (t,)), torch.randint(0, r + 1, (num_adapters,))
    options = {"slots": slots, "ranks": ranks, "scalings": torch.randn(num_adapters)}
    for a in range(num_adapters):
        inputs["lora_A"][a, ranks[a] :] = torch.nan
        inputs["lora_B"][a, :, ranks[a] :] = torch.nan
    y, _ = fused_layer(inputs, 0.7, **options)
    assert_close(y, exact_layer(inputs, 0.7, **options))
    for multiprocessors in (1, 5):
        monkeypatch.setenv("PYFASTPEFT_EMULATED_SMS", str(multiprocessors))
        assert torch.equal(fused_layer(inputs, 0.7, **options)[0], y)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(35, 200, 136, 16, 1), (64, 136, 72, 256, 3), (64, 72, 136, 256, 64)])
def test_fused_layer_where_shared_memory_is_short(monkeypatch, adapter_dtype, shape):
    """With fewer columns and stages."""
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", "8")
    t, k, n, r, num_adapters = shape
    inputs = layer_inputs(t, k, n, r, torch.bfloat16, adapter_dtype, (num_adapters,))
    options = {"slots": torch.arange(t) % (num_adapters + 1) - 1, "scalings": torch.randn(num_adapters)}
    assert_close(fused_layer(inputs, 0.7, **options)[0], exact_layer(inputs, 0.7, **options))


def test_very_many_ranks_go_in_two_launches_where_shared_memory_is_short(monkeypatch):
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", "8")
    slots, scaling = torch.tensor([0, -1, 0]), torch.randn(1)
    assert_error_rule(
        functools.partial(ops.multi_lora_linear, slots=routed(slots, 1), scaling=scaling),
        functools.partial(unfused_multi_lora_linear, slots=slots, scaling=scaling),
        multi_layer_inputs(3, 16, 16, 1600, 1, torch.bfloat16),
    )


def test_fused_layer_of_the_base_alone():
    inputs = layer_inputs(40, 584, 264, 8, torch.bfloat16) | {"lora_A": None, "lora_B": None}
    y, _ = fused_layer(inputs)
    assert_close(y, exact_layer(inputs, 1.0))
    y, _ = fused_layer(inputs, scales_bias=True)
    unshifted = exact_layer(inputs | {"bias": None}, 1.0)
    assert_close(y, unshifted + inputs["bias"].double() * inputs["scale"].double())


def test_fused_layer_takes_float32_adapters_of_ranks_that_fill_16_bytes():
    inputs = layer_inputs(20, 72, 40, 12, torch.bfloat16, torch.float32)
    assert_close(fused_layer(inputs, 0.7)[0], exact_layer(inputs, 0.7))


def test_fused_layer_without_a_branch_for_any_token():
    inputs = layer_inputs(4, 64, 64, 8, torch.bfloat16, lead=(2,))
    slots = torch.full((4,), -1)
    y, _ = fused_layer(inputs, slots=slots, scalings=torch.ones(2))
    assert_close(y, exact_layer(inputs, 1.0, slots, scalings=torch.ones(2)))


@pytest.mark.parametrize("shape", [(65, 64, 64, 8), (4, 60, 64, 8), (4, 64, 60, 8), (4, 64, 64, 4)])
def test_fused_layer_declines_what_it_does_not_take(shape):
    assert fused_layer(layer_inputs(*shape, torch.bfloat16)) is None


@pytest.mark.slow
def test_threads_do_not_race():
    """No thread reads what another one writes but past a barrier, a warp operation or a counter that it acquires."""
    found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("there is no ThreadSanitizer here")
    environment = os.environ | {
        "LD_PRELOAD": os.path.realpath(found),
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1 exitcode=66",
        "PYFASTPEFT_EMULATOR_RACES": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    script = Path(__file__).with_name("emulated_races.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    assert done.stdout == "all ran\n"
