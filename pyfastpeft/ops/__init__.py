"""Functional ops with forward and backward, in nn.Linear's layout: weight [N, K], lora_A [r, K], lora_B [N, r]."""

from . import backends
from .adalora import adalora_linear
from .bottleneck import bottleneck
from .dispatch import use_backend
from .dora import dora_linear, dora_norm
from .frozen import frozen_linear
from .ia3 import ia3_linear
from .lora import lora_delta_, lora_linear
from .lora_group import lora_linear_group
from .multi_lora import Routing, multi_lora, multi_lora_linear, route
from .multi_scale import multi_scale

backends.register_all()

__all__ = [
    "Routing",
    "adalora_linear",
    "bottleneck",
    "dora_linear",
    "dora_norm",
    "frozen_linear",
    "ia3_linear",
    "lora_delta_",
    "lora_linear",
    "lora_linear_group",
    "multi_lora",
    "multi_lora_linear",
    "multi_scale",
    "route",
    "use_backend",
]
