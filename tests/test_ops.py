"""Every op on every backend of this machine: the error rule, gradcheck, opcheck, compile, strides, dropout, bad input.

The Triton backend runs the same checks under its interpreter (test_triton_interpreter.py) and on a GPU (test_gpu.py).
"""

import copy
import functools
import os
from contextlib import suppress
from types import SimpleNamespace

import pytest
import torch
from error_rule import (
    DTYPES,
    MIXED,
    assert_error_rule,
    bottleneck_inputs,
    group_inputs,
    grouped,
    lora_inputs,
    multi_layer_inputs,
    multi_lora_inputs,
    poisoned_memory,
    random,
    unfused_adalora,
    unfused_bottleneck,
    unfused_delta,
    unfused_dora,
    unfused_group,
    unfused_ia3,
    unfused_lora,
    unfused_multi_lora,
    unfused_multi_lora_linear,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import saved_bytes
from pyfastpeft import ops
from pyfastpeft.ops import choice, dispatch, native, native_calls, reference, schemas

BACKENDS = os.environ.get("PYFASTPEFT_TEST_BACKENDS", "reference cpu").split()  # test_triton_interpreter.py sets it
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 5, 2),
    (16, 64, 48, 8),
    (33, 255, 129, 16),
    (70, 300, 513, 5),
    (2, 40, 24, 64),
]  # M K N r
if "triton" in BACKENDS:  # the interpreter takes its time
    SHAPES = SHAPES[::3] + SHAPES[-1:]

pytestmark = pytest.mark.usefixtures("two_threads")
backends = pytest.mark.parametrize("backend", BACKENDS)
branch_backends = pytest.mark.parametrize("backend", [*BACKENDS, "addmm"])  # of LoRA and multi-LoRA
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES + MIXED)


@pytest.fixture(autouse=True)
def _backend(request):
    if "backend" in request.fixturenames:
        with ops.use_backend(request.getfixturevalue("backend")):
            yield
    else:
        yield


def lora(x, weight, lora_A, lora_B, bias=None):
    return ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7)


def plain_lora(x, weight, lora_A, lora_B, bias=None):
    return unfused_lora(x, weight, bias, lora_A, lora_B, 0.7)


def in_both(function, scaling=0.7, activation="relu"):
    """Calls ops.bottleneck or its formula, with x for a residual that is not given."""

    def run(x, down, up, residual=None, down_bias=None, up_bias=None, scaling=scaling):
        return function(x, x if residual is None else residual, down, down_bias, up, up_bias, scaling, activation)

    return run


# --- the error rule ---


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_linear(backend, dtype, adapter_dtype, shape):
    assert_error_rule(lora, plain_lora, lora_inputs(*shape, dtype, adapter_dtype))


@branch_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainable_weight_and_bias_get_gradients(backend, dtype):
    assert_error_rule(lora, plain_lora, lora_inputs(9, 33, 17, 4, dtype, frozen=False))


@branch_backends
@pytest.mark.parametrize("lead", [(2, 3), (2, 1, 4), (5,)])
def test_any_leading_dimensions_without_bias(backend, lead):
    assert_error_rule(lora, plain_lora, lora_inputs(lead, 24, 40, 4, torch.float32, bias=False))


@branch_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("only", ["x", "lora_A", "lora_B"])
def test_one_gradient_alone(backend, dtype, only):
    inputs = lora_inputs(6, 24, 40, 4, dtype)
    inputs = {name: t.detach().requires_grad_(name == only) for name, t in inputs.items()}
    assert_error_rule(lora, plain_lora, inputs)


SCALINGS = [0.7, -1.3, 0.4]


def group(dropout_p=0.0, **inputs):
    count = sum(name.startswith("weight") for name in inputs)
    return grouped(lambda *args: ops.lora_linear_group(*args, SCALINGS[:count], dropout_p), **inputs)


def plain_group(**inputs):
    return grouped(lambda *args: unfused_group(*args, SCALINGS), **inputs)


LAYERS = [
    (1, 5, [(3, 1)]),
    (9, 33, [(17, 4), (20, 4)]),
    (40, 130, [(65, 16), (33, 5), (33, 20)]),
]


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", LAYERS)
def test_lora_linear_group(backend, dtype, adapter_dtype, shape):
    assert_error_rule(group, plain_group, group_inputs(*shape, dtype, adapter_dtype))


@branch_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_a_group_train_their_weights_and_biases(backend, dtype):
    assert_error_rule(group, plain_group, group_inputs((3, 5), 33, [(17, 4), (20, 6)], dtype, frozen=False))


@branch_backends
@pytest.mark.parametrize("only", ["x", "weight1", "bias0", "lora_A0", "lora_A1", "lora_B1"])
def test_a_group_forms_one_gradient_alone(backend, only):
    inputs = group_inputs(6, 24, [(40, 4), (17, 3)], torch.float32)
    inputs = {name: t.detach().requires_grad_(name == only) for name, t in inputs.items()}
    assert_error_rule(group, plain_group, inputs)


@branch_backends
def test_a_group_whose_outputs_are_not_all_used(backend):
    def second(function, **inputs):
        return function(**inputs)[..., 40:]

    inputs = group_inputs(6, 24, [(40, 4), (17, 3)], torch.float32)
    assert_error_rule(functools.partial(second, group), functools.partial(second, plain_group), inputs)


@branch_backends
@dtypes
def test_lora_delta(backend, dtype, adapter_dtype):
    inputs = lora_inputs(13, 70, 50, 3, dtype, adapter_dtype)
    del inputs["weight"], inputs["bias"]
    inputs["y"] = random(13, 50, dtype=dtype)
    assert_error_rule(
        lambda y, x, lora_A, lora_B: ops.lora_delta_(y.clone(), x, lora_A, lora_B, -1.3),
        lambda y, x, lora_A, lora_B: (y + unfused_delta(x, lora_A, lora_B, -1.3)).to(y.dtype),
        inputs,
    )


@backends
@dtypes
@pytest.mark.parametrize("feedforward", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (5, 7, 3), (40, 130, 65), (130, 48, 300)])
def test_ia3_linear(backend, dtype, adapter_dtype, feedforward, shape):
    m, k, n = shape
    inputs = {
        "x": random(m, k, dtype=dtype),
        "weight": random(n, k, dtype=dtype, grad=False),
        "bias": random(n, dtype=dtype, grad=False),
        "ia3_l": random(k if feedforward else n, dtype=adapter_dtype or dtype),
    }
    assert_error_rule(
        functools.partial(ops.ia3_linear, feedforward=feedforward),
        functools.partial(unfused_ia3, feedforward=feedforward),
        inputs,
    )


@backends
@pytest.mark.parametrize("feedforward", [False, True])
def test_ia3_trainable_weight_and_bias_get_gradients(backend, feedforward):
    inputs = {"x": random(9, 12), "weight": random(7, 12), "bias": random(7), "ia3_l": random(12 if feedforward else 7)}
    assert_error_rule(
        functools.partial(ops.ia3_linear, feedforward=feedforward),
        functools.partial(unfused_ia3, feedforward=feedforward),
        inputs,
    )


def dora_inputs(m, k, n, r, dtype, adapter_dtype=None, **options):
    inputs = lora_inputs(m, k, n, r, dtype, adapter_dtype, **options)
    return inputs | {"magnitude": random(n, dtype=adapter_dtype or dtype)}


def dora(x, weight, lora_A, lora_B, magnitude, bias=None, **options):
    return ops.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, 0.7, **options)


def plain_dora(x, weight, lora_A, lora_B, magnitude, bias=None):
    return unfused_dora(x, weight, bias, lora_A, lora_B, magnitude, 0.7)


def assert_dora(inputs, ours=dora):
    # The output without its scale is kept in x's dtype, and in the backward pass the scale meets B and not dy.
    assert_error_rule(ours, plain_dora, inputs, through={"magnitude": inputs["x"].dtype}, roundings=2)


@backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 24, 30, 2), (4, 9, 8, 2), (33, 255, 129, 16)])
def test_dora_linear(backend, dtype, adapter_dtype, shape):
    assert_dora(dora_inputs(*shape, dtype, adapter_dtype))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dora_trainable_weight_and_bias_get_gradients(backend, dtype):
    assert_dora(dora_inputs((3, 5), 33, 17, 4, dtype, frozen=False))


@backends
@pytest.mark.parametrize("only", ["x", "lora_A", "lora_B", "magnitude"])
def test_dora_forms_one_gradient_alone(backend, only):
    inputs = dora_inputs(6, 24, 40, 4, torch.float32, bias=False)
    assert_dora({name: t.detach().requires_grad_(name == only) for name, t in inputs.items()})


@backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1), (50, 77, 5), (20, 100, 33)])
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


@backends
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


@backends
def test_a_magnitude_of_zero_has_a_gradient(backend):
    inputs = dora_inputs(6, 24, 40, 4, torch.float32)
    with torch.no_grad():
        inputs["magnitude"][::2] = 0
    assert_dora(inputs)


@backends
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


