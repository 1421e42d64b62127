"""Prefix tuning in a transformers model (Li and Liang 2021), at the attention call.

Every self-attention module of transformers calls the function that its config names. Here each of them gets a stand-in
for its config, which names `prefixed_attention`: the prefix's rows go in front of the keys and values, and the call
goes on to the function that the model's own config names. The model's config, its masks and its cache know nothing of
it, so that cached and uncached generation, padding, beams and checkpointing are what they were.

The rows take the first V positions, as PEFT's do, which puts them into the cache: the real tokens' positions and T5's
distances are shifted by V where they are used, and a sliding window moves away from the rows as from any token. It does
so by position, so that padding on the left changes nothing. The frames of audio and the patches of images stay where
they are. In an encoder-decoder the decoder gets the prefix; where it generates, with PEFT's order of rows, which leaves
those of every other layer unused if the number of layers is even; there DistributedDataParallel wants
find_unused_parameters=True.
"""

import inspect
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.prefix import PrefixEncoder
from ..ops import checks
from .virtual import (
    POSITIONS,
    active_parts,
    add_part,
    is_encoder_decoder,
    need_room,
    need_transformers,
    num_submodules,
    parts,
    position_modules,
    settle,
)

ATTENTION = "pyfastpeft_prefix"
PASTS = "past_key_values_length", "cache_length"  # before transformers 5.24, and since


def inject(model: nn.Module, config, name: str, autocast_adapter_dtype: bool = True) -> None:
    """Add a prefix to a transformers model, not active yet, and fill in the sizes that `config` leaves to the model.

    In PEFT's order of draws. With config.inference_mode there is no MLP, since rows are loaded.
    Raises ValueError for sizes that are not the model's; NotImplementedError, which says what is missing, for a model
    that takes no prefix; TypeError for one that is not of transformers.
    """
    attentions = _attentions(model)
    base = attentions[0].config
    latent, needed = getattr(base, "kv_lora_rank", None), "one whose keys and values are projected from its states"
    given = f"a {type(model).__name__} with latent keys and values (kv_lora_rank {latent})"
    checks.need(latent is None, "prefix tuning", "model", given, needed, NotImplementedError)
    heads = _count(model, base, "num_key_value_heads", "decoder_attention_heads", "num_attention_heads")
    given, needed = f"a {type(model).__name__} with {heads} heads", "one whose layers have the same number of heads"
    checks.need(isinstance(heads, int), "prefix tuning", "model", given, needed, NotImplementedError)
    head_dim = getattr(base, "head_dim", None) or getattr(base, "d_kv", None)
    head_dim = head_dim or getattr(attentions[0], "attention_head_size", None)  # MobileBERT's is narrower than the rest
    head_dim = head_dim or base.hidden_size // _count(model, base, "decoder_attention_heads", "num_attention_heads")
    layers, submodules = len(attentions), num_submodules(model, config)
    if is_encoder_decoder(model) and checks.whole(config.num_layers) and config.num_layers > layers:
        layers = config.num_layers  # PEFT counts the encoder's, of which a BART may have more
    sizes = {"num_layers": layers, "num_attention_heads": heads, "token_dim": heads * head_dim}
    settle(config, num_transformer_submodules=submodules, **sizes)
    config.encoder_hidden_size = config.encoder_hidden_size or config.token_dim
    hidden = config.encoder_hidden_size if config.prefix_projection and not config.inference_mode else None
    encoder = PrefixEncoder(config.num_virtual_tokens, layers, heads, head_dim, hidden, config.init_weights, submodules)
    if not parts(model, PrefixEncoder):
        _attach(model, attentions)
    add_part(model, name, encoder, autocast_adapter_dtype)


def eject(model: nn.Module) -> None:
    """Undo what `inject` did to the model, if none of its prefixes is left; else nothing."""
    if parts(model, PrefixEncoder):
        return
    for module in model.modules():
        if isinstance(getattr(module, "config", None), PrefixedConfig):
            module.config.prefixes.detach()
            module.config = module.config.config
            module.__dict__.pop("compute_bias", None)


