"""What prefix and prompt tuning share: parts that lie at the top of a model, `model.adapters[name]`."""

from torch import nn


def add_part(model: nn.Module, name: str, part: nn.Module) -> None:
    """Put a part at the top of the model, on its device, not active yet."""
    if not hasattr(model, "adapters"):
        model.adapters, model.active = nn.ModuleDict(), ()
    model.adapters[name] = part.to(next(model.parameters()).device).train(model.training)


def parts(model: nn.Module, kind: type) -> list[nn.Module]:
    """All the model's parts of that kind."""
    return [part for part in getattr(model, "adapters", {}).values() if isinstance(part, kind)]


def active_parts(model: nn.Module, kind: type) -> list[nn.Module]:
    """The parts of that kind that run now, in the order of `model.active`."""
    running = [model.adapters[name] for name in model.active if name in model.adapters]
    return [part for part in running if isinstance(part, kind)]


def drop_if_empty(model: nn.Module) -> None:
    """Take `adapters` and `active` off the model where no part is left."""
    if hasattr(model, "adapters") and len(model.adapters) == 0:
        del model.adapters, model.active