@backends
@dtypes
@pytest.mark.parametrize("form", [(-1,), (-1, 1)])
def test_adalora_linear(backend, dtype, adapter_dtype, form):
    inputs = lora_inputs(33, 130, 65, 8, dtype, adapter_dtype)
    inputs["lora_E"] = random(8, dtype=adapter_dtype or dtype).detach().view(form).requires_grad_()
    ours, theirs = (functools.partial(f, scaling=-1.3) for f in (ops.adalora_linear, unfused_adalora))
    assert_error_rule(ours, theirs, inputs)


ACTIVATIONS = sorted(reference.ACTIVATIONS)


def assert_bottleneck(inputs, scaling=0.7, activation="relu"):
    ours, theirs = (in_both(f, scaling, activation) for f in (ops.bottleneck, unfused_bottleneck))
    assert_error_rule(ours, theirs, inputs)


@backends
@dtypes
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", [(5, 24, 17, 8), (33, 130, None, 20)])
def test_bottleneck(backend, dtype, adapter_dtype, activation, shape):
    assert_bottleneck(bottleneck_inputs(*shape, dtype, adapter_dtype), activation=activation)


@backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 9, 8, 1), (30, 150, 131, 33), (3, 40, None, 150)])
def test_bottleneck_without_biases(backend, dtype, adapter_dtype, shape):
    assert_bottleneck(bottleneck_inputs(*shape, dtype, adapter_dtype, biases=False), activation="gelu")


@backends
@dtypes
def test_bottleneck_learns_its_scaling(backend, dtype, adapter_dtype):
    inputs = bottleneck_inputs(21, 40, 64, 12, dtype, adapter_dtype)
    inputs["scaling"] = torch.tensor([1.7], dtype=adapter_dtype or dtype).requires_grad_()
    ours, theirs = (in_both(f, activation="silu") for f in (ops.bottleneck, unfused_bottleneck))
    assert_error_rule(ours, theirs, inputs)


@backends
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


@backends
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


def assert_multi_lora(inputs, slots, scaling, ranks=None):
    assert_error_rule(
        lambda y, **rest: ops.multi_lora(y.clone(), **rest, slots=slots, scaling=scaling, ranks=ranks),
        functools.partial(unfused_multi_lora, slots=slots, scaling=scaling, ranks=ranks),
        inputs,
    )


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 5, 3, 1, 1), (9, 33, 20, 4, 3), (64, 96, 130, 16, 5), (70, 40, 33, 3, 2)])
def test_multi_lora(backend, dtype, adapter_dtype, shape):
    slots = torch.randint(-1, shape[-1], (shape[0],))
    assert_multi_lora(multi_lora_inputs(*shape, dtype, adapter_dtype), slots, torch.randn(shape[-1]))


def assert_multi_lora_linear(inputs, slots, scaling, ranks=None):
    options = {"bias": None} if "bias" not in inputs else {}
    options |= {"slots": slots, "scaling": scaling, "ranks": ranks}
    ours, theirs = (functools.partial(f, **options) for f in (ops.multi_lora_linear, unfused_multi_lora_linear))
    assert_error_rule(ours, theirs, inputs)


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", [(1, 5, 3, 1, 1), (9, 33, 20, 4, 3), (70, 40, 33, 3, 2)])
def test_multi_lora_linear(backend, dtype, adapter_dtype, shape):
    slots = torch.randint(-1, shape[-1], (shape[0],))
    ranks = torch.randint(0, shape[3] + 1, shape[-1:])
    assert_multi_lora_linear(multi_layer_inputs(*shape, dtype, adapter_dtype), slots, torch.randn(shape[-1]), ranks)


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_layer_under_many_adapters_trains_its_weight_and_bias(backend, dtype):
    slots = torch.randint(-1, 3, (2 * 3 * 5,))
    assert_multi_lora_linear(multi_layer_inputs((2, 3, 5), 24, 30, 4, 3, dtype, frozen=False), slots, torch.randn(3))
    assert_multi_lora_linear(multi_layer_inputs((30,), 24, 30, 4, 3, dtype, bias=False), slots, torch.randn(3))


@backends
@pytest.mark.parametrize("tokens", [12, 90])
@pytest.mark.parametrize("only", ["x", "weight", "bias", "lora_A", "lora_B"])
def test_a_layer_under_many_adapters_forms_one_gradient_alone(backend, tokens, only):
    inputs = multi_layer_inputs(tokens, 20, 18, 4, 2, torch.float32)
    inputs = {name: t.detach().requires_grad_(name == only) for name, t in inputs.items()}
    assert_multi_lora_linear(inputs, torch.randint(-1, 2, (tokens,)), torch.randn(2))


@branch_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multi_lora_reads_no_rank_beyond_the_true_one(backend, dtype):
    inputs = multi_lora_inputs(20, 33, 18, 8, 4, dtype)
    ranks = torch.tensor([8, 3, 0, 1])
    slots = torch.randint(-1, 4, (20,), dtype=torch.int32)
    exact = {n: t.detach().clone().requires_grad_() for n, t in inputs.items()}
    for a, r in enumerate(ranks.tolist()):
        with torch.no_grad():
            inputs["lora_A"][a, r:] = float("nan")
            inputs["lora_B"][a, :, r:] = float("nan")
            exact["lora_A"][a, r:] = 0
            exact["lora_B"][a, :, r:] = 0

    def fused(y, x, lora_A, lora_B):
        hidden = {"lora_A": lora_A.clone(), "lora_B": lora_B.clone()}
        for a, r in enumerate(ranks.tolist()):
            hidden["lora_A"][a, r:] = float("nan")
            hidden["lora_B"][a, :, r:] = float("nan")
        return ops.multi_lora(y.clone(), x, **hidden, slots=slots, scaling=0.5, ranks=ranks)

    assert_error_rule(fused, functools.partial(unfused_multi_lora, slots=slots, scaling=[0.5] * 4, ranks=ranks), exact)
    y = ops.multi_lora(inputs["y"].clone(), inputs["x"], inputs["lora_A"], inputs["lora_B"], slots, 0.5, ranks)
    y.sum().backward()
    for a, r in enumerate(ranks.tolist()):
        assert not inputs["lora_A"].grad[a, r:].any()
        assert not inputs["lora_B"].grad[a, :, r:].any()
    assert torch.equal(y[slots == -1], inputs["y"][slots == -1])
    assert not inputs["x"].grad[(slots == -1) | (slots == 2)].any()
    assert all(torch.isfinite(t.grad).all() for t in inputs.values())


@branch_backends
def test_idle_adapters_get_zero_gradients_from_poisoned_memory(backend):
    inputs = multi_lora_inputs(6, 10, 12, 2, 5, torch.float32)
    slots = torch.tensor([3, 1, 3, -1, 1, 3])
    with poisoned_memory():
        ops.multi_lora(
            inputs["y"].clone(), inputs["x"], inputs["lora_A"], inputs["lora_B"], slots, 2.0
        ).sum().backward()
    for a in range(5):
        assert bool(inputs["lora_A"].grad[a].any()) == (a in (1, 3))
        assert bool(inputs["lora_B"].grad[a].any()) == (a in (1, 3))
    assert not inputs["x"].grad[3].any()


# --- shapes and strides ---


@branch_backends
@settings(max_examples=40)
@given(
    # A handful of outputs may cancel by chance, which a norm does not forgive: the smallest shapes stand in SHAPES.
    shape=st.tuples(st.integers(1, 40), st.integers(8, 300), st.integers(8, 300), st.integers(1, 20)),
    layout=st.sampled_from(["contiguous", "columns", "transposed", "expanded"]),
    weight_transposed=st.booleans(),
    dtypes=st.sampled_from(DTYPES + MIXED),
)
def test_lora_linear_takes_any_shape_and_strides(backend, shape, layout, weight_transposed, dtypes):
    torch.manual_seed(0)
    m, k, n, r = shape
    inputs = lora_inputs(m, k, n, r, *dtypes)
    if layout == "columns":
        inputs["x"] = random(m, k + 3, dtype=dtypes[0])[:, 1 : k + 1].detach().requires_grad_()
    if layout == "transposed":
        inputs["x"] = random(k, m, dtype=dtypes[0]).T.detach().requires_grad_()
    if weight_transposed:
        inputs["weight"] = random(k, n, dtype=dtypes[0]).T.detach()
    if layout == "expanded":
        inputs["x"] = random(1, k, dtype=dtypes[0])
        grown = functools.partial(lambda function, x, **rest: function(x.expand(m, k), **rest))
        assert_error_rule(functools.partial(grown, lora), functools.partial(grown, plain_lora), inputs)
    else:
        assert_error_rule(lora, plain_lora, inputs)


@backends
@settings(max_examples=40)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(8, 200), st.integers(8, 300), st.integers(1, 20)),
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


@backends
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


