"""What the layers share: a frozen linear layer into which an adapter can be merged and taken out again."""

from inspect import signature

import torch
from torch import Tensor, nn

from ..ops import checks
from ..ops.dispatch import FLOATS
from ..ops.reference import accumulation
from .adapted import BaseLinear, Mergeable, is_conv1d


class FrozenLinear(Mergeable, nn.Module):
    """weight [N, K] and bias [N] of a linear layer, both frozen. A subclass adds its adapter in `_adapt(linear, …)`.

    While merged, a layer loads no state dict, and none loads its own: RuntimeError.
    """

    def _take(self, linear: nn.Module, adapter_dtype: torch.dtype | None) -> dict:
        """Initialise with the parameters of `linear`, which are shared, not copied, and frozen: after the checks of all
        else. Returns the device and the dtype of the adapter's parameters."""
        super().__init__()
        name = type(self).__name__
        transposed = is_conv1d(type(linear))
        # A subclass may hold or compute something else.
        if not transposed and type(linear) not in (nn.Linear, BaseLinear):
            needed = "it must be exactly a torch.nn.Linear, or transformers' Conv1D"
            raise TypeError(f"{name}: linear is a {type(linear).__name__}; {needed}")
        checks.floating(name, "linear.weight", linear.weight)
        dtype, needed = adapter_dtype or linear.weight.dtype, f"None or one of {', '.join(map(str, FLOATS))}"
        checks.need_value(dtype in FLOATS, name, "adapter_dtype", adapter_dtype, needed, TypeError)
        fits, needed = dtype != torch.float64 or dtype == linear.weight.dtype, "no wider than float32 and the weight"
        checks.need_value(fits, name, "adapter_dtype", adapter_dtype, needed, TypeError)
        linear.requires_grad_(False)
        self.weight, self.bias = _frozen(linear.weight.T) if transposed else linear.weight, linear.bias
        self.out_features, self.in_features = self.weight.shape
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.register_buffer("unmerged_bias", None, persistent=False)
        self.train(linear.training)
        return {"device": self.weight.device, "dtype": dtype}

    @classmethod
    def from_linear(cls, linear: nn.Module, *args, **options):
        """A layer on the weight and bias of `linear`, which are shared, not copied, and frozen; the weight of a Conv1D
        of transformers, which is stored as [K, N], as a view.

        The other arguments are those of the class, without in_features, out_features, bias, device and dtype, which
        are those of `linear`. Raises TypeError unless it is exactly a torch.nn.Linear or Conv1D of a float dtype, or
        for an argument that the class lacks; `linear` is then as it was.
        """
        layer = cls.__new__(cls)
        taken = signature(layer._adapt)
        try:
            taken.bind(linear, *args, **options)
        except TypeError as why:
            raise TypeError(f"{cls.__name__}.from_linear: {why}; its arguments are {taken}") from None
        layer._adapt(linear, *args, **options)
        return layer

    @property
    def merged(self) -> bool:
        """Whether an adapter is merged into the weight."""
        return self.unmerged_weight is not None

    def _need_unmerged(self, what: str) -> None:
        """Raise RuntimeError while merged. what: that needs it otherwise, with the verb."""
        if self.merged:
            raise RuntimeError(f"{type(self).__name__}: {what} an unmerged weight; call unmerge() first")

    def _mergeable(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The weight and these tensors in the dtype of accumulation. Raises RuntimeError while merged."""
        self._need_unmerged("merge() needs")
        wide = accumulation(self.weight.dtype)
        return tuple(tensor.detach().to(wide) for tensor in (self.weight, *tensors))

    def _merge(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Replace the weight (and bias) by these, rounded once. Whoever shares the original ones keeps them."""
        self.unmerged_weight, self.weight = self.weight.detach(), _frozen(weight.to(self.weight.dtype))
        if bias is not None:
            self.unmerged_bias, self.bias = self.bias.detach(), _frozen(bias.to(self.bias.dtype))

    def unmerge(self) -> None:
        """Put the weight (and bias) of before `merge` back, bit for bit. Raises RuntimeError if none is merged."""
        if not self.merged:
            raise RuntimeError(f"{type(self).__name__}: unmerge() needs a merged adapter; call merge() first")
        self.weight, self.unmerged_weight = _frozen(self.unmerged_weight), None
        if self.unmerged_bias is not None:
            self.bias, self.unmerged_bias = _frozen(self.unmerged_bias), None

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
