"""The methods that are compared: a config each, what else a method is made of, and its learning rates."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

import pyfastpeft
from benchmarks import Misuse
from pyfastpeft import AdaLoraConfig, BitFitConfig, RankAllocator, draw_rank, orthogonality_loss, set_rank
from pyfastpeft.methods.losses import L2SP, TFewLoss, loraplus_groups, regularize

from .learners import Encoder, Generative
from .tasks import Task


@dataclass(frozen=True)
class Method:
    """lr: of a generative model and of an encoder: the best of `--sweep`, half a decade apart, in 60 steps of 8 rows of
    E2E NLG for a Llama of 260,000 parameters and in 100 steps of 32 rows of SST-2 for the small encoder
    (T-Few: 120 steps of 8 rows of e2e_family for that Llama); one seed. Pfeiffer's on the encoder is half a decade
    below its best, with which one seed of three diverged.
    config: the name and the fields of a config of pyfastpeft.methods; none: every weight trains.
    extra: what else it is made of: "l2-sp", "lora+", "t-few"."""

    lr: tuple[float, float]
    config: str | None = None
    fields: dict = field(default_factory=dict)
    extra: str | None = None

    def rate(self, family: str) -> float:
        return self.lr[family == "encoder"]


LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
METHODS = {
    "full": Method((3e-3, 3e-3)),
    "full+L2-SP": Method((3e-3, 1e-3), extra="l2-sp"),
    "top layers": Method((1e-2, 1e-3), "SelectiveConfig", {"layers_to_transform": [-2, -1]}),
    "LoRA": Method((1e-2, 3e-3), "LoraConfig", LORA),
    "LoRA q v": Method((3e-2, 3e-3), "LoraConfig", {"r": 8, "lora_alpha": 16}),
    "LoRA+": Method((3e-3, 3e-4), "LoraConfig", LORA, "lora+"),
    "DoRA": Method((1e-2, 3e-3), "LoraConfig", LORA | {"use_dora": True}),
    "AdaLoRA": Method((3e-2, 3e-2), "AdaLoraConfig", LORA | {"init_r": 12, "target_r": 8}),
    "DyLoRA": Method((1e-2, 1e-3), "DyLoraConfig", LORA),
    "IA3": Method((3e-1, 3e-3), "IA3Config"),
    "T-Few": Method((1e-1, 1e-2), "IA3Config", extra="t-few"),
    "Houlsby": Method((3e-2, 3e-3), "BottleneckConfig", {"placement": "houlsby", "bottleneck_size": 32}),
    "Pfeiffer": Method((3e-2, 1e-2), "BottleneckConfig", {"placement": "pfeiffer", "bottleneck_size": 32}),
    "parallel": Method((3e-2, 3e-3), "BottleneckConfig", {"placement": "parallel", "bottleneck_size": 32}),
    "prefix": Method((3e-2, 3e-3), "PrefixTuningConfig", {"num_virtual_tokens": 20, "prefix_projection": True}),
    "prompt": Method((3e-1, 1e-2), "PromptTuningConfig", {"num_virtual_tokens": 20}),
    "BitFit": Method((1e-1, 3e-3), "BitFitConfig", {"add_missing": True, "train_layer_norm": True}),
}
PROMPTING = {"zero-shot": 0, "one-shot": 1, "few-shot": None}  # solved examples in the prompt; None: as many as asked
LORAPLUS_RATIO, L2SP_ALPHA = 8, 1e-2


@dataclass
class Adapted:
    """What training needs: the optimizer's groups, the loss of a training batch, and what surrounds the steps."""

    groups: list[dict]
    loss: Callable[[dict[str, Tensor]], Tensor]
    choices: int = 0  # how many rows of a batch stand for one example, if it holds every answer to choose from
    before_step: Callable[[int], object] = lambda step: None
    after_step: Callable[[int], object] = lambda step: None  # with the gradients still there
    finish: Callable[[], object] = lambda: None


def known(names: list[str] | None, learner: Generative | Encoder, tasks: list[Task]) -> list[str]:
    """The methods asked for, or all that suit. Raises Misuse for an unknown name."""
    for name in names or []:
        if name not in METHODS | PROMPTING:
            raise Misuse(f"--methods names {name!r}; known are {', '.join(METHODS | PROMPTING)}")
    by_choice = learner.family == "generative" and all(task.choices for task in tasks)
    prompts = list(PROMPTING) if learner.family == "generative" else []
    suited = [*prompts, *(name for name in METHODS if METHODS[name].extra != "t-few" or by_choice)]
    unsuited = [name for name in names or [] if name not in suited]
    if unsuited:
        raise Misuse(f"--methods {', '.join(unsuited)}: not for {learner.family} models on these tasks")
    return names or suited


def apply(method: Method, learner: Generative | Encoder, lr: float, steps: int, choices: int) -> Adapted:
    """Adapt the learner's model, in place; its head trains, too. `choices`: the most answers that a task has."""
    model = learner.model
    if method.config:
        kind, fields = getattr(pyfastpeft, method.config), dict(method.fields)
        if learner.head:
            fields["modules_to_save"] = list(learner.head)
        if kind is BitFitConfig and learner.head:
            fields["exclude_modules"] = rf"({'|'.join(map(re.escape, learner.head))})(\..*)?"
        if kind is AdaLoraConfig:
            fields |= {"tinit": steps // 5, "tfinal": steps // 3, "total_step": steps}
        pyfastpeft.adapt(model, kind(**fields))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adapted = Adapted([{"params": trainable, "lr": lr}], lambda batch: model(**batch).loss)
    if method.config == "AdaLoraConfig":
        allocator = RankAllocator(model)
        adapted.loss = lambda batch: model(**batch).loss + orthogonality_loss(model)
        adapted.after_step, adapted.finish = allocator.step, allocator.finalize
    elif method.config == "DyLoraConfig":
        adapted.before_step = lambda step: draw_rank(model, step=step)
        adapted.finish = lambda: set_rank(model)
    if method.extra == "l2-sp":
        regularize(model, L2SP(model, L2SP_ALPHA))
    elif method.extra == "lora+":
        adapted.groups = loraplus_groups(model, lr, LORAPLUS_RATIO)
    elif method.extra == "t-few":
        loss = TFewLoss(choices, causal=learner.causal)
        adapted.choices = choices
        adapted.loss = lambda batch: loss(learner.outputs(batch), batch["labels"])
    return adapted
