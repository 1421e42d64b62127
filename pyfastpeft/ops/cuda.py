"""Which arguments the CUDA C++ kernels of csrc/ops/cuda take: one function for every op that has a kernel, called with
the raw op's arguments. It returns what the kernel takes instead, or "" if it takes these. Nothing here looks at a value
on a device."""

import functools

import torch
from torch import Tensor

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
MAX_RANK, MAX_RANKS = 256, 432  # of a layer, and of the layers of a group together


def lora_forward(x, weight, bias, lora_A, lora_B, scaling, dropout_p, seed, y, s) -> str:
    return _low_rank(x, lora_A, lora_B) or _rows(x=x, y=y, weight=weight)


def lora_backward(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B) -> str:
    read = {"x": x if dlora_A is not None else None, "weight": weight if dx is not None else None}
    return _low_rank(dy, lora_A, lora_B) or _rows(dy=dy, dx=dx, **read)


def lora_group_forward(x, weights, biases, lora_A, lora_Bs, scalings, dropout_p, seed, ys, s) -> str:
    return _group(x, lora_A, lora_Bs) or _rows(x=x, **_numbered(ys=ys, weights=weights))


def lora_group_backward(dys, x, weights, lora_A, lora_Bs, scalings, dropout_p, seed, s, dx, dlora_A, dlora_Bs) -> str:
    read = {"x": x if dlora_A is not None else None, **_numbered(dys=dys, weights=weights if dx is not None else [])}
    return _group(dys[0], lora_A, lora_Bs) or _rows(dx=dx, **read)


def dora_norm(weight, lora_A, lora_B, *rest) -> str:
    return _low_rank(weight, lora_A, lora_B) or _rows(weight=weight)


def dora_forward(x, weight, bias, lora_A, lora_B, scale, scaling, dropout_p, seed, y, s, unscaled) -> str:
    return _low_rank(x, lora_A, lora_B) or _rows(x=x, y=y, weight=weight, unscaled=unscaled)


def dora_backward(
    dy, x, weight, lora_A, lora_B, scale, scaling, dropout_p, seed, s, unscaled, dx, dlora_A, dlora_B, dscale
) -> str:
    return lora_backward(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, dx, dlora_A, dlora_B)


def ia3_forward(*args) -> str:
    return ""


def ia3_backward(*args) -> str:
    return ""


def multi_lora_forward(x, weight, bias, lora_A, *rest) -> str:
    """Any shapes, and any strides of weight."""
    if lacking := _sixteen_bit(x, lora_A):
        return lacking
    if len(lora_A) > 65535:
        return f"takes up to 65535 adapters, not {len(lora_A)}"
    return _tensor_cores(x.device)


def multi_lora_backward(dy, x, weight, lora_A, *rest) -> str:
    return multi_lora_forward(dy, weight, None, lora_A)


def group_tokens(slots, order, segments) -> str:
    """Every token is compared with every other."""
    return "" if len(slots) + len(segments) <= 2**14 else "takes up to 16384 tokens and adapters"


def _sixteen_bit(x: Tensor, lora_A: Tensor) -> str:
    """The dtypes that tensor cores multiply."""
    if x.dtype not in SIXTEEN_BIT:
        return "takes bfloat16 and float16 activations"
    return "" if lora_A.dtype in (x.dtype, torch.float32) else f"takes adapters of {x.dtype} or float32"


def _group(x: Tensor, lora_A: Tensor, lora_Bs: list[Tensor]) -> str:
    """lora_A is that of all layers, one below the other."""
    if len(lora_A) > MAX_RANKS:
        return f"takes ranks up to {MAX_RANKS} together, not {len(lora_A)}"
    lacking = (_low_rank(x, lora_A[: lora_B.shape[1]], lora_B) for lora_B in lora_Bs)
    return next(filter(None, lacking), "")


def _numbered(**lists: list[Tensor]) -> dict[str, Tensor]:
    return {f"{name}[{i}]": tensor for name, tensors in lists.items() for i, tensor in enumerate(tensors)}


def _low_rank(x: Tensor, lora_A: Tensor, lora_B: Tensor) -> str:
    if lacking := _sixteen_bit(x, lora_A):
        return lacking
    (rank, features), outputs = lora_A.shape, lora_B.shape[0]
    if features % 8 or outputs % 8 or rank > MAX_RANK:
        needed = f"K and N that are multiples of 8 and ranks up to {MAX_RANK}"
        return f"takes {needed}, not K={features}, N={outputs}, r={rank}"
    return _tensor_cores(x.device) or _rows(lora_A=lora_A)


def _rows(**tensors: Tensor | None) -> str:
    """Their rows are read 16 bytes at a time."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        # A compiled graph knows no addresses: its ops copy what begins elsewhere (schemas.py).
        begins = 0 if torch.compiler.is_compiling() else tensor.data_ptr()
        if begins % 16 or tensor.stride(-1) != 1 or tensor.stride(0) * tensor.itemsize % 16:
            return f"takes rows that begin at multiples of 16 bytes, not those of {name}"
        # No tensor map describes rows that are one and the same, such as those of the gradient of a sum over them.
        if tensor.shape[0] > 1 and tensor.stride(0) == 0:
            return f"takes rows that lie apart, not those of {name}"
    return ""


@functools.cache
def _tensor_cores(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)  # a constant of compiled graphs, as nothing else that tells
    return "" if properties.major >= 8 else f"runs on sm_80 and newer, not on {properties.name}"
