"""DoRA and AdaLoRA against the layers of the real peft: output and every gradient, in float32."""

import pytest
import torch
from error_rule import random

peft = pytest.importorskip("peft", reason="the package peft is not installed")

from pyfastpeft import ops  # noqa: E402


def wrapped(config, bias):
    """One linear layer [9 -> 14] under `config`, every adapter parameter random, none of them zero."""
    model = torch.nn.Sequential(torch.nn.Linear(9, 14, bias=bias))
    layer = peft.get_peft_model(model, config).base_model.model[0]
    for name, parameter in layer.named_parameters():
        if "base_layer" not in name and "ranknum" not in name:
            parameter.data.copy_(random(*parameter.shape, grad=False))
    return layer


def assert_same(layer, x, parameters, run):
    """`run(x, *parameters)` is what the layer does, gradients too."""
    dy = torch.randn(*x.shape[:-1], 14)
    results = []
    for forward in (lambda x: layer(x), lambda x: run(x, *parameters)):
        leaf = x.clone().requires_grad_()
        out = forward(leaf)
        results.append((out, *torch.autograd.grad(out, [leaf, *parameters], dy)))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(ours, theirs)
        assert ours.any()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bias", [True, False])
def test_dora_is_pefts(backend, bias):
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0"], use_dora=True)
    layer = wrapped(config, bias)
    magnitude = layer.lora_magnitude_vector["default"].weight
    base, scaling = layer.base_layer, layer.scaling["default"]
    parameters = [layer.lora_A["default"].weight, layer.lora_B["default"].weight, magnitude]
    squares = base.weight.detach().square().sum(1)
    for cached in (None, squares):
        with ops.use_backend(backend):
            assert_same(
                layer,
                torch.randn(3, 5, 9),
                parameters,
                lambda x, A, B, m, cached=cached: ops.dora_linear(
                    x, base.weight, base.bias, A, B, m, scaling, weight_norm_squared=cached
                ),
            )


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_adalora_is_pefts(backend):
    config = peft.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=6, target_modules=["0"], total_step=10)
    layer = wrapped(config, bias=True)
    base, scaling = layer.base_layer, layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5)
    parameters = [part["default"] for part in (layer.lora_A, layer.lora_E, layer.lora_B)]
    with ops.use_backend(backend):
        assert_same(
            layer,
            torch.randn(3, 5, 9),
            parameters,
            lambda x, A, E, B: ops.adalora_linear(x, base.weight, base.bias, A, E, B, scaling),
        )
