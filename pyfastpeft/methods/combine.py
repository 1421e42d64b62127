"""Weighted sums of LoRA adapters, formed from their factors."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..layers.adapted import carriers
from ..layers.parts import EmbeddingLoRAPart, LoRAPart
from ..ops.checks import need, need_value
from .configs import Config, LoraConfig
from .inject import saved_names


def combine(model: nn.Module, configs: dict[str, Config], names, weights, combination_type: str, rank: int | None):
    """(config, path -> part) of the adapter that `add_weighted_adapter` makes."""
    op = "add_weighted_adapter"
    need_value(len(names) > 0, op, "names", names, "of at least one adapter")
    fits = isinstance(weights, Sequence) and len(weights) == len(names)
    fits = fits and all(isinstance(w, (int, float)) and math.isfinite(w) for w in weights)
    need_value(fits, op, "weights", weights, f"one finite number for each of {len(names)} adapters")
    kinds = ("svd", "cat", "linear")
    need_value(combination_type in kinds, op, "combination_type", combination_type, f"one of {', '.join(kinds)}")
    if rank is not None:
        need_value(combination_type == "svd", op, "rank", rank, 'None, except with "svd"')
        need_value(type(rank) is int and rank > 0, op, "rank", rank, "an integer >= 1")
    for name in names:
        config = configs[name]
        plain = type(config) is LoraConfig and not config.use_dora and config.bias == "none"
        given = f"holding {name!r}, of {config.peft_type}"
        needed = "of LoRA adapters that are factors alone"
        need(plain and not saved_names(config), op, "names", given, needed, TypeError)
    ranks = [configs[name].r for name in names]
    uniform = not any(configs[name].rank_pattern for name in names)
    if combination_type == "linear":
        need(uniform and len(set(ranks)) == 1, op, "names", f"of ranks {ranks}", 'of one rank for "linear"')
    r = {"svd": rank or max(ranks), "cat": sum(ranks), "linear": ranks[0]}[combination_type]
    parts, sizes = {}, {}
    for path, module in carriers(model):
        held = [(module.adapters[n], w) for n, w in zip(names, weights) if n in getattr(module, "adapters", {})]
        if held:
            parts[path] = _part([part for part, _ in held], [w for _, w in held], combination_type, r)
            sizes[path] = parts[path].r
    pattern = {path: size for path, size in sizes.items() if size != r}
    config = dataclasses.replace(
        configs[names[0]], r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=pattern, use_rslora=False,
        target_modules=sorted(parts), exclude_modules=None, layers_to_transform=None, layers_pattern=None,
    )  # fmt: skip
    return config, parts


@torch.no_grad()
def _part(held: list[LoRAPart], weights: list[float], combination_type: str, r: int) -> LoRAPart:
    factors = [part.factors() for part in held]
    if combination_type == "linear":
        roots = [math.sqrt(abs(w * s)) for w, (_, _, s) in zip(weights, factors)]
        signs = [math.copysign(1.0, w * s) for w, (_, _, s) in zip(weights, factors)]
        lora_A = sum(sign * root * A for sign, root, (A, _, _) in zip(signs, roots, factors))
        lora_B = sum(root * B for root, (_, B, _) in zip(roots, factors))
    else:
        lora_A = torch.cat([w * s * A for w, (A, _, s) in zip(weights, factors)])
        lora_B = torch.cat([B for _, B, _ in factors], dim=1)
        if combination_type == "svd":
            lora_A, lora_B = _truncated(lora_A, lora_B, r)
    like = {"device": lora_A.device, "dtype": lora_A.dtype}
    rank = len(lora_A)
    if isinstance(held[0], EmbeddingLoRAPart):
        embedding = nn.Embedding(lora_A.shape[1], len(lora_B), held[0].padding_idx, device="meta")
        part = EmbeddingLoRAPart(embedding, rank, 1.0, **like)
        part.embed_scale = held[0].embed_scale
    else:
        part = LoRAPart(lora_A.shape[1], len(lora_B), rank, 1.0, held[0].dropout.p, **like)
    part.lora_A.copy_(lora_A)
    part.lora_B.copy_(lora_B)
    return part


def _truncated(lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The best approximation of rank r to lora_B lora_A: from the SVD of R T^T, with B = Q R and A^T = P T."""
    dtype, wide = lora_A.dtype, torch.float64
    q, upper = torch.linalg.qr(lora_B.to(wide))
    p, lower = torch.linalg.qr(lora_A.to(wide).T)
    left, values, right = torch.linalg.svd(upper @ lower.T)
    r = min(r, len(values))
    return (right[:r] @ p.T).to(dtype), (q @ (left[:, :r] * values[:r])).to(dtype)
