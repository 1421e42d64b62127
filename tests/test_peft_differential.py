"""Accelerated models compute what stock PEFT computes, forward and backward (see peft_harness)."""

import pytest
import torch

pytest.importorskip("peft")

from peft.tuners import lora
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
INITS = [True, "gaussian", "pissa", "pissa_niter_2", "olora", "orthogonal", "eva"]
INITS += ["mica"] * hasattr(lora.variants, "MiCALinearVariant")  # newer versions of PEFT


@pytest.fixture(autouse=True, params=BACKENDS)
def backend(request):
    with pyfastpeft.use_backend(request.param):
        yield


def ran(op, count):
    return {f"{op}_forward": count, f"{op}_backward": count}


# --- LoRA ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", LAYERS)
def test_lora(make, dtype):
    model = adapted(make, lora_config(make), dtype=dtype, autocast_adapter_dtype=False)
    differential(model, ran("lora", COUNT[make]))


@pytest.mark.parametrize("make", LAYERS)
def test_float32_adapters_on_a_bfloat16_base(make):
    model = adapted(make, lora_config(make), dtype=torch.bfloat16)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    differential(model, ran("lora", COUNT[make]))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_everything_trains(make):
    model = adapted(make, lora_config(make)).requires_grad_(True)
    differential(model, ran("lora", COUNT[make]))


@pytest.mark.parametrize("init", INITS)
def test_inits(init):
    """As the init leaves it (A or B zero, or the base weight changed), and after training has moved it."""
    config = lora_config(MLP, init_lora_weights=init, use_rslora=True, rank_pattern={"up": 6})
    differential(adapted(MLP, config, random=False), ran("lora", 2))
    differential(adapted(MLP, config), ran("lora", 2))


@pytest.mark.parametrize("batch", [(1,), (7,), (1, 1), (2, 3, 4)])
def test_leading_dimensions(batch):
    differential(adapted(MLP, lora_config(MLP, r=1)), ran("lora", 2), batch)


