"""Train a small transformer or take a given one; adapt it with fused LoRA and IA3; check, serve, measure and report."""

import argparse
import copy
import dataclasses
import math
import os
import resource
import sys
import time
import warnings
from functools import partial
from itertools import islice
from pathlib import Path

import torch
import transformers
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as IA3_LAYERS
from torch import nn
from transformers.pytorch_utils import Conv1D

import pyfastpeft
from benchmarks import Misuse, machine
from benchmarks.measure import twin
from pyfastpeft.ops import dispatch

from . import checks, measure, report, texts
from .checks import Check, fused
from .model import base_optimizers, byte_tokenizer, held_out_loss, load, small_llama, train


@dataclasses.dataclass(frozen=True)
class Effort:
    """Whatever is counted in steps or rounds ends early where its seconds are over: a slow machine does less."""

    packages: int = len(texts.PACKAGES)  # of the standard library, adapted to where no text is given
    base_steps: int = 1000
    base_seconds: float = 45
    steps: int = 100  # of each adapter
    seconds: float = 5
    checked_steps: int = 12
    checked_seconds: float = 5
    rounds: int = 15  # of each measurement
    measured_seconds: float = 5
    rows_of_each: int = 4  # adapter, in the mixed batch
    new_tokens: int = 24  # generated for each of its rows


QUICK = Effort(
    packages=2,
    base_steps=60,  # seconds that a busy machine has, too: with fewer steps adapters may not learn
    base_seconds=60,
    steps=30,
    seconds=30,
    checked_steps=4,
    checked_seconds=2,
    rounds=4,
    measured_seconds=1,
    rows_of_each=2,
    new_tokens=6,
)


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
    parser.add_argument("--rank", type=int, default=16, help="of LoRA (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.05, help="of LoRA (default: %(default)s)")
    parser.add_argument("--lr", type=float, help="of LoRA, a tenth of IA3's (default: 1e-3; for the demo's model 6e-3)")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of each adapter (default: as many as some seconds allow)")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the short form: less training, fewer rounds")
    options = parser.parse_args(arguments)
    for name in ("rank", "length", "rows", "steps"):
        given = getattr(options, name)
        if given is not None and given < 1:
            parser.error(f"argument --{name}: {given} is given; at least 1 is needed")
    if not 0 <= options.dropout < 1:
        parser.error(f"argument --dropout: {options.dropout} is given; a probability below 1 is needed")
    if options.lr is None:
        options.lr = 1e-3 if options.model else 6e-3
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Returns 0 if every check passed, 1 if one failed, 2 if what was asked for cannot be done."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, announces itself
    warnings.filterwarnings("ignore", category=FutureWarning)
    try:
        return Demo(options).run()
    except Misuse as error:
        print(f"demo: error: {error}", file=sys.stderr)
        return 2


