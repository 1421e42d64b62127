"""Bad input gets an error at the boundary that names the argument, what was given and what is needed."""

# ruff: noqa: E501 — the tables read best with one case a line

import re

import pytest
import torch
from error_rule import random

from pyfastpeft import ops


def lora_arguments(**changed):
    arguments = {
        "x": random(4, 8),
        "weight": random(6, 8),
        "bias": random(6),
        "lora_A": random(2, 8),
        "lora_B": random(6, 2),
        "scaling": 0.5,
        "dropout_p": 0.0,
    }
    return arguments | changed


def ia3_arguments(**changed):
    arguments = {"x": random(4, 8), "weight": random(6, 8), "bias": random(6), "ia3_l": random(6), "feedforward": False}
    return arguments | changed


def bottleneck_arguments(**changed):
    arguments = {
        "x": random(4, 8),
        "residual": random(4, 6),
        "down": random(2, 8),
        "down_bias": random(2),
        "up": random(6, 2),
        "up_bias": random(6),
        "scaling": 0.5,
        "activation": "gelu",
    }
    return arguments | changed


def dora_arguments(**changed):
    return lora_arguments(magnitude=random(6), weight_norm_squared=torch.ones(6)) | changed


def adalora_arguments(**changed):
    return lora_arguments(lora_E=random(2)) | changed


def group_arguments(**changed):
    arguments = {
        "x": random(4, 8),
        "weights": [random(6, 8), random(5, 8)],
        "biases": [random(6), None],
        "lora_As": [random(2, 8), random(3, 8)],
        "lora_Bs": [random(6, 2), random(5, 3)],
        "scalings": [0.5, 2.0],
        "dropout_p": 0.0,
    }
    return arguments | changed


def multi_layer_arguments(**changed):
    arguments = {"weight": random(6, 8), "bias": random(6)} | multi_arguments()
    del arguments["y"]
    return arguments | changed


def multi_arguments(**changed):
    arguments = {
        "y": random(4, 6, grad=False),
        "x": random(4, 8),
        "lora_A": random(3, 2, 8),
        "lora_B": random(3, 6, 2),
        "slots": torch.tensor([0, -1, 2, 1]),
        "scaling": 0.5,
        "ranks": torch.tensor([2, 1, 0]),
    }
    return arguments | changed


INTEGER = torch.zeros(4, 8, dtype=torch.int64)
META = torch.zeros(2, 8, device="meta")
NESTED = torch.nested.nested_tensor([torch.zeros(3, 8), torch.zeros(1, 8)])
QUANTISED = torch.quantize_per_tensor(torch.zeros(4, 8), 1.0, 0, torch.qint8)
NAN, INF = float("nan"), float("inf")

