"""What must hold, with figures: losses, gradients, checkpoints and mixed batches against PEFT."""

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

import pyfastpeft
from benchmarks.measure import twin
from pyfastpeft import ops

OPS = ("lora_linear", "lora_linear_group", "ia3_linear", "multi_lora")
CURVE_LIMIT = 1e-3  # relative; rounding grows from step to step as Adam divides by small gradients
LOGITS_LIMIT = 1e-4  # of the largest logit
# A gradient's relative error against float64 may be this many times PEFT's own plus what rounding alone may cost.
GRADIENT_LIMIT = 2
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 4e-3}


@dataclass
class Check:
    """One property. `passed` is `measured` <= `limit`; NaN fails."""

    name: str
    measured: float
    limit: float
    meaning: str

    @property
    def passed(self) -> bool:
        return self.measured <= self.limit


@contextmanager
def fused(model: PeftModel) -> Iterator[None]:
    """Within the block the model runs fused kernels, before and after it PEFT's own code."""
    pyfastpeft.accelerate(model)
    try:
        yield
    finally:
        pyfastpeft.restore(model)


def fused_path(label: str, model: PeftModel, ids: Tensor) -> Check:
    """Without this, PEFT might be compared with itself."""
    calls, originals = [], {name: getattr(ops, name) for name in OPS}
    layers = len(pyfastpeft.accelerate(model).replaced)
    try:
        for name, op in originals.items():
            setattr(ops, name, lambda *args, op=op: calls.extend(_layers(op, args)) or op(*args))
        model(input_ids=ids)
    finally:
        for name, op in originals.items():
            setattr(ops, name, op)
        pyfastpeft.restore(model)
    return Check(
        f"{label}: fused path",
        layers - len(calls),
        0,
        f"adapted layers without a fused op in a forward pass; {len(calls)} of {layers} ran one",
    )


def _layers(op, args) -> list:
    """One entry for each layer that a call of `op` serves."""
    return [op] * (len(args[1]) if op.__name__ == "lora_linear_group" else 1)


def loss_curves(
    label: str, model: PeftModel, batches: list[Tensor], lr: float, seconds: float
) -> tuple[Check, dict[str, list[float]]]:
    """Train from one start on the same batches, fused and with PEFT's code: all of them, or as many as the fused model
    takes in `seconds`. The model keeps what PEFT trained."""
    start, end = trainable(model), time.perf_counter() + seconds
    with fused(model):
        ours = _losses(model, batches, lr, end)
    restart(model, start)
    stock = _losses(model, batches[: len(ours)], lr)
    difference = max(abs(a - b) / b for a, b in zip(ours, stock))
    meaning = f"largest relative difference from PEFT's loss in {len(ours)} steps, dropout off"
    return Check(f"{label}: loss curve", difference, CURVE_LIMIT, meaning), {"ours": ours, "peft": stock}


def trainable(model: PeftModel) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def restart(model: PeftModel, start: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if name in start:
            parameter.copy_(start[name])


def _losses(model, batches, lr, end=math.inf):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(parameters, lr=lr), []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if time.perf_counter() > end:
            break
    return losses


def gradients(label: str, model: PeftModel, ids: Tensor) -> Check:
    """Every trained parameter's gradient g: ||g - g64|| / ||g64||, ours and PEFT's.

    g64 is the gradient in PEFT's model in float64 (in which transformers' norms and loss still round to float32).
    """
    exact = _gradients(copy.deepcopy(model).double(), ids)
    stock = _gradients(model, ids)
    with fused(model):
        ours = _gradients(model, ids)
    theirs, mine = ({n: _distance(g[n], exact[n]) for n in exact} for g in (stock, ours))
    rounding = ROUNDING[next(model.get_base_model().parameters()).dtype]
    return Check(
        f"{label}: gradients",
        max(mine[name] / (theirs[name] + rounding) for name in exact),
        GRADIENT_LIMIT,
        f"relative error against float64 to PEFT's own + {rounding:.0e}, worst of {len(exact)} parameters; "
        f"errors are at most {max(mine.values()):.1e}, PEFT's {max(theirs.values()):.1e}",
    )


def _gradients(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _distance(given: Tensor, exact: Tensor) -> float:
    return ((given - exact).norm() / exact.norm()).item()


@torch.no_grad()
def reloaded(label: str, model: PeftModel, base: PreTrainedModel, folder: Path, inputs: dict[str, Tensor]) -> Check:
    """Every adapter in `inputs`, read back by PEFT from its place in `folder` and run fused on its input, gives the
    logits that it gave before."""
    differences = []
    for name, ids in inputs.items():
        model.set_adapter(name)
        again = PeftModel.from_pretrained(twin(base), folder / name).eval()
        with fused(model), fused(again):
            differences.append(_worst(again(input_ids=ids).logits, model(input_ids=ids).logits))
    equal = "; equal to the last bit" if max(differences) == 0 else ""
    meaning = f"largest difference of a logit to the largest logit, {len(inputs)} adapters{equal}"
    return Check(f"{label}: saved and reloaded", max(differences), LOGITS_LIMIT, meaning)


def _worst(given: Tensor, expected: Tensor) -> float:
    return ((given - expected).abs().max() / expected.abs().max()).item()


@torch.no_grad()
def mixed_batch(model: PeftModel, ids: Tensor, names: list[str]) -> list[Check]:
    """Row i of `ids` goes through the adapter names[i]; against PEFT's mixed batch, and one adapter at a time."""
    stock = model(input_ids=ids, adapter_names=names).logits
    with fused(model):
        mixed = model(input_ids=ids, adapter_names=names).logits
        alone = torch.empty_like(mixed)
        for rows, output in one_at_a_time(model, names, lambda rows: model(input_ids=ids[rows]).logits):
            alone[rows] = output
    through = f"{len(names)} rows through {len(set(names)) - 1} adapters and none"
    meaning = f"largest difference of a logit to the largest logit, {through}"
    return [
        Check(f"mixed batch: {what}", _worst(mixed, other), LOGITS_LIMIT, meaning)
        for what, other in (("as PEFT's", stock), ("as one at a time", alone))
    ]


def one_at_a_time(model: PeftModel, names: list[str], run) -> list[tuple[list[int], object]]:
    """run(rows) for the rows of each adapter in turn, with that adapter active; "__base__" with none."""
    results = []
    for name in dict.fromkeys(names):
        rows = [row for row, other in enumerate(names) if other == name]
        if name == "__base__":
            with model.disable_adapter():
                results.append((rows, run(rows)))
        else:
            model.set_adapter(name)
            results.append((rows, run(rows)))
    return results


def adaptation(label: str, before: float, after: float) -> Check:
    meaning = f"held-out loss; the limit is the base model's ({100 * (after / before - 1):+.1f} %)"
    return Check(f"{label}: learns", after, before, meaning)
