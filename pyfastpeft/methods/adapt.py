"""Adapters in a model: injected in place, several at a time, each with a name."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import unwrap

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.parameter import is_lazy

from ..layers.adapted import (
    Adapted,
    AdaptedMatrix,
    Parts,
    activate,
    adapters_in,
    attach,
    carriers,
    detach,
    need_unmerged,
    offloaded_for,
    plain_path,
    submodule,
    uncompiled,
)
from ..ops.checks import need, need_value
from . import inject
from .combine import combine
from .configs import Config, as_config


@dataclass
class Adaptation:
    """The adapters of a model, as `model.pyfastpeft`.

    configs: name -> config, in the order of injection; places: name -> path -> module that it was put into; active: the
    names of those that run, in order.
    """

    configs: dict[str, Config] = field(default_factory=dict)
    places: dict[str, dict[str, nn.Module]] = field(default_factory=dict, repr=False, compare=False)
    active: tuple[str, ...] = ()
    trainable: dict[str, bool] = field(default_factory=dict)  # of the plain model's parameters, for `unload`


def adapt(model: nn.Module, config, name: str = "default", autocast_adapter_dtype: bool = True) -> nn.Module:
    """Inject an adapter into `model`, in place, and let it alone run and train.

    Args:
        model: a transformers model, or any module tree whose targets the config names. Its own parameters are frozen;
            they keep their places and names. Adapters that it has already are kept, inactive.
        config: one of `pyfastpeft.methods`' configs, or PEFT's config of the same method, which without target_modules
            means PEFT's usual ones; the model keeps a copy.
        name: of the adapter.
        autocast_adapter_dtype: whether adapters of a 16-bit model are float32.

    Returns the model. Raises ValueError or TypeError naming the field that does not fit the model, with close names
    where a target is misspelt; the model is then as it was.
    """
    op = "adapt"
    need_adaptable(model, op)
    plain = uncompiled(model)
    ours, config = isinstance(config, Config), deepcopy(as_config(config))
    if not ours:
        inject.take_targets_of_peft(model, config)
    known = adaptation(model, op) if hasattr(model, "pyfastpeft") else Adaptation()
    _need_new(known, op, name)
    _need_unmerged(model, op)
    strange = [path for path, module in carriers(model) if not {*adapters_in(module)} <= set(known.configs)]
    need(not strange, op, "model", f"one whose {strange[:3]} were adapted in another model", "the adapted one itself")
    _need_parameters(carriers(model), op)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    if not known.configs:
        known.trainable = {plain_path(path): p.requires_grad for path, p in plain.named_parameters()}
    before = [(module, module.active) for _, module in carriers(model)]
    for module, _ in before:  # what is new starts from the model's own parameters
        activate(module, ())
    try:
        inject.inject(plain, config, name, autocast_adapter_dtype)
        counted = Counter(key for key, _ in _named(model, name))
        twice = sorted(key for key, count in counted.items() if count > 1)
        need(not twice, op, "config", f"one with two parameters called {twice}", "one that changes either alone")
    except BaseException:
        for module, active in before:
            activate(module, active)
        _detach_all(model, name)
        raise
    if not known.configs:
        plain.pyfastpeft_loading = plain.register_load_state_dict_pre_hook(need_unmerged)
    known.configs[name], known.places[name] = config, _places(model, name)
    model.pyfastpeft = known
    model.requires_grad_(False)
    set_adapter(model, name)
    return model


def need_adaptable(model: nn.Module, op: str) -> None:
    """Raise TypeError or ValueError, naming `op`, unless layers of `model` can take new parameters."""
    _need_module(model, op)
    plain = uncompiled(model)
    wrapped = isinstance(plain, (DataParallel, DistributedDataParallel))
    given = f"a {type(plain).__name__}, which does not know new parameters and names all others anew"
    need(not wrapped, op, "model", given, "its module, adapted before it is wrapped", TypeError)
    given = f"a {type(plain).__name__} that FSDP shards, which does not know new parameters"
    need(not sharded(model), op, "model", given, "adapted before it is sharded", TypeError)
    theirs = [type(m) for m in model.modules() if any(c.__module__.startswith("peft.") for c in type(m).__mro__)]
    needed = "a plain one, as PEFT's unload() leaves it; accelerate is for models that PEFT adapted"
    need(not theirs, op, "model", f"one with {len(theirs)} modules of PEFT's, {theirs[:2]} …", needed)
    lazy = [path for path, parameter in model.named_parameters() if is_lazy(parameter)]
    need(not lazy, op, "model", f"one with {lazy[:3]} without a shape yet", "run once before, which gives them shapes")


def set_adapter(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters run, together, in this order; those without `inference_mode` train.

    Raises ValueError for a name that the model does not have, or where two of them replace one parameter;
    RuntimeError while adapters are merged, for one of which layers were replaced or removed, or copies tied or
    parametrized, after `adapt`, or where parameters that FSDP shards or accelerate offloads would change places.
    """
    known = adaptation(model, "set_adapter")
    for name in names:
        need_adapter(model, "set_adapter", name)
        need_value(names.count(name) == 1, "set_adapter", "names", names, "distinct")
    _need_unmerged(model, "set_adapter")
    for path, module in carriers(model):
        parts = getattr(module, "replaced", {})
        replaced = [parameter for name in names if name in parts for parameter in parts[name].names]
        twice = {parameter for parameter in replaced if replaced.count(parameter) > 1}
        need(not twice, "set_adapter", "names", f"{names}, which all replace {twice} of {path!r}", "without conflict")
    _run(model, known, names, "set_adapter")


