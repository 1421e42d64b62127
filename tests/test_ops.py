"""All ops together, on every backend of this machine: strides, gradcheck, opcheck, compile, autocast.

Each op has a file of its own beside this one, test_ops_lora.py and so on. The Triton backend runs all of them under its
interpreter (test_triton_interpreter.py) and on a GPU (test_gpu.py).
"""

import copy
import functools

import pytest
import torch
from error_rule import (
    assert_error_rule,
    bottleneck_inputs,
    group_inputs,
    lora_inputs,
    multi_layer_inputs,
    random,
    unfused_adalora,
    unfused_delta,
    unfused_ia3,
)
from op_cases import (
    ACTIVATIONS,
    backends,
    branch_backends,
    dora,
    dora_inputs,
    dtypes,
    group,
    in_both,
    lora,
    plain_dora,
    plain_lora,
    raw_arguments,
)
from torch.utils.flop_counter import FlopCounterMode

from pyfastpeft import ops
from pyfastpeft.ops import schemas

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


# --- shapes and strides ---


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


@pytest.mark.parametrize("op", schemas.SCHEMAS)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.pyfastpeft, op).default, raw_arguments()[op])
    torch.library.opcheck(getattr(torch.ops.pyfastpeft, f"{op}_new").default, raw_arguments()[op])


@pytest.mark.parametrize("strict", [True, False])
def test_exports_for_any_number_of_tokens(strict):
    weight, lora_A, lora_B = random(8, 8, grad=False), random(2, 8, grad=False), random(8, 2, grad=False)

    class Ops(torch.nn.Module):
        def forward(self, x, slots):
            y = ops.multi_lora_linear(x, weight, None, lora_A[None], lora_B[None], slots, 0.5)
            y = ops.multi_lora(y, x, lora_A[None], lora_B[None], slots, 0.5)
            y = ops.lora_delta_(ops.lora_linear(y, weight, None, lora_A, lora_B, 0.5), x, lora_A, lora_B, 0.5)
            y = ops.dora_linear(
                ops.ia3_linear(y, weight, None, weight[0], False), weight, None, lora_A, lora_B, y[0], 0.5
            )
            y = ops.bottleneck(y, y, lora_A, None, lora_B, None, 0.5)
            return sum(ops.lora_linear_group(y, [weight, weight.T], [None] * 2, [lora_A] * 2, [lora_B] * 2, [0.5, 0.7]))

    example = random(4, 8, grad=False), torch.tensor([0, -1, 0, 0])
    tokens = {0: torch.export.Dim("tokens", min=2, max=64)}
    exported = torch.export.export(Ops(), example, dynamic_shapes=(tokens, tokens), strict=strict).module()
    x, slots = random(9, 8, grad=False), torch.tensor([0, -1, 0, 0, -1, 0, 0, -1, 0])
    torch.testing.assert_close(exported(x, slots), Ops()(x, slots))


def test_raw_ops_refuse_factors_without_columns():
    x, dy, lora_A, lora_B, vector, s = (torch.randn(*shape) for shape in ((6, 8), (6, 5), (0, 8), (5, 0), (0,), (6, 0)))
    run, narrow_A, narrow_s = torch.ops.pyfastpeft, torch.randn(3, 8), torch.empty(6, 3)
    for call in (
        lambda: run.dora_norm(torch.randn(5, 8), lora_A, lora_B, 0.5, None, torch.empty(5)),
        lambda: run.dora_norm(torch.randn(5, 0), torch.randn(3, 0), torch.randn(5, 3), 0.5, None, torch.empty(5)),
        lambda: run.bottleneck_forward(x, dy, lora_A, vector, lora_B, None, 0.5, "relu", torch.empty(6, 5), s),
        lambda: run.lora_forward(x, None, None, narrow_A, torch.empty(0, 3), 0.5, 0.0, None, s, narrow_s),
    ):
        with pytest.raises(RuntimeError, match="must have at least one column"):
            call()


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
    compiler = "inductor" if dtype == torch.bfloat16 else "aot_eager"  # whose code takes long to compile
    for mine, theirs in zip(run(torch.compile(model, fullgraph=True, backend=compiler)), eager):
        # A compiled graph rounds less often in between.
        assert (mine - theirs).norm() <= 4 * torch.finfo(dtype).eps * theirs.norm()


