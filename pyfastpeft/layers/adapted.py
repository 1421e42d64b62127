"""Layers of an existing model that carry adapters: their class is swapped, their own parameters stay where they are.

For a token, with the parts that are active, a linear layer computes the one law of all methods:
y = d_out * (W (d_in * x) + sum of low-rank branches of d_in * x + b), each factor one where no part sets it.
"""

from collections.abc import Mapping
from functools import cache
from inspect import signature
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import ops
from ..ops import checks
from ..ops.dispatch import FLOATS
from ..ops.reference import accumulation

MERGED = "weight_is_merged"


class Part(nn.Module):
    """What one adapter adds to one layer. A subclass overrides what it changes of the layer's computation."""

    mergeable = False
    reads_base = False

    def before(self, x: Tensor) -> Tensor:
        """The layer's input [..., K] as the layer is to see it."""
        return x

    def beside(self, y: Tensor, x: Tensor, weight: Tensor | None, base: Tensor | None = None) -> Tensor:
        """The layer's output [..., N] with this part's branch of its input x [..., K]; y may be written in place.
        weight [N, K], None where the layer is no matrix; base [..., N], for a part that `reads_base`, what the layer
        computes of x without its bias, None where that is x weight^T."""
        return y

    def after(self, y: Tensor) -> Tensor:
        """The layer's output [..., N] as its successor is to see it."""
        return y

    def fused(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """All of the layer at once, weight [N, K]; None where there is no kernel for that."""
        return None

    def merged_beside(self, merged: Tensor, weight: Tensor) -> Tensor:
        """merged [N, K] plus the change of weight [N, K] that has the effect of `beside`, in the dtype of sums."""
        return merged

    def merged_around(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """weight [N, K] and bias [N] changed so as to have the effect of `before` and `after`, in the dtype of sums."""
        return weight, bias


class Mergeable:
    """A module into whose weight adapters can be merged, which `merged` tells of: mixed in before its class.

    Its state dict says so while they are, with one key more, `MERGED`: `need_unmerged` refuses such a dict.
    """

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.merged:
            destination[prefix + MERGED] = torch.tensor(True)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        need_unmerged(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


def need_unmerged(module: nn.Module, state_dict: dict, prefix: str, *_) -> None:
    """Raise RuntimeError where a state dict that `module` is to load has merged weights, to which its layers would add
    the adapter again, or weights for a merged layer, whose `unmerge` would replace them by others.

    A layer calls it for itself; as a hook of a whole model it comes before anything is loaded.
    """
    for path, layer in module.named_modules(prefix=prefix.removesuffix(".")):
        if isinstance(layer, Mergeable):
            begin, op = f"{path}." if path else "", "load_state_dict"
            given = bool(layer.merged) and any(key.startswith(begin) for key in state_dict)
            told, needed = f"one with weights for the merged layer {path!r}", "for an unmerged one: unmerge it first"
            checks.need(not given, op, "state_dict", told, needed, RuntimeError)
            told, needed = f"one with merged weights for the layer {path!r}", "of an unmerged one: unmerge that first"
            checks.need(begin + MERGED not in state_dict, op, "state_dict", told, needed, RuntimeError)


class Adapted:
    """A module that holds parts of adapters: mixed into the module's own class.

    Attributes: adapters, name -> Part; active, the names of those that run, in order; merged, the names of those that
    are merged into the weight; _first, what the module's own class calls the first argument of its forward.
    """

    _first: str | None = "input"
    adapters: "Parts"
    active: tuple[str, ...]
    merged: tuple[str, ...] = ()  # read as an attribute, whose changes torch.compile sees

    def __reduce_ex__(self, protocol):
        # A class made by `carrier_class` has no place that pickle could find it in.
        _, _, *state = super().__reduce_ex__(protocol)
        return _blank, (_plain_class(type(self)),), *state

    def running(self) -> list[Part]:
        """The parts that take part in a forward pass."""
        if self.merged:
            return []
        parts = self.adapters._modules
        return [parts[name] for name in self.active if name in parts]

    def _name_of_x(self, kwargs: dict) -> str | None:
        """Under which name the module was given its first argument."""
        return self._first if self._first in kwargs else next(iter(kwargs), None)


class AdaptedMatrix(Mergeable, Adapted):
    """A linear layer or an embedding; `matrix()` is its weight as [N, K], which may be a view."""

    transposed = False  # whether the weight is stored as [K, N]
    foreign = False  # whether the class computes something of its own from its weight
    # While merged, the weight and the bias of before. torch.export takes no Parameter among buffers.
    originals: Mapping[str, nn.Parameter] = MappingProxyType({})

    def matrix(self) -> Tensor:
        return self.weight.T if self.transposed else self.weight

    def forward(self, *args, **kwargs) -> Tensor:
        parts = self.running()
        if not parts or not (args or kwargs):
            return super().forward(*args, **kwargs)
        x, *args = args or [kwargs.pop(self._name_of_x(kwargs))]
        if len(parts) == 1 and self.plain and not args and not kwargs:
            y = parts[0].fused(x, self.matrix(), self.bias)
            if y is not None:
                return y
        for part in parts:
            x = part.before(x)
        y, base = super().forward(x, *args, **kwargs), None
        if self.foreign:
            kind, needed = _plain_class(type(self)).__name__, "a tensor, or the layer named in exclude_modules"
            checks.need(isinstance(y, Tensor), kind, "its output", f"a {type(y).__name__}", needed, TypeError)
            if any(part.reads_base for part in parts):
                base = y if getattr(self, "bias", None) is None else y - self.bias
            y = y.clone()  # it may keep its output for its backward pass, or return a view
        for part in parts:
            y = part.beside(y, x, self.matrix(), base)
        for part in parts:
            y = part.after(y)
        return y

    @torch.inference_mode(False)  # through whose tensors no gradient passes
    def merge(self, names: tuple[str, ...]) -> None:
        """Replace the weight (and bias) by those that have the effect of these adapters, summed in float32 and rounded
        once; the original ones are kept. Raises RuntimeError if something is merged already."""
        checks.need(not self.merged, "merge", "the layer", f"merged with {self.merged}", "unmerged", RuntimeError)
        wide = accumulation(self.weight.dtype)
        weight, bias = self.matrix().detach().to(wide), getattr(self, "bias", None)
        matrix, shift = weight, None if bias is None else bias.detach().to(wide)
        parts = [self.adapters[name] for name in names]
        with torch.no_grad():
            for part in parts:
                matrix = part.merged_beside(matrix, weight)
            for part in parts:
                matrix, shift = part.merged_around(matrix, shift)
        merged = (matrix.T if self.transposed else matrix).to(self.weight.dtype).contiguous()
        # The very Parameter is kept, which may be tied to another layer's.
        self.originals = {"weight": self.weight}
        self.weight = nn.Parameter(merged, requires_grad=False)
        if bias is not None:
            self.originals["bias"] = bias
            self.bias = nn.Parameter(shift.to(bias.dtype), requires_grad=False)
        self.merged = tuple(names)

    def _apply(self, fn, recurse=True):
        # Moved or cast as parameters are, originals stay what they were: tied, in the model's or an adapter's hands.
        self._parameters |= {f"unmerged_{name}": held for name, held in self.originals.items()}
        try:
            return super()._apply(fn, recurse)
        finally:
            for name in self.originals:
                self.originals[name] = self._parameters.pop(f"unmerged_{name}")

    def unmerge(self) -> None:
        """Put the original weight (and bias) back, bit for bit. Does nothing where nothing is merged."""
        if not self.merged:
            return
        for name, original in self.originals.items():
            setattr(self, name, original)
        del self.merged, self.originals


class AdaptedLinear(AdaptedMatrix, nn.Linear):
    """torch.nn.Linear with adapters."""

    @property
    def plain(self) -> bool:
        """Whether the weight is an ordinary floating-point matrix, which the fused kernels read."""
        return type(self.weight) is nn.Parameter and self.weight.dtype in FLOATS


class BaseLinear(nn.Linear):
    """torch.nn.Linear without a `Part`, in a model some of whose adapters run."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.frozen_linear(input, self.weight, self.bias)


class AdaptedEmbedding(AdaptedMatrix, nn.Embedding):
    """torch.nn.Embedding [vocabulary, d] with adapters: its matrix [d, vocabulary] on one-hot inputs."""

    plain = False
    transposed = True

    @property
    def foreign(self) -> bool:
        """Whether the rows of the weight are shortened when they are looked up."""
        return self.max_norm is not None


class AdaptedModule(Adapted):
    """Any other module: adapters see its first argument as x, and its output, or the first of several, as y."""

    def forward(self, *args, **kwargs):
        parts = self.running()
        if not parts or not (args or kwargs):
            return super().forward(*args, **kwargs)
        first = self._name_of_x(kwargs)
        x = args[0] if args else kwargs[first]
        for part in parts:
            x = part.before(x)
        outputs = super().forward(x, *args[1:], **kwargs) if args else super().forward(**(kwargs | {first: x}))
        y, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        for part in parts:
            y = part.beside(y, x, None)
        for part in parts:
            y = part.after(y)
        return (y, *others) if isinstance(outputs, tuple) else y


@cache
def adapted_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """The class that a module of exactly this class is swapped to; None if it cannot carry a matrix adapter.

    Classes derived from nn.Linear with a forward of their own (quantised ones, say) compute their own base; branches
    are added to its output.
    """
    known = {nn.Linear: AdaptedLinear, BaseLinear: AdaptedLinear, nn.Embedding: AdaptedEmbedding}
    if kind in known:
        return known[kind]
    if kind is NonDynamicallyQuantizableLinear:  # nn.MultiheadAttention reads its weight and never calls it
        return None
    if issubclass(kind, nn.Linear) and not issubclass(kind, Adapted):
        foreign = kind.forward not in (nn.Linear.forward, BaseLinear.forward)
        return _mixed(AdaptedMatrix, kind, plain=False if foreign else AdaptedLinear.plain, foreign=foreign)
    scaled = kind.__name__.endswith("ScaledWordEmbedding") and kind.__module__.startswith("transformers.")
    if scaled and issubclass(kind, nn.Embedding):
        return _mixed(AdaptedEmbedding, kind)
    if is_conv1d(kind):
        return _mixed(AdaptedMatrix, kind, plain=AdaptedLinear.plain, transposed=True)
    return None


def is_conv1d(kind: type[nn.Module]) -> bool:
    """Whether a class is exactly transformers' Conv1D, a linear layer that stores its weight as [K, N]."""
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


@cache
def carrier_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class that a module of exactly this class is swapped to, a matrix or any other module."""
    return adapted_class(kind) or _mixed(AdaptedModule, kind)


def _mixed(base: type[Adapted], kind: type[nn.Module], **own) -> type[nn.Module]:
    first = [*signature(kind.forward).parameters, None][1]
    order = type(kind.__name__, (base, kind), {}).__mro__[1:]
    # Of several bases the first gives the layout in memory, and classes of another layout cannot be swapped.
    ordered = type("Ordered", (type(kind),), {"mro": lambda cls: [cls, *order]})
    return ordered(f"Adapted{kind.__name__}", (kind, base), {"_first": first} | own)


def _brought(kind: type[Adapted]) -> set[str]:
    """The public names that the class of a carrier adds to the class of the module."""
    names = {name for c in kind.__mro__ if issubclass(c, Adapted) for name in vars(c)}
    return {name for name in names - {"forward"} if not name.startswith("_")}


def _plain_class(kind: type[Adapted]) -> type[nn.Module]:
    return next(c for c in kind.__mro__ if issubclass(c, nn.Module) and not issubclass(c, Adapted))


def _blank(kind: type[nn.Module]) -> nn.Module:
    carrier = carrier_class(kind)
    return carrier.__new__(carrier)


class Parts(nn.ModuleDict):
    """adapter name -> part. `module.adapters` holds the `Part`s of its computation, `module.replaced` the
    `Replacement`s of its parameters."""


class Replacement(nn.Module):
    """Parameters that take the place of a module's own while the adapter runs.

    Whichever of the two is not in use is kept here, so that every tensor has one place and moves with the model. The
    module's own is called `original_<name>` here, so that a state dict is not loaded while another adapter runs.
    """

    def __init__(self, module: nn.Module, names: tuple[str, ...], copies: dict[nn.Parameter, nn.Parameter]):
        """Copies of the parameters of `module` with these names; a missing bias (None) is replaced by zeros. copies:
        original -> copy, of those made before, so that tied parameters stay tied; new ones are added."""
        super().__init__()
        self.names, self.installed = names, False
        for name in names:
            original = module._parameters[name]
            if original is None:
                weight, size = module.weight, module.out_features
                like = {"device": weight.device, "dtype": weight.dtype}  # a quantised one may make no other tensors
                zeros = weight.new_zeros(size) if checks.distributed(weight) else torch.zeros(size, **like)
                copy = nn.Parameter(zeros, requires_grad=False)
            elif original not in copies:
                copy = copies[original] = nn.Parameter(original.detach().clone(), requires_grad=False)
            else:
                copy = copies[original]
            self.register_parameter(name, copy)

    def swap(self, module: nn.Module) -> None:
        """Exchange the module's parameters for those kept here."""
        before, after = ("original_{}", "{}") if self.installed else ("{}", "original_{}")
        for name in self.names:
            self._parameters[after.format(name)] = module._parameters[name]
            module._parameters[name] = self._parameters.pop(before.format(name))
        self.installed = not self.installed

    def trained(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """The adapter's own parameters, wherever they are; while something is merged into one, it is the layer's
        original."""
        if not self.installed:
            return {name: self._parameters[name] for name in self.names}
        originals = getattr(module, "originals", {})
        return {name: originals.get(name, module._parameters[name]) for name in self.names}


def uncompiled(module: nn.Module) -> nn.Module:
    """The module in what torch.compile made of it, or else the module."""
    return getattr(module, "_orig_mod", module)


def plain_path(path: str) -> str:
    """The path of a module or parameter without the names that torch.compile adds where it wrapped modules."""
    return ".".join(name for name in path.split(".") if name != "_orig_mod")


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """plain path -> module of all in `model`, torch.compile's wrappers left out."""
    return {plain_path(path): module for path, module in model.named_modules()}  # what is inside comes later


def submodule(model: nn.Module, path: str) -> nn.Module:
    """The module at a plain path."""
    return uncompiled(model.get_submodule(path))


def carriers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(path, module) of all modules in `model` that carry parts or replacements of adapters."""
    return [(path, module) for path, module in plain_modules(model).items() if _parts(module)]


def _parts(module) -> dict[str, Parts]:
    return {kind: held for kind in ("adapters", "replaced") if isinstance(held := module._modules.get(kind), Parts)}


def adapters_in(module: nn.Module) -> list[str]:
    """The names of the adapters that have something in a module."""
    return [name for parts in _parts(module).values() for name in parts]


def offloaded_for(module: nn.Module) -> torch.device | int | str | None:
    """The device to which accelerate brings a module's own parameters for its forward pass alone; None where they stay
    where they are."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((each.execution_device for each in hooks if getattr(each, "offload", False)), None)


def placed(module: nn.Module, weight: Tensor, autocast_adapter_dtype: bool) -> dict:
    """Device and dtype for the parameters of an adapter beside `weight` of a module: its own when the module runs, but
    float32 where it is none of the ops' dtypes, or of 16 bits and `autocast_adapter_dtype` holds. Raises TypeError for
    a complex one."""
    given, needed = f"one with a weight of {weight.dtype} in a target", "of real numbers there"
    checks.need(not weight.is_complex(), "adapt", "model", given, needed, TypeError)
    narrow = weight.dtype in (torch.bfloat16, torch.float16) and autocast_adapter_dtype
    dtype = torch.float32 if narrow or weight.dtype not in FLOATS else weight.dtype
    there = offloaded_for(module)
    return {"device": weight.device if there is None else there, "dtype": dtype}


def attach(model: nn.Module, path: str, name: str, part: nn.Module) -> None:
    """Give the module at `path` a part of adapter `name`, which does not run yet; its class is swapped where a `Part`
    needs it."""
    module = submodule(model, path)
    kind = "replaced" if isinstance(part, Replacement) else "adapters"
    swaps = isinstance(part, Part) and not isinstance(module, Adapted)
    names = {kind, "active"} if not _parts(module) else {kind} - _parts(module).keys()
    names |= _brought(carrier_class(type(module))) if swaps else set()
    own = sorted(each for each in names if hasattr(module, each))
    checks.need(not own, "attach", repr(path), f"a {type(module).__name__} with {own} of its own", "without")
    if swaps:
        _set_class(path, module, carrier_class(type(module)))
    if kind not in _parts(module):
        setattr(module, kind, Parts())
    if "active" not in module.__dict__:
        module.active = ()
    getattr(module, kind)[name] = part.train(module.training)


def detach(path: str, module: nn.Module, name: str) -> None:
    """Take all parts of adapter `name`, which does not run, off `module`, at `path` in its model. With the last one it
    gets its class back."""
    for kind, parts in _parts(module).items():
        if name in parts:
            del parts[name]
        if not parts:
            delattr(module, kind)
            if kind == "adapters" and isinstance(module, Adapted):
                _set_class(path, module, _plain_class(type(module)))
    if not _parts(module):
        del module.active


def _set_class(path, module, kind):
    """Swap the class, also for accelerate's hooks (device_map), which hold the forward of the class before."""
    held = {key: module.__dict__[key] for key in ("_old_forward", "forward") if key in module.__dict__}
    bound = [key for key, value in held.items() if getattr(value, "__func__", None) is type(module).forward]
    given = f"a {type(module).__name__} whose forward is replaced by {held.get('forward')!r}"
    checks.need(bound or not held, "attach", repr(path), given, "one that runs its class's forward", TypeError)
    for key in bound:
        setattr(module, key, kind.forward.__get__(module))
    module.__class__ = kind


def activate(module: nn.Module, names: tuple[str, ...]) -> None:
    """Let exactly the parts of these adapters run, in this order."""
    module.active = tuple(name for name in names if any(name in parts for parts in _parts(module).values()))
    # Those that leave go first: what they put back is what others replace.
    for name, part in sorted(_parts(module).get("replaced", {}).items(), key=lambda item: item[0] in names):
        if part.installed != (name in names):
            part.swap(module)
