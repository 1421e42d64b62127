"""Turns results of `python -m benchmarks.quality` into Markdown and a plot.

python -m benchmarks.quality.report RESULTS.json ... [--into NOTES.md] [--plot FILE.png]
"""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from benchmarks.machine import title
from benchmarks.report import grid, insert

from .metrics import NOTES

PROMPTING = ("zero-shot", "one-shot", "few-shot")
COMPARED = ("full", "LoRA", "Houlsby")  # whose loss reductions are to be alike
ALIKE = 0.15
COST = {"trainable": "trainable parameters", "memory": "peak memory, MB", "seconds_per_step": "time per step, ms"}


def by_method(results: dict) -> dict[str, list[dict]]:
    """method -> its records, one for each seed."""
    found = {}
    for record in results["runs"]:
        found.setdefault(record["method"], []).append(record)
    return found


def measures(results: dict, task: str) -> list[str]:
    """What was measured on a task: loss, perplexity where there is one, then metrics."""
    found = dict.fromkeys(name for record in results["runs"] for name in record["tasks"][task])
    return [name for name in ("loss", "perplexity") if name in found] + [
        name for name in found if name not in ("loss", "perplexity")
    ]


def mean_and_deviation(values: list[float]) -> str:
    """Mean and, of several, sample deviation."""
    mean = statistics.mean(values)
    return f"{mean:.3g}" if len(values) == 1 else f"{mean:.3g} ± {statistics.stdev(values):.2g}"


def markdown(results: dict) -> str:
    settings = results["settings"]
    parts = [
        f"**{settings['model']}: {', '.join(results['tasks'])}**. Measured on {title(results['machine_info'])}.",
        f"`{settings['command']}`",
        (
            f"Seeds {', '.join(map(str, settings['seeds']))}; "
            f"at most {settings['steps']} steps of {settings['batch']} rows"
            f"{_seconds(settings)}; the same batches in the same order for every method. "
            "Mean ± standard deviation over the seeds."
        ),
    ]
    for task, about in results["tasks"].items():
        names = measures(results, task)
        head = ["method", "learning rate", *COST.values(), "validation loss before", *_after(names)]
        rows = [_row(method, runs, task, names, about["loss_before"]) for method, runs in by_method(results).items()]
        sizes = f"{about['training']} training rows, {about['validation']} validation rows"
        sources = "; ".join(f"{name}: {NOTES[name]}" for name in names if name in NOTES)
        parts += [f"{task} ({sizes})", grid([head, *rows])]
        if always := about.get("most_frequent"):
            values = ", ".join(f"{name} {value:.3g}" for name, value in always["measured"].items())
            parts.append(f"Always '{always['answer']}', the most frequent answer of the training rows: {values}.")
        parts.append(f"Metrics: {sources}.")
    parts.append("\n".join(f"- {'yes' if holds else '**no**'}: {text}" for text, holds in verdicts(results)))
    return "\n\n".join(parts)


def _seconds(settings):
    return f" and {settings['seconds']:g} s" if settings["seconds"] else ""


def _after(names):
    return ["after" if name == "loss" else name for name in names]


def _row(method, runs, task, names, before):
    rate = f"{runs[0]['lr']:g}" if "lr" in runs[0] else "-"
    cost = [f"{runs[0]['trainable']:,}", *["-"] * 2]
    if "memory" in runs[0]:
        memory, seconds = ([run[key] for run in runs] for key in ("memory", "seconds_per_step"))
        cost[1:] = f"{statistics.mean(memory) / 1e6:.3g}", f"{statistics.median(seconds) * 1e3:.3g}"
    values = [mean_and_deviation([run["tasks"][task][name] for run in runs]) for name in names]
    return [method, rate, *cost, f"{before:.3g}", *values]


def _verdict(text: str, found: list[tuple[str, int, float, bool]]) -> tuple[str, bool]:
    """The text, with those runs of (method, seed, value, whether it holds) of which it does not, and whether it holds
    of all."""
    worse = {}
    for method, seed, value, holds in found:
        if not holds:
            worse.setdefault(method, []).append(f"seed {seed}: {value:.3g}")
    told = ", ".join(f"{method} ({', '.join(seeds)})" for method, seeds in worse.items())
    if worse:
        text += f"; not so {told}" if any(holds for *_, holds in found) else "; so in no run"
    return text, not worse


