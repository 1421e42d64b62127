"""Bottleneck adapters in a model: after its sub-layers, or beside them."""

from torch import Tensor, nn

from ..layers.adapted import attach, placed, submodule
from ..layers.bottleneck import EntrancePart, ExitPart, ParallelPart, Passage, SerialPart
from ..ops.checks import need
from . import targets
from .configs import BottleneckConfig
from .inject import (
    is_embedding,
    is_norm,
    matrices,
    own_modules,
    own_parameters,
    replace,
    sizes,
    target_matrices,
    uncalled_layers,
)

OP = "BottleneckConfig"


def inject(model: nn.Module, config: BottleneckConfig, name: str, autocast_adapter_dtype: bool) -> None:
    """Attach the parts of adapter `name`, none of which runs yet."""
    (_parallel if config.placement == "parallel" else _serial)(model, config, name, autocast_adapter_dtype)
    if config.train_layer_norm:
        _train_norms(model, config, name)


def _family(model) -> targets.Family:
    family = targets.family(model, OP)
    given = f"None for a {type(model).__name__}, which has experts"
    need(not family.experts, OP, "target_modules", given, "given, since experts are no linear layers")
    return family


def _serial(model, config, name, autocast_adapter_dtype):
    target = config.target_modules
    if target is None:
        family = _family(model)
        places = (family.attention_out, family.feedforward_out)
        target = targets.ends(*(places if config.placement == "houlsby" else places[1:]))
    for path in _select(model, config, target):
        module = submodule(model, path)
        _, width, like = _widths(path, module, autocast_adapter_dtype)
        attach(model, path, name, SerialPart(width, config.bottleneck_size, width, **_options(config), **like))


def _parallel(model, config, name, autocast_adapter_dtype):
    for first, last in _chains(model, config):
        entrance, exit = submodule(model, first), submodule(model, last)
        need(not is_embedding(entrance), OP, "target_modules", f"meaning {first!r}", "of modules that read vectors")
        in_width, _, _ = _widths(first, entrance, autocast_adapter_dtype)
        _, out_width, like = _widths(last, exit, autocast_adapter_dtype)
        arguments, options = (in_width, config.bottleneck_size, out_width), _options(config) | like
        if first == last:
            attach(model, last, name, ParallelPart(*arguments, **options))
        else:
            passage = Passage()
            attach(model, first, name, EntrancePart(passage))
            attach(model, last, name, ExitPart(passage, *arguments, **options))


def _chains(model, config) -> list[tuple[str, str]]:
    """The paths of the first and the last layer of all that get a branch beside them; equal where it is one module."""
    entrances, exits = config.input_modules, config.target_modules
    if exits is None:
        family = _family(model)
        exits = targets.ends(family.feedforward) if family.feedforward else ""
        if not any(targets.matches(path, exits) for path in _modules(model)):
            entrances, exits = targets.ends(family.feedforward_in), targets.ends(family.feedforward_out)
    chosen = _select(model, config, exits)
    if entrances is None:
        return [(path, path) for path in chosen]
    firsts = targets.select(OP, "input_modules", _modules(model), entrances)
    lasts = targets.select(OP, "target_modules", _modules(model), exits)
    apart = len(firsts) == len(lasts) and not {*firsts} & {*lasts}
    need(apart, OP, "input_modules", f"meaning {firsts}", f"others than the target modules, one for each of {lasts}")
    return [(first, last) for first, last in zip(firsts, lasts) if last in chosen]


def _modules(model) -> list[str]:
    """The paths of all modules that are called: no lists, nor layers of which only the weights are read."""
    modules, uncalled = own_modules(model), uncalled_layers(model)
    called = [path for path, module in modules.items() if type(module).forward is not nn.Module.forward]
    return [path for path in called if path and path not in uncalled]


def _select(model, config, target) -> list[str]:
    if target == "all-linear":
        return target_matrices(model, config, lambda family: target)
    options = config.exclude_modules, config.layers_to_transform, config.layers_pattern
    return targets.select(OP, "target_modules", _modules(model), target, *options)


def _widths(path, module, autocast_adapter_dtype) -> tuple[int, int, dict]:
    """K of the first linear layer in a module, N of the last, and how its adapter's parameters are placed."""
    known = matrices(module)
    layers = [m for inner, m in own_modules(module).items() if inner in known or isinstance(m, nn.Linear)]
    if layers:
        return sizes(layers[0])[0], sizes(layers[-1])[1], placed(layers[-1], layers[-1].weight, autocast_adapter_dtype)
    weight = getattr(module, "weight", None)  # a method of torch's quantised layers
    vector = isinstance(weight, Tensor) and weight.dim() == 1
    given, needed = f"meaning {path!r}, a {type(module).__name__}", "of modules that hold linear layers, or of norms"
    need(vector, OP, "target_modules", given, needed, TypeError)
    return len(weight), len(weight), placed(module, weight, autocast_adapter_dtype)


def _options(config) -> dict:
    return {
        "activation": config.activation,
        "scaling": config.scaling,
        "layer_norm": config.layer_norm,
        "init_weights": config.init_weights,
    }


def _train_norms(model, config, name):
    modules = own_modules(model)
    norms = [
        path for path, module in modules.items() if is_norm(module) and module._parameters.get("weight") is not None
    ]
    need(bool(norms), OP, "train_layer_norm", "True for a model without normalisation layers", "False")
    options = config.exclude_modules, config.layers_to_transform, config.layers_pattern
    found = targets.select(OP, "train_layer_norm", norms, ".*", *options)
    chosen = {path: [n for n in own_parameters(modules[path]) if n in ("weight", "bias")] for path in found}
    replace(model, name, chosen)
