"""Fused kernels in models that PEFT adapted: `accelerate` changes the class of their layers, `restore` changes it back.

Only the forward pass is replaced, on the layers of one model. Parameters, configuration and every other method stay
PEFT's. In a state that the kernels do not cover (disabled, merged, DoRA together with other adapters or with dropout,
hooks on an inner module, tensor subclasses, …) a layer runs PEFT's own forward pass; that is decided anew at each call.
Layers of one input compute their outputs together.
"""

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial, reduce
from inspect import signature
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..methods.tables import table
from ..ops import dispatch
from ..ops.arguments import autocasting, needs_gradient
from ..ops.dispatch import FLOATS
from ..ops.reference import accumulation

try:
    from peft.tuners import ia3, lora
    from peft.tuners.lora import variants
    from peft.tuners.tuners_utils import BaseTunerLayer
    from transformers.pytorch_utils import Conv1D
except ImportError as error:
    raise ImportError("pyfastpeft.accelerate needs PEFT and transformers: pip install 'pyfastpeft[hf]'") from error

# MiCA freezes B and starts A at zero; what it computes is plain LoRA.
_PLAIN_LORA = (type(None), getattr(variants, "MiCALinearVariant", type(None)))


class _Base(NamedTuple):
    """What `ops.lora_linear` and `ops.ia3_linear` take of a base layer."""

    weight: Tensor  # [N, K], a view where a Conv1D holds [K, N]
    bias: Tensor | None  # [N]


class _Adapter(NamedTuple):
    """What `ops.lora_linear` takes of one adapter; `ops.dora_linear`, where there is a magnitude."""

    lora_A: Tensor  # [r, K]
    lora_B: Tensor  # [N, r]
    scaling: float
    dropout_p: float
    magnitude: Tensor | None = None  # [N]


class _Stack(NamedTuple):
    """What `ops.multi_lora_linear` takes of several adapters, zero-padded to the largest rank."""

    lora_A: Tensor  # [L, r, K]
    lora_B: Tensor  # [L, N, r]
    scaling: Tensor  # [L]
    ranks: Tensor  # [L]


class FusedLoraLinear(lora.Linear):
    """PEFT's lora.Linear with a fused forward pass."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        covered = None if args or kwargs else self._active(x)
        if covered is None:
            return super().forward(x, *args, **kwargs)
        base, (first, *others) = covered
        if first.magnitude is not None:
            return ops.dora_linear(x, *base, first.lora_A, first.lora_B, first.magnitude, first.scaling)
        y = None if others or torch.compiler.is_compiling() else _shared(self, x, base, first)
        if y is not None:
            return y
        y = ops.lora_linear(x, *base, *first[:4])
        for adapter in others:
            y = ops.lora_delta_(y, x, *adapter[:4])
        return y

    def _mixed_batch_forward(self, x: Tensor, *args, adapter_names: Sequence[str], **kwargs) -> Tensor:
        stored = self.lora_A._modules
        names = tuple(sorted({name for name in adapter_names if name != "__base__" and name in stored}))
        extra = args or any(value is not None for value in kwargs.values())
        covered = None if extra or not names else self._covered(x, names)
        if covered is None or any(a.dropout_p or a.magnitude is not None for a in covered[1]):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        lora_A, lora_B, scaling, ranks = _stacked(self, names, covered[1], adapter_names, accumulation(x.dtype))
        slots = _slots(tuple(adapter_names), names, x.shape[1:-1].numel(), x.device)
        return ops.multi_lora_linear(x, *covered[0], lora_A, lora_B, slots, scaling, ranks)

    def _active(self, x: Tensor) -> tuple[_Base, list[_Adapter]] | None:
        """The base and the active adapters; None where PEFT's own forward pass has to run."""
        stored = self.lora_A._modules
        names = [name for name in self.active_adapters if name in stored]
        return None if not names or self.disable_adapters or self.merged else self._covered(x, names)

    def _covered(self, x: Tensor, names: Sequence[str]) -> tuple[_Base, list[_Adapter]] | None:
        """The base and the adapters of these names; None where the kernels would not compute what PEFT computes."""
        base = _base(self.base_layer)
        adapters = [_adapter(self, name) for name in names]
        if any(isinstance(part, str) for part in (base, *adapters)):
            return None
        if any(adapter.magnitude is not None and (adapter.dropout_p or len(names) > 1) for adapter in adapters):
            return None  # PEFT drops the base layer's input, too, and sums what several of them change
        casts = self.cast_input_dtype_enabled or all(adapter.lora_A.dtype == x.dtype for adapter in adapters)
        fits = casts and _fits(x, base.weight, *(adapter.lora_A for adapter in adapters))
        return (base, adapters) if fits else None