def verdicts(results: dict) -> Iterator[tuple[str, bool]]:
    """What must hold on every task, with its figures, and whether it does."""
    methods = by_method(results)
    trained = {name: runs for name, runs in methods.items() if name not in PROMPTING}
    for task, about in results["tasks"].items():
        limits = {"the unadapted model": lambda seed, before=about["loss_before"]: before}
        for name in PROMPTING[1:]:
            losses = {run["seed"]: run["tasks"][task]["loss"] for run in methods.get(name, [])}
            if losses:
                limits[f"{name} prompting"] = losses.get
        runs = [(method, run["seed"], run["tasks"][task]) for method, runs in trained.items() for run in runs]
        for what, limit in limits.items():
            text = f"{task}: every method, every seed, ends with a lower validation loss than {what}"
            yield _verdict(text, [(name, seed, got["loss"], got["loss"] < limit(seed)) for name, seed, got in runs])
        if always := about.get("most_frequent"):
            metric, least = next(iter(always["measured"].items()))
            text = f"{task}: every method, every seed, ends with a higher {metric} than the most frequent answer"
            yield _verdict(text, [(name, seed, got[metric], got[metric] > least) for name, seed, got in runs])
        drops = {
            name: about["loss_before"] - statistics.mean(run["tasks"][task]["loss"] for run in trained[name])
            for name in COMPARED
            if name in trained
        }
        if len(drops) == len(COMPARED):
            alike = min(drops.values()) >= (1 - ALIKE) * max(drops.values())
            figures = ", ".join(f"{name} {drop:.3g}" for name, drop in drops.items())
            yield f"{task}: loss reductions within {ALIKE:.0%} of one another: {figures}", alike


# --- plot ------------------------------------------------------------------------------------------------------------


def plot(results: dict, path: Path) -> None:
    """For every task a row of panels, one for each measure: a line for each method, a dot for each seed, a mark at the
    mean; lines across: the unadapted model's loss, the prompted model's values and the most frequent answer's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    methods = by_method(results)
    trained = {name: runs for name, runs in methods.items() if name not in PROMPTING}
    trained = dict(sorted(trained.items(), key=lambda item: -item[1][0]["trainable"]))
    tasks = {
        task: [name for name in measures(results, task) if name != "perplexity"]  # which tells what the loss tells
        for task in results["tasks"]
    }
    columns = max(map(len, tasks.values()))
    size = 2.2 + 1.9 * columns, len(tasks) * (0.27 * len(trained) + 0.9) + 0.8
    figure = plt.figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tasks), columns, squeeze=False, sharey=True)
    colours = dict(zip(PROMPTING, ("#8c8c8c", "#c7a76c", "#7f9fbf")))
    for line, (task, names) in zip(panels, tasks.items()):
        for panel in line[len(names) :]:
            panel.set_visible(False)
        for panel, name in zip(line, names):
            for place, runs in enumerate(trained.values()):
                values = [run["tasks"][task][name] for run in runs]
                panel.axhspan(place - 0.5, place + 0.5, color="#f4f4f4" if place % 2 else "white", zorder=0)
                panel.plot(values, [place] * len(values), "o", color="#d1495b", alpha=0.45, markersize=4, zorder=3)
                panel.plot(statistics.mean(values), place, "|", color="#d1495b", markersize=11, zorder=4)
            for prompting in PROMPTING:
                values = [run["tasks"][task][name] for run in methods.get(prompting, [])]
                if values:
                    panel.axvline(statistics.mean(values), color=colours[prompting], linewidth=1.1, zorder=2)
            if name == "loss" and not set(PROMPTING) & set(methods):
                panel.axvline(results["tasks"][task]["loss_before"], color="black", linewidth=0.8, zorder=2)
            always = results["tasks"][task].get("most_frequent")
            if always and name in always["measured"]:
                panel.axvline(always["measured"][name], color="black", linewidth=0.8, linestyle=":", zorder=2)
            panel.set_title(f"validation {name}" if name == "loss" else name, fontsize=9)
            panel.tick_params(labelsize=7)
            panel.tick_params(axis="y", length=0)
            panel.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=1)
            panel.spines[["top", "right", "left"]].set_visible(False)
        labels = [f"{name}  {runs[0]['trainable']:,}" for name, runs in trained.items()]
        line[0].set_yticks(range(len(labels)), labels, fontsize=8)
        line[0].set_ylim(len(labels) - 0.5, -0.5)
        line[0].set_ylabel(task, fontsize=9, fontweight="bold")
    handles = [Line2D([], [], color="#d1495b", marker="o", linestyle="", label="a seed (|: mean), parameters trained")]
    shown = [name for name in PROMPTING if name in methods]
    handles += [Line2D([], [], color=colours[name], label=name) for name in shown]
    if not shown:
        handles.append(Line2D([], [], color="black", label="unadapted"))
    if any(about.get("most_frequent") for about in results["tasks"].values()):
        handles.append(Line2D([], [], color="black", linestyle=":", label="most frequent answer"))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="a Markdown file with the markers of benchmarks.report")
    parser.add_argument("--plot", type=Path, help="draw the first of the results")
    options = parser.parse_args(arguments)
    loaded = [json.loads(path.read_text()) for path in options.results]
    text = "\n\n".join(map(markdown, loaded))
    if options.into:
        options.into.write_text(insert(options.into.read_text(), text))
    else:
        print(text)
    if options.plot:
        plot(loaded[0], options.plot)


if __name__ == "__main__":
    main()
