"""The kernels on a GPU, run by `make gpu`: the error rule for every op and dtype, dropout, strides, routing, graphs."""

import functools

import error_rule
import gpu_cases
import pytest
import torch
from error_rule import (
    DTYPES,
    MIXED,
    bottleneck_inputs,
    group_inputs,
    grouped,
    lora_inputs,
    multi_layer_inputs,
    multi_lora_inputs,
    random,
    unfused_bottleneck,
    unfused_delta,
    unfused_dora,
    unfused_group,
    unfused_ia3,
    unfused_lora,
    unfused_multi_lora,
    unfused_multi_lora_linear,
)
from gpu_cases import REPEATABLE, assert_serves_slots_that_change, in_blocks, lora

from pyfastpeft import ops
from pyfastpeft.ops import addmm, dispatch, reference

if not torch.cuda.is_available():
    pytest.skip("torch sees no GPU here", allow_module_level=True)

pytestmark = pytest.mark.gpu
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES + MIXED)
gpu_random = functools.partial(random, device="cuda")
gpu_lora_inputs = functools.partial(lora_inputs, device="cuda")
gpu_multi_lora_inputs = functools.partial(multi_lora_inputs, device="cuda")

BACKENDS = [
    name for name in ("triton", "cuda", "addmm") if any(row.backend == name for row in dispatch.TABLE["lora_forward"])
]
ALIGNED = (64, 256, 136, 8)  # M K N r that every CUDA kernel takes, base product included
WIDE = 2312  # features whose tiles, of 1064 tokens, are enough for the product of gemm.h on 132 multiprocessors


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with ops.use_backend(request.param):
        yield request.param


def skips_what_is_not_served(check):
    """Skips what the forced backend does not take; test_aligned_operands_are_served holds it to what it has to."""

    @functools.wraps(check)
    def run(*arguments, **options):
        try:
            check(*arguments, **options)
        except RuntimeError as error:
            if "is forced but does not serve" not in str(error):
                raise
            pytest.skip(str(error))

    return run


assert_error_rule = skips_what_is_not_served(error_rule.assert_error_rule)
assert_repeatable = skips_what_is_not_served(gpu_cases.assert_repeatable)


def test_compiles_as_one_graph_with_the_same_results():
    """First, since it takes longest."""
    inputs = gpu_lora_inputs(33, 64, 48, 8, torch.bfloat16)

    def run(function):
        out = function(**inputs)
        return out, *torch.autograd.grad(out.square().sum(), [t for t in inputs.values() if t.requires_grad])

    torch.compiler.reset()
    torch.testing.assert_close(run(torch.compile(lora, fullgraph=True)), run(lora))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aligned_operands_are_served(backend, dtype):
    m, k, n, r = ALIGNED
    lora(**gpu_lora_inputs(*ALIGNED, dtype, torch.float32)).sum().backward()
    slots = torch.randint(-1, 4, (m,), device="cuda")
    inputs = gpu_multi_lora_inputs(m, k, n, r, 4, dtype)
    ops.multi_lora(inputs.pop("y").clone(), **inputs, slots=slots, scaling=0.5).sum().backward()
    for adapter_dtype in (dtype, torch.float32):
        inputs = multi_layer_inputs(*ALIGNED, 4, dtype, adapter_dtype, device="cuda")
        ops.multi_lora_linear(**inputs, slots=slots, scaling=0.5).sum().backward()
    layers = group_inputs(m, k, [(n, r), (n, r)], dtype, torch.float32, device="cuda")
    grouped(functools.partial(ops.lora_linear_group, scalings=[0.5, 2.0]), **layers).sum().backward()
    if backend != "addmm":
        x, weight, ia3_l = (gpu_random(*shape, dtype=dtype) for shape in ((m, k), (n, k), (n,)))
        ops.ia3_linear(x, weight.detach(), None, ia3_l, False).sum().backward()


def plain_lora(x, weight, bias, lora_A, lora_B):
    return unfused_lora(x, weight, bias, lora_A, lora_B, 0.7)