class Prefixes:
    """The active prefixes of a model, and the hooks that shift positions."""

    def __init__(self, model):
        self.model = model
        self.handles = []

    def encoders(self):
        return active_parts(self.model, PrefixEncoder)

    def num_virtual_tokens(self):
        return sum([encoder.num_virtual_tokens for encoder in self.encoders()])

    def shift(self, module, args, kwargs):
        """Pre-hook of a module that embeds positions. Those of padding stay, if the module marks them."""
        virtual = self.num_virtual_tokens()
        if not virtual:
            return None
        integer = [i for i, value in enumerate(args) if isinstance(value, Tensor) and not value.is_floating_point()]
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[integer[0]]
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding):
            need_room("prefix tuning", module, positions.shape[-1], virtual)
        shifted = torch.where(positions > (-1 if padding is None else padding), positions + virtual, positions)
        if "position_ids" in kwargs:
            return args, {**kwargs, "position_ids": shifted}
        return (*args[: integer[0]], shifted, *args[integer[0] + 1 :]), kwargs

    def shift_past(self, past, place, module, args, kwargs):
        """Pre-hook of a module that counts positions itself, from its argument `past`, what a cache holds."""
        virtual = self.num_virtual_tokens()
        if not virtual:
            return None
        if place < len(args):
            return (*args[:place], args[place] + virtual, *args[place + 1 :]), kwargs
        return args, {**kwargs, past: kwargs.get(past, 0) + virtual}

    def detach(self):
        for handle in self.handles:
            handle.remove()
        self.handles = []


class PrefixedConfig:
    """What one attention module has for a config: the model's config, but for the attention function's name."""

    _attn_implementation = ATTENTION

    def __init__(self, config, prefixes, layer, eager):
        self.config, self.prefixes, self.layer, self.eager = config, prefixes, layer, eager

    def __getattr__(self, name):
        if name == "config" or name.startswith("__"):  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.config, name)

    def __setstate__(self, state):  # which another process may read
        _register()
        self.__dict__.update(state)


class OwnConfig:
    """An attention module with its own config, as the attention functions know it."""

    def __init__(self, module, config):
        self.module, self.config = module, config

    def __getattr__(self, name):
        return getattr(self.module, name)


def shifted_bias(attention, query_length, key_length, device=None, past_seen_tokens=0):
    """`compute_bias` of T5's first self-attention, which forms every layer's bias: V more keys come first."""
    virtual = attention.config.prefixes.num_virtual_tokens()
    compute = type(attention).compute_bias
    return compute(attention, query_length, key_length + virtual, device, past_seen_tokens + virtual)


