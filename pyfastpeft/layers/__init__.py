"""Drop-in modules with a frozen linear layer: LoRALinear, IA3Linear and, for many adapters at once, MultiLoRALinear;
MultiLoRABranch is the latter beside a layer of any kind. Bottleneck goes after a layer or beside it. PrefixEncoder and
PromptEmbedding hold virtual tokens."""

from .bottleneck import Bottleneck
from .ia3 import IA3Linear
from .lora import LoRALinear
from .multi_lora import MultiLoRABranch, MultiLoRALinear
from .prefix import PrefixEncoder
from .prompt import PromptEmbedding

__all__ = [
    "Bottleneck",
    "IA3Linear",
    "LoRALinear",
    "MultiLoRABranch",
    "MultiLoRALinear",
    "PrefixEncoder",
    "PromptEmbedding",
]
