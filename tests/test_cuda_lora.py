"""LoRA's CUDA kernels in the emulator: the error rule for every dtype, edges, dropout, strides, determinism."""

import functools
import platform
import shutil

import pytest
import torch
from error_rule import (
    assert_error_rule,
    group_inputs,
    grouped,
    lora_inputs,
    random,
    unfused_delta,
    unfused_group,
    unfused_lora,
)

from pyfastpeft import ops
from pyfastpeft.ops import dispatch, native, reference

if platform.machine() != "x86_64" or not shutil.which("g++") or not native.AVAILABLE:
    pytest.skip("the emulator is for x86-64 and built with g++", allow_module_level=True)

import emulated_cuda

half, brain, single = torch.float16, torch.bfloat16, torch.float32
DTYPES = [(brain, None), (half, None), (brain, single), (half, single)]
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES)
lora = functools.partial(ops.lora_linear, scaling=0.7)
plain_lora = functools.partial(unfused_lora, scaling=0.7)


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with emulated_cuda.loaded(), ops.use_backend("cuda"):
        yield


# Ranks up to 16 and beyond go different ways; tiles are 64 rows of 128 or 256 columns; few rows are summed in parts.
@dtypes
@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (65, 264, 520, 5), (130, 520, 136, 24), (70, 136, 264, 70)])
def test_lora_linear(dtype, adapter_dtype, shape):
    assert_error_rule(lora, plain_lora, lora_inputs(*shape, dtype, adapter_dtype))


def group(dropout_p=0.0, **inputs):
    function = functools.partial(ops.lora_linear_group, scalings=[0.7, -1.3, 0.4], dropout_p=dropout_p)
    return grouped(function, **inputs)


plain_group = functools.partial(grouped, functools.partial(unfused_group, scalings=[0.7, -1.3, 0.4]))


# Layers of 8, 5 and 3 ranks lie askew in s; few tokens go through one kernel for each layer, if all ranks are multiples
# of 8, or of 4 in float32; ranks above 16 go another way.
@dtypes
@pytest.mark.parametrize(
    ("rows", "layers"),
    [
        (1, [(8, 1), (8, 1), (8, 1)]),
        (37, [(72, 8), (40, 16), (136, 8)]),
        (37, [(72, 8), (40, 5), (136, 3)]),
        (70, [(136, 70), (72, 24), (64, 5)]),
    ],
)
def test_lora_linear_group(dtype, adapter_dtype, rows, layers):
    assert_error_rule(group, plain_group, group_inputs(rows, 136, layers, dtype, adapter_dtype))


@pytest.mark.parametrize(("layers", "roundings"), [(3, 1), (4, 2)])
def test_the_products_of_a_group_are_summed_in_one_accumulator(layers, roundings):
    """On Hopper, of three layers: the fourth is added to their sum."""
    shapes = [(136, 8), (72, 16), (64, 5), (40, 8)][:layers]
    inputs = {n: t.detach() for n, t in group_inputs(67, 264, shapes, brain).items()}
    run = functools.partial(ops.lora_linear_group, scalings=[0.1] * layers)
    dy = random(67, sum(n for n, _ in shapes), dtype=brain, grad=False)

    def gradient(x, **rest):
        y = grouped(run, x.requires_grad_(), **rest)
        return torch.autograd.grad(y, x, dy.to(y))[0].double()

    with ops.use_backend("reference"):
        exact = gradient(**{name: tensor.double() for name, tensor in inputs.items()})
    once = exact.to(brain).double()
    assert (gradient(**inputs) - exact).norm() <= 1.2 * roundings**0.5 * (once - exact).norm()


@pytest.mark.parametrize("only", ["x", "lora_A0", "lora_A1", "lora_B2"])
def test_a_group_forms_one_gradient_alone(only):
    inputs = group_inputs(40, 72, [(64, 8), (40, 5), (24, 20)], brain, single)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == only)
    assert_error_rule(group, plain_group, inputs)


