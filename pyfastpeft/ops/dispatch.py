"""The backend table: op -> rows (backend, devices, dtypes, function, fits). The first matching row wins.

Rows are tried in the order of BACKENDS; for CUDA tensors in that of choice.py, which is measured.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch.autograd import forward_ad

from . import choice

BACKENDS = ("cuda", "cpu", "triton", "addmm", "reference")
AUTOGRAD = "autograd"  # may be forced, too, but has no rows: ops are then their formulas in torch's operations
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Row(NamedTuple):
    backend: str
    devices: tuple[str, ...]  # device types; empty: any
    dtypes: tuple[torch.dtype, ...]  # of the activations
    function: Callable
    fits: Callable[..., str]  # why the row does not take these arguments of the op; "": it does


TABLE: dict[str, list[Row]] = {}
UNAVAILABLE: dict[str, str] = {}  # backend -> why it has no rows
_forced: str | None = os.environ.get("PYFASTPEFT_BACKEND") or None
_blocks = {0: _forced}  # of `use_backend`, in the order in which threads entered them: the last one decides
_changing = threading.Lock()
if _forced not in (None, AUTOGRAD, *BACKENDS):
    raise ValueError(f"PYFASTPEFT_BACKEND is {_forced!r}; it must be one of {', '.join(BACKENDS)}, {AUTOGRAD}")


def _always(*args) -> str:
    return ""


def register(
    op: str, backend: str, devices: tuple[str, ...], function: Callable, dtypes=FLOATS, fits: Callable = _always
) -> None:
    """Add a row. Rows of one op are kept in the order of BACKENDS."""
    rows = TABLE.setdefault(op, [])
    rows.append(Row(backend, devices, dtypes, function, fits))
    rows.sort(key=lambda row: BACKENDS.index(row.backend))


def forced_backend() -> str | None:
    """The backend that `use_backend` or PYFASTPEFT_BACKEND (read when the package is imported) forces, or None."""
    return _forced


def composed() -> bool:
    """Whether an op is to be its formula in torch's operations, which every gradient and transform can see into: where
    that is forced, in forward mode and in transforms of torch.func."""
    if _forced == AUTOGRAD or forward_ad._current_level >= 0:
        return True
    return torch._C._are_functorch_transforms_active()


def run(op: str, *args, backend: str | None = None) -> str | None:
    """Run `op` on its raw arguments by the first row that takes them, that of `backend` being tried first. Device and
    dtype are those of the first tensor. Returns the forced backend, by which the backward pass has to run, too."""
    select(op, args, backend).function(*args)
    return _forced


def select(op: str, args: tuple, backend: str | None = None) -> Row:
    """The row that `run` runs.

    Raises RuntimeError, saying why, if none matches: only a forced backend can miss, since the reference rows take
    every device and every float dtype.
    """
    for row in _rows(op, args, backend):
        if not row.fits(*args):
            return row
    raise RuntimeError(_why_not(op, args))


def _rows(op: str, args: tuple, backend: str | None = None) -> list[Row]:
    """The rows for the device and the dtype of these arguments, in the order in which they are tried."""
    first, rows = choice.leading(args), TABLE[op]
    device, dtype = first.device.type, first.dtype
    if backend is not None:
        rows = [*(row for row in rows if row.backend == backend), *(row for row in rows if row.backend != backend)]
    elif _forced not in (None, AUTOGRAD):
        rows = [row for row in rows if row.backend == _forced]
    elif device == "cuda":
        ranking = choice.ranking(op, args)
        rows = [row for name in ranking for row in rows if row.backend == name]
    return [row for row in rows if device in (row.devices or (device,)) and dtype in row.dtypes]


def has_kernel(op: str, args: tuple) -> bool:
    """Whether a kernel runs `op` here, or a backend is forced; else torch's own operations do. Of the raw arguments
    only those that `choice.described` reads have to be given."""
    return _forced is not None or _rows(op, args)[0].backend not in choice.RULE


def preferred(op: str, args: tuple) -> bool:
    """Whether the backend that is forced, or that is the fastest for CUDA tensors, has a row for `op`; without one,
    another backend would run it. Of the raw arguments only those that `choice.described` reads have to be given."""
    on_cuda = choice.leading(args).device.type == "cuda"
    name = _forced or (choice.ranking(op, args)[0] if on_cuda else None)
    return name is None or any(row.backend == name for row in TABLE[op])


def _why_not(op, args):
    first = choice.leading(args)
    device, dtype = first.device.type, first.dtype
    reason = UNAVAILABLE.get(_forced, f"has no row for {op}")
    for row in TABLE[op]:
        if row.backend == _forced:
            lacks = device in (row.devices or (device,)) and dtype in row.dtypes and row.fits(*args)
            takes = f"takes devices {row.devices or 'any'} and dtypes {[str(d)[6:] for d in row.dtypes]}"
            reason = lacks or takes
    served = f"{op}: backend {_forced!r} is forced but does not serve {device} tensors of {dtype}"
    return f"{served}. {_forced}: {reason}"


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force one backend ("cuda", "cpu", "triton", "addmm" or "reference") in this process, inside a `with` block; of
    several blocks that threads are in, the one entered last decides. With "autograd" no kernel runs: ops are their
    formulas in torch's operations, of which gradients of gradients can be formed.

    It decides the forward pass; a backward pass runs on the backend that was forced in its forward pass, if it can.
    Raises ValueError for an unknown name; an op that the backend cannot serve raises RuntimeError with the reasons.
    """
    global _forced
    if name not in (*BACKENDS, AUTOGRAD):
        raise ValueError(f"use_backend: name is {name!r}; it must be one of {', '.join(BACKENDS)}, {AUTOGRAD}")
    changing = nullcontext() if torch.compiler.is_compiling() else _changing  # torch's compiler takes no lock
    with changing:
        block = max(_blocks) + 1
        _blocks[block] = _forced = name
    try:
        yield
    finally:
        with changing:
            del _blocks[block]
            _forced = _blocks[max(_blocks)]
