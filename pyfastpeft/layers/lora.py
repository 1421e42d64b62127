"""LoRA on a frozen linear layer (Hu et al. 2021)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import checks, lora_linear
from .frozen import FrozenLinear


class LoRALinear(FrozenLinear):
    """y = x weight^T + bias + scaling * drop(x) lora_A^T lora_B^T, with weight and bias frozen.

    Args:
        in_features, out_features, bias: K, N and whether the base has a bias, as in torch.nn.Linear.
        rank: r.
        alpha: scaling is alpha / r, or alpha / sqrt(r) with use_rslora (Kalajdzievski 2023). Default: r.
        dropout_p: in [0, 1): the share of x's elements that the low-rank branch does not see in training mode.
        device, dtype: of all parameters. adapter_dtype: of lora_A and lora_B, if another.

    Attributes: weight [N, K]; bias [N] or None; lora_A [r, K], Kaiming-uniform (a = sqrt(5)); lora_B [N, r], zero;
    scaling. `from_linear` adapts an existing layer. Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float | None = None,
        bias: bool = True,
        dropout_p: float = 0.0,
        use_rslora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ):
        linear = nn.Linear(in_features, out_features, bias, device, dtype)
        self._adapt(linear, rank, alpha, dropout_p, use_rslora, adapter_dtype)

    def _adapt(self, linear, rank, alpha=None, dropout_p=0.0, use_rslora=False, adapter_dtype=None):
        op = "LoRALinear"
        checks.count(op, "rank", rank)
        checks.dropout(op, dropout_p)
        alpha = rank if alpha is None else alpha
        checks.number(op, "alpha", alpha)
        like = self._take(linear, adapter_dtype)
        self.rank, self.dropout_p = rank, dropout_p
        self.scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, rank, **like))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw lora_A anew and set lora_B to zero: the layer computes what its base computes."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> y [..., N]."""
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        p = self.dropout_p if self.training else 0.0
        return lora_linear(x, self.weight, self.bias, self.lora_A, self.lora_B, self.scaling, p)

    @torch.inference_mode(False)
    def merge(self) -> None:
        """weight + scaling * lora_B lora_A, summed in float32 and rounded once, takes the weight's place until
        `unmerge`; the original is kept. Raises RuntimeError if already merged."""
        weight, lora_A, lora_B = self._mergeable(self.lora_A, self.lora_B)
        self._merge(weight + self.scaling * (lora_B @ lora_A))

    def extra_repr(self) -> str:
        adapter = f"rank={self.rank}, scaling={self.scaling:g}, dropout_p={self.dropout_p}"
        return f"{super().extra_repr()}, {adapter}"
