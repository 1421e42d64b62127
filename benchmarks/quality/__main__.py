"""Compare methods on real data, with the same seeds, data order and budget for all.

    python -m benchmarks.quality --model DIR --task e2e_nlg --data DIR
    python -m benchmarks.quality --encoder small --task sst2 --data DIR
    python -m benchmarks.quality --model DIR --task own --train FILE --text COLUMN --target COLUMN --kind generation

Several tasks (--task sst2,rte) are mixed into one training set of a generative model. Writes results.json, results.md
and results.png. With --sweep it compares learning rates instead, on training rows held out, and prints the best.
"""

import argparse
import json
import os
import random
import shlex
import statistics
import sys
import warnings
from pathlib import Path

import torch
import transformers

from benchmarks import Misuse, machine

from . import learners, metrics, report
from .learners import Dataset
from .methods import METHODS, PROMPTING, known
from .tasks import KINDS, TASKS, hold_out, own_task
from .train import Budget, Learner, prompted, trained

GRID = (0.1, 10**-0.5, 1.0, 10**0.5, 10.0)  # times a method's learning rate, in a sweep


def parse(arguments: list[str] | None) -> argparse.Namespace:
    text, epilog = __doc__.split("\n\n", 1)
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m benchmarks.quality", None, text, epilog, formatter_class=layout)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--model", type=Path, metavar="DIR", help="a transformers model of texts, of any kind")
    where.add_argument("--encoder", choices=["small"], help="an encoder trained from scratch on the task's own texts")
    parser.add_argument("--task", required=True, help=f"of {', '.join(TASKS)}, own; several with commas")
    parser.add_argument("--data", type=Path, help="a directory with the task's files, or with one such for each task")
    own = parser.add_argument_group("a task of one's own (.jsonl, .tsv, .csv)")
    own.add_argument("--train", type=Path, metavar="FILE")
    own.add_argument("--validation", type=Path, metavar="FILE", help="default: an eighth of the training rows")
    own.add_argument("--text", metavar="COLUMN,...", help="one or two columns to read")
    own.add_argument("--target", metavar="COLUMN", help="the column to predict")
    own.add_argument("--kind", choices=KINDS, default="classification")
    own.add_argument("--prompt", help="a template with {COLUMN} in it (default: the columns, line by line)")
    parser.add_argument("--methods", help=f"with commas (default: all that suit): {', '.join(METHODS | PROMPTING)}")
    rates_help = "METHOD=RATE,...: learning rates in place of those in methods.py"
    parser.add_argument("--lr", type=rates, default={}, metavar="RATES", help=rates_help)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120, help="of each training (default: %(default)s)")
    parser.add_argument("--seconds", type=float, help="of each training at most")
    parser.add_argument("--batch", type=int, default=8, help="rows of a step (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="training rows of each task at most")
    parser.add_argument("--evaluate", type=int, default=64, help="validation rows at most (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens at most (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=80, help="generated at most (default: %(default)s)")
    parser.add_argument("--shots", type=int, default=3, help="solved examples of few-shot prompts, as many as fit")
    parser.add_argument("--pretrain", type=int, default=1000, help="steps of --encoder small (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="compare learning rates on held-out training rows")
    parser.add_argument("--out", type=Path, help="directory to write (default: build/quality/<task>)")
    options = parser.parse_args(arguments)
    counts = ("seeds", "steps", "batch", "evaluate", "length", "new_tokens", "shots", "pretrain", "threads", "rows")
    for name in counts:
        given = getattr(options, name)
        if given is not None and given < 1:
            parser.error(f"argument --{name.replace('_', '-')}: {given} is given; at least 1 is needed")
    if options.seconds is not None and options.seconds <= 0:
        parser.error(f"argument --seconds: {options.seconds} is given; more than 0 are needed")
    return options


def rates(text: str) -> dict[str, float]:
    """METHOD=RATE,... as a dict."""
    found = {name: float(rate) for name, _, rate in (each.partition("=") for each in text.split(","))}
    for name, rate in found.items():
        if name not in METHODS or not rate > 0:
            raise argparse.ArgumentTypeError(f"{name}={rate:g} is given; a known method and more than 0 are needed")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Returns 0, or 2 if what was asked for cannot be done."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts memory, announces itself
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(options.threads)
    given = [Path(each).name if Path(each).is_absolute() else each for each in arguments or sys.argv[1:]]
    command = shlex.join(["python", "-m", "benchmarks.quality", *given])
    try:
        datasets = load_datasets(options)
        learner = load_learner(options, datasets)
        names = known(options.methods and options.methods.split(","), learner, [each.task for each in datasets])
        if options.sweep:
            sweep(options, learner, datasets, names)
        else:
            compare(options, learner, datasets, names, command)
    except Misuse as error:
        print(f"quality: error: {error}", file=sys.stderr)
        return 2
    return 0


def load_datasets(options: argparse.Namespace) -> list[Dataset]:
    """The tasks with their rows, in an order of their own, cut to what is asked for."""
    found = []
    for name in options.task.split(","):
        if name == "own":
            task, training, validation = _own(options)
        elif name not in TASKS:
            raise Misuse(f"--task names {name!r}; known are {', '.join(TASKS)}, own")
        elif options.data is None:
            raise Misuse(f"--task {name} needs --data, a directory with its files")
        else:
            task = TASKS[name]
            training, validation = task.load(options.data)
        validated = {task.prompt(row) for row in validation}
        training = [row for row in training if task.prompt(row) not in validated]
        if not training:
            raise Misuse(f"{task.name} has no training row with a prompt that no validation row has")
        if options.sweep:
            training, validation = hold_out(training, task)
        for rows in (training, validation):
            random.Random(0).shuffle(rows)
        found.append(Dataset(task, training[: options.rows], validation[: options.evaluate]))
    return found


def _own(options):
    missing = [name for name in ("train", "text", "target") if getattr(options, name) is None]
    if missing:
        raise Misuse(f"--task own needs {', '.join(f'--{name}' for name in missing)}")
    task = own_task(options.kind, options.text.split(","), options.target, options.prompt, options.train)
    training = task.rows([options.train])
    if options.validation is None:
        return task, *hold_out(training, task)
    return task, training, task.rows([options.validation], grouped=True)


def load_learner(options: argparse.Namespace, datasets: list[Dataset]) -> Learner:
    if options.encoder:
        learner = learners.small_encoder(datasets, options.pretrain)
    else:
        learner = learners.load(options.model, datasets, options.length, options.new_tokens)
    learner.model.to(machine.device())
    return learner


def compare(options, learner: Learner, datasets: list[Dataset], names: list[str], command: str) -> None:
    """Run every method with every seed; write results.json after each, and the report and the plot at the end."""
    out = options.out or Path("build", "quality", options.task)
    out.mkdir(parents=True, exist_ok=True)
    budget = Budget(options.steps, options.batch, options.seconds or float("inf"), options.shots)
    results = {
        "machine_info": machine.describe(),
        "settings": {
            "command": command,
            "model": options.model.name if options.model else "small encoder from scratch",
            "seeds": list(range(options.seeds)),
            **{name: getattr(options, name) for name in ("steps", "seconds", "batch", "shots", "length", "new_tokens")},
        },
        "tasks": {
            each.task.name: {
                "loss_before": learner.loss(each.task, each.validation),
                "training": len(each.training),
                "validation": len(each.validation),
                "most_frequent": most_frequent(each),
            }
            for each in datasets
        },
        "runs": [],
    }
    for name in names:
        for seed in range(options.seeds):
            if name in PROMPTING:
                if name == "zero-shot" and seed:  # nothing in it is random
                    continue
                record = prompted(name, learner, datasets, budget, seed)
            else:
                record = trained(name, learner, datasets, budget, seed, options.lr.get(name))
            results["runs"].append(record)
            (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
            losses = ", ".join(f"{task} {found['loss']:.3f}" for task, found in record["tasks"].items())
            print(f"{name}, seed {seed}: {losses}", flush=True)
    text = report.markdown(results)
    (out / "results.md").write_text(text + "\n")
    report.plot(results, out / "results.png")
    print(f"\n{text}\n\nWritten: {out / 'results.json'}, results.md, results.png")


def most_frequent(dataset: Dataset) -> dict | None:
    """The most frequent class of the training rows, and what is measured if that is always the answer."""
    task = dataset.task
    if task.kind != "classification":
        return None
    answer = statistics.mode(row["target"] for row in dataset.training)
    targets = [row["target"] for row in dataset.validation]
    measured = metrics.measure(task.measured, [answer] * len(targets), targets)
    return {"answer": task.choices[answer], "measured": measured}


def sweep(options, learner: Learner, datasets: list[Dataset], names: list[str]) -> None:
    """For every method the loss on held-out training rows at each learning rate of the grid; the best is marked."""
    budget = Budget(options.steps, options.batch, options.seconds or float("inf"), options.shots)
    for name in names:
        if name in PROMPTING:
            continue
        losses = {}
        for factor in GRID:
            lr = options.lr.get(name, METHODS[name].rate(learner.family)) * factor
            runs = [trained(name, learner, datasets, budget, seed, lr, measured=False) for seed in range(options.seeds)]
            found = [task["loss"] for run in runs for task in run["tasks"].values()]
            losses[lr] = sum(found) / len(found)
        best = min(losses, key=lambda lr: (losses[lr] != losses[lr], losses[lr]))
        cells = (f"{'*' if lr == best else ''}{lr:.2g}: {loss:.3f}" for lr, loss in losses.items())
        print(f"{name}: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
