"""pyfastpeft: fused kernels for parameter-efficient fine-tuning, and every method of it, in existing models."""

from typing import TYPE_CHECKING

from . import layers, methods, ops
from .methods import *  # noqa: F403
from .ops import use_backend

if TYPE_CHECKING:
    from .integrations.peft import accelerate, restore

__version__ = "0.1.0"
__all__ = ["accelerate", "layers", "methods", "ops", "restore", "use_backend", *methods.__all__]


def __getattr__(name: str):
    if name in ("accelerate", "restore"):  # PEFT is imported when they are first asked for
        from .integrations import peft

        return getattr(peft, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
