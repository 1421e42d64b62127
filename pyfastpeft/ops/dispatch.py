"""The backend table: op -> rows (backend, devices, dtypes, function). The first matching row wins."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

BACKENDS = ("cuda", "cpu", "triton", "reference")  # the order in which rows are tried
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Row(NamedTuple):
    backend: str
    devices: tuple[str, ...]  # device types; empty: any
    dtypes: tuple[torch.dtype, ...]  # of the activations
    function: Callable


TABLE: dict[str, list[Row]] = {}
UNAVAILABLE: dict[str, str] = {}  # backend -> why it has no rows
_forced: str | None = os.environ.get("PYFASTPEFT_BACKEND") or None


def register(op: str, backend: str, devices: tuple[str, ...], function: Callable, dtypes=FLOATS) -> None:
    """Add a row. Rows of one op are kept in the order of BACKENDS."""
    rows = TABLE.setdefault(op, [])
    rows.append(Row(backend, devices, dtypes, function))
    rows.sort(key=lambda row: BACKENDS.index(row.backend))


def forced_backend() -> str | None:
    """The backend that `use_backend` or PYFASTPEFT_BACKEND (read when the package is imported) forces, or None."""
    return _forced


def select(op: str, device: str, dtype: torch.dtype, backend: str | None = None) -> Row:
    """The first row of `op` for activations of this device type and dtype; of `backend` alone, where it is given.

    Raises RuntimeError, with the reason of every row, if none matches: only a forced backend can miss,
    since the reference rows take every device and every float dtype.
    """
    forced = backend or _forced
    for row in TABLE[op]:
        if (forced is None or row.backend == forced) and device in (row.devices or (device,)) and dtype in row.dtypes:
            return row
    raise RuntimeError(_reasons(op, device, dtype, forced))


def _reasons(op, device, dtype, forced):
    if forced is not None and forced not in BACKENDS:
        return f"backend {forced!r} does not exist; choose one of {', '.join(BACKENDS)}"
    reasons = [
        f"{row.backend}: takes devices {row.devices or 'any'} and dtypes {[str(d)[6:] for d in row.dtypes]}"
        for row in TABLE[op]
        if row.backend == forced
    ] or [f"{forced}: {UNAVAILABLE.get(forced, f'has no row for {op}')}"]
    return f"{op}: backend {forced!r} is forced but does not serve {device} tensors of {dtype}. " + "; ".join(reasons)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend ("cuda", "cpu", "triton" or "reference") in this process, inside a `with` block.

    It decides the forward pass; a backward pass runs on the backend that its forward pass ran on.
    Raises ValueError for an unknown name; an op that the backend cannot serve raises RuntimeError with the reasons.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"use_backend: name is {name!r}; it must be one of {', '.join(BACKENDS)}")
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous
