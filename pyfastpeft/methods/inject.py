"""Puts a method's parts into a model: one function for each kind of config."""

import math
import re
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..layers.adapted import (
    AdaptedLinear,
    AdaptedMatrix,
    BaseLinear,
    Parts,
    Replacement,
    adapted_class,
    adapters_in,
    attach,
    carriers,
    offloaded_for,
    placed,
    plain_modules,
    submodule,
    uncompiled,
)
from ..layers.parts import AdaLoRAPart, DoRAPart, DyLoRAPart, EmbeddingLoRAPart, IA3Part, LoRAPart
from ..ops.checks import distributed, need
from ..ops.dispatch import FLOATS
from ..ops.frozen import prefers_own_linear
from . import prefix, prompt, targets
from .configs import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    Config,
    DyLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SelectiveConfig,
    TargetedConfig,
)


def inject(model: nn.Module, config: Config, name: str, autocast_adapter_dtype: bool) -> None:
    """Attach the parts of adapter `name`, none of which runs yet."""
    _save_modules(model, config, name)
    INJECT[type(config)](model, config, name, autocast_adapter_dtype)
    _need_effect(model, config, name)
    for path, module in carriers(model):
        parallel = name in getattr(module, "adapters", {}) and distributed(getattr(module, "weight", None))
        given = f"one whose {path!r} has a DTensor as its weight"
        need(not parallel, "adapt", "model", given, "one with whole weights in adapted layers", TypeError)
    for layer in _transformer_layers(model):
        if isinstance(layer, nn.TransformerEncoder):
            layer.nested_before = layer.__dict__.get("nested_before", layer.use_nested_tensor)
            layer.use_nested_tensor = False
        elif _calls_layers not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_calls_layers)


def _need_effect(model, config, name):
    """Raise ValueError where a new adapter changes a table of words that nothing calls, as T5's and BART's `shared`,
    whose weight the encoder and the decoder have in tables of their own, and none of those. A warning where it is
    loaded: PEFT writes such adapters, which have no effect there either."""
    modules = own_modules(model)
    tables = {path: module for path, module in modules.items() if is_embedding(module)}
    changed = {path for path, module in tables.items() if name in adapters_in(module)}
    for path in changed:
        owner = path.rpartition(".")[0]
        if not type(modules[owner]).__module__.startswith("transformers."):
            continue
        begin = f"{owner}.".removeprefix(".")
        inside = [p for p in tables if p.startswith(begin) and p.rpartition(".")[0] != owner]
        called = [p for p in inside if tables[p].weight is tables[path].weight]
        if not called or changed & {*called}:
            continue
        given = f"one that changes {path!r}, which only holds the weight of {called} and is never called"
        needed = f"one that names {called} instead"
        if config.inference_mode:
            warnings.warn(f"adapt: config is {given}; it has no effect there", stacklevel=4)
        else:
            need(False, "adapt", "config", given, needed)


def eject(model: nn.Module) -> None:
    """Take back what was done to the model as a whole for methods of which it holds no adapter any more."""
    prefix.eject(model)
    prompt.eject(model)
    adapted = _transformer_layers(model)
    for module in model.modules():
        if module in adapted:
            continue
        if "nested_before" in module.__dict__:
            module.use_nested_tensor = module.__dict__.pop("nested_before")
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _calls_layers]:
            del hooks[key]


def _transformer_layers(model) -> list[nn.Module]:
    """torch's own, and stacks of them, in which a layer's forward is adapted."""
    kinds = nn.TransformerEncoder, nn.TransformerEncoderLayer
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    return [layer for layer in layers if any("adapters" in module._modules for _, module in carriers(layer))]


def _calls_layers(module, args):
    """A hook that does nothing; nn.TransformerEncoderLayer with a hook calls its layers in evaluation, too, instead of
    handing their weights to one kernel."""


def set_base_layers(model: nn.Module, adapted: bool) -> None:
    """Let the linear layers without parts run our own product where it is faster than torch's, while adapters run;
    else torch's, so that the model computes bit by bit what it did without them."""
    for module in own_modules(model).values():
        kind = type(module)
        if kind is not nn.Linear and kind is not BaseLinear:
            continue
        wanted = adapted and type(module.weight) is nn.Parameter and prefers_own_linear(module.weight)
        if not wanted:
            module.__class__ = nn.Linear
        elif not {"forward", "_old_forward"} & module.__dict__.keys():
            module.__class__ = BaseLinear


