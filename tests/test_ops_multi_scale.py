"""multi_scale: by torch's operations, and in one native call on the CPU."""

import functools

import pytest
import torch
from error_rule import assert_error_rule, poisoned_memory, random
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import dtypes

from pyfastpeft import ops
from pyfastpeft.ops import native_calls, reference

SHAPES = [(1, 1, 1), (7, 5, 3), (33, 129, 8), (200, 300, 2)]  # T D L


def unfused(x, scale, slots, shift=None):
    """Row by row."""
    rows = []
    for row, slot in zip(x, slots.tolist()):
        if slot >= 0:
            row = row * scale[slot] + (0 if shift is None else shift[slot])
        rows.append(row.to(x.dtype))
    return torch.stack(rows)


def operands(tokens, features, count, dtype, scale_dtype=None):
    x, (scale, shift) = (
        random(tokens, features, dtype=dtype),
        (random(count, features, dtype=scale_dtype or dtype) for _ in range(2)),
    )
    return {"x": x, "scale": scale, "shift": shift}, torch.randint(-1, count, (tokens,))


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_multi_scale(dtype, adapter_dtype, shape):
    inputs, slots = operands(*shape, dtype, adapter_dtype)
    for routing in (slots, slots.to(torch.int16), ops.route(slots, shape[2])):
        ours = functools.partial(ops.multi_scale, slots=routing)
        assert_error_rule(ours, functools.partial(unfused, slots=slots), inputs)
        del inputs["shift"]
        assert_error_rule(ours, functools.partial(unfused, slots=slots), inputs)
        inputs["shift"] = random(*inputs["scale"].shape, dtype=inputs["scale"].dtype)


@pytest.mark.parametrize("backend", ["cpu"])  # for test_cpu_isa.py
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_native_call_gives_the_same_bits(backend, dtype, shape, monkeypatch):
    inputs, slots = operands(*shape, dtype, reference.accumulation(dtype))
    inputs = {name: t.detach() for name, t in inputs.items()}
    call, done = native_calls.multi_scale_call, []
    monkeypatch.setattr(native_calls, "multi_scale_call", lambda *args: done.append(call(*args)) or done[-1])
    for shift in (inputs.pop("shift"), None):
        for routing in (slots, ops.route(slots, shape[2])):
            general = ops.multi_scale(inputs["x"].clone().requires_grad_(), inputs["scale"], routing, shift)
            with poisoned_memory():
                assert torch.equal(ops.multi_scale(**inputs, slots=routing, shift=shift), general)
    assert len(done) == 4
    assert all(y is not None for y in done)


@settings(max_examples=60)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (40, 600, 5))),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    gap=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_rows_that_lie_apart(shape, dtype, gap, seed):
    torch.manual_seed(seed)
    inputs, slots = operands(*shape, dtype, reference.accumulation(dtype))
    inputs = {name: t.detach() for name, t in inputs.items()}
    apart = torch.zeros(shape[0], shape[1] + gap, dtype=dtype)[:, : shape[1]].copy_(inputs["x"])
    expected = ops.multi_scale(**inputs, slots=slots)
    assert torch.equal(ops.multi_scale(**inputs | {"x": apart}, slots=slots), expected)
    assert torch.equal(ops.multi_scale(**inputs | {"x": apart.T.contiguous().T}, slots=slots), expected)


