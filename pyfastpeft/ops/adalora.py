"""AdaLoRA on a linear layer: y = x W^T + b + scaling * drop(x) (diag(E) A)^T B^T (Zhang et al. 2023, equation 3)."""

from torch import Tensor

from . import checks
from .arguments import autocast_off, autocasting, cast_for_autocast
from .lora import lora_linear


def adalora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_E: Tensor,
    lora_B: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """y = x weight^T + bias + scaling * drop(x) (diag(lora_E) lora_A)^T lora_B^T  (Zhang et al. 2023, equation 3).

    Args:
        x, weight, bias, lora_A, lora_B, scaling, dropout_p: as in `lora_linear`. PEFT's scaling is alpha over the
            rank at the start plus 1e-5, however many ranks are left.
        lora_E: [r] or [r, 1], of lora_A's dtype: the singular values.

    Returns y [..., N] in x's dtype. Gradients reach x, lora_A, lora_E, lora_B and, where they require it, weight and
    bias. It is `lora_linear` with diag(lora_E) lora_A [r, K] for lora_A: at K elements a rank the product weighs
    nothing beside x weight^T. Raises ValueError or TypeError naming the argument that does not fit.
    """
    op = "adalora_linear"
    checks.floating(op, "x", x)
    if autocasting(x):
        cast = cast_for_autocast(x, weight, bias)
        with autocast_off(x):
            return adalora_linear(*cast, lora_A, lora_E, lora_B, scaling, dropout_p)
    checks.linear(op, x, weight, bias)
    checks.adapters(op, lora_A, lora_B, x)
    checks.shape(op, "lora_B", lora_B, (weight.shape[0], lora_A.shape[0]), "[N, r]")
    checks.floating(op, "lora_E", lora_E)
    rank = len(lora_A)
    if lora_E.shape not in ((rank,), (rank, 1)):
        checks.need_value(False, op, "lora_E", lora_E, f"of shape [r] = [{rank}] or [r, 1] = [{rank}, 1]")
    checks.like(op, "lora_E", lora_E, lora_A, other="lora_A")
    checks.number(op, "scaling", scaling)
    checks.dropout(op, dropout_p)
    return lora_linear(x, weight, bias, lora_A * lora_E.reshape(-1, 1), lora_B, scaling, dropout_p)
