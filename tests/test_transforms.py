"""Gradients of gradients, forward mode and the transforms of torch.func: every op beside its formula, then models."""

import functools

import peft
import pytest
import torch
from error_rule import (
    lora_inputs,
    random,
    unfused_adalora,
    unfused_bottleneck,
    unfused_dora,
    unfused_group,
    unfused_ia3,
    unfused_lora,
    unfused_multi_lora_linear,
)
from tiny_models import VOCABULARY, llama
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import pyfastpeft
from pyfastpeft import ops

SLOTS, RANKS = torch.tensor([1, -1, 0]), torch.tensor([2, 1])
PAIRS = {  # of (x, weight, lora_A, lora_B): the op, and its formula
    "lora": [lambda x, w, A, B, f=f: f(x, w, B[:, 0], A, B, 0.7) for f in (ops.lora_linear, unfused_lora)],
    "delta": [
        lambda x, w, A, B: ops.lora_delta_(x @ w.T, x, A, B, 0.7),
        lambda x, w, A, B: unfused_lora(x, w, None, A, B, 0.7),
    ],
    "group": [
        lambda x, w, A, B, f=f: torch.cat(
            f(x, [w, w[:2]], [None, B[:2, 0]], [A, A[:1]], [B, B[:2, :1]], [0.7, 2.0]), -1
        )
        for f in (ops.lora_linear_group, unfused_group)
    ],
    "dora": [lambda x, w, A, B, f=f: f(x, w, None, A, B, B[:, 1], 0.7) for f in (ops.dora_linear, unfused_dora)],
    "adalora": [
        lambda x, w, A, B, f=f: f(x, w, None, A, A[:, 0], B, 0.7) for f in (ops.adalora_linear, unfused_adalora)
    ],
    "ia3 input": [lambda x, w, A, B, f=f: f(x, w, B[:, 0], A[0], True) for f in (ops.ia3_linear, unfused_ia3)],
    "ia3 output": [
        lambda x, w, A, B, f=f: f(x, w, B[:, 0], A[0, 0] + B[:, 1], False) for f in (ops.ia3_linear, unfused_ia3)
    ],
    "bottleneck": [
        lambda x, w, A, B, f=f: f(x, x @ w.T, A, A[:, 0], B, B[:, 0], 0.7, "gelu")
        for f in (ops.bottleneck, unfused_bottleneck)
    ],
    "multi_lora_linear": [
        lambda x, w, A, B, f=f: f(
            x, w, None, torch.stack([A, 2 * A]), torch.stack([B, B + 1]), SLOTS, torch.tensor([0.7, 2.0]), RANKS
        )
        for f in (ops.multi_lora_linear, unfused_multi_lora_linear)
    ],
}
PAIRS["multi_lora"] = [
    lambda x, w, A, B: ops.multi_lora(
        x @ w.T, x, torch.stack([A, 2 * A]), torch.stack([B, B + 1]), SLOTS, torch.tensor([0.7, 2.0]), RANKS
    ),
    PAIRS["multi_lora_linear"][1],
]
pairs = pytest.mark.parametrize("op", PAIRS)
ALL = (0, 1, 2, 3)
close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def operands():
    return [random(*shape, dtype=torch.float64, grad=False) for shape in ((3, 4), (5, 4), (2, 4), (5, 2))]


def summed(function):
    return lambda *given: function(*given).pow(3).sum()


@pairs
def test_gradients_of_gradients(op):
    def second(function):
        leaves = [t.clone().requires_grad_() for t in given]
        first = torch.autograd.grad(summed(function)(*leaves), leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)

    given, (ours, formula) = operands(), PAIRS[op]
    with pyfastpeft.use_backend("autograd"):
        found = second(ours)
    close(found, second(formula))


@pytest.mark.parametrize("tokens", [3, 0])
def test_gradients_of_adapters_without_tokens_are_zero(tokens):
    x, weight, lora_A, lora_B = operands()
    lora_A, lora_B = (torch.stack([t, t]).requires_grad_() for t in (lora_A, lora_B))
    slots = torch.full((tokens,), -1)
    with pyfastpeft.use_backend("autograd"):
        y = ops.multi_lora_linear(x[:tokens], weight, None, lora_A, lora_B, slots, 0.7)
    close(y, x[:tokens] @ weight.T)
    for gradient in torch.autograd.grad(y.sum(), (lora_A, lora_B)):
        assert not gradient.any()


