"""A linear layer that does not train: y = x W^T + b, of which x alone has a gradient."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import native, native_calls
from .arguments import without_autocast
from .dispatch import FLOATS


class _Frozen(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        y = native_calls.linear_call(x, weight, bias)
        if y is None:
            raise native_calls.Declined
        ctx.save_for_backward(weight)
        return y

    @staticmethod
    @without_autocast
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        dx = native_calls.linear_gradient(dy, weight) if native_calls.mode(dy, weight) == "inference" else None
        return dy @ weight if dx is None else dx, None, None


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weight^T + bias, as `torch.nn.functional.linear` takes and returns it: [..., K], [N, K], [N] to [..., N].

    Where that is slow (`prefers_own_linear`) the product that runs under the other ops' adapters serves, forward and
    backward. torch's own does on other devices and in other dtypes, where gradients of weight or bias are formed, under
    autocast, transforms, modes and torch.compile, and for x that is empty or has gaps. Either way gradients of any
    order reach x, and errors are torch's.
    """
    if prefers_own_linear(weight) and not x.is_nested:
        mode = native_calls.mode(x, weight, bias)
        if mode == "inference":
            y = native_calls.linear_call(x, weight, bias)
            if y is not None:
                return y
        trains = weight.requires_grad or (bias is not None and bias.requires_grad)
        if mode == "training" and not trains:
            with suppress(native_calls.Declined):
                return _Frozen.apply(x, weight, bias)
    return F.linear(x, weight, bias)


_EMPTY = [torch.empty(0, dtype=dtype, device="cpu") for dtype in FLOATS] if native.AVAILABLE else []
_SLOW = {weight.dtype for weight in _EMPTY if torch.ops.pyfastpeft.prefers_own_linear(weight)}


def prefers_own_linear(weight: Tensor) -> bool:
    """Whether torch is slow at products by this weight: on a CPU, of a 16-bit dtype that the CPU has no instructions
    for, or of float32 where torch's library is not made for it (PYFASTPEFT_CPU_MATMUL decides)."""
    return weight.dtype in _SLOW and weight.device.type == "cpu"