# fmt: off
LORA = [
    ({"x": INTEGER}, TypeError, "x is a torch.int64 tensor of shape [4, 8] on cpu; it must be a float64"),
    ({"x": [1.0]}, TypeError, "x is [1.0] (list); it must be a float64"),
    (
        {"x": torch.tensor(1.0)},
        ValueError,
        "x is a torch.float32 tensor of shape [] on cpu; it must be of shape [..., K] with K >= 1",
    ),
    ({"x": random(4, 8).to_sparse()}, TypeError, "x is of layout torch.sparse_coo; it must be a dense tensor"),
    ({"x": NESTED}, TypeError, "x is a nested tensor; it must be a dense one"),
    ({"x": QUANTISED}, TypeError, "x is a torch.qint8 tensor of shape [4, 8] on cpu; it must be a float64"),
    (
        {"weight": random(6, 9)},
        ValueError,
        "x is a torch.float32 tensor of shape [4, 8] on cpu; it must be of shape [..., K] with K = 9, as weight has",
    ),
    (
        {"weight": random(6)},
        ValueError,
        "weight is a torch.float32 tensor of shape [6] on cpu; it must be of shape [N, K]",
    ),
    (
        {"weight": random(6, 8).bfloat16()},
        TypeError,
        "x is a torch.float32 tensor of shape [4, 8] on cpu; it must be of dtype torch.bfloat16, as weight is",
    ),
    (
        {"bias": random(5)},
        ValueError,
        "bias is a torch.float32 tensor of shape [5] on cpu; it must be of shape [N] = [6]",
    ),
    (
        {"lora_A": random(2, 7)},
        ValueError,
        "lora_A is a torch.float32 tensor of shape [2, 7] on cpu; it must be of shape [r, K] = [2, 8]",
    ),
    (
        {"lora_A": META},
        ValueError,
        "lora_A is a torch.float32 tensor of shape [2, 8] on meta; it must be on cpu, where x is",
    ),
    ({"lora_A": torch.zeros(0, 8), "lora_B": torch.zeros(6, 0)}, ValueError, "it must be of rank r >= 1"),
    (
        {"lora_A": random(2, 8).double(), "lora_B": random(6, 2).double()},
        TypeError,
        "it must be no wider than float32 while x is torch.float32",
    ),
    (
        {"lora_B": random(6, 3)},
        ValueError,
        "lora_B is a torch.float32 tensor of shape [6, 3] on cpu; it must be of shape [N, r] = [6, 2]",
    ),
    ({"lora_B": random(5, 2)}, ValueError, "it must be of shape [N, r] = [6, 2]"),
    (
        {"lora_B": random(6, 2).half()},
        TypeError,
        "lora_B is a torch.float16 tensor of shape [6, 2] on cpu; it must be of dtype torch.float32, as lora_A is",
    ),
    ({"lora_B": INTEGER}, TypeError, "lora_B is a torch.int64 tensor"),
    ({"x": torch.zeros(4, 0), "weight": torch.zeros(6, 0)}, ValueError, "it must be of shape [..., K] with K >= 1"),
    ({"weight": torch.zeros(0, 8)}, ValueError, "it must be of shape [N, K] with N, K >= 1"),
    ({"scaling": "high"}, TypeError, "scaling is 'high' (str); it must be a finite number"),
    ({"scaling": NAN}, ValueError, "scaling is nan (float); it must be a finite number"),
    ({"dropout_p": "0.1"}, ValueError, "dropout_p is '0.1' (str); it must be a probability"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0 (float); it must be a probability with 0 <= p < 1"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1 (float)"),
]

IA3 = [
    ({"x": INTEGER}, TypeError, "x is a torch.int64 tensor"),
    (
        {"ia3_l": random(8)},
        ValueError,
        "ia3_l is a torch.float32 tensor of shape [8] on cpu; it must be of shape [N] = [6]",
    ),
    (
        {"feedforward": True},
        ValueError,
        "ia3_l is a torch.float32 tensor of shape [6] on cpu; it must be of shape [K] = [8]",
    ),
    ({"ia3_l": random(6).double()}, TypeError, "ia3_l is a torch.float64 tensor"),
    ({"weight": random(6, 9)}, ValueError, "x is a torch.float32 tensor of shape [4, 8]"),
    ({"x": random(4, 8).to_sparse_csr()}, TypeError, "x is of layout torch.sparse_csr; it must be a dense tensor"),
]