@branch_backends
@settings(max_examples=40)
@given(
    shape=st.tuples(*(st.integers(low, high) for low, high in ((1, 60), (8, 200), (8, 300), (1, 12), (1, 9)))),
    dtypes=st.sampled_from(DTYPES + MIXED),
    ranked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_multi_lora_takes_any_shape(backend, shape, dtypes, ranked, seed):
    torch.manual_seed(seed)
    t, _, _, r, num_adapters = shape
    ranks = torch.randint(0, r + 1, (num_adapters,)) if ranked else None
    slots = torch.randint(-1, num_adapters, (t,))
    assert_multi_lora(multi_lora_inputs(*shape, *dtypes), slots, torch.randn(num_adapters), ranks)


@branch_backends
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    depth=st.integers(8, 200),
    layers=st.lists(st.tuples(st.integers(8, 200), st.integers(1, 20)), min_size=1, max_size=3),
    layout=st.sampled_from(["contiguous", "columns", "transposed"]),
    weight_transposed=st.booleans(),
    dtypes=st.sampled_from(DTYPES + MIXED),
)
def test_a_group_takes_any_shape_and_strides(backend, rows, depth, layers, layout, weight_transposed, dtypes):
    torch.manual_seed(0)
    inputs = group_inputs(rows, depth, layers, *dtypes)
    if layout == "columns":
        inputs["x"] = random(rows, depth + 3, dtype=dtypes[0])[:, 1 : depth + 1].detach().requires_grad_()
    if layout == "transposed":
        inputs["x"] = random(depth, rows, dtype=dtypes[0]).T.detach().requires_grad_()
    if weight_transposed:
        inputs["weight0"] = random(depth, layers[0][0], dtype=dtypes[0]).T.detach()
    assert_error_rule(group, plain_group, inputs)


@backends
@dtypes
@pytest.mark.parametrize("shape", [(5, 12, 10), (60, 1, 30), (60, 12, 1)])
def test_weights_and_biases_of_odd_strides(backend, dtype, adapter_dtype, shape):
    m, k, n = shape
    for weight in (random(n, 2 * k, dtype=dtype)[:, ::2], random(k, 2 * n, dtype=dtype)[:, ::2].T):
        inputs = lora_inputs(m, k, n, 2, dtype, adapter_dtype)
        inputs |= {"weight": weight.detach(), "bias": random(2 * n, dtype=dtype)[::2].detach()}
        assert_error_rule(lora, plain_lora, inputs)
        if k > 1:  # a single element of a gradient may be off by chance
            scaled = {name: inputs[name] for name in ("x", "weight", "bias")} | {"ia3_l": random(k, dtype=dtype)}
            ours, theirs = (functools.partial(f, feedforward=True) for f in (ops.ia3_linear, unfused_ia3))
            assert_error_rule(ours, theirs, scaled)


@backends
@pytest.mark.parametrize("trains", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_A"), ("y", "lora_B")])
def test_multi_lora_forms_the_gradients_asked_for(backend, trains):
    inputs = multi_lora_inputs(12, 20, 18, 4, 3, torch.float32)
    inputs = {name: t.detach().requires_grad_(name in trains) for name, t in inputs.items()}
    assert_multi_lora(inputs, torch.randint(-1, 3, (12,)), torch.randn(3))


@backends
@pytest.mark.parametrize("layout", ["columns", "permuted", "sliced"])
def test_in_place_ops_write_through_any_strides(backend, layout):
    storage = torch.zeros(4, 6, 20)
    y = {
        "columns": storage[..., 3:13],
        "permuted": storage[..., :10].transpose(0, 1),
        "sliced": storage[::2, ::3, 5:15],
    }
    y = y[layout]
    outside = storage.clone().fill_(1.0)
    outside.as_strided(y.shape, y.stride(), y.storage_offset()).zero_()
    x, lora_A, lora_B = random(*y.shape[:-1], 8), random(3, 8), random(10, 3)
    with torch.no_grad():
        ops.lora_delta_(y, x, lora_A, lora_B, 0.5)
        torch.testing.assert_close(y, unfused_delta(x, lora_A, lora_B, 0.5))
        slots = torch.zeros(x.shape[:-1].numel(), dtype=torch.long)
        ops.multi_lora(y, x, lora_A[None], lora_B[None], slots, -0.5)
        torch.testing.assert_close(y, torch.zeros_like(y), atol=1e-6, rtol=0)
    assert not (storage * outside).any()


@backends
def test_in_place_gradient_through_a_view_that_is_not_rows(backend):
    def run(function):
        base = random(4, 6, 10).detach().requires_grad_()
        x, lora_A, lora_B = random(6, 4, 8), random(3, 8), random(10, 3)
        torch.manual_seed(5)
        y = (base * 2).transpose(0, 1)
        function(y, x, lora_A, lora_B).square().sum().backward()
        return base.grad, x.grad, lora_A.grad, lora_B.grad

    torch.manual_seed(3)
    ours = run(lambda y, x, a, b: ops.lora_delta_(y, x, a, b, 0.5))
    torch.manual_seed(3)
    theirs = run(lambda y, x, a, b: y + unfused_delta(x, a, b, 0.5))
    torch.testing.assert_close(ours, theirs)


@backends
def test_empty_batches_give_empty_outputs_and_zero_gradients(backend):
    for lead in [(0,), (2, 0)]:
        inputs = lora_inputs(lead, 8, 6, 2, torch.float32)
        out = lora(**inputs)
        assert out.shape == (*lead, 6)
        out.sum().backward()
        assert not inputs["lora_A"].grad.any()
        assert not inputs["lora_B"].grad.any()
        inputs = group_inputs(lead, 8, [(6, 2), (5, 1)], torch.float32)
        assert group(**inputs).shape == (*lead, 11)
        group(**inputs).sum().backward()
        assert not any(t.grad.any() for t in inputs.values() if t.requires_grad)
        inputs = lora_inputs(lead, 8, 6, 2, torch.float32)
        x, ia3_l = random(*lead, 8), random(8)
        assert ops.ia3_linear(x, inputs["weight"], None, ia3_l, True).shape == (*lead, 6)
        inputs = dora_inputs(lead, 8, 6, 2, torch.float32)
        assert dora(**inputs).shape == (*lead, 6)
        dora(**inputs).sum().backward()
        assert not any(inputs[name].grad.any() for name in ("lora_A", "lora_B", "magnitude"))
        inputs = {n: random(*lead, 8) if n == "x" else t for n, t in bottleneck_inputs(3, 8, None, 2, x.dtype).items()}
        out = in_both(ops.bottleneck)(**inputs)
        assert out.shape == (*lead, 8)
        out.sum().backward()
        assert not any(t.grad.any() for t in inputs.values())
    y = ops.multi_lora(
        torch.zeros(0, 6), random(0, 8), random(3, 2, 8), random(3, 6, 2), torch.zeros(0, dtype=int), 1.0
    )
    assert y.shape == (0, 6)
    for lead in ((0,), (2, 0)):
        inputs = multi_layer_inputs(lead, 8, 6, 2, 3, torch.float32)
        out = ops.multi_lora_linear(**inputs, slots=torch.zeros(0, dtype=int), scaling=1.0)
        assert out.shape == (*lead, 6)
        out.sum().backward()
        assert not any(t.grad.any() for t in inputs.values() if t.requires_grad)


# --- gradients, registration, compilation ---


@backends
def test_gradcheck(backend):
    double = functools.partial(random, dtype=torch.float64)
    x, weight, bias, lora_A, lora_B = double(2, 3, 5), double(4, 5), double(4), double(2, 5), double(4, 2)
    assert torch.autograd.gradcheck(lambda *a: ops.lora_linear(*a, 0.7), (x, weight, bias, lora_A, lora_B))

    def dropped(*args):
        torch.manual_seed(7)
        return ops.lora_linear(*args, 0.7, 0.4)

    assert torch.autograd.gradcheck(dropped, (x, weight, bias, lora_A, lora_B))

    def dropped_group(*args):
        torch.manual_seed(7)
        return ops.lora_linear_group(args[0], args[1:3], [args[3], None], args[4:6], args[6:], [0.7, -1.3], 0.4)

    layers = weight, double(3, 5), bias, lora_A, double(1, 5), lora_B, double(3, 1)
    assert torch.autograd.gradcheck(dropped_group, (x, *layers))
    y = double(2, 3, 4)
    assert torch.autograd.gradcheck(lambda y, *a: ops.lora_delta_(y.clone(), *a, 0.7), (y, x, lora_A, lora_B))
    for feedforward in (False, True):
        ia3_l = double(5 if feedforward else 4)
        ia3 = functools.partial(ops.ia3_linear, feedforward=feedforward)
        assert torch.autograd.gradcheck(ia3, (x, weight, bias, ia3_l))
    adalora = functools.partial(ops.adalora_linear, scaling=0.7)
    assert torch.autograd.gradcheck(adalora, (x, weight, bias, lora_A, double(2, 1), lora_B))
    # The norm is a constant by definition, which finite differences would see through: without it, dropout and all.
    with pytest.MonkeyPatch.context() as patch:
        norm = ops.dora_norm(weight, lora_A, lora_B, 0.7)
        patch.setattr("pyfastpeft.ops.dora.dora_norm", lambda *args: norm)

        def dropped_dora(*args):
            torch.manual_seed(7)
            return ops.dora_linear(*args, 0.7, 0.4)

        assert torch.autograd.gradcheck(dropped_dora, (x, weight, bias, lora_A, lora_B, double(4)))
    for activation in ACTIVATIONS:
        branch = lora_A, double(2), lora_B, double(4), double(1)
        parallel = functools.partial(ops.bottleneck, activation=activation)
        assert torch.autograd.gradcheck(parallel, (x, double(2, 3, 4), *branch))
        serial = in_both(ops.bottleneck, 0.7, activation)
        assert torch.autograd.gradcheck(serial, (double(2, 3, 5), lora_A, double(5, 2)))
    slots = torch.tensor([1, -1, 0, 2, 2, 0])
    ranks = torch.tensor([2, 1, 2])
    multi = lambda y, *a: ops.multi_lora(y.clone(), *a, slots, torch.tensor([0.5, -1.0, 2.0]), ranks)  # noqa: E731
    factors = double(3, 2, 5), double(3, 4, 2)
    assert torch.autograd.gradcheck(multi, (y, x, *factors))
    layer = lambda *a: ops.multi_lora_linear(*a, slots, torch.tensor([0.5, -1.0, 2.0]), ranks)  # noqa: E731
    assert torch.autograd.gradcheck(layer, (x, weight, bias, *factors))


def raw_arguments():
    """Arguments of every raw op, without autograd."""
    x, weight, bias, lora_A, lora_B = (random(*s, grad=False) for s in ((6, 8), (5, 8), (5,), (3, 8), (5, 3)))
    y, s, seed = torch.zeros(6, 5), torch.zeros(6, 3), torch.tensor([11])
    many_A, many_B = random(2, 3, 8, grad=False), random(2, 5, 3, grad=False)
    order, segments = torch.arange(6), torch.tensor([1, 4, 6])
    common = (many_A, many_B, torch.tensor([1.0, 2.0]), torch.tensor([3, 2]), order, segments)
    empty = torch.empty_like
    return {
        "lora_forward": (x, weight, bias, lora_A, lora_B, 0.5, 0.1, seed, y, s),
        "lora_backward": (y, x, weight, lora_A, lora_B, 0.5, 0.1, seed, s, empty(x), empty(lora_A), None),
        "lora_group_forward": (
            *(x, [weight, weight[:4]], [bias, None], lora_A, [lora_B[:, :2].clone(), lora_B[:4, 2:].clone()]),
            *([0.5, 2.0], 0.1, seed, [y, torch.zeros(6, 4)], s),
        ),
        "lora_group_backward": (
            *([y, y[:, :4].clone()], x, [weight, weight[:4]], lora_A),
            *([lora_B[:, :2].clone(), lora_B[:4, 2:].clone()], [0.5, 2.0], 0.1, seed, s),
            *(empty(x), empty(lora_A), [torch.empty(5, 2), torch.empty(4, 1)]),
        ),
        "ia3_forward": (x, weight, bias, bias, False, y, empty(y)),
        "ia3_backward": (y, None, weight, bias, False, y, empty(x), empty(bias)),
        "bottleneck_forward": (x, y, lora_A, lora_A[:, 0].clone(), lora_B, bias, 0.5, "gelu", empty(y), s),
        "bottleneck_backward": (
            *(y, x, lora_A, lora_A[:, 0].clone(), lora_B, 0.5, "gelu", s, False),
            *(empty(x), empty(lora_A), torch.empty(3), empty(lora_B)),
        ),
        "dora_norm": (weight, lora_A, lora_B, 0.5, None, torch.empty(5)),
        "dora_forward": (x, weight, bias, lora_A, lora_B, bias.abs(), 0.5, 0.1, seed, y, s, empty(y)),
        "dora_backward": (
            *(y, x, weight, lora_A, lora_B, bias.abs(), 0.5, 0.1, seed, s, y),
            *(empty(x), empty(lora_A), empty(lora_B), torch.empty(5)),
        ),
        "group_tokens": (torch.tensor([0, -1, 1, 0, 1, 0]), order.clone(), segments.clone()),
        # Of s nothing is written for tokens of no adapter and for unused ranks.
        "multi_lora_forward": (x, weight, bias, *common[:3], None, order, torch.tensor([0, 4, 6]), y, s),
        "multi_lora_backward": (y, x, weight, *common, torch.zeros_like(s), empty(x), empty(many_A), empty(many_B)),
    }


@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.pyfastpeft, op).default, raw_arguments()[op])
    torch.library.opcheck(getattr(torch.ops.pyfastpeft, f"{op}_new").default, raw_arguments()[op])