@dtypes
@pytest.mark.parametrize("capability", ["8", "9"])
def test_layers_of_a_group_share_one_mask(monkeypatch, dtype, adapter_dtype, capability):
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", capability)

    def seeded(run, **inputs):
        torch.manual_seed(9)
        return run(**inputs)

    def unfused(x, **rest):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        dropped = x.to(rest["lora_A0"].dtype)
        dropped = dropped * reference.dropout_factor(seed, 0.25, *x.shape, dropped.dtype)
        layers = (
            (*(rest.get(f"{kind}{i}") for kind in ("weight", "bias", "lora_A", "lora_B")), scaling)
            for i, scaling in enumerate([0.7, -1.3, 0.4])
        )
        return torch.cat(
            [
                (torch.nn.functional.linear(x, w, b) + unfused_delta(dropped, A, B, scaling)).to(x.dtype)
                for w, b, A, B, scaling in layers
            ],
            -1,
        )

    inputs = group_inputs(67, 264, [(136, 3), (40, 20), (64, 8)], dtype, adapter_dtype)
    assert_error_rule(
        functools.partial(seeded, functools.partial(group, 0.25)), functools.partial(seeded, unfused), inputs
    )


@pytest.mark.parametrize("adapter_dtype", [brain, single])
@pytest.mark.parametrize("only", ["x", "lora_A", "lora_B"])
def test_each_gradient_alone(adapter_dtype, only):
    inputs = lora_inputs(40, 72, 144, 8, brain, adapter_dtype)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == only)
    assert_error_rule(lora, plain_lora, inputs)


@dtypes
@pytest.mark.parametrize("rank", [7, 40])
def test_lora_delta(dtype, adapter_dtype, rank):
    inputs = lora_inputs(75, 136, 264, rank, dtype, adapter_dtype) | {"y": random(75, 264, dtype=dtype)}
    del inputs["weight"], inputs["bias"]
    assert_error_rule(
        lambda y, x, lora_A, lora_B: ops.lora_delta_(y.clone(), x, lora_A, lora_B, -1.3),
        lambda y, x, lora_A, lora_B: (y + unfused_delta(x, lora_A, lora_B, -1.3)).to(y.dtype),
        inputs,
    )


def assert_dropout_is_the_references(dtype, adapter_dtype, rank, p):
    def fused(x, weight, bias, lora_A, lora_B):
        torch.manual_seed(9)
        return ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7, p)

    def unfused(x, weight, bias, lora_A, lora_B):
        torch.manual_seed(9)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        dropped = x.to(lora_A.dtype) * reference.dropout_factor(seed, p, *x.shape, lora_A.dtype)
        base = torch.nn.functional.linear(x, weight, bias)
        return (base + unfused_delta(dropped, lora_A, lora_B, 0.7)).to(base.dtype)

    assert_error_rule(fused, unfused, lora_inputs(67, 264, 136, rank, dtype, adapter_dtype))


@dtypes
@pytest.mark.parametrize("rank", [3, 40])
def test_dropout_is_the_references(dtype, adapter_dtype, rank):
    assert_dropout_is_the_references(dtype, adapter_dtype, rank, 0.25)


@dtypes
@pytest.mark.parametrize(("rank", "p"), [(3, 0.0), (70, 0.5)])
def test_other_gpus(monkeypatch, dtype, adapter_dtype, rank, p):
    """Torch multiplies by weight there, and tiles are narrower or fewer at a time, for less shared memory."""
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", "8")
    assert_dropout_is_the_references(dtype, adapter_dtype, rank, p)


@pytest.mark.parametrize("adapter_dtype", [brain, single])
def test_the_largest_group_on_other_gpus(monkeypatch, adapter_dtype):
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", "8")
    inputs = group_inputs(66, 200, [(24, 144), (16, 256), (8, 32)], brain, adapter_dtype)
    assert_error_rule(group, plain_group, inputs)


@pytest.mark.parametrize("capability", ["8", "9"])
def test_a_small_branch_costs_the_gradient_of_x_no_rounding(monkeypatch, capability):
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", capability)
    inputs = {n: t.detach() for n, t in lora_inputs(67, 264, 136, 8, brain, single).items()}
    dy = random(67, 136, dtype=brain, grad=False)

    def gradient(x, **rest):
        torch.manual_seed(9)
        y = ops.lora_linear(x.requires_grad_(), **rest, scaling=1e-3, dropout_p=0.25)
        return torch.autograd.grad(y, x, dy.to(y))[0].double()

    with ops.use_backend("reference"):
        exact = gradient(**{name: tensor.double() for name, tensor in inputs.items()})
    once = exact.to(brain).double()
    assert (gradient(**inputs) - exact).norm() <= 1.1 * (once - exact).norm()


