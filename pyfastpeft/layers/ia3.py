"""IA3 on a frozen linear layer (Liu et al. 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import ia3_linear
from .frozen import FrozenLinear


class IA3Linear(FrozenLinear):
    """y = (x * ia3_l) weight^T + bias if feedforward, else y = (x weight^T + bias) * ia3_l; weight and bias frozen.

    Args:
        in_features, out_features, bias: K, N and whether the base has a bias, as in torch.nn.Linear.
        feedforward: whether the scale meets the input (of a feed-forward's down projection) or the output (keys and
            values).
        device, dtype: of all parameters. adapter_dtype: of ia3_l, if another.

    Attributes: weight [N, K]; bias [N] or None; ia3_l, [K] if feedforward, else [N], ones. `from_linear` adapts an
    existing layer. Raises TypeError naming the argument that does not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        feedforward: bool = False,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        self._adapt(nn.Linear(in_features, out_features, bias, device, dtype), feedforward, adapter_dtype)

    def _adapt(self, linear, feedforward=False, adapter_dtype=None):
        like = self._take(linear, adapter_dtype)
        self.feedforward = feedforward
        size = self.in_features if feedforward else self.out_features
        self.ia3_l = nn.Parameter(torch.ones(size, **like))

    def reset_parameters(self) -> None:
        """Set ia3_l to one: the layer computes what its base computes."""
        nn.init.ones_(self.ia3_l)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N]."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        return ia3_linear(x, self.weight, self.bias, self.ia3_l, self.feedforward)

    @torch.inference_mode(False)
    def merge(self) -> None:
        """The weight scaled by ia3_l (and the bias, unless feedforward), rounded once, takes the weight's place until
        `unmerge`; the original is kept. Raises RuntimeError if already merged."""
        weight, scale = self._mergeable(self.ia3_l)
        if self.feedforward:
            self._merge(weight * scale)
        else:
            self._merge(weight * scale[:, None], None if self.bias is None else self.bias.detach() * scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, feedforward={self.feedforward}"
