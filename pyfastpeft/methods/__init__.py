"""Every method of parameter-efficient fine-tuning: a config, its injection into a model, and what training needs."""

from .adapt import (
    Adaptation,
    adapt,
    adapter_parameters,
    add_weighted_adapter,
    count_parameters,
    delete_adapter,
    disable_adapter,
    merge_adapter,
    merged_adapters,
    set_adapter,
    unload,
    unmerge_adapter,
)
from .checkpoint import load_adapter, load_config, save_adapter
from .configs import (
    AdaLoraConfig,
    BitFitConfig,
    BottleneckConfig,
    Config,
    DyLoraConfig,
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    SelectiveConfig,
)
from .losses import L2SP, TFewLoss, loraplus_groups, low_rank_penalty, rank_classification, regularize, tfew_loss
from .prompt import nearest_words
from .ranks import RankAllocator, draw_rank, orthogonality_loss, set_rank, truncate
from .serve import Served, serve
from .training_state import load_training_state, save_training_state

__all__ = [
    "L2SP",
    "AdaLoraConfig",
    "Adaptation",
    "BitFitConfig",
    "BottleneckConfig",
    "Config",
    "DyLoraConfig",
    "IA3Config",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "RankAllocator",
    "SelectiveConfig",
    "Served",
    "TFewLoss",
    "adapt",
    "adapter_parameters",
    "add_weighted_adapter",
    "count_parameters",
    "delete_adapter",
    "disable_adapter",
    "draw_rank",
    "load_adapter",
    "load_config",
    "load_training_state",
    "loraplus_groups",
    "low_rank_penalty",
    "merge_adapter",
    "merged_adapters",
    "nearest_words",
    "orthogonality_loss",
    "rank_classification",
    "regularize",
    "save_adapter",
    "save_training_state",
    "serve",
    "set_adapter",
    "set_rank",
    "tfew_loss",
    "truncate",
    "unload",
    "unmerge_adapter",
]