def tensors_of(arguments):
    lists = [argument if isinstance(argument, list) else [argument] for argument in arguments]
    return [argument for entries in lists for argument in entries if isinstance(argument, torch.Tensor)]


@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_what_compiled_graphs_run_returns_what_the_op_writes(op):
    arguments = raw_arguments()[op]
    untouched = copy.deepcopy(arguments)
    returned = getattr(torch.ops.pyfastpeft, f"{op}_new").default(*arguments)
    for argument, before in zip(tensors_of(arguments), tensors_of(untouched)):
        torch.testing.assert_close(argument, before, rtol=0, atol=0, equal_nan=True)
    getattr(torch.ops.pyfastpeft, op).default(*arguments)
    written = tensors_of(arguments[-schemas.SCHEMAS[op].count("!)") :])
    assert len(written) == len(returned)
    for value, argument in zip(returned, written):
        torch.testing.assert_close(value, argument, rtol=0, atol=0)


@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_native_and_python_schemas_agree(op):
    native_schema = str(getattr(torch.ops.pyfastpeft, op).default._schema)
    assert native_schema == str(torch._C.parse_schema(f"pyfastpeft::{op}{schemas.SCHEMAS[op]}"))


@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph_with_the_same_results(backend, dtype):
    slots = torch.tensor([0, 1, -1, 1, 0, 0, 1])

    def model(x, weight, bias, lora_A, lora_B, ia3_l, many_A, many_B):
        h = ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7).relu()
        layers = [weight, weight.T], [bias, None], [lora_A, lora_A[:1]], [lora_B, lora_B[:, :1]]
        gate, up = ops.lora_linear_group(h, *layers, [0.7, -1.3])
        h = h + gate.sigmoid() * up
        h = ops.ia3_linear(h, weight, bias, ia3_l, True)
        y = torch.nn.functional.linear(h, weight)
        y = ops.multi_lora(y, h, many_A, many_B, slots, 0.5)
        y = ops.multi_lora_linear(y, weight, bias, many_A, many_B, slots, 0.5)
        y = ops.dora_linear(y, weight, bias, lora_A, lora_B, ia3_l, 0.4)
        y = ops.adalora_linear(y, weight, bias, lora_A, ia3_l[:2], lora_B, 0.4)
        y = ops.bottleneck(y, y, lora_A, None, lora_B, bias, 0.6, "silu")
        y = ops.bottleneck(h, y, lora_A, None, lora_B, bias, ia3_l[:1], "gelu")
        return ops.lora_delta_(y, h, lora_A, lora_B, 0.3)

    inputs = [random(*s, dtype=dtype) for s in ((7, 8), (8, 8), (8,), (2, 8), (8, 2), (8,), (2, 3, 8), (2, 8, 3))]

    def run(function):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves)
        out.float().square().sum().backward()
        return [out.detach(), *(t.grad for t in leaves)]

    eager = run(model)
    torch.compiler.reset()
    for mine, theirs in zip(run(torch.compile(model, fullgraph=True)), eager):
        # A compiled graph rounds less often in between.
        assert (mine - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()


@backends
@pytest.mark.parametrize("n", [6, 9])
def test_compiled_in_place_ops_keep_the_gradients_of_views(backend, n):
    """The output of a linear with a bias on three dimensions is a view."""
    inputs = [random(*s) for s in ((2, 5, 6), (n, 6), (n,), (2, 6), (n, 2))]

    def model(x, weight, bias, lora_A, lora_B):
        y = torch.nn.functional.linear(x, weight, bias)
        y = ops.multi_lora(y, x, lora_A[None], lora_B[None], torch.zeros(10, dtype=torch.int64), 0.5).sin()
        return (
            ops.lora_delta_(torch.nn.functional.linear(x, weight, bias)[:, 1:], x[:, 1:], lora_A, lora_B, 0.3)
            + y[:, 1:]
        )

    def run(function):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        function(*leaves).square().sum().backward()
        return [t.grad for t in leaves]

    torch.compiler.reset()
    for mine, theirs in zip(run(torch.compile(model, fullgraph=True, backend="aot_eager")), run(model)):
        torch.testing.assert_close(mine, theirs)


@backends
def test_two_runs_are_bit_identical(backend):
    def run():
        torch.manual_seed(2)
        inputs = multi_lora_inputs(40, 300, 260, 8, 6, torch.float32)
        out = ops.multi_lora(inputs["y"].clone(), inputs["x"], inputs["lora_A"], inputs["lora_B"], slots, 0.3)
        out.square().sum().backward()
        return [out, *(t.grad for t in inputs.values())]

    slots = torch.randint(-1, 6, (40,))
    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


# --- dropout ---


def test_philox_has_the_published_words():
    """The known answers of Philox4x32-10 for the zero counter and key, and for all ones of the words we use."""
    zero = torch.tensor([0])
    words = [int(w) for w in reference.philox(zero, zero[0], zero[0])]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", [0, 123456789012345, -5])
def test_cpu_drops_what_the_reference_drops(dtype, seed):
    m, k, p = 37, 101, 0.3
    x, lora_A, lora_B = torch.ones(m, k, dtype=dtype), torch.eye(k, dtype=dtype), torch.zeros(1, k, dtype=dtype)
    s = torch.empty(m, k, dtype=reference.accumulation(dtype))
    torch.ops.pyfastpeft.lora_forward(
        x, None, None, lora_A, lora_B, 1.0, p, torch.tensor([seed]), torch.zeros(m, 1, dtype=dtype), s
    )
    torch.testing.assert_close(s, reference.dropout_factor(torch.tensor([seed]), p, m, k, s.dtype))


@branch_backends
@dtypes
def test_dropout_obeys_the_error_rule_with_its_mask(backend, dtype, adapter_dtype):
    inputs = lora_inputs(19, 130, 40, 4, dtype, adapter_dtype)
    torch.manual_seed(9)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))

    def fused(x, weight, bias, lora_A, lora_B):
        torch.manual_seed(9)
        return ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7, 0.25)

    def unfused(x, weight, bias, lora_A, lora_B):
        dropped = x.to(lora_A.dtype) * reference.dropout_factor(seed, 0.25, 19, 130, lora_A.dtype)
        base = torch.nn.functional.linear(x, weight, bias)
        return (base + unfused_delta(dropped, lora_A, lora_B, 0.7)).to(base.dtype)

    assert_error_rule(fused, unfused, inputs)


