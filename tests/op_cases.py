"""What the tests of ops share: backends, shapes, and every op beside its formula."""

import functools
import os

import pytest
import torch
from error_rule import (
    DTYPES,
    MIXED,
    assert_error_rule,
    grouped,
    lora_inputs,
    random,
    unfused_bottleneck,
    unfused_dora,
    unfused_group,
    unfused_lora,
    unfused_multi_lora,
    unfused_multi_lora_linear,
)
from hypothesis import strategies as st

from pyfastpeft import ops
from pyfastpeft.ops import dispatch, reference

BACKENDS = os.environ.get("PYFASTPEFT_TEST_BACKENDS", "reference cpu").split()  # test_triton_interpreter.py sets it
SHAPES = [
    (1, 1, 1, 1),
    (3, 7, 5, 2),
    (16, 64, 48, 8),
    (33, 255, 129, 16),
    (70, 300, 513, 5),
    (35, 130, 75, 100),
    (2, 40, 24, 64),
]  # M K N r
ranks = st.integers(4, 20) | st.integers(60, 110)  # beyond 64, the CPU's kernels leave parts to torch's products
if "triton" in BACKENDS:  # the interpreter takes its time
    SHAPES, ranks = SHAPES[::3], st.integers(4, 20)

backends = pytest.mark.parametrize("backend", BACKENDS)
branch_backends = pytest.mark.parametrize("backend", [*BACKENDS, "addmm"])  # of low-rank branches
dtypes = pytest.mark.parametrize(("dtype", "adapter_dtype"), DTYPES + MIXED)


def lora(x, weight, lora_A, lora_B, bias=None):
    return ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7)


def plain_lora(x, weight, lora_A, lora_B, bias=None):
    return unfused_lora(x, weight, bias, lora_A, lora_B, 0.7)


def in_both(function, scaling=0.7, activation="relu"):
    """Calls ops.bottleneck or its formula, with x for a residual that is not given."""

    def run(x, down, up, residual=None, down_bias=None, up_bias=None, scaling=scaling):
        return function(x, x if residual is None else residual, down, down_bias, up, up_bias, scaling, activation)

    return run


SCALINGS = [0.7, -1.3, 0.4]


def group(dropout_p=0.0, **inputs):
    count = sum(name.startswith("weight") for name in inputs)
    return grouped(lambda *args: ops.lora_linear_group(*args, SCALINGS[:count], dropout_p), **inputs)


def plain_group(**inputs):
    return grouped(lambda *args: unfused_group(*args, SCALINGS), **inputs)


def dora_inputs(m, k, n, r, dtype, adapter_dtype=None, **options):
    inputs = lora_inputs(m, k, n, r, dtype, adapter_dtype, **options)
    return inputs | {"magnitude": random(n, dtype=adapter_dtype or dtype)}


def dora(x, weight, lora_A, lora_B, magnitude, bias=None, **options):
    return ops.dora_linear(x, weight, bias, lora_A, lora_B, magnitude, 0.7, **options)


def plain_dora(x, weight, lora_A, lora_B, magnitude, bias=None):
    return unfused_dora(x, weight, bias, lora_A, lora_B, magnitude, 0.7)


def assert_dora(inputs, ours=dora, roundings=2):
    # The output without its scale is kept in x's dtype, and in the backward pass the scale meets B and not dy.
    assert_error_rule(ours, plain_dora, inputs, through={"magnitude": inputs["x"].dtype}, roundings=roundings)


ACTIVATIONS = sorted(reference.ACTIVATIONS)


def assert_bottleneck(inputs, scaling=0.7, activation="relu"):
    ours, theirs = (in_both(f, scaling, activation) for f in (ops.bottleneck, unfused_bottleneck))
    # torch's products round s, too, which a handful of numbers does not forgive.
    assert_error_rule(ours, theirs, inputs, roundings=2 if dispatch.forced_backend() == "addmm" else 1)


def assert_multi_lora(inputs, slots, scaling, ranks=None):
    assert_error_rule(
        lambda y, **rest: ops.multi_lora(y.clone(), **rest, slots=slots, scaling=scaling, ranks=ranks),
        functools.partial(unfused_multi_lora, slots=slots, scaling=scaling, ranks=ranks),
        inputs,
    )


def assert_multi_lora_linear(inputs, slots, scaling, ranks=None):
    options = {"bias": None} if "bias" not in inputs else {}
    options |= {"slots": slots, "scaling": scaling, "ranks": ranks}
    ours, theirs = (functools.partial(f, **options) for f in (ops.multi_lora_linear, unfused_multi_lora_linear))
    assert_error_rule(ours, theirs, inputs)


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
