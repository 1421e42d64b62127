"""DoRA's CUDA kernels in the emulator: the error rule for every dtype and route, the norm, dropout, one gradient."""

import platform
import shutil

import pytest
import torch
from error_rule import assert_error_rule, lora_inputs, poisoned_memory, random, unfused_delta
from op_cases import assert_dora, dora, dora_inputs

from pyfastpeft import ops
from pyfastpeft.ops import native, reference

if platform.machine() != "x86_64" or not shutil.which("g++") or not native.AVAILABLE:
    pytest.skip("the emulator is for x86-64 and built with g++", allow_module_level=True)

import emulated_cuda

half, brain, single = torch.float16, torch.bfloat16, torch.float32
dtypes = pytest.mark.parametrize(
    ("dtype", "adapter_dtype"), [(brain, None), (half, None), (brain, single), (half, single)]
)
# The product for Hopper and the fused layer scale in their epilogue, torch's product does not.
capabilities = pytest.mark.parametrize("capability", ["8", "9"])


@pytest.fixture(scope="module", autouse=True)
def _emulated():
    with emulated_cuda.loaded(), ops.use_backend("cuda"):
        yield


@capabilities
@dtypes
@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        *[((1, 16, 24, 2), True), ((1, 16, 24, 2), False)],
        *[((65, 264, 520, 5), True), ((130, 136, 72, 24), False), ((70, 136, 264, 70), True)],
    ],
)
def test_dora_linear(monkeypatch, capability, dtype, adapter_dtype, shape, bias):
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", capability)
    # The branch's operands are rounded, too, and so is torch's product, which a handful of numbers does not forgive.
    assert_dora(dora_inputs(*shape, dtype, adapter_dtype, bias=bias), roundings=3)


@capabilities
@dtypes
@pytest.mark.parametrize("shape", [(3, 72, 136, 8), (37, 584, 72, 24), (64, 72, 264, 16), (90, 72, 136, 8)])
def test_a_frozen_magnitude_keeps_no_output(monkeypatch, capability, dtype, adapter_dtype, shape):
    """Then the scale meets the sum in the epilogue, where there is one: of few tokens' kernel or of the product."""
    monkeypatch.setenv("PYFASTPEFT_EMULATED_CAPABILITY", capability)
    inputs = dora_inputs(*shape, dtype, adapter_dtype)
    inputs["magnitude"].requires_grad_(False)
    assert_dora(inputs)


@pytest.mark.parametrize("only", ["x", "lora_A", "lora_B", "magnitude"])
def test_one_gradient_alone(only):
    inputs = dora_inputs(70, 72, 136, 8, brain)
    assert_dora({name: t.detach().requires_grad_(name == only) for name, t in inputs.items()})


@dtypes
def test_dropout_is_the_references(dtype, adapter_dtype):
    def fused(x, weight, lora_A, lora_B, magnitude):
        torch.manual_seed(9)
        return dora(x, weight, lora_A, lora_B, magnitude, dropout_p=0.25)

    def unfused(x, weight, lora_A, lora_B, magnitude):
        torch.manual_seed(9)
        seed = torch.randint(-(2**63), 2**63 - 1, (1,))
        dropped = x.to(lora_A.dtype) * reference.dropout_factor(seed, 0.25, *x.shape, lora_A.dtype)
        norm = torch.linalg.vector_norm(weight + 0.7 * lora_B.detach() @ lora_A.detach(), dim=1)
        sums = torch.nn.functional.linear(x, weight) + unfused_delta(dropped, lora_A, lora_B, 0.7)
        return (sums * (magnitude / norm)).to(x.dtype)

    inputs = dora_inputs(67, 136, 72, 8, dtype, adapter_dtype, bias=False)
    assert_error_rule(fused, unfused, inputs, through={"magnitude": dtype}, roundings=2)


@dtypes
@pytest.mark.parametrize("shape", [(8, 8, 1), (56, 80, 5), (24, 1096, 40)])
def test_norm(dtype, adapter_dtype, shape):
    n, k, r = shape
    inputs = lora_inputs(1, k, n, r, dtype, adapter_dtype, bias=False)
    weight, lora_A, lora_B = (inputs[name].detach() for name in ("weight", "lora_A", "lora_B"))
    exact = torch.linalg.vector_norm(weight.double() - 1.3 * lora_B.double() @ lora_A.double(), dim=1)
    for cached in (None, weight.double().square().sum(1).float()):
        with poisoned_memory():
            norm = ops.dora_norm(weight, lora_A, lora_B, -1.3, cached)
        assert (norm - exact).norm() <= 8 * torch.finfo(norm.dtype).eps * exact.norm()


def test_norm_of_what_all_but_cancels_is_real_and_nan_stays():
    lora_A, lora_B = random(4, 200, grad=False), random(32, 4, grad=False)
    weight = (-2.0 * lora_B @ lora_A).bfloat16()
    exact = torch.linalg.vector_norm(weight.double() + 2.0 * lora_B.double() @ lora_A.double(), dim=1)
    norm = ops.dora_norm(weight, lora_A, lora_B, 2.0)
    assert ((norm.double().square() - exact.square()).abs() <= 100 * 2**-23 * weight.double().square().sum(1)).all()
    weight[3, 5] = float("nan")
    assert ops.dora_norm(weight, lora_A, lora_B, 2.0).isnan().nonzero().tolist() == [[3]]


def test_two_runs_are_bit_identical():
    inputs = dora_inputs(130, 136, 264, 16, brain, single)

    def run():
        out = dora(**inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), [t for t in inputs.values() if t.requires_grad])

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))