@branch_backends
@dtypes
def test_layers_of_a_group_share_one_mask(backend, dtype, adapter_dtype):
    torch.manual_seed(9)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,))

    def fused(**inputs):
        torch.manual_seed(9)
        return group(**inputs, dropout_p=0.25)

    def unfused(x, weights, biases, lora_As, lora_Bs):
        dropped = x.to(lora_As[0].dtype) * reference.dropout_factor(seed, 0.25, *x.shape, lora_As[0].dtype)
        bases = [torch.nn.functional.linear(x, *layer) for layer in zip(weights, biases)]
        branches = (unfused_delta(dropped, *layer) for layer in zip(lora_As, lora_Bs, SCALINGS))
        return [(base + branch).to(base.dtype) for base, branch in zip(bases, branches)]

    inputs = group_inputs(19, 130, [(40, 4), (33, 7)], dtype, adapter_dtype)
    assert_error_rule(fused, functools.partial(grouped, unfused), inputs)


@branch_backends
def test_dropout_follows_the_generator_and_keeps_its_share(backend):
    x, lora_A = torch.ones(50, 200), torch.eye(200)
    out = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        out.append(ops.lora_linear(x, torch.zeros(200, 200), None, lora_A, torch.eye(200), 1.0, 0.2))
    assert torch.equal(out[0], out[1])
    assert not torch.equal(out[0], out[2])
    share = (out[0] == 0).double().mean().item()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / out[0].numel()) ** 0.5
    torch.testing.assert_close(out[0][out[0] != 0].unique(), torch.tensor([1.25]))


# --- autocast, saved memory ---


@backends
def test_autocast_gives_its_dtype_and_trains_float32_parameters(backend):
    inputs = lora_inputs(6, 16, 12, 4, torch.float32, frozen=False)
    ia3_l = random(12)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lora(**inputs)
        scaled = ops.ia3_linear(inputs["x"], inputs["weight"], inputs["bias"], ia3_l, False)
        ops.lora_delta_(out, inputs["x"], inputs["lora_A"], inputs["lora_B"], 0.1)
        assert out.dtype == scaled.dtype == torch.bfloat16
        (out.float().square().sum() + scaled.float().square().sum()).backward()
    expected = plain_lora(**{n: t.double() for n, t in inputs.items()})
    expected = expected + unfused_delta(inputs["x"].double(), inputs["lora_A"].double(), inputs["lora_B"].double(), 0.1)
    torch.testing.assert_close(out.double(), expected, atol=0.05, rtol=0.05)
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in (*inputs.values(), ia3_l))


@backends
def test_autocast_of_dora_and_adalora(backend):
    inputs = dora_inputs(6, 16, 12, 4, torch.float32)
    lora_E, lora = random(4), {name: t for name, t in inputs.items() if name != "magnitude"}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = dora(**inputs), ops.adalora_linear(**lora, lora_E=lora_E, scaling=0.7)
    exact = plain_dora(**inputs), unfused_adalora(**lora, lora_E=lora_E, scaling=0.7)
    for out, wanted in zip(ours, exact):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.float(), wanted, atol=0.03, rtol=0.03)
        out.float().square().sum().backward()
    trained = (lora_E, *(inputs[name] for name in ("x", "lora_A", "lora_B", "magnitude")))
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in trained)


@branch_backends
def test_autocast_of_a_group(backend):
    inputs = group_inputs(6, 16, [(12, 4), (9, 2)], torch.float32, frozen=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = group(**inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), plain_group(**inputs), atol=0.03, rtol=0.03)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in inputs.values())


@branch_backends
def test_autocast_of_a_layer_under_many_adapters(backend):
    inputs = multi_layer_inputs(6, 16, 12, 4, 3, torch.float32, frozen=False)
    options = {"slots": torch.tensor([0, -1, 2, 1, 1, 0]), "scaling": torch.tensor([0.5, -1.3, 0.4])}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ops.multi_lora_linear(**inputs, **options)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), unfused_multi_lora_linear(**inputs, **options), atol=0.03, rtol=0.03)
    out.float().square().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.any() for t in inputs.values())


@backends
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


@backends
def test_backward_keeps_x_s_and_a_seed_alone(backend):
    inputs = lora_inputs(64, 256, 128, 8, torch.bfloat16, torch.float32)
    parameters = [inputs[n] for n in ("weight", "bias", "lora_A", "lora_B")]
    kept = saved_bytes(lambda: ops.lora_linear(**inputs, scaling=0.5, dropout_p=0.1), parameters)
    assert kept == 64 * 256 * 2 + 64 * 8 * 4 + 8


@branch_backends
def test_a_group_keeps_x_once(backend):
    inputs = group_inputs(64, 256, [(128, 8), (96, 5)], torch.bfloat16, torch.float32)
    kept = saved_bytes(lambda: group(**inputs, dropout_p=0.1), [t for name, t in inputs.items() if name != "x"])
    assert kept == 64 * 256 * 2 + 64 * 13 * 4 + 8


@branch_backends
def test_a_layer_under_many_adapters_keeps_x_s_and_a_routing(backend):
    inputs = multi_layer_inputs(64, 256, 128, 8, 3, torch.bfloat16, torch.float32)
    run = functools.partial(ops.multi_lora_linear, **inputs, slots=torch.arange(64) % 4 - 1, scaling=0.5)
    kept = saved_bytes(run, [inputs[name] for name in ("weight", "bias", "lora_A", "lora_B")])
    assert kept == 64 * 256 * 2 + 64 * 8 * 4 + (64 + 4) * 8 + 3 * 4


@backends
def test_dora_keeps_the_output_and_no_weight(backend):
    inputs = dora_inputs(64, 256, 128, 8, torch.bfloat16, torch.float32)
    parameters = [inputs[n] for n in ("weight", "lora_A", "lora_B")]
    kept = saved_bytes(lambda: dora(**inputs, dropout_p=0.1), parameters)
    assert kept == 64 * 256 * 2 + 64 * 8 * 4 + 64 * 128 * 2 + 2 * 128 * 4 + 8


@backends
def test_a_serial_bottleneck_keeps_x_and_s_alone(backend):
    inputs = bottleneck_inputs(64, 256, None, 8, torch.bfloat16, torch.float32)
    parameters = [inputs[n] for n in ("down", "up", "down_bias", "up_bias")]
    kept = saved_bytes(lambda: in_both(ops.bottleneck)(**inputs), parameters)
    assert kept == 64 * 256 * 2 + 64 * 8 * 4


def test_double_backward_is_refused():
    inputs = lora_inputs(3, 4, 5, 2, torch.float32)
    (gradient,) = torch.autograd.grad(lora(**inputs).square().sum(), inputs["lora_A"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_forward_mode_is_refused():
    inputs = {n: t.detach() for n, t in lora_inputs(3, 4, 5, 2, torch.float32).items()}
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: lora(**inputs | {"x": x}), (inputs["x"],), (torch.ones(3, 4),))
    inputs = {n: t.detach() for n, t in dora_inputs(3, 4, 5, 2, torch.float32).items()}
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: dora(**inputs | {"x": x}), (inputs["x"],), (torch.ones(3, 4),))
    inputs = {n: t.detach() for n, t in bottleneck_inputs(3, 4, None, 2, torch.float32).items()}
    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(lambda x: in_both(ops.bottleneck)(**inputs | {"x": x}), (inputs["x"],), (torch.ones(3, 4),))


@backends
def test_a_backward_pass_under_autocast_keeps_its_dtypes(backend):
    def gradients(under):
        inputs = {n: t.detach().requires_grad_(t.requires_grad) for n, t in held.items()}
        out = lora(**inputs)
        with torch.autocast("cpu", torch.bfloat16, enabled=under):
            out.square().sum().backward()
        return [t.grad for t in inputs.values() if t.requires_grad]

    held = lora_inputs(6, 16, 12, 4, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(gradients(True), gradients(False)))