# --- what a layer is -------------------------------------------------------------------------------------------------


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """path -> module of the model itself, without the parts of adapters."""
    inside = {part for parts in model.modules() if isinstance(parts, Parts) for part in parts.modules()}
    return {path: module for path, module in plain_modules(model).items() if module not in inside}


def matrices(model: nn.Module, others: Callable[[nn.Module], bool] = lambda module: False) -> dict[str, nn.Module]:
    """path -> module of the layers that can carry a matrix adapter, and of `others`."""
    modules, uncalled = own_modules(model), uncalled_layers(model)
    fits = {p: isinstance(m, AdaptedMatrix) or adapted_class(type(m)) is not None for p, m in modules.items()}
    fits |= {path: True for path, module in modules.items() if others(module)}
    return {path: module for path, module in modules.items() if fits[path] and path not in uncalled}


# As `class of the parent.name`.
_UNCALLED = re.compile(
    r"\w*(MambaMixer\.dt_proj|WavLMAttention\.(q|k|v|out)_proj|MHAttentionMap\.k_(proj|linear)|TDNNLayer\.kernel"
    r"|MobileBertLMPredictionHead\.(dense|decoder)|(LayoutLMv[23]|ReadingOrder)Encoder\.rel_pos_(x_|y_)?bias"
    r"|LongcatFlashTopkRouter\.classifier|NeoMMEForMaskedLM\.unembedding_projection"
    # Embeddings that hold queries, tokens or positions.
    r"|(Detr|GroundingDino|TableTransformer)Model\.(query_\w+|reference_point_embed|patterns)"
    r"|GroundingDinoModel\.reference_points|TransformerModule\.(queries_\w+|level_embed)|ForUniversalSegmentation\.query"
    r"|(PromptEncoder|MaskDecoder|GeometryEncoder|DetrDecoder)"
    r"\.(\w+_tokens?|no_mask_embed|not_a_point_embed|cls_embed|query_embed|reference_points)"
    r"|(Deberta(V2)?|SEWDTransformer)Encoder\.rel_embeddings|ProphetNetDecoder\.ngram_embeddings"
    r"|(AudioFlamingo3|Qwen2Audio|Voxtral)Encoder\.embed_positions"
    r"|(Glm\w*|Siglip2|Cosmos3Edge)VisionEmbeddings\.position_embedding)"
)


def uncalled_layers(model: nn.Module) -> set[str]:
    """The paths of layers whose weights torch's nn.MultiheadAttention and models of transformers and timm read instead
    of calling them: what an adapter adds to their outputs would have no effect until it is merged."""
    modules, found = own_modules(model), set()
    for path, module in modules.items():
        owner, _, name = path.rpartition(".")
        known = _UNCALLED.fullmatch(f"{type(modules[owner]).__name__}.{name}")
        # timm's BEiT, EVA and Swin V2 have biases for queries and values alone.
        together = getattr(modules[owner], "qkv_bias_separate", None) is False
        biased = name == "qkv" and together and modules[owner].q_bias is not None
        if known or biased or isinstance(module, NonDynamicallyQuantizableLinear):
            found.add(path)
    return found


def is_embedding(module):
    return isinstance(module, nn.Embedding)


def head(model: nn.Module) -> nn.Module | None:
    """The head of a transformers model for words, if it has one."""
    return uncompiled(model.get_output_embeddings()) if hasattr(model, "get_output_embeddings") else None


def sizes(module) -> tuple[int, int]:
    """(K, N)"""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return tuple(module.weight.shape)


