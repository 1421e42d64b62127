"""One run: a method, a seed, a budget; what it costs and what it reaches."""

import copy
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import nn

from benchmarks.measure import peak_bytes

from . import metrics
from .learners import Dataset, Encoder, Generative, batches
from .methods import METHODS, PROMPTING, apply

Learner = Generative | Encoder


@dataclass(frozen=True)
class Budget:
    """The same for every method: training ends after `steps` or after `seconds` of steps, whichever comes first. The
    learning rate rises over a tenth of the steps and falls linearly; gradients are clipped to norm 1."""

    steps: int
    batch: int
    seconds: float = math.inf
    shots: int = 3


def prompted(name: str, learner: Generative, datasets: Sequence[Dataset], budget: Budget, seed: int) -> dict:
    """The record of the unadapted model with solved examples in its prompt, drawn by `seed`."""
    count = budget.shots if PROMPTING[name] is None else PROMPTING[name]
    learner.model.eval()
    shots = {dataset.task.name: _shots(dataset, count, seed) for dataset in datasets}
    tasks = {each.task.name: _evaluated(learner, each, shots=shots[each.task.name]) for each in datasets}
    return {"method": name, "seed": seed, "trainable": 0, "steps": 0, "tasks": tasks}


def _shots(dataset, count, seed):
    order = torch.randperm(len(dataset.training), generator=torch.Generator().manual_seed(seed))
    return [dataset.training[i] for i in order[:count].tolist()]


def trained(
    name: str,
    learner: Learner,
    datasets: Sequence[Dataset],
    budget: Budget,
    seed: int,
    lr: float | None = None,
    measured: bool = True,
) -> dict:
    """The record of a method after training a copy of the learner's model; without `measured` only its loss.

    Same seed: same batches in the same order for every method.
    """
    twin = copy.copy(learner)
    twin.model = copy.deepcopy(learner.model)
    torch.manual_seed(seed)
    method = METHODS[name]
    lr = method.rate(learner.family) if lr is None else lr
    adapted = apply(method, twin, lr, budget.steps, max(len(each.task.choices) for each in datasets))
    optimizer = torch.optim.AdamW(adapted.groups, weight_decay=0.0)
    trainable = [p for group in optimizer.param_groups for p in group["params"]]
    record = {"method": name, "seed": seed, "lr": lr, "trainable": sum(p.numel() for p in trainable)}

    options = {"choices": adapted.choices} if adapted.choices else {}
    stream = (twin.training_batch(rows, **options) for rows in batches(datasets, budget.batch, seed))
    peaks = [group["lr"] for group in optimizer.param_groups]

    losses, seconds = [], []

    def step(number: int, batch: dict) -> None:
        adapted.before_step(number)
        loss = adapted.loss(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        adapted.after_step(number)
        optimizer.zero_grad()
        losses.append(loss.item())

    twin.model.train()
    for number, batch in enumerate(islice(stream, budget.steps)):
        done = max(number / budget.steps, sum(seconds) / budget.seconds)
        if done >= 1:
            break
        for group, peak in zip(optimizer.param_groups, peaks):
            group["lr"] = peak * min(1, 10 * (number + 1) / budget.steps) * (1 - done)
        start = time.perf_counter()
        if measured and number == min(1, budget.steps - 1):  # from the second on the optimizer has its state
            above = peak_bytes(lambda number=number, batch=batch: step(number, batch), batch["labels"].device.type)
            record["memory"] = _held(twin.model, optimizer) + above
        else:
            step(number, batch)
        seconds.append(time.perf_counter() - start)
    record |= {"steps": len(losses), "seconds_per_step": statistics.median(seconds), "training_losses": losses}

    adapted.finish()
    twin.model.eval()
    record["tasks"] = {each.task.name: _evaluated(twin, each, measured) for each in datasets}
    return record


def _evaluated(learner, dataset, measured=True, **options) -> dict:
    """The validation loss, and the task's metrics where `measured`."""
    rows = dataset.validation
    found = {"loss": learner.loss(dataset.task, rows, **options)}
    if measured:
        targets = [row.get("references", row["target"]) for row in rows]
        predicted = learner.predict(dataset.task, rows, **options)
        found |= metrics.measure(dataset.task.measured, predicted, targets)
        if dataset.task.kind == "generation":
            found["perplexity"] = math.exp(found["loss"])
    return found


def _held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes that the model and the optimizer hold between steps."""
    state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *state])
