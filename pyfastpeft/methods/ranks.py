"""Ranks during training: AdaLoRA's allocation under a budget, DyLoRA's nested ranks.

A step of a plain loop, with allocator = RankAllocator(model):

    loss = model(**batch).loss + orthogonality_loss(model)          draw_rank(model, step=step)
    loss.backward()                                                 loss = model(**batch).loss
    optimizer.step()                                                loss.backward()
    allocator.step(step)                                            optimizer.step()
    optimizer.zero_grad()                                           optimizer.zero_grad()
"""

import random
from collections.abc import Mapping
from dataclasses import fields

import torch
from torch import Tensor, nn

from ..layers.parts import AdaLoRAPart, DyLoRAPart
from ..ops.checks import need, need_value, whole
from ..ops.reference import accumulation
from .adapt import adapt, adapter_parameters, need_adapter, parts_of, set_adapter
from .configs import AdaLoraConfig, DyLoraConfig, LoraConfig


def _config_of(model: nn.Module, name: str, kind: type, op: str):
    config = need_adapter(model, op, name)
    given = f"{name!r}, an adapter of {type(config).__name__}"
    need(type(config) is kind, op, "name", given, f"of one of {kind.__name__}")
    return config


# --- AdaLoRA (Zhang et al. 2023) -------------------------------------------------------------------------------------


def orthogonality_loss(model: nn.Module, name: str = "default") -> Tensor:
    """orth_reg_weight times the mean, over lora_A [r, K] and lora_B [N, r] of all layers, of ||A A^T - I||_F and
    ||B^T B - I||_F (Zhang et al. 2023, equation 4, in the form that PEFT gives it): to be added to the loss.

    A scalar; 16-bit factors are summed in float32. Raises ValueError for a name of no AdaLoRA adapter.
    """
    config = _config_of(model, name, AdaLoraConfig, "orthogonality_loss")
    grams = []
    for part in parts_of(model, name).values():
        lora_A, lora_B = (each.to(accumulation(each.dtype)) for each in (part.lora_A, part.lora_B))
        grams += [lora_A @ lora_A.T, lora_B.T @ lora_B]
    norms = [torch.linalg.matrix_norm(gram - torch.eye(len(gram)).to(gram)) for gram in grams]
    return config.orth_reg_weight * torch.stack(norms).mean()