class Demo:
    """The phases in their order. `results` is what report.json will hold."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.effort = QUICK if options.quick else Effort()
        if options.steps:
            self.effort = dataclasses.replace(self.effort, steps=options.steps, seconds=math.inf)
        self.rates = {"LoRA": options.lr, "IA3": 10 * options.lr}
        self.device = torch.device(machine.device())
        self.started = time.perf_counter()
        self.checks: list[Check] = []
        described = machine.describe()
        self.results = {
            "machine": described | {"title": machine.title(described)},
            "backend": dispatch.select("lora_forward", (torch.empty(1, 1, device=self.device),)).backend,
            "settings": {name: getattr(options, name) for name in ("rank", "dropout", "lr", "length", "rows", "quick")},
            "adapters": [],
            "training": [],
        }

    def run(self) -> int:
        torch.manual_seed(0)
        print(f"pyfastpeft's {self.results['backend']} backend on {self.results['machine']['title']}")
        self.open()
        if self.options.model is None:
            self.train_base()
        self.wrap_base()
        self.compare_with_peft()
        self.adapt()
        self.save_and_reload()
        self.serve()
        self.measure_training()
        return self.finish()

    def phase(self, title: str, what: str) -> None:
        print(f"\n[{time.perf_counter() - self.started:3.0f} s] {title}\n  {what}", flush=True)

    def check(self, *found: Check) -> None:
        self.checks += found
        for check in found:
            verdict = "ok" if check.passed else "FAILED"
            figures = f"{check.measured:8.3g} <= {check.limit:<6.3g}"
            print(f"  {verdict:6} {check.name:25} {figures}  {check.meaning}", flush=True)

    def open(self) -> None:
        """The model, trained or not, and the texts. What cannot be used is reported before time is spent."""
        options, path = self.options, self.options.model
        given = texts.files(options.data) or texts.package_texts(self.effort.packages)
        if path is None:
            self.tokenizer = byte_tokenizer()
            base = small_llama(self.tokenizer)
        else:
            base, self.tokenizer = load(path, options.length)
        self.base = base.to(self.device).requires_grad_(path is None)
        self.parts = {name: texts.part(name, text, self.tokenizer, options.length) for name, text in given.items()}
        self.targets = targets(base, options.target)
        size = sum(parameter.numel() for parameter in base.parameters())
        name = path or str(options.out / "base")
        print(f"model: {name}, {type(base).__name__} of {size / 1e6:.1f} million parameters, float32, on {self.device}")
        print("texts: " + ", ".join(f"{name} ({len(p.training):,} tokens)" for name, p in self.parts.items()))
        self.results["base"] = {"name": name, "type": type(base).__name__, "parameters": size}

    def train_base(self) -> None:
        packages, effort, folder = ", ".join(texts.PACKAGES), self.effort, self.options.out / "base"
        self.phase("Base model", f"The byte-level Llama learns the standard library's Python, without {packages}.")
        corpus = texts.part("standard library", texts.base_text(), self.tokenizer, self.options.length)
        batches = corpus.batches(self.options.rows)
        losses = train(
            self.base, base_optimizers(self.base), batches, effort.base_steps, effort.base_seconds, "training"
        )
        loss = held_out_loss(self.base, corpus, self.options.rows)
        print(f"  {len(losses)} steps; loss on held-out text {loss:.3f} nats a byte, at random {math.log(256):.3f}")
        self.base.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        # From disk, as PEFT's checkpoints name the place of their base model.
        self.base = load(str(folder), self.options.length)[0].to(self.device).requires_grad_(False)
        self.results["base"] |= {"losses": losses, "held_out_loss": loss}

    def wrap_base(self) -> None:
        """One model for LoRA and one for IA3, each with an untrained adapter for every text."""
        lora = LoraConfig(
            task_type="CAUSAL_LM",
            r=self.options.rank,
            lora_alpha=2 * self.options.rank,
            lora_dropout=self.options.dropout,
            target_modules=self.targets,
        )
        self.models = {"LoRA": self.wrap(lora)}
        if self.base.config.model_type in IA3_LAYERS:
            self.models["IA3"] = self.wrap(IA3Config(task_type="CAUSAL_LM"))
        else:
            print(f"no IA3: PEFT names no layers for it in models of type {self.base.config.model_type!r}")

    def wrap(self, config: PeftConfig) -> PeftModel:
        first, *others = self.parts
        wrapped = get_peft_model(twin(self.base), config, first)
        for name in others:
            wrapped.add_adapter(name, config)
        return wrapped.eval()

    def compare_with_peft(self) -> None:
        first, part = next(iter(self.parts.items()))
        self.phase("Check against PEFT", f"From the same start on the same batches of {first}, dropout off.")
        batches = part.batches(self.options.rows, seed=1)
        batches = [ids.to(self.device) for ids in islice(batches, self.effort.checked_steps)]
        self.results["curves"] = {}
        for method, model in self.models.items():
            accelerated = pyfastpeft.accelerate(model)
            pyfastpeft.restore(model)
            print("  " + str(accelerated).replace("\n", "\n  "))
            start = checks.trainable(model)
            self.check(checks.fused_path(method, model, batches[0]))
            rate, seconds = self.rates[method], self.effort.checked_seconds
            check, self.results["curves"][method] = checks.loss_curves(method, model, batches, rate, seconds)
            self.check(check, checks.gradients(method, model, batches[0]))
            checks.restart(model, start)

    def adapt(self) -> None:
        self.phase("Adapt, fused", f"{' and '.join(self.models)} for each of {', '.join(self.parts)}.")
        rows, effort = self.options.rows, self.effort
        for name, part in self.parts.items():
            before = held_out_loss(self.base, part, rows)
            for method, model in self.models.items():
                model.set_adapter(name)
                parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
                optimizer = torch.optim.AdamW(parameters, lr=self.rates[method], weight_decay=0.0)
                start = time.perf_counter()
                with fused(model):
                    batches = part.batches(rows)
                    losses = train(model, [optimizer], batches, effort.steps, effort.seconds, f"{method} {name}")
                    seconds = time.perf_counter() - start
                    after = held_out_loss(model, part, rows)
                self.check(checks.adaptation(f"{method} {name}", before, after))
                self.results["adapters"].append(
                    {
                        "method": method,
                        "part": name,
                        "parameters": sum(parameter.numel() for parameter in parameters),
                        "steps": len(losses),
                        "seconds": seconds,
                        "losses": losses,
                        "held_out_loss_before": before,
                        "held_out_loss": after,
                    }
                )

    def save_and_reload(self) -> None:
        self.phase("Save and reload", "Every adapter goes to disk in PEFT's format; PEFT reads it into a new model.")
        for method, model in self.models.items():
            folder = self.options.out / method.lower()
            model.save_pretrained(folder, selected_adapters=list(self.parts))
            inputs = {name: part.held_out[:2].to(self.device) for name, part in self.parts.items()}
            self.check(checks.reloaded(method, model, self.base, folder, inputs))

    def serve(self) -> None:
        model, effort = self.models["LoRA"], self.effort
        names = ["__base__", *self.parts] * effort.rows_of_each
        adapters = list(dict.fromkeys(names))
        self.phase("Serve a mixed batch", f"{len(names)} rows in one batch, in turn through {', '.join(adapters)}.")
        texts_of = [self.parts.get(name, next(iter(self.parts.values()))).held_out for name in names]
        ids = torch.stack([rows[i % len(rows)] for i, rows in enumerate(texts_of)]).to(self.device)
        self.check(*checks.mixed_batch(model, ids, names))
        self.results["samples"] = self.samples(model)
        for sample in self.results["samples"][:2]:
            print(f"  {sample['adapter']}: {sample['prompt']!r} -> {sample['continued']!r}")
        self.results["serving"] = {
            "rows": len(names),
            "length": ids.shape[1],
            "new_tokens": effort.new_tokens,
            "adapters": adapters,
            "phases": measure.serving(
                self.base, model, ids, names, effort.new_tokens, effort.rounds, effort.measured_seconds
            ),
        }

    def samples(self, model: PeftModel) -> list[dict]:
        """Held-out text of every part, continued by the base model and by the part's adapter, in one mixed batch."""
        length = self.options.length // 2
        names = [name for part in self.parts for name in ("__base__", part)]
        prompts = [part.held_out[len(part.held_out) // 2, :length] for part in self.parts.values() for _ in range(2)]
        with fused(model):
            ids = torch.stack(prompts).to(self.device)
            ids = measure.generate(model, ids, 64, adapter_names=names, do_sample=True, temperature=0.6)
        decode = partial(self.tokenizer.batch_decode, skip_special_tokens=True)
        return [
            {"adapter": name.replace("__base__", "base model"), "prompt": prompt, "continued": continued}
            for name, prompt, continued in zip(names, decode(ids[:, :length]), decode(ids[:, length:]))
        ]

    def measure_training(self) -> None:
        effort, (name, part) = self.effort, next(iter(self.parts.items()))
        self.phase(
            "Measure a training step",
            "In turns: PEFT, PEFT accelerated, and the bare base model (forward and backward to its embeddings).",
        )
        ids = next(part.batches(self.options.rows)).to(self.device)
        half = copy.deepcopy(self.base)
        for parameter in half.parameters():  # buffers keep their dtype, as they do when a model is loaded in bfloat16
            parameter.data = parameter.data.bfloat16()
        folder = self.options.out / "lora" / name
        lora = PeftModel.from_pretrained(twin(half), folder, name, is_trainable=True)
        # CPUs without bfloat16 instructions take seconds for what float32 takes milliseconds.
        few = ids if self.device.type == "cuda" else ids[: max(1, self.options.rows // 4)]
        cases = [(method, self.base, model, ids) for method, model in self.models.items()] + [("LoRA", half, lora, few)]
        for method, base, model, ids in cases:
            dtype = str(base.dtype).removeprefix("torch.")
            label = f"{method}, {dtype}"
            model.set_adapter(name)
            if dtype == "bfloat16":
                self.check(checks.gradients(label, model.eval(), ids))
            self.results["training"].append(
                {
                    "method": method,
                    "base_dtype": dtype,
                    "adapter_dtype": "float32",
                    "rows": len(ids),
                    "length": ids.shape[1],
                    "contenders": measure.training(base, model, ids, effort.rounds, effort.measured_seconds, label),
                }
            )

    def finish(self) -> int:
        failed = [check.name for check in self.checks if not check.passed]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.results |= {
            "checks": [dataclasses.asdict(check) | {"passed": check.passed} for check in self.checks],
            "passed": not failed,
            "seconds": time.perf_counter() - self.started,
            "peak_resident_bytes": peak * (1 if sys.platform == "darwin" else 1024),
        }
        report.write(self.results, self.options.out)
        print("\n" + report.summary(self.results))
        print(f"\nReport: {self.options.out / 'report.html'} and report.json")
        if failed:
            print(f"demo: error: checks failed: {'; '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0


def targets(base: nn.Module, given: list[str] | None) -> list[str] | str:
    """The layers for LoRA. Raises Misuse for a name that no linear layer bears."""
    linear = [name for name, module in base.named_modules() if isinstance(module, (nn.Linear, Conv1D))]
    for target in given or ():
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise Misuse(f"--target {target}: no linear layer has this name; the model has {known}")
    return given or "all-linear"


if __name__ == "__main__":
    sys.exit(main())
