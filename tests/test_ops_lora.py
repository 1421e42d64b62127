"""LoRA and AdaLoRA on every backend of this machine: lora_linear, lora_linear_group, lora_delta_, adalora_linear."""

import functools

import pytest
import torch
from error_rule import (
    DTYPES,
    MIXED,
    assert_error_rule,
    group_inputs,
    grouped,
    lora_inputs,
    poisoned_memory,
    random,
    unfused_adalora,
    unfused_delta,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import SCALINGS, SHAPES, backends, branch_backends, dtypes, group, lora, plain_group, plain_lora, ranks

from benchmarks.measure import saved_bytes
from pyfastpeft import ops
from pyfastpeft.ops import reference

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


# --- the error rule ---


@branch_backends
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_lora_linear(backend, dtype, adapter_dtype, shape):
    assert_error_rule(lora, plain_lora, lora_inputs(*shape, dtype, adapter_dtype))


BLOCKS = [  # M K N
    *((1, 700, 70), (6, 513, 65), (7, 512, 129), (97, 1030, 64), (200, 65, 1100), (1100, 40, 3)),
    *((16, 14336, 20), (16, 20, 14336), (20, 300, 61), (128, 800, 65), (129, 800, 65)),
]


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["rows", "columns", "neither"])
@pytest.mark.parametrize("shape", BLOCKS)
def test_base_products_that_take_several_blocks(backend, dtype, layout, shape):
    inputs = lora_inputs(*shape, 4, dtype)
    n, k = inputs["weight"].shape
    if layout == "columns":  # as Conv1D's
        inputs["weight"] = inputs["weight"].T.contiguous().T
    elif layout == "neither":
        inputs["weight"] = random(n, 2 * k, dtype=dtype, grad=False)[:, ::2]
    assert_error_rule(lora, plain_lora, inputs)


@pytest.mark.parametrize("backend", ["cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(5, 700, 70), (97, 1030, 64), (1100, 40, 3)])
def test_several_blocks_give_the_same_on_one_thread(backend, dtype, shape):
    """Also on so many threads that some do what others have left."""
    inputs = lora_inputs(*shape, 4, dtype)
    found = []
    for threads in (1, 2, 7):
        torch.set_num_threads(threads)
        with poisoned_memory():
            y = lora(**inputs)
            found.append((y, *torch.autograd.grad(y.float().square().sum(), [inputs["x"], inputs["lora_A"]])))
    for one, *others in zip(*found):
        assert all(torch.equal(one, other) for other in others)


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
@pytest.mark.parametrize("rows", [5, 60])
def test_a_group_of_transposed_weights(backend, dtype, rows):
    inputs = group_inputs(rows, 40, [(24, 4), (70, 4), (33, 4)], dtype)
    weights = [name for name in inputs if name.startswith("weight")]
    assert_error_rule(group, plain_group, inputs | {name: inputs[name].T.contiguous().T for name in weights})


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
@pytest.mark.parametrize("form", [(-1,), (-1, 1)])
def test_adalora_linear(backend, dtype, adapter_dtype, form):
    inputs = lora_inputs(33, 130, 65, 8, dtype, adapter_dtype)
    inputs["lora_E"] = random(8, dtype=adapter_dtype or dtype).detach().view(form).requires_grad_()
    ours, theirs = (functools.partial(f, scaling=-1.3) for f in (ops.adalora_linear, unfused_adalora))
    assert_error_rule(ours, theirs, inputs)


# --- shapes and strides ---


@branch_backends
@settings(max_examples=40)
@given(
    # A handful of numbers may cancel by chance, which a norm does not forgive: the smallest shapes stand in SHAPES.
    shape=st.tuples(st.integers(1, 40), st.integers(8, 300), st.integers(8, 300), ranks),
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


@branch_backends
@settings(max_examples=40)
@given(
    rows=st.integers(1, 40),
    depth=st.integers(8, 200),
    layers=st.lists(st.tuples(st.integers(8, 200), ranks), min_size=1, max_size=3),
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
        for i in range(len(layers)):
            inputs[f"weight{i}"] = random(depth, layers[i][0], dtype=dtypes[0]).T.detach()
    assert_error_rule(group, plain_group, inputs)


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


@dtypes
def test_torch_draws_the_masks_where_no_kernel_does(no_kernels, monkeypatch, dtype, adapter_dtype):
    mask = torch.rand(19, 130) < 0.75
    for module in ("lora", "lora_group"):
        monkeypatch.setattr(f"pyfastpeft.ops.{module}.masked", lambda x, p: x * mask.to(x.dtype))

    def unfused(x, weights, biases, lora_As, lora_Bs):
        dropped = x.to(lora_As[0].dtype) * mask / 0.75
        bases = [torch.nn.functional.linear(x, *layer) for layer in zip(weights, biases)]
        branches = (unfused_delta(dropped, *layer) for layer in zip(lora_As, lora_Bs, SCALINGS))
        return [(base + branch).to(base.dtype) for base, branch in zip(bases, branches)]

    def one_by_one(x, *layers):
        return [ops.lora_linear(x, *layer, 0.25) for layer in zip(*layers, SCALINGS)]

    inputs = group_inputs(19, 130, [(40, 4), (33, 7)], dtype, adapter_dtype)
    for fused in (functools.partial(group, dropout_p=0.25), functools.partial(grouped, one_by_one)):
        assert_error_rule(fused, functools.partial(grouped, unfused), inputs)


@pytest.mark.parametrize("frozen", [True, False])
def test_masks_of_torchs_in_a_compiled_graph(no_kernels, frozen):
    inputs = group_inputs(6, 12, [(12, 4), (12, 3)], torch.float32, frozen=frozen)
    inputs["x"] = random(2, 3, 12)
    almost_all = 1e-7  # of x is kept, so that two masks agree

    def one(x, weights, biases, lora_As, lora_Bs):
        return [ops.lora_linear(x, weights[0], biases[0], lora_As[0], lora_Bs[0], 0.7, almost_all)]

    def run(function):
        outs = function(**inputs)
        return outs, torch.autograd.grad(
            outs.square().sum(), [t for t in inputs.values() if t.requires_grad], allow_unused=True
        )

    for function in (functools.partial(group, dropout_p=almost_all), functools.partial(grouped, one)):
        torch.compiler.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(compiled), run(function))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mask_of_torchs_follows_the_generator_and_keeps_its_share(no_kernels, dtype):
    x, eye = torch.ones(50, 200, dtype=dtype), torch.eye(200, dtype=dtype)
    torch.manual_seed(1)
    out = ops.lora_linear(x, 0 * eye, None, eye, eye, 1.0, 0.2)
    torch.manual_seed(1)
    assert torch.equal(out, ops.lora_delta_(torch.zeros_like(x), x, eye, eye, 1.0, 0.2))
    share = (out == 0).double().mean().item()
    assert abs(share - 0.2) < 5 * (0.2 * 0.8 / out.numel()) ** 0.5
    assert out[out != 0].unique().tolist() == [1.25]


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


@branch_backends
def test_a_dropped_nan_is_not_hidden(backend):
    x = torch.full((4, 64), float("nan"))
    out = ops.lora_linear(x, torch.zeros(8, 64), None, torch.ones(2, 64), torch.ones(8, 2), 1.0, 0.9)
    assert out.isnan().all()
