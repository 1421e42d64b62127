"""frozen_linear: torch's result, by whosoever product; test_cpu_isa.py lets ours serve more dtypes than here."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from error_rule import assert_error_rule, poisoned_memory, random

from pyfastpeft import ops
from pyfastpeft.ops import native_calls
from pyfastpeft.ops.dispatch import FLOATS
from pyfastpeft.ops.frozen import prefers_own_linear

pytestmark = [
    pytest.mark.usefixtures("two_threads", "on_backend"),
    pytest.mark.parametrize("backend", ["cpu"]),
]
floats = pytest.mark.parametrize("dtype", FLOATS)


def inputs_of(lead, k, n, dtype, bias=True, grad=True):
    lead = lead if isinstance(lead, tuple) else (lead,)
    inputs = {"x": random(*lead, k, dtype=dtype, grad=grad), "weight": random(n, k, dtype=dtype, grad=False)}
    return inputs | ({"bias": random(n, dtype=dtype, grad=False)} if bias else {})


@pytest.fixture
def native(monkeypatch):
    """The names of the native calls that did their work."""
    done = []

    def call(name, op, *args):
        result = op(*args)
        done.extend([name] * (result is not None))
        return result

    for name in ("linear_call", "linear_gradient"):
        monkeypatch.setattr(native_calls, name, partial(call, name, getattr(native_calls, name)))
    return done


@floats
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1),
        (5, 7, 3),
        (13, 600, 130),
        (130, 513, 70),
        (250, 800, 300),
        ((2, 3, 4), 40, 33),
        (1100, 9, 5),
        (100_000, 3, 2),
    ],
)
def test_frozen_linear(backend, dtype, bias, shape, native):
    inputs = inputs_of(*shape, dtype, bias)
    assert_error_rule(ops.frozen_linear, F.linear, inputs)
    own = ["linear_call", "linear_gradient"] if prefers_own_linear(inputs["weight"]) else []
    assert native == own


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(170, 25000, 330), (170, 330, 25000)])
def test_inputs_or_gradients_that_no_cache_holds(backend, dtype, shape):
    assert_error_rule(ops.frozen_linear, F.linear, inputs_of(*shape, dtype))


@floats
@pytest.mark.parametrize("layout", ["columns", "neither", "x", "dy"])
def test_any_strides(backend, dtype, layout):
    inputs = inputs_of(21, 70, 90, dtype)
    if layout == "columns":
        inputs["weight"] = inputs["weight"].T.contiguous().T
    elif layout == "neither":
        inputs["weight"] = random(90, 140, dtype=dtype, grad=False)[:, ::2]
    elif layout == "x":
        inputs["x"] = random(70, 21, dtype=dtype, grad=False).T.requires_grad_()
    turned = (lambda f: lambda **given: f(**given).T) if layout == "dy" else (lambda f: f)
    assert_error_rule(turned(ops.frozen_linear), turned(F.linear), inputs)


@floats
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, nullcontext])
def test_without_gradients(backend, dtype, context, native):
    inputs = inputs_of(17, 60, 31, dtype, grad=False)
    with context(), poisoned_memory():
        y = ops.frozen_linear(**inputs)
    exact = F.linear(*(t.double() for t in inputs.values()))
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=exact.norm().item() * torch.finfo(dtype).eps)
    assert native == ["linear_call"] * prefers_own_linear(inputs["weight"])
    assert not y.requires_grad


@pytest.mark.parametrize("trains", ["weight", "bias"])
def test_what_trains_is_left_to_torch(backend, trains, native):
    inputs = inputs_of(4, 20, 30, torch.float32)
    inputs[trains].requires_grad_()
    assert_error_rule(ops.frozen_linear, F.linear, inputs)
    assert not native
    with torch.no_grad():
        ops.frozen_linear(**inputs)
    assert native == ["linear_call"] * prefers_own_linear(inputs["weight"])


def test_gradients_of_gradients(backend):
    x, weight, bias = (t.double().requires_grad_(t.requires_grad) for t in inputs_of(4, 6, 5, torch.float32).values())
    for dtype in (torch.float64, torch.float32):
        given = [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in (x, weight, bias)]
        found = []
        for function in (ops.frozen_linear, F.linear):
            (first,) = torch.autograd.grad(function(*given).pow(3).sum(), given[0], create_graph=True)
            found.append((first, *torch.autograd.grad(first.sum(), given[0])))
        torch.testing.assert_close(*found)


def test_transforms_modes_and_autocast_see_torchs_own(backend):
    x, weight, bias = inputs_of((3, 4), 6, 5, torch.float32, grad=False).values()

    def loss(function):
        return lambda x: function(x, weight, bias).square().sum()

    ours, theirs = loss(ops.frozen_linear), loss(F.linear)
    assert torch.equal(torch.func.grad(ours)(x), torch.func.grad(theirs)(x))
    assert torch.equal(torch.func.vmap(ours)(x), torch.func.vmap(theirs)(x))
    assert torch.equal(torch.func.jvp(ours, (x,), (x,))[1], torch.func.jvp(theirs, (x,), (x,))[1])
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        y = ops.frozen_linear(leaf, weight, bias)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, F.linear(x, weight, bias))
        y.float().sum().backward()
    assert leaf.grad.dtype == torch.float32
    with ops.use_backend("reference"):
        assert torch.equal(ops.frozen_linear(x, weight, bias), F.linear(x, weight, bias))


def test_frozen_linear_compiles(backend):
    x, weight, bias = inputs_of(9, 20, 30, torch.float32).values()
    compiled = torch.compile(ops.frozen_linear, backend="aot_eager", fullgraph=True)
    found = [(y, *torch.autograd.grad(y.square().sum(), x)) for y in (f(x, weight, bias) for f in (compiled, F.linear))]
    torch.testing.assert_close(*found)


def test_nothing_and_nonsense_are_torchs(backend):
    _, weight, bias = inputs_of(1, 6, 5, torch.float32).values()
    assert ops.frozen_linear(torch.empty(0, 6), weight, bias).shape == (0, 5)
    for bad in (
        [torch.ones(3, 7), weight, bias],
        [torch.ones(3, 6).half(), weight, None],
        [torch.ones(3, 6), weight, bias[:2]],
    ):
        with pytest.raises(RuntimeError):
            ops.frozen_linear(*bad)
    nested = torch.nested.nested_tensor([torch.ones(2, 6), torch.ones(3, 6)])
    assert torch.equal(ops.frozen_linear(nested, weight, bias)[1], F.linear(nested, weight, bias)[1])


def test_gradients_of_wide_heads_are_formed_in_parts(backend):
    inputs = inputs_of(70, 8, 2**20, torch.bfloat16)  # more than 2**26 elements
    (dx,) = torch.autograd.grad(ops.frozen_linear(**inputs)[:, :3].sum(), inputs["x"])
    expected = inputs["weight"][:3].double().sum(0).expand(70, 8)
    torch.testing.assert_close(dx.double(), expected, rtol=0, atol=expected.norm().item() * 2**-8)
