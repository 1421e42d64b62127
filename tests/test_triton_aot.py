"""Every Triton kernel in every configuration of the launchers, compiled for GPUs that are not here."""

import functools
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("under TRITON_INTERPRET=1 triton compiles nothing", allow_module_level=True)

from ahead_of_time import TARGETS, faults, kernels_of

from pyfastpeft.kernels import bottleneck, dora, ia3, lora, lora_group, multi_lora
from pyfastpeft.kernels.blocks import ANY, BLOCKS, RANK_BLOCKS, accumulation, entry, tensor_descriptors
from pyfastpeft.ops.reference import ACTIVATIONS

KERNELS = [
    "linear",
    "concat_linear",
    "shrink",
    "factor_gradient",
    "ia3_linear",
    "column_sums",
    "multi_shrink",
    "multi_expand",
    "multi_linear",
    "multi_lora",
    "multi_factor_gradient",
]
SLOW = os.environ.get("PYFASTPEFT_SLOW") == "1"
BY_DESCRIPTORS = {"concat_linear": ("sm_90", "sm_100")}  # kernel -> the targets that take it
half, single, double = torch.bfloat16, torch.float32, torch.float64
KINDS = {
    "half": (half, half),
    "mixed": (half, single),
    "mixed float16": (torch.float16, single),
    "single": (single, single),
    "double": (double, double),
}


def meta(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def launch_lora(tokens, rank, dtype, adapters, k=512, n=512):
    wide, seed = accumulation(dtype), meta(1, dtype=torch.int64)
    x, y, s = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype), meta(tokens, rank, dtype=wide)
    weight, bias = meta(n, k, dtype=dtype), meta(n, dtype=dtype)
    factors = meta(rank, k, dtype=adapters), meta(n, rank, dtype=adapters)
    lora.lora_forward(x, weight, bias, *factors, 0.5, 0.1, seed, y, s)
    lora.lora_forward(x, None, None, *factors, 0.5, 0.1, seed, y, s)
    lora.lora_backward(y, x, weight, *factors, 0.5, 0.1, seed, s, x, *factors)
    lora.lora_backward(y, x, None, *factors, 0.5, 0.1, seed, None, None, factors[0], None)


def launch_group(tokens, ranks, dtype, adapters, k=512, n=512):
    wide, seed = accumulation(dtype), meta(1, dtype=torch.int64)
    x, y, s = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype), meta(tokens, sum(ranks), dtype=wide)
    weights, biases = [meta(n, k, dtype=dtype)] * len(ranks), [meta(n, dtype=dtype)] * len(ranks)
    lora_A, lora_Bs = meta(sum(ranks), k, dtype=adapters), [meta(n, rank, dtype=adapters) for rank in ranks]
    common, scalings = (lora_A, lora_Bs), [0.5] * len(ranks)
    ys = [y] * len(ranks)
    lora_group.lora_group_forward(x, weights, biases, *common, scalings, 0.1, seed, ys, s)
    lora_group.lora_group_backward(ys, x, weights, *common, scalings, 0.1, seed, s, x, *common)


def launch_concat(rank, dtype=half, tokens=1024, k=512, n=512):
    if not tensor_descriptors():
        return
    x, y, s = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype), meta(tokens, rank, dtype=single)
    weight, bias, scale = meta(n, k, dtype=dtype), meta(n, dtype=dtype), meta(n, dtype=single)
    lora_A, lora_B = meta(rank, k, dtype=dtype), meta(n, rank, dtype=dtype)
    lora.linear(x, weight, bias, s, lora_B, y, 0.5)
    if rank > 16:
        lora.linear(y, weight.T, None, s, lora_A.T, x, 0.5)
        lora.linear(x, weight, bias, s, lora_B, y, 0.5, scale=scale, unscaled=y)


def launch_bottleneck(tokens, rank, dtype, adapters, activation, k=512, n=512):
    x, y, s = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype), meta(tokens, rank, dtype=accumulation(dtype))
    down, up = meta(rank, k, dtype=adapters), meta(n, rank, dtype=adapters)
    down_bias, up_bias = meta(rank, dtype=adapters), meta(n, dtype=adapters)
    bottleneck.bottleneck_forward(x, y, down, down_bias, up, up_bias, 0.5, activation, y, s)
    bottleneck.bottleneck_backward(y, x, down, down_bias, up, 0.5, activation, s, k == n, x, down, down_bias, up)


