"""What prefix and prompt tuning share: parts that lie at the top of a model, as `model.adapters[name]`."""

from torch import nn

from ..layers.adapted import attach, placed
from ..ops.checks import need, need_value

POSITIONS = ("rotary_emb", "rotary_emb_local", "wpe", "embed_positions", "position_embeddings")


def need_transformers(model: nn.Module, op: str) -> None:
    """Raise TypeError unless the model has a config like those of transformers."""
    known = hasattr(getattr(model, "config", None), "model_type")
    need(known, op, "model", f"a {type(model).__name__}", "a transformers model", TypeError)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether a model has both; the config of an encoder alone, as UMT5's, may say so, too."""
    if not model.config.is_encoder_decoder:
        return False
    encoder = model.get_encoder()
    return all(module is not encoder for module in model.get_decoder().modules())


def task_of(model: nn.Module, config) -> str | None:
    """The task type of a config, or else that of a model that generates text."""
    if config.task_type is not None or not (hasattr(model, "can_generate") and model.can_generate()):
        return config.task_type
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def num_submodules(model: nn.Module, config) -> int:
    """num_transformer_submodules: in an encoder-decoder what `config` says, or else what PEFT takes, which is two for
    text that is generated."""
    if not is_encoder_decoder(model):
        return 1
    usual = 2 if task_of(model, config) == "SEQ_2_SEQ_LM" else 1
    return config.num_transformer_submodules if config.num_transformer_submodules in (1, 2) else usual


def add_part(model: nn.Module, name: str, part: nn.Module, autocast_adapter_dtype: bool) -> None:
    """Put a part at the top of the model."""
    own = ((module, parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    like = next((module, parameter) for module, parameter in own if parameter.is_floating_point())
    attach(model, "", name, part.to(**placed(*like, autocast_adapter_dtype)))


def parts(model: nn.Module, kind: type) -> list[nn.Module]:
    """All the model's parts of that kind."""
    return [part for part in getattr(model, "adapters", {}).values() if isinstance(part, kind)]


def active_parts(model: nn.Module, kind: type) -> list[nn.Module]:
    """The parts of that kind that run now, in the order of `model.active`."""
    held = model.adapters._modules
    return [held[name] for name in model.active if isinstance(held.get(name), kind)]


def need_room(op: str, embedding: nn.Embedding, tokens: int, virtual: int) -> None:
    """Raise ValueError unless an embedding of positions has rows for so many tokens after virtual ones."""
    padding = embedding.padding_idx
    first = getattr(embedding, "offset", 0 if padding is None else padding + 1)
    room = embedding.num_embeddings - first - virtual
    given = f"{tokens} tokens after {virtual} virtual ones"
    need(tokens <= room, op, "input_ids", given, f"at most {room}: positions end there")


def position_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that turn positions into embeddings; T5 has none."""
    return [module for path, module in model.named_modules() if path.rpartition(".")[2] in POSITIONS]


def settle(config, **values: int) -> None:
    """Fill in the config's fields that follow from the model. Raises ValueError where one says something else."""
    for name, value in values.items():
        given = getattr(config, name)
        need_value(given in (None, value), type(config).__name__, name, given, f"None or {value}, as in the model")
    for name, value in values.items():
        setattr(config, name, value)