def _run(model, known, names, op):
    _need_free(model, names, op)
    known.active = names
    for _, module in carriers(model):
        activate(module, names)
        for name in known.configs:
            for _, parameter in _trained(module, name):
                parameter.requires_grad_(name in names and not known.configs[name].inference_mode)
    inject.set_base_layers(model, bool(names))


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Inside the `with` block the model computes what it did before it was adapted. What is merged is unmerged before
    it and merged again after it. Adapters that are set, added or merged inside run from there on, also after it."""
    known = adaptation(model, "disable_adapter")
    active = {name: known.configs[name] for name in known.active}
    _need_free(model, (), "disable_adapter")
    ran, merged = _runs(model), [(module, getattr(module, "merged", ())) for _, module in carriers(model)]
    unmerge_adapter(model)
    for module, _ in merged:
        activate(module, ())
    inject.set_base_layers(model, False)
    try:
        yield
    finally:
        known, left = getattr(model, "pyfastpeft", Adaptation()), {module for _, module in carriers(model)}
        if ran or _runs(model):
            for module in left:
                activate(module, known.active)
        others = known.active != tuple(name for name in active if known.configs.get(name) is active[name])
        for module, names in () if others or merged_adapters(model) else merged:
            names = tuple(name for name in names if module in left and name in module.adapters)
            if names:
                module.merge(names)
        inject.set_base_layers(model, _runs(model))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter; the others stay as they are. With the last one the model is the plain one again.

    Raises ValueError for a name that the model does not have, RuntimeError while adapters are merged.
    """
    known = adaptation(model, "delete_adapter")
    _need_name(known, "delete_adapter", name)
    _need_unmerged(model, "delete_adapter")
    others = tuple(other for other in known.active if other != name)
    _need_free(model, others, "delete_adapter")
    running = others if _runs(model) else ()
    for _, module in carriers(model):
        activate(module, running)
    known.active = others
    _detach_all(model, name)
    del known.configs[name], known.places[name]
    if not known.configs:
        plain = uncompiled(model)
        for path, parameter in plain.named_parameters():
            parameter.requires_grad_(known.trainable.get(plain_path(path), True))
        plain.pyfastpeft_loading.remove()
        del plain.pyfastpeft, plain.pyfastpeft_loading


