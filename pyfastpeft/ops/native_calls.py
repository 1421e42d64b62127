"""One native call on the CPU for a whole op, or for one pass of it in training, that checks its arguments itself.

If something about a call is unusual, the native op declines before it has written anything, and the op in Python takes
over: its checks and messages, casts, copies and gradients. The result is the same either way, bit by bit, but for
`linear_call` and `linear_gradient`: for them torch's product takes over.

    linear_call(x, weight, bias)                            y, or None: declined, also where torch is faster
    linear_gradient(dy, weight)                             dx, or None
    lora_call(x, weight, bias, lora_A, lora_B, scaling)     y, or None
    lora_call_with_s(the same)                              (y, s), or (None, None)
    lora_gradients(dy, x, weight, lora_A, lora_B, scaling, dropout_p, seed, s, need_x, need_A, need_B)
                                                            (dx, dlora_A, dlora_B) as wanted, or Nones
    lora_call_(y, x, lora_A, lora_B, scaling)               whether it is done
    dora_call(x, weight, bias, lora_A, lora_B, magnitude, scaling, keep_unscaled)
                                                            (y, s, unscaled or None, scale, norm), or Nones
    dora_gradients(dy, x, weight, lora_A, lora_B, scale, norm, scaling, dropout_p, seed, s, unscaled,
        need_x, need_A, need_B, need_magnitude)             (dx, dlora_A, dlora_B, dmagnitude) as wanted, or Nones
    ia3_call(x, weight, bias, ia3_l, feedforward, keep_base)         (y, base or None), or (None, None)
    ia3_gradients(dy, x, weight, ia3_l, feedforward, base, need_x, need_l)    (dx, dia3_l) as wanted, or (None, None)
    multi_lora_call(x, weight, bias, lora_A, lora_B, slots, segments, scalings, scaling, ranks)    y, or None
    multi_lora_call_(y, x, lora_A, lora_B, slots, segments, scalings, scaling, ranks)    whether it is done
    multi_scale_call(x, scale, shift, slots, segments)               y, or None

`multi_lora_call`, `multi_lora_call_` and `multi_scale_call` take a routing's order for `slots` where `segments` is
given, and one number `scaling` where `scalings` is None. The native ops themselves decline under autocast, modes,
transforms and traces, which have to see what the op consists of. All else that they cannot see is found by `mode` and
`writable` beforehand.
"""

import torch
from torch import Tensor, is_grad_enabled, is_inference_mode_enabled
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from . import dispatch, native

_TENSORS = {Tensor, torch.nn.Parameter, type(None)}  # no subclass, which may see to an op itself

if native.AVAILABLE:
    linear_call = torch.ops.pyfastpeft.linear_call.default
    linear_gradient = torch.ops.pyfastpeft.linear_gradient.default
    lora_call = torch.ops.pyfastpeft.lora_call.default
    lora_call_with_s = torch.ops.pyfastpeft.lora_call_with_s.default
    lora_gradients = torch.ops.pyfastpeft.lora_gradients.default
    lora_call_ = torch.ops.pyfastpeft.lora_call_.default
    dora_call = torch.ops.pyfastpeft.dora_call.default
    dora_gradients = torch.ops.pyfastpeft.dora_gradients.default
    ia3_call = torch.ops.pyfastpeft.ia3_call.default
    ia3_gradients = torch.ops.pyfastpeft.ia3_gradients.default
    multi_lora_call = torch.ops.pyfastpeft.multi_lora_call.default
    multi_lora_call_ = torch.ops.pyfastpeft.multi_lora_call_.default
    multi_scale_call = torch.ops.pyfastpeft.multi_scale_call.default
else:

    def _nothing(result):
        return lambda *_: result

    lora_call, multi_lora_call, lora_call_, multi_lora_call_ = map(_nothing, (None, None, False, False))
    linear_call = linear_gradient = multi_scale_call = _nothing(None)
    lora_call_with_s, ia3_call, ia3_gradients, lora_gradients, dora_gradients, dora_call = (
        _nothing((None,) * parts) for parts in (2, 2, 2, 3, 4, 5)
    )


class Declined(Exception):
    """The native call has declined the forward pass of a Function."""


# After a large matmul Python's own memory is cold, and a frame or a name more costs a microsecond or two.
def mode(*tensors) -> str | None:
    """ "training" if autograd records the op, else "inference". None where no native call may be made: while compiling,
    in forward mode, where another backend is forced, where torch.func transforms what is recorded, and with anything
    but plain tensors and None."""
    if (
        is_dynamo_compiling()
        or dispatch._forced not in (None, "cpu")
        or not _TENSORS.issuperset(map(type, tensors))
        or forward_ad._current_level >= 0
    ):
        return None
    graph = is_grad_enabled() and any([t is not None and t.requires_grad for t in tensors])
    graph = graph and not is_inference_mode_enabled()  # in which gradients may be enabled, and are not formed
    if graph and torch._C._are_functorch_transforms_active():
        return None
    return "training" if graph else "inference"


def writable(y: Tensor | None) -> bool:
    """Whether torch lets y be written in place where no gradient is asked for, by an op that does not return it:
    not where y is the negative of what its memory holds, as the imaginary part of a conjugate is."""
    return y is not None and not y.is_neg() and (not y.is_inference() or is_inference_mode_enabled())
