"""What one adapter holds in one layer of an existing model: its parameters, and how the layer computes with them."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..ops.reference import accumulation
from .adapted import Part


class LoRAPart(Part):
    """W' = W + scaling * lora_B lora_A (Hu et al. 2021, equation 3): lora_A [r, K], lora_B [N, r].

    init: True draws lora_A Kaiming-uniform (a = sqrt(5)), "gaussian" normal with deviation 1 / r; lora_B is zero.
    False draws both, so that the layer changes at once.
    """

    mergeable = True

    def __init__(self, in_features, out_features, r, scaling, dropout_p=0.0, init=True, device=None, dtype=None):
        super().__init__()
        self.r, self.scaling = r, scaling
        self.dropout = nn.Dropout(dropout_p)  # a module, so that what sets the dropouts of a model finds it
        self.lora_A = nn.Parameter(torch.empty(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.empty(out_features, r, device=device, dtype=dtype))
        if init == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if init is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)

    @property
    def drop(self) -> float:
        """The share of x that the branch does not see now."""
        return self.dropout.p if self.dropout.training else 0.0

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """(lora_A [r, K], lora_B [N, r], scaling) of the change that this part makes to the weight."""
        return self.lora_A, self.lora_B, self.scaling

    def fused(self, x, weight, bias):
        return ops.lora_linear(x, weight, bias, *self.factors(), self.drop)

    def beside(self, y, x, weight, base=None):
        return ops.lora_delta_(y, x.to(y.dtype), *self.factors(), self.drop)

    def merged_beside(self, merged, weight):
        lora_A, lora_B, scaling = self.factors()
        return merged + scaling * (lora_B.to(merged.dtype) @ lora_A.to(merged.dtype))

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"


class EmbeddingLoRAPart(LoRAPart):
    """LoRA on an embedding's rows [vocabulary, d]: y = E[i] + scaling * lora_B lora_A[:, i], without dropout.

    lora_A [r, vocabulary] is zero at the start and lora_B [d, r] normal, since gradients reach few columns of lora_A.
    An embedding that scales what it looks up, as BART's may, scales this, too.
    """

    def __init__(self, embedding: nn.Embedding, r, scaling, init=True, device=None, dtype=None):
        size = embedding.num_embeddings, embedding.embedding_dim
        super().__init__(*size, r, scaling, 0.0, init, device, dtype)
        if init is not False:
            nn.init.zeros_(self.lora_A)
            nn.init.normal_(self.lora_B)
        self.padding_idx = embedding.padding_idx
        self.embed_scale = float(getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", 1.0)))

    def beside(self, y, x, weight, base=None):
        lora_A, lora_B, scaling = self.factors()
        scaling *= self.embed_scale
        shrunk = F.embedding(x, lora_A.T, self.padding_idx)
        return y + (scaling * (shrunk @ lora_B.T)).to(y.dtype)


class DoRAPart(LoRAPart):
    """W' = magnitude [N] * (W + scaling * lora_B lora_A) / norm of its rows (Liu et al. 2024, equation 5)."""

    reads_base = True

    def __init__(self, weight: Tensor, r, scaling, dropout_p=0.0, init=True, device=None, dtype=None):
        """weight [N, K]: of the base layer, whose rows' norms the magnitude starts from."""
        super().__init__(weight.shape[1], weight.shape[0], r, scaling, dropout_p, init, device, dtype)
        self.magnitude = nn.Parameter(torch.empty(weight.shape[0], device=device, dtype=dtype))
        with torch.no_grad():
            self.magnitude.copy_(self._norm(weight))

    def _norm(self, weight):
        return ops.dora_norm(weight.detach(), self.lora_A.detach(), self.lora_B.detach(), self.scaling)

    def fused(self, x, weight, bias):
        return ops.dora_linear(x, weight, bias, self.lora_A, self.lora_B, self.magnitude, self.scaling, self.drop)

    def beside(self, y, x, weight, base=None):
        if base is None:
            base, own = F.linear(x, weight), (self.lora_A, self.lora_B, self.magnitude, self.scaling, self.drop)
            whole = ops.dora_linear(x, weight, None, *own)
        else:
            whole = super().beside(base.clone(), x, weight)
            whole = whole * (self.magnitude / self._norm(weight)).to(whole.dtype)
        return y + (whole - base)

    def merged_beside(self, merged, weight):
        changed = super().merged_beside(weight, weight)
        norm = torch.linalg.vector_norm(changed, dim=1)
        changed = (self.magnitude.to(norm.dtype) / norm)[:, None] * changed
        return changed if merged is weight else merged + (changed - weight)