@pytest.mark.parametrize(("make", "dtype"), [(llama, torch.float32), (gpt2, torch.float32), (MLP, torch.bfloat16)])
def test_dropout(make, dtype):
    """In training mode against PEFT under the same masks, in evaluation mode against PEFT as it is."""
    model = adapted(make, lora_config(make, lora_dropout=0.3), dtype=dtype)
    differential(model, ran("lora", COUNT[make]))
    differential(model, ran("lora", COUNT[make]), train=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", LAYERS)
def test_several_active_adapters(make, dtype):
    configs = lora_config(make), lora_config(make, r=3, lora_alpha=2), lora_config(make, r=9, use_rslora=True)
    model = adapted(make, *configs, dtype=dtype)
    model.base_model.set_adapter(list(NAMES))
    differential(model, ran("lora", 3 * COUNT[make]))


def test_several_active_adapters_with_dropout():
    model = adapted(llama, lora_config(llama, lora_dropout=0.2), lora_config(llama, r=3, lora_dropout=0.5))
    model.base_model.set_adapter(list(NAMES[:2]))
    differential(model, ran("lora", 2 * COUNT[llama]), train=True)


def test_an_active_adapter_that_some_layers_lack():
    model = adapted(MLP, lora_config(MLP), lora_config(MLP, target_modules=["up"]))
    model.base_model.set_adapter(list(NAMES[:2]))
    differential(model, ran("lora", 3))
    model.base_model.set_adapter(NAMES[1])
    differential(model, ran("lora", 1))


@pytest.mark.parametrize("make", LAYERS)
def test_autocast(make):
    differential(adapted(make, lora_config(make)), ran("lora", COUNT[make]), autocast=torch.bfloat16)


def test_autocast_with_a_bfloat16_base_and_several_adapters():
    model = adapted(llama, lora_config(llama), lora_config(llama, r=2), dtype=torch.bfloat16)
    model.base_model.set_adapter(list(NAMES[:2]))
    differential(model, ran("lora", 2 * COUNT[llama]), autocast=torch.bfloat16)


# --- DoRA ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", LAYERS)
def test_dora(make, dtype):
    model = adapted(make, lora_config(make, use_dora=True), dtype=dtype, autocast_adapter_dtype=False)
    differential(model, ran("dora", COUNT[make]) | {"dora_norm": COUNT[make]})


@pytest.mark.parametrize("make", LAYERS)
def test_dora_in_float32_on_a_bfloat16_base(make):
    model = adapted(make, lora_config(make, use_dora=True, lora_dropout=0.3), dtype=torch.bfloat16)
    differential(model, ran("dora", COUNT[make]) | {"dora_norm": COUNT[make]})


# --- mixed batches ---


def mixed(make, dtype=torch.float32, **options):
    """Three trainable adapters of different ranks and scalings; the third is on one kind of layer alone."""
    configs = (
        lora_config(make, **options),
        lora_config(make, r=7, use_rslora=True),
        lora_config(make, r=2, target_modules=LAYERS[make][:1]),
    )
    model = adapted(make, *configs, dtype=dtype)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model


RED, GREEN, BLUE, BASE = *NAMES, "__base__"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", LAYERS)
def test_mixed_batch(make, dtype):
    names = [GREEN, BASE, RED, BLUE, GREEN]
    differential(mixed(make, dtype), ran("multi_lora", COUNT[make]), (5, 3), adapter_names=names)


@pytest.mark.parametrize("names", [[RED], [GREEN, GREEN], [BASE, RED]])
def test_mixed_batch_of_one_adapter(names):
    model = mixed(MLP, lora_dropout=0.4)  # not in training mode: nothing is dropped
    differential(model, ran("multi_lora", 2), (len(names),), adapter_names=names)


def test_mixed_batch_of_base_rows_and_layers_without_the_adapter():
    differential(mixed(MLP), ran("multi_lora", 1), (2, 3), adapter_names=[BLUE, BASE])
    model = mixed(MLP).requires_grad_(True)
    differential(model, {}, (2, 3), adapter_names=[BASE, BASE])


def test_mixed_batch_under_autocast():
    names = [RED, BASE, GREEN]
    differential(mixed(llama), ran("multi_lora", COUNT[llama]), (3, 4), autocast=torch.bfloat16, adapter_names=names)


# --- IA3 ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", LAYERS)
def test_ia3(make, dtype):
    model = adapted(make, ia3_config(make), dtype=dtype, autocast_adapter_dtype=False)
    differential(model, ran("ia3", COUNT[make]))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_ia3_with_several_active_adapters_on_a_bfloat16_base(make):
    model = adapted(make, ia3_config(make), ia3_config(make), dtype=torch.bfloat16)
    model.base_model.set_adapter(list(NAMES[:2]))
    differential(model, ran("ia3", COUNT[make]))


def test_ia3_everything_trains():
    differential(adapted(gpt2, ia3_config(gpt2)).requires_grad_(True), ran("ia3", COUNT[gpt2]))


def test_ia3_autocast():
    differential(adapted(llama, ia3_config(llama)), ran("ia3", COUNT[llama]), autocast=torch.bfloat16)


# --- the harness notices ---


def broken(op, argument, change):
    """A dispatch table in which `op` is right but for one of the arguments that it writes."""

    def wrap(name, function):
        def call(*args):
            function(*args)
            if args[argument] is not None:
                change(args[argument])

        return call if name == op else function

    return rows_replaced(wrap)


BROKEN = {
    "dB wrong by 1 %": ("lora_backward", 11, lambda gradient: gradient.mul_(1.01)),
    "dA of the wrong sign": ("lora_backward", 10, lambda gradient: gradient.neg_()),
    "dX missing": ("lora_backward", 9, lambda gradient: gradient.zero_()),
    "dX wrong by 0.1 %": ("lora_backward", 9, lambda gradient: gradient.mul_(1.001)),
    "y wrong in one element": ("lora_forward", 8, lambda y: y[0, :1].add_(0.01)),
    "y not written": ("lora_forward", 8, lambda y: y[-1].fill_(float("nan"))),
}


@pytest.mark.parametrize("kernel", BROKEN)
def test_a_broken_kernel_is_noticed(kernel):
    model = adapted(llama, lora_config(llama, target_modules=["q_proj", "o_proj", "down_proj"]))  # of no one input
    with broken(*BROKEN[kernel]), pytest.raises(AssertionError, match=r"error .* PEFT's"):
        differential(model, ran("lora", 6))


@pytest.mark.parametrize("argument", [10, 11, 12])
def test_a_broken_multi_lora_kernel_is_noticed(argument):
    with (
        broken("multi_lora_backward", argument, lambda gradient: gradient.mul_(1.01)),
        pytest.raises(AssertionError, match=r"error .* PEFT's"),
    ):
        differential(mixed(MLP), ran("multi_lora", 2), (3, 4), adapter_names=[RED, BASE, GREEN])


@pytest.mark.parametrize("argument", [6, 7])
def test_a_broken_ia3_kernel_is_noticed(argument):
    with (
        broken("ia3_backward", argument, lambda gradient: gradient.mul_(1.01)),
        pytest.raises(AssertionError, match=r"error .* PEFT's"),
    ):
        differential(adapted(llama, ia3_config(llama)), ran("ia3", COUNT[llama]))


def test_layers_that_do_not_run_fused_are_noticed(monkeypatch):
    monkeypatch.setattr(pyfastpeft, "accelerate", lambda model: None)
    with pytest.raises(AssertionError, match="fused path missed"):
        differential(adapted(MLP, lora_config(MLP)), ran("lora", 2))