def unload(model: nn.Module, merge: bool = False) -> nn.Module:
    """The plain model again, without any adapter; with `merge`, with the active ones merged into its weights. Those
    that were tied to a weight that changes are copies then; so are all tied weights of a transformers model whose head
    was its table of words.

    Returns the model. Raises as `merge_adapter` does; TypeError for a model that would compute something else then.
    """
    known = adaptation(model, "unload")
    _need_free(model, (), "unload")
    kept, made, together = {}, {}, {}
    if merge:
        before = merged_adapters(model)
        if not before:
            merge_adapter(model)
        fits = not _ties(model) or _is_tied(model) or not _asks_for_ties(model)
        if not fits and not before:
            unmerge_adapter(model)
        given = f"True where one of two tied weights of a {type(model).__name__} changes"
        needed = "False, since untied the model would compute something else"
        need(fits, "unload", "merge", given, needed, TypeError)
        for path, module in carriers(model):
            changed = ["weight", "bias"] if isinstance(module, Adapted) and module.merged else []
            changed += [n for part in getattr(module, "replaced", {}).values() if part.installed for n in part.names]
            kept |= {(path, n): module._parameters[n] for n in changed if module._parameters.get(n) is not None}
    unmerge_adapter(model)
    for name in list(known.configs):
        delete_adapter(model, name)
    tied = _is_tied(model)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                together.setdefault(parameter, []).append((module._parameters, name))
    for (path, name), value in kept.items():
        # A new parameter: the old one may be tied to another layer's, which nothing was merged into.
        owner = submodule(model, path)._parameters
        if value not in made:
            made[value] = nn.Parameter(value.detach(), owner[name] is None or owner[name].requires_grad)
        owner[name] = made[value]
    parted = [places for places in together.values() if len({owner[name] for owner, name in places}) > 1]
    untied = tied and (not _is_tied(model) or (parted and not _asks_for_ties(model)))
    if untied:
        model.config.tie_word_embeddings = False  # or what is saved is tied again when it is loaded
    for places in together.values() if untied else parted:
        _untie(places)
    return model


def _ties(model) -> bool:
    return bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))


def _asks_for_ties(model) -> bool:
    """Whether a model's forward pass depends on whether weights are tied, as UMT5's, which scales its output then."""
    return "tie_word_embeddings" in unwrap(type(model).forward).__code__.co_names


def _is_tied(model) -> bool:
    """Whether a transformers model's head is its table of embeddings."""
    if not _ties(model):
        return False
    head = inject.head(model)
    return head is not None and head.weight is model.get_input_embeddings().weight


@torch.inference_mode(False)
def _untie(places):
    """Copies of parameters that several modules share: stored once, they would not be found by their other names."""
    seen = set()
    for owner, name in places:
        if owner[name] in seen:
            owner[name] = nn.Parameter(owner[name].detach().clone(), owner[name].requires_grad)
        seen.add(owner[name])


def merge_adapter(model: nn.Module, *names: str) -> None:
    """Merge adapters (default: the active ones; others become those) into the weights that they change;
    `unmerge_adapter` restores those bit for bit. Sums are float32 and rounded once. Parameters that an adapter replaces
    are in use already. The state dict of a merged model has a key `weight_is_merged` in every such layer; a model with
    adapters does not load it, nor a merged model any for those layers: RuntimeError, before anything is changed.

    Raises TypeError, naming it, for an adapter whose method cannot be merged; ValueError if none is named or active;
    RuntimeError if something is merged, or as `set_adapter` does.
    """
    known = adaptation(model, "merge_adapter")
    names = names or known.active
    _need_unmerged(model, "merge_adapter")
    need(names, "merge_adapter", "names", "empty, and no adapter is active", f"of {sorted(known.configs)}")
    for name in names:
        need_adapter(model, "merge_adapter", name)
    here = [(path, m, [n for n in names if n in getattr(m, "adapters", {})]) for path, m in carriers(model)]
    whole = not any(present for *_, present in here) or not sharded(model)
    given = f"a {type(model).__name__} that FSDP shards, which puts back the weights of before"
    need(whole, "merge_adapter", "model", given, "one that is not sharded", TypeError)
    for path, module, present in here:
        for name in present:
            part = module.adapters[name]
            given = f"{name!r}, whose {type(part).__name__} in {path!r} is no change of a weight"
            mergeable = getattr(part, "mergeable", False)
            need(mergeable, "merge_adapter", "names", given, "of methods that change weights", TypeError)
            kind, dtype = type(module.weight).__name__, module.weight.dtype
            plain = kind == "Parameter" and dtype.is_floating_point and not module.foreign
            given = f"holding a {kind} of {dtype} in {path!r}, an {type(module).__name__}"
            need(plain, "merge_adapter", "model", given, "of ordinary weights in ordinary layers", TypeError)
            given = f"one that offloads the weight of {path!r}"
            need(offloaded_for(module) is None, "merge_adapter", "model", given, "one that does not", TypeError)
    if names != known.active or not _runs(model):
        set_adapter(model, *names)
    for _, module, present in here:
        if present:
            module.merge(tuple(present))


