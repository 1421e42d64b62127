"""Puts a method's parts into a model: one function for each kind of config."""

import math
import re
from collections.abc import Callable

import torch
from torch import nn

from ..layers.adapted import AdaptedMatrix, Replacement, adapted_class, attach, carriers
from ..layers.parts import AdaLoRAPart, DoRAPart, DyLoRAPart, EmbeddingLoRAPart, IA3Part, LoRAPart
from ..ops.checks import need
from . import targets
from .configs import (
    AdaLoraConfig,
    BitFitConfig,
    Config,
    DyLoraConfig,
    IA3Config,
    LoraConfig,
    SelectiveConfig,
    TargetedConfig,
)


def inject(model: nn.Module, config: Config, name: str, autocast_adapter_dtype: bool) -> None:
    """Attach the parts of adapter `name`, none of which runs yet."""
    INJECT[type(config)](model, config, name, autocast_adapter_dtype)
    _save_modules(model, config, name)


def eject(model: nn.Module) -> None:
    """Take back what was done to the model as a whole for methods of which it holds no adapter any more."""


# --- what a layer is -------------------------------------------------------------------------------------------------


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module of the model itself, without the parts of adapters."""
    kinds = ("adapters", "replaced")
    inside = tuple(f"{path}.{kind}".removeprefix(".") for path, _ in carriers(model) for kind in kinds)
    return {path: module for path, module in model.named_modules() if not inside or not path.startswith(inside)}


def matrices(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module of the layers that can carry a matrix adapter."""
    return {
        path: module
        for path, module in own_modules(model).items()
        if isinstance(module, AdaptedMatrix) or adapted_class(type(module)) is not None
    }


def _is_embedding(module):
    return isinstance(module, nn.Embedding)


def _sizes(module) -> tuple[int, int]:
    """(K, N)"""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def placed(module: nn.Module, autocast_adapter_dtype: bool) -> dict:
    """Device and dtype for the parameters of an adapter in `module`."""
    weight = module.weight
    narrow = weight.dtype in (torch.bfloat16, torch.float16) and autocast_adapter_dtype
    dtype = torch.float32 if narrow or not weight.is_floating_point() else weight.dtype
    return {"device": weight.device, "dtype": dtype}


def target_matrices(model: nn.Module, config: TargetedConfig, usual: Callable[[targets.Family], str]) -> list[str]:
    """The paths of the layers that a config means; `usual` gives the pattern for a known architecture."""
    op, layers = type(config).__name__, matrices(model)
    target = config.target_modules
    if target is None:
        target = usual(targets.family(model, op))
    elif target == "all-linear":
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        saved = saved_modules(config)
        layers = {
            path: module
            for path, module in layers.items()
            if module is not head and not _is_embedding(module) and not any(targets.matches(path, [n]) for n in saved)
        }
        target = ".*"
    options = config.exclude_modules, config.layers_to_transform, config.layers_pattern
    found = targets.select(op, "target_modules", list(layers) or list(own_modules(model)), target, *options)
    for path in found:
        kind = type(model.get_submodule(path)).__name__
        needed = "of linear layers, Conv1D or embeddings only"
        need(path in layers, op, "target_modules", f"meaning {path!r}, a {kind}", needed, TypeError)
    return found


# --- low-rank methods and IA3 ----------------------------------------------------------------------------------------


def _lora(model: nn.Module, config: LoraConfig, name: str, wide: bool) -> None:
    found = target_matrices(model, config, lambda family: targets.ends(family.query, family.value))
    for path in found:
        module = model.get_submodule(path)
        attach(module, name, _lora_part(path, module, config, placed(module, wide)))
    if config.bias != "none":
        every = own_modules(model)
        paths = found if config.bias == "lora_only" else [path for path in every if not _is_saved(path, config)]
        for path in paths:
            if every[path]._parameters.get("bias") is not None:
                attach(every[path], name, Replacement(every[path], ("bias",)))


def _lora_part(path, module, config, like):
    r = config.r if isinstance(config, AdaLoraConfig) else _of_pattern(path, config.rank_pattern, config.r)
    alpha = _of_pattern(path, config.alpha_pattern, config.lora_alpha)
    options = {"dropout_p": config.lora_dropout, "init": config.init_lora_weights, **like}
    if isinstance(config, AdaLoraConfig):
        need(not _is_embedding(module), "AdaLoraConfig", "target_modules", f"meaning {path!r}", "of linear layers")
        part = AdaLoRAPart(*_sizes(module), config.init_r, config.lora_alpha, **options)
        mask = (config.rank_pattern or {}).get(f"{path}.lora_E")
        if mask is not None:
            given, needed = f"of {len(mask)} ranks for {path!r}", f"of init_r = {config.init_r} ranks"
            need(len(mask) == config.init_r, "AdaLoraConfig", "rank_pattern", given, needed)
            part.keep(torch.tensor(mask, device=part.lora_E.device))
        return part
    if isinstance(config, DyLoraConfig):
        need(not _is_embedding(module), "DyLoraConfig", "target_modules", f"meaning {path!r}", "of linear layers")
        frozen_above = config.min_rank if config.frozen else None
        return DyLoRAPart(*_sizes(module), r, alpha, **options, frozen_above=frozen_above)
    scaling = alpha / (math.sqrt(r) if config.use_rslora else r)
    if _is_embedding(module):
        need(not config.use_dora, "LoraConfig", "use_dora", f"True with the embedding {path!r}", "False there")
        return EmbeddingLoRAPart(module, r, scaling, config.init_lora_weights, **like)
    if config.use_dora:
        plain = type(module.weight) is nn.Parameter and module.weight.is_floating_point()
        need(plain, "LoraConfig", "use_dora", f"True with the quantised layer {path!r}", "False there", TypeError)
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        return DoRAPart(weight, r, scaling, **options)
    return LoRAPart(*_sizes(module), r, scaling, **options)


