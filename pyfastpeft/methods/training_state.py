"""Resuming training: what an adapter's own two files do not hold.

training_state.safetensors has every tensor: the adapter's parameters as they train (with the MLP of prefix tuning and
the ranks that are out of AdaLoRA's budget), the optimizer's by the parameters' names, the generators'.
training_state.json has the rest, and says where each tensor belongs.
"""

import json
import os
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from ..layers.adapted import plain_path
from ..ops.checks import need, need_value
from .adapt import adaptation, adapter_parameters, need_adapter, sharded
from .configs import AdaLoraConfig
from .files import json_as_bytes, need_file, opened, read_json, tensors_as_bytes, write_files

STATE_FILE = "training_state.json"
TENSORS_FILE = "training_state.safetensors"


def save_training_state(
    directory: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    step: int = 0,
    name: str = "default",
    **others: Any,
) -> None:
    """Write what it takes to go on training adapter `name`, bit for bit as if it had not stopped.

    Args:
        optimizer: of torch's kind, over parameters of the model. Its class's name is stored, too.
        scheduler, others: anything with `state_dict` and `load_state_dict`: a learning-rate scheduler, a
            `RankAllocator` (allocator=...), a gradient scaler.
        step: how many steps were taken.

    The states of the generators of torch, numpy and `random` are stored, too. If it fails, files that were there stay
    whole. Raises ValueError or TypeError naming what cannot be stored.
    """
    op = "save_training_state"
    need_value(isinstance(step, int) and step >= 0, op, "step", step, "an integer >= 0")
    for key, other in {"scheduler": scheduler, **others}.items():
        stateful = hasattr(other, "state_dict") or (key == "scheduler" and other is None)
        need_value(stateful, op, key, other, "an object with state_dict and load_state_dict", TypeError)
    needed = "whole; torch.distributed.checkpoint saves sharded ones"
    need(not sharded(model), op, "model", f"a {type(model).__name__} that FSDP shards", needed, TypeError)
    names = _names(op, model, optimizer, name)
    config = adaptation(model, op).configs[name]
    state = {
        "step": step,
        "config": _fields_that_train(config),
        "rank_pattern": config.rank_pattern if isinstance(config, AdaLoraConfig) else None,
        "parameters": {key: parameter.detach() for parameter, key in names.items()},
        "optimizer": None if optimizer is None else _named(optimizer, names),
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "others": {key: other.state_dict() for key, other in others.items()},
        "generators": _generators(),
    }
    tensors = {}
    plain = _without_tensors(state, "", tensors)
    write_files(directory, {STATE_FILE: json_as_bytes(plain), TENSORS_FILE: tensors_as_bytes(tensors)})


