"""Inference on the CPU in one native call, which checks its arguments itself.

It leaves a call that is out of the ordinary, untouched, to the op in Python: to its checks and messages, casts, copies
and gradients. What the ops compute is the same either way, bit by bit.
"""

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch.autograd import forward_ad
from torch.autograd.graph import increment_version
from torch.compiler import is_dynamo_compiling

from . import dispatch, native

_TENSORS = {Tensor, torch.nn.Parameter, type(None)}  # no subclass, which may see to an op itself
_NUMBERS = {float, int}

if native.AVAILABLE:
    _lora = torch.ops.pyfastpeft.lora_inference.default
    _lora_ = torch.ops.pyfastpeft.lora_inference_.default
    _multi_lora_ = torch.ops.pyfastpeft.multi_lora_inference_.default


def lora(x, weight, bias, lora_A, lora_B, scaling, dropout_p) -> Tensor | None:
    """`lora_linear` of these arguments, whatever they are; None where it is left to Python."""
    if _undropped(scaling, dropout_p) and _inference(x, weight, bias, lora_A, lora_B):
        return _lora(x, weight, bias, lora_A, lora_B, scaling)
    return None


def lora_(y, x, lora_A, lora_B, scaling, dropout_p) -> bool:
    """Whether `lora_delta_` of these arguments, whatever they are, is done; if not, nothing is."""
    return (
        _undropped(scaling, dropout_p)
        and _inference(y, x, lora_A, lora_B)
        and _writable(y)
        and _lora_(y, x, lora_A, lora_B, scaling)
        and _written(y)
    )


def multi_lora_(y, x, lora_A, lora_B, slots, segments, scaling, ranks) -> bool:
    """Whether `multi_lora` of these arguments, whatever they are, is done; if not, nothing is. With `segments`, `slots`
    is a routing's order."""
    scalings, scaling = (None, scaling) if type(scaling) in _NUMBERS else (scaling, 1.0)
    return (
        _inference(y, x, lora_A, lora_B, slots, segments, scalings, ranks)
        and _writable(y)
        and _multi_lora_(y, x, lora_A, lora_B, slots, segments, scalings, scaling, ranks)
        and _written(y)
    )


def _undropped(scaling, dropout_p):
    return type(scaling) in _NUMBERS and type(dropout_p) in _NUMBERS and dropout_p == 0


def _inference(*tensors):
    """Whether these are tensors or None, and no graph is to be made for them.

    The native op finds autocast, modes, transforms and traces itself, which also have to see what an op consists of.
    """
    return (
        not is_dynamo_compiling()
        and native.AVAILABLE
        and dispatch.forced_backend() in (None, "cpu")
        and _TENSORS.issuperset(map(type, tensors))
        and forward_ad._current_level < 0
        and not (is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]))
    )


def _writable(y):
    return y is not None and (not y.is_inference() or is_inference_mode_enabled())


def _written(y):
    increment_version(y)
    return True
