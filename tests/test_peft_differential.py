"""Accelerated models compute what stock PEFT computes, forward and backward (see peft_harness)."""

import pytest
import torch

pytest.importorskip("peft")

from peft_harness import (
    BACKENDS,
    LAYERS,
    MLP,
    NAMES,
    adapted,
    differential,
    gpt2,
    ia3_config,
    llama,
    lora_config,
    rows_replaced,
)

import pyfastpeft

COUNT = {llama: 6, gpt2: 4, MLP: 2}  # adapted linear layers
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with pyfastpeft.use_backend(request.param):
        yield


def ran(op, count):
    return {f"{op}_forward": count, f"{op}_backward": count}


def names(*letters):
    """adapter_names of a batch: r, g and b for the adapters, - for the base alone."""
    return [dict(zip("rgb", NAMES)).get(letter, "__base__") for letter in letters]


# --- LoRA ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", LAYERS)
def test_lora(make, dtype):
    model = adapted(make, lora_config(make), dtype=dtype, autocast_adapter_dtype=False)
    differential(model, ran("lora", COUNT[make]))


@pytest.mark.parametrize("make", LAYERS)
def test_float32_adapters_on_a_bfloat16_base(make):
    model = adapted(make, lora_config(make), dtype=torch.bfloat16)
    assert model.get_base_model().get_parameter(next(n for n, _ in model.get_base_model().named_parameters() if "lora_A" in n)).dtype == torch.float32
    differential(model, ran("lora", COUNT[make]))