BOTTLENECK = [
    ({"x": random(4, 8).to_sparse()}, TypeError, "x is of layout torch.sparse_coo; it must be a dense tensor"),
    ({"x": NESTED}, TypeError, "x is a nested tensor; it must be a dense one"),
    ({"x": INTEGER}, TypeError, "x is a torch.int64 tensor of shape [4, 8] on cpu; it must be a float64"),
    ({"residual": None}, TypeError, "residual is None (NoneType); it must be a float64"),
    ({"residual": random(4, 8)}, ValueError, "residual is a torch.float32 tensor of shape [4, 8] on cpu; it must be of shape [..., N] = [4, 6]"),
    ({"residual": random(4, 6).half()}, TypeError, "residual is a torch.float16 tensor of shape [4, 6] on cpu; it must be of dtype torch.float32, as x is"),
    ({"down": random(2, 7)}, ValueError, "down is a torch.float32 tensor of shape [2, 7] on cpu; it must be of shape [r, K] = [2, 8]"),
    ({"up": random(6, 3)}, ValueError, "up is a torch.float32 tensor of shape [6, 3] on cpu; it must be of shape [N, r] = [6, 2]"),
    ({"up": random(6, 2).half()}, TypeError, "up is a torch.float16 tensor of shape [6, 2] on cpu; it must be of dtype torch.float32, as down is"),
    ({"down": META}, ValueError, "down is a torch.float32 tensor of shape [2, 8] on meta; it must be on cpu, where x is"),
    ({"down_bias": random(6)}, ValueError, "down_bias is a torch.float32 tensor of shape [6] on cpu; it must be of shape [r] = [2]"),
    ({"up_bias": random(6).half()}, TypeError, "up_bias is a torch.float16 tensor of shape [6] on cpu; it must be of dtype torch.float32, as down is"),
    ({"scaling": torch.ones(2)}, ValueError, "scaling is a torch.float32 tensor of shape [2] on cpu; it must be of shape [1]"),
    ({"scaling": None}, TypeError, "scaling is None (NoneType); it must be a finite number"),
    ({"scaling": -INF}, ValueError, "scaling is -inf (float); it must be a finite number"),
    ({"activation": "swish"}, ValueError, "activation is 'swish' (str); it must be one of relu, gelu, gelu_tanh, silu, tanh, identity"),
]

