"""Inference on the CPU in one native call, which checks its arguments itself.

It leaves a call that is out of the ordinary, untouched, to the op in Python: to its checks and messages, casts, copies
and gradients. What the ops compute is the same either way, bit by bit.
"""

import torch
from torch import Tensor

from . import dispatch, native
from .rows import needs_gradient, written

_TENSORS = {Tensor, torch.nn.Parameter, type(None)}  # no subclass, which may see to an op itself
_NUMBERS = {float, int}

if native.AVAILABLE:
    _lora = torch.ops.pyfastpeft.lora_serve.default
    _lora_ = torch.ops.pyfastpeft.lora_serve_.default
    _multi_lora_ = torch.ops.pyfastpeft.multi_lora_serve_.default


def lora(x, weight, bias, lora_A, lora_B, scaling, dropout_p) -> Tensor | None:
    """`lora_linear` of these arguments, whatever they are; None where it is left to Python."""
    if _undropped(scaling, dropout_p) and _unseen(x, weight, bias, lora_A, lora_B):
        return _lora(x, weight, bias, lora_A, lora_B, scaling)
    return None


def lora_(y, x, lora_A, lora_B, scaling, dropout_p) -> bool:
    """Whether `lora_delta_` of these arguments, whatever they are, is done; if not, nothing is."""
    if not (_undropped(scaling, dropout_p) and _unseen(y, x, lora_A, lora_B) and _writable(y)):
        return False
    done = _lora_(y, x, lora_A, lora_B, scaling)
    if done:
        written(y)
    return done


def multi_lora_(y, x, lora_A, lora_B, slots, segments, scaling, ranks) -> bool:
    """Whether `multi_lora` of these arguments, whatever they are, is done; if not, nothing is. With `segments`, `slots`
    is a routing's order."""
    scalings, scaling = (None, scaling) if type(scaling) in _NUMBERS else (scaling, 1.0)
    if not (_unseen(y, x, lora_A, lora_B, slots, segments, scalings, ranks) and _writable(y)):
        return False
    done = _multi_lora_(y, x, lora_A, lora_B, slots, segments, scalings, scaling, ranks)
    if done:
        written(y)
    return done


def _undropped(scaling, dropout_p):
    return type(scaling) in _NUMBERS and type(dropout_p) in _NUMBERS and dropout_p == 0


def _unseen(*tensors):
    """Whether nobody sees how an op on these comes by its result: no graph, transform, mode, cast or forced backend."""
    return (
        native.AVAILABLE
        and not torch.compiler.is_compiling()
        and dispatch.forced_backend() in (None, "cpu")
        and _TENSORS.issuperset(map(type, tensors))
        and not needs_gradient(*tensors)
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._get_tracing_state() is None
    )


def _writable(y):
    return torch.is_inference_mode_enabled() or not (y is None or y.is_inference())
