"""Inference on the CPU in one native call, which checks its arguments itself.

A call that is out of the ordinary is left, untouched, to the op in Python: to its checks and messages, casts, copies
and gradients. What is computed is the same either way, bit by bit.

    lora(x, weight, bias, lora_A, lora_B, scaling)          y, or None: left to Python
    lora_(y, x, lora_A, lora_B, scaling)                    whether it is done
    multi_lora_(y, x, lora_A, lora_B, slots, segments, scalings, scaling, ranks)    the same

`multi_lora_` takes a routing's order for `slots` where `segments` is given, and one number `scaling` where `scalings`
is None. They take any tensor, or None, for a tensor, and find out themselves whether autocast, a mode, a transform or
a trace has to see what the op consists of. The rest is for `possible` and `writable` to find.
"""

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import dispatch, native

_TENSORS = {Tensor, torch.nn.Parameter, type(None)}  # no subclass, which may see to an op itself

if native.AVAILABLE:
    lora = torch.ops.pyfastpeft.lora_inference.default
    lora_ = torch.ops.pyfastpeft.lora_inference_.default
    multi_lora_ = torch.ops.pyfastpeft.multi_lora_inference_.default
else:
    lora = lora_ = multi_lora_ = lambda *_: None


# After a large matmul Python's own memory is cold, and a frame or a name more costs a microsecond or two.
def possible(*tensors) -> bool:
    """Whether these are tensors or None, of which no graph is made, and no other backend is asked for."""
    return (
        not is_dynamo_compiling()
        and dispatch._forced in (None, "cpu")
        and _TENSORS.issuperset(map(type, tensors))
        and forward_ad._current_level < 0
        and not (is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors]))
    )


def writable(y: Tensor | None) -> bool:
    """Whether torch lets y be written in place where no gradient is asked for."""
    return y is not None and (not y.is_inference() or is_inference_mode_enabled())