def unmerge_adapter(model: nn.Module) -> None:
    """Put the weights of before `merge_adapter` back, bit for bit."""
    adaptation(model, "unmerge_adapter")
    for _, module in carriers(model):
        if isinstance(module, AdaptedMatrix):
            module.unmerge()


def merged_adapters(model: nn.Module) -> tuple[str, ...]:
    """The names of the adapters that are merged into weights."""
    _need_module(model, "merged_adapters")
    found = [name for _, module in carriers(model) if isinstance(module, Adapted) for name in module.merged]
    return tuple(dict.fromkeys(found))


def adapter_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """All that an adapter trains: `<module>.<parameter>` -> parameter, also of those that replace the module's own.

    Raises ValueError for a name that the model does not have, RuntimeError as `set_adapter` does.
    """
    need_adapter(model, "adapter_parameters", name)
    return dict(_named(model, name))


def _named(model, name) -> list[tuple[str, nn.Parameter]]:
    here = [(path, *own) for path, module in carriers(model) for own in _trained(module, name)]
    return [(f"{path}.{key}".removeprefix("."), parameter) for path, key, parameter in here]


def _trained(module, name) -> list[tuple[str, nn.Parameter]]:
    own = []
    if name in getattr(module, "adapters", {}):
        own += module.adapters[name].named_parameters()
    if name in getattr(module, "replaced", {}):
        own += module.replaced[name].trained(module).items()
    return own


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) elements of the model's parameters, each counted once."""
    _need_module(model, "count_parameters")
    parameters = list(model.parameters())
    return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)


def add_weighted_adapter(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float],
    name: str,
    combination_type: str = "svd",
    rank: int | None = None,
) -> None:
    """Make the adapter `name`, inactive, whose change of every weight is the weighted sum of those of LoRA adapters.

    combination_type: "svd", the best approximation of rank `rank` (default: the largest of theirs), from factors alone
    without forming a weight; "cat", exact, their ranks summed; "linear", for adapters of one rank, A and B each summed
    with sqrt(|weight * s|), A with the sign as well, as PEFT does it. Raises ValueError or TypeError naming the
    argument that does not fit.
    """
    op = "add_weighted_adapter"
    known = adaptation(model, op)
    need(not sharded(model), op, "model", f"a {type(model).__name__} that FSDP shards", "not sharded yet", TypeError)
    several = isinstance(names, Sequence) and not isinstance(names, str)
    need_value(several, op, "names", names, "a list of names", TypeError)
    need_value(len(set(names)) == len(names), op, "names", names, "distinct")
    for other in names:
        need_adapter(model, op, other)
    _need_new(known, op, name)
    _need_unmerged(model, op)
    config, parts = combine(model, known.configs, names, weights, combination_type, rank)
    for path, part in parts.items():
        attach(model, path, name, part.requires_grad_(False))
    known.configs[name], known.places[name] = config, _places(model, name)


def _runs(model) -> bool:
    """Whether any adapter runs; in a `disable_adapter` block none does."""
    return any(module.active for _, module in carriers(model))


def _detach_all(model, name):
    for path, module in carriers(model):
        detach(path, module, name)
    inject.eject(model)
    inject.set_base_layers(model, _runs(model))