@pairs
def test_kernels_refuse_gradients_of_gradients(op):
    """Also where torch.autograd.grad asks for something further on than the op, which it finds to get zero."""
    x, *others = (t.float() for t in operands())
    others[1].requires_grad_()
    with pytest.raises(RuntimeError, match=r"create_graph must be False.*use_backend\(.autograd.\)"):
        torch.autograd.functional.hessian(lambda x: PAIRS[op][0](x, *others).square().sum(), x)


@pairs
def test_many_gradients_at_a_time(op):
    given, (ours, formula) = [t.requires_grad_() for t in operands()], PAIRS[op]

    def batched(output):
        basis = torch.eye(output.numel(), dtype=output.dtype).view(-1, *output.shape)
        return torch.autograd.grad(output, given, basis, is_grads_batched=True)

    with pytest.raises(RuntimeError, match=r"is_grads_batched.*must be False.*use_backend\(.autograd.\)"):
        batched(ours(*given))
    output = ours(*given)
    with pytest.raises(RuntimeError, match="one gradient at a time"):
        vmap(lambda dy: torch.autograd.grad(output, given, dy))(torch.stack([output.detach()] * 2))
    with pyfastpeft.use_backend("autograd"):
        output = ours(*given)
    close(batched(output), batched(formula(*given)))


@pairs
def test_transforms(op):
    given, (ours, formula) = operands(), PAIRS[op]
    close(grad(summed(ours), ALL)(*given), grad(summed(formula), ALL)(*given))
    close(jacfwd(ours, ALL)(*given), jacrev(formula, ALL)(*given))
    close(hessian(summed(ours), ALL)(*given), jacrev(grad(summed(formula), ALL), ALL)(*given))
    with torch.autograd.forward_ad.dual_level():
        dual = [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in given]
        tangent = torch.autograd.forward_ad.unpack_dual(ours(*dual)).tangent
    close(tangent, sum(jacobian.flatten(2).sum(2) for jacobian in jacrev(formula, ALL)(*given)))


@pairs
def test_vmap(op):
    x, *others = operands()
    many = torch.stack([x, 2 * x])
    for function in (lambda *given: (PAIRS[op][0](*given),), grad(summed(PAIRS[op][0]), ALL)):
        apart = zip(*[function(x, *others) for x in many])
        close(tuple(vmap(function, (0, None, None, None))(many, *others)), tuple(map(torch.stack, apart)))


@pytest.mark.parametrize("op", [op for op in PAIRS if op not in ("delta", "multi_lora")])  # y has one adapter's place
def test_vmap_over_adapters(op):
    x, weight, lora_A, lora_B = operands()
    ours, many = PAIRS[op][0], (torch.stack([lora_A, -lora_A]), torch.stack([lora_B, 2 * lora_B]))
    apart = [ours(x, weight, *each) for each in zip(*many)]
    close(vmap(ours, (None, None, 0, 0))(x, weight, *many), torch.stack(apart))


def test_norms_of_many_adapters_have_no_gradient():
    _, weight, lora_A, lora_B = operands()
    many = torch.stack([lora_A, -lora_A])

    def norm(lora_A):
        return ops.dora_norm(weight, lora_A, lora_B, 0.7)

    close(vmap(norm)(many), torch.stack([norm(each) for each in many]))
    assert not jvp(norm, (lora_A,), (lora_A,))[1].any()


@pytest.mark.parametrize("op", ["lora", "dora", "ia3 output", "bottleneck"])
def test_compiled_transforms(op):
    """Traced without them, a compiled graph of a kernel gave wrong gradients and said nothing."""
    torch.compiler.reset()
    (x, *others), gradient = operands(), grad(summed(PAIRS[op][0]), ALL)
    close(torch.compile(gradient, backend="aot_eager")(x, *others), gradient(x, *others))
    each = vmap(gradient, (0, None, None, None))
    many = torch.stack([x, 2 * x])
    close(torch.compile(each, backend="aot_eager")(many, *others), each(many, *others))


