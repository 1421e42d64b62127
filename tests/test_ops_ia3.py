"""ia3_linear on every backend of this machine."""

import functools

import pytest
from error_rule import assert_error_rule, random, unfused_ia3
from op_cases import backends, dtypes

from pyfastpeft import ops

pytestmark = pytest.mark.usefixtures("two_threads", "on_backend")


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
