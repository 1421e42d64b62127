"""`pyfastpeft inspect`, `merge` and `words`: adapters that are stored in a directory."""

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from .. import methods
from ..methods.checkpoint import CONFIG_FILE, SUFFIXES, TENSORS_FILE
from ..methods.configs import BottleneckConfig, PrefixTuningConfig, PromptTuningConfig
from ..methods.files import need_file, opened, read_json
from ..methods.prompt import nearest_words
from ..methods.tables import size, table
from ..ops.checks import need

AUTO_CLASSES = {
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}
HEADS = ("classifier.out_proj.weight", "classifier.weight", "score.weight")  # whose first size is the number of labels
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model", "chat_*")
UNMERGEABLE = [config.peft_type for config in (BottleneckConfig, PrefixTuningConfig, PromptTuningConfig)]


def add_to(commands) -> None:
    """Add these commands to the command line."""
    parser = commands.add_parser("inspect", help="show the method, targets, ranks and sizes of a stored adapter")
    parser.add_argument("adapter", metavar="DIR", type=Path, help="a directory with adapter_config.json")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.set_defaults(run=lambda options: _print(inspect(options.adapter), options.json, render))

    parser = commands.add_parser("merge", help="merge an adapter into a model and write the plain model")
    parser.add_argument("--model", metavar="DIR", type=Path, required=True, help="a transformers model")
    parser.add_argument("--adapter", metavar="DIR", type=Path, required=True)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="a directory that is new or empty")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: the model's")
    parser.set_defaults(run=lambda options: merge(options.model, options.adapter, options.out, options.dtype))

    parser = commands.add_parser("words", help="show the vocabulary's words nearest to the virtual tokens of a prompt")
    parser.add_argument("adapter", metavar="DIR", type=Path)
    parser.add_argument("--model", metavar="DIR", type=Path, required=True, help="a transformers model")
    parser.add_argument("-k", type=int, default=5, help="how many for each virtual token (default: 5)")
    parser.add_argument("--json", action="store_true", help="print them as JSON")
    parser.set_defaults(run=lambda options: _print(words(options.adapter, options.model, options.k), options.json, str))


def _print(found, as_json, rendered) -> int:
    plain = found if isinstance(found, dict) else [row._asdict() for row in found]
    print(json.dumps(plain, indent=2) if as_json else rendered(found))
    return 0


# --- inspect ---------------------------------------------------------------------------------------------------------

_SUFFIX = "|".join(sorted({re.escape(name) for names in SUFFIXES.values() for name in names.values()}, reverse=True))
_KEY = re.compile(rf"base_model\.(?:model\.)?(?:(?P<module>.+?)\.)??(?P<tensor>{_SUFFIX}|(?:base_layer\.)?[^.]+)")


def inspect(directory: Path) -> dict:
    """What a directory holds, of any method of PEFT's or ours; no model is needed."""
    fields = read_json(need_file(directory, CONFIG_FILE))
    targets, sizes = {}, {}
    with opened(need_file(directory, TENSORS_FILE)) as file:
        for key in file.keys():  # noqa: SIM118
            tensor, parts = file.get_tensor(key), _KEY.fullmatch(key)
            module = (parts and parts["module"]) or key
            row = targets.setdefault(
                re.sub(r".*\.\d+\.", "", module), {"modules": set(), "ranks": set(), "parameters": 0}
            )
            row["modules"].add(module)
            row["parameters"] += tensor.numel()
            if parts and re.match(r"lora_(embedding_)?A", parts["tensor"]):
                row["ranks"].update(tensor.shape[:1])
            dtype = str(tensor.dtype).removeprefix("torch.")
            sizes[dtype] = sizes.get(dtype, 0) + tensor.nbytes
    variants = {"use_dora": "DoRA", "use_rslora": "rsLoRA"}
    return {
        "directory": str(directory),
        "method": fields.get("peft_type"),
        "variants": [name for field, name in variants.items() if fields.get(field)],
        "base_model": fields.get("base_model_name_or_path"),
        "task_type": fields.get("task_type"),
        "parameters": sum(row["parameters"] for row in targets.values()),
        "bytes": sizes,
        "targets": [
            row | {"name": name, "modules": len(row["modules"]), "ranks": sorted(row["ranks"])}
            for name, row in sorted(targets.items())
        ],
        "config": fields,
    }


def render(found: dict) -> str:
    """What `inspect` found, as aligned tables."""
    facts = [
        ("method", " ".join([str(found["method"]), *found["variants"]])),
        ("base model", str(found["base_model"] or "not named")),
        ("task", str(found["task_type"] or "not named")),
        ("parameters", f"{found['parameters']:,}"),
        *((f"in {dtype}", size(held)) for dtype, held in sorted(found["bytes"].items())),
    ]
    rows = [
        (row["name"], f"{row['modules']:,}", " ".join(map(str, row["ranks"])), f"{row['parameters']:,}")
        for row in found["targets"]
    ]
    return f"{table(('adapter', found['directory']), facts)}\n\n" + table(
        ("target", "modules", "ranks", "parameters"), rows, right=(1, 3)
    )


