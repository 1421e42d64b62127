"""Train a small transformer or take a given one; adapt it with fused LoRA and IA3; check, serve, measure and report."""

import argparse
import copy
import dataclasses
import re
import resource
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
import transformers
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import pyfastpeft
from benchmarks import machine

from . import checks, measure, report, texts
from .checks import Check, fused
from .model import Misuse, base_optimizers, byte_tokenizer, held_out_loss, load, small_llama, train
from .texts import Part


@dataclasses.dataclass(frozen=True)
class Effort:
    """Whatever is counted in steps or rounds ends early where its seconds are over: a slow machine does less."""

    base_steps: int = 600
    base_seconds: float = 50
    steps: int = 60  # of each adapter
    seconds: float = 8
    checked_steps: int = 15
    rounds: int = 15  # of each measurement
    measured_seconds: float = 8
    rows_of_each: int = 4  # adapter, in the mixed batch
    new_tokens: int = 24  # generated for each of its rows


QUICK = Effort(80, 6, 12, 2, 4, 4, 1, 2, 6)
LEARNING_RATE = {"LoRA": 3e-3, "IA3": 3e-2}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--model", metavar="PATH_OR_ID", help="a causal language model of transformers, and its tokenizer"
    )
    parser.add_argument(
        "--data", metavar="[NAME=]FILE", action="append", default=[], help="a text to adapt to; again for each adapter"
    )
    parser.add_argument(
        "--target", metavar="NAME", action="append", help="layers for LoRA (default: all linear layers)"
    )
    parser.add_argument("--rank", type=positive, default=16, help="of LoRA (default: %(default)s)")
    parser.add_argument("--dropout", type=probability, default=0.05, help="of LoRA (default: %(default)s)")
    parser.add_argument("--length", type=positive, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--rows", type=positive, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--steps", type=positive, help="of each adapter (default: as many as fit into a few seconds)")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the short form: less training, fewer rounds")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is given; a whole number of at least 1 is needed")
    return int(text)


def probability(text: str) -> float:
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text} is given; a number p with 0 <= p < 1 is needed")


class Demo:
    """The phases, in their order; each adds to `results`, which report.json holds."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.effort = QUICK if options.quick else Effort()
        if options.steps:
            self.effort = dataclasses.replace(self.effort, steps=options.steps, seconds=float("inf"))
        self.device = torch.device(machine.device())
        self.started = time.perf_counter()
        self.checks: list[Check] = []
        self.results = {"machine": machine.describe(), "settings": self.settings()}

    def settings(self) -> dict:
        given = {name: getattr(self.options, name) for name in ("rank", "dropout", "length", "rows", "quick")}
        return given | {"lora_alpha": 2 * self.options.rank, "learning_rate": LEARNING_RATE}

    def run(self) -> int:
        torch.manual_seed(0)
        self.results["machine"]["title"] = machine.title(self.results["machine"])
        print(f"pyfastpeft's demo on {self.results['machine']['title']}")
        given = texts.files(self.options.data)  # misuse shows before anything is trained
        self.base_model()
        self.adapters(given)
        self.compare_with_peft()
        self.adapt()
        self.save_and_reload()
        self.serve()
        self.measure_training()
        return self.finish()

    def phase(self, title: str, why: str) -> None:
        print(f"\n[{time.perf_counter() - self.started:4.0f} s] {title}\n  {why}", flush=True)

    def check(self, *found: Check) -> None:
        for check in found:
            self.checks.append(check)
            verdict = "ok    " if check.passed else "FAILED"
            print(
                f"  {verdict} {check.name}: {check.measured:.2e} (limit {check.limit:.0e}): {check.meaning}", flush=True
            )
