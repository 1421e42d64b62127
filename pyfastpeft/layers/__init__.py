"""Drop-in modules on a frozen linear layer: LoRALinear, IA3Linear and, for many adapters at once, MultiLoRALinear; and
Bottleneck, which stands after a layer or beside it."""

from .bottleneck import Bottleneck
from .ia3 import IA3Linear
from .lora import LoRALinear
from .multi_lora import MultiLoRALinear

__all__ = ["Bottleneck", "IA3Linear", "LoRALinear", "MultiLoRALinear"]