def sharded(model: nn.Module) -> bool:
    """Whether torch's FSDP, 1 or 2, shards parameters of a model."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return any(kind.__module__.startswith("torch.distributed.fsdp.") for kind in kinds)


def _need_free(model, names, op):
    """Raise RuntimeError where parameters that are to change places for `names` to run have places that FSDP or
    accelerate keeps, or none."""
    _need_parameters(carriers(model), op)
    parts = [(*held, *each) for held in carriers(model) for each in getattr(held[1], "replaced", {}).items()]
    moved = {path: module for path, module, name, part in parts if part.installed != (name in names)}
    every = bool(moved) and sharded(model)
    kept = [path for path, module in moved.items() if every or offloaded_for(module) is not None]
    given = f"one that FSDP shards or accelerate offloads, with copies of parameters of {kept[:3]} to exchange"
    need(not kept, op, "model", given, "one that does not", RuntimeError)


def adaptation(model: nn.Module, op: str) -> Adaptation:
    """`model.pyfastpeft`. Raises ValueError, naming `op`, for a model that is not adapted."""
    known = getattr(model, "pyfastpeft", None)
    need(isinstance(known, Adaptation), op, "model", f"a {type(model).__name__} without adapters", "adapted")
    return known


def _need_module(model, op):
    need_value(isinstance(model, nn.Module), op, "model", model, "a torch.nn.Module", TypeError)


def need_adapter(model: nn.Module, op: str, name: str) -> Config:
    """The config of adapter `name`. Raises ValueError, listing the adapters there are, unless it is one of them;
    RuntimeError where modules that it was put into are not in the model any more, parameters that it has copies of were
    parametrized, or parameters of the model tied to its own."""
    known = adaptation(model, op)
    _need_name(known, op, name)
    plain, places = uncompiled(model), known.places[name]
    gone = [path for path, module in places.items() if _at(plain, path) is not module]
    if gone:  # or wrapped, and at other paths
        here = {*model.modules()}
        gone = [path for path in gone if places[path] not in here]
    given = f"one whose {gone[:3]} were replaced or removed after `adapt`, so that what {name!r} had there is lost"
    needed = "as `adapt` left it: change layers, as by resize_token_embeddings, before it"
    need(not gone, op, "model", given, needed, RuntimeError)
    copied = {path: module for path, module in places.items() if "replaced" in module._modules}
    _need_parameters(copied.items(), op)
    tied = _tied(model, copied.values(), name)
    given = f"one whose {tied} were tied after `adapt` to what {name!r} trains"
    need(not tied, op, "model", given, "as `adapt` left it: call tie_weights before it", RuntimeError)
    return known.configs[name]


def _at(module, path) -> nn.Module | None:
    """The module at a path, or None. Steps of a training ask for many, for which `get_submodule` is too slow."""
    for name in path.split(".") if path else ():
        if (module := module._modules.get(name)) is None:
            break
    return module


def _need_parameters(modules, op):
    """Raise RuntimeError where a parameter that an adapter replaces in one of `modules` (path, module) is none now."""
    held = [(path, module, part) for path, module in modules for part in getattr(module, "replaced", {}).values()]
    gone = [f"{path}.{key}" for path, module, part in held for key in part.names if key not in module._parameters]
    given = f"one whose {gone[:3]}, of which an adapter has copies, were parametrized after `adapt`, as by weight_norm"
    needed = "one where they are parameters again: see torch.nn.utils.parametrize.remove_parametrizations"
    need(not gone, op, "model", given, needed, RuntimeError)


def _tied(model, modules, name) -> list[str]:
    """The paths of the model's parameters that are copies which an adapter trains, but of other ones."""
    replaced = [module for module in modules if name in getattr(module, "replaced", {})]
    copies = {(module, key): p for module in replaced for key, p in module.replaced[name].trained(module).items()}
    trained, found = {*copies.values()}, []
    for path, module in inject.own_modules(model).items() if trained else ():
        places = {key: (module, key) for key in inject.own_parameters(module)}
        found += [f"{path}.{key}" for key in places if module._parameters[key] in trained and places[key] not in copies]
    return found


def parts_of(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The paths of the modules that have a part of adapter `name`, not a `Replacement`, and these parts; where modules
    have been wrapped since, the paths of before."""
    found = {path: getattr(module, "adapters", {}) for path, module in model.pyfastpeft.places[name].items()}
    return {path: parts[name] for path, parts in found.items() if name in parts}


def _places(model, name) -> dict[str, nn.Module]:
    return {path: module for path, module in carriers(model) if name in adapters_in(module)}


def _need_name(known, op, name):
    found = isinstance(name, str) and name in known.configs
    need_value(found, op, "name", name, f"one of the model's adapters: {', '.join(known.configs)}")


def _need_new(known, op, name):
    need_value(isinstance(name, str) and name and "." not in name, op, "name", name, "a non-empty string without dots")
    need_value(not hasattr(Parts(), name), op, "name", name, "a name that torch.nn.ModuleDict has no use for")
    need(name not in known.configs, op, "name", f"{name!r}, which the model has", "new, or deleted first")


def _need_unmerged(model, op):
    merged = merged_adapters(model)
    need(not merged, op, "model", f"merged with {merged}", "unmerged: call unmerge_adapter first", RuntimeError)
