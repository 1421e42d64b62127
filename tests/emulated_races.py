"""Runs every CUDA kernel once on small shapes, in a process under ThreadSanitizer: test_cuda_emulator.py starts it."""

import emulated_cuda
import torch
from error_rule import random

from pyfastpeft import ops
from pyfastpeft.ops import cuda


def multi_lora(tokens: int) -> None:
    y, x = random(tokens, 40, dtype=torch.bfloat16), random(tokens, 72, dtype=torch.bfloat16)
    lora_A, lora_B = random(3, 8, 72, dtype=torch.bfloat16), random(3, 40, 8, dtype=torch.bfloat16)
    out = ops.multi_lora(y * 1, x, lora_A, lora_B, torch.arange(tokens) % 4 - 1, 0.5)
    out.float().square().sum().backward()


def multi_lora_linear(slots: torch.Tensor, dtype: torch.dtype) -> None:
    x, weight = random(len(slots), 72, dtype=torch.bfloat16), random(40, 72, dtype=torch.bfloat16, grad=False)
    lora_A, lora_B = random(3, 8, 72, dtype=dtype), random(3, 40, 8, dtype=dtype)
    out = ops.multi_lora_linear(x, weight, None, lora_A, lora_B, slots, 0.5)
    out.float().square().sum().backward()


def group(tokens: int, dtype: torch.dtype) -> None:
    x, weights = random(tokens, 72, dtype=torch.bfloat16), [random(40, 72, dtype=torch.bfloat16, grad=False)] * 2
    lora_As, lora_Bs = [random(8, 72, dtype=dtype) for _ in range(2)], [random(40, 8, dtype=dtype) for _ in range(2)]
    outs = ops.lora_linear_group(x, weights, [None, None], lora_As, lora_Bs, [0.5, 2.0])
    sum(out.float().square().sum() for out in outs).backward()


def ia3(feedforward: bool) -> None:
    x, weight, ia3_l = random(50, 24), random(16, 24, grad=False), random(24 if feedforward else 16)
    ops.ia3_linear(x, weight, None, ia3_l, feedforward).square().sum().backward()


def fused_layer(tokens: int, features: int, dtype: torch.dtype) -> None:
    x, weight = random(tokens, 1032, dtype=torch.bfloat16), random(features, 1032, dtype=torch.bfloat16)
    lora_A, lora_B = random(2, 16, 1032, dtype=dtype), random(2, features, 16, dtype=dtype)
    routing = ops.route([t % 3 - 1 for t in range(tokens)], 2)
    y, s = x.new_empty(tokens, features), x.new_empty(tokens, 16, dtype=torch.float32)
    torch.ops.pyfastpeft_emulated.fused_layer(
        x, weight, None, None, False, lora_A, lora_B, 1.0, torch.ones(2), None, *routing, y, s
    )


def dora() -> None:
    x, weight = random(70, 72, dtype=torch.bfloat16), random(40, 72, dtype=torch.bfloat16, grad=False)
    lora_A, lora_B = random(8, 72, dtype=torch.bfloat16), random(40, 8, dtype=torch.bfloat16)
    ops.dora_linear(x, weight, None, lora_A, lora_B, random(40), 0.5).float().square().sum().backward()


def lora(rank: int, dtype: torch.dtype) -> None:
    x, weight = random(130, 264, dtype=torch.bfloat16), random(136, 264, dtype=torch.bfloat16, grad=False)
    lora_A, lora_B = random(rank, 264, dtype=dtype), random(136, rank, dtype=dtype)
    ops.lora_linear(x, weight, None, lora_A, lora_B, 0.5, 0.1).float().square().sum().backward()


if __name__ == "__main__":
    emulated_cuda.load()
    cuda._tensor_cores = lambda device: ""
    torch.manual_seed(0)
    with ops.use_backend("cuda"):
        multi_lora(9)
        multi_lora(140)
        multi_lora_linear(torch.arange(20) % 4 - 1, torch.bfloat16)
        for dtype in (torch.bfloat16, torch.float32):  # a block of one adapter and one of several
            multi_lora_linear(torch.arange(300).clamp(min=258) % 4 - 1, dtype)
        group(20, torch.bfloat16)
        group(70, torch.float32)
        ia3(False)
        ia3(True)
        lora(5, torch.bfloat16)
        lora(80, torch.float32)
        dora()
        with torch.no_grad():
            fused_layer(20, 72, torch.float32)
            fused_layer(50, 136, torch.bfloat16)
    print("all ran")