@pytest.mark.parametrize("shape", [(1, 8, 8, 8), (37, 584, 72, 24)])
def test_few_tokens_go_through_one_kernel(shape):
    inputs = lora_inputs(*shape, brain)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in ("lora_A", "lora_B"))
    assert_error_rule(lora, plain_lora, inputs)


def test_rows_may_lie_apart():
    inputs = lora_inputs(33, 72, 136, 8, brain)
    for name, width in (("x", 72), ("weight", 72)):
        rows = random(len(inputs[name]), width + 24, dtype=brain, grad=False)[:, 8 : 8 + width]
        inputs[name] = rows.requires_grad_(name == "x")
    assert_error_rule(lora, plain_lora, inputs)


def test_factors_that_lie_askew_are_copied():
    """A rank that is no multiple of 8, or a lora_B between two multiples of 16 bytes, is no operand of the product."""
    inputs = lora_inputs(20, 64, 48, 8, brain)
    inputs["lora_B"] = random(48 * 8 + 1, dtype=brain, grad=False)[1:].view(48, 8).requires_grad_()
    assert_error_rule(lora, plain_lora, inputs)


def test_one_pass_and_two_over_the_gradient_agree():
    """Small ranks get ds and dlora_B from one pass, large ones from two: both sum in float32."""
    torch.manual_seed(3)
    wide = {name: t.detach() for name, t in lora_inputs(130, 64, 520, 80, brain, single, bias=False).items()}
    dy, s = random(130, 520, dtype=brain, grad=False), random(130, 80, grad=False)

    def gradients(rank):
        factors = wide["lora_A"][:rank].contiguous(), wide["lora_B"][:, :rank].contiguous()
        out = [torch.full_like(t, torch.nan) for t in (wide["x"], *factors)]
        arguments = dy, wide["x"], None, *factors, 0.7, 0.0, None, s[:, :rank].contiguous(), *out
        dispatch.run("lora_backward", *arguments)
        return out

    small, large = gradients(16), gradients(80)
    torch.testing.assert_close(large[1][:16], small[1])
    torch.testing.assert_close(large[2][:, :16], small[2])


@pytest.mark.parametrize("adapter_dtype", [brain, single])
def test_two_runs_are_bit_identical(adapter_dtype):
    inputs = lora_inputs(130, 136, 264, 16, brain, adapter_dtype)

    def run():
        out = lora(**inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), [t for t in inputs.values() if t.requires_grad])

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": lambda: random(9, 60, dtype=brain), "weight": lambda: random(48, 60, dtype=brain)}, "K=60, N=48, r=8"),
        ({"x": lambda: random(9 * 64 + 1, dtype=brain)[1:].view(9, 64)}, "not those of x"),
        ({"weight": lambda: random(64, 48, dtype=brain, grad=False).T}, "not those of weight"),
        ({"x": lambda: random(64, dtype=brain).expand(9, 64)}, "rows that lie apart, not those of x"),
    ],
)
def test_what_the_kernels_do_not_take_is_named(change, reason):
    inputs = lora_inputs(9, 64, 48, 8, brain) | {name: make() for name, make in change.items()}
    inputs["lora_A"] = random(8, inputs["x"].shape[1], dtype=brain)
    with pytest.raises(RuntimeError, match=reason):
        lora(**inputs)


def test_ranks_and_dtypes_that_the_kernels_do_not_take_are_named():
    with pytest.raises(RuntimeError, match="r=257"):
        lora(**lora_inputs(9, 64, 48, 257, brain))
    with pytest.raises(RuntimeError, match="takes ranks up to 432 together, not 440"):
        group(**group_inputs(9, 64, [(48, 200), (48, 200), (48, 40)], brain))
    with pytest.raises(RuntimeError, match="N=44"):
        group(**group_inputs(9, 64, [(48, 8), (44, 8), (8, 8)], brain))
    with pytest.raises(RuntimeError, match="bfloat16 and float16 activations"):
        lora(**lora_inputs(9, 64, 48, 8, single))
    with pytest.raises(RuntimeError, match=r"adapters of torch\.bfloat16 or float32"):
        lora(**lora_inputs(9, 64, 48, 8, brain, half))
