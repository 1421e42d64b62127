"""Bottleneck adapters: the low-rank branch with a shift and an activation in its middle, beside a residual."""

from .blocks import accumulation, launcher
from .lora import expand_backward, factor_gradient, linear, shrink


@launcher
def bottleneck_forward(x, residual, down, down_bias, up, up_bias, scaling, activation, y, s):
    """s = x down^T;  y = residual + scaling * phi(s + down_bias) up^T + up_bias.

    x [M, K], residual [M, N], down [r, K], down_bias [r], up [N, r], up_bias [N]; written: y [M, N], s [M, r].
    """
    shrink(x, down, s, 1.0)
    linear(x, None, up_bias, s, up, y, scaling, base=residual, shift=down_bias, activation=activation)


@launcher
def bottleneck_backward(dy, x, down, down_bias, up, scaling, activation, s, serial, dx, ddown, ddown_bias, dup):
    """dup = scaling * dy^T phi(s + down_bias);  ds = scaling * dy up * phi'(s + down_bias);  ddown = ds^T x;
    ddown_bias = sum over rows of ds;  dx = ds down, + dy where serial.

    dy [M, N], the rest as in bottleneck_forward; written, each unless None: dx [M, K], ddown, ddown_bias, dup.
    """
    ds = None
    if any(gradient is not None for gradient in (dx, ddown, ddown_bias)):
        ds = dy.new_empty(len(dy), len(down), dtype=accumulation(dy.dtype))
    expand_backward(dy, s, up, scaling, ds, dup, down_bias, activation)
    if ddown is not None:
        factor_gradient(x, ds, ddown, 0, 1.0)
    if ddown_bias is not None:
        ddown_bias.copy_(ds.sum(0))
    if dx is not None:
        linear(dy, None, None, ds, down.T, dx, 1.0, base=dy if serial else None)
