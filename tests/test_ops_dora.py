"""dora_linear and dora_norm on every backend of this machine."""

import functools

import pytest
import torch
from error_rule import DTYPES, MIXED, assert_error_rule, lora_inputs, poisoned_memory, random, unfused_delta
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import assert_dora, branch_backends, dora, dora_inputs, dtypes, plain_dora, ranks
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from benchmarks.measure import saved_bytes
from pyfastpeft import ops
from pyfastpeft.ops import reference

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


# --- the error rule ---


@branch_backends
@dtypes
@pytest.mark.parametrize(
    ("shape", "bias"),
    [
        *[((1, 24, 30, 2), True), ((4, 9, 8, 2), False), ((33, 255, 129, 16), True), ((33, 255, 129, 16), False)],
        *[((20, 130, 75, 100), True), ((60, 70, 600, 4), False)],
    ],
)
def test_dora_linear(backend, dtype, adapter_dtype, shape, bias):
    assert_dora(dora_inputs(*shape, dtype, adapter_dtype, bias=bias))


@branch_backends
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dora_output_may_be_written_in_place(backend, dtype):
    def then(function, **inputs):
        y = function(**inputs)
        return y.mul_(2).add_(1)

    inputs = dora_inputs(9, 33, 17, 4, dtype, bias=False)
    assert_error_rule(
        functools.partial(then, dora),
        functools.partial(then, plain_dora),
        inputs,
        through={"magnitude": dtype},
        roundings=2,
    )


@pytest.mark.parametrize("hooks", [lambda: saved_tensors_hooks(lambda t: t, lambda t: t), save_on_cpu])
def test_dora_output_may_be_written_in_place_behind_hooks(hooks):
    inputs = dora_inputs(9, 33, 17, 4, torch.float32, bias=False)
    leaves = [inputs[name] for name in ("x", "lora_A", "lora_B", "magnitude")]
    expected = torch.autograd.grad(2 * dora(**inputs).sum(), leaves)
    with hooks():
        y = dora(**inputs)
        y.mul_(2)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), leaves), expected):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [5, 40, 150])
def test_dora_with_a_weight_of_columns(backend, dtype, tokens):
    inputs = dora_inputs(tokens, 130, 1100, 4, dtype)
    assert_dora(inputs | {"weight": inputs["weight"].T.contiguous().T})  # as Conv1D's


@branch_backends
@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e20, -1.0])
def test_dora_magnitudes_of_any_size(backend, scale):
    inputs = dora_inputs(9, 33, 17, 4, torch.float32, bias=False)
    magnitude = inputs["magnitude"].detach().clone()
    magnitude[3] = scale
    assert_dora(inputs | {"magnitude": magnitude.requires_grad_()})


@branch_backends
def test_dora_gradients_can_be_formed_twice(backend):
    inputs = dora_inputs(9, 33, 17, 4, torch.float32, bias=False)
    leaves = [inputs[name] for name in ("x", "lora_A", "lora_B", "magnitude")]
    loss = dora(**inputs).square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, leaves)):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_dora_does_not_keep_its_output(reentrant):
    rest = dora_inputs(64, 256, 128, 8, torch.float32, bias=False)
    x = rest.pop("x")
    leaves = [x, rest["lora_A"], rest["lora_B"], rest["magnitude"]]
    expected = torch.autograd.grad(dora(x, **rest).sum(), leaves)
    y = checkpoint(functools.partial(dora, **rest), x, use_reentrant=reentrant)
    output, loss = StorageWeakRef(y.untyped_storage()), y.sum()
    del y
    assert output.expired()
    loss.backward()
    for leaf, gradient in zip(leaves, expected):
        torch.testing.assert_close(leaf.grad, gradient)


@branch_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_trainable_weight_and_bias_get_gradients(backend, dtype):
    assert_dora(dora_inputs((3, 5), 33, 17, 4, dtype, frozen=False))


@branch_backends
@pytest.mark.parametrize("only", ["x", "lora_A", "lora_B", "magnitude"])
def test_dora_forms_one_gradient_alone(backend, only):
    inputs = dora_inputs(6, 24, 40, 4, torch.float32, bias=False)
    assert_dora({name: t.detach().requires_grad_(name == only) for name, t in inputs.items()})


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (50, 77, 5), (20, 100, 33), (13, 2100, 2), (13, 2100, 16)])
def test_dora_norm_obeys_the_error_rule(backend, dtype, adapter_dtype, shape):
    n, k, r = shape
    inputs = lora_inputs(1, k, n, r, dtype, adapter_dtype, bias=False)
    weight, lora_A, lora_B = (inputs[name].detach() for name in ("weight", "lora_A", "lora_B"))
    exact = torch.linalg.vector_norm(weight.double() - 1.3 * lora_B.double() @ lora_A.double(), dim=1)
    squares = weight.double().square().sum(1).to(reference.accumulation(dtype))
    for cached in (None, squares):
        with poisoned_memory():
            norm = ops.dora_norm(weight, lora_A, lora_B, -1.3, cached)
        assert norm.dtype == reference.accumulation(dtype)
        assert not norm.requires_grad
        assert (norm - exact).norm() <= 8 * torch.finfo(norm.dtype).eps * exact.norm()


