"""Which backend runs an op on CUDA tensors: the one measured to be the fastest on such a GPU, for the nearest shape.

choices.json holds the measurements, made by `python -m benchmarks.choose` from what `make gpu` wrote: for every
architecture a list of {"op", "kind", "sizes", "backends"}, its backends being those that gave right results, the
fastest first. The nearest entry has the same op and kind and the smallest sum of |log(size / size)|. Tensor cores
multiply float16 and bfloat16 alike, so one kind, named after bfloat16, stands for both. Without an entry, no GPU of
this architecture has run our kernels on such operands, and RULE applies: torch's own products.
"""

import functools
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from .schemas import SCHEMAS

RULE = ("addmm", "reference")
NAMES = {  # of an op's arguments
    op: [argument.split()[-1] for argument in schema.removeprefix("(").partition(") ->")[0].split(",")]
    for op, schema in SCHEMAS.items()
}
FILE = Path(__file__).with_name("choices.json")
measured: dict[str, list[dict]] = json.loads(FILE.read_text()) if FILE.exists() else {}
MANY = 8192  # tokens that a compiled graph is taken to see, so that it does not depend on their number


def ranking(op: str, args: tuple) -> tuple[str, ...]:
    """The backends to try for these raw arguments of `op`, in their order; the first argument is on a CUDA device."""
    return _ranking(op, architecture(leading(args).device.index or 0), *described(op, args))


def leading(args: tuple) -> Tensor:
    """The tensor whose device and dtype count as the op's: its first argument, or the first of a list of these."""
    return args[0][0] if isinstance(args[0], (list, tuple)) else args[0]


@functools.cache
def architecture(device: int) -> str:
    """ "sm_90" for an H200, "gfx942" for an MI300."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def described(op: str, args: tuple) -> tuple[str, tuple[int, ...]]:
    """The kind of an op's operands, e.g. "bfloat16, adapters float32, dropout", and their sizes: M, K, N, r, L."""
    named = dict(zip(NAMES[op], args))
    if "weights" in named:  # a group counts as its first layer with the ranks of all
        named |= {"weight": named["weights"][0], "lora_B": named["lora_Bs"][0]}
    first, weight = leading(args), named.get("weight")
    down, up = (named.get(a, named.get(b)) for a, b in (("lora_A", "down"), ("lora_B", "up")))
    kind = [_named(first.dtype)]
    sizes = {"M": MANY if torch.compiler.is_compiling() else math.prod(first.shape[:-1] or first.shape)}
    if isinstance(weight, Tensor):
        sizes |= {"N": weight.shape[0], "K": weight.shape[1]}
    elif "weight" in named:
        kind.append("no weight")
    if isinstance(down, Tensor) and isinstance(up, Tensor):
        kind.append(f"adapters {_named(down.dtype)}")
        sizes |= {"N": up.shape[-2], "K": down.shape[-1], "r": down.shape[-2]}
        sizes |= {"L": len(down)} if down.dim() == 3 else {}
    kind += [
        word for word, there in (("dropout", named.get("seed") is not None), ("ff", named.get("feedforward"))) if there
    ]
    return ", ".join(kind), tuple(int(sizes.get(name, 1)) for name in "MKNrL")


def _named(dtype: torch.dtype) -> str:
    return str(torch.bfloat16 if dtype == torch.float16 else dtype)[6:]


@functools.lru_cache(4096)
def _ranking(op, architecture, kind, sizes):
    op = op.replace("lora_group", "lora")  # what serves one layer best serves several
    entries = [e for e in measured.get(architecture, ()) if (e["op"], e["kind"]) == (op, kind)]
    if not entries:
        return RULE
    # Compiled graphs trace this, and know no min with a key before torch 2.11.
    factors = [sum([abs(math.log(a / b)) for a, b in zip(entry["sizes"], sizes)]) for entry in entries]
    nearest = entries[factors.index(min(factors))]
    return (*nearest["backends"], *(name for name in RULE if name not in nearest["backends"]))