def _of_pattern(path, patterns, default):
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def _ia3(model: nn.Module, config: IA3Config, name: str, wide: bool) -> None:
    op = "IA3Config"
    found = target_matrices(model, config, lambda f: targets.ends(f.key, f.value, f.feedforward_out))
    inner = config.feedforward_modules
    if inner is None:
        inner = targets.ends(targets.family(model, op).feedforward_out) if config.target_modules is None else []
    feedforward = set(targets.select(op, "feedforward_modules", found, inner)) if inner else set()
    for path in found:
        module = model.get_submodule(path)
        need(not _is_embedding(module), op, "target_modules", f"meaning {path!r}", "of linear layers", TypeError)
        size = _sizes(module)[0 if path in feedforward else 1]
        attach(module, name, IA3Part(size, path in feedforward, config.init_ia3_weights, **placed(module, wide)))


# --- parameters of the model itself ----------------------------------------------------------------------------------


def _bitfit(model: nn.Module, config: BitFitConfig, name: str, wide: bool) -> None:
    op = "BitFitConfig"
    modules = {path: module for path, module in own_modules(model).items() if not _is_saved(path, config)}
    chosen = {}
    for path, module in modules.items():
        names = [n for n in ("weight", "bias") if n in module._parameters and (n == "bias" or _is_norm(module))]
        if not config.train_layer_norm:
            names = [n for n in names if n == "bias"]
        if not (config.add_missing and type(module).__name__ in ("Linear", "AdaptedLinear")):
            names = [n for n in names if module._parameters[n] is not None]
        if names:
            chosen[path] = tuple(names)
    biased = any("bias" in names for names in chosen.values())
    needed = "one with biases; add_missing=True gives one to every nn.Linear"
    need(biased, op, "model", f"a {type(model).__name__} in which no module has a bias", needed)
    for path in targets.select(
        op, "target_modules", list(chosen), ".*" if config.target_modules is None else config.target_modules,
        config.exclude_modules,
    ):  # fmt: skip
        attach(modules[path], name, Replacement(modules[path], chosen[path]))


def _is_norm(module):
    return "norm" in type(module).__name__.lower()


def _selective(model: nn.Module, config: SelectiveConfig, name: str, wide: bool) -> None:
    modules = {path: module for path, module in own_modules(model).items() if not _is_saved(path, config)}
    paths = [f"{path}.{n}".removeprefix(".") for path, module in modules.items() for n in module._parameters]
    target = ".*" if config.target_parameters is None else config.target_parameters
    options = None, config.layers_to_transform, config.layers_pattern
    _replace(model, name, targets.select("SelectiveConfig", "target_parameters", paths, target, *options))


def _replace(model, name, paths):
    chosen = {}
    for path in paths:
        owner, _, parameter = path.rpartition(".")
        if model.get_submodule(owner)._parameters[parameter] is not None:
            chosen.setdefault(owner, []).append(parameter)
    for owner, names in chosen.items():
        module = model.get_submodule(owner)
        attach(module, name, Replacement(module, tuple(names)))


HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def saved_modules(config: Config) -> list[str]:
    """Names of the modules that an adapter has copies of: those asked for, and its task's heads, as in PEFT."""
    return list(dict.fromkeys([*(config.modules_to_save or []), *HEADS.get(config.task_type, ())]))


def _is_saved(path, config):
    ancestors = [path[: hit.start()] for hit in re.finditer(r"\.|$", path)]
    return any(targets.matches(ancestor, saved_modules(config)) for ancestor in ancestors)


def _save_modules(model, config, name):
    modules = own_modules(model)
    asked = [each for each in config.modules_to_save or [] if each not in HEADS.get(config.task_type, ())]
    if asked:
        targets.select(type(config).__name__, "modules_to_save", [path for path in modules if path], asked)
    paths = []
    for path, module in modules.items():
        if _is_saved(path, config):
            held = name in getattr(module, "adapters", {}) or name in getattr(module, "replaced", {})
            needed = f"apart from the other targets of {name!r}"
            need(not held, type(config).__name__, "modules_to_save", f"meaning {path!r}", needed)
            paths += [f"{path}.{n}" for n in module._parameters]
    _replace(model, name, paths)


INJECT: dict[type[Config], Callable[[nn.Module, Config, str, bool], None]] = {
    LoraConfig: _lora,
    AdaLoraConfig: _lora,
    DyLoraConfig: _lora,
    IA3Config: _ia3,
    BitFitConfig: _bitfit,
    SelectiveConfig: _selective,
}
