"""A model that serves many adapters at once: every row, or every token, of a batch goes through its own."""

import os
import re
from collections.abc import Sequence
from contextlib import contextmanager
from uuid import uuid4

import torch
from torch import Tensor, nn

from ..layers.adapted import is_conv1d, plain_path, submodule, uncompiled
from ..layers.multi_lora import AdapterSlots, Batch, MultiLoRABranch, MultiLoRALinear, running
from ..layers.parts import AdaLoRAPart, DoRAPart, IA3Part, LoRAPart
from ..ops import Routing
from ..ops.checks import distributed, need, need_value, whole
from ..ops.dispatch import FLOATS
from ..ops.reference import accumulation
from .adapt import need_adaptable
from .checkpoint import (
    CONFIG_FILE,
    SUFFIXES,
    TENSORS_FILE,
    key_base,
    load_config,
    need_base,
    need_stored,
    some,
    unknown_tensors,
)
from .configs import AdaLoraConfig, Config, IA3Config, LoraConfig
from .files import need_file, opened
from .inject import rank_and_scaling, target_matrices
from .targets import ends, known_names, need_pattern, select

# Modules whose linear layers see [T, B, K], as `module.class`.
_TOKENS_FIRST = re.compile(
    r"transformers\.models\.((fsmt|xlnet|mask2former|oneformer)\..*|longformer\..*SelfAttention"
    r"|led\..*EncoderSelfAttention|bridgetower\..*ResidualAttention)"
)
# Models whose `generate` runs a batch twice at once, one after the other, with guidance.
_RUNS_TWICE = re.compile(r"transformers\.models\.(musicgen|musicgen_melody|dia|janus|qwen2_5_omni)\..*")


def serve(
    model: nn.Module,
    num_adapters: int,
    rank: int,
    target_modules: str | Sequence[str] | None = "all-linear",
    exclude_modules: str | Sequence[str] | None = None,
    adapter_dtype: torch.dtype | None = None,
    scales: bool = False,
) -> "Served":
    """Put `MultiLoRALinear` layers with empty slots into the places of linear layers of `model`, in place; where these
    are quantised, or compute something of their own, `MultiLoRABranch` layers around them.

    Args:
        model: a transformers model, or any module tree, without adapters. Its weights are shared, not copied; those of
            the served layers are frozen.
        num_adapters: L, the number of slots. rank: r, the largest rank that a slot can hold. Every slot takes memory
            for r (K + N) elements in each layer, whatever it holds.
        target_modules, exclude_modules: which layers, as in `LoraConfig`: all that any of the adapters has, nn.Linear,
            subclasses of it, transformers' Conv1D, and modules without children that are called some Linear and have
            in_features and out_features, as GPTQ's, AWQ's and HQQ's. "all-linear" leaves out the head.
        adapter_dtype: of the adapters. Default: that of each layer's weight, or, where that holds no floats, of the
            first parameter of the model that does; `adapt` and PEFT have float32 for 16-bit ones.
        scales: whether slots hold DoRA and IA3 adapters, too, in batches of any kinds. Every slot then takes memory for
            K + N, with a bias K + 2 N, numbers of the dtype of sums more in each layer, and every batch a pass over the
            layer's input and output.

    Returns the handle by which adapters are loaded and batches told of them. Raises ValueError or TypeError naming what
    does not fit, with close names where a target is misspelt; the model is then as it was.
    """
    op = "serve"
    need_adaptable(model, op)
    plain = uncompiled(model)
    adapted = hasattr(plain, "pyfastpeft") or any(isinstance(module, AdapterSlots) for module in plain.modules())
    needed = "a plain one, as unload() and remove() leave it"
    need(not adapted, op, "model", "one that is adapted or served already", needed)
    config = LoraConfig(target_modules=target_modules, exclude_modules=exclude_modules)
    found = target_matrices(plain, config, lambda family: ends(family.query, family.value), _foreign)
    linears = {path: submodule(plain, path) for path in found}
    for path, linear in linears.items():
        why = _unfit(plain, path, linear)
        needed = "of linear and Conv1D layers in a batch's order; name others in exclude_modules"
        need(not why, op, "target_modules", f"meaning {path!r}, {why}", needed, TypeError)
    flags = {parameter: parameter.requires_grad for linear in linears.values() for parameter in linear.parameters()}
    try:
        options = num_adapters, rank, adapter_dtype, scales
        layers = {path: _with_slots(plain, linear, *options) for path, linear in linears.items()}
    except BaseException:
        _set_flags(flags)
        raise
    return Served(plain, linears, layers, flags)


