"""`pyfastpeft doctor`: which backends run on this machine, and why the others do not."""

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F

import pyfastpeft

from ..methods.tables import table
from ..ops import dispatch, host, lora_linear, native, use_backend
from ..ops.frozen import prefers_own_linear

PACKAGES = ("torch", "triton", "numpy", "peft", "transformers", "safetensors")
VARIABLES = ("PYFASTPEFT_", "TRITON_", "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "OMP_NUM_THREADS")  # prefixes


def add_to(commands) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser("doctor", help="show which backends run on this machine, and why the others do not")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """0 if the reference is right here, else 1."""
    findings = diagnose()
    print(json.dumps(findings, indent=2) if options.json else render(findings))
    return 0 if all(check["ok"] for check in findings["checks"] if check["backend"] == "reference") else 1


def diagnose() -> dict:
    """What `pyfastpeft doctor` prints: dicts and lists of strings, numbers and booleans."""
    devices = {"cpu": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    if torch.cuda.is_available():
        devices["cuda"] = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    packages = {name: installed(name) for name in PACKAGES}
    backends = [_backend(name, devices, packages) for name in dispatch.BACKENDS]
    return {
        "pyfastpeft": pyfastpeft.__version__,
        "location": pyfastpeft.__path__[0],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "backends": backends,
        "host": {"available": host.AVAILABLE, "why_not": host.WHY_NOT},
        "environment": {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)},
        "checks": [
            check(backend["backend"], device)
            for backend in backends
            if backend["available"]
            for device in devices
            if device in (backend["devices"] or devices)
        ],
    }


def installed(package: str) -> str | None:
    """The version of an installed package, else None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu():
    whose = "own" if prefers_own_linear(torch.empty(0, dtype=torch.float32)) else "torch"
    return f"{torch.ops.pyfastpeft.cpu_capability()}; {whose} float32 matmul"


def _backend(name, present, packages):
    rows = {op: row for op, rows in dispatch.TABLE.items() for row in rows if row.backend == name}
    devices = sorted({device for row in rows.values() for device in row.devices})
    why_not = "" if rows else dispatch.UNAVAILABLE.get(name, "it has no rows")
    if devices and not set(devices) & set(present):
        why_not = f"torch sees no {' or '.join(devices)} device here"
    return {
        "backend": name,
        "available": not why_not,
        "devices": devices,  # none: any
        "dtypes": [str(d)[6:] for d in dispatch.FLOATS if any(d in row.dtypes for row in rows.values())],
        "ops": sorted(rows),
        "version": {
            "cuda": torch.ops.pyfastpeft.cuda_capability() if name == "cuda" and native.CUDA_AVAILABLE else None,
            "cpu": _cpu() if name == "cpu" and rows else None,
            "triton": f"triton {packages['triton']}",
            "addmm": f"torch {packages['torch']}",
            "reference": f"torch {packages['torch']}",
        }[name],
        "why_not": why_not,
    }


def check(backend: str, device: str, dtype: torch.dtype = torch.float32) -> dict:
    """The relative error of one lora_linear against float64, beside that of the same formula in torch; in bfloat16
    where the backend does not take dtype."""

    def formula(x, weight, lora_A, lora_B):
        return F.linear(x, weight) + 0.5 * (x @ lora_A.T @ lora_B.T)

    def error(y):
        return float((y.double().cpu() - exact).norm() / exact.norm())

    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in ((33, 96), (80, 96), (8, 96), (80, 8))]
    exact = formula(*(tensor.double() for tensor in given))
    x, weight, lora_A, lora_B = (tensor.to(device) for tensor in given)
    found = {"backend": backend, "device": device, "op": "lora_linear", "dtype": str(dtype)[6:], "ok": False}
    try:
        with use_backend(backend):
            y = lora_linear(x, weight, None, lora_A, lora_B, 0.5)
    except Exception as failure:
        if "does not serve" in str(failure) and dtype != torch.bfloat16:
            return check(backend, device, torch.bfloat16)
        return found | {"failure": f"{type(failure).__name__}: {failure}"}
    ours, torchs = error(y), error(formula(x, weight, lora_A, lora_B))
    allowed = (8 if dtype == torch.float32 else 0.3) * torch.finfo(dtype).eps
    return found | {"error": ours, "torch_error": torchs, "ok": ours <= torchs + allowed}


def render(findings: dict) -> str:
    """The findings as aligned tables."""
    packages = [[name, given or "not installed"] for name, given in findings["packages"].items()]
    host_module = "available" if findings["host"]["available"] else findings["host"]["why_not"]
    backends = [
        [
            row["backend"],
            "yes" if row["available"] else "no",
            " ".join(row["devices"]) or ("any" if row["ops"] else ""),
            " ".join(name.replace("bfloat", "bf").replace("float", "fp") for name in row["dtypes"]),
            f"{len(row['ops'])} of {len(dispatch.TABLE)}",
            row["why_not"] or row["version"],
        ]
        for row in findings["backends"]
    ]
    checks = [[row["backend"], row["device"], row["op"], row["dtype"], *_verdict(row)] for row in findings["checks"]]
    return "\n\n".join(
        (
            f"pyfastpeft {findings['pyfastpeft']} in {findings['location']}\n"
            f"Python {findings['python']} on {findings['platform']}",
            table(["package", "version"], packages),
            table(["device", ""], findings["devices"].items()),
            table(["backend", "available", "devices", "dtypes", "ops", ""], backends),
            f"host module: {host_module}",
            table(["variable", "value"], findings["environment"].items() or [["none is set", ""]]),
            table(["backend", "device", "op", "dtype", "error against fp64", "torch's own", ""], checks),
        )
    )


def _verdict(row):
    if "failure" in row:
        return "", "", row["failure"]
    return f"{row['error']:.1e}", f"{row['torch_error']:.1e}", "ok" if row["ok"] else "WRONG"
