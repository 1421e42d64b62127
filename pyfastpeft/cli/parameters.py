"""`pyfastpeft params`: how many parameters each method would train in a model, whose weights are not needed."""

import argparse
import json
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import nn

from .. import methods
from ..methods.files import need_file, read_json
from ..methods.tables import size, table
from ..ops.checks import need


def add_to(commands) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser("params", help="compare how many parameters each method trains in a model")
    parser.add_argument("model", help="a directory with config.json, such a file, or a model type of transformers")
    parser.add_argument("--rank", type=int, default=8, help="of the low-rank methods (default: 8)")
    parser.add_argument("--bottleneck-size", type=int, default=64, help="the width of bottlenecks (default: 64)")
    parser.add_argument("--virtual-tokens", type=int, default=20, help="of prefixes and prompts (default: 20)")
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    model = meta_model(options.model)
    rows = compare(model, options.rank, options.bottleneck_size, options.virtual_tokens)
    print(json.dumps(rows, indent=2) if options.json else render(model, rows))
    return 0


def meta_model(name: str) -> nn.Module:
    """A transformers model on the meta device: of a config.json, or of a model type's default sizes."""
    import transformers

    path = Path(name)
    if path.exists():
        fields = read_json(need_file(path, "config.json") if path.is_dir() else path)
        kind = fields.pop("model_type", None)
    else:
        fields, kind = {}, name
    known = list(transformers.CONFIG_MAPPING)
    close = get_close_matches(str(kind), known, n=5)
    given = f"{name!r}, of model type {kind!r}" if path.exists() else f"{name!r}, where nothing is"
    needed = f"a directory, a config.json, or a model type of transformers; close to it are {close or known[:5]}"
    need(kind in known, "params", "model", given, needed)
    try:
        config = transformers.AutoConfig.for_model(kind, **fields)
    except Exception as why:  # transformers has many
        raise ValueError(f"{path} holds no config of a model: {why}") from None
    kinds = [getattr(transformers, str(name), None) for name in config.architectures or ()]
    kinds = [kind for kind in kinds if hasattr(kind, "from_pretrained")]
    with torch.device("meta"):
        return kinds[0](config) if kinds else transformers.AutoModel.from_config(config)


def compare(model: nn.Module, rank: int, bottleneck_size: int, virtual_tokens: int) -> list[dict]:
    """One row for each method, with its targets by architecture: parameters, their share of the model's, bytes; or why
    the method is not for this model."""
    every = list(model.parameters())
    base = sum(parameter.numel() for parameter in every)
    rows = [_row("full fine-tuning", every, base)]
    low = {"r": rank, "lora_alpha": rank}
    candidates = {
        f"LoRA, rank {rank}": methods.LoraConfig(**low),
        f"DoRA, rank {rank}": methods.LoraConfig(**low, use_dora=True),
        f"AdaLoRA, rank {rank} at the start": methods.AdaLoraConfig(init_r=rank, target_r=max(1, rank // 2)),
        f"DyLoRA, ranks to {rank}": methods.DyLoraConfig(**low),
        "IA3": methods.IA3Config(),
        **{
            f"{name} bottleneck, width {bottleneck_size}": methods.BottleneckConfig(
                placement=name.lower(), bottleneck_size=bottleneck_size
            )
            for name in ("Houlsby", "Pfeiffer", "Parallel")
        },
        f"prefix tuning, {virtual_tokens} tokens": methods.PrefixTuningConfig(num_virtual_tokens=virtual_tokens),
        f"prompt tuning, {virtual_tokens} tokens": methods.PromptTuningConfig(num_virtual_tokens=virtual_tokens),
        "BitFit": methods.BitFitConfig(),
        "BitFit and norms": methods.BitFitConfig(train_layer_norm=True),
        "the top two layers": methods.SelectiveConfig(layers_to_transform=[-2, -1]),
    }
    for name, config in candidates.items():
        try:
            methods.adapt(model, config)
        except (NotImplementedError, TypeError, ValueError) as why:
            rows.append({"method": name, "why_not": str(why)})
        else:
            rows.append(_row(name, methods.adapter_parameters(model, "default").values(), base))
            methods.delete_adapter(model, "default")
    return rows


def _row(name, parameters, base) -> dict:
    unique = {id(parameter): parameter for parameter in parameters}.values()
    trained = sum(parameter.numel() for parameter in unique)
    return {
        "method": name,
        "parameters": trained,
        "percent": 100 * trained / base,
        "bytes": sum(parameter.nbytes for parameter in unique),
    }


def render(model: nn.Module, rows: list[dict]) -> str:
    """The rows as an aligned table, and below it why methods are missing."""
    missing = [f"{row['method']}: {row['why_not']}" for row in rows if "why_not" in row]
    cells = [
        (row["method"], f"{row['parameters']:,}", f"{row['percent']:.3f}", size(row["bytes"]))
        for row in rows
        if "why_not" not in row
    ]
    header = (type(model).__name__, "parameters", "% of the model", "bytes")
    return "\n".join([table(header, cells, right=(1, 2, 3)), *missing])