GROUP = [
    ({"x": random(4, 7)}, ValueError, "x is a torch.float32 tensor of shape [4, 7] on cpu; it must be of shape [..., K] with K = 8, as weights[0] has"),
    ({"x": INTEGER}, TypeError, "x is a torch.int64 tensor of shape [4, 8] on cpu; it must be a float64"),
    ({"weights": random(2, 6, 8)}, TypeError, "weights is a Tensor; it must be a list or tuple of one entry for each layer"),
    ({"weights": None}, TypeError, "weights is a NoneType; it must be a list or tuple"),
    ({"weights": [], "biases": [], "lora_As": [], "lora_Bs": [], "scalings": []}, ValueError, "weights is of 0 entries; it must be of one entry for each of at least one layer"),
    ({"biases": None}, TypeError, "biases is a NoneType; it must be a list or tuple"),
    ({"biases": [None]}, ValueError, "biases is of 1 entries; it must be of 2, as weights is"),
    ({"lora_As": [random(2, 8)] * 3}, ValueError, "lora_As is of 3 entries; it must be of 2, as weights is"),
    ({"scalings": 0.5}, TypeError, "scalings is a float; it must be a list or tuple"),
    ({"weights": [random(6, 8), random(5, 9)]}, ValueError, "weights[1] is a torch.float32 tensor of shape [5, 9] on cpu; it must be of shape [N, K] = [5, 8]"),
    ({"weights": [random(6, 8), random(5, 8).half()]}, TypeError, "weights[1] is a torch.float16 tensor of shape [5, 8] on cpu; it must be of dtype torch.float32, as x is"),
    ({"biases": [None, random(6)]}, ValueError, "biases[1] is a torch.float32 tensor of shape [6] on cpu; it must be of shape [N] = [5]"),
    ({"lora_As": [META, random(3, 8)]}, ValueError, "lora_As[0] is a torch.float32 tensor of shape [2, 8] on meta; it must be on cpu, where x is"),
    ({"lora_As": [random(2, 8), random(3, 7)]}, ValueError, "lora_As[1] is a torch.float32 tensor of shape [3, 7] on cpu; it must be of shape [r, K] = [3, 8]"),
    ({"lora_As": [random(2, 8), random(3, 8).half()], "lora_Bs": [random(6, 2), random(5, 3).half()]}, TypeError, "lora_As[1] is a torch.float16 tensor of shape [3, 8] on cpu; it must be of dtype torch.float32, as lora_As[0] is"),
    ({"lora_Bs": [random(6, 2), random(6, 3)]}, ValueError, "lora_Bs[1] is a torch.float32 tensor of shape [6, 3] on cpu; it must be of shape [N, r] = [5, 3]"),
    ({"scalings": [0.5, "high"]}, TypeError, "scalings[1] is 'high' (str); it must be a finite number"),
    ({"scalings": [0.5, NAN]}, ValueError, "scalings[1] is nan (float); it must be a finite number"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0 (float); it must be a probability with 0 <= p < 1"),
]

DORA = [
    ({"x": random(4, 8).to_sparse()}, TypeError, "x is of layout torch.sparse_coo; it must be a dense tensor"),
    ({"x": NESTED}, TypeError, "x is a nested tensor; it must be a dense one"),
    ({"x": INTEGER}, TypeError, "x is a torch.int64 tensor of shape [4, 8] on cpu; it must be a float64"),
    ({"weight": random(6, 9)}, ValueError, "x is a torch.float32 tensor of shape [4, 8] on cpu; it must be of shape [..., K] with K = 9"),
    ({"lora_A": META}, ValueError, "lora_A is a torch.float32 tensor of shape [2, 8] on meta; it must be on cpu, where x is"),
    ({"lora_B": random(5, 2)}, ValueError, "lora_B is a torch.float32 tensor of shape [5, 2] on cpu; it must be of shape [N, r] = [6, 2]"),
    ({"magnitude": random(8)}, ValueError, "magnitude is a torch.float32 tensor of shape [8] on cpu; it must be of shape [N] = [6]"),
    ({"magnitude": random(6).double()}, TypeError, "magnitude is a torch.float64 tensor of shape [6] on cpu; it must be no wider than float32 while x is torch.float32"),
    ({"magnitude": 1.0}, TypeError, "magnitude is 1.0 (float); it must be a float64"),
    ({"weight_norm_squared": torch.ones(8)}, ValueError, "weight_norm_squared is a torch.float32 tensor of shape [8] on cpu; it must be of shape [N] = [6]"),
    ({"scaling": "high"}, TypeError, "scaling is 'high' (str); it must be a finite number"),
    ({"scaling": NAN}, ValueError, "scaling is nan (float); it must be a finite number"),
    ({"dropout_p": "0.1"}, ValueError, "dropout_p is '0.1' (str); it must be a probability"),
    ({"dropout_p": 1.0}, ValueError, "dropout_p is 1.0 (float); it must be a probability with 0 <= p < 1"),
]

DORA_NORM = [
    ({"weight": random(6)}, ValueError, "weight is a torch.float32 tensor of shape [6] on cpu; it must be of shape [N, K] with N, K >= 1"),
    ({"weight": INTEGER}, TypeError, "weight is a torch.int64 tensor of shape [4, 8] on cpu; it must be a float64"),
    ({"lora_A": META}, ValueError, "lora_A is a torch.float32 tensor of shape [2, 8] on meta; it must be on cpu, where weight is"),
    ({"lora_A": random(2, 8).double(), "lora_B": random(6, 2).double()}, TypeError, "it must be no wider than float32 while weight is torch.float32"),
    ({"lora_B": random(5, 2)}, ValueError, "lora_B is a torch.float32 tensor of shape [5, 2] on cpu; it must be of shape [N, r] = [6, 2]"),
    ({"weight_norm_squared": torch.ones(8)}, ValueError, "weight_norm_squared is a torch.float32 tensor of shape [8] on cpu; it must be of shape [N] = [6]"),
    ({"scaling": None}, TypeError, "scaling is None (NoneType); it must be a finite number"),
    ({"scaling": -INF}, ValueError, "scaling is -inf (float); it must be a finite number"),
]

ADALORA = [
    ({"x": INTEGER}, TypeError, "x is a torch.int64 tensor of shape [4, 8] on cpu; it must be a float64"),
    ({"bias": random(5)}, ValueError, "bias is a torch.float32 tensor of shape [5] on cpu; it must be of shape [N] = [6]"),
    ({"lora_B": random(6, 3)}, ValueError, "lora_B is a torch.float32 tensor of shape [6, 3] on cpu; it must be of shape [N, r] = [6, 2]"),
    ({"lora_E": random(1, 2)}, ValueError, "lora_E is a torch.float32 tensor of shape [1, 2] on cpu; it must be of shape [r] = [2] or [r, 1] = [2, 1]"),
    ({"lora_E": random(2).half()}, TypeError, "lora_E is a torch.float16 tensor of shape [2] on cpu; it must be of dtype torch.float32, as lora_A is"),
    ({"scaling": "high"}, TypeError, "scaling is 'high' (str); it must be a finite number"),
    ({"scaling": INF}, ValueError, "scaling is inf (float); it must be a finite number"),
    ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1 (float)"),
]

MULTI = [
    ({"slots": torch.tensor([0, 1, 3, 2])}, ValueError, "slots is between 0 and 3; it must be in [-1, 3) (-1: base only)"),
    ({"slots": torch.tensor([0, 1, -2, 2])}, ValueError, "slots is between -2 and 2; it must be in [-1, 3)"),
    ({"slots": torch.tensor([0.0, 1, 2, 2])}, TypeError, "slots is a torch.float32 tensor of shape [4] on cpu; it must be an integer tensor"),
    ({"slots": torch.tensor([0, 1])}, ValueError, "slots is a torch.int64 tensor of shape [2] on cpu; it must be of shape [T] = [4]"),
    ({"slots": [0, 1, 2, 2]}, TypeError, "slots is [0, 1, 2, 2] (list); it must be a tensor of T integers or a Routing"),
    ({"slots": ops.route([0, 1], 3)}, ValueError, "slots.order [T] is a torch.int64 tensor of shape [2] on cpu; it must be a torch.int64 tensor of shape [4] on cpu"),
    ({"slots": ops.route([0, 1, 1, 0], 2)}, ValueError, "slots.segments [L + 1] is a torch.int64 tensor of shape [3]"),
    ({"ranks": torch.tensor([2, 1, 3])}, ValueError, "ranks is between 1 and 3; it must be in [0, r] = [0, 2]"),
    ({"ranks": torch.tensor([2, 1])}, ValueError, "ranks is a torch.int64 tensor of shape [2] on cpu; it must be of shape [L] = [3]"),
    ({"ranks": torch.tensor([2.0, 1, 1])}, TypeError, "ranks is a torch.float32 tensor"),
    ({"ranks": torch.tensor([2, 1, 1j])}, TypeError, "ranks is a torch.complex64 tensor of shape [3] on cpu; it must be an integer tensor"),
    ({"ranks": torch.tensor([2, 1, 3], dtype=torch.uint16)}, ValueError, "ranks is between 1 and 3; it must be in [0, r] = [0, 2]"),
    ({"scaling": torch.ones(2)}, ValueError, "scaling is a torch.float32 tensor of shape [2] on cpu; it must be of shape [L] = [3]"),
    ({"scaling": NAN}, ValueError, "scaling is nan (float); it must be a finite number"),
    ({"lora_A": torch.zeros(3, 0, 8), "lora_B": torch.zeros(3, 6, 0)}, ValueError, "it must be of rank r >= 1"),
    ({"lora_A": torch.zeros(0, 2, 8), "lora_B": torch.zeros(0, 6, 2)}, ValueError, "it must be of at least one adapter, L >= 1"),
    ({"lora_A": random(2, 8)}, ValueError, "lora_A is a torch.float32 tensor of shape [2, 8] on cpu; it must be of shape [L, r, K]"),
    ({"lora_B": random(2, 6, 2)}, ValueError, "lora_B is a torch.float32 tensor of shape [2, 6, 2] on cpu; it must be of shape [L, N, r]"),
    ({"y": random(4, 5)}, ValueError, "y is a torch.float32 tensor of shape [4, 5] on cpu; it must be of shape [..., N] = [4, 6]"),
    ({"y": random(4, 6).bfloat16()}, TypeError, "y is a torch.bfloat16 tensor of shape [4, 6] on cpu; it must be of dtype torch.float32"),
    ({"y": torch.zeros(1, 6).expand(4, 6)}, ValueError, "y is a tensor whose elements share memory"),
]

MULTI_LAYER = [
    ({"x": random(4, 7)}, ValueError, "x is a torch.float32 tensor of shape [4, 7] on cpu; it must be of shape [..., K] with K = 8, as weight has"),
    ({"x": random(4, 8).half()}, TypeError, "x is a torch.float16 tensor of shape [4, 8] on cpu; it must be of dtype torch.float32, as weight is"),
    ({"x": random(4, 8).to_sparse()}, TypeError, "x is of layout torch.sparse_coo; it must be a dense tensor"),
    ({"x": NESTED}, TypeError, "x is a nested tensor; it must be a dense one"),
    ({"x": random(3, 8)}, ValueError, "slots is a torch.int64 tensor of shape [4] on cpu; it must be of shape [T] = [3]"),
    ({"weight": random(6)}, ValueError, "weight is a torch.float32 tensor of shape [6] on cpu; it must be of shape [N, K]"),
    ({"weight": random(6, 8).to("meta")}, ValueError, "x is a torch.float32 tensor of shape [4, 8] on cpu; it must be on meta, where weight is"),
    ({"bias": random(5)}, ValueError, "bias is a torch.float32 tensor of shape [5] on cpu; it must be of shape [N] = [6]"),
    ({"lora_A": random(3, 2, 7)}, ValueError, "lora_A is a torch.float32 tensor of shape [3, 2, 7] on cpu; it must be of shape [L, r, K] = [3, 2, 8]"),
    ({"lora_B": random(3, 5, 2)}, ValueError, "lora_B is a torch.float32 tensor of shape [3, 5, 2] on cpu; it must be of shape [L, N, r] = [3, 6, 2]"),
    ({"scaling": "high"}, TypeError, "scaling is 'high' (str); it must be a finite number"),
]
# fmt: on


def refused(op, arguments, error, message):
    for gradients in (True, False):  # calls without gradients are checked in C++ first
        with torch.set_grad_enabled(gradients), pytest.raises(error, match=re.escape(message)) as raised:
            op(**arguments)
        assert str(raised.value).startswith(f"{op.__name__}: ")


@pytest.mark.parametrize(("changed", "error", "message"), LORA)
def test_lora_linear(changed, error, message):
    refused(ops.lora_linear, lora_arguments(**changed), error, message)


@pytest.mark.parametrize(("changed", "error", "message"), GROUP)
def test_lora_linear_group(changed, error, message):
    refused(ops.lora_linear_group, group_arguments(**changed), error, message)


@pytest.mark.parametrize(("changed", "error", "message"), IA3)
def test_ia3_linear(changed, error, message):
    refused(ops.ia3_linear, ia3_arguments(**changed), error, message)


@pytest.mark.parametrize(("changed", "error", "message"), BOTTLENECK)
def test_bottleneck(changed, error, message):
    refused(ops.bottleneck, bottleneck_arguments(**changed), error, message)


@pytest.mark.parametrize(("changed", "error", "message"), DORA)
def test_dora_linear(changed, error, message):
    refused(ops.dora_linear, dora_arguments(**changed), error, message)


@pytest.mark.parametrize(("changed", "error", "message"), DORA_NORM)
def test_dora_norm(changed, error, message):
    arguments = dora_arguments(**changed)
    names = "weight", "lora_A", "lora_B", "scaling", "weight_norm_squared"
    refused(ops.dora_norm, {name: arguments[name] for name in names}, error, message)


@pytest.mark.parametrize(("changed", "error", "message"), ADALORA)
def test_adalora_linear(changed, error, message):
    refused(ops.adalora_linear, adalora_arguments(**changed), error, message)


@pytest.mark.parametrize(("changed", "error", "message"), MULTI)
def test_multi_lora(changed, error, message):
    refused(ops.multi_lora, multi_arguments(**changed), error, message)


@pytest.mark.parametrize(("changed", "error", "message"), [*MULTI_LAYER, *(row for row in MULTI if "y" not in row[0])])
def test_multi_lora_linear(changed, error, message):
    refused(ops.multi_lora_linear, multi_layer_arguments(**changed), error, message)


def test_a_list_of_many_tokens_is_told_in_short():
    with pytest.raises(TypeError, match=r"slots is \[0, 0, .*… \(list\); it must be a tensor") as raised:
        ops.multi_lora(**multi_arguments(slots=[0] * 10000))
    assert len(str(raised.value)) < 400


def test_what_the_tables_change_is_all_that_was_wrong():
    ops.lora_linear(**lora_arguments())
    ops.lora_linear_group(**group_arguments())
    ops.ia3_linear(**ia3_arguments())
    ops.multi_lora(**multi_arguments())
    ops.multi_lora_linear(**multi_layer_arguments())
    ops.bottleneck(**bottleneck_arguments())
    ops.dora_linear(**dora_arguments())
    ops.adalora_linear(**adalora_arguments())


@pytest.mark.parametrize("scaling", [NAN, INF])
def test_lora_delta_(scaling):
    y = torch.zeros(4, 6)
    adapter = {"lora_A": random(2, 8, grad=False), "lora_B": random(6, 2, grad=False), "scaling": scaling}
    message = f"scaling is {scaling} (float); it must be a finite number"
    refused(ops.lora_delta_, {"y": y, "x": random(4, 8, grad=False), **adapter}, ValueError, message)
    assert not y.any()


def test_in_place_ops_refuse_an_output_that_overlaps_an_input():
    storage = torch.randn(4, 20)
    lora_A, lora_B = random(2, 8, grad=False), random(8, 2, grad=False)
    side_by_side = {"y": storage[:, :8], "x": storage[:, 10:18]}
    ops.lora_delta_(**side_by_side, lora_A=lora_A, lora_B=lora_B, scaling=1.0)
    for columns in (storage[:, 4:12], storage[:, :8], storage.view(-1)[6:38].view(4, 8)):
        arguments = {"y": storage[:, :8], "x": columns, "lora_A": lora_A, "lora_B": lora_B, "scaling": 1.0}
        refused(ops.lora_delta_, arguments, ValueError, "y is overlapping x in memory; it must be apart from x")
    shared = torch.randn(8, 8)
    arguments = {
        "y": shared[:, :],
        "x": random(8, 8, grad=False),
        "lora_A": shared[:2],
        "lora_B": lora_B,
        "scaling": 1.0,
    }
    refused(ops.lora_delta_, arguments, ValueError, "y is overlapping lora_A in memory")


def test_a_leaf_that_requires_grad_is_not_written():
    y = torch.zeros(4, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match="y is a leaf that requires grad; it must be no such leaf"):
        ops.multi_lora(**multi_arguments(y=y))
    assert not y.any()


@pytest.mark.parametrize("op", [ops.multi_lora, ops.lora_delta_])
def test_a_tensor_kept_for_a_backward_pass_is_not_written_unnoticed(op):
    x = torch.ones(4, 6, requires_grad=True)
    y = x * 2
    loss = y.square().sum()
    multi = multi_arguments(y=y)
    arguments = (
        multi
        if op is ops.multi_lora
        else {"y": y, "x": multi["x"]} | {"lora_A": random(2, 8), "lora_B": random(6, 2), "scaling": 0.5}
    )
    with torch.no_grad():
        op(**arguments)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("slots", "error", "message"),
    [
        ([0, 3], ValueError, "slots is between 0 and 3; it must be in [-1, 3)"),
        ([0.5], TypeError, "slots is of dtype float64; it must be of integers"),
        ([[0], [1]], ValueError, "slots is of shape [2, 1]; it must be of shape [T]"),
        ([[0], [1, 2]], ValueError, "slots is [[0], [1, 2]] (list); it must be of shape [T]"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, "it must be of shape [T]"),
    ],
)
def test_route(slots, error, message):
    with pytest.raises(error, match=re.escape(message)) as raised:
        ops.route(slots, 3)
    assert str(raised.value).startswith("route: ")
    with pytest.raises(ValueError, match=r"num_adapters is None .*; it must be an integer >= 1"):
        ops.route(slots, None)


