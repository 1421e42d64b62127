"""The error rule: ours may be off from float64 by torch's own error in that dtype plus a tolerance, and no more.

A check runs the unfused formula in float64 (exact), the unfused formula in the inputs' dtypes (torch's own), and the
fused op; it compares the output and the gradient of every input that requires one. Fresh memory is poisoned with NaN.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

# In units of the output dtype's epsilon times the norm of the exact result. Rounding alone costs about 0.3 epsilon;
# in float32 and float64 the order of summation adds to it.
TOLERANCE = {torch.float64: 64.0, torch.float32: 8.0, torch.bfloat16: 0.3, torch.float16: 0.3}

DTYPES = [(torch.float64, None), (torch.float32, None), (torch.bfloat16, None), (torch.float16, None)]
MIXED = [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN in here."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(previous)


def _run(function, inputs, seed):
    leaves = {name: t.detach().clone().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    # clone() gives up strides; a view of a bigger leaf keeps them.
    leaves = {n: t if t.stride() == inputs[n].stride() else _same_strides(inputs[n]) for n, t in leaves.items()}
    out = function(**leaves)
    generator = torch.Generator().manual_seed(seed)
    out.backward(
        torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, torch.bfloat16).to(out)
    )
    return {"output": out.detach()} | {name: t.grad for name, t in leaves.items() if t.requires_grad}


def _same_strides(tensor):
    """A leaf of the same values and strides, with zeros in the gaps: torch's own bfloat16 products read them."""
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    copy = torch.zeros(extent, dtype=tensor.dtype, device=tensor.device).as_strided(tensor.shape, tensor.stride())
    return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def assert_error_rule(
    fused: Callable,
    unfused: Callable,
    inputs: dict[str, Tensor],
    seed: int = 1,
    through: dict | None = None,
    roundings: int = 1,
) -> None:
    """Both functions take `inputs` by name and return one tensor. AssertionError names what is off, and by how much.

    `through` tells for the inputs whose gradient is formed from a tensor that was kept rounded to which dtype;
    `roundings` is how many times the tolerance counts, where the fused formula rounds at other places than torch's.
    """
    exact = _run(unfused, {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}, seed)
    own = _run(unfused, inputs, seed)
    with poisoned_memory():
        ours = _run(fused, inputs, seed)
    for name, reference in exact.items():
        assert ours[name] is not None, f"{name} has no gradient"
        dtype = own[name].dtype
        assert ours[name].dtype == dtype, f"{name} is {ours[name].dtype}, not {dtype}"
        assert ours[name].shape == reference.shape, f"{name} has shape {list(ours[name].shape)}"
        error, own_error = ((r[name].double() - reference).norm().item() for r in (ours, own))
        unit = (through or {}).get(name, dtype)
        bound = own_error + roundings * TOLERANCE[unit] * torch.finfo(unit).eps * reference.norm().item()
        assert error <= bound, f"{name}: error {error:.3e} against torch's own {own_error:.3e} (bound {bound:.3e})"


# --- unfused formulas ---


def unfused_delta(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The low-rank branch as PEFT forms it: x cast to the adapters' dtype, two linears, the scale."""
    return F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B) * scaling


def unfused_lora(x, weight, bias, lora_A, lora_B, scaling):
    base = F.linear(x, weight, bias)
    return (base + unfused_delta(x, lora_A, lora_B, scaling)).to(base.dtype)


def grouped(function, x, **members):
    """function(x, weights, biases, lora_As, lora_Bs), its outputs side by side; members: weight0, bias0, …, lora_B1."""
    count = sum(name.startswith("weight") for name in members)
    kinds = ([members.get(f"{kind}{i}") for i in range(count)] for kind in ("weight", "bias", "lora_A", "lora_B"))
    return torch.cat(function(x, *kinds), -1)


def unfused_group(x, weights, biases, lora_As, lora_Bs, scalings):
    return [unfused_lora(x, *layer) for layer in zip(weights, biases, lora_As, lora_Bs, scalings)]


def unfused_dora(x, weight, bias, lora_A, lora_B, magnitude, scaling):
    """The norm from the whole of B A, and a constant."""
    with torch.no_grad():
        norm = torch.linalg.vector_norm(weight + scaling * (lora_B @ lora_A), dim=1)
    y = magnitude / norm * (F.linear(x, weight) + unfused_delta(x, lora_A, lora_B, scaling))
    return (y if bias is None else y + bias).to(x.dtype)


def unfused_adalora(x, weight, bias, lora_A, lora_E, lora_B, scaling):
    return unfused_lora(x, weight, bias, lora_A * lora_E.reshape(-1, 1), lora_B, scaling)


def unfused_ia3(x, weight, bias, ia3_l, feedforward):
    if feedforward:
        return F.linear((x * ia3_l).to(x.dtype), weight, bias)
    base = F.linear(x, weight, bias)
    return (base * ia3_l).to(base.dtype)