def _foreign(module) -> bool:
    """Whether a module is a linear layer of a kind of its own, as quantised ones are in other libraries."""
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return "Linear" in type(module).__name__ and all(map(whole, sizes)) and not any(module.children())


def _plain(linear) -> bool:
    """Whether a layer is nothing but the product by an ordinary weight of floats, which the kernels read."""
    ordinary = type(linear) is nn.Linear or is_conv1d(type(linear))
    return ordinary and type(linear.weight) is nn.Parameter and linear.weight.dtype in FLOATS


def _with_slots(model, linear, num_adapters, rank, dtype, scales) -> AdapterSlots:
    options = {"empty": True, "scales": scales}
    if _plain(linear):
        return MultiLoRALinear.from_linear(linear, num_adapters, rank, adapter_dtype=dtype, **options)
    tensors = getattr(linear, "weight", None), *model.parameters()
    floats = (tensor.dtype for tensor in tensors if isinstance(tensor, Tensor) and tensor.dtype in FLOATS)
    return MultiLoRABranch(linear, num_adapters, rank, dtype=dtype or next(floats, None), **options)


def _unfit(model, path, linear) -> str:
    """Why no layer with slots can take the place of a layer, or ""."""
    parent = submodule(model, path.rpartition(".")[0])
    owners = [type(submodule(model, path[: hit.start()])) for hit in re.finditer(r"^|\.", path)]
    hooks = linear._forward_pre_hooks or linear._forward_hooks or linear._backward_hooks or linear._backward_pre_hooks
    if linear is model:
        return "the model itself, for which there is MultiLoRALinear.from_linear"
    if model.get_submodule(path) is not linear:
        return "which torch.compile wraps by itself"
    if not (isinstance(linear, nn.Linear) or is_conv1d(type(linear)) or _foreign(linear)):
        return f"a {type(linear).__name__}"
    for tensor in (*linear.parameters(), *linear.buffers()):
        if tensor.is_meta or distributed(tensor):
            return f"which holds a {type(tensor).__name__} of {tensor.dtype} on {tensor.device}"
    if hooks or "forward" in linear.__dict__:
        return "which has hooks or a forward of its own"
    if isinstance(parent, nn.TransformerEncoderLayer):
        return "whose weight torch's nn.TransformerEncoderLayer reads instead of calling it"
    decoder = isinstance(parent, nn.TransformerDecoderLayer) and not parent.self_attn.batch_first
    if decoder or any(_TOKENS_FIRST.fullmatch(f"{kind.__module__}.{kind.__name__}") for kind in owners):
        return "which sees tokens, not the rows of a batch, in its first dimension"
    if any(_RUNS_TWICE.fullmatch(kind.__module__) for kind in owners):
        return "of a model whose generate, with guidance, has all rows of a batch a second time after all of them"
    if ".experts." in f".{path}.":
        return "an expert, which sees tokens in an order of its own"
    return ""


def _set_flags(flags):
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)


