"""A linear layer that does not train: y = x W^T + b, of which x alone has a gradient."""

from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import native, native_calls
from .arguments import without_autocast


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


def _trains(tensor):
    return tensor is not None and tensor.requires_grad


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x weight^T + bias, as `torch.nn.functional.linear` takes and returns it.

    Where that is slow, on a CPU in a dtype for which `prefers_own_linear`, the product that runs under the other ops'
    adapters serves, forward and backward, unless weight or bias require a gradient; else torch's own. Either way
    gradients of any order reach x, and errors are torch's.
    """
    mode = native_calls.mode(x, weight, bias)
    if mode == "inference":
        y = native_calls.linear_call(x, weight, bias)
        if y is not None:
            return y
    elif mode == "training" and not (_trains(weight) or _trains(bias) or torch._C._are_functorch_transforms_active()):
        with suppress(native_calls.Declined):
            return _Frozen.apply(x, weight, bias)
    return F.linear(x, weight, bias)


def prefers_own_linear(weight: Tensor) -> bool:
    """Whether this is a matrix on a CPU of whose products torch is slow: of a 16-bit dtype that this CPU has no
    instructions for, or of float32 where torch's library is not made for it (PYFASTPEFT_CPU_MATMUL decides)."""
    return native.AVAILABLE and torch.ops.pyfastpeft.prefers_own_linear(weight)