def load_training_state(
    directory: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    name: str = "default",
    **others: Any,
) -> int:
    """Put back what `save_training_state` wrote, into a model with the same adapter (from `adapt` with the same config)
    and objects that were made anew in the same way.

    Returns the number of steps taken. Raises FileNotFoundError for missing files and ValueError or TypeError, naming
    the file and the key, for what does not fit; the parameters are then as they were.
    """
    op = "load_training_state"
    path, tensors_path = need_file(directory, STATE_FILE), need_file(directory, TENSORS_FILE)
    with opened(tensors_path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    state = _with_tensors(read_json(path), tensors, tensors_path)
    sections = {"step", "config", "rank_pattern", "parameters", "optimizer", "scheduler", "others", "generators"}
    need(sections == state.keys(), op, str(path), f"of {sorted(state)}", f"of {sorted(sections)}")
    need(not tensors, op, str(tensors_path), f"holding {sorted(tensors)[:5]}", f"of the tensors that {path} tells of")

    stateful = {"scheduler": scheduler, **others}
    stored = {"scheduler": state["scheduler"], **state["others"]}
    for key in ("optimizer", *sorted(stateful.keys() | stored.keys())):
        here = (optimizer if key == "optimizer" else stateful.get(key)) is not None
        there = (state["optimizer"] if key == "optimizer" else stored.get(key)) is not None
        needed = f"given: {path} has its state" if there else f"not given: {path} has no state"
        need(here == there, op, key, "given" if here else "None", needed)
    names = _names(op, model, optimizer, name)
    config = adaptation(model, op).configs[name]
    _need_same(op, path, tensors_path, config, names, state)
    unnamed = None if optimizer is None else _unnamed(op, optimizer, names, state["optimizer"], path)

    for key, other in stateful.items():
        if other is not None:
            other.load_state_dict(stored[key])
    if optimizer is not None:
        optimizer.load_state_dict(unnamed)
    with torch.no_grad():
        for parameter, key in names.items():
            parameter.copy_(state["parameters"][key])
    if isinstance(config, AdaLoraConfig):
        config.rank_pattern = state["rank_pattern"]
    _set_generators(state["generators"])
    return state["step"]


def _names(op, model, optimizer, name) -> dict[nn.Parameter, str]:
    """The parameters that training changes, and their names: "<adapter>/<path>", or the path of the model's own."""
    known = adaptation(model, op)
    need_adapter(model, op, name)
    groups = optimizer is None or hasattr(optimizer, "param_groups")
    need_value(groups, op, "optimizer", optimizer, "a torch.optim.Optimizer, or None", TypeError)
    every = {parameter: plain_path(path) for path, parameter in model.named_parameters()}
    for other in known.configs:
        every |= {parameter: f"{other}/{path}" for path, parameter in adapter_parameters(model, other).items()}
    trained = list(adapter_parameters(model, name).values())
    for group in optimizer.param_groups if optimizer is not None else ():
        for parameter in group["params"]:
            need(parameter in every, op, "optimizer", "one with parameters of something else", "one of the model's")
            trained.append(parameter)
    return {parameter: every[parameter] for parameter in trained}


def _fields_that_train(config) -> dict:
    """The fields that determine how an adapter trains. Its place in the model follows from its parameters' names."""
    places = {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "feedforward_modules"}
    places |= {"target_parameters", "modules_to_save", "fan_in_fan_out", "task_type"}
    of_the_run = {"base_model_name_or_path", "revision", "inference_mode"}
    of_the_run |= {"rank_pattern"} if isinstance(config, AdaLoraConfig) else set()
    fields = {key: value for key, value in config.as_dict().items() if key not in places | of_the_run}
    return json.loads(json.dumps(fields))


def _need_same(op, path, tensors_path, config, names, state) -> None:
    """The adapter's fields, and the names, shapes and dtypes of parameters, as they were."""
    fields = _fields_that_train(config)
    changed = [f for f in fields.keys() | state["config"].keys() if fields.get(f) != state["config"].get(f)]
    told = "of an adapter with " + ", ".join(f"{f} {fields.get(f)!r}" for f in sorted(changed))
    needed = ", ".join(f"{f} {state['config'].get(f)!r}" for f in sorted(changed))
    need(not changed, op, "model", told, f"of one with {needed}, as in {path}")
    stored = state["parameters"]
    missing, extra = sorted(set(names.values()) - stored.keys()), sorted(stored.keys() - set(names.values()))
    needed = f"with the model's parameters: {len(missing)} are missing, {len(extra)} have no place"
    need(not missing and not extra, op, str(tensors_path), f"of other ones than {(missing + extra)[:5]}", needed)
    for parameter, key in names.items():
        given = stored[key]
        same = given.shape == parameter.shape and given.dtype == parameter.dtype
        told = f"holding {key} of {given.dtype} {list(given.shape)}"
        need(same, op, str(tensors_path), told, f"of {parameter.dtype} {list(parameter.shape)} there")


# --- optimizer -------------------------------------------------------------------------------------------------------


def _named(optimizer, names) -> dict:
    """An optimizer's state with names in the place of numbers, and its class's."""
    state = optimizer.state_dict()
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    name = {i: n for group, own in zip(state["param_groups"], groups) for i, n in zip(group["params"], own)}
    return state | {
        "class": _class(optimizer),
        "state": {name[i]: held for i, held in state["state"].items()},
        "param_groups": [group | {"params": own} for group, own in zip(state["param_groups"], groups)],
    }


def _class(optimizer) -> str:
    """The name of an optimizer's class; where it is wrapped, as by accelerate, that of the one inside."""
    return type(getattr(optimizer, "optimizer", optimizer)).__name__


def _unnamed(op, optimizer, names, stored, path) -> dict:
    """The reverse, for an optimizer of the same class with the same parameters in the same groups."""
    here, there = _class(optimizer), stored.pop("class", None)  # which older files lack
    needed = f"of class {there}, whose state {path} has"
    need(there in (None, here), op, "optimizer", f"of class {here}", needed, TypeError)
    groups = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
    held = [group["params"] for group in stored["param_groups"]]
    told = f"one with parameters in groups of {[len(group) for group in groups]}"
    needed = f"one with those of {path}, in groups of {[len(group) for group in held]} and in their order"
    need(groups == held, op, "optimizer", told, needed)
    numbers = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    number = {n: i for group, own in zip(groups, numbers) for n, i in zip(group, own)}
    return stored | {
        "state": {number[n]: state for n, state in stored["state"].items()},
        "param_groups": [group | {"params": own} for group, own in zip(stored["param_groups"], numbers)],
    }


# --- generators ------------------------------------------------------------------------------------------------------


def _generators() -> dict:
    version, words, gauss = random.getstate()
    arrays = numpy.random.get_state(legacy=False)
    keys = torch.from_numpy(arrays["state"]["key"].astype(numpy.int64))
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "random": [version, torch.tensor(words), gauss],
        "numpy": arrays | {"state": {"key": keys, "pos": arrays["state"]["pos"]}},
    }