# --- with a model ----------------------------------------------------------------------------------------------------


def merge(model: Path, adapter: Path, out: Path, dtype: str | None = None) -> int:
    """Merge `adapter` into the transformers model `model`, and write the plain model and its tokenizer to `out`.

    Sums are float32 and rounded once. Nothing is overwritten; if it fails, `out` is not there.
    """
    out = out.resolve()  # what a link leads to can be replaced
    free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    need(free, "merge", "out", f"{str(out)!r}, where something is", "a directory that is new or empty")
    kind = read_json(need_file(adapter, CONFIG_FILE)).get("peft_type")
    needed = f"of a method that changes weights alone, not of {', '.join(UNMERGEABLE)}"
    need(kind not in UNMERGEABLE, "merge", "adapter", f"of {kind}, which cannot be merged", needed)
    merged = adapted_model(model, adapter, torch.float32 if dtype else "auto")
    methods.unload(merged, merge=True)
    with torch.device("meta"):
        added = merged.state_dict().keys() - type(merged)(merged.config).state_dict().keys()
    given, needed = f"one that adds {sorted(added)[:3]}", f"one without, since a {type(merged).__name__} has none"
    need(not added, "merge", "adapter", given, needed)
    if dtype:
        merged.to(getattr(torch, dtype))
    ends = [embedding() for embedding in (merged.get_input_embeddings, merged.get_output_embeddings)]
    if None not in ends and ends[0].weight is not ends[1].weight:  # one of two tied ones may have changed
        merged.config.tie_word_embeddings = False
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".merging-", dir=out.parent) as scratch:
        whole = Path(scratch, "model")
        merged.save_pretrained(whole)
        for path in {path for pattern in TOKENIZER for path in model.glob(pattern) if path.is_file()}:
            shutil.copy(path, whole)
        os.replace(whole, out)
    print(f"{kind} merged into {type(merged).__name__}: {out}")
    return 0


def words(adapter: Path, model: Path, k: int) -> Iterable:
    """The rows of `nearest_words` for a stored prompt."""
    kind = read_json(need_file(adapter, CONFIG_FILE)).get("peft_type")
    need(kind == PromptTuningConfig.peft_type, "words", "adapter", f"of {kind}", f"of {PromptTuningConfig.peft_type}")
    adapted = adapted_model(model, adapter, "auto")
    return nearest_words(adapted, "default", _tokenizer(model), k)


def _tokenizer(directory):
    from transformers import AutoTokenizer

    if not any(directory.glob("tokenizer*")):
        print(f"{directory} holds no tokenizer: tokens go by their numbers", file=sys.stderr)
        return None
    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def adapted_model(directory: Path, adapter: Path, dtype: torch.dtype | str) -> nn.Module:
    """The transformers model in `directory`, of the class that the adapter was made for, with the adapter."""
    need_file(directory, "config.json")
    import transformers
    from safetensors import SafetensorError

    methods.load_config(adapter)  # a model takes long to read in vain
    fields = read_json(need_file(adapter, CONFIG_FILE))
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as why:  # transformers has many
        raise ValueError(f"{directory} holds no config of a model: {why}") from None
    mapping = fields.get("auto_mapping")
    made_for = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    names = [AUTO_CLASSES.get(fields.get("task_type")), made_for, *(config.architectures or ()), "AutoModel"]
    kinds = [getattr(transformers, str(name), None) for name in names]
    kind = next(kind for kind in kinds if hasattr(kind, "from_pretrained"))
    with opened(need_file(adapter, TENSORS_FILE)) as file:
        heads = [key for head in HEADS for key in file.keys() if key.endswith(head)]  # noqa: SIM118
        if heads and fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"):
            config.num_labels = len(file.get_tensor(heads[0]))
    wanted = getattr(kind, "config_class", None) or type(config)  # automatic classes take any
    given = f"{str(directory)!r}, with a {type(config).__name__}"
    needed = f"with a {wanted.__name__}, as the {kind.__name__} that the adapter was made for"
    need(isinstance(config, wanted), "load", "model", given, needed)
    try:
        model = kind.from_pretrained(directory, config=config, dtype=dtype, local_files_only=True)
    except (RuntimeError, SafetensorError) as why:
        raise ValueError(f"{directory} holds no whole {kind.__name__}: {why}") from None
    named = fields.get("base_model_name_or_path")
    if named and Path(named).name != directory.resolve().name:
        print(f"the adapter was made for {named}; it is put into {directory}", file=sys.stderr)
    return methods.load_adapter(model.eval(), adapter, check_base_model=False)