class AdaLoRAPart(LoRAPart):
    """W' = W + alpha / (r + 1e-5) * lora_B diag(lora_E) lora_A (Zhang et al. 2023, equation 3): lora_E [r, 1], zero.

    lora_A and lora_B start normal with deviation 0.02. A rank that is out of the budget has a zero in lora_E, or is
    gone (`keep`); the scaling stays that of the r at the start.
    """

    def __init__(self, in_features, out_features, r, alpha, dropout_p=0.0, init=True, device=None, dtype=None):
        super().__init__(in_features, out_features, r, alpha / (r + 1e-5), dropout_p, init, device, dtype)
        self.lora_E = nn.Parameter(torch.zeros(r, 1, device=device, dtype=dtype))
        for factor in (self.lora_A, self.lora_B):
            nn.init.normal_(factor, std=0.02)
        if init is False:
            nn.init.normal_(self.lora_E, std=0.02)

    def factors(self):
        return self.lora_A * self.lora_E, self.lora_B, self.scaling

    def fused(self, x, weight, bias):
        if self.r == 0:
            return None
        return ops.adalora_linear(x, weight, bias, self.lora_A, self.lora_E, self.lora_B, self.scaling, self.drop)

    def beside(self, y, x, weight, base=None):
        return super().beside(y, x, weight, base) if self.r else y

    def keep(self, ranks: Tensor) -> None:
        """Drop all but `ranks`, bool [r], for good; the parameters are new ones. What is computed stays the same if
        lora_E is zero where `ranks` is False."""
        for name, factor in list(self._parameters.items()):
            kept = factor.detach()[:, ranks] if name == "lora_B" else factor.detach()[ranks]
            setattr(self, name, nn.Parameter(kept.contiguous(), requires_grad=factor.requires_grad))
        self.r = len(self.lora_E)


class DyLoRAPart(LoRAPart):
    """LoRA cut to its first `rank` ranks, scaled by alpha / rank (Valipour et al. 2023, section 4.2).

    `rank` is drawn anew for every training step and may be set to anything in [1, r] to evaluate. frozen_above: where
    it is more than this, only the last of its ranks gets a gradient in training. What torch.compile makes of it
    computes with all r, of which those from `rank` on are zero, since it would compile anew for every other shape.
    """

    def __init__(
        self, in_features, out_features, r, alpha, dropout_p=0.0, init=True, device=None, dtype=None, frozen_above=None
    ):
        super().__init__(in_features, out_features, r, alpha / r, dropout_p, init, device, dtype)
        self.alpha, self.frozen_above = alpha, frozen_above
        self._cut = torch.tensor(r, device="cpu")  # the rank, as a compiled graph reads it
        self.rank = r

    @property
    def rank(self) -> int:
        return self._rank

    @rank.setter
    def rank(self, rank: int) -> None:
        self._rank = rank
        self._cut.fill_(rank)

    def factors(self):
        if torch.compiler.is_compiling():
            return self._masked_factors()
        lora_A, lora_B = self.lora_A[: self.rank], self.lora_B[:, : self.rank]
        if self.training and self.frozen_above is not None and self.rank > self.frozen_above:
            last = self.rank - 1
            lora_A = torch.cat([lora_A[:last].detach(), lora_A[last:]])
            lora_B = torch.cat([lora_B[:, :last].detach(), lora_B[:, last:]], dim=1)
        return lora_A, lora_B, self.alpha / self.rank

    def _masked_factors(self):
        lora_A, lora_B = self.lora_A, self.lora_B
        place = torch.arange(1, self.r + 1, device=lora_A.device)
        if self.training and self.frozen_above is not None:
            trains = (place == self._cut) | (self._cut <= self.frozen_above)
            lora_A = torch.where(trains[:, None], lora_A, lora_A.detach())
            lora_B = torch.where(trains, lora_B, lora_B.detach())
        share = torch.where(place <= self._cut, 1 / self._cut, 0).to(lora_A.dtype)
        return lora_A * share[:, None], lora_B, self.alpha


class IA3Part(Part):
    """y = (x * ia3_l) W^T + b if feedforward, else y = (x W^T + b) * ia3_l (Liu et al. 2022, section 3.3).

    ia3_l, ones at the start: [K] if feedforward, else [N].
    """

    mergeable = True

    def __init__(self, size, feedforward, init=True, device=None, dtype=None):
        super().__init__()
        self.feedforward = feedforward
        self.ia3_l = nn.Parameter(torch.ones(size, device=device, dtype=dtype))
        if init is False:
            nn.init.normal_(self.ia3_l)

    def _scaled(self, tensor):
        wide = accumulation(tensor.dtype)
        return (tensor.to(wide) * self.ia3_l.to(wide)).to(tensor.dtype)

    def before(self, x):
        return self._scaled(x) if self.feedforward else x

    def after(self, y):
        return y if self.feedforward else self._scaled(y)

    def fused(self, x, weight, bias):
        return ops.ia3_linear(x, weight, bias, self.ia3_l, self.feedforward)

    def merged_around(self, weight, bias):
        scale = self.ia3_l.to(weight.dtype)
        if self.feedforward:
            return weight * scale, bias
        return weight * scale[:, None], None if bias is None else bias * scale

    def extra_repr(self) -> str:
        return f"feedforward={self.feedforward}"