def launch_dora(tokens, rank, dtype, adapters, k=512, n=512):
    wide, seed = accumulation(dtype), meta(1, dtype=torch.int64)
    x, y, s = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype), meta(tokens, rank, dtype=wide)
    weight, bias, scale = meta(n, k, dtype=dtype), meta(n, dtype=dtype), meta(n, dtype=wide)
    factors = meta(rank, k, dtype=adapters), meta(n, rank, dtype=adapters)
    dora.dora_norm(weight, *factors, 0.5, None, scale)
    dora.dora_forward(x, weight, bias, *factors, scale, 0.5, 0.1, seed, y, s, y)
    dora.dora_backward(y, x, weight, *factors, scale, 0.5, 0.1, seed, s, y, x, *factors, scale)


def launch_ia3(tokens, dtype, k=512, n=512):
    x, y, weight, bias = (meta(*shape, dtype=dtype) for shape in ((tokens, k), (tokens, n), (n, k), (n,)))
    scale = meta(k, dtype=single if dtype.itemsize == 2 else dtype)
    for feedforward in (False, True):
        ia3.ia3_forward(x, weight, bias, scale, feedforward, y, y)
        ia3.ia3_backward(y, x, weight, scale, feedforward, y, x, scale)


def launch_multi_lora(tokens, rank, dtype, adapters, k=512, n=512, num_adapters=4):
    tokens *= num_adapters
    integers = [meta(size, dtype=torch.int64) for size in (num_adapters, tokens, num_adapters + 1)]
    x, y = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype)
    s = meta(tokens, rank, dtype=accumulation(dtype))
    factors = meta(num_adapters, rank, k, dtype=adapters), meta(num_adapters, n, rank, dtype=adapters)
    arguments = *factors, meta(num_adapters, dtype=s.dtype), *integers
    weight, bias = meta(n, k, dtype=dtype), meta(n, dtype=dtype)
    multi_lora.multi_lora_forward(x, None, None, *arguments, y, s)
    multi_lora.multi_lora_backward(y, x, None, *arguments, s, x, *factors)
    if tokens >= 128 * num_adapters:
        multi_lora.multi_lora_forward(x, weight, bias, *arguments, y, s)
    if tokens >= 128 * num_adapters and rank == 64 and dtype == adapters:
        multi_lora.multi_lora_backward(y, x, weight, *arguments, s, x, None, None)


def launch_decode(tokens, rank, dtype=half, k=8192, n=512, num_adapters=4):
    integers = [meta(size, dtype=torch.int64) for size in (num_adapters, tokens, num_adapters + 1)]
    x, y, s = meta(tokens, k, dtype=dtype), meta(tokens, n, dtype=dtype), meta(tokens, rank, dtype=single)
    factors = meta(num_adapters, rank, k, dtype=dtype), meta(num_adapters, n, rank, dtype=dtype)
    arguments = *factors, meta(num_adapters, dtype=single), *integers
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BLOCKS, "multi_lora", {"half": [(ANY, entry(16, 64, 128, 4, 4))]})
        multi_lora.multi_lora_forward(x, None, None, *arguments, y, s)


def launch_small():
    """In tiles of fewer tokens."""
    for (dtype, adapters), tokens in product(KINDS.values(), (16, 64)):
        for rank in (16, 64):
            launch_lora(tokens, rank, dtype, adapters)
            launch_multi_lora(tokens, rank, dtype, adapters)
        if dtype == adapters:
            launch_ia3(tokens, dtype)