@branch_backends
def test_dora_norm_of_what_all_but_cancels_is_small_and_real(backend):
    lora_A, lora_B = random(4, 200, grad=False), random(30, 4, grad=False)
    weight = -2.0 * lora_B @ lora_A
    norm = ops.dora_norm(weight, lora_A, lora_B, 2.0)
    assert (norm.square() <= 100 * torch.finfo(torch.float32).eps * weight.square().sum(1)).all()
    transposed = random(200, 30, grad=False).T
    exact = torch.linalg.vector_norm(transposed.double() + 2.0 * lora_B.double() @ lora_A.double(), dim=1)
    torch.testing.assert_close(ops.dora_norm(transposed, lora_A, lora_B, 2.0), exact.float())
    weight[3, 5] = float("nan")
    assert ops.dora_norm(weight, lora_A, lora_B, 2.0).isnan().nonzero().tolist() == [[3]]


@branch_backends
def test_a_magnitude_of_zero_has_a_gradient(backend):
    inputs = dora_inputs(6, 24, 40, 4, torch.float32)
    with torch.no_grad():
        inputs["magnitude"][::2] = 0
    assert_dora(inputs)


@branch_backends
@dtypes
def test_dora_drops_from_the_branch_alone(backend, dtype, adapter_dtype):
    torch.manual_seed(9)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))

    def fused(**inputs):
        torch.manual_seed(9)
        return dora(**inputs, dropout_p=0.25)

    def unfused(x, weight, bias, lora_A, lora_B, magnitude):
        dropped = x.to(lora_A.dtype) * reference.dropout_factor(seed, 0.25, *x.shape, lora_A.dtype)
        norm = torch.linalg.vector_norm(weight + 0.7 * (lora_B @ lora_A).detach(), dim=1)
        u = torch.nn.functional.linear(x, weight) + unfused_delta(dropped, lora_A, lora_B, 0.7)
        return (magnitude / norm * u + bias).to(x.dtype)

    inputs = dora_inputs(19, 130, 40, 4, dtype, adapter_dtype)
    assert_error_rule(fused, unfused, inputs, through={"magnitude": dtype})


@dtypes
def test_torch_draws_the_mask_where_no_kernel_does(no_kernels, monkeypatch, dtype, adapter_dtype):
    mask = torch.rand(19, 130) < 0.75
    monkeypatch.setattr("pyfastpeft.ops.dora.masked", lambda x, p: x * mask.to(x.dtype))

    def unfused(x, weight, bias, lora_A, lora_B, magnitude):
        norm = torch.linalg.vector_norm(weight + 0.7 * (lora_B @ lora_A).detach(), dim=1)
        delta = unfused_delta(x.to(lora_A.dtype) * mask / 0.75, lora_A, lora_B, 0.7)
        return (magnitude / norm * (torch.nn.functional.linear(x, weight) + delta) + bias).to(x.dtype)

    inputs = dora_inputs(19, 130, 40, 4, dtype, adapter_dtype)
    assert_error_rule(functools.partial(dora, dropout_p=0.25), unfused, inputs, through={"magnitude": dtype})


# --- shapes and strides ---


@branch_backends
@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(8, 200), st.integers(8, 300), ranks),
    transposed=st.booleans(),
    weight_transposed=st.booleans(),
    dtypes=st.sampled_from(DTYPES + MIXED),
)
def test_dora_linear_takes_any_shape_and_strides(backend, shape, transposed, weight_transposed, dtypes):
    torch.manual_seed(0)
    m, k, n, _ = shape
    inputs = dora_inputs(*shape, *dtypes)
    if transposed:
        inputs["x"] = random(k, m, dtype=dtypes[0]).T.detach().requires_grad_()
    if weight_transposed:
        inputs["weight"] = random(k, n, dtype=dtypes[0]).T.detach()
    assert_dora(inputs)


# --- autocast, saved memory ---


@branch_backends
def test_dora_keeps_the_output_and_no_weight(backend):
    inputs = dora_inputs(64, 256, 128, 8, torch.bfloat16, torch.float32)
    parameters = [inputs[n] for n in ("weight", "lora_A", "lora_B")]
    kept = saved_bytes(lambda: dora(**inputs, dropout_p=0.1), parameters)
    assert kept == 64 * 256 * 2 + 64 * 8 * 4 + 64 * 128 * 2 + 2 * 128 * 4 + 8