# --- 16-bit values, NaN and infinity ---


@backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_read_and_rounded_as_torch_does(backend, dtype):
    y = torch.arange(64 * 1027).to(torch.int16).view(dtype).view(64, 1027)  # all of them, and a rest after every vector
    lora_B = random(1027, 1, grad=False) * 2.0 ** torch.randint(-26, 18, (1027, 1))
    lora_B[::2] = 2.0 ** lora_B[::2].abs().log2().floor()  # many sums halfway between two values
    expected = (y.float() + lora_B.T).to(dtype)
    ops.lora_delta_(y, torch.ones(64, 1, dtype=dtype), torch.ones(1, 1), lora_B, 1.0)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)


@backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_propagated(backend, value, dtype):
    for where, reached in {"x": "row", "lora_A": "all", "lora_B": "column", "bias": "column"}.items():
        inputs = {n: t.detach().abs() for n, t in lora_inputs(40, 30, 20, 4, dtype).items()}
        inputs[where].view(-1)[0] = value
        bad = ~torch.isfinite(lora(**inputs))
        assert bad[0, 0]
        expected = {"row": bad[0], "column": bad[:, 0], "all": bad}[reached]
        assert expected.all()
        assert bad.sum() == expected.numel()


@backends
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


@branch_backends
def test_a_dropped_nan_is_not_hidden(backend):
    x = torch.full((4, 64), float("nan"))
    out = ops.lora_linear(x, torch.zeros(8, 64), None, torch.ones(2, 64), torch.ones(8, 2), 1.0, 0.9)
    assert out.isnan().all()


@branch_backends
def test_base_only_tokens_never_meet_a_nan_adapter(backend):
    x, y = random(5, 8, grad=False), random(5, 6, grad=False)
    slots = torch.tensor([-1, 0, -1, 1, -1])
    bad = torch.full((2, 3, 8), float("nan"))
    out = ops.multi_lora(y.clone(), x, bad, torch.ones(2, 6, 3), slots, 1.0)
    assert torch.equal(out[slots == -1], y[slots == -1])
    assert out[slots >= 0].isnan().all()


@branch_backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [6, 100])
def test_a_bad_adapter_reaches_its_own_tokens_alone(backend, value, tokens):
    inputs = {n: t.detach() for n, t in multi_layer_inputs(tokens, 24, 40, 4, 2, torch.bfloat16).items()}
    slots = torch.arange(tokens) % 3 - 1
    for bad in ("lora_A", "lora_B"):
        changed = inputs | {bad: inputs[bad].clone()}
        changed[bad][1, 0, 0] = value
        x, own = changed["x"].clone().requires_grad_(), slots == 1
        y = ops.multi_lora_linear(**changed | {"x": x}, slots=slots, scaling=0.5)
        y.sum().backward()
        reached, gradients = (~torch.isfinite(t) for t in (y, x.grad))
        assert reached[own].any(1).all()
        assert gradients[own].any(1).all()
        assert not reached[~own].any()
        assert not gradients[~own].any()


# --- routing ---


@backends
@settings(max_examples=30)
@given(slots=st.lists(st.integers(-1, 6), max_size=50))
def test_route_groups_tokens_stably(backend, slots):
    for given_slots in (slots, torch.tensor(slots, dtype=torch.int64), torch.tensor(slots, dtype=torch.int32)):
        routing = ops.route(given_slots, 7)
        bounds = routing.segments.tolist()
        assert sorted(routing.order.tolist()) == list(range(len(slots)))
        for a in range(7):
            tokens = routing.order[bounds[a] : bounds[a + 1]].tolist()
            assert tokens == [t for t, slot in enumerate(slots) if slot == a]


@backends
def test_a_routing_serves_in_place_of_slots(backend):
    inputs = {n: t.detach() for n, t in multi_lora_inputs(9, 10, 12, 2, 3, torch.float32).items()}
    slots = torch.randint(-1, 3, (9,))
    y = inputs.pop("y")
    once = ops.multi_lora(y.clone(), **inputs, slots=slots, scaling=0.5)
    again = ops.multi_lora(y.clone(), **inputs, slots=ops.route(slots.tolist(), 3), scaling=0.5)
    assert torch.equal(once, again)


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_routing_made_by_hand_is_checked(backend):
    inputs = {n: t.detach() for n, t in multi_lora_inputs(4, 8, 6, 2, 1, torch.float32).items()}
    for order in ([0, 1, 2, 9], [0, 1, 1, 2], [-1, 0, 1, 2]):
        routing = ops.Routing(torch.tensor(order), torch.tensor([0, 4]))
        with pytest.raises(RuntimeError, match="order must be a permutation"):
            ops.multi_lora(**inputs, slots=routing, scaling=1.0)


# --- native calls ---


def alike(run, tensors):
    """run(**tensors) by the general path, with gradients and without: the latter two in one native call."""

    def train():
        leaves = {name: t.clone().requires_grad_() for name, t in tensors.items()}
        out = run(**leaves)
        out.backward(torch.arange(out.numel()).reshape(out.shape).to(out.dtype) % 7 - 3)
        return [out.detach(), *(t.grad for t in leaves.values() if t.grad is not None)]

    with poisoned_memory():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native_calls, "mode", lambda *_: None)
            general = train()
        trained = train()
        before = {name: t.clone() for name, t in tensors.items()}
        with torch.no_grad():
            called = run(**tensors)
    assert all(torch.equal(t, before[name]) for name, t in tensors.items())
    assert torch.equal(called, general[0])
    for ours, theirs in zip(trained, general):
        assert torch.equal(ours, theirs)


NATIVE_CALLS = (
    "lora_call",
    "lora_call_with_s",
    "lora_gradients",
    "lora_call_",
    "dora_call",
    "dora_gradients",
    "ia3_call",
    "ia3_gradients",
    "multi_lora_call",
    "multi_lora_call_",
)


@pytest.fixture
def worked(monkeypatch):
    """Whether every native call that was made did its work."""
    done = []
    for name in NATIVE_CALLS:

        def call(op, *args):
            result = op(*args)
            done.append(
                any(part is not None and part is not False for part in result)
                if type(result) is tuple
                else result is not None and result is not False
            )
            return result

        monkeypatch.setattr(native_calls, name, functools.partial(call, getattr(native_calls, name)))
    return done