def target_matrices(
    model: nn.Module,
    config: TargetedConfig,
    usual: Callable[[targets.Family], str],
    others: Callable[[nn.Module], bool] = lambda module: False,
) -> list[str]:
    """The paths of the layers that a config means, without its modules_to_save; `usual` gives the pattern for a known
    architecture. `others` tells which modules are meant besides those of `adapt`."""
    op, saved, target = type(config).__name__, saved_modules(model, config), config.target_modules
    layers = {path: module for path, module in matrices(model, others).items() if path not in saved}
    exclude = _without_others(model, config, op, layers, saved)
    if target is None:
        target = usual(targets.family(model, op))
    elif target == "all-linear":
        last = head(model)
        layers = {path: m for path, m in layers.items() if m is not last and not is_embedding(m)}
        needed = "one of linear layers or Conv1D beside its head and its modules_to_save, which stay as they are"
        need(layers, op, "model", f"a {type(model).__name__} in which 'all-linear' means nothing", needed)
        target = ".*"
    if not isinstance(target, str):
        # What is saved trains whole; PEFT's files name layers in there, too.
        target = [name for name in target if targets.any_of(layers, name) or not targets.any_of(saved, name)] or target
        for path, module in own_modules(model).items():
            others = [name for name in target if targets.matches(path, [name]) and not targets.any_of(layers, name)]
            needed = "of linear layers, Conv1D or embeddings that are called and not among modules_to_save"
            kind = type(module)
            like_torchs = getattr(nn, kind.__name__, kind) is not kind  # as torch.ao's Linear
            called = f"{kind.__module__}.{kind.__name__}" if like_torchs else kind.__name__
            given = f"holding {others}, which means {path!r}, a {called}"
            need(not others, op, "target_modules", given, needed, TypeError)
    options = exclude, config.layers_to_transform, config.layers_pattern
    return targets.select(op, "target_modules", list(layers), target, *options)


def _without_others(model, config, op, layers, saved):
    """exclude_modules without names that mean convolutions or attention of torch's alone. A warning where
    target_modules mean some of these, which PEFT would adapt."""
    target, exclude = config.target_modules, config.exclude_modules or ()
    others = {path: m for path, m in own_modules(model).items() if isinstance(m, (_ConvNd, nn.MultiheadAttention))}
    named = target not in (None, "all-linear") and config.layers_to_transform is None
    left = [path for path in others.keys() - saved if named and targets.matches(path, target)]
    left = sorted(path for path in left if not targets.matches(path, exclude))
    if left and any(targets.matches(path, target) for path in layers):
        given = f"target_modules also means {left[0]!r}, a {type(others[left[0]]).__name__}"
        given += f", and {len(left) - 1} more" if left[1:] else ""
        warnings.warn(f"{op}: {given}, which stay as they are; exclude_modules can name them", stacklevel=6)
    if isinstance(exclude, str):
        return exclude
    return [name for name in exclude if targets.any_of(layers, name) or not targets.any_of(others, name)]


def take_targets_of_peft(model: nn.Module, config: Config) -> None:
    """Fill in what PEFT's own config without target_modules means: PEFT's usual ones, if it has some for the model."""
    if getattr(config, "target_modules", "") is not None:
        return
    from peft.utils import constants

    kind = getattr(getattr(model, "config", None), "model_type", None)
    for argument in ("feedforward_modules", "target_modules"):
        usual = f"TRANSFORMERS_MODELS_TO_{config.peft_type}_{argument.upper()}_MAPPING"
        names = getattr(constants, usual, {}).get(kind)
        if isinstance(names, list):
            names = targets.known_names(names, matrices(model))
        if names is not None and getattr(config, argument) is None:
            setattr(config, argument, names)


# --- low-rank methods and IA3 ----------------------------------------------------------------------------------------


def _lora(model: nn.Module, config: LoraConfig, name: str, autocast_adapter_dtype: bool) -> None:
    found = target_matrices(model, config, lambda family: targets.ends(family.query, family.value))
    # AdaLoRA's rank_pattern is by whole paths.
    for argument in () if isinstance(config, AdaLoraConfig) else ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, argument):
            targets.need_pattern(type(config).__name__, argument, key)
            if not any(of_pattern(path, {key: True}, False) for path in found):
                given, needed = f"holding {key!r}, which means no target", targets.close_names(key, found)
                need(False, type(config).__name__, argument, given, needed)
    for path in found:
        module = submodule(model, path)
        like = placed(module, module.weight, autocast_adapter_dtype)
        attach(model, path, name, _lora_part(path, module, config, like))
    if config.bias != "none":
        saved = saved_modules(model, config)
        # PEFT takes parameters of this name alone.
        biased = [path for path, m in own_modules(model).items() if m._parameters.get("bias") is not None]
        chosen = [path for path in biased if (config.bias == "all" or path in found) and path not in saved]
        replace(model, name, {path: ["bias"] for path in chosen})