class FusedIA3Linear(ia3.Linear):
    """PEFT's ia3.Linear with a fused forward pass."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        stored = self.ia3_l
        vectors = [stored[name].flatten() for name in self.active_adapters if name in stored]
        base = _base(self.base_layer)
        idle = not vectors or self.disable_adapters or self.merged
        if args or kwargs or idle or isinstance(base, str) or not _fits(x, base.weight, *vectors):
            return super().forward(x, *args, **kwargs)
        return ops.ia3_linear(x, *base, reduce(torch.mul, vectors), self.is_feedforward)


_FUSED = {lora.Linear: FusedLoraLinear, ia3.Linear: FusedIA3Linear}
_STOCK = {fused: stock for stock, fused in _FUSED.items()}


# --- layers of one input ---------------------------------------------------------------------------------------------

# Names of layers that a module calls one after the other with the very same tensor, in transformers' models.
_SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("gate_proj", "up_proj"),
    ("wi_0", "wi_1"),
)
# Parameters of a forward pass which take what keys and values are made of where that is not what queries are made of.
_OTHER_SOURCES = re.compile(r"(?!hidden_)\w+_states|key|value|memory|context")


class _Group:
    """Layers whose outputs the first one of them that is called computes, and the others take from `_pending`."""

    def __init__(self, layers: Sequence[FusedLoraLinear]):
        self.layers = [ref(layer) for layer in layers]
        self.idle = False

    def sources(self, x: Tensor) -> dict[FusedLoraLinear, tuple[_Base, _Adapter]] | None:
        """What every layer would compute its output from; None where they cannot share x as they are now."""
        found = {}
        for layer in [reference() for reference in self.layers]:
            if type(layer) is not FusedLoraLinear or _intercepted(layer):
                return None
            base, adapters = layer._active(x) or (None, ())
            if len(adapters) != 1 or adapters[0].magnitude is not None or adapters[0].dropout_p:
                return None  # PEFT draws a mask for each
            tensors = base.weight, adapters[0].lora_A, adapters[0].lora_B
            if any(t.device != x.device or t.is_inference() for t in tensors):
                return None  # without versions
            found[layer] = base, adapters[0]
        first, *others = (adapter.lora_A.dtype for _, adapter in found.values())
        return found if all(dtype == first for dtype in others) else None


_GROUPS: WeakKeyDictionary[FusedLoraLinear, _Group] = WeakKeyDictionary()


class _Pending:
    """Outputs of a group for one x, computed ahead of the calls that will ask for them."""

    def __init__(self, group, x, sources, outputs):
        self.group = group
        self.x = ref(x, lambda _: outputs.clear())
        self.outputs = outputs
        self.trains = torch.is_grad_enabled()
        self.sources = sources  # so that no other tensor has the identity of one of these
        self.states = {layer: _state(x, *sources[layer]) for layer in outputs}

    def take(self, layer: FusedLoraLinear, x: Tensor, base: _Base, adapter: _Adapter) -> Tensor | None:
        """The output of a layer, once; None unless it is what the layer would compute from these now."""
        if self.x() is not x or layer not in self.outputs or self.states[layer] != _state(x, base, adapter):
            return None
        return self.outputs.pop(layer)


class _Thread(threading.local):
    """What one group of this thread has pending: until the next call of any layer, of that group or not."""

    pending: _Pending | None = None


_thread = _Thread()


def _pays(x: Tensor, adapter: _Adapter) -> bool:
    """Whether layers are faster together. On a CPU they are where gradients are formed; inference is one native call of
    each layer there, which checks its arguments faster than Python does."""
    return x.device.type == "cuda" or needs_gradient(x, adapter.lora_A, adapter.lora_B)


def _shared(layer: FusedLoraLinear, x: Tensor, base: _Base, adapter: _Adapter) -> Tensor | None:
    """The output of a layer that reads x together with others; None where it has to compute it by itself."""
    pending, _thread.pending = _thread.pending, None
    if pending is not None:
        y = pending.take(layer, x, base, adapter)
        if y is not None:
            _thread.pending = pending if pending.outputs else None
            return y
        # Not while gradients are formed: a checkpoint computes again what it computed before.
        pending.group.idle |= not (pending.trains or torch.is_grad_enabled())
    group = None if adapter.dropout_p or x.is_inference() or not _pays(x, adapter) else _GROUPS.get(layer)
    sources = None if group is None or group.idle else group.sources(x)
    if sources is None:
        return None
    bases, adapters = zip(*sources.values())
    (weights, biases), (lora_As, lora_Bs, scalings, *_) = zip(*bases), zip(*adapters)
    rows = x.reshape(-1, x.shape[-1])
    if not dispatch.preferred("lora_group_forward", (rows, weights, biases, lora_As[0], lora_Bs)):
        return None
    outputs = dict(zip(sources, ops.lora_linear_group(x, weights, biases, lora_As, lora_Bs, scalings)))
    y = outputs.pop(layer)
    _thread.pending = _Pending(group, x, sources, outputs)
    return y


def _state(x: Tensor, base: _Base, adapter: _Adapter) -> tuple:
    """All that an output depends on: of tensors the identity, the version and whether they require a gradient."""
    device = x.device.type
    under = torch.get_autocast_dtype(device) if autocasting(x) else None
    tensors = [t for t in (x, *base, adapter.lora_A, adapter.lora_B) if t is not None]
    return (
        *(torch.is_grad_enabled(), under, dispatch.forced_backend(), adapter.scaling, adapter.dropout_p),
        *((id(t), t._version, t.requires_grad) for t in tensors),
    )


def _groups(model: nn.Module) -> list[tuple[str, tuple[str, ...]]]:
    """Enters the groups of a model into _GROUPS; (name of the module, names of its layers) of each."""
    found = []
    for path, parent in model.named_modules():
        if not type(parent).__module__.startswith("transformers."):
            continue
        if any(map(_OTHER_SOURCES.fullmatch, list(signature(type(parent).forward).parameters)[2:])):
            continue
        for siblings in _SIBLINGS:
            layers = {name: parent._modules.get(name) for name in siblings}
            layers = {name: layer for name, layer in layers.items() if type(layer) is FusedLoraLinear}
            bases = [layer.base_layer for layer in layers.values()]
            alike = all(type(base) is nn.Linear and base.in_features == bases[0].in_features for base in bases)
            if len(layers) > 1 and alike:
                group = _Group(layers.values())
                _GROUPS.update((layer, group) for layer in layers.values())
                found.append((path, tuple(layers)))
    return found


# --- mixed batches ---------------------------------------------------------------------------------------------------

# Keyed by the hook with which PEFT hands adapter_names to one layer during one call of the model (a forward pass or a
# whole generate), and gone with it. Adapters do not change during a call; between calls they may, also behind the
# back of version counters: PEFT's hot-swapping writes to `.data`.
_STACKS: WeakKeyDictionary[partial, tuple[tuple[str, ...], _Stack]] = WeakKeyDictionary()


def _stacked(
    layer: lora.Linear,
    names: tuple[str, ...],
    adapters: list[_Adapter],
    adapter_names: Sequence[str],
    dtype: torch.dtype,
) -> _Stack:
    """The adapters of these names, some of adapter_names, stacked: once a call, unless its caller changes that list."""
    trains = torch.is_grad_enabled() and any(a.lora_A.requires_grad or a.lora_B.requires_grad for a in adapters)
    if trains or torch.compiler.is_compiling():
        return _stack(adapters, dtype)
    # A call that raised has left its hooks, and what is stacked for them, to the layer: the last one is this call's.
    hooks = [h for h in layer._forward_pre_hooks.values() if isinstance(h, partial) and "adapter_names" in h.keywords]
    if not hooks or hooks[-1].keywords["adapter_names"] is not adapter_names:
        return _stack(adapters, dtype)
    *left, hook = hooks
    stacked, stack = _STACKS.get(hook, (None, None))
    if stacked != names:
        for other in left:
            _STACKS.pop(other, None)
        stack = _stack(adapters, dtype)
        _STACKS[hook] = names, stack
    return stack


def _stack(adapters: list[_Adapter], dtype: torch.dtype) -> _Stack:
    """The adapters stacked, with their scaling in this dtype."""
    ranks = [len(adapter.lora_A) for adapter in adapters]
    rank, device = max(ranks), adapters[0].lora_A.device
    return _Stack(
        torch.stack([F.pad(a.lora_A, (0, 0, 0, rank - r)) if r < rank else a.lora_A for a, r in zip(adapters, ranks)]),
        torch.stack([F.pad(a.lora_B, (0, rank - r)) if r < rank else a.lora_B for a, r in zip(adapters, ranks)]),
        torch.tensor([adapter.scaling for adapter in adapters], dtype=dtype, device=device),
        torch.tensor(ranks, device=device),
    )


def _slots(adapter_names: tuple[str, ...], names: tuple[str, ...], tokens: int, device: torch.device):
    """The slots of a batch whose rows, of `tokens` tokens each, go through the adapters of these names."""
    if torch.compiler.is_compiling():
        slots = [names.index(name) if name in names else -1 for name in adapter_names]
        return torch.tensor(slots, device=device).repeat_interleave(tokens)
    return _routing(adapter_names, names, tokens, device)


@lru_cache(maxsize=16)
def _routing(adapter_names, names, tokens, device) -> ops.Routing:
    slots = [names.index(name) if name in names else -1 for name in adapter_names]
    with torch.inference_mode(False):  # else a later pass could not keep it for its backward pass
        return ops.route(np.repeat(slots, tokens), len(names), device)


# --- what is covered -------------------------------------------------------------------------------------------------


def _intercepted(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, or a forward of the instance."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return bool(hooks) or "forward" in module.__dict__


def _plain(tensor: Tensor) -> bool:
    """Whether this is an ordinary floating-point tensor: dense, not quantised, sharded or of any other subclass."""
    ordinary = type(tensor) in (nn.Parameter, Tensor) and tensor.dtype in FLOATS
    return ordinary and tensor.layout == torch.strided and not tensor.is_nested


def _base(base: nn.Module) -> _Base | str:
    """The weight and bias of a base layer, or the reason why the kernels cannot stand in for it."""
    linear = type(base) is nn.Linear
    if not linear and type(base) is not Conv1D:
        return f"its base layer is {_type_name(base)}, not exactly nn.Linear or Conv1D"
    if _intercepted(base):
        return "its base layer has hooks or a forward of its own"
    weight = base.weight
    if not _plain(weight) or weight.dim() != 2:
        return "its base weight is not an ordinary floating-point matrix (quantised or sharded)"
    return _Base(weight if linear else weight.T, base.bias)


def _adapter(layer: lora.Linear, name: str) -> _Adapter | str:
    """One adapter of a layer, or the reason why the kernels cannot stand in for it."""
    inner = layer._modules
    lora_A, lora_B, dropout = (inner[part]._modules[name] for part in ("lora_A", "lora_B", "lora_dropout"))
    variant = layer.lora_variant.get(name)
    dora = type(variant) is variants.DoraLinearVariant
    if not dora and type(variant) not in _PLAIN_LORA:
        return f"adapter {name!r} is a variant of LoRA ({type(variant).__name__})"
    if type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
        return f"adapter {name!r} is not made of ordinary nn.Linear layers"
    if lora_B.bias is not None:
        return f"adapter {name!r} has a bias (lora_bias=True)"
    magnitude = layer.lora_magnitude_vector[name] if dora else None
    if _intercepted(lora_A) or _intercepted(lora_B) or _intercepted(dropout) or (dora and _intercepted(magnitude)):
        return f"adapter {name!r} has hooks or a forward of its own"
    drops = type(dropout) is nn.Dropout
    if not (drops and dropout.p < 1) and type(dropout) is not nn.Identity:
        return f"adapter {name!r} has a dropout that is not nn.Dropout with p < 1"
    A, B, scaling = lora_A.weight, lora_B.weight, layer.scaling[name]
    magnitude = magnitude.weight if dora else None
    if not all(_plain(t) and t.dtype == A.dtype for t in (A, B) + (magnitude,) * dora):
        return f"adapter {name!r} does not hold ordinary floating-point matrices of one dtype"
    if not isinstance(scaling, (int, float)):
        return f"adapter {name!r} has a tensor as scaling (prepared for hot-swapping)"
    return _Adapter(A, B, scaling, dropout.p if drops and dropout.training else 0.0, magnitude)


def _fits(x: Tensor, weight: Tensor, *adapters: Tensor) -> bool:
    """Whether x and the weight have one dtype, by themselves or by autocast, and no adapter is float64 unless x is."""
    wide = torch.float64
    if x.dtype != weight.dtype and (wide in (x.dtype, weight.dtype) or not autocasting(x)):
        return False
    return _plain(x) and all(_plain(t) and (t.dtype != wide or x.dtype == wide) for t in adapters)


def _coverage(layer: BaseTunerLayer) -> tuple[bool, list[str]]:
    """Whether anything of a layer is covered, and the reasons why something of it is not."""
    kind = _STOCK.get(type(layer), type(layer))
    if kind not in _FUSED:
        return False, ["no fused kernel for layers of this type"]
    if "forward" in layer.__dict__:
        return False, ["it has a forward of its own, set on the instance"]
    base = _base(layer.base_layer)
    if isinstance(base, str):
        return False, [base]
    adapters = [_adapter(layer, name) for name in layer.lora_A] if kind is lora.Linear else [base]
    reasons = [adapter for adapter in adapters if isinstance(adapter, str)]
    return len(reasons) < len(adapters), reasons or ["it has no adapter"] * (not adapters)


# --- accelerate and restore ------------------------------------------------------------------------------------------


@dataclass(repr=False)
class AccelerationReport:
    """What `accelerate` did. It prints as a table with one line for each kind of layer.

    Attributes:
        replaced: (name, kind) of every layer that now runs fused kernels, for all of its adapters or those not
            excepted in `kind`.
        skipped: (name, type, reason) of every layer that PEFT adapted and that keeps PEFT's forward pass.
        groups: (name, layers) of every module in which some of the replaced layers, its children of these names, read
            the input that they share once.
    """

    replaced: list[tuple[str, str]] = field(default_factory=list)
    skipped: list[tuple[str, str, str]] = field(default_factory=list)
    groups: list[tuple[str, tuple[str, ...]]] = field(default_factory=list)

    def __repr__(self) -> str:
        rows = [(kind, "fused", name) for name, kind in self.replaced]
        rows += [(kind, f"kept: {reason}", name) for name, kind, reason in self.skipped]
        rows += [(", ".join(layers), "read their input once", name) for name, layers in self.groups]
        groups = [list(group) for _, group in groupby(sorted(rows), key=itemgetter(0, 1))]
        counted = [(str(len(group)), *group[0]) for group in groups]
        return table(("layers", "kind", "forward pass", "for example"), counted)


def accelerate(model: nn.Module, strict: bool = True) -> AccelerationReport:
    """Run the LoRA and IA3 layers of a model that PEFT adapted through fused kernels, in place, in this model alone.

    Covered are PEFT's `lora.Linear` and `ia3.Linear` on exactly `nn.Linear` or transformers' `Conv1D`; every other
    layer keeps PEFT's forward pass. Call it again after adding adapters to layers that had none.

    Layers of one input in a transformers model (query, key and value; gate and up) read it once, where one adapter is
    active and drops nothing: the first that is called computes the outputs of all, and the others take theirs if they
    are called next with that very tensor and nothing that it depends on has changed since. Writes through `.data` in
    between are not seen. Compiled layers, those in inference mode and those with hooks run alone, on a CPU also those
    that form no gradients. A copy of the model has to be accelerated again to share its inputs.

    A mixed batch sees an adapter as it was when the call of the model, or of `generate`, began.

    Args:
        model: a PeftModel, a PeftMixedModel, or any module into which adapters were injected.
        strict: whether to raise where no layer could be replaced.

    Returns a report of the layers replaced and of those skipped, with reasons. Raises TypeError if model is not a
    module; ValueError, under `strict`, if nothing in it was replaced. The fused layers support neither gradients of
    gradients nor torch.func transforms.
    """
    report = AccelerationReport()
    for name, layer in _adapted_layers(model, "accelerate"):
        covered, reasons = _coverage(layer)
        if covered:
            layer.__class__ = _FUSED.get(type(layer), type(layer))
            kind = f"{_type_name(layer)} on {_type_name(layer.base_layer)}"
            report.replaced.append((name, ", but ".join((kind, *reasons))))
        else:
            report.skipped.append((name, _type_name(layer), "; ".join(reasons)))
    report.groups += _groups(model)
    if strict and not report.replaced:
        why = f"none of its layers is covered:\n{report}" if report.skipped else "PEFT has adapted no layer of it"
        raise ValueError(f"accelerate: model is a {type(model).__name__} in which nothing can be replaced; {why}")
    return report


def restore(model: nn.Module) -> int:
    """Undo `accelerate`: every layer gets PEFT's own class back.

    Returns the number of layers restored. Raises TypeError if model is not a module.
    """
    fused = [layer for _, layer in _adapted_layers(model, "restore") if type(layer) in _STOCK]
    for layer in fused:
        layer.__class__ = _STOCK[type(layer)]
        _GROUPS.pop(layer, None)
    return len(fused)


def _adapted_layers(model: nn.Module, op: str) -> list[tuple[str, BaseTunerLayer]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model is a {type(model).__name__}; it must be a torch.nn.Module that PEFT adapted")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _type_name(module: nn.Module) -> str:
    """PEFT's layers as lora.Linear, torch's as nn.Linear, others as they are imported."""
    cls = _STOCK.get(type(module), type(module))
    if cls is Conv1D:
        return "Conv1D"
    if cls.__module__.startswith("torch.nn.modules."):
        return f"nn.{cls.__qualname__}"
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("peft.tuners.").replace(".layer.", ".")
