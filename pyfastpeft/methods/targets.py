"""Which modules of a model a config means: by architecture, by name, by pattern."""

import re
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from typing import NamedTuple

from torch import nn

from ..ops.checks import need, need_value


class Family(NamedTuple):
    """How one architecture names the linear layers of a block: ends of module paths, as regular expressions."""

    query: str
    key: str
    value: str
    attention_out: str  # the layer whose output the attention sub-layer returns
    feedforward_in: str  # the first layer that sees the feed-forward sub-layer's input
    feedforward_out: str  # the layer whose output that sub-layer returns
    feedforward: str | None = None  # that sub-layer, where it is a module of its own
    experts: bool = False  # whether that sub-layer may be a mixture of experts, whose weights are no linear layers


_LLAMA = Family("q_proj", "k_proj", "v_proj", "o_proj", r"mlp\.gate_proj", r"mlp\.down_proj", "mlp")
_MIXTURE = _LLAMA._replace(feedforward_out=r"(mlp|shared_expert)\.down_proj", experts=True)
_LLAMA4 = _MIXTURE._replace(
    feedforward_in=r"feed_forward\.gate_proj", feedforward_out=r"(feed_forward|shared_expert)\.down_proj"
)
# The encoders of images in these have layers of the same names.
_LANGUAGE_MODEL = Family(*(rf"language_model\.(.*\.)?{name}" for name in _LLAMA[:7]))
_QWEN3_5 = Family(  # linear attention in most layers
    *(rf"{name}|linear_attn\.in_proj_qkv" for name in _LLAMA[:3]), r"o_proj|linear_attn\.out_proj", *_LLAMA[4:]
)
_BERT = Family(
    "query", "key", "value", r"attention\.output\.dense", r"intermediate\.dense", r"layer\.\d+\.output\.dense"
)
_BART = Family("q_proj", "k_proj", "v_proj", r"(self_attn|encoder_attn)\.out_proj", "fc1", "fc2")
_T5 = Family(
    *(rf"(SelfAttention|EncDecAttention)\.{name}" for name in "qkvo"),
    r"DenseReluDense\.wi(_0)?",
    "wo",
    "DenseReluDense",
)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "gemma4_text"), _LLAMA),
    **dict.fromkeys(("gemma3", "gemma4"), _LANGUAGE_MODEL),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe"), _MIXTURE),
    **dict.fromkeys(("llama4", "llama4_text"), _LLAMA4),
    **dict.fromkeys(("qwen3_5", "qwen3_5_text"), _QWEN3_5),
    "gpt2": Family(*["c_attn"] * 3, r"attn\.c_proj", r"mlp\.c_fc", r"mlp\.c_proj", "mlp"),
    **dict.fromkeys(("opt", "bart", "mbart", "pegasus", "marian", "m2m_100", "whisper"), _BART),
    "gpt_neox": Family(*["query_key_value"] * 3, r"attention\.dense", "dense_h_to_4h", "dense_4h_to_h", "mlp"),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra"), _BERT),
    "distilbert": Family("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2", "ffn"),
    **dict.fromkeys(("t5", "mt5", "umt5"), _T5),
    # The second of each pair is what older versions of transformers call it.
    "vit": Family(
        r"attention\.q_proj|attention\.query",
        r"attention\.k_proj|attention\.key",
        r"attention\.v_proj|attention\.value",
        r"attention\.o_proj|attention\.output\.dense",
        r"mlp\.fc1|intermediate\.dense",
        r"mlp\.fc2|layer\.\d+\.output\.dense",
        "mlp",
    ),
}


def known_family(model: nn.Module) -> Family | None:
    """The family of a transformers model; None where it is unknown."""
    return FAMILIES.get(_kind(model))