def launch_large():
    for dtype, adapters in KINDS.values():
        for rank in (16, 64):
            launch_lora(128, rank, dtype, adapters)
            launch_multi_lora(128, rank, dtype, adapters)
        launch_bottleneck(128, 64, dtype, adapters, "gelu")
        launch_dora(128, 64, dtype, adapters)
        launch_group(128, (32, 64, 8), dtype, adapters)
        if dtype == adapters:
            launch_ia3(128, dtype)
    launch_lora(128, 20, half, half)  # rows of s and of the factors that are not aligned
    for rank in (16, 64):
        launch_concat(rank)
        launch_decode(16, rank)
    # float16 differs from bfloat16 in the instructions alone: once for every kernel.
    launch_lora(128, 64, torch.float16, torch.float16)
    launch_multi_lora(128, 64, torch.float16, torch.float16)
    launch_ia3(128, torch.float16)
    launch_concat(64, torch.float16)
    launch_decode(16, 64, torch.float16)


def launch_ones():
    """To Triton an argument of 1 is a constant; nothing is aligned here either."""
    launch_lora(1, 1, half, half, k=1, n=1)
    launch_multi_lora(1, 1, half, half, k=1, n=1, num_adapters=1)
    launch_decode(1, 1, k=1, n=1, num_adapters=1)
    launch_ia3(1, half, k=1, n=1)
    launch_dora(1, 1, half, half, k=1, n=1)
    for activation in ACTIVATIONS:
        launch_bottleneck(1, 1, half, half, activation, k=1, n=1)


@functools.cache
def asked_for():
    """Every kernel that the launchers ask for, on every target, in a fixed order. Without SLOW=1, in small tiles, which
    have registers to spare, only the variant with most arguments, and constants on one target."""
    found = []
    for name, target in TARGETS.items():
        small = kernels_of(launch_small, target)
        ones = kernels_of(launch_ones, target) if SLOW or name == "sm_90" else {}
        found += ((small if SLOW else fullest(small)) | kernels_of(launch_large, target) | ones).values()
    return found


def fullest(kernels):
    """Of every kernel in every configuration the variant with most arguments that are not None."""
    found = {}
    for name, kernel in kernels.items():
        blocks = {name: value for name, value in kernel.constants.items() if name.startswith("BLOCK")}
        arguments = [kind for kind in kernel.source.signature.values() if kind != "constexpr"]
        key = kernel.name, str(blocks), str(kernel.options), *sorted({kind for kind in arguments if kind[0] == "*"})
        if key not in found or len(arguments) > found[key][0]:
            found[key] = len(arguments), name
    return {name: kernels[name] for _, name in found.values()}


def compile_share(first, step):
    return [(kernel.target.name, kernel.name, faults(kernel)) for kernel in asked_for()[first::step]]


@pytest.fixture(scope="module")
def compiled():
    """(target, kernel) -> the faults of every configuration. Triton compiles under the GIL: hence processes."""
    workers = min(8, os.cpu_count())
    found = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        for share in pool.map(compile_share, range(workers), [workers] * workers):
            for target, name, some in share:
                found.setdefault((target, name), []).append(some)
    return found


@pytest.mark.parametrize(
    ("target", "name"), [(t, n) for t in TARGETS for n in KERNELS if t in BY_DESCRIPTORS.get(n, TARGETS)]
)
def test_compiles_without_spills_inside_shared_memory(compiled, target, name):
    found = [fault for some in compiled[target, f"{name}_kernel"] for fault in some]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", KERNELS)
def test_float16_is_asked_for(name):
    kernels = [kernel for kernel in asked_for() if kernel.name == f"{name}_kernel"]
    asked = {kernel.target.name for kernel in kernels if "fp16" in str(kernel.source.signature)}
    assert asked == set(BY_DESCRIPTORS.get(name, TARGETS))


@pytest.mark.parametrize("name", KERNELS)
def test_every_configuration_is_asked_for(name):
    asked = [kernel.constants | kernel.options for kernel in asked_for() if kernel.name == f"{name}_kernel"]
    for kind, entries in (BLOCKS.get(name) or BLOCKS[name.removeprefix("multi_")]).items():
        for most, sizes in entries:
            for rank_block in RANK_BLOCKS[kind]:
                wanted = (sizes or {}) | ({"BLOCK_R": rank_block} if "BLOCK_R" in asked[0] else {})
                assert any(wanted.items() <= one.items() for one in asked), (kind, most, wanted)