def _lora_part(path, module, config, like):
    options = {"dropout_p": config.lora_dropout, "init": config.init_lora_weights, **like}
    if isinstance(config, AdaLoraConfig):
        _need_linear(module, path, "AdaLoraConfig")
        part = AdaLoRAPart(*sizes(module), config.init_r, config.lora_alpha, **options)
        mask = (config.rank_pattern or {}).get(f"{path}.lora_E")
        if mask is not None:
            given, needed = f"of {len(mask)} ranks for {path!r}", f"of init_r = {config.init_r} ranks"
            need(len(mask) == config.init_r, "AdaLoraConfig", "rank_pattern", given, needed)
            part.keep(torch.tensor(mask, device=part.lora_E.device))
        return part
    r, alpha, scaling = rank_and_scaling(path, config)
    if isinstance(config, DyLoraConfig):
        _need_linear(module, path, "DyLoraConfig")
        frozen_above = config.min_rank if config.frozen else None
        return DyLoRAPart(*sizes(module), r, alpha, **options, frozen_above=frozen_above)
    if is_embedding(module):
        need(not config.use_dora, "LoraConfig", "use_dora", f"True with the embedding {path!r}", "False there")
        return EmbeddingLoRAPart(module, r, scaling, config.init_lora_weights, **like)
    if config.use_dora:
        plain = type(module.weight) is nn.Parameter and module.weight.dtype in FLOATS and offloaded_for(module) is None
        kind = f"{type(module.weight).__name__} of {module.weight.dtype} on {module.weight.device}"
        given, needed = f"True with {path!r}, whose weight is a {kind}", "False where that is quantised or parametrised"
        needed += ", or offloaded"
        need(plain, "LoraConfig", "use_dora", given, needed, TypeError)
        weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
        return DoRAPart(weight, r, scaling, **options)
    return LoRAPart(*sizes(module), r, scaling, **options)


def rank_and_scaling(path: str, config: LoraConfig) -> tuple[int, float, float]:
    """The rank, alpha and scaling of LoRA in the layer at `path`."""
    r = of_pattern(path, config.rank_pattern, config.r)
    alpha = of_pattern(path, config.alpha_pattern, config.lora_alpha)
    return r, alpha, alpha / (math.sqrt(r) if config.use_rslora else r)


def _need_linear(module, path, op):
    need(not is_embedding(module), op, "target_modules", f"meaning {path!r}", "of linear layers", TypeError)


def of_pattern(path: str, patterns: dict | None, default):
    """The value of the first key that means this path, as PEFT reads rank_pattern and alpha_pattern."""
    for key, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def _ia3(model: nn.Module, config: IA3Config, name: str, autocast_adapter_dtype: bool) -> None:
    op = "IA3Config"
    found = target_matrices(model, config, lambda f: targets.ends(f.key, f.value, f.feedforward_out))
    if config.feedforward_modules is None:
        usual = targets.known_family(model)
        feedforward = {path for path in found if usual and targets.matches(path, targets.ends(usual.feedforward_out))}
    elif config.feedforward_modules:
        feedforward = set(targets.select(op, "feedforward_modules", found, config.feedforward_modules))
    else:
        feedforward = set()
    for path in found:
        module = submodule(model, path)
        _need_linear(module, path, op)
        size = sizes(module)[0 if path in feedforward else 1]
        like = placed(module, module.weight, autocast_adapter_dtype)
        attach(model, path, name, IA3Part(size, path in feedforward, config.init_ia3_weights, **like))


def _bottleneck(model: nn.Module, config: BottleneckConfig, name: str, autocast_adapter_dtype: bool) -> None:
    from . import bottleneck  # which is built on this module

    bottleneck.inject(model, config, name, autocast_adapter_dtype)


# --- parameters of the model itself ----------------------------------------------------------------------------------


def _bitfit(model: nn.Module, config: BitFitConfig, name: str, autocast_adapter_dtype: bool) -> None:
    op = "BitFitConfig"
    modules, saved, chosen = own_modules(model), saved_modules(model, config), {}
    for path, module in modules.items():
        own = own_parameters(module)
        names = [n for n in own if "bias" in n]  # of nn.MultiheadAttention, say, in_proj_bias
        if config.train_layer_norm and is_norm(module):
            names += [n for n in own if n == "weight"]
        linear = type(module) in (nn.Linear, AdaptedLinear, BaseLinear)
        if config.add_missing and linear and module.bias is None:
            names += ["bias"]
        if names and path not in saved:
            chosen[path] = names
    biased = any("bias" in name for names in chosen.values() for name in names)
    needed = "one with biases; add_missing=True gives one to every nn.Linear"
    need(biased, op, "model", f"a {type(model).__name__} in which no module has a bias", needed)
    target = ".*" if config.target_modules is None else config.target_modules
    found = targets.select(op, "target_modules", list(chosen), target, config.exclude_modules)
    replace(model, name, {path: chosen[path] for path in found})