class RankAllocator:
    """Which ranks of an AdaLoRA adapter are in the budget, by importance (Zhang et al. 2023, section 3.2).

    The importance of a parameter w is S(w) = sensitivity * uncertainty, two moving averages of I = |w dL/dw|:
        sensitivity = beta1 sensitivity + (1 - beta1) I
        uncertainty = beta2 uncertainty + (1 - beta2) |I - sensitivity|
    and that of rank i of a layer S(E_i) + mean_k S(A_ik) + mean_n S(B_ni). While the budget falls, every deltaT steps
    lora_E is set to zero for all but the `budget(step)` most important ranks of all layers; these ranks may come back
    until, tfinal steps before total_step, the choice is made for good.

    Attributes: config, whose rank_pattern each allocation sets; masks: layer's path -> bool [r], the ranks in the
    budget; sensitivity, uncertainty: `<path>.lora_A` and so on -> the averages, in float32 (float64 for float64), empty
    once the choice is made. Under data parallelism gradients are the same in all processes, and so are the ranks.
    """

    def __init__(self, model: nn.Module, name: str = "default"):
        """Raises ValueError unless `name` is an AdaLoRA adapter of `model` that no rank was dropped from."""
        self.config = _config_of(model, name, AdaLoraConfig, "RankAllocator")
        self.parts: dict[str, AdaLoRAPart] = parts_of(model, name)
        self.masks: dict[str, Tensor] = {}
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self._need_all_ranks("RankAllocator")

    def budget(self, step: int) -> int:
        """How many ranks all layers have together after step `step`, counted from 0 (section 3.3)."""
        config = self.config
        need_value(whole(step) and step >= 0, "RankAllocator", "step", step, "an integer >= 0")
        need_value(config.total_step is not None, "RankAllocator", "total_step", None, "given in AdaLoraConfig")
        full, target = config.init_r * len(self.parts), config.target_r * len(self.parts)
        end = config.total_step - config.tfinal
        if step <= config.tinit:
            return full
        if step >= end:
            return target
        left = 1 - (step - config.tinit) / (end - config.tinit)
        return int((full - target) * left**3 + target)

    def step(self, step: int) -> None:
        """Take part in training step `step`, counted from 0: after `optimizer.step()`, while the gradients, unscaled,
        are still there. Not to be called after a step that a gradient scaler has skipped.

        Raises RuntimeError where no gradient is there, or one was not finite; ValueError for a bad step.
        """
        self._need_all_ranks("RankAllocator.step")
        budget = self.budget(step)
        if step < self.config.total_step - self.config.tfinal:
            self._observe()
            if step > self.config.tinit and step % self.config.deltaT == 0:
                self._allocate(budget)
        else:
            self._conclude()

    def finalize(self) -> None:
        """Drop the ranks outside the budget, after training: parameters become new, smaller ones, and what the model
        computes stays the same. If the schedule has not ended yet, the final budget is allocated first.

        Raises RuntimeError where no step was taken.
        """
        self._need_all_ranks("RankAllocator.finalize")
        self._conclude()
        for path, part in self.parts.items():
            part.keep(self.masks[path])

    def scores(self) -> dict[str, Tensor]:
        """layer's path -> importance [r] of its ranks."""

        def importance(path, name):
            return self.sensitivity[f"{path}.{name}"] * self.uncertainty[f"{path}.{name}"]

        return {
            path: importance(path, "lora_E")[:, 0]
            + (importance(path, "lora_A").mean(1) + importance(path, "lora_B").mean(0))
            for path in self.parts
        }

    def state_dict(self) -> dict[str, Tensor]:
        """All that `load_state_dict` needs to go on where this left off: names -> tensors, which are not copied."""
        kinds = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty, "mask": self.masks}
        return {f"{key}.{kind}": tensor for kind, held in kinds.items() for key, tensor in held.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` returned. Raises ValueError, naming the key, for what does not fit the adapter;
        the state is then as it was."""
        op = "RankAllocator.load_state_dict"
        need_value(isinstance(state, Mapping), op, "state", state, "what state_dict returned", TypeError)
        self._need_all_ranks(op)
        moments = {key: parameter.shape for key, parameter in self._parameters().items()}
        expected = {f"{key}.{kind}": shape for key, shape in moments.items() for kind in ("sensitivity", "uncertainty")}
        masks = {f"{path}.mask": torch.Size([part.r]) for path, part in self.parts.items()}
        for kind in (expected, masks):  # each is there as a whole or not at all
            missing = sorted(kind.keys() - state.keys()) if kind.keys() & state.keys() else []
            need(not missing, op, "state", f"without {missing[:3]}", "whole")
        for key, tensor in state.items():
            shape = (expected | masks).get(key)
            need(shape is not None, op, "state", f"with {key!r}", f"of the layers {list(self.parts)[:3]} …")
            given = f"holding {key!r} of {tensor.dtype} {list(tensor.shape)}"
            fits = tensor.shape == shape and (tensor.dtype == torch.bool) == (key in masks)
            needed = f"{'bool' if key in masks else 'floating'} of shape {list(shape)} there"
            need(fits, op, "state", given, needed)
        held = {"sensitivity": {}, "uncertainty": {}, "mask": {}}
        for key, tensor in state.items():
            key, _, kind = key.rpartition(".")
            part = self.parts[key] if kind == "mask" else self.parts[key.rpartition(".")[0]]
            dtype = torch.bool if kind == "mask" else accumulation(part.lora_E.dtype)
            held[kind][key] = tensor.detach().to(part.lora_E.device, dtype, copy=True)
        self.sensitivity, self.uncertainty, self.masks = held.values()
        self._publish()

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {f"{path}.{name}": p for path, part in self.parts.items() for name, p in part._parameters.items()}

    def _need_all_ranks(self, op):
        init_r, ranks = self.config.init_r, {part.r for part in self.parts.values()}
        needed = f"with all init_r = {init_r} ranks: some were dropped"
        need(ranks <= {init_r}, op, "adapter", f"with ranks {sorted(ranks)}", needed, RuntimeError)

    @torch.no_grad()
    def _observe(self):
        parameters = self._parameters()
        some = any(parameter.grad is not None for parameter in parameters.values())
        needed = "called after backward() and before zero_grad()"
        need(some, "RankAllocator.step", "step", "called without gradients", needed, RuntimeError)
        beta1, beta2 = self.config.beta1, self.config.beta2
        for key, parameter in parameters.items():
            wide = accumulation(parameter.dtype)
            if key not in self.sensitivity:
                self.sensitivity[key] = torch.zeros_like(parameter, dtype=wide)
                self.uncertainty[key] = torch.zeros_like(parameter, dtype=wide)
            gradient = parameter.grad
            # A layer that this step did not use has no gradient: it was not sensitive.
            seen = self.sensitivity[key].new_zeros(()) if gradient is None else (parameter.to(wide) * gradient).abs_()
            smooth = self.sensitivity[key].mul_(beta1).add_((1 - beta1) * seen)
            self.uncertainty[key].mul_(beta2).add_((1 - beta2) * (seen - smooth).abs_())

    @torch.no_grad()
    def _allocate(self, budget):
        scores = self.scores()
        every = torch.cat(list(scores.values()))
        finite = bool(every.isfinite().all())
        needed = "finite: leave out the steps whose gradients overflow"
        need(finite, "RankAllocator.step", "importance", "infinite or NaN", needed, RuntimeError)
        dropped = len(every) - budget
        threshold = every.kthvalue(dropped).values if dropped > 0 else -torch.inf
        self.masks = {path: score > threshold for path, score in scores.items()}
        self._publish()
        self._mask()

    def _conclude(self):
        if self.sensitivity:
            self._allocate(self.config.target_r * len(self.parts))
            self.sensitivity, self.uncertainty = {}, {}
        needed = "called with all steps from the first on, or given the state of those before"
        need(bool(self.masks), "RankAllocator", "step", "called at the end of the schedule first", needed, RuntimeError)
        self._mask()

    @torch.no_grad()
    def _mask(self):
        for path, part in self.parts.items():
            part.lora_E.masked_fill_(~self.masks[path][:, None], 0)

    def _publish(self):
        kept = torch.stack(list(self.masks.values())).tolist() if self.masks else []  # one transfer from the device
        self.config.rank_pattern = {f"{path}.lora_E": ranks for path, ranks in zip(self.masks, kept)} or None


# --- DyLoRA (Valipour et al. 2023) -----------------------------------------------------------------------------------


def draw_rank(model: nn.Module, name: str = "default", *, step: int, seed: int = 0) -> int:
    """Cut a DyLoRA adapter to a rank drawn from [min_rank, r], each as likely, for training step `step`; returns it.

    The rank follows from `seed` and `step` alone: it is the same in all layers and processes, when activations are
    recomputed, and when training resumes. To be called before each step's forward pass. Raises as `set_rank` does.
    """
    config = _config_of(model, name, DyLoraConfig, "draw_rank")
    need_value(whole(step) and step >= 0, "draw_rank", "step", step, "an integer >= 0")
    largest = max(part.r for part in parts_of(model, name).values())
    rank = random.Random(f"{seed}, {step}").randint(min(config.min_rank, largest), largest)
    set_rank(model, name, rank)
    return rank


def set_rank(model: nn.Module, name: str = "default", rank: int | None = None) -> None:
    """Cut a DyLoRA adapter to its first `rank` ranks, until the next call; None: use all of them. A layer that has
    fewer (rank_pattern) uses all that it has.

    Raises ValueError for a name of no DyLoRA adapter, or a rank that no layer has.
    """
    _config_of(model, name, DyLoraConfig, "set_rank")
    for part, cut in _cut("set_rank", model, name, rank).values():
        part.rank = cut


def truncate(model: nn.Module, name: str, rank: int, new_name: str) -> None:
    """Make the LoRA adapter `new_name`, inactive, of the first `rank` ranks of the DyLoRA adapter `name`: it computes
    what that does at this rank, holds copies, and is stored as any LoRA adapter is.

    Raises ValueError as `set_rank` and `adapt` do.
    """
    config = _config_of(model, name, DyLoraConfig, "truncate")
    cuts = {path: cut for path, (_, cut) in _cut("truncate", model, name, rank).items()}
    options = {field.name: getattr(config, field.name) for field in fields(LoraConfig)}
    options |= {"r": rank, "rank_pattern": {path: cut for path, cut in cuts.items() if cut != rank}}
    before, source = model.pyfastpeft.active, adapter_parameters(model, name)
    wide = any(parameter.dtype == torch.float32 for parameter in source.values())
    adapt(model, LoraConfig(**options), new_name, autocast_adapter_dtype=wide)
    with torch.no_grad():
        for key, parameter in adapter_parameters(model, new_name).items():
            parameter.copy_(source[key][tuple(slice(size) for size in parameter.shape)])
    set_adapter(model, *before)


def _cut(op, model, name, rank) -> dict[str, tuple[DyLoRAPart, int]]:
    """path -> part, and its rank when the adapter is cut to `rank`."""
    parts = parts_of(model, name)
    largest = max(part.r for part in parts.values())
    fits = rank is None or (whole(rank) and 1 <= rank <= largest)
    need_value(fits, op, "rank", rank, f"an integer in [1, {largest}]")
    return {path: (part, part.r if rank is None else min(rank, part.r)) for path, part in parts.items()}
