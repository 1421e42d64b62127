"""A training step of every method against PEFT's same method, on a CPU.

    python -m benchmarks.steps [--rounds N] [--methods NAME …] [--rank R] [--json FILE]

A step is forward, backward and optimizer, on a Llama-shaped model of 110M parameters and a batch of 4 x 128 tokens.
Both models share the frozen weights and start from the same adapter; a method that computes something else than PEFT's
is refused.
The steps of one method are interleaved, round by round; each figure is the median of the rounds' ratios.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import machine, report
from benchmarks.figures import Figure
from benchmarks.measure import Effort, interleave, twin
from benchmarks.providers import Provider
from pyfastpeft import RankAllocator, load_adapter, orthogonality_loss

SIZES = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
SHAPE = {**SIZES, "vocab_size": 32000, "tie_word_embeddings": True}
BATCH = (4, 128)
TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256}
TINY_BATCH = (2, 16)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
LOW_RANK = {"lora_alpha": 32, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
VIRTUAL = {"num_virtual_tokens": 20, "task_type": "CAUSAL_LM"}
LONG = 1_000_000  # steps of AdaLoRA's schedule: it allots ranks anew in every step that is timed

METHODS: dict[str, Callable[[int], peft.PeftConfig]] = {  # of a rank
    "LoRA": lambda rank: peft.LoraConfig(r=rank, **LOW_RANK),
    "DoRA": lambda rank: peft.LoraConfig(r=rank, use_dora=True, **LOW_RANK),
    "IA3": lambda _: peft.IA3Config(task_type="CAUSAL_LM"),
    "AdaLoRA": lambda rank: peft.AdaLoraConfig(init_r=rank, target_r=rank // 2, total_step=LONG, **LOW_RANK),
    "prefix tuning": lambda _: peft.PrefixTuningConfig(**VIRTUAL),
    "prompt tuning": lambda _: peft.PromptTuningConfig(**VIRTUAL),
}
LIMITS = {"DoRA": [("speed over PEFT", ">=", 1.5)]}  # beside the one for all: time over PEFT at most 1
AGREEING_STEPS = 3
TOLERANCE = 1e-5  # of losses and gradients, relative
PREFIX_GRADIENT = 1e-4  # where attention sums beside a prefix in another order


class Disagreement(Exception):
    """A method does not compute what PEFT's does."""


def pair(base: nn.Module, config: peft.PeftConfig) -> tuple[nn.Module, nn.Module]:
    """(ours, PEFT's): models that share the parameters of `base`, with one random adapter each, of the same values."""
    theirs = peft.get_peft_model(twin(base), config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        ours = load_adapter(twin(base), directory, is_trainable=True)
    return ours.train(), theirs.train()


class Loop:
    """What a training loop does in one step."""

    def __init__(self, model, ids, regulariser=None, allocate=None):
        self.model, self.ids, self.regulariser, self.allocate = model, ids, regulariser, allocate
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        self.done = 0

    def loss(self) -> torch.Tensor:
        loss = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss if self.regulariser is None else loss + self.regulariser()

    def step(self) -> torch.Tensor:
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        if self.allocate is not None:
            self.allocate(self.done)
        self.optimizer.zero_grad()
        self.done += 1
        return loss.detach()

    def gradient_norm(self) -> float:
        gradients = torch.autograd.grad(self.loss(), self.trained)
        return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()


def loops(ours: nn.Module, theirs: nn.Module, ids: torch.Tensor) -> tuple[Loop, Loop]:
    if not isinstance(theirs.peft_config["default"], peft.AdaLoraConfig):
        return Loop(ours, ids), Loop(theirs, ids)
    return (
        Loop(ours, ids, lambda: orthogonality_loss(ours), RankAllocator(ours).step),
        Loop(theirs, ids, allocate=theirs.base_model.update_and_allocate),  # its loss is regularised
    )


def agree(method: str, ours: Loop, theirs: Loop) -> float:
    """The largest relative difference of the losses of some steps. Raises Disagreement where those, or the length of
    the first gradient, which the optimizer makes nothing of, are off by more than rounding."""
    found, expected = ours.gradient_norm(), theirs.gradient_norm()
    tolerance = PREFIX_GRADIENT if method == "prefix tuning" else TOLERANCE
    if not abs(found - expected) <= tolerance * expected:
        raise Disagreement(f"{method}: the gradient's norm is {found:.6g}; it is {expected:.6g} in PEFT")
    losses = [(ours.step().item(), theirs.step().item()) for _ in range(AGREEING_STEPS)]
    error = max(abs(a - b) / abs(b) for a, b in losses)
    if not error <= TOLERANCE:
        raise Disagreement(f"{method}: losses {losses} differ by {error:.2g} of PEFT's")
    return error


def contest(method: str, rank: int, base: nn.Module, ids: torch.Tensor, effort: Effort) -> list[Figure]:
    ours, theirs = loops(*pair(base, METHODS[method](rank)), ids)
    error = agree(method, ours, theirs)
    runs = {Provider(name, None): loop.step for name, loop in (("ours", ours), ("peft", theirs))}
    seconds = {provider.name: values for provider, values in interleave(runs, effort, "cpu").items()}
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["peft"])]
    note = f"losses within {error:.1g}"
    figures = [Figure(f"{method}: time over PEFT", "<=", 1.0, ratios, note=note)]
    for name, relation, limit in LIMITS.get(method, []):
        figures.append(Figure(f"{method}: {name}", relation, limit, [1 / ratio for ratio in ratios]))
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each method (default: 15)")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA, DoRA and AdaLoRA (default: 16)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and three rounds: tries the code only")
    options = parser.parse_args()
    shape, batch = (TINY, TINY_BATCH) if options.tiny else (SHAPE, BATCH)
    effort = Effort(0.0, 3 if options.tiny else options.rounds, 0.0)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**shape)).requires_grad_(False)
    ids = torch.randint(shape["vocab_size"], batch)
    entries, refused = [], []
    for method in options.methods:
        try:
            for figure in contest(method, options.rank, base, ids, effort):
                entries.append(figure.as_dict())
                print(report.figure_row(entries[-1]), flush=True)
        except Disagreement as why:
            refused.append(str(why))
            print(why, flush=True)
    found = {"machine_info": machine.describe(), "rank": options.rank, "figures": entries, "refused": refused}
    print("\n" + report.figures_table(found))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
