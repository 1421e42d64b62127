"""What the CUDA C++ kernels of csrc/ops/cuda take: one function for every op that has one, with the raw op's arguments,
which returns what it lacks, "" where it takes them. Nothing here looks at a value on a device."""

import torch

SHORT = (torch.bfloat16, torch.float16)


def ia3_forward(*args) -> str:
    return ""


def ia3_backward(*args) -> str:
    return ""


def multi_lora_forward(x, lora_A, *rest) -> str:
    """Tensor cores multiply the activations with adapters of their own 16-bit dtype, any shape of them."""
    if x.dtype not in SHORT or lora_A.dtype != x.dtype:
        return "takes bfloat16 and float16, with adapters of the same dtype"
    return "" if len(lora_A) <= 65535 else "takes up to 65535 adapters"


def multi_lora_backward(dy, x, lora_A, *rest) -> str:
    return multi_lora_forward(dy, lora_A)


def group_tokens(slots, order, segments) -> str:
    """Every token is compared with every other."""
    return "" if len(slots) + len(segments) <= 2**14 else "takes up to 16384 tokens and adapters"
