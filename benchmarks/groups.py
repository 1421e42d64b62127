"""Layers of one input together (`lora_linear_group`) against each alone (`lora_linear`), on a CPU, rank 16.

python -m benchmarks.groups [--rounds N] [--json FILE]
"""

import argparse
import json
from itertools import product
from pathlib import Path

import torch

from benchmarks import machine, report
from benchmarks.figures import Figure
from benchmarks.measure import Effort, interleave
from benchmarks.providers import Provider
from pyfastpeft.ops import lora_linear, lora_linear_group

FEATURES, RANK, SCALING = 768, 16, 0.5
GROUPS = {"3 x 768": [768] * 3, "2 x 2048": [2048] * 2}
RUNS = {"forward": (False, 0.0), "forward + backward": (True, 0.0), "the same, dropout 0.1": (True, 0.1)}


def contest(outputs: list[int], dtype: torch.dtype, tokens: int, run: str, effort: Effort) -> list[float]:
    """The group's time over that of its layers alone, round by round. Adapters are float32."""
    training, dropout_p = RUNS[run]
    x = torch.randn(tokens, FEATURES, dtype=dtype, requires_grad=training)
    weights = [torch.randn(n, FEATURES, dtype=dtype) / FEATURES**0.5 for n in outputs]
    lora_As = [torch.randn(RANK, FEATURES, requires_grad=training) for _ in outputs]
    lora_Bs = [torch.randn(n, RANK, requires_grad=training) for n in outputs]
    dys = [torch.randn(tokens, n, dtype=dtype) for n in outputs]
    none, scalings = [None] * len(outputs), [SCALING] * len(outputs)

    def finish(ys):
        if training:
            torch.autograd.grad(ys, [x, *lora_As, *lora_Bs], dys)

    def together():
        finish(lora_linear_group(x, weights, none, lora_As, lora_Bs, scalings, dropout_p))

    def alone():
        finish([lora_linear(x, w, None, a, b, SCALING, dropout_p) for w, a, b in zip(weights, lora_As, lora_Bs)])

    runs = {Provider("together", None): together, Provider("alone", None): alone}
    ours, theirs = interleave(runs, effort, "cpu").values()
    return [a / b for a, b in zip(ours, theirs)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.groups", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each case (default: 15)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    effort, entries = Effort(0.0, options.rounds, 0.02), []
    for group, dtype, tokens, run in product(GROUPS, (torch.float32, torch.bfloat16), (16, 512), RUNS):
        ratios = contest(GROUPS[group], dtype, tokens, run, effort)
        name = f"{group} {str(dtype)[6:]} M{tokens} {run}: together over alone"
        entries.append(Figure(name, "<=", 1.0, ratios).as_dict())
    found = {"machine_info": machine.describe(), "figures": entries}
    print(report.figures_table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