def prefixed_attention(module, query, key, value, attention_mask, **kwargs):
    """The attention function that the model's config names, with the active prefixes before key and value.

    query [B, Hq, T, D]; key and value [B, H, K, D]; attention_mask [B, 1, T, K], [B, K] or None.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    view = module.config
    implementation = view.config._attn_implementation
    attention = view.eager if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
    rows = [encoder(view.layer) for encoder in view.prefixes.encoders()]
    if rows:
        known = attention_mask is None or isinstance(attention_mask, Tensor)
        known = known and kwargs.get("cache") is None
        needed = "eager, sdpa or flash attention without pages"
        checks.need_value(known, "prefix tuning", "attn_implementation", implementation, needed, NotImplementedError)
        shapes = [(keys.shape[::2], values.shape[::2]) for keys, values in rows]
        here = key.shape[1::2], value.shape[1::2]
        given = f"one whose keys and values are of {[list(shape) for shape in here]} heads and numbers a head"
        needed = f"one where they are of {[list(shape) for shape in shapes[0]]}, as its config says"
        checks.need({*shapes} == {here}, "prefix tuning", "model", given, needed, NotImplementedError)
        virtual = sum([keys.shape[1] for keys, _ in rows])
        attention_mask = prefixed_mask(module, query, key, attention_mask, virtual, implementation, kwargs)
        if attention_mask is not None and attention_mask.dim() == 4 and "is_causal" in kwargs:
            kwargs["is_causal"] = False  # the mask says so; GPT-2 passes both in transformers 4
        batch = key.shape[0]
        key = torch.cat([*(keys.to(key).expand(batch, -1, -1, -1) for keys, _ in rows), key], 2)
        value = torch.cat([*(values.to(value).expand(batch, -1, -1, -1) for _, values in rows), value], 2)
    return attention(OwnConfig(module, view.config), query, key, value, attention_mask, **kwargs)


def prefixed_mask(module, query, key, mask, virtual, implementation, kwargs):
    """The mask with columns for the virtual tokens in front, which all see but those that a sliding window has left."""
    if (mask is not None and mask.dim() == 2) or "flash" in implementation:  # flash attention knows the rest itself
        return mask if mask is None else F.pad(mask, (virtual, 0), value=1)
    tokens, keys = query.shape[2], key.shape[2]
    window = kwargs.get("sliding_window")
    if mask is None:
        causal = kwargs.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        causal = causal and tokens > 1 and implementation == "sdpa"
        if not causal and window is None:
            return None
        mask = torch.ones(1, 1, tokens, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril() if causal else mask
    mask = mask[..., :keys]
    if window is None:
        return F.pad(mask, (virtual, 0), value=mask.dtype == torch.bool)
    positions = kwargs.get("position_ids")
    needed = "passed on to a sliding attention, which the virtual tokens leave"
    checks.need(positions is not None, "prefix tuning", "position_ids", "not there", needed, NotImplementedError)
    positions = positions + virtual  # [B or 1, T]
    seen = positions[:, None, :, None] - torch.arange(virtual, device=query.device) < window
    if mask.dtype != torch.bool:
        seen = torch.zeros_like(seen, dtype=mask.dtype).masked_fill_(~seen, torch.finfo(mask.dtype).min)
    batch = max(mask.shape[0], seen.shape[0])
    return torch.cat([seen.expand(batch, mask.shape[1], -1, -1), mask.expand(batch, -1, tokens, -1)], -1)


def _register():
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, prefixed_attention)


def _attach(model, attentions):
    _register()
    prefixes = Prefixes(model)
    for layer, module in enumerate(attentions):
        eager = _forward(module).__globals__["eager_attention_forward"]
        module.config = PrefixedConfig(module.config, prefixes, layer, eager)
        if getattr(module, "has_relative_attention_bias", False):
            module.compute_bias = partial(shifted_bias, module)
    for module in position_modules(_stack(model)) if _reads_tokens(_stack(model)) else ():
        names, hook = list(inspect.signature(module.forward).parameters), prefixes.shift
        past = next((name for name in PASTS if name in names), None)
        if past and "position_ids" not in names:
            hook = partial(prefixes.shift_past, past, names.index(past))
        prefixes.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))


def _stack(model):
    """What gets the prefix: of an encoder-decoder, the decoder."""
    return model.get_decoder() if is_encoder_decoder(model) else model


def _count(model, config, *names):
    """The first of these numbers that the config of what gets the prefix has. BART counts its encoder's by the usual
    name; an encoder alone, as of Whisper, may have its decoder's in its config, too."""
    alone = model.config.is_encoder_decoder and not is_encoder_decoder(model)
    counts = [getattr(config, name, None) for name in names if not (alone and name.startswith("decoder_"))]
    return next(filter(None, counts), None)


def _reads_tokens(stack):
    """Whether what goes in are tokens, not images or audio."""
    return getattr(stack, "main_input_name", "input_ids") == "input_ids"


def _attentions(model):
    """The self-attention modules that get a prefix, one for each layer: of an encoder-decoder, the decoder's."""
    need_transformers(model, "prefix tuning")
    config = model.config
    kind = f"{type(model).__name__} (model_type {config.model_type!r})"
    stack, found = _stack(model), []
    for path, module in stack.named_modules():
        named = path.endswith(("EncDecAttention", "encoder_attn", "cross_attention"))
        cross = named or "Cross" in type(module).__name__ or getattr(module, "is_cross_attention", False)
        if _forward(module) is not None and hasattr(module, "config") and not cross:
            found.append(module)
    layers = _count(model, stack.config, "decoder_layers", "num_hidden_layers")
    given = f"{kind}, in which {len(found)} self-attention modules use transformers' attention interface"
    needed = f"a model of one stack, in which {'all' if layers is None else f'all {layers}'} layers do"
    checks.need(found and len(found) == layers, "prefix tuning", "model", given, needed, NotImplementedError)
    relative = hasattr(found[0], "has_relative_attention_bias")
    placed = relative or position_modules(stack) or not _reads_tokens(stack)
    needed = f"a model whose tokens' positions are found: modules called {', '.join(POSITIONS)}, or T5's bias"
    checks.need(placed, "prefix tuning", "model", kind, needed, NotImplementedError)
    upcast = getattr(found[0], "reorder_and_upcast_attn", False) and config._attn_implementation == "eager"
    needed = "without reorder_and_upcast_attn, whose attention cannot be extended"
    checks.need(not upcast, "prefix tuning", "model", kind, needed, NotImplementedError)
    return found


def _forward(module):
    """The `forward`, of the module's class or one that it derives from, that calls transformers' interface; or None."""
    for kind in type(module).__mro__:
        forward = inspect.unwrap(vars(kind).get("forward"))
        if "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            return forward
    return None