def test_raw_ops_refuse_what_would_read_foreign_memory():
    x, lora_A, lora_B = torch.zeros(4, 8), torch.zeros(2, 8), torch.zeros(6, 2)
    y, s = torch.zeros(4, 6), torch.zeros(4, 2)
    raw = torch.ops.pyfastpeft.lora_forward
    for changed in ({0: torch.zeros(4, 7)}, {4: torch.zeros(6, 3)}, {8: torch.zeros(3, 6)}, {9: torch.zeros(4, 1)}):
        arguments = [x, None, None, lora_A, lora_B, 1.0, 0.0, None, y, s]
        for position, tensor in changed.items():
            arguments[position] = tensor
        with pytest.raises(RuntimeError, match=r"must be|wrong size"):
            raw(*arguments)


def test_raw_ops_of_groups_refuse_what_would_read_foreign_memory():
    x, weights, lora_A = torch.zeros(4, 8), [torch.zeros(6, 8), torch.zeros(5, 8)], torch.zeros(5, 8)
    lora_Bs, ys, s = [torch.zeros(6, 2), torch.zeros(5, 3)], [torch.zeros(4, 6), torch.zeros(4, 5)], torch.zeros(4, 5)
    forward = [x, weights, [None, None], lora_A, lora_Bs, [1.0, 1.0], 0.0, None, ys, s]
    for position, argument in (
        *((1, weights[:1]), (1, [weights[0], torch.zeros(5, 7)]), (2, [None, torch.zeros(4)]), (3, torch.zeros(4, 8))),
        *((4, lora_Bs[::-1]), (4, lora_Bs[:1]), (5, [1.0]), (8, ys[:1]), (8, ys[::-1]), (9, torch.zeros(4, 2))),
    ):
        arguments = [*forward[:position], argument, *forward[position + 1 :]]
        with pytest.raises(RuntimeError, match=r"must be|must hold|wrong size|needs|call failed"):
            torch.ops.pyfastpeft.lora_group_forward(*arguments)
    dx, dlora_A, dlora_Bs = torch.zeros(4, 8), torch.zeros(5, 8), [torch.zeros(6, 2), torch.zeros(5, 3)]
    backward = [ys, x, weights, lora_A, lora_Bs, [1.0, 1.0], 0.0, None, s, dx, dlora_A, dlora_Bs]
    for position, argument in (
        *((0, ys[:1]), (0, ys[::-1]), (1, None), (1, torch.zeros(4, 7)), (3, torch.zeros(4, 8)), (8, None)),
        *((8, torch.zeros(4, 2)), (9, torch.zeros(4, 7)), (10, torch.zeros(4, 8)), (11, dlora_Bs[:1])),
        *((11, dlora_Bs[::-1]), (2, weights[::-1])),
    ):
        arguments = [*backward[:position], argument, *backward[position + 1 :]]
        with pytest.raises(RuntimeError, match=r"must be|must hold|wrong size|needs"):
            torch.ops.pyfastpeft.lora_group_backward(*arguments)
