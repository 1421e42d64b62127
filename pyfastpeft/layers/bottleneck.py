"""Bottleneck adapters: after a layer (Houlsby et al. 2019), beside it, or beside a chain of layers (He et al. 2022)."""

import math
from threading import local

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..ops.reference import ACTIVATIONS
from .adapted import Part


class Bottleneck(nn.Module):
    """y = residual + scaling * phi(norm(x) down^T + down_bias) up^T + up_bias  (He et al. 2022, table 1).

    Args:
        in_features: K. bottleneck_size: r. out_features: N; default: K.
        activation: phi, one of "relu", "gelu" (with erf), "gelu_tanh", "silu", "tanh" and "identity".
        scaling: a number, or "learned": a parameter [1] that starts at 1. up_bias is not scaled.
        layer_norm: whether norm is a LayerNorm over K, else it leaves x as it is.
        bias: whether there are down_bias [r] and up_bias [N], zero at the start.
        init_weights: True draws down [r, K] Kaiming-uniform (a = sqrt(5)) and sets up [N, r] to zero, so that y is the
            residual at the start; False draws both.
        device, dtype: of all parameters.

    Raises ValueError or TypeError naming the argument that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        bottleneck_size: int,
        out_features: int | None = None,
        activation: str = "relu",
        scaling: float | str = 1.0,
        layer_norm: bool = False,
        bias: bool = True,
        init_weights: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        op, out_features = "Bottleneck", in_features if out_features is None else out_features
        sizes = {"in_features": in_features, "bottleneck_size": bottleneck_size, "out_features": out_features}
        for name, size in sizes.items():
            checks.count(op, name, size)
        known = list(ACTIVATIONS)
        checks.need_value(activation in known, op, "activation", activation, f"one of {', '.join(known)}")
        if scaling != "learned":
            checks.number(op, "scaling", scaling)
        like = {"device": device, "dtype": dtype}
        self.activation = activation
        self.norm = nn.LayerNorm(in_features, **like) if layer_norm else None
        self.down = nn.Parameter(torch.empty(bottleneck_size, in_features, **like))
        self.up = nn.Parameter(torch.empty(out_features, bottleneck_size, **like))
        self.down_bias = nn.Parameter(torch.empty(bottleneck_size, **like)) if bias else None
        self.up_bias = nn.Parameter(torch.empty(out_features, **like)) if bias else None
        self.scaling = nn.Parameter(torch.empty(1, **like)) if scaling == "learned" else scaling
        self.reset_parameters(init_weights)

    def reset_parameters(self, init_weights: bool = True) -> None:
        """Set all parameters to what they start from."""
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        nn.init.zeros_(self.up) if init_weights else nn.init.kaiming_uniform_(self.up, a=math.sqrt(5))
        for bias in (self.down_bias, self.up_bias):
            bias is None or nn.init.zeros_(bias)
        if isinstance(self.scaling, nn.Parameter):
            nn.init.ones_(self.scaling)
        if self.norm is not None:
            self.norm.reset_parameters()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x [..., K], residual [..., N] (default: x) -> y [..., N] in residual's dtype."""
        checks.floating("Bottleneck", "x", x)
        residual = x if residual is None else residual
        seen = x if self.norm is None else self.norm(x.to(self.norm.weight.dtype))
        if seen.dtype != residual.dtype:
            seen = seen.to(residual.dtype)
        factors = self.down, self.down_bias, self.up, self.up_bias
        return ops.bottleneck(seen, residual, *factors, self.scaling, self.activation)

    def extra_repr(self) -> str:
        (rank, in_features), out_features = self.down.shape, len(self.up)
        scaling = "learned" if isinstance(self.scaling, nn.Parameter) else f"{self.scaling:g}"
        sizes = f"in_features={in_features}, bottleneck_size={rank}, out_features={out_features}"
        return f"{sizes}, activation={self.activation}, scaling={scaling}"


class SerialPart(Bottleneck, Part):
    """After a layer: reads its output, and is added to it."""

    def after(self, y):
        return self(y)


class ParallelPart(Bottleneck, Part):
    """Beside a layer: reads its input, and is added to its output."""

    def beside(self, y, x, weight, base=None):
        return self(x, y)


class Passage(local):
    """Where a tensor waits on its way from the entrance of a chain of layers to its exit; in every thread its own.

    Empty between forward passes, and copied so: a copy of the model has passages of its own.
    """

    x: Tensor | None = None

    def __deepcopy__(self, memo):
        return Passage()

    def __reduce__(self):
        return Passage, ()


class EntrancePart(Part):
    """At the first layer of a chain: hands its input to the `ExitPart` of the same adapter."""

    def __init__(self, passage: Passage):
        super().__init__()
        self.passage = passage

    def before(self, x):
        self.passage.x = x
        return x


class ExitPart(Bottleneck, Part):
    """At the last layer of a chain: reads the input of the chain, and is added to its output."""

    def __init__(self, passage: Passage, *args, **options):
        super().__init__(*args, **options)
        self.passage = passage

    def after(self, y):
        x, self.passage.x = self.passage.x, None
        needed = "that of the chain's first layer, which has to run before its last in the same forward pass"
        checks.need(x is not None, "bottleneck", "x", "missing", needed, RuntimeError)
        return self(x, y)