def is_norm(module):
    return "norm" in type(module).__name__.lower()


def _selective(model: nn.Module, config: SelectiveConfig, name: str, autocast_adapter_dtype: bool) -> None:
    saved = saved_modules(model, config)
    modules = {path: module for path, module in own_modules(model).items() if path not in saved}
    paths = [f"{path}.{n}".removeprefix(".") for path, module in modules.items() for n in own_parameters(module)]
    target = ".*" if config.target_parameters is None else config.target_parameters
    options = None, config.layers_to_transform, config.layers_pattern
    chosen = {}
    for path in targets.select("SelectiveConfig", "target_parameters", paths, target, *options):
        owner, _, parameter = path.rpartition(".")
        chosen.setdefault(owner, []).append(parameter)
    replace(model, name, chosen)


def own_parameters(module: nn.Module) -> list[str]:
    """The names of the parameters that a module has itself."""
    return [name for name, parameter in module._parameters.items() if parameter is not None]


def replace(model: nn.Module, name: str, chosen: dict[str, list[str]]) -> None:
    """Give adapter `name` copies of parameters, a module's path -> their names in it; those that are tied share one."""
    copies = {}
    for path, names in chosen.items():
        module = submodule(model, path)
        given = f"one that offloads the parameters of {path!r}, of which {name!r} would have copies"
        need(offloaded_for(module) is None, "adapt", "model", given, "one that keeps them in memory", TypeError)
        part = Replacement(module, tuple(names), copies)
        for own, copy in part.named_parameters():
            fits = distributed(copy) or not is_traceable_wrapper_subclass(copy)  # as quantised ones are
            given = f"one with a {type(copy).__name__} of {copy.dtype} as {f'{path}.{own}'.removeprefix('.')!r}"
            needed = "one with ordinary floating-point parameters where copies are to train"
            need(fits and (copy.is_floating_point() or copy.is_complex()), "adapt", "model", given, needed, TypeError)
        attach(model, path, name, part)


HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def saved_names(config: Config) -> list[str]:
    """Names of the modules that an adapter has copies of: those asked for, and its task's heads, as in PEFT."""
    return list(dict.fromkeys([*(config.modules_to_save or []), *HEADS.get(config.task_type, ())]))


def saved_modules(model: nn.Module, config: Config) -> dict[str, nn.Module]:
    """path -> module of those that a config's modules_to_save mean, and of all inside of them."""
    modules, names = own_modules(model), saved_names(config)
    # A checkpoint names all heads of its task, of which a model has one.
    asked = [name for name in config.modules_to_save or () if name not in HEADS.get(config.task_type, ())]
    if asked:
        targets.select(type(config).__name__, "modules_to_save", [path for path in modules if path], asked)
    ancestors = {path: [path[: hit.start()] for hit in re.finditer(r"\.|$", path)] for path in modules}
    # As PEFT reads them, by which DistilBERT's pre_classifier is a classifier, too.
    return {p: m for p, m in modules.items() if any(ancestor.endswith(tuple(names)) for ancestor in ancestors[p])}


def _save_modules(model, config, name):
    saved = {path: own_parameters(module) for path, module in saved_modules(model, config).items()}
    # As PEFT copies them: one by one, so that only what is tied inside of one stays tied.
    for top in [path for path in saved if path.rpartition(".")[0] not in saved]:
        inside = {path: names for path, names in saved.items() if names and f"{path}.".startswith(f"{top}.")}
        replace(model, name, inside)


INJECT: dict[type[Config], Callable[[nn.Module, Config, str, bool], None]] = {
    LoraConfig: _lora,
    AdaLoraConfig: _lora,
    DyLoraConfig: _lora,
    IA3Config: _ia3,
    BottleneckConfig: _bottleneck,
    BitFitConfig: _bitfit,
    SelectiveConfig: _selective,
    PrefixTuningConfig: prefix.inject,
    PromptTuningConfig: prompt.inject,
}