def of_every_op(m, k, n, r):
    """op -> a function of nothing that runs it on leaves that require grad, with dropout where it has some."""
    layer, many = lora_inputs((2, m), k, n, r, torch.float32), multi_layer_inputs(m, k, n, r, 3, torch.float32)
    several, slots = group_inputs(m, k, [(n, r), (n + 2, r + 1)], torch.float32), torch.randint(-1, 3, (m,))
    served = {"slots": slots, "scaling": 0.5, "ranks": torch.tensor([r, 0, (r + 1) // 2])}
    trained = lora_inputs(m, k, n, r, torch.float32, frozen=False)
    factors = {name: many[name] for name in ("x", "lora_A", "lora_B")}
    return {
        "lora": lambda: lora(**layer),
        "lora_whole": lambda: lora(**trained),
        "lora_dropout": lambda: ops.lora_linear(**layer, scaling=0.5, dropout_p=0.3),
        "delta": lambda: ops.lora_delta_(torch.zeros(2, m, n), layer["x"], layer["lora_A"], layer["lora_B"], 0.5),
        "lora_frozen_A": lambda: lora(**layer | {"lora_A": layer["lora_A"].detach()}),
        "group": lambda: group(**several),
        "dora": lambda: dora(**dora_inputs(m, k, n, r, torch.float32)),
        "ia3": lambda: ops.ia3_linear(layer["x"], layer["weight"], None, random(n), False),
        "ia3_feedforward": lambda: ops.ia3_linear(layer["x"], layer["weight"], None, random(k), True),
        "serial": lambda: in_both(ops.bottleneck)(**bottleneck_inputs(m, k, None, r, torch.float32)),
        "parallel": lambda: in_both(ops.bottleneck)(**bottleneck_inputs(m, k, n, r, torch.float32)),
        "multi_lora": lambda: ops.multi_lora(torch.zeros(m, n), **factors, **served),
        "multi_lora_linear": lambda: ops.multi_lora_linear(**many, **served),
        "frozen_linear": lambda: ops.frozen_linear(layer["x"], layer["weight"], layer["bias"]),
    }


def counted(run, train):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(train):
        y = run()
        if train:
            y.sum().backward()
    return counter.get_total_flops()


@branch_backends
@pytest.mark.parametrize("op", of_every_op(1, 1, 1, 1))
@pytest.mark.parametrize("train", [False, True])
def test_flop_counter_counts_kernels_as_their_formulas(backend, op, train):
    if backend == "addmm" and "ia3" in op:
        pytest.skip("no low-rank branch")
    run = of_every_op(*torch.randint(1, 40, (4,)).tolist())[op]
    with ops.use_backend("autograd"):
        expected = counted(run, train)
    assert counted(run, train) == expected > 0


def test_flop_counter_counts_in_exported_graphs_and_without_values():
    sizes = torch.randint(2, 40, (4,)).tolist()
    inputs = multi_layer_inputs(*sizes, 3, torch.float32)
    shapes = {name: tensor.to("meta") for name, tensor in inputs.items()}
    slots = torch.zeros(sizes[0], dtype=torch.int64, device="meta")
    found = counted(lambda: ops.multi_lora_linear(**shapes, slots=slots, scaling=0.5), False)
    plain = {name: tensor[0] if "lora" in name else tensor for name, tensor in inputs.items()}
    assert found == counted(lambda: lora(**plain), False)  # as if all tokens had an adapter of full rank
    layer = torch.nn.Module()
    layer.forward = lora
    exported = torch.export.export(layer, (), plain).module()
    assert found == counted(lambda: exported(**plain), False)


def test_a_compiled_graph_takes_scalings_that_change():
    """The compiler makes a symbol of them, which is not asked whether it is finite."""
    x, weight, lora_A, lora_B = (random(*s, grad=False) for s in ((4, 8), (8, 8), (2, 8), (8, 2)))

    def model(scaling):
        y = ops.lora_linear(x, weight, None, lora_A, lora_B, scaling)
        return ops.multi_lora(y, x, lora_A[None], lora_B[None], torch.zeros(4, dtype=torch.int64), scaling)

    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for scaling in (0.5, 0.7, -1.1):
        torch.testing.assert_close(compiled(scaling), model(scaling))


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