@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 255, 129, 5), ALIGNED, (300, 1000, 512, 64), (1, 64, 48, 200)])
def test_lora_linear(dtype, adapter_dtype, shape):
    assert_error_rule(lora, plain_lora, gpu_lora_inputs(*shape, dtype, adapter_dtype))


@dtypes
@pytest.mark.parametrize("shape", [(1, 33, [(17, 1), (9, 3)]), (300, 513, [(512, 16), (130, 5), (96, 64)])])
def test_lora_linear_group(dtype, adapter_dtype, shape):
    ours, theirs = (
        functools.partial(grouped, functools.partial(f, scalings=[0.7, -1.3, 0.4][: len(shape[2])]))
        for f in (ops.lora_linear_group, unfused_group)
    )
    assert_error_rule(ours, theirs, group_inputs(*shape, dtype, adapter_dtype, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shape", [(1030, 520, 2568, 5), (2048, 1024, 1032, 64), (1500, 72, 2056, 256), (2048, 2056, 264, 16)]
)
def test_lora_linear_of_many_tokens(dtype, shape):
    """By tensor descriptors, where the GPU has them; the last tile of every side is a partial one."""
    assert_error_rule(lora, plain_lora, gpu_lora_inputs(*shape, dtype))


@pytest.mark.parametrize("count", [3, 4])
def test_lora_linear_group_of_many_tokens(count):
    """The gradient of x comes from one accumulator, where a kernel has one for so many layers."""
    ours, theirs = (
        functools.partial(grouped, functools.partial(f, scalings=[0.7, -1.3, 0.4, 1.5][:count]))
        for f in (ops.lora_linear_group, unfused_group)
    )
    layers = [(264, 16), (136, 5), (72, 64), (200, 8)][:count]
    assert_error_rule(ours, theirs, group_inputs(2048, 2056, layers, torch.bfloat16, torch.float32, device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_linear_takes_transposed_tensors(dtype):
    inputs = gpu_lora_inputs(70, 130, 60, 8, dtype)
    inputs["x"] = gpu_random(130, 70, dtype=dtype).T.detach().requires_grad_()
    inputs["weight"] = gpu_random(130, 60, dtype=dtype, grad=False).T
    assert_error_rule(lora, plain_lora, inputs)


@dtypes
def test_lora_delta(dtype, adapter_dtype):
    inputs = gpu_lora_inputs(45, 300, 129, 7, dtype, adapter_dtype) | {"y": gpu_random(45, 129, dtype=dtype)}
    del inputs["weight"], inputs["bias"]
    assert_error_rule(
        lambda y, x, lora_A, lora_B: ops.lora_delta_(y.clone(), x, lora_A, lora_B, -1.3),
        lambda y, x, lora_A, lora_B: (y + unfused_delta(x, lora_A, lora_B, -1.3)).to(y.dtype),
        inputs,
    )


@dtypes
def test_dropout_is_the_references(dtype, adapter_dtype):
    def fused(x, weight, bias, lora_A, lora_B):
        torch.manual_seed(9)
        return ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7, 0.25)

    def unfused(x, weight, bias, lora_A, lora_B):
        torch.manual_seed(9)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device="cuda")
        dropped = x.to(lora_A.dtype) * reference.dropout_factor(seed, 0.25, *x.shape, lora_A.dtype)
        base = torch.nn.functional.linear(x, weight, bias)
        return (base + unfused_delta(dropped, lora_A, lora_B, 0.7)).to(base.dtype)

    assert_error_rule(fused, unfused, gpu_lora_inputs(37, 264, 136, 4, dtype, adapter_dtype))


@dtypes
@pytest.mark.parametrize("activation", sorted(reference.ACTIVATIONS))
@pytest.mark.parametrize("shape", [(5, 24, 17, 8), (300, 513, None, 64)])
def test_bottleneck(backend, dtype, adapter_dtype, activation, shape):
    def run(function, x, down, down_bias, up, up_bias, residual=None):
        return function(x, x if residual is None else residual, down, down_bias, up, up_bias, 0.7, activation)

    inputs = bottleneck_inputs(*shape, dtype, adapter_dtype, device="cuda")
    ours, theirs = (functools.partial(run, f) for f in (ops.bottleneck, unfused_bottleneck))
    assert_error_rule(ours, theirs, inputs, roundings=2 if backend == "addmm" else 1)  # which rounds s, too


@dtypes
@pytest.mark.parametrize("shape", [(3, 255, 129, 5), (300, 1000, 512, 64)])
def test_dora_linear(dtype, adapter_dtype, shape):
    inputs = gpu_lora_inputs(*shape, dtype, adapter_dtype)
    inputs["magnitude"] = gpu_random(shape[2], dtype=adapter_dtype or dtype)
    ours, theirs = (functools.partial(f, scaling=0.7) for f in (ops.dora_linear, unfused_dora))
    assert_error_rule(ours, theirs, inputs, through={"magnitude": dtype}, roundings=2)  # the scale meets B, not dy


@dtypes
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (300, 513, 130), (300, 512, 136)])
def test_ia3_linear(dtype, adapter_dtype, feedforward, shape):
    m, k, n = shape
    inputs = {
        "x": gpu_random(m, k, dtype=dtype),
        "weight": gpu_random(n, k, dtype=dtype, grad=False),
        "bias": gpu_random(n, dtype=dtype, grad=False),
        "ia3_l": gpu_random(k if feedforward else n, dtype=adapter_dtype or dtype),
    }
    assert_error_rule(
        functools.partial(ops.ia3_linear, feedforward=feedforward),
        functools.partial(unfused_ia3, feedforward=feedforward),
        inputs,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["dora_linear", "ia3_linear"])