@pytest.mark.parametrize("lead", [(6,), (2, 3)])
def test_the_mask_is_that_of_the_kernels(lead):
    inputs = lora_inputs(6, 8, 5, 3, torch.float32)
    x, lora_A = inputs["x"].detach().reshape(*lead, 8), inputs["lora_A"].detach()
    rest = inputs["weight"].detach(), None, lora_A, inputs["lora_B"].detach(), 0.7, 0.5

    def drawn(run):
        torch.manual_seed(5)
        return run()

    def function(x):
        return ops.lora_linear(x, *rest)

    expected = drawn(lambda: function(x))
    assert not torch.allclose(expected, ops.lora_linear(x, *rest[:-1]))
    output, tangent = drawn(lambda: jvp(function, (x,), (x,)))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(tangent, expected)  # linear in x
    with ops.use_backend("autograd"):
        torch.testing.assert_close(drawn(lambda: function(x)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtypes_and_autocast(dtype):
    inputs = {name: t.detach() for name, t in lora_inputs(6, 8, 5, 3, dtype, torch.float32).items()}
    x = inputs.pop("x")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        expected = ops.lora_linear(x, **inputs, scaling=0.7)
        output, tangent = jvp(lambda x: ops.lora_linear(x, **inputs, scaling=0.7), (x,), (x,))
    assert output.dtype == tangent.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(tangent, expected - inputs["bias"].to(torch.bfloat16), rtol=0.03, atol=0.03)


def test_errors_are_those_of_the_ops():
    x, weight, lora_A, lora_B = operands()
    with pytest.raises(ValueError, match="lora_linear: lora_B is a"):
        grad(lambda x: ops.lora_linear(x, weight, None, lora_A, lora_B[:4], 1.0).sum())(x)


CONFIGS = {
    "lora": pyfastpeft.LoraConfig(r=2),
    "dora": pyfastpeft.LoraConfig(r=2, use_dora=True),
    "adalora": pyfastpeft.AdaLoraConfig(init_r=2, target_r=1, total_step=10),
    "dylora": pyfastpeft.DyLoraConfig(r=2),
    "ia3": pyfastpeft.IA3Config(),
    "bottleneck": pyfastpeft.BottleneckConfig(),
    "prefix": pyfastpeft.PrefixTuningConfig(num_virtual_tokens=2),
    "prompt": pyfastpeft.PromptTuningConfig(num_virtual_tokens=2),
    "bitfit": pyfastpeft.BitFitConfig(add_missing=True),
    "peft": peft.LoraConfig(r=2, target_modules="all-linear"),
}


@pytest.mark.parametrize("method", CONFIGS)
def test_models(method):
    """Gradients of every row by vmap, a directional derivative, and a product with the Hessian in two ways."""
    model, config = llama(attn_implementation="eager", tie_word_embeddings=False), CONFIGS[method]
    if method == "peft":
        model = peft.get_peft_model(model, config)
        pyfastpeft.accelerate(model)
    else:
        pyfastpeft.adapt(model, config)
    model.eval()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    tokens = torch.randint(VOCABULARY, (3, 6))

    def loss(parameters, rows):
        return functional_call(model, parameters, (rows,), {"labels": rows, "use_cache": False}).loss

    def gradients(rows, **options):
        return dict(zip(trained, torch.autograd.grad(loss({}, rows), trained.values(), **options)))

    near = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-6)
    parameters = {name: p.detach() for name, p in trained.items()}
    each = vmap(lambda row: grad(loss)(parameters, row[None]))(tokens)
    for i, row in enumerate(tokens):
        near({name: g[i] for name, g in each.items()}, gradients(row[None]))
    along = {name: torch.randn_like(p) for name, p in parameters.items()}
    slope = sum((g * along[name]).sum() for name, g in gradients(tokens).items())
    near(jvp(lambda p: loss(p, tokens), (parameters,), (along,))[1], slope)
    forward_over_reverse = jvp(lambda p: grad(loss)(p, tokens), (parameters,), (along,))[1]
    with pyfastpeft.use_backend("autograd"):
        first = gradients(tokens, create_graph=True)
        product = torch.autograd.grad(sum((g * along[name]).sum() for name, g in first.items()), trained.values())
    near(dict(zip(trained, product)), forward_over_reverse)
    assert any(p.abs().max() > 1e-4 for p in product)