def _set_generators(state: dict) -> None:
    torch.set_rng_state(state["torch"])
    for device, held in zip(range(torch.cuda.device_count()), state["cuda"]):
        torch.cuda.set_rng_state(held, device)
    version, words, gauss = state["random"]
    random.setstate((version, tuple(words.tolist()), gauss))
    keys = state["numpy"]["state"]["key"].numpy().astype(numpy.uint32)
    numpy.random.set_state(state["numpy"] | {"state": state["numpy"]["state"] | {"key": keys}})


# --- JSON, with tensors beside it ------------------------------------------------------------------------------------

_KINDS = {"tuple": tuple, "Counter": lambda pairs: Counter(dict(pairs)), "dict": dict}


def _without_tensors(value, path: str, tensors: dict[str, Tensor]):
    """`value` as JSON, its tensors moved to `tensors`. Raises TypeError naming what JSON has no way to write."""
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"_kind": "tensor", "_key": path}
    if value is None or isinstance(value, (str, int, float)):
        return value
    kind = type(value).__name__
    if isinstance(value, (list, tuple)):
        items = [_without_tensors(each, f"{path}|{i}", tensors) for i, each in enumerate(value)]
        return items if isinstance(value, list) else {"_kind": "tuple", "_items": items}
    known = isinstance(value, Mapping) and (kind in ("dict", "defaultdict", "OrderedDict", "Counter"))
    needed = "of tensors, numbers, strings, and lists, tuples and dicts"
    need_value(known, "save_training_state", path, value, needed, TypeError)
    pairs = [(key, _without_tensors(each, f"{path}|{key}".removeprefix("|"), tensors)) for key, each in value.items()]
    if kind != "Counter" and all(isinstance(key, str) and key != "_kind" for key, _ in pairs):
        return dict(pairs)
    return {"_kind": "Counter" if kind == "Counter" else "dict", "_items": [list(pair) for pair in pairs]}


def _with_tensors(value, tensors: dict[str, Tensor], path):
    """The reverse, of the files at `path`; what it takes out of `tensors` is gone from there."""
    if isinstance(value, list):
        return [_with_tensors(each, tensors, path) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value.get("_kind")
    if kind is None:
        return {key: _with_tensors(each, tensors, path) for key, each in value.items()}
    if kind == "tensor":
        need(value["_key"] in tensors, "load_training_state", str(path), f"without {value['_key']}", "whole")
        return tensors.pop(value["_key"])
    need(kind in _KINDS, "load_training_state", str(path), f"of parts of kind {kind!r}", f"of {', '.join(_KINDS)}")
    return _KINDS[kind](_with_tensors(value["_items"], tensors, path))
