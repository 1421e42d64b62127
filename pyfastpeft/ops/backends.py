"""Fills the dispatch table: one row for every op and backend."""

import importlib.util
import os

from . import dispatch, native, reference, schemas

_DEVICE = ("cuda",)  # ROCm tensors are of this device type too


def register_all() -> None:
    """Register the rows of every backend that this installation has, and the reasons for those it has not."""
    dispatch.UNAVAILABLE["cuda"] = "this version holds no CUDA C++ kernels"
    for op in schemas.SCHEMAS:
        function = getattr(reference, op)
        # The grouped formulas look at values on the host, which a compiled graph cannot: they are nodes of it.
        grouped = op.startswith(("multi_lora", "group_tokens"))
        dispatch.register(op, "reference", (), schemas.define("reference", op, function) if grouped else function)
    if native.AVAILABLE:
        for op in schemas.SCHEMAS:
            dispatch.register(op, "cpu", ("cpu",), schemas.native(op))
    _register_triton()


def _register_triton() -> None:
    if importlib.util.find_spec("triton") is None:
        dispatch.UNAVAILABLE["triton"] = "the package triton is not installed"
        return
    devices = (*_DEVICE, "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else _DEVICE
    for op in schemas.SCHEMAS:
        # Grouping is a sort, which torch has on every device.
        function = reference.group_tokens if op == "group_tokens" else _launcher(op)
        dispatch.register(op, "triton", devices, schemas.define("triton", op, function))


def _launcher(op: str):
    """The launcher of `op` in pyfastpeft.kernels; triton is imported when it is first called."""
    module = op.rsplit("_", 1)[0]

    def launch(*args):
        launchers = importlib.import_module(f"pyfastpeft.kernels.{module}")
        getattr(launchers, op)(*args)

    return launch
