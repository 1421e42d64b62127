"""Prompt tuning in a transformers model (Lester et al. 2021): trained embeddings in front of the input's.

Hooks on the model's call turn input_ids into inputs_embeds with the virtual tokens in front, extend what goes with
them (masks, positions, labels), and cut the virtual tokens off what comes back. While a cache continues, the virtual
tokens lie in it, and only the mask and the positions are extended. An encoder-decoder gets them in its encoder; its
hidden states there keep the virtual tokens, which the decoder attends to.

As in PEFT, the virtual tokens stand before any padding, a BERT's pooler sees the first virtual token, and the
classifiers on top of decoders, which then cannot see where padding is on the right, want it on the left. Unlike there,
positions that are given (which generate does) stay the real tokens' own, so that padding on the left changes nothing,
but in a model with a sliding window, which padding moves away from the virtual tokens, or with recurrent states, as
Mamba, in which it fades them.
"""

import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.adapted import Parts, uncompiled
from ..layers.prompt import PromptEmbedding
from ..ops import checks
from .tables import table
from .virtual import (
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


def inject(model: nn.Module, config, name: str, autocast_adapter_dtype: bool = True) -> None:
    """Add a prompt to a transformers model, not active yet, and fill in the sizes that `config` leaves to the model.

    In PEFT's order of draws. With config.inference_mode it is random, and no text is read, since rows are loaded.
    Raises ValueError for sizes that are not the model's; TypeError or NotImplementedError for a model without word
    embeddings or inputs_embeds.
    """
    words = _words(model)
    submodules = num_submodules(model, config)
    settle(config, token_dim=words.weight.shape[1], num_transformer_submodules=submodules)
    text = model.config.get_text_config()
    for field, given in (("num_layers", "num_hidden_layers"), ("num_attention_heads", "num_attention_heads")):
        if getattr(config, field) is None:  # PEFT reads no prompt without, and finds them in fewer models
            setattr(config, field, getattr(text, given, None) or 1)
    part = PromptEmbedding(config.num_virtual_tokens, config.token_dim, submodules)
    if config.prompt_tuning_init != "RANDOM" and not config.inference_mode:
        ids = _initial_ids(config, words, len(part.weight))
        part.load_prompt_embeddings(words(ids.to(words.weight.device)).detach().float())
    if not parts(model, PromptEmbedding):
        _attach(model)
    add_part(model, name, part, autocast_adapter_dtype)


def eject(model: nn.Module) -> None:
    """Undo what `inject` did to the model, if none of its prompts is left; else nothing."""
    if hasattr(model, "pyfastpeft_prompts") and not parts(model, PromptEmbedding):
        for handle in model.pyfastpeft_prompts.handles:
            handle.remove()
        del model.pyfastpeft_prompts


class Prompted(tuple):
    """A call's arguments without names, of which there are none, where virtual tokens were put in front: what tells the
    hook after this call, and not after those of other threads."""


class Prompts:
    """The active prompts of a model, and the hooks that put them in front of its input."""

    def __init__(self, model):
        self.model = model
        entrance = _entrance(model)
        self.names = list(inspect.signature(entrance.forward).parameters)
        self.positions = [module for module in position_modules(entrance) if isinstance(module, nn.Embedding)]
        self.handles = []
        self.called = 0  # how many calls are under way, in several threads

    def rows(self):
        """[V, d], or None where no prompt is active."""
        running = active_parts(self.model, PromptEmbedding)
        return torch.cat([part() for part in running]) if running else None

    def prepend(self, module, args, kwargs):
        """Pre-hook of the model, or of its encoder."""
        self.called += 1
        prompt = self.rows()
        if prompt is None:
            return None
        kwargs = {**kwargs, **dict(zip(self.names, args))}
        virtual = len(prompt)
        mask, (name, cache, states) = kwargs.get("attention_mask"), caches(kwargs)
        grows = not getattr(cache, "is_compileable", False)
        checks.need(grows, "prompt tuning", name, type(cache).__name__, "a cache that grows, or none")
        if mask is not None:
            plain = isinstance(mask, Tensor) and mask.dim() == 2
            checks.need_value(plain, "prompt tuning", "attention_mask", mask, "a tensor of shape [B, T]")
            kwargs["attention_mask"] = F.pad(mask, (virtual, 0), value=1)
        places = kwargs.get("cache_position")  # transformers 4's, whose caches of states cannot tell what they hold
        positions = kwargs.get("position_ids")
        inputs = kwargs.get("inputs_embeds")
        tokens = (kwargs["input_ids"] if inputs is None else inputs).shape[1]
        begins = places is not None and int(places[0]) == 0
        before = 0 if cache is None or begins else cache.get_seq_length()
        for embedding in self.positions:
            need_room("prompt tuning", embedding, tokens + max(before - virtual, 0), virtual)
        if places is not None:
            begun = not begins
            if begun:
                kwargs["cache_position"] = places + virtual
            elif states is None:  # the model counts for itself; Mamba's places are not its tokens'
                del kwargs["cache_position"]
        else:
            begun = before > 0 or (states is not None and states.has_previous_state())
        if begun:
            if before > 0:
                self.need_own_cache(name, before, virtual, tokens, mask, positions)
            if positions is not None:
                kwargs["position_ids"] = positions + virtual
            return (), kwargs
        if inputs is None:
            inputs = module.get_input_embeddings()(kwargs.pop("input_ids"))
        prompt = prompt.to(inputs).expand(inputs.shape[0], -1, -1)
        kwargs["inputs_embeds"] = torch.cat([prompt, inputs], 1)
        if positions is not None:
            start = positions.amin(-1, keepdim=True)  # PaliGemma counts from 1
            first = start + torch.arange(virtual, device=positions.device)
            kwargs["position_ids"] = torch.cat([first, positions + virtual], -1)
        if kwargs.get("token_type_ids") is not None:
            kwargs["token_type_ids"] = F.pad(kwargs["token_type_ids"], (virtual, 0))
        labels, keep, before = kwargs.get("labels"), kwargs.get("logits_to_keep"), virtual
        every = keep is None or (isinstance(keep, int) and keep in (0, tokens))
        # A forward that was set on the instance, as by TRL, may not heed it.
        heeded = "logits_to_keep" in self.names and "forward" not in module.__dict__
        if every and heeded and type(tokens) is int:
            # Of the virtual tokens only the last, which predicts the first real one, needs logits.
            before = 1 if kwargs.get("shift_labels") is None else 0
            kwargs["logits_to_keep"] = tokens + before
        if labels is not None and labels.shape == inputs.shape[:2] and not labels.is_floating_point():
            kwargs["labels"] = F.pad(labels, (before, 0), value=-100)
        for name in ("start_positions", "end_positions", "logits_to_keep"):
            if isinstance(kwargs.get(name), Tensor):
                kwargs[name] = behind(kwargs[name], virtual)
        return Prompted(()), kwargs

    def need_call(self, module, args):
        """Pre-hook of what the model, or its encoder, consists of. Raises ValueError where forward is called itself, as
        by sentence-transformers, and the virtual tokens would be left out. A backward pass may run parts again, which
        a forward pass has called before."""
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if not (self.called or again) and active_parts(self.model, PromptEmbedding):
            kind, needed = type(self.model).__name__, "called itself, for the virtual tokens to be put in front"
            checks.need(False, "prompt tuning", "model", f"a {kind} whose forward, or a part of it, is called", needed)

    def leave(self, module, args, output):
        """Hook of the model, or of its encoder, also where that raises."""
        self.called = max(self.called - 1, 0)

    def need_own_cache(self, name, before, virtual, tokens, mask, positions):
        """Raise ValueError where generate took what a cache of `before` tokens holds for text: of a text that goes on
        from it, it leaves out as many tokens as there are virtual ones, or passes some again. Positions tell only where
        their values may be looked at; some models count from 1."""
        fits, real = True, before - virtual + tokens
        if mask is not None:
            fits = mask.shape[1] == real
        elif positions is not None and checks.values_on(positions.device):
            last = int(positions.max())
            fits = last in (real - 1, real) and last + 1 != before + tokens
        given = f"one of {before} tokens, {virtual} of them virtual, that an earlier call filled"
        needed = "one that this call of generate fills itself, from the whole text"
        checks.need(fits, "prompt tuning", name, given, needed)

    def trim(self, module, args, kwargs, output):
        """Hook of the model: what comes out has one row for each real token."""
        if not isinstance(args, Prompted):
            return None
        virtual = sum([part.num_virtual_tokens for part in active_parts(self.model, PromptEmbedding)])
        tokens = kwargs["inputs_embeds"].shape[1] - virtual
        checks.need_value(not isinstance(output, tuple), "prompt tuning", "return_dict", False, "True")
        for name, value in output.items():
            per_token = {"logits": 3, "last_hidden_state": 3, "start_logits": 2, "end_logits": 2}
            if value is not None and name in per_token and value.dim() == per_token[name]:
                output[name] = value[:, -tokens:]
            elif name == "hidden_states":
                output[name] = tuple([state[:, -tokens:] for state in value])
            elif name == "attentions":
                output[name] = tuple([weights if weights is None else weights[..., -tokens:, :] for weights in value])
        return output

    def extend(self, module, args, kwargs):
        """Pre-hook of a decoder behind an encoder with a prompt: all may attend to the virtual tokens."""
        prompt, mask = self.rows(), kwargs.get("encoder_attention_mask")
        if prompt is None or mask is None:
            return None
        return args, {**kwargs, "encoder_attention_mask": F.pad(mask, (len(prompt), 0), value=1)}


def caches(kwargs):
    """The name of a cache, in transformers 5.24 and later or before; it, and what Mamba has, which counts no tokens."""
    name = "past_key_values" if kwargs.get("cache") is None else "cache"
    cache = kwargs.get(name)
    linear = getattr(cache, "is_linear", [])
    if linear and all(linear):
        return name, None, cache
    return name, cache, kwargs.get("cache_params")


def behind(positions: Tensor, virtual: int) -> Tensor:
    """Positions, or a mask of them, behind as many virtual tokens; negative positions count from the end."""
    if positions.dtype == torch.bool:
        return F.pad(positions, (virtual, 0))
    return torch.where(positions < 0, positions, positions + virtual)


def without_gaps(module, args):
    """Pre-hook of the head that forms the logits: rows with gaps between them torch multiplies batch by batch."""
    return tuple([arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args])


class NearestWord(NamedTuple):
    """One of the k vocabulary rows nearest to a virtual token by cosine; distance is Euclidean."""

    virtual_token: int
    token_id: int
    word: str
    cosine: float
    distance: float


class NearestWords(list):
    """Rows of NearestWord, k for each virtual token, nearest first, which print as a table."""

    def __str__(self):
        header = ("virtual token", "token id", "word", "cosine", "distance")
        rows = [(str(v), str(i), word, f"{cosine:.3f}", f"{far:.3f}") for v, i, word, cosine, far in self]
        return table(header, rows)


@torch.no_grad()
def nearest_words(model: nn.Module, name: str, tokenizer=None, k: int = 5) -> NearestWords:
    """The k vocabulary rows nearest to each virtual token of the prompt called `name`, by cosine.

    tokenizer: decodes the tokens; without one, words are empty. Raises ValueError for an unknown name or a bad k,
    TypeError for a tokenizer that is none.
    """
    prompts = {n: part for n, part in getattr(model, "adapters", {}).items() if isinstance(part, PromptEmbedding)}
    checks.need_value(name in list(prompts), "nearest_words", "name", name, f"a prompt: one of {sorted(prompts)}")
    decodes = tokenizer is None or hasattr(tokenizer, "decode")
    needed = "an object that decodes tokens, or None"
    checks.need_value(decodes, "nearest_words", "tokenizer", tokenizer, needed, TypeError)
    words, prompt = _words(model), prompts[name]().float()
    vocabulary = words.weight.shape[0]
    fits = checks.whole(k) and 1 <= k <= vocabulary
    checks.need_value(fits, "nearest_words", "k", k, f"an integer in [1, {vocabulary}], the size of the vocabulary")
    cosines = []
    for ids in torch.arange(vocabulary, device=prompt.device).split(8192):
        cosines.append(F.normalize(prompt, dim=1) @ F.normalize(words(ids).float(), dim=1).T)
    cosine, ids = torch.cat(cosines, 1).topk(k, 1)  # [V, k]
    distance = (words(ids).float() - prompt[:, None]).norm(dim=2)
    rows = NearestWords()
    for v, row in enumerate(zip(ids.tolist(), cosine.tolist(), distance.tolist())):
        for token, near, far in zip(*row):
            rows.append(NearestWord(v, token, tokenizer.decode([token]) if tokenizer else "", near, far))
    return rows


def _attach(model):
    prompts = Prompts(model)
    entrance = _entrance(model)
    needed = "one whose forward takes input_ids and inputs_embeds"
    takes = {"input_ids", "inputs_embeds"} <= set(prompts.names)
    checks.need(takes, "prompt tuning", "model", type(entrance).__name__, needed, NotImplementedError)
    model.pyfastpeft_prompts = prompts
    head = model.get_output_embeddings()
    if head is not None and "logits_to_keep" in prompts.names:
        prompts.handles.append(head.register_forward_pre_hook(without_gaps))
    prompts.handles.append(entrance.register_forward_pre_hook(prompts.prepend, with_kwargs=True))
    prompts.handles.append(entrance.register_forward_hook(prompts.leave, always_call=True))
    outside = model.get_input_embeddings(), entrance.get_input_embeddings(), head
    inner = [child for child in entrance.children() if child not in outside and not isinstance(child, Parts)]
    prompts.handles += [child.register_forward_pre_hook(prompts.need_call) for child in inner]
    if entrance is model:
        prompts.handles.append(model.register_forward_hook(prompts.trim, with_kwargs=True))
    else:
        prompts.handles.append(model.get_decoder().register_forward_pre_hook(prompts.extend, with_kwargs=True))


def _entrance(model):
    """The module that the virtual tokens enter."""
    return uncompiled(model.get_encoder()) if is_encoder_decoder(model) else model


def _words(model):
    need_transformers(model, "prompt tuning")
    try:
        words = uncompiled(model.get_input_embeddings()) if hasattr(model, "get_input_embeddings") else None
    except NotImplementedError:  # of audio
        words = None
    needed = "a model whose inputs are embedded words"
    checks.need(isinstance(words, nn.Embedding), "prompt tuning", "model", type(model).__name__, needed, TypeError)
    return words


def _initial_ids(config, words, count):
    """[count]: the words to start from."""
    if config.prompt_tuning_init == "SAMPLE_VOCAB":
        return torch.randint(0, words.num_embeddings, (count,))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    ids = tokenizer(config.prompt_tuning_init_text)["input_ids"]
    needed = "a text of at least one token"
    checks.need_value(len(ids) > 0, "prompt tuning", "prompt_tuning_init_text", config.prompt_tuning_init_text, needed)
    return torch.tensor((ids * math.ceil(count / len(ids)))[:count])
