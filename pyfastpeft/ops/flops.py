"""What torch's FlopCounterMode counts of the raw ops: the matrix products of their formulas."""

from functools import partial

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from . import reference


def register(op: str, *packets) -> None:
    """Let torch.ops.<namespace>.<name>, which take the arguments of `op`, be counted."""
    count = {"multi_lora_forward": _multi_lora_forward, "multi_lora_backward": _multi_lora_backward}
    register_flop_formula(packets, get_raw=True)(count.get(op, partial(_of_formula, op)))


def _of_formula(op, *args, out_val=None) -> int:
    shapes = tree_map_only(Tensor, lambda t: torch.empty(t.shape, dtype=t.dtype, device="meta"), args)
    with FlopCounterMode(display=False) as counter:
        getattr(reference, op)(*shapes)
    return counter.get_total_flops()


def _multi_lora_forward(x, weight, bias, lora_A, lora_B, scaling, ranks, order, segments, *_, out_val=None) -> int:
    used = _used(x, lora_A, ranks, segments)
    base = 0 if weight is None else x.shape[0] * weight.numel()
    return 2 * (base + used * (lora_A.shape[2] + lora_B.shape[1]))


def _multi_lora_backward(
    dy, x, weight, lora_A, lora_B, scaling, ranks, order, segments, s, dx, dlora_A, dlora_B, out_val=None
) -> int:
    used = _used(dy, lora_A, ranks, segments)
    base = 0 if weight is None or dx is None else dy.shape[0] * weight.numel()
    inner = lora_A.shape[2] * ((dx is not None) + (dlora_A is not None))
    return 2 * (base + used * (inner + lora_B.shape[1] * (1 + (dlora_B is not None))))


def _used(rows, lora_A, ranks, segments) -> int:
    """The ranks of the adapters of all tokens, summed: as if all had an adapter of full rank where values are hidden,
    as in torch's own count of ragged attention."""
    if type(segments) is not Tensor or segments.is_meta:
        return rows.shape[0] * lora_A.shape[1]
    return int((segments.diff() * (lora_A.shape[1] if ranks is None else ranks)).sum())