def test_frozen_scales_of_many_tokens(op, dtype):
    """They meet the accumulator, where a kernel has one for so many tokens."""
    inputs = gpu_lora_inputs(2048, 264, 1544, 16, dtype)
    scale = gpu_random(1544, dtype=dtype, grad=False)
    if op == "dora_linear":
        ours, theirs = (functools.partial(f, scaling=0.7) for f in (ops.dora_linear, unfused_dora))
        return assert_error_rule(ours, theirs, inputs | {"magnitude": scale}, roundings=2)
    del inputs["lora_A"], inputs["lora_B"]
    ours, theirs = (functools.partial(f, feedforward=False) for f in (ops.ia3_linear, unfused_ia3))
    assert_error_rule(ours, theirs, inputs | {"ia3_l": scale})


@dtypes
@pytest.mark.parametrize(
    "shape", [(9, 33, 20, 4, 3), (64, 1024, 513, 16, 40), (64, 1024, 512, 16, 40), (500, 96, 136, 8, 5)]
)
@pytest.mark.parametrize("ranked", [False, True])
def test_multi_lora(dtype, adapter_dtype, shape, ranked):
    t, _, _, r, num_adapters = shape
    slots = torch.randint(-1, num_adapters, (t,), device="cuda")
    scaling = torch.randn(num_adapters, device="cuda")
    ranks = torch.randint(0, r + 1, (num_adapters,), device="cuda") if ranked else None
    assert_error_rule(
        lambda y, **rest: ops.multi_lora(y.clone(), **rest, slots=slots, scaling=scaling, ranks=ranks),
        functools.partial(unfused_multi_lora, slots=slots, scaling=scaling, ranks=ranks),
        gpu_multi_lora_inputs(*shape, dtype, adapter_dtype),
    )


@dtypes
@pytest.mark.parametrize(
    "shape", [(9, 33, 20, 4, 3), (64, 1024, 512, 16, 40), (40, 520, 264, 8, 2), (700, 136, 264, 24, 5)]
)
@pytest.mark.parametrize("ranked", [False, True])
def test_multi_lora_linear(dtype, adapter_dtype, shape, ranked):
    t, _, _, r, num_adapters = shape
    slots = torch.randint(-1, num_adapters, (t,), device="cuda")
    ranks = torch.randint(0, r + 1, (num_adapters,), device="cuda") if ranked else None
    options = {"slots": slots, "scaling": torch.randn(num_adapters, device="cuda"), "ranks": ranks}
    ours, theirs = (functools.partial(f, **options) for f in (ops.multi_lora_linear, unfused_multi_lora_linear))
    assert_error_rule(ours, theirs, multi_layer_inputs(*shape, dtype, adapter_dtype, device="cuda"))