def unfused_bottleneck(x, residual, down, down_bias, up, up_bias, scaling, activation):
    phi = {
        "relu": torch.relu,
        "gelu": F.gelu,
        "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
        "silu": F.silu,
        "tanh": torch.tanh,
        "identity": lambda v: v,
    }[activation]
    delta = F.linear(phi(F.linear(x.to(down.dtype), down, down_bias)), up) * scaling
    return (residual + delta + (0 if up_bias is None else up_bias)).to(residual.dtype)


def unfused_multi_lora(y, x, lora_A, lora_B, slots, scaling, ranks=None):
    """y [T, N] + the branch of every adapter on its own tokens, one after the other."""
    for a in range(len(lora_A)):
        r = lora_A.shape[1] if ranks is None else int(ranks[a])
        tokens = (slots == a).nonzero().flatten()
        delta = unfused_delta(x[tokens], lora_A[a, :r], lora_B[a, :, :r], float(scaling[a]))
        y = y.index_put((tokens,), (y[tokens] + delta).to(y.dtype))
    return y


def unfused_multi_lora_linear(x, weight, bias, lora_A, lora_B, slots, scaling, ranks=None):
    rows = x.flatten(0, -2)
    y = unfused_multi_lora(F.linear(rows, weight, bias), rows, lora_A, lora_B, slots, scaling, ranks)
    return y.view(*x.shape[:-1], -1)


# --- inputs ---


def random(*shape: int, dtype=torch.float32, grad: bool = True, device="cpu") -> Tensor:
    return (torch.randn(*shape, dtype=torch.float64) / shape[-1] ** 0.5).to(device, dtype).requires_grad_(grad)


def bottleneck_inputs(m, k, n, r, dtype, adapter_dtype=None, biases=True, device="cpu") -> dict[str, Tensor]:
    """n None: a serial adapter, without a residual of its own."""
    adapter_dtype, n, serial = adapter_dtype or dtype, n or k, n is None
    inputs = {
        "x": random(m, k, dtype=dtype, device=device),
        "down": random(r, k, dtype=adapter_dtype, device=device),
        "up": random(n, r, dtype=adapter_dtype, device=device),
    }
    if not serial:
        inputs["residual"] = random(m, n, dtype=dtype, device=device)
    if biases:
        inputs |= {
            "down_bias": random(r, dtype=adapter_dtype, device=device),
            "up_bias": random(n, dtype=adapter_dtype, device=device),
        }
    return inputs


def group_inputs(m, k, layers, dtype, adapter_dtype=None, frozen=True, device="cpu") -> dict[str, Tensor]:
    """For `grouped`; layers: (N, r) of every one, of which the second has no bias."""
    inputs = {}
    for i, (n, r) in enumerate(layers):
        layer = lora_inputs(m, k, n, r, dtype, adapter_dtype, i != 1, frozen, device)
        inputs |= {name if name == "x" else f"{name}{i}": tensor for name, tensor in layer.items()}
    return inputs


def multi_lora_inputs(t, k, n, r, num_adapters, dtype, adapter_dtype=None, device="cpu") -> dict[str, Tensor]:
    adapter_dtype = adapter_dtype or dtype
    return {
        "y": random(t, n, dtype=dtype, device=device),
        "x": random(t, k, dtype=dtype, device=device),
        "lora_A": random(num_adapters, r, k, dtype=adapter_dtype, device=device),
        "lora_B": random(num_adapters, n, r, dtype=adapter_dtype, device=device),
    }


def multi_layer_inputs(m, k, n, r, num_adapters, dtype, adapter_dtype=None, **options) -> dict[str, Tensor]:
    """Those of a layer with an adapter for each token; `options` as in lora_inputs."""
    inputs, device = lora_inputs(m, k, n, r, dtype, adapter_dtype, **options), options.get("device", "cpu")
    for name, shape in (("lora_A", (r, k)), ("lora_B", (n, r))):
        inputs[name] = random(num_adapters, *shape, dtype=adapter_dtype or dtype, device=device)
    return inputs


def lora_inputs(m, k, n, r, dtype, adapter_dtype=None, bias=True, frozen=True, device="cpu") -> dict[str, Tensor]:
    adapter_dtype = adapter_dtype or dtype
    inputs = {
        "x": random(*((m,) if isinstance(m, int) else m), k, dtype=dtype, device=device),
        "weight": random(n, k, dtype=dtype, grad=not frozen, device=device),
        "lora_A": random(r, k, dtype=adapter_dtype, device=device),
        "lora_B": random(n, r, dtype=adapter_dtype, device=device),
    }
    if bias:
        inputs["bias"] = random(n, dtype=dtype, grad=not frozen, device=device)
    return inputs