def family(model: nn.Module, op: str) -> Family:
    """The family of a transformers model. Raises ValueError, asking for target_modules, where it is unknown."""
    kind = _kind(model)
    given = f"None for a model of type {kind or type(model).__name__}"
    need(kind in FAMILIES, op, "target_modules", given, f"given, except for {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def _kind(model):
    return getattr(getattr(model, "config", None), "model_type", None)


def ends(*patterns: str) -> str:
    """A regular expression for module paths that end in one of these."""
    return rf"(.*\.)?({'|'.join(dict.fromkeys(patterns))})"


def matches(path: str, target: str | Iterable[str]) -> bool:
    """Whether a path is meant: by a regular expression for all of it, or by one of several names, whole or its end."""
    if isinstance(target, str):
        return re.fullmatch(target, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in target)


def any_of(paths: Iterable[str], name: str) -> bool:
    """Whether a name means one of these paths."""
    return any(matches(path, [name]) for path in paths)


def known_names(names: Iterable[str], paths: Collection[str]) -> list[str]:
    """Those of `names` that mean some of these paths."""
    return [name for name in names if any_of(paths, name)]


def select(
    op: str,
    argument: str,
    candidates: Sequence[str],
    target: str | Sequence[str],
    exclude: str | Sequence[str] | None = None,
    layers: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
) -> list[str]:
    """Those of `candidates`, module or parameter paths, that `target` and `layers` mean.

    Raises ValueError, listing close names, if nothing is left, or if a name in a list means nothing.
    """
    for given, meant in ((argument, target), ("exclude_modules", exclude or ())):
        if isinstance(meant, str):
            need_pattern(op, given, meant)
            continue
        for name in meant:
            if not any_of(candidates, name):
                need(False, op, given, f"holding {name!r}, which means nothing", close_names(name, candidates))
    found = [path for path in candidates if matches(path, target) and not (exclude and matches(path, exclude))]
    if not found:
        name = target if isinstance(target, str) else " ".join(target)
        given = (
            f"{target!r} without {exclude!r}, which leaves nothing" if exclude else f"{target!r}, which means nothing"
        )
        whole = isinstance(target, str) and any_of(candidates, target)
        needed = f"a list, as [{target!r}], if it is a name, or a regular expression for whole paths"
        need(False, op, argument, given, needed if whole else close_names(name, candidates))
    chosen = [] if layers is None else [layers] if isinstance(layers, int) else list(layers)
    if not chosen:  # PEFT writes either
        return found
    named = () if isinstance(target, str) else tuple(target)
    return _in_layers(op, found, candidates, named, chosen, layers_pattern)


def _in_layers(op, found, candidates, named, layers, pattern):
    names = [pattern] if isinstance(pattern, str) else pattern or []
    for name in names:
        need_pattern(op, "layers_pattern", name)
    number = rf"(?:.*\.)?(?:{'|'.join(names)})\.(\d+)\." if names else r"(?:|.*?\.)(\d+)\."
    index = {path: int(hit.group(1)) for path in candidates if (hit := re.match(number, path))}
    need_value(bool(index), op, "layers_pattern", pattern, "the name of a list of layers in the model")
    count = 1 + max(index.values())
    for layer in layers:
        needed = f"of integers in [{-count}, {count})"
        need(-count <= layer < count, op, "layers_to_transform", f"holding {layer}", needed)
    wanted = {layer % count for layer in layers}
    kept = [path for path in found if index.get(path) in wanted or path in named]
    needed = f"layers that hold targets; those are {sorted({*index.values()})}"
    need(bool(kept), op, "layers_to_transform", layers, needed)
    return kept


def need_pattern(op: str, argument: str, pattern: str) -> None:
    """Raise ValueError unless `pattern` is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        need(False, op, argument, f"{pattern!r} ({error})", "a regular expression")


def close_names(name: str, candidates: Sequence[str]) -> str:
    """For an error: which names are possible instead of `name`: those of `candidates`, module or parameter paths, that
    are spelt alike, or else what there is."""
    ends = {".".join(path.split(".")[-n:]) for path in candidates for n in (1, 2, 99)}
    close = get_close_matches(name, ends, n=5, cutoff=0.5)
    short = sorted({path.rsplit(".", 1)[-1] for path in candidates})
    return f"the name of something in the model: close to it are {close}" if close else f"among {short[:40]}"
