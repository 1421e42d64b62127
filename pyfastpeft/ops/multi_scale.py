"""Features scaled by a vector for every token's slot: IA3 and DoRA's magnitudes in batches of many adapters."""

import math

import torch
from torch import Tensor

from . import checks, native_calls, reference
from .multi_lora import Routing, check_range


def multi_scale(x: Tensor, scale: Tensor, slots: Tensor | Routing, shift: Tensor | None = None) -> Tensor:
    """y[t] = scale[a] * x[t] + shift[a] with a = slots[t]; for slot -1 x[t] as it is: IA3 (Liu et al. 2022, section
    3.3), and of DoRA (Liu et al. 2024, equation 5) the magnitudes by the norms.

    Args:
        x: [..., D], float64, float32, bfloat16 or float16, any strides; T tokens in all.
        scale: [L, D], any float dtype no wider than float32 or x's: what is formed with it is rounded once.
        slots: [T] integers in [-1, L), in any order, or the `Routing` that `route` made of them.
        shift: [L, D], of scale's dtype, or None: zero.

    Returns y [..., D] in x's dtype. Gradients reach x, scale and shift, and can be differentiated again. Without
    gradients it is one native call on the CPU where scale is of the dtype of sums; all else are torch's operations.
    Raises ValueError or TypeError naming the argument that does not fit; on other devices, as in `multi_lora`, a slot
    out of range counts as base only.
    """
    order, segments = slots if type(slots) is Routing else (slots, None)
    if (
        native_calls.mode(x, scale, shift, order, segments) == "inference"
        and order is not None
        and (y := native_calls.multi_scale_call(x, scale, shift, order, segments)) is not None
    ):
        return y
    op = "multi_scale"
    checks.floating(op, "x", x)
    checks.features(op, "x", x)
    checks.floating(op, "scale", scale)
    fits = scale.dim() == 2 and len(scale) > 0 and scale.shape[1] == x.shape[-1]
    checks.need_value(fits, op, "scale", scale, f"of shape [L, D] with D = {x.shape[-1]}, as x has, and L >= 1")
    checks.like(op, "scale", scale, x, dtype=False)
    checks.no_wider(op, "scale", scale, x)
    if shift is not None:
        checks.floating(op, "shift", shift)
        checks.shape(op, "shift", shift, tuple(scale.shape), "[L, D]")
        checks.like(op, "shift", shift, scale, other="scale")
    return reference.multi_scale(x, scale, _adapters(op, x, slots, len(scale)), shift)


def _adapters(op, x, slots, count) -> Tensor:
    """[T]: the adapter of every token of x, of which those outside of [0, count) are none."""
    tokens = math.prod(x.shape[:-1])
    if isinstance(slots, Routing):
        order, segments = slots
        checks.integers(op, "slots.order [T]", order, tokens, x)
        checks.integers(op, "slots.segments [L + 1]", segments, count + 1, x)
        place = torch.arange(tokens, device=x.device)
        if checks.values_on(x.device):
            once = torch.equal(order.sort().values, place)
            checks.need_value(once, op, "slots.order [T]", order, "a permutation of the tokens")
            inside = segments[0] >= 0 and segments[-1] <= tokens and bool((segments.diff() >= 0).all())
            checks.need(inside, op, "slots.segments [L + 1]", f"{segments.tolist()}", f"ascending within [0, {tokens}]")
        return torch.empty_like(order).scatter(0, order, torch.searchsorted(segments, place, right=True) - 1)
    checks.need_value(isinstance(slots, Tensor), op, "slots", slots, "a tensor of T integers or a Routing", TypeError)
    checks.integral(op, "slots", slots)
    checks.shape(op, "slots", slots, (tokens,), "[T]")
    checks.like(op, "slots", slots, x, dtype=False)
    if checks.values_on(slots.device):
        check_range(op, slots, count)
    return slots.to(torch.int64)
