"""Bottleneck adapters on every backend of this machine; their modules are in test_bottleneck.py."""

import pytest
import torch
from error_rule import DTYPES, MIXED, assert_error_rule, bottleneck_inputs, random, unfused_bottleneck
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import ACTIVATIONS, assert_bottleneck, branch_backends, dtypes, in_both

from benchmarks.measure import saved_bytes
from pyfastpeft import ops

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


# --- the error rule ---


@branch_backends
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 24, 17, 8), (33, 130, None, 20)])
def test_bottleneck(backend, dtype, adapter_dtype, activation, shape):
    assert_bottleneck(bottleneck_inputs(*shape, dtype, adapter_dtype), activation=activation)


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 9, 8, 1), (30, 150, 131, 33), (3, 40, None, 150), (20, 40, None, 1)])
def test_bottleneck_without_biases(backend, dtype, adapter_dtype, shape):
    assert_bottleneck(bottleneck_inputs(*shape, dtype, adapter_dtype, biases=False), activation="gelu")


@branch_backends
@dtypes
def test_bottleneck_learns_its_scaling(backend, dtype, adapter_dtype):
    inputs = bottleneck_inputs(21, 40, 64, 12, dtype, adapter_dtype)
    inputs["scaling"] = torch.tensor([1.7], dtype=adapter_dtype or dtype).requires_grad_()
    ours, theirs = (in_both(f, activation="silu") for f in (ops.bottleneck, unfused_bottleneck))
    assert_error_rule(ours, theirs, inputs)


@branch_backends
@pytest.mark.parametrize("only", ["x", "residual", "down", "down_bias", "up", "up_bias"])
def test_bottleneck_forms_one_gradient_alone(backend, only):
    inputs = bottleneck_inputs(6, 24, 40, 4, torch.float32)
    inputs = {name: t.detach().requires_grad_(name == only) for name, t in inputs.items()}
    assert_bottleneck(inputs, activation="tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bottleneck_on_the_cpu_makes_no_subnormal_numbers(activation):
    x = torch.linspace(-50, 50, 9999)[:, None].requires_grad_()
    one = torch.ones(1, 1)
    with ops.use_backend("cpu"):
        y = ops.bottleneck(x, torch.zeros_like(x), one, None, one, None, 1.0, activation)
        (dx,) = torch.autograd.grad(y.sum(), x)
    for result in (y.detach(), dx):
        assert not ((result != 0) & (result.abs() < torch.finfo(torch.float32).tiny)).any()


@branch_backends
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_exact_where_they_are_small_and_where_they_saturate(backend, activation):
    one, zero = torch.ones(1, 1), torch.zeros(200, 1)
    for size in (1e-3, 0.5, 30.0):
        x = torch.randn(200, 1) * size
        inputs = {"x": x.requires_grad_()}
        ours, theirs = (
            lambda x, f=f: f(x, zero.to(x), one.to(x), None, one.to(x), None, 1.0, activation)
            for f in (ops.bottleneck, unfused_bottleneck)
        )
        assert_error_rule(ours, theirs, inputs)


# --- shapes and strides ---


@branch_backends
@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(8, 200), st.none() | st.integers(8, 200), st.integers(4, 70)),
    layout=st.sampled_from(["contiguous", "columns", "transposed"]),
    dtypes=st.sampled_from(DTYPES + MIXED),
    biases=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_bottleneck_takes_any_shape_and_strides(backend, shape, layout, dtypes, biases, activation):
    torch.manual_seed(0)
    inputs = bottleneck_inputs(*shape, *dtypes, biases=biases)
    for name in {"x", "residual"} & set(inputs):
        m, k = inputs[name].shape
        if layout == "columns":
            inputs[name] = random(m, k + 3, dtype=dtypes[0])[:, 1 : k + 1].detach().requires_grad_()
        if layout == "transposed":
            inputs[name] = random(k, m, dtype=dtypes[0]).T.detach().requires_grad_()
    assert_bottleneck(inputs, activation=activation)


# --- autocast, saved memory ---


@branch_backends
def test_autocast_keeps_the_dtype_of_a_residual(backend):
    inputs = bottleneck_inputs(6, 16, 12, 4, torch.float32)
    expected = in_both(unfused_bottleneck)(**inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = in_both(ops.bottleneck)(**inputs | {"x": inputs["x"].bfloat16()})
        serial = ops.bottleneck(inputs["x"], inputs["x"], inputs["down"], None, inputs["down"].T, None, 1.0)
    assert out.dtype == serial.dtype == torch.float32
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0.02)
    out.sum().backward()
    assert all(t.grad.dtype == torch.float32 for t in inputs.values())


@branch_backends
def test_a_serial_bottleneck_keeps_x_and_s_alone(backend):
    inputs = bottleneck_inputs(64, 256, None, 8, torch.bfloat16, torch.float32)
    parameters = [inputs[n] for n in ("down", "up", "down_bias", "up_bias")]
    kept = saved_bytes(lambda: in_both(ops.bottleneck)(**inputs), parameters)
    assert kept == 64 * 256 * 2 + 64 * 8 * 4


# --- 16-bit values, NaN and infinity ---


@branch_backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_pass_a_bottleneck(backend, value, activation):
    for where, reached in {"x": "row", "residual": "element", "down_bias": "all", "up": "column"}.items():
        inputs = {n: t.detach().abs() for n, t in bottleneck_inputs(20, 12, 9, 4, torch.float32).items()}
        inputs[where].view(-1)[0] = value
        bad = ~torch.isfinite(in_both(ops.bottleneck, activation=activation)(**inputs))
        if activation == "tanh" and value == float("inf") and where in ("x", "down_bias"):
            assert not bad.any()  # tanh of infinity is 1
            continue
        assert {"row": bad[0], "column": bad[:, 0], "all": bad, "element": bad[0, 0]}[reached].all()
        assert bad.sum() == {"row": 9, "column": 20, "all": 180, "element": 1}[reached]
