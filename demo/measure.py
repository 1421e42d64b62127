"""Time and memory of training steps and of serving: the bare base model, PEFT, and PEFT accelerated, in turns."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.measure import peak_bytes, saved_bytes, spread

from .checks import fused, one_at_a_time
from .model import progress

LEAST_ROUNDS = 3


class Contender(NamedTuple):
    run: Callable[[], object]
    setting: Callable[[], AbstractContextManager] = nullcontext  # entered, untimed, around every run


def interleave(contenders: dict[str, Contender], rounds: int, seconds: float, label: str) -> dict[str, list[float]]:
    """Seconds of every run, after one untimed round. Contenders take turns, in an order that reverses every round, for
    `rounds` or `seconds`, but at least LEAST_ROUNDS."""
    taken, start = {name: [] for name in contenders}, time.perf_counter()
    order = list(contenders)
    with progress(label) as bar:
        for finished in range(-1, rounds):
            done = max(0, finished / rounds, (time.perf_counter() - start) / seconds)
            if done >= 1 and finished >= LEAST_ROUNDS:
                break
            bar.update(min(done, 1) - bar.n)
            for name in order:
                with contenders[name].setting():
                    elapsed = _timed(contenders[name].run)
                if finished >= 0:
                    taken[name].append(elapsed)
            order.reverse()
        bar.update(1 - bar.n)
    return taken


def _timed(run):
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def compared(seconds: dict[str, list[float]]) -> dict[str, dict]:
    """Median with 20th and 80th percentile of the seconds, and of the ratio to the first contender in each round."""
    first = next(iter(seconds.values()))
    return {
        name: {"seconds": spread(own), "ratio": spread([a / b for a, b in zip(own, first)]), "rounds": len(own)}
        for name, own in seconds.items()
    }


# --- training --------------------------------------------------------------------------------------------------------


def bare_step(base: PreTrainedModel, ids: Tensor) -> Callable[[], Tensor]:
    """Forward and backward of the frozen base model, with a gradient for its input embeddings alone: what every method
    that adapts all layers needs at least."""

    def loss() -> Tensor:
        embeddings = base.get_input_embeddings()(ids).detach().requires_grad_()
        return base(inputs_embeds=embeddings, labels=ids).loss

    return loss


def training(
    base: PreTrainedModel, model: PeftModel, ids: Tensor, rounds: int, seconds: float, label: str
) -> dict[str, dict]:
    """One step on `ids` with the active adapter of `model`: forward, backward and AdamW; `base` has no adapter."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids).loss

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    bare = bare_step(base, ids)
    base.requires_grad_(False)
    model.train()
    contenders = {
        "base": Contender(lambda: bare().backward()),
        "peft": Contender(step),
        "ours": Contender(step, partial(fused, model)),
    }
    found = compared(interleave(contenders, rounds, seconds, label))
    for name, contender in contenders.items():
        with contender.setting():
            forward = bare if name == "base" else loss
            found[name]["saved_bytes"] = saved_bytes(forward, (*model.parameters(), *model.buffers()))
            found[name]["peak_bytes"] = peak_bytes(contender.run, ids.device.type)
        found[name]["tokens_per_s"] = ids.numel() / found[name]["seconds"]["median"]
    model.eval()
    return found


# --- serving ---------------------------------------------------------------------------------------------------------


def serving(
    base: PreTrainedModel, model: PeftModel, ids: Tensor, names: list[str], new: int, rounds: int, seconds: float
) -> dict[str, dict]:
    """A batch whose row i goes through the adapter names[i]: one pass over the prompts ("prefill"), and `new` tokens
    generated for each row after a prompt ("decode")."""

    def prefill(model, rows=slice(None), **options):
        return model(input_ids=ids[rows], **options)

    def decode(model, rows=slice(None), **options):
        prompts = ids[rows, : ids.shape[1] // 4]
        return generate(model, prompts, new, do_sample=False, min_new_tokens=new, **options)

    found = {}
    for phase, run, tokens in (("prefill", prefill, ids.numel()), ("decode", decode, len(ids) * new)):
        mixed = partial(run, model, adapter_names=names)
        contenders = {
            "base": Contender(partial(run, base)),
            "peft": Contender(mixed),
            "one at a time": Contender(
                lambda run=run: one_at_a_time(model, names, lambda rows: run(model, rows)), partial(fused, model)
            ),
            "ours": Contender(mixed, partial(fused, model)),
        }
        with torch.no_grad():
            found[phase] = compared(interleave(contenders, rounds, seconds, phase))
        for result in found[phase].values():
            result["tokens_per_s"] = tokens / result["seconds"]["median"]
    return found


def generate(model: nn.Module, prompts: Tensor, new: int, **options) -> Tensor:
    """[rows, length + new] tokens."""
    return model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=new, **options)