@pytest.mark.parametrize(("dtype", "adapter_dtype"), [(torch.bfloat16, None), (torch.float16, torch.float32)])
@pytest.mark.parametrize("ranked", [False, True])
def test_multi_lora_linear_in_blocks_of_one_adapter(dtype, adapter_dtype, ranked):
    """What lies beyond true ranks, and adapters without a token, may be NaN."""
    slots, rank = in_blocks(3), 24 if ranked else 20
    ranks = torch.tensor([0, 5, rank, rank], device="cuda") if ranked else None
    inputs = multi_layer_inputs(len(slots), WIDE, WIDE, rank, 4, dtype, adapter_dtype, device="cuda")
    with torch.no_grad():
        for a, used in enumerate([0, 5, rank, 0] if ranked else [rank] * 3 + [0]):
            inputs["lora_A"][a, used:] = float("nan")
            inputs["lora_B"][a, :, used:] = float("nan")
    options = {"slots": slots, "scaling": torch.randn(4, device="cuda"), "ranks": ranks}
    ours, theirs = (functools.partial(f, **options) for f in (ops.multi_lora_linear, unfused_multi_lora_linear))
    assert_error_rule(ours, theirs, inputs)


@pytest.mark.parametrize("tokens", [40, 500, None])
def test_a_bad_adapter_reaches_its_own_tokens_alone(tokens):
    slots = torch.arange(tokens, device="cuda") % 4 - 1 if tokens else in_blocks(3)
    inputs = multi_layer_inputs(len(slots), 64, WIDE, 8, 3, torch.bfloat16, device="cuda")
    with torch.no_grad():
        inputs["lora_B"][1] = float("nan")
        y = ops.multi_lora_linear(**inputs, slots=slots, scaling=0.5)
    assert y[slots == 1].isnan().all()
    assert torch.isfinite(y[slots != 1]).all()