@pytest.mark.parametrize("backend", ["cpu"])
@dtypes
@pytest.mark.parametrize("shape", [*SHAPES, ((2, 3), 20, 9, 4), ((0,), 5, 4, 2)])
def test_native_calls_give_the_same_bits(backend, dtype, adapter_dtype, shape, worked):
    inputs = {name: t.detach() for name, t in lora_inputs(*shape, dtype, adapter_dtype).items()}
    tokens = inputs["x"].shape[:-1].numel()
    alike(lora, inputs)
    alike(lambda bias, **rest: lora(**rest), inputs)
    magnitude = random(shape[2], dtype=adapter_dtype or dtype, grad=False)
    alike(functools.partial(ops.dora_linear, scaling=0.7), inputs | {"magnitude": magnitude})
    alike(functools.partial(ops.dora_linear, bias=None, scaling=0.7), inputs | {"magnitude": magnitude})
    y = random(*inputs["x"].shape[:-1], shape[2], dtype=dtype, grad=False)
    lora_A, lora_B = inputs["lora_A"], inputs["lora_B"]
    alike(
        lambda x, **ab: ops.lora_delta_(y.clone(), x, **ab, scaling=0.7),
        {"x": inputs["x"], "lora_A": lora_A, "lora_B": lora_B},
    )
    stacked = {"x": inputs["x"], "lora_A": torch.stack([lora_A, -lora_A]), "lora_B": torch.stack([lora_B, 2 * lora_B])}
    slots, scalings = torch.randint(-1, 2, (tokens,)), torch.randn(2, dtype=reference.accumulation(dtype))
    for ranks in (None, torch.tensor([shape[3] // 2, shape[3]])):
        for routing in (slots, ops.route(slots, 2)):
            for scaling in (scalings, 0.3):
                options = {"slots": routing, "scaling": scaling, "ranks": ranks}
                alike(lambda options=options, **t: ops.multi_lora(y.clone(), **t, **options), stacked)
                layer = functools.partial(ops.multi_lora_linear, **options, weight=inputs["weight"])
                alike(functools.partial(layer, bias=inputs["bias"]), stacked)
                alike(functools.partial(layer, bias=None), stacked)
    for feedforward in (False, True):
        vector = random(shape[1] if feedforward else shape[2], dtype=adapter_dtype or dtype, grad=False)
        scaled = {"x": inputs["x"], "weight": inputs["weight"], "ia3_l": vector}
        alike(functools.partial(ops.ia3_linear, feedforward=feedforward), scaled | {"bias": inputs["bias"]})
        alike(functools.partial(ops.ia3_linear, bias=None, feedforward=feedforward), scaled)
    assert worked == [tokens > 0] * (2 * 3 + 2 * 3 + 2 + 3 * 2 * 2 * 2 + 2 * 2 * 3)


@pytest.mark.parametrize("backend", ["cpu"])
@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (30, 70, 600, 9, 5))),
    dtypes=st.sampled_from(DTYPES + MIXED),
    gap=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_native_calls_give_the_same_bits_for_any_slots_and_strides_of_rows(backend, shape, dtypes, gap, seed):
    torch.manual_seed(seed)
    t, _, n, r, adapters = shape
    inputs = {name: tensor.detach() for name, tensor in multi_lora_inputs(*shape, *dtypes).items()}
    y = torch.zeros(t, n + gap, dtype=dtypes[0])[:, :n].copy_(inputs.pop("y"))
    slots, ranks = torch.randint(-1, adapters, (t,)), torch.randint(0, r + 1, (adapters,))
    general = ops.multi_lora(
        y.clone(), **inputs | {"x": inputs["x"].clone().requires_grad_()}, slots=slots, scaling=0.7, ranks=ranks
    )
    assert native_calls.multi_lora_call_(y, *inputs.values(), slots, None, None, 0.7, ranks)
    assert torch.equal(y, general)


def test_a_call_is_left_to_python_wherever_somebody_looks_on(worked):
    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **kwargs or {})

    class Subclass(torch.Tensor):
        pass

    inputs = {name: t.detach() for name, t in lora_inputs(4, 8, 6, 2, torch.float32).items()}
    zeros, slots = torch.zeros(4, 6), torch.tensor([0, -1, 0, 0])

    def native_by(y=zeros, scaling=0.5, dropout_p=0.0, **changed):
        """Whether all six ops (True) or none (False) are done by their native calls."""
        x, weight, lora_A, lora_B, bias = (inputs | changed).values()
        worked.clear()
        with suppress(Exception):  # what the general path makes of it is for other tests
            ops.lora_linear(x, weight, bias, lora_A, lora_B, scaling, dropout_p)
        with suppress(Exception):
            ops.lora_delta_(y, x, lora_A, lora_B, scaling, dropout_p)
        if dropout_p == 0:
            with suppress(Exception):
                ops.multi_lora(y, x, lora_A[None], lora_B[None], slots, scaling)
            with suppress(Exception):
                ops.multi_lora_linear(x, weight, bias, lora_A[None], lora_B[None], slots, scaling)
        if not changed.keys() - {"x"} and scaling == 0.5 and dropout_p == 0:
            with suppress(Exception):
                ops.ia3_linear(x, weight, bias, bias, False)
            with suppress(Exception):
                ops.dora_linear(x, weight, bias, lora_A, lora_B, bias, scaling)
        most = 6 - torch.is_autocast_enabled("cpu")  # DoRA's norm is that of the weight before it is cast
        assert sum(worked) in (0, most) or (torch.is_grad_enabled() and x.requires_grad)
        return any(worked)

    x = inputs["x"]
    assert native_by()
    with Mode():
        assert not native_by()
    with torch.autocast("cpu"):
        assert native_by()
        assert worked == [False, True] * 5 + [False]  # the op casts and calls itself without autocast
    with ops.use_backend("reference"):
        assert not native_by()
    with ops.use_backend("cpu"):
        assert native_by()
    with torch.autograd.forward_ad.dual_level():
        assert not native_by()
    with FakeTensorMode() as mode:
        assert not native_by(x=mode.from_tensor(x))
    for strange in (mode.from_tensor(x), x.as_subclass(Subclass), x.to("meta"), x.to_sparse(), None, [1.0], 1.0):
        assert not native_by(x=strange)
    for changed in (
        {"scaling": "high"},
        {"scaling": 1j},
        {"scaling": None},
        {"dropout_p": 0.1},
        {"lora_A": x[:2].int()},
    ):
        assert not native_by(**changed)
    trained = x.clone().requires_grad_()
    assert native_by(x=trained)
    assert worked == [True, True, True]  # forward passes of lora_linear, ia3_linear and dora_linear
    with torch.no_grad():
        assert native_by(x=trained)
    seen = []
    torch.vmap(lambda t: seen.append(native_by()) or t)(torch.zeros(2, 3))
    torch.func.grad(lambda t: seen.append(native_by()) or t.sum())(torch.zeros(2, 3))
    assert seen == [False, False]
    with torch.inference_mode():
        made = torch.zeros(4, 6)
        assert native_by(y=made)
    assert not native_calls.writable(made)
    assert not native_calls.writable(None)


def test_a_multi_lora_call_in_place_that_is_out_of_the_ordinary_writes_nothing():
    x, lora_A, lora_B = random(4, 8, grad=False), random(3, 2, 8, grad=False), random(3, 6, 2, grad=False)
    shared = torch.randn(8, 16)
    y, slots, ranks = torch.zeros(4, 6), torch.tensor([0, -1, 2, 1]), torch.tensor([2, 1, 0])
    plain = {"y": y, "x": x, "lora_A": lora_A, "lora_B": lora_B, "slots": slots, "segments": None}
    plain |= {"scalings": None, "scaling": 0.5, "ranks": ranks}
    for changed in (
        {"slots": torch.tensor([0, -2, 2, 1])},
        {"slots": torch.tensor([0, 3, 2, 1])},
        {"slots": slots.int()},
        {"slots": slots[:3]},
        {"slots": slots[:, None]},
        {"slots": slots.repeat_interleave(2)[::2]},
        {"slots": slots, "segments": torch.tensor([0, 1, 2, 4])},  # -1 is no token
        {"slots": torch.tensor([0, 1, 1, 3]), "segments": torch.tensor([0, 1, 2, 4])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 3, 2, 4])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 1, 2, 5])},
        {"slots": torch.arange(4), "segments": torch.tensor([-1, 1, 2, 4])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 1, 4])},
        {"slots": None},
        {"ranks": torch.tensor([2, 1, 3])},
        {"ranks": torch.tensor([2, -1, 0])},
        {"ranks": ranks.int()},
        {"ranks": ranks[:2]},
        {"scalings": torch.ones(3, dtype=torch.float64)},
        {"scalings": torch.ones(2)},
        {"y": torch.zeros(4, 5)},
        {"y": torch.zeros(3, 6)},
        {"y": torch.zeros(2, 2, 6)},
        {"y": torch.zeros(24)},
        {"y": torch.zeros(4, 6, dtype=torch.bfloat16)},
        {"y": torch.zeros(6, 4).T},
        {"y": torch.zeros(1, 6).expand(4, 6)},
        {"y": torch.zeros(9).as_strided((4, 6), (1, 1))},
        {"y": None},
        {"y": shared[:4, :6], "x": shared[:4, 5:13]},
        {"y": shared[:4, :6], "x": shared[2:6, 6:14]},
        {"y": shared.view(-1)[:24].view(4, 6), "lora_A": shared.view(-1)[23:71].view(3, 2, 8)},
        {"y": shared.view(-1)[35:59].view(4, 6), "lora_B": shared.view(-1)[:36].view(3, 6, 2)},
        {"x": torch.randn(8, 4).T},
        {"x": torch.randn(4, 7)},
        {"x": torch.zeros(4, 8, dtype=torch.int64), "y": torch.zeros(4, 6, dtype=torch.int64)},
        {"x": torch.tensor(1.0)},
        {"x": torch.zeros(0, 8), "y": torch.zeros(0, 6), "slots": slots[:0]},
        {"x": x.double(), "y": y.double()},
        {"lora_A": lora_A.bfloat16()},
        {"lora_A": lora_A.double(), "lora_B": lora_B.double()},
        {"lora_A": lora_A[0]},
        {"lora_A": lora_A[:2]},
        {"lora_A": torch.randn(3, 8, 2).mT},
        {"lora_A": lora_A.to("meta")},
        {"lora_A": lora_A.int(), "lora_B": lora_B.int()},
        {"lora_A": lora_A[:0], "lora_B": lora_B[:0]},
        {"lora_A": lora_A[:, :0], "lora_B": lora_B[:, :, :0]},
        {"lora_B": lora_B[:, :5]},
        {"lora_B": lora_B[0]},
        {"lora_B": lora_B[:, :, :1]},
    ):
        arguments = plain | changed
        before = arguments["y"] if arguments["y"] is None else arguments["y"].clone()
        assert native_calls.multi_lora_call_(**arguments) is False, changed
        assert before is None or torch.equal(arguments["y"], before)
    assert native_calls.multi_lora_call_(**plain)
    beside = plain | {"y": shared.view(-1)[:24].view(4, 6), "lora_A": shared.view(-1)[24:72].view(3, 2, 8)}
    assert native_calls.multi_lora_call_(**beside)