def _swap(model, others):
    """Replace modules of `model`, wherever they are, by those of a table."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            parent._modules[name] = others.get(child, child)


class Served:
    """What `serve` returns: the handle of a served model.

    Attributes: model; layers, path -> MultiLoRALinear or MultiLoRABranch; num_adapters; rank; loaded, slot -> the
    directory of the adapter that it holds. Outside of `slots` blocks the model computes what it did before. Its state
    dict holds the slots, too, the weights of Conv1D layers as [N, K] and quantised ones under base_layer: `remove`
    before saving it.
    """

    def __init__(self, model, linears, layers, flags):
        self.model, self.layers, self.loaded = model, layers, {}
        first = next(iter(layers.values()))
        self.num_adapters, self.rank = first.num_adapters, first.rank
        self._linears, self._flags, self._key = linears, flags, uuid4().hex
        for layer in layers.values():
            layer.requires_grad_(False)
            layer.served = self._key
        _swap(model, {linears[path]: layer for path, layer in layers.items()})

    @contextmanager
    def slots(self, slots: Sequence[int] | Tensor | Routing):
        """In which the model runs a batch, `with served.slots(…): model.generate(…)`, through the adapters in `slots`.

        slots [S]: integers in [-1, num_adapters), -1 for the base alone: one for each row of the batch (layers see
        [B, …, K]; also B = n S, where `generate` makes n beams or sequences of each row), or one for each token of a
        packed batch [T, K] or [1, T, K]; or the `Routing` of tokens that `ops.route` made of them. One on the model's
        device is not copied: the next call, or replay of a captured CUDA graph, sees what was written into its tensors.
        Every served layer has to see rows or tokens in that order, rows first: exclude an encoder of images where rows
        differ in theirs.

        A block holds for its thread alone, so threads may run different batches at once, also of a compiled model; for
        the threads that nn.DataParallel starts it does not hold. Of nested blocks the inner one counts. Raises
        ValueError or TypeError for slots that are none, and, from the layers, where they do not fit the batch.
        """
        self._need_served("slots")
        device = next(iter(self.layers.values())).lora_A.device
        with running(self._key, Batch(slots, self.num_adapters, device)):
            yield

    def load_adapter(self, slot: int, directory: str | os.PathLike, check_base_model: bool = True) -> None:
        """Put the LoRA, rsLoRA, AdaLoRA or DyLoRA adapter that PEFT or `save_adapter` wrote to `directory` into a slot,
        with scales=True also DoRA or IA3; what the slot held is gone. Other threads may run batches with other slots
        meanwhile. DoRA's norms are formed here: load it anew where the base's weights have changed.

        check_base_model: as in `pyfastpeft.load_adapter`. Raises FileNotFoundError or NotADirectoryError for missing
        files and ValueError or TypeError, naming the file and the key or field, for what does not fit: biases,
        modules_to_save, tensors of layers that are not served, ranks above `rank`, DoRA on a quantised layer; the slot
        is then as it was.
        """
        self._need_slot("load_adapter", slot)
        given = self._read(directory, check_base_model)
        for path, layer in self.layers.items():
            if path not in given:
                layer.unload(slot)
            elif "ia3_l" in given[path]:
                layer.load_ia3(slot, **given[path])
            else:
                layer.load_adapter(slot, **given[path])
        self.loaded[slot] = os.fspath(directory)

    def unload(self, slot: int) -> None:
        """Empty a slot: its rows get the base alone. Raises ValueError for a slot that is none, RuntimeError while a
        layer is merged."""
        self._need_slot("unload", slot)
        for layer in self.layers.values():
            layer.unload(slot)
        self.loaded.pop(slot, None)

    def remove(self) -> nn.Module:
        """The plain model again, with the modules and parameters of before. Nothing can be loaded any more."""
        self._need_served("remove")
        _set_flags(self._flags)
        for path, layer in self.layers.items():
            linear = self._linears[path]
            if isinstance(layer, MultiLoRABranch):
                continue
            if layer.merged:
                layer.unmerge()
            # They share memory, unless the model was moved or cast meanwhile.
            if layer.weight.is_meta:
                linear.to("meta")  # where torch makes new parameters
            linear.weight.data = layer.weight.data.T if is_conv1d(type(linear)) else layer.weight.data
            if linear.bias is not None:
                linear.bias.data = layer.bias.data
            linear.train(layer.training)
        _swap(self.model, {layer: self._linears[path] for path, layer in self.layers.items()})
        self.layers, self.loaded = {}, {}
        return self.model

    def _read(self, directory, check_base_model) -> dict[str, dict]:
        """path -> what the layer there is to load of the adapter in `directory`, all checked."""
        op, config = "load_adapter", load_config(directory)
        empty = [path for path, layer in self.layers.items() if layer.lora_A.is_meta]
        need(not empty, op, "model", f"without memory for {some(empty)}, on the meta device", "one that has values")
        suffixes = self._suffixes(op, config)
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in getattr(config, field, None) or ():
                need_pattern(op, field, pattern)
        if check_base_model:
            need_base(self.model, config)
        source, path_of = need_file(directory, TENSORS_FILE), {layer: path for path, layer in self.layers.items()}
        every = self.model.named_modules(remove_duplicate=False)
        modules = {plain_path(path): module for path, module in every}
        keys = {
            path: {own: f"{key_base(config)}{path}.{suffix}" for own, suffix in suffixes.items()}
            for path, layer in modules.items()
            if layer in path_of
        }
        with opened(source) as file:
            given = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
            stray = given.keys() - {key for path in keys for key in keys[path].values()}
            stray = unknown_tensors(self.model, config, file, stray)
            needed = "without those, or one for which serve() was told of their layers in target_modules"
            need(not stray, op, str(source), f"holding {some(stray)}, for which there are no slots", needed)
            held = {path_of[modules[path]]: keys[path] for path in keys if given.keys() & {*keys[path].values()}}
            held = {path: keys[path] for path in _meant(config, list(modules)) if path in self.layers} | held
            missing = {key for path in held for key in held[path].values()} - given.keys()
            needed = f"a file with all tensors of the {config.peft_type} adapter that {CONFIG_FILE} tells of"
            need(not missing, op, str(source), f"without {some(missing)}", needed)

            def read(path, shapes):
                for own, key in held[path].items():
                    need_stored(source, key, given[key], shapes[own])
                stored = {own: file.get_tensor(key) for own, key in held[path].items()}
                return {own: tensor.to(accumulation(tensor.dtype)) for own, tensor in stored.items()}

            def shape_of(path, own):
                return tuple(given[held[path][own]].get_shape())

            if isinstance(config, IA3Config):
                return self._ia3(list(held), shape_of, read)
            return self._low_rank(config, list(held), read, source)

    def _suffixes(self, op, config) -> dict[str, str]:
        """A tensor's own name -> the end of its key in a file of such an adapter, if it can be served."""
        known = isinstance(config, (LoraConfig, IA3Config))
        needed = "of LORA, ADALORA, DYLORA or IA3, to be served"
        need(known, op, CONFIG_FILE, f"of peft_type {config.peft_type!r}", needed)
        for field in ("bias", "modules_to_save"):
            value = getattr(config, field, None)
            needed = "unset: of an adapter, what it does to single linear layers is served"
            need_value(not value or value == "none", op, f"{field} of {CONFIG_FILE}", value, needed)
        scales, dora = next(iter(self.layers.values())).scales, getattr(config, "use_dora", False)
        needed = "unset, or the model served with scales=True"
        need_value(scales or not dora, op, f"use_dora of {CONFIG_FILE}", dora, needed)
        ia3, needed = isinstance(config, IA3Config), "of LoRA, or the model served with scales=True"
        need(scales or not ia3, op, CONFIG_FILE, f"of peft_type {config.peft_type!r}", needed)
        allocated = isinstance(config, AdaLoraConfig)
        return SUFFIXES[IA3Part if ia3 else AdaLoRAPart if allocated else DoRAPart if dora else LoRAPart]

    def _ia3(self, paths, shape_of, read):
        given = {}
        for path in paths:
            layer = self.layers[path]
            inner, outer = (1, layer.in_features), (layer.out_features, 1)
            feedforward = shape_of(path, "ia3_l") == inner  # which tells it whatever the config names
            ia3_l = read(path, {"ia3_l": inner if feedforward else outer})["ia3_l"].flatten()
            given[path] = {"ia3_l": ia3_l, "feedforward": feedforward}
        return given

    def _low_rank(self, config, paths, read, source):
        given, allocated = {}, isinstance(config, AdaLoraConfig)
        for path in paths:
            r, scaling = _allocated(path, config) if allocated else rank_and_scaling(path, config)[::2]
            needed = f"of ranks up to {self.rank}, that of serve()"
            need(r <= self.rank, "load_adapter", str(source), f"of rank {r} in {path!r}", needed)
            layer = self.layers[path]
            k, n = layer.in_features, layer.out_features
            tensors = read(path, {"lora_A": (r, k), "lora_B": (n, r), "lora_E": (r, 1), "magnitude": (n,)})
            fits = "magnitude" not in tensors or layer.norm_is_known
            told = f"of DoRA in {path!r}, a quantised layer or one of its own kind"
            need(fits, "load_adapter", str(source), told, "of other layers: the norm of this one is not known")
            if r:  # AdaLoRA may leave a layer none
                lora_A = tensors.pop("lora_A") * tensors.pop("lora_E", 1)
                given[path] = tensors | {"lora_A": lora_A, "scaling": scaling}
        return given

    def _need_served(self, op):
        need(bool(self.layers), op, "the model", "plain again, by remove()", "served", RuntimeError)

    def _need_slot(self, op, slot):
        self._need_served(op)
        fits = whole(slot) and 0 <= slot < self.num_adapters
        need_value(fits, op, "slot", slot, f"an integer in [0, {self.num_adapters})")
        merged = [path for path, layer in self.layers.items() if layer.merged]
        need(not merged, op, "model", f"one whose {merged[:3]} are merged", "unmerged", RuntimeError)


def _allocated(path, config) -> tuple[int, float]:
    """The rank and scaling of AdaLoRA in a layer, as in `AdaLoRAPart`."""
    mask = (config.rank_pattern or {}).get(f"{path}.lora_E")
    return config.init_r if mask is None else sum(mask), config.lora_alpha / (config.init_r + 1e-5)


def _meant(config: Config, paths) -> list[str]:
    """Those of `paths`, of modules of any kind, that a stored config means."""
    if config.target_modules in (None, "all-linear"):
        return []
    names = [config.target_modules, config.exclude_modules]
    known = [given if isinstance(given, str) or not given else known_names(given, paths) for given in names]
    options = known[1], config.layers_to_transform, config.layers_pattern
    return select("load_adapter", "target_modules", paths, known[0] or names[0], *options)
