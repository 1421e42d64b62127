"""One config for each method. Fields that PEFT has, too, have its names, meanings and defaults."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from ..ops.checks import need, need_value
from ..ops.reference import ACTIVATIONS

TASK_TYPES = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
# Fields that hold names or a regular expression.
_NAMES = {"target_modules", "exclude_modules", "layers_pattern", "feedforward_modules", "target_parameters"}


@dataclass(kw_only=True)
class Config:
    """What all methods share.

    modules_to_save: names of modules (a classification head), or ends of names, of which the adapter trains and stores
        its own copy; with task_type "SEQ_CLS" or "TOKEN_CLS" the heads named classifier and score are among them, with
        "QUESTION_ANS" that named qa_outputs.
    base_model_name_or_path: of the model that the adapter belongs to; stored, and compared when it is loaded.
    inference_mode: whether the adapter is injected frozen.
    """

    peft_type: ClassVar[str]
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    modules_to_save: Sequence[str] | None = None

    def __post_init__(self):
        task = getattr(self.task_type, "value", self.task_type)
        self.need(task in (None, *TASK_TYPES), "task_type", f"one of {', '.join(TASK_TYPES)}, or None")
        self.task_type = task
        name = self.base_model_name_or_path
        self.need(name is None or isinstance(name, str), "base_model_name_or_path", "a string, or None")
        self.need_flags("inference_mode")
        saved = self.modules_to_save
        self.need(saved is None or _are_names(saved), "modules_to_save", "a list of names")
        for name in sorted({f.name for f in fields(self)} & _NAMES):
            value = getattr(self, name)
            fits = value is None or (value and isinstance(value, str)) or _are_names(value)
            self.need(fits, name, "a list of names, a regular expression, or None")
        if hasattr(self, "layers_to_transform"):
            layers = self.layers_to_transform
            layers = layers if _is_list(layers) else [0 if layers is None else layers]
            whole = all(type(i) is int for i in layers)
            self.need(whole, "layers_to_transform", "an integer, a list of integers, or None")

    def need(self, holds: bool, name: str, needed: str) -> None:
        """Raise ValueError, naming the field, unless `holds`."""
        need_value(holds, type(self).__name__, name, getattr(self, name), needed)

    def need_count(self, *names: str, least: int = 1) -> None:
        """Raise ValueError unless the fields are integers >= `least`."""
        for name in names:
            value = getattr(self, name)
            self.need(type(value) is int and value >= least, name, f"an integer >= {least}")

    def need_flags(self, *names: str) -> None:
        """Raise ValueError unless the fields are booleans."""
        for name in names:
            self.need(isinstance(getattr(self, name), bool), name, "True or False")

    def need_share(self, name: str) -> None:
        """Raise ValueError unless the field is in [0, 1)."""
        value = getattr(self, name)
        self.need(isinstance(value, (int, float)) and 0 <= value < 1, name, "a probability with 0 <= p < 1")

    def as_dict(self) -> dict:
        """The fields as they are stored, and the type."""
        return {"peft_type": self.peft_type} | {f.name: getattr(self, f.name) for f in fields(self)}


def _is_list(value) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes, dict))


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _are_names(value) -> bool:
    return _is_list(value) and all(isinstance(name, str) and name for name in value)


@dataclass(kw_only=True)
class TargetedConfig(Config):
    """What methods on linear layers share.

    target_modules: names (a module's whole path, or its end), or a regular expression for the whole path, or
        "all-linear"; None: the method's usual ones for the model's architecture.
    exclude_modules: names or a regular expression of modules that are not adapted.
    layers_to_transform: indices of the layers that are adapted; None: all. Negative ones count from the last layer.
        What target_modules name by the whole path is adapted, too.
    layers_pattern: the name of the list of layers, where the first number in a module's path is not its index.
    """

    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None


@dataclass(kw_only=True)
class LoraConfig(TargetedConfig):
    """LoRA (Hu et al. 2021), rsLoRA (Kalajdzievski 2023), DoRA (Liu et al. 2024).

    r, lora_alpha: rank and alpha; the scaling is alpha / r, with use_rslora alpha / sqrt(r).
    rank_pattern, alpha_pattern: name or regular expression of a module's path -> its rank, its alpha.
    lora_dropout: in [0, 1). bias: "none", "all" parameters called bias train, or those of the adapted layers
        ("lora_only").
    init_lora_weights: True, "gaussian", or False (lora_B is not zero either).
    use_dora: the weight's rows keep a magnitude of their own.
    """

    peft_type: ClassVar[str] = "LORA"
    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    fan_in_fan_out: bool = False  # stored for PEFT; here it follows from the layer's type

    def __post_init__(self):
        super().__post_init__()
        self.need_count("r")
        self.need(_is_number(self.lora_alpha), "lora_alpha", "a finite number")
        self.need_flags("use_rslora", "use_dora", "fan_in_fan_out")
        self._need_patterns()
        self.need_share("lora_dropout")
        self.need(self.bias in ("none", "all", "lora_only"), "bias", '"none", "all" or "lora_only"')
        known = isinstance(self.init_lora_weights, bool) or self.init_lora_weights == "gaussian"
        self.need(known, "init_lora_weights", 'True, False or "gaussian"')

    def _need_patterns(self):
        ranks, alphas = self.rank_pattern, self.alpha_pattern
        whole = isinstance(ranks, dict) and all(type(r) is int and r > 0 for r in ranks.values())
        self.need(whole, "rank_pattern", "a dict of integers >= 1")
        numbers = isinstance(alphas, dict) and all(map(_is_number, alphas.values()))
        self.need(numbers, "alpha_pattern", "a dict of numbers")


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA (Zhang et al. 2023): ranks allocated to layers by importance, under a budget that falls from init_r to
    target_r ranks a layer.

    tinit, tfinal: steps at full budget at the start and at the final one at the end; between them the budget is cut
        every deltaT steps along a cubic curve. total_step: of the training.
    beta1, beta2: of the moving averages of sensitivity and uncertainty. orth_reg_weight: of the regulariser.
    r: not used; init_r is. Another than the default is warned of.
    rank_pattern: lora_E's path -> which ranks are in the budget; set by training.
    """

    peft_type: ClassVar[str] = "ADALORA"
    rank_pattern: dict[str, list[bool]] | None = None
    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None

    def _need_patterns(self):
        ranks = self.rank_pattern
        masks = ranks is None or (
            isinstance(ranks, dict)
            and all(_is_list(mask) and all(isinstance(kept, bool) for kept in mask) for mask in ranks.values())
        )
        self.need(masks, "rank_pattern", "a dict of lists of booleans, or None")
        self.need(not self.alpha_pattern, "alpha_pattern", "empty in AdaLoRA")

    def __post_init__(self):
        super().__post_init__()
        if self.r != AdaLoraConfig.r:
            given, used = f"r is {self.r}, which AdaLoRA does not use", f"the initial rank is init_r, {self.init_r}"
            warnings.warn(f"AdaLoraConfig: {given}; {used}", stacklevel=3)
        self.need_count("target_r", "init_r", "deltaT")
        self.need_count("tinit", "tfinal", least=0)
        self.need(_is_number(self.orth_reg_weight) and self.orth_reg_weight >= 0, "orth_reg_weight", "a number >= 0")
        self.need(self.target_r <= self.init_r, "target_r", f"no more than init_r, {self.init_r}")
        self.need(not (self.use_dora or self.use_rslora), "use_dora", "False, and use_rslora too, in AdaLoRA")
        self.need_share("beta1")
        self.need_share("beta2")
        if self.total_step is not None:
            self.need_count("total_step")
            needed = "more than tinit + tfinal, so that there are steps to cut the budget in"
            self.need(self.total_step > self.tinit + self.tfinal, "total_step", needed)


@dataclass(kw_only=True)
class DyLoraConfig(LoraConfig):
    """DyLoRA (Valipour et al. 2023): every training step cuts the factors to a rank drawn from [min_rank, r], so that
    one training serves all of these ranks.

    frozen: whether a step trains only the last of its ranks (the paper's variant); at min_rank it trains them all.
    """

    peft_type: ClassVar[str] = "DYLORA"
    min_rank: int = 1
    frozen: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.need_count("min_rank")
        self.need_flags("frozen")
        self.need(self.min_rank <= self.r, "min_rank", f"no more than r, {self.r}")
        self.need(not (self.use_dora or self.use_rslora), "use_dora", "False, and use_rslora too, in DyLoRA")


@dataclass(kw_only=True)
class IA3Config(TargetedConfig):
    """IA3 (Liu et al. 2022). feedforward_modules: those of the targets whose input is scaled, not their output."""

    peft_type: ClassVar[str] = "IA3"
    feedforward_modules: str | Sequence[str] | None = None
    init_ia3_weights: bool = True
    fan_in_fan_out: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.need_flags("init_ia3_weights", "fan_in_fan_out")


@dataclass(kw_only=True)
class BottleneckConfig(TargetedConfig):
    """Bottleneck adapters: serial, on the output of attention and feed-forward (Houlsby et al. 2019) or of feed-forward
    alone (Pfeiffer et al. 2021), or parallel to the feed-forward (He et al. 2022).

    placement: "houlsby", "pfeiffer" or "parallel". A serial branch reads what the sub-layer's last linear layer gives,
        before the sum with the residual stream and its norm; a parallel one reads the sub-layer's input.
    bottleneck_size: r, the width.
    activation: "relu", "gelu" (with erf), "gelu_tanh", "silu", "tanh" or "identity".
    scaling: the factor s, a number, or "learned" (one scalar a layer, starting at 1).
    layer_norm: whether a LayerNorm of its own stands before the branch.
    train_layer_norm: whether the model's own normalisation layers (of the chosen layers) train, too, as in the papers;
        the head, which trains there as well, is for modules_to_save or task_type.
    init_weights: True makes up zero and down Kaiming-uniform, so that nothing changes at the start; False draws both.
    target_modules: modules of any kind, after each of which the branch stands; where parallel, beside each of which, or
    input_modules: beside the chains of layers from each of these to the corresponding target module. Both are taken in
        the order in which the model holds them.
    """

    peft_type: ClassVar[str] = "BOTTLENECK"
    placement: Literal["houlsby", "pfeiffer", "parallel"] = "houlsby"
    bottleneck_size: int = 64
    activation: str = "relu"
    scaling: float | Literal["learned"] = 1.0
    layer_norm: bool = False
    train_layer_norm: bool = False
    init_weights: bool = True
    input_modules: str | Sequence[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.need_count("bottleneck_size")
        placements = ("houlsby", "pfeiffer", "parallel")
        self.need(self.placement in placements, "placement", f"one of {', '.join(placements)}")
        self.need(self.activation in list(ACTIVATIONS), "activation", f"one of {', '.join(ACTIVATIONS)}")
        self.need_flags("layer_norm", "train_layer_norm", "init_weights")
        self.need(_is_number(self.scaling) or self.scaling == "learned", "scaling", 'a number or "learned"')
        ends = self.input_modules is None or (self.placement == "parallel" and self.target_modules is not None)
        self.need(ends, "input_modules", 'None unless placement is "parallel" and target_modules are given')


@dataclass(kw_only=True)
class VirtualTokensConfig(Config):
    """What prefix and prompt tuning share. num_virtual_tokens: V. The other fields follow from the model, as PEFT's.

    PEFT leaves the virtual tokens of an adapter without a task_type out and says nothing: give it one for an encoder.
    The files of a model that generates are given the one that it has.
    """

    num_virtual_tokens: int = 20
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.need_count("num_virtual_tokens")


@dataclass(kw_only=True)
class PrefixTuningConfig(VirtualTokensConfig):
    """Prefix tuning (Li & Liang 2021): trainable keys and values before those of every layer.

    In an encoder-decoder of L layers that generates, layer l reads the rows of layer 2 l modulo L, as in PEFT, so that
    with an even L half of the rows never train.

    prefix_projection: whether an MLP over a smaller matrix makes them during training; encoder_hidden_size: its width
    (default: the keys'). init_weights: "zero" starts from rows of zeros, None from random ones.
    """

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_weights: Literal["zero"] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.need_flags("prefix_projection")
        if self.encoder_hidden_size is not None:
            self.need_count("encoder_hidden_size")
        self.need(self.init_weights in (None, "zero"), "init_weights", 'None or "zero"')


@dataclass(kw_only=True)
class PromptTuningConfig(VirtualTokensConfig):
    """Prompt tuning (Lester et al. 2021): trainable embeddings before the input.

    prompt_tuning_init: "RANDOM", "TEXT" (of prompt_tuning_init_text, cut into tokens by the tokenizer of
    tokenizer_name_or_path) or "SAMPLE_VOCAB".
    """

    peft_type: ClassVar[str] = "PROMPT_TUNING"
    prompt_tuning_init: str = "RANDOM"
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict | None = None

    def __post_init__(self):
        super().__post_init__()
        self.prompt_tuning_init = getattr(self.prompt_tuning_init, "value", self.prompt_tuning_init)
        kinds = ("RANDOM", "TEXT", "SAMPLE_VOCAB")
        self.need(self.prompt_tuning_init in kinds, "prompt_tuning_init", f"one of {', '.join(kinds)}")
        if self.prompt_tuning_init == "TEXT":
            for name in ("prompt_tuning_init_text", "tokenizer_name_or_path"):
                self.need(bool(getattr(self, name)), name, 'given with prompt_tuning_init "TEXT"')


@dataclass(kw_only=True)
class BitFitConfig(Config):
    """BitFit (Ben Zaken et al. 2022): only biases train.

    target_modules, exclude_modules: of which modules; default: all of the model that have a bias.
    train_layer_norm: whether the gains of normalisation layers train, too.
    add_missing: whether linear layers without a bias get one, zero at the start; the model's class may not read it
        again from a stored merged model. Without it, a model that has no bias is an error.
    """

    peft_type: ClassVar[str] = "BITFIT"
    target_modules: str | Sequence[str] | None = None
    exclude_modules: str | Sequence[str] | None = None
    train_layer_norm: bool = False
    add_missing: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.need_flags("train_layer_norm", "add_missing")


@dataclass(kw_only=True)
class SelectiveConfig(Config):
    """Selective tuning: chosen parameters train, in copies of the adapter's own.

    target_parameters: names (a parameter's whole path, or its end), or a regular expression for the whole path; None:
        all of the chosen layers.
    layers_to_transform: indices of the layers; negative ones count from the last, so that [-2, -1] are the top two.
    layers_pattern: the name of the list of layers.
    """

    peft_type: ClassVar[str] = "SELECTIVE"
    target_parameters: str | Sequence[str] | None = None
    layers_to_transform: int | Sequence[int] | None = None
    layers_pattern: str | Sequence[str] | None = None

    def __post_init__(self):
        super().__post_init__()
        given = self.target_parameters is not None or self.layers_to_transform is not None
        self.need(given, "target_parameters", "given, or layers_to_transform")


CONFIGS: dict[str, type[Config]] = {
    config.peft_type: config
    for config in (
        LoraConfig,
        AdaLoraConfig,
        DyLoraConfig,
        IA3Config,
        BottleneckConfig,
        PrefixTuningConfig,
        PromptTuningConfig,
        BitFitConfig,
        SelectiveConfig,
    )
}


def as_config(config) -> Config:
    """`config` itself, or the one of ours that a PEFT config object stands for.

    Raises TypeError for anything else; ValueError, naming the fields, where PEFT's has one set that has no counterpart
    here.
    """
    if isinstance(config, Config):
        return config
    kind = getattr(getattr(config, "peft_type", None), "value", None)
    known = f"one of {', '.join(c.__name__ for c in CONFIGS.values())}, or PEFT's config of such a method"
    need_value(kind in CONFIGS, "adapt", "config", config, known, TypeError)
    return from_fields(kind, {f.name: getattr(config, f.name) for f in fields(config)}, _peft_defaults(config))


def _peft_defaults(config) -> dict:
    plain = type(config)
    return {f.name: f.default_factory() if callable(f.default_factory) else f.default for f in fields(plain)}


# Of PEFT's fields, those that say nothing about what is computed.
_IGNORED = {
    "peft_type", "auto_mapping", "peft_version", "runtime_config", "megatron_core", "qalora_group_size",
}  # fmt: skip


def from_fields(kind: str, given: dict, defaults: dict | None = None) -> Config:
    """The config of the method `kind` ("LORA", …) with these fields.

    Raises ValueError naming the fields that are unknown here, unless they are unset (None, False, empty, or as in
    `defaults`).
    """
    need_value(isinstance(kind, str) and kind in CONFIGS, "config", "peft_type", kind, f"one of {', '.join(CONFIGS)}")
    cls = CONFIGS[kind]
    if cls is AdaLoraConfig:  # PEFT has warned of an r
        given = {name: value for name, value in given.items() if name != "r"}
    known = {f.name for f in fields(cls)}
    extra = {
        name: value
        for name, value in given.items()
        if name not in known | _IGNORED and value and value != (defaults or {}).get(name)
    }
    needed = f"without fields that only PEFT has; it has {sorted(known)}"
    need(not extra, cls.__name__, "config", f"with {extra}", needed)
    return cls(**{name: sorted(v) if isinstance(v, set) else v for name, v in given.items() if name in known})