def test_a_multi_lora_call_that_is_out_of_the_ordinary_is_left_to_python():
    x, weight, bias = random(4, 8, grad=False), random(6, 8, grad=False), random(6, grad=False)
    lora_A, lora_B = random(3, 2, 8, grad=False), random(3, 6, 2, grad=False)
    plain = {"x": x, "weight": weight, "bias": bias, "lora_A": lora_A, "lora_B": lora_B}
    plain |= {"slots": torch.tensor([0, -1, 2, 1]), "segments": None, "scalings": None, "scaling": 0.5, "ranks": None}
    for changed in (
        {"slots": torch.tensor([0, 3, 2, 1])},
        {"slots": torch.arange(4), "segments": torch.tensor([0, 3, 2, 4])},
        {"ranks": torch.tensor([2, 1, 3])},
        {"scalings": torch.ones(2)},
        {"x": torch.randn(8, 4).T},
        {"x": torch.randn(4, 7)},
        {"x": torch.tensor(1.0)},
        {"x": x[:0], "slots": torch.zeros(0, dtype=torch.int64)},
        {"x": x.double()},
        {"x": None},
        {"weight": weight[:5]},
        {"weight": weight[:, :7]},
        {"weight": weight[0]},
        {"weight": weight.bfloat16()},
        {"weight": weight.to("meta")},
        {"weight": None},
        {"bias": bias[:5]},
        {"bias": bias.double()},
        {"bias": random(12, grad=False)[::2]},
        {"lora_A": lora_A.bfloat16()},
        {"lora_A": torch.randn(3, 8, 2).mT},
        {"lora_B": lora_B[:, :5]},
    ):
        assert native_calls.multi_lora_call(**plain | changed) is None, changed
    assert native_calls.multi_lora_call(**plain).shape == (4, 6)
    assert native_calls.multi_lora_call(**plain | {"bias": None, "weight": random(8, 6, grad=False).T}).shape == (4, 6)


def test_a_lora_call_that_is_out_of_the_ordinary_is_left_to_python():
    x, weight, bias, lora_A, lora_B = (random(*s, grad=False) for s in ((4, 8), (6, 8), (6,), (2, 8), (6, 2)))
    plain = {
        "x": x,
        "weight": weight,
        "bias": bias,
        "lora_A": lora_A,
        "lora_B": lora_B,
        "scaling": 0.5,
    }
    for changed in (
        {"weight": weight[:5]},
        {"weight": weight[:, :7]},
        {"weight": weight[0]},
        {"weight": weight[:0], "bias": bias[:0], "lora_B": lora_B[:0]},
        {"weight": weight.bfloat16()},
        {"weight": weight.to("meta")},
        {"weight": None},
        {"bias": bias[:5]},
        {"bias": bias[None]},
        {"bias": bias.half()},
        {"bias": bias.repeat_interleave(2)[::2]},
        {"lora_A": lora_A[:, :7]},
        {"lora_A": lora_A[:0], "lora_B": lora_B[:, :0]},
        {"lora_A": lora_A[None]},
        {"lora_A": torch.tensor(1.0)},
        {"lora_A": torch.randn(8, 2).T},
        {"lora_B": lora_B[:5]},
        {"lora_B": lora_B.half()},
        {"lora_A": lora_A.double(), "lora_B": lora_B.double()},
        {"x": x.double(), "weight": weight.double(), "bias": bias.double()},
        {"x": x[:0]},
        {"x": torch.randn(8, 4).T},
    ):
        assert native_calls.lora_call(**plain | changed) is None, changed
        if not changed.keys() & {"weight", "bias"}:
            y = torch.zeros(*(plain | changed)["x"].shape[:-1], 6)
            in_place = {name: t for name, t in (plain | changed).items() if name not in ("weight", "bias")}
            assert native_calls.lora_call_(y, **in_place) is False
            assert not y.any()
    assert native_calls.lora_call(**plain | {"weight": torch.randn(8, 6).T}) is not None
    in_place = {"lora_A": lora_A, "lora_B": lora_B, "scaling": 0.5}
    for y in (torch.zeros(3, 6), torch.zeros(4, 5), torch.zeros(2, 2, 6), torch.zeros(4, 6).half(), x[:, :6], None):
        assert native_calls.lora_call_(y, x, **in_place) is False
    assert native_calls.lora_call_(torch.zeros(4, 6), x, **in_place)


def test_an_ia3_call_that_is_out_of_the_ordinary_is_left_to_python():
    x, weight, bias, inner, outer = (random(*s, grad=False) for s in ((4, 8), (6, 8), (6,), (8,), (6,)))
    plain = {"x": x, "weight": weight, "bias": bias, "ia3_l": outer, "feedforward": False, "keep_base": True}
    for changed in (
        {"weight": weight[:5]},
        {"weight": weight[:, :7]},
        {"weight": weight.bfloat16()},
        {"weight": weight.to("meta")},
        {"bias": bias[:5]},
        {"bias": bias.half()},
        {"ia3_l": inner},
        {"ia3_l": outer[:, None]},
        {"ia3_l": outer.double()},
        {"ia3_l": outer.int()},
        {"ia3_l": outer.to("meta")},
        {"ia3_l": outer.repeat_interleave(2)[::2]},
        {"ia3_l": None},
        {"feedforward": True},
        {"x": x.double(), "weight": weight.double(), "bias": bias.double()},
        {"x": x[:0]},
        {"x": torch.randn(8, 4).T},
    ):
        assert native_calls.ia3_call(**plain | changed) == (None, None), changed
    y, base = native_calls.ia3_call(**plain)
    assert torch.equal(y, base * outer)
    y, base = native_calls.ia3_call(**plain | {"ia3_l": inner, "feedforward": True, "keep_base": False})
    assert y is not None
    assert base is None
    dy = random(4, 6, grad=False)
    for strange in (dy[:0], torch.randn(6, 4).T, dy.expand(2, 4, 6), dy.to("meta")):
        assert native_calls.ia3_gradients(strange, None, weight, outer, False, strange, True, True) == (None, None)


def test_a_dora_call_that_is_out_of_the_ordinary_is_left_to_python():
    plain = {name: t.detach() for name, t in lora_inputs(4, 8, 6, 2, torch.float32).items()}
    x, weight, bias, lora_A, lora_B = (plain[name] for name in ("x", "weight", "bias", "lora_A", "lora_B"))
    magnitude = torch.rand(6)
    plain |= {"magnitude": magnitude, "scaling": 0.5, "keep_unscaled": True}
    for changed in (
        {"weight": weight[:5]},
        {"weight": torch.randn(8, 6).T},
        {"weight": weight.bfloat16()},
        {"bias": bias[:5]},
        {"lora_A": lora_A[:1]},
        {"lora_A": lora_A.bfloat16()},
        {"lora_A": lora_A.to("meta")},
        {"lora_B": lora_B[:5]},
        {"magnitude": magnitude[:5]},
        {"magnitude": magnitude[:, None]},
        {"magnitude": magnitude.double()},
        {"magnitude": magnitude.int()},
        {"magnitude": magnitude.to("meta")},
        {"magnitude": magnitude.repeat_interleave(2)[::2]},
        {"magnitude": None},
        {"x": x[:0]},
        {"x": torch.randn(8, 4).T},
        {"x": x.double(), "weight": weight.double(), "bias": bias.double()},
    ):
        assert native_calls.dora_call(**plain | changed) == (None,) * 5, changed
    y, s, unscaled, scale, norm = native_calls.dora_call(**plain)
    assert torch.equal(y, unscaled * scale + bias)
    assert native_calls.dora_call(**plain | {"keep_unscaled": False})[2] is None
    dy, vectors, rest = random(4, 6, grad=False), (scale, norm), (0.5, 0.0, None, s)
    for strange in (dy[:0], torch.randn(6, 4).T, dy.expand(2, 4, 6), dy.to("meta")):
        given = strange, x, weight, lora_A, lora_B
        assert native_calls.lora_gradients(*given, *rest, True, True, True) == (None,) * 3
        assert native_calls.dora_gradients(*given, *vectors, *rest, unscaled, True, True, True, True) == (None,) * 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_native_call_is_traced_as_what_it_consists_of():
    inputs = {name: t.detach() for name, t in lora_inputs(4, 8, 6, 2, torch.float32).items()}
    lora_A, lora_B = inputs["lora_A"], inputs["lora_B"]

    def model(x):
        y = lora(**inputs | {"x": x})
        y = ops.multi_lora(ops.lora_delta_(y, x, lora_A, lora_B, 0.3), x, lora_A[None], lora_B[None], slots, 0.5)
        return ops.ia3_linear(x, inputs["weight"], inputs["bias"], y[0], False)

    slots, x = torch.tensor([0, -1, 0, 0]), random(4, 8, grad=False)
    traced = torch.jit.trace(model, inputs["x"], check_trace=False)
    assert torch.equal(traced(x), model(x))


def test_native_calls_compile_as_one_graph():
    inputs = [random(*s) for s in ((7, 8), (6, 8), (6,), (2, 8), (6, 2), (2, 2, 8), (2, 6, 2))]
    slots = torch.tensor([0, 1, -1, 1, 0, 0, 1])

    def model(x, weight, bias, lora_A, lora_B, many_A, many_B):
        y = ops.multi_lora(ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7), x, many_A, many_B, slots, 0.5)
        return ops.lora_delta_(y, x, lora_A, lora_B, 0.3)

    torch.compiler.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True)(*inputs), model(*inputs))


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
    monkeypatch.setattr(dispatch, "_forced", "fast")
    with pytest.raises(RuntimeError, match="'fast' does not exist; choose one of cuda, cpu, triton, addmm, reference"):
        lora(**inputs)
    with pytest.raises(ValueError, match="name is 'fast'; it must be one of"), ops.use_backend("fast"):
        pass


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


def test_a_compiled_graph_chooses_too(measured):
    args = lora_arguments(m=16)

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
