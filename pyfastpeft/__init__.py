"""pyfastpeft: fused kernels for parameter-efficient fine-tuning, drop-in for models that PEFT wrapped."""

from . import ops
from .ops import use_backend

__version__ = "0.1.0"
__all__ = ["ops", "use_backend"]
