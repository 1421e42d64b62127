"""Host code of every step: pybind11 where it is built, NumPy where it is not."""

import numpy as np

try:
    from .. import _host

    AVAILABLE, WHY_NOT = True, ""
except ImportError as error:
    AVAILABLE, WHY_NOT = False, f"the host module is not built ({error})"


def group_tokens(slots: np.ndarray, num_adapters: int) -> tuple[np.ndarray, np.ndarray]:
    """(order [T], segments [num_adapters + 1]), int64: a stable counting sort of slots [T] in [-1, num_adapters)."""
    if AVAILABLE:
        return _host.group_tokens(np.ascontiguousarray(slots, dtype=np.int64), num_adapters)
    order = np.argsort(slots, kind="stable")
    return order, np.searchsorted(slots[order], np.arange(num_adapters + 1))