def test_leading_dimensions_and_no_tokens():
    inputs, slots = operands(12, 6, 2, torch.float32)
    expected = ops.multi_scale(**inputs, slots=slots)
    inputs["x"] = inputs["x"].reshape(3, 4, 6)
    assert torch.equal(ops.multi_scale(**inputs, slots=slots), expected.view(3, 4, 6))
    empty = torch.zeros(0, 6, requires_grad=True)
    y = ops.multi_scale(empty, inputs["scale"], torch.zeros(0, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 6)
    assert not inputs["scale"].grad.any()


def test_nan_and_infinity_stay_with_their_tokens():
    x, scale = torch.randn(6, 40), torch.randn(3, 40)
    x[1], scale[2] = torch.nan, torch.inf
    slots = torch.tensor([0, 0, -1, 2, 1, 1])
    for y in (ops.multi_scale(x, scale, slots), ops.multi_scale(x.clone().requires_grad_(), scale, slots)):
        assert y.isfinite().all(1).tolist() == [True, False, True, False, True, True]


def test_what_is_not_finite_in_a_slot_stays_out_of_the_gradients_of_others():
    x, scale, shift = (torch.randn(*shape, requires_grad=True) for shape in ((4, 5), (2, 5), (2, 5)))
    bad = scale.detach().clone()
    bad[0] = torch.nan
    bad.requires_grad_()
    slots = torch.tensor([-1, 1, 1, -1])
    for table in (scale, bad):
        x.grad = None
        ops.multi_scale(x, table, slots, shift).sum().backward()
        assert torch.equal(x.grad[slots == 1], scale[1].detach().expand(2, 5))
        assert (x.grad[slots == -1] == 1).all()
        assert torch.equal(table.grad[0], torch.zeros(5))


def test_gradients_of_gradients_and_one_graph():
    inputs, slots = operands(5, 4, 3, torch.float64)
    run = lambda x, scale, shift: ops.multi_scale(x, scale, slots, shift)  # noqa: E731
    assert torch.autograd.gradcheck(run, tuple(inputs.values()))
    assert torch.autograd.gradgradcheck(run, tuple(inputs.values()))
    torch.compiler.reset()
    compiled = torch.compile(ops.multi_scale, fullgraph=True, backend="aot_eager")
    for routing in (slots, ops.route(slots, 3)):
        assert torch.equal(compiled(**inputs, slots=routing), ops.multi_scale(**inputs, slots=routing))


def routing(*parts):
    return ops.Routing(*map(torch.tensor, parts))


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, r"x is \[1.0\]"),
        ({"x": torch.ones(4, 7)}, ValueError, r"scale is .* of shape \[3, 6\].* \[L, D\] with D = 7, as x has"),
        ({"x": torch.ones(4, 6).int()}, TypeError, "x is a torch.int32 tensor"),
        ({"scale": torch.ones(6)}, ValueError, r"scale is .* of shape \[6\].* of shape \[L, D\]"),
        ({"scale": torch.ones(0, 6)}, ValueError, "scale is .* L >= 1"),
        ({"scale": torch.ones(3, 6).double()}, TypeError, "scale is .* no wider than float32 while x is"),
        ({"scale": torch.ones(3, 6, device="meta")}, ValueError, "scale is .* on cpu, where x is"),
        ({"shift": torch.ones(3, 5)}, ValueError, r"shift is .* of shape \[L, D\] = \[3, 6\]"),
        ({"shift": torch.ones(3, 6).bfloat16()}, TypeError, "shift is .* of dtype torch.float32, as scale is"),
        ({"slots": [0, 1, 2, 0]}, TypeError, r"slots is \[0, 1, 2, 0\].* a tensor of T integers or a Routing"),
        ({"slots": torch.ones(4)}, TypeError, "slots is .* an integer tensor"),
        ({"slots": torch.tensor([0, 1])}, ValueError, r"slots is .* of shape \[T\] = \[4\]"),
        ({"slots": torch.tensor([0, 3, 0, 0])}, ValueError, r"slots is between 0 and 3; it must be in \[-1, 3\)"),
        ({"slots": torch.tensor([0, -2, 0, 0])}, ValueError, "slots is between -2 and 0"),
        ({"slots": ops.route([0, 1], 3)}, ValueError, r"slots.order \[T\] is"),
        ({"slots": ops.route([0, 1, 1, 1], 2)}, ValueError, r"slots.segments \[L \+ 1\] is"),
        ({"slots": routing([0, 0, 2, 1], [0, 1, 2, 4])}, ValueError, r"slots.order .* a permutation of the tokens"),
        ({"slots": routing([0, 7, 2, 1], [0, 1, 2, 4])}, ValueError, r"slots.order .* a permutation of the tokens"),
        (
            {"slots": routing([0, 3, 2, 1], [0, 3, 2, 4])},
            ValueError,
            r"slots.segments .* is \[0, 3, 2, 4\].* \[0, 4\]",
        ),
        (
            {"slots": routing([0, 3, 2, 1], [0, 1, 2, 5])},
            ValueError,
            r"slots.segments .* is \[0, 1, 2, 5\].* \[0, 4\]",
        ),
    ],
)
def test_bad_input(changed, error, message):
    given = {"x": torch.ones(4, 6), "scale": torch.ones(3, 6), "slots": torch.zeros(4, dtype=torch.int64)} | changed
    with pytest.raises(error, match=f"multi_scale: {message}"):
        ops.multi_scale(**given)
