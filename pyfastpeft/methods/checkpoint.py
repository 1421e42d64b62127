"""Adapters on disk, as PEFT stores them: adapter_config.json and adapter_model.safetensors."""

import dataclasses
import os
import re
import warnings
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..layers.adapted import AdaptedMatrix, plain_path, uncompiled
from ..layers.parts import AdaLoRAPart, DoRAPart, EmbeddingLoRAPart, IA3Part, LoRAPart
from ..ops.checks import need, need_value
from .adapt import adapt, delete_adapter, disable_adapter, need_adapter, parts_of, set_adapter
from .configs import AdaLoraConfig, Config, IA3Config, LoraConfig, VirtualTokensConfig, from_fields
from .files import json_as_bytes, need_file, opened, read_json, tensors_as_bytes, write_files
from .inject import matrices, of_pattern, own_modules, saved_modules, saved_names, uncalled_layers
from .targets import known_names, matches, need_pattern
from .virtual import task_of

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

# What PEFT calls the parameters of a part, after the module's path. A part that is not here keeps its own names.
SUFFIXES: dict[type[nn.Module], dict[str, str]] = {
    LoRAPart: {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
    DoRAPart: {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"},
    EmbeddingLoRAPart: {"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
    AdaLoRAPart: {"lora_A": "lora_A", "lora_B": "lora_B", "lora_E": "lora_E"},
    IA3Part: {"ia3_l": "ia3_l"},
}

# PEFT's initialisations that set the factors alone, which are in the file. Others change the base model's weights.
DRAWN = ("orthogonal", "eva")


def save_adapter(model: nn.Module, directory: str | os.PathLike, name: str = "default") -> None:
    """Write an adapter as PEFT does, so that PEFT reads it: adapter_config.json and adapter_model.safetensors.

    Methods that PEFT lacks are written alike, with a `peft_type` of their own. Targets that were found by architecture,
    or among some layers only, are written by name. AdaLoRA's ranks outside the budget are left out. If it fails, files
    that were there stay whole.

    Raises ValueError for a name that the model does not have, RuntimeError where layers that the adapter was put into
    are not in it any more, or its copies tied or parametrized, RuntimeError or TypeError where this process may hold
    only a part of it, NotADirectoryError or OSError where it cannot write.
    """
    model = uncompiled(model)
    config = need_adapter(model, "save_adapter", name)
    flat = [m for m in model.modules() if type(m).__name__ == "FullyShardedDataParallel"]
    whole = all(module.training_state.name == "SUMMON_FULL_PARAMS" for module in flat)
    needed = "in FullyShardedDataParallel.summon_full_params(model), which makes its parameters whole"
    need(whole, "save_adapter", "model", "one that FSDP flattens and shards", needed, RuntimeError)
    if isinstance(config, AdaLoraConfig) and config.rank_pattern:
        config = dataclasses.replace(config, rank_pattern=_kept_ranks(model, config, name))
    tensors = {slot.key: slot.read() for slot in _slots(model, config, name)}
    fields = _stored_fields(model, config, name)
    write_files(directory, {CONFIG_FILE: json_as_bytes(fields), TENSORS_FILE: tensors_as_bytes(tensors)})


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    name: str = "default",
    strict: bool = True,
    is_trainable: bool = False,
    check_base_model: bool = True,
    autocast_adapter_dtype: bool = True,
) -> nn.Module:
    """Inject the adapter that `save_adapter` or PEFT wrote to `directory`, and let it alone run.

    Names in its config that mean nothing in the model are left out, as by PEFT, if the tensors in the file are those of
    the others.

    Args:
        model: as for `adapt`; adapters that it has are kept, inactive.
        strict: whether tensors in the file that the adapter has no place for are an error; else they are warned of.
            Tensors of the base model itself, as PEFT writes some, are passed over where they are the model's own.
        is_trainable: whether the adapter trains.
        check_base_model: whether base_model_name_or_path must be that of the model, where both are known.
        autocast_adapter_dtype: whether adapters of a 16-bit model are float32.

    Returns the model. Raises FileNotFoundError or NotADirectoryError for missing files and ValueError or TypeError,
    naming the file and the key or field, for what does not fit; the model is then as it was.
    """
    need_value(isinstance(model, nn.Module), "load_adapter", "model", model, "a torch.nn.Module", TypeError)
    config = load_config(directory)
    config.inference_mode = True  # nothing is drawn, and no text read, that the file has
    if check_base_model:
        need_base(model, config)
    path = need_file(directory, TENSORS_FILE)
    active = model.pyfastpeft.active if hasattr(model, "pyfastpeft") else ()
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with opened(path) as file:
        _leave_out_unmatched(model, config, file.keys())
        adapt(model, config, name, autocast_adapter_dtype)
        try:
            _fill(uncompiled(model), config, name, file, path, strict)
        except BaseException:
            delete_adapter(model, name)
            if active:
                set_adapter(model, *active)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            raise
    if is_trainable:
        model.pyfastpeft.configs[name].inference_mode = False
        set_adapter(model, name)
    return model


def need_base(model: nn.Module, config: Config) -> None:
    """Raise ValueError where the names of the model and of that which the adapter is for are known and differ."""
    ours, theirs = getattr(getattr(model, "config", None), "_name_or_path", None), config.base_model_name_or_path
    same = not (ours and theirs) or os.path.normpath(ours) == os.path.normpath(theirs)
    needed = f"{theirs!r}, for which the adapter was made, or check_base_model=False"
    need(same, "load_adapter", "model", f"{ours!r}", needed)


def load_config(directory: str | os.PathLike) -> Config:
    """The config of the adapter in `directory`. Fields of PEFT's that have no counterpart here must be unset."""
    path = need_file(directory, CONFIG_FILE)
    fields = read_json(path)
    if fields.get("init_lora_weights") in DRAWN:
        fields |= {"init_lora_weights": True, "eva_config": None}
    try:
        return from_fields(fields.get("peft_type"), fields)
    except (TypeError, ValueError) as why:
        raise type(why)(f"{path}: {why}") from None


def _leave_out_unmatched(model, config, keys) -> None:
    """Take the names that mean nothing in this model, or nothing that has tensors in the file, out of a config."""
    uncalled = uncalled_layers(model)
    modules = [path for path in own_modules(model) if path and path not in uncalled]
    excluded = matrices(model) if isinstance(config, (LoraConfig, IA3Config)) else modules
    places = dict.fromkeys(("target_modules", "modules_to_save"), modules)
    for argument, paths in (places | {"exclude_modules": excluded}).items():
        given = getattr(config, argument, None)
        if given is not None and not isinstance(given, str):
            found = known_names(given, paths)
            setattr(config, argument, found if found or argument != "target_modules" else given)
    if isinstance(config, LoraConfig) and not isinstance(config, AdaLoraConfig):
        layers = {key.removeprefix(key_base(config)).partition(".lora_")[0] for key in keys}
        for argument in ("rank_pattern", "alpha_pattern"):
            patterns = getattr(config, argument)
            for key in patterns:
                need_pattern(type(config).__name__, argument, key)
            met = {k: v for k, v in patterns.items() if any(of_pattern(path, {k: True}, False) for path in layers)}
            setattr(config, argument, met)
    if isinstance(config, IA3Config) and config.feedforward_modules:
        layers = {key.removeprefix(key_base(config)).partition(".ia3_l")[0] for key in keys}
        config.feedforward_modules = _feedforward_as_peft_reads_it(config.feedforward_modules, layers)


def _feedforward_as_peft_reads_it(given: str | list[str], layers: set[str]) -> str | list[str]:
    """feedforward_modules in which nothing is without meaning; to PEFT a name is any end of a path, from within a word,
    too."""
    if isinstance(given, str):
        return given if any(matches(path, given) for path in layers) else []
    meant, known = {path for path in layers if path.endswith(tuple(given))}, known_names(given, layers)
    return known if meant == {path for path in layers if matches(path, known)} else sorted(meant)


# --- tensors ---------------------------------------------------------------------------------------------------------


class Slot(NamedTuple):
    """A tensor of an adapter: its key and shape in the file, and its ways out of the model and into it."""

    key: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]
    write: Callable[[Tensor], None]


def _slots(model: nn.Module, config: Config, name: str) -> list[Slot]:
    base = key_base(config)
    slots = []
    for path, module in model.pyfastpeft.places[name].items():  # where it is, without the names of wrappers
        here, inner = f"{base}{path}.".replace("..", "."), ""
        if name in getattr(module, "adapters", {}):
            part = module.adapters[name]
            if hasattr(part, "prompt_embeddings"):
                slots.append(_prompt_slot(part))
                continue
            mask = (getattr(config, "rank_pattern", None) or {}).get(f"{path}.lora_E")
            suffixes = next((SUFFIXES[kind] for kind in type(part).__mro__ if kind in SUFFIXES), {})
            for own, parameter in part.named_parameters():
                slots.append(_slot(here + suffixes.get(own, own), part, own, parameter, mask))
            inner = "base_layer." if isinstance(module, AdaptedMatrix) else ""
        if name in getattr(module, "replaced", {}):
            part = module.replaced[name]
            for own, parameter in part.trained(module).items():
                slots.append(_slot(here + inner + own, part, own, parameter))
    keys = [slot.key for slot in slots]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    need(not twice, "save_adapter", "model", f"with several tensors that are stored as {twice}", "without those")
    return slots


def key_base(config: Config) -> str:
    """What PEFT's keys start with: its wrappers' names."""
    return "base_model." if isinstance(config, VirtualTokensConfig) else "base_model.model."


def _prompt_slot(part) -> Slot:
    def read():
        with torch.no_grad():
            return part.prompt_embeddings().detach()

    return Slot("prompt_embeddings", tuple(read().shape), read, part.load_prompt_embeddings)


def _slot(key: str, part: nn.Module, own: str, parameter: nn.Parameter, mask: list[bool] | None = None) -> Slot:
    tensor = parameter.detach()
    if isinstance(part, IA3Part):
        tensor = tensor[None] if part.feedforward else tensor[:, None]
    elif mask is not None and len(mask) == part.r != sum(mask):  # ranks out of the budget, but still in the model
        kept = torch.tensor(mask, device=tensor.device)
        tensor = tensor[:, kept] if own == "lora_B" else tensor[kept]
    return Slot(key, tuple(tensor.shape), lambda: tensor, lambda given: tensor.copy_(given))


def _kept_ranks(model, config, name) -> dict[str, list[bool]]:
    """AdaLoRA's rank_pattern, with the ranks that training has moved off zero since it was made."""
    pattern = {}
    for path, part in parts_of(model, name).items():
        key = f"{path}.lora_E"
        if key in config.rank_pattern:
            mask, live = config.rank_pattern[key], part.lora_E.detach().ne(0)[:, 0].tolist()
            pattern[key] = [a or b for a, b in zip(mask, live)] if len(live) == len(mask) else list(mask)
    return pattern


def _fill(model, config, name, file, path, strict) -> None:
    """Check all of the file against all of the adapter, then copy."""
    if isinstance(config, AdaLoraConfig) and config.rank_pattern:
        stray = config.rank_pattern.keys() - _kept_ranks(model, config, name).keys()
        told = f"with a rank_pattern for {some(stray)}"
        need(not stray, "load_adapter", CONFIG_FILE, told, "with one for layers that have the adapter")
    slots = {slot.key: slot for slot in _slots(model, config, name)}
    given = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    empty = [key for key, slot in slots.items() if slot.read().is_meta]
    needed = "one whose adapted layers have values, or they would be lost"
    need(not empty, "load_adapter", "model", f"without memory for {some(empty)}, on the meta device", needed)
    missing = slots.keys() - given.keys()
    needed = f"a file with all tensors of the {config.peft_type} adapter that {CONFIG_FILE} tells of"
    need(not missing, "load_adapter", str(path), f"without {some(missing)}", needed)
    for key, slot in slots.items():
        need_stored(path, key, given[key], slot.shape)
    unknown = given.keys() - slots.keys()
    if unknown:
        with disable_adapter(model):
            unknown = unknown_tensors(model, config, file, unknown)
    if unknown:
        told = f"holding {some(unknown)}, for which neither the {config.peft_type} adapter nor the model has a place"
        need(not strict, "load_adapter", str(path), told, "without them, or loaded with strict=False")
        warnings.warn(f"load_adapter: {path} is {told}; they are left out", stacklevel=3)
    with torch.no_grad():
        for key, slot in slots.items():
            slot.write(file.get_tensor(key))


def need_stored(path: os.PathLike, key: str, given, shape: tuple[int, ...]) -> None:
    """Raise ValueError or TypeError unless what the file at `path` has at `key` is of this shape, and floating."""
    stored, dtype = tuple(given.get_shape()), given.get_dtype()
    told = f"holding {key} of shape {list(stored)}"
    need(stored == shape, "load_adapter", str(path), told, f"of shape {list(shape)} there")
    told = f"holding {key} of dtype {dtype}"
    need(dtype.startswith(("F", "BF")), "load_adapter", str(path), told, "of a floating dtype there", TypeError)


def unknown_tensors(model: nn.Module, config: Config, file, keys: Iterable[str]) -> list[str]:
    """Those of `keys` that are not simply copies: of the base model's own tensors, as PEFT writes an adapted
    embedding's, or of others in the file, as it writes biases of modules_to_save."""
    held = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    own, unknown = {plain_path(path): tensor for path, tensor in held}, []
    for key in keys:
        tensor = file.get_tensor(key)
        if ".modules_to_save." in key:  # with or without the adapter's name behind it
            saved = (re.sub(rf"\.modules_to_save\.{name}", ".", key) for name in ("", r"[^.]+\."))
            twin = next((file.get_tensor(each) for each in saved if each in file.keys()), None)  # noqa: SIM118
        else:
            twin = own.get(re.sub(r"\.(base_layer|original_module)\.", ".", key.removeprefix(key_base(config))))
        same = twin is not None and twin.shape == tensor.shape
        if not (same and torch.equal(twin.detach().cpu(), tensor.to(twin.dtype))):
            unknown.append(key)
    return unknown


def some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    return ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")


# --- config ----------------------------------------------------------------------------------------------------------


def _stored_fields(model: nn.Module, config: Config, name: str) -> dict:
    """The fields as PEFT reads them: with targets by name, and in the state in which it loads adapters."""
    fields = config.as_dict() | {"inference_mode": True, "modules_to_save": saved_names(config) or None}
    if type(config) in (LoraConfig, AdaLoraConfig, IA3Config):
        fields |= _named_targets(model, config, name)
        fields["fan_in_fan_out"] |= _transposed(model, name)
    if isinstance(config, LoraConfig) and not isinstance(config, AdaLoraConfig):
        fields |= _sortable_patterns(model, config, name)
    if isinstance(config, IA3Config):
        del fields["layers_to_transform"], fields["layers_pattern"]
    if isinstance(config, AdaLoraConfig) and config.total_step is None:
        fields["total_step"] = config.tinit + config.tfinal + 1  # PEFT wants a schedule even to load
    if isinstance(config, VirtualTokensConfig):
        fields["task_type"] = task_of(model, config)
    if fields["task_type"] is None:
        kind = type(model)
        fields["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    return {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in fields.items()}


def _sortable_patterns(model, config, name) -> dict:
    """rank_pattern and alpha_pattern, of which the first key that means a path counts, by whole paths where sorting
    them, as JSON does, would change what they mean."""
    found = {}
    for argument in ("rank_pattern", "alpha_pattern"):
        given = getattr(config, argument)
        meant = {path: of_pattern(path, given, None) for path in parts_of(model, name)}
        if any(of_pattern(path, dict(sorted(given.items())), None) != value for path, value in meant.items()):
            found[argument] = {re.escape(path): value for path, value in meant.items() if value is not None}
    return found


def _named_targets(model, config, name) -> dict:
    """target_modules and what goes with it, by names alone where PEFT may find other modules than were found here."""
    parts, modules = parts_of(model, name), own_modules(model)
    inner, exclude = getattr(config, "feedforward_modules", None), config.exclude_modules or ()
    given = config.target_modules not in (None, "all-linear") and config.layers_to_transform is None
    listed = not isinstance(config.target_modules, (str, type(None))) and not isinstance(inner, (str, type(None)))
    if given:
        known = {model.pyfastpeft.places[name][path] for path in parts} | {*saved_modules(model, config).values()}
        others = [path for path, module in modules.items() if path and module not in known]
        given = not any(matches(path, config.target_modules) and not matches(path, exclude) for path in others)
    if given and (type(config) is not IA3Config or (listed and set(inner) <= set(config.target_modules))):
        return {}
    every = [path for path in modules if path]
    inputs = [path for path, part in parts.items() if getattr(part, "feedforward", False)]
    groups = [path for path in parts if path not in inputs], inputs
    names = [_names(group, every) for group in groups]
    if None in names:
        names = ["|".join(map(re.escape, group)) for group in groups]
        target = "|".join(filter(None, names)) or "()"  # the model itself
    else:
        target = sorted({*names[0], *names[1]})
    found = {"target_modules": target, "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    return found | ({"feedforward_modules": names[1] or []} if isinstance(config, IA3Config) else {})


def _names(paths: list[str], every: list[str]) -> list[str] | None:
    """The shortest ends of paths that mean these of `every` module; None where an end of one is another's path, or one
    is the model itself, which has no name."""
    if "" in paths:
        return None
    others, names = [path for path in every if path not in set(paths)], set()
    for path in paths:
        if any(matches(path, [name]) for name in names):
            continue
        pieces = path.split(".")
        ends = (".".join(pieces[-n:]) for n in range(1, len(pieces) + 1))
        end = next((end for end in ends if not any(matches(other, [end]) for other in others)), None)
        if end is None:
            return None
        names.add(end)
    return sorted(names)


def _transposed(model, name) -> bool:
    """Whether the adapter is in layers like GPT-2's, of which PEFT wants to know."""
    held = [module for module in model.pyfastpeft.places[name].values() if name in getattr(module, "adapters", {})]
    return any(getattr(m, "transposed", False) and not isinstance(m, nn.Embedding) for m in held)
