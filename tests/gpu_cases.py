"""What test_gpu.py asks of a GPU and test_cuda_emulator.py of the emulator: calls that are to give the same bits every
time, and graphs that serve slots which change."""

import functools
from collections.abc import Callable

import torch
from error_rule import group_inputs, grouped, lora_inputs, multi_layer_inputs, multi_lora_inputs, random
from torch import Tensor

from pyfastpeft import ops


def in_blocks(num_adapters: int, device="cuda") -> Tensor:
    """Slots of 1064 tokens: blocks of 256 of one adapter, of all, of one but for two tokens, of none; a smaller one."""
    slots = torch.randint(-1, num_adapters, (5, 256), device=device)
    slots[0], slots[2], slots[3], slots[4] = 1, 1, -1, 0
    slots[2, 100:102] = torch.tensor([-1, 0])
    return slots.flatten()[:1064]


def lora(x, weight, bias, lora_A, lora_B, dropout_p=0.0):
    return ops.lora_linear(x, weight, bias, lora_A, lora_B, 0.7, dropout_p)


def dropped(**inputs):
    torch.manual_seed(9)
    return lora(**inputs, dropout_p=0.25)


group = functools.partial(grouped, functools.partial(ops.lora_linear_group, scalings=[0.7, -1.3]))


def ia3(feedforward, k, n, dtype, adapter_dtype, device):
    shapes = {"x": (300, k), "weight": (n, k), "bias": (n,)}
    inputs = {name: random(*s, dtype=dtype, grad=name == "x", device=device) for name, s in shapes.items()}
    inputs["ia3_l"] = random(k if feedforward else n, dtype=adapter_dtype, device=device)
    return functools.partial(ops.ia3_linear, feedforward=feedforward), inputs


def multi_lora(tokens, k, n, *dtypes, device):
    def run(y, **rest):
        return ops.multi_lora(y.clone(), **rest, slots=slots, scaling=0.5)

    slots = torch.randint(-1, 7, (tokens,), device=device)
    return run, multi_lora_inputs(tokens, k, n, 16, 7, *dtypes, device=device)


def multi_lora_linear(slots, k, n, *dtypes, device):
    run = functools.partial(ops.multi_lora_linear, slots=ops.route(slots.to(device), 7), scaling=0.5)
    return run, multi_layer_inputs(len(slots), k, n, 16, 7, *dtypes, device=device)


# name -> (function, its inputs) of K, N, the dtypes of activations and adapters, and the device. "few" are as many
# tokens as go through a base layer and its adapters in one launch.
REPEATABLE = {
    "lora": lambda *args, **on: (lora, lora_inputs(300, *args[:2], 16, *args[2:], **on)),
    "lora of few": lambda *args, **on: (lora, lora_inputs(64, *args[:2], 16, *args[2:], **on)),
    "dropout": lambda *args, **on: (dropped, lora_inputs(300, *args[:2], 16, *args[2:], **on)),
    "group": lambda k, n, *dtypes, **on: (group, group_inputs(300, k, [(n, 16), (n - 8, 8)], *dtypes, **on)),
    "group of few": lambda k, n, *dtypes, **on: (group, group_inputs(64, k, [(n, 16), (n - 8, 8)], *dtypes, **on)),
    "ia3": functools.partial(ia3, False),
    "ia3 feedforward": functools.partial(ia3, True),
    "multi_lora": functools.partial(multi_lora, 300),
    "multi_lora of few": functools.partial(multi_lora, 64),
    "multi_lora_linear": lambda *args, **on: multi_lora_linear(in_blocks(7, "cpu"), *args, **on),
    "multi_lora_linear of few": lambda *args, **on: multi_lora_linear(torch.randint(-1, 7, (64,)), *args, **on),
}


def assert_repeatable(name: str, k: int, n: int, adapter_dtype: torch.dtype, device: str, runs: int) -> None:
    run, inputs = REPEATABLE[name](k, n, torch.bfloat16, adapter_dtype, device=device)

    def gradients():
        out = run(**inputs)
        return out, *torch.autograd.grad(out.float().square().sum(), [t for t in inputs.values() if t.requires_grad])

    first = gradients()
    for _ in range(runs):
        assert all(map(torch.equal, gradients(), first))


def assert_serves_slots_that_change(
    tokens: int, included: bool, device: str, captured: Callable[[Callable], Callable], features: int = 136
) -> None:
    """`included`: the base layer, too, in one launch with the adapters of up to 64 tokens, or with blocks of tokens of
    one adapter. captured(run) captures a graph of what `run` does, and returns what replays it."""
    inputs = multi_layer_inputs(tokens, 256, features, 8, 5, torch.bfloat16, device=device)
    inputs = {name: tensor.detach() for name, tensor in inputs.items()}
    if not included:
        del inputs["weight"], inputs["bias"]
        inputs["y"] = random(tokens, features, dtype=torch.bfloat16, grad=False, device=device)
    slots = torch.full((tokens,), -1, device=device)
    out = torch.empty(tokens, features, dtype=torch.bfloat16, device=device)

    def run(x, lora_A, lora_B, y=None, **layer):
        if included:
            return ops.multi_lora_linear(x, **layer, lora_A=lora_A, lora_B=lora_B, slots=slots, scaling=0.5)
        return ops.multi_lora(y.clone(), x, lora_A, lora_B, slots, 0.5)

    with torch.no_grad():
        replay = captured(lambda: out.copy_(run(**inputs)))
        routings = [torch.randint(-1, 5, (tokens,)), torch.full((tokens,), 4), torch.full((tokens,), -1)]
        for routing in routings + [in_blocks(5, device)] * (tokens == 1064) + routings[:1]:
            slots.copy_(routing)
            out.fill_(float("nan"))
            for _ in range(3):
                replay()
            with ops.use_backend("reference"):
                expected = run(**{name: tensor.float() for name, tensor in inputs.items()})
            torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
            if not included:
                assert torch.equal(out[slots == -1], inputs["y"][slots == -1])
