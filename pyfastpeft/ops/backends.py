"""Fills the dispatch table: one row for every op and backend."""

import importlib.util
import os

import torch

from . import addmm, cuda, dispatch, native, reference, schemas

_DEVICE = ("cuda",)  # ROCm tensors are of this device type too


def register_all() -> None:
    """Register the rows of every backend that can run here, and the reasons why the others cannot."""
    triton_devices = (*_DEVICE, "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else _DEVICE
    has_triton = importlib.util.find_spec("triton") is not None
    if not has_triton:
        dispatch.UNAVAILABLE["triton"] = "the package triton is not installed"
    for op in schemas.SCHEMAS:
        dtypes = (torch.int64,) if op == "group_tokens" else dispatch.FLOATS
        # The grouped formulas look at values on the host, which a compiled graph cannot: they are nodes of it.
        grouped = op.startswith(("multi_lora", "group_tokens"))
        for name, formulas in (("addmm", addmm), ("reference", reference)):
            if function := getattr(formulas, op, None):
                dispatch.register(op, name, (), schemas.define(name, op, function) if grouped else function, dtypes)
        if native.AVAILABLE:
            dispatch.register(op, "cpu", ("cpu",), schemas.native(op), dtypes)
        if native.CUDA_AVAILABLE and torch._C._dispatch_has_kernel_for_dispatch_key(f"pyfastpeft::{op}", "CUDA"):
            dispatch.register(op, "cuda", _DEVICE, schemas.native(op), dtypes, getattr(cuda, op))
        if has_triton:
            # Grouping is a sort, which torch has on every device.
            function = reference.group_tokens if op == "group_tokens" else _launcher(op)
            dispatch.register(op, "triton", triton_devices, schemas.define("triton", op, function), dtypes)


def _launcher(op: str):
    """The launcher of `op` in pyfastpeft.kernels; triton is imported when it is first called."""
    module = op.rsplit("_", 1)[0]

    def launch(*args):
        launchers = importlib.import_module(f"pyfastpeft.kernels.{module}")
        getattr(launchers, op)(*args)

    return launch