@pytest.mark.parametrize("shape", [(64, 4096, 4096, 16, 64), (64, 4096, 513, 64, 1), (7, 300, 65, 33, 3)])
def test_multi_lora_in_one_launch(monkeypatch, shape):
    """Two calls on two streams at a time, and a CUDA graph, replayed with other slots: what two launches give, the same
    bits every time."""
    from pyfastpeft.kernels import blocks, multi_lora

    tokens, _, _, rank, num_adapters = shape
    inputs = gpu_multi_lora_inputs(*shape, torch.bfloat16)
    y, x, lora_A, lora_B = (tensor.detach() for tensor in inputs.values())
    scaling = torch.randn(num_adapters, device="cuda")
    ranks = torch.randint(1, rank + 1, (num_adapters,), device="cuda")
    slots = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    order, segments = ops.route(slots, num_adapters)
    out = torch.empty_like(y)

    def run(out):
        out.copy_(y)
        s = torch.empty(tokens, rank, device="cuda")
        multi_lora.multi_lora_forward(x, None, None, lora_A, lora_B, scaling, ranks, order, segments, out, s)
        return out.clone()

    blocks_of_one = [(blocks.ANY, blocks.entry(16, 64, 128, 4, 4))]
    monkeypatch.setitem(blocks.BLOCKS, "multi_lora", {"half": blocks_of_one})
    run(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(out)
    for _ in range(3):
        slots = torch.randint(-1, num_adapters, (tokens,), device="cuda")
        for own, new in zip((order, segments), ops.route(slots, num_adapters)):
            own.copy_(new)
        with monkeypatch.context() as patch:
            patch.setitem(blocks.BLOCKS, "multi_lora", {"half": [(blocks.ANY, None)]})
            two = run(out)
        results = []
        for _ in range(100):
            out.fill_(float("nan"))
            graph.replay()
            results.append(out.clone())
        streams = [torch.cuda.Stream() for _ in range(2)]
        torch.cuda.synchronize()
        for _ in range(20):
            for stream in streams:
                with torch.cuda.stream(stream):
                    results.append(run(torch.empty_like(y)))
        torch.cuda.synchronize()
        assert all(torch.equal(result, results[0]) for result in results)
        torch.testing.assert_close(results[0], two, rtol=1e-2, atol=1e-2)
    assert len(multi_lora.COUNTERS) >= 2
    assert not any(counters.any() for counters in multi_lora.COUNTERS.values())


def test_the_device_is_not_waited_for_and_slots_are_checked_on_request(monkeypatch):
    inputs = {name: tensor.detach() for name, tensor in gpu_multi_lora_inputs(20, 64, 48, 4, 3, torch.bfloat16).items()}
    slots = torch.randint(-1, 3, (20,), device="cuda")
    listed, bad = slots.tolist(), slots.clone().fill_(3)
    run = functools.partial(ops.multi_lora, **inputs, scaling=0.5)
    with ops.use_backend("reference"):
        expected = run(slots=slots, y=inputs["y"].clone())
    y = run(slots=slots, y=inputs["y"].clone())  # and the kernels are compiled
    torch.testing.assert_close(y, expected, rtol=2e-2, atol=2e-2)
    untouched = inputs["y"].clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(slots=slots, y=inputs["y"].clone())
        run(slots=ops.route(listed, 3, "cuda"), y=inputs["y"].clone())
        run(slots=bad, y=untouched)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(untouched, inputs["y"])
    monkeypatch.setenv("PYFASTPEFT_CHECK", "1")
    with pytest.raises(ValueError, match=r"slots is between 3 and 3; it must be in \[-1, 3\)"):
        run(slots=bad)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", REPEATABLE)
def test_a_hundred_runs_are_bit_identical(name, adapter_dtype):
    assert_repeatable(name, 2048, WIDE, adapter_dtype, "cuda", runs=100)


def captured(run):
    """What replays a graph of what `run` does."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()  # compiles and allocates what lasts
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@pytest.mark.parametrize(("tokens", "included"), [(64, False), (500, False), (9, True), (64, True), (1064, True)])
def test_a_captured_graph_serves_slots_that_change(backend, tokens, included):
    if backend == "addmm" and tokens * 8 * (256 + WIDE) > addmm.GATHERED:
        pytest.skip("adapters that come one after the other are looked up on the host")
    assert_serves_slots_that_change(tokens, included, "cuda", captured, features=WIDE)


@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [9, 64])
def test_two_graphs_are_replayed_at_once(backend, tokens, adapter_dtype):
    """Blocks of each launch wait for each other, and not for those of the other stream."""
    if backend == "addmm":
        pytest.skip("torch's own kernels wait for nobody")
    shape, streams, calls = (tokens, 1024, 520, 16, 8), [torch.cuda.Stream() for _ in range(2)], []
    for _ in streams:
        inputs = multi_layer_inputs(*shape, torch.bfloat16, adapter_dtype, device="cuda")
        inputs = {name: tensor.detach() for name, tensor in inputs.items()}
        slots = ops.route(torch.randint(-1, 8, (tokens,), device="cuda"), 8)
        run = functools.partial(ops.multi_lora_linear, **inputs, slots=slots, scaling=0.5)
        expected = run()
        out = torch.empty_like(expected)
        calls.append((expected, out, captured(lambda run=run, out=out: out.copy_(run()))))
    torch.cuda.synchronize()
    for _ in range(20):
        for stream, (_, out, replay) in zip(streams, calls):
            with torch.cuda.stream(stream):
                out.fill_(float("nan"))
                for _ in range(10):
                    replay()
        torch.cuda.synchronize()
        assert all(torch.equal(out, expected) for expected, out, _ in calls)
