"""report.json, and report.html: one page without outside parts, its plots inline, in light and dark."""

import html
import io
import json
import re
import statistics
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pyfastpeft.methods import tables

NAMES = {
    "base": "bare base model",
    "peft": "PEFT",
    "one at a time": "pyfastpeft, one adapter at a time",
    "ours": "pyfastpeft",
}
# What matplotlib draws in these colours takes the page's.
COLOURS = {"ink": "#010101", "faint": "#020202", "base": "#030303", "peft": "#040404", "ours": "#050505"}
COLOURS["one at a time"] = "#060606"
METHODS = {"LoRA": ("ours", "o"), "IA3": ("one at a time", "D")}  # colour and mark
SMOOTHED = 10  # steps


def write(results: dict, folder: Path) -> None:
    """report.json and report.html into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    results = {"headline": headline(results)} | results
    (folder / "report.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    (folder / "report.html").write_text(page(results), encoding="utf-8")


def headline(results: dict) -> str:
    """The result in figures, whichever way they fell."""
    case, serving = results["training"][0], results["serving"]
    ms = {name: 1e3 * found["seconds"]["median"] for name, found in case["contenders"].items()}
    mb = {name: found["saved_bytes"] / 1e6 for name, found in case["contenders"].items()}
    rate = {name: found["tokens_per_s"] for name, found in serving["phases"]["decode"].items()}
    return (
        f"A LoRA training step takes {ms['ours']:.0f} ms with pyfastpeft, {ms['peft']:.0f} ms with PEFT and "
        f"{ms['base']:.0f} ms on the bare base model, and keeps {mb['ours']:.0f} MB for its backward pass instead of "
        f"PEFT's {mb['peft']:.0f} MB. A batch mixed of {len(serving['adapters']) - 1} adapters and the base model "
        f"generates {rate['ours']:,.0f} tokens/s, with PEFT {rate['peft']:,.0f}. {verdict(results)}"
    )


def verdict(results: dict) -> str:
    failed = [check["name"] for check in results["checks"] if not check["passed"]]
    count = len(results["checks"])
    return f"{len(failed)} of {count} checks failed: {'; '.join(failed)}." if failed else f"All {count} checks passed."


# --- tables ----------------------------------------------------------------------------------------------------------


def training_table(results: dict) -> list[list[str]]:
    table = [["LoRA or IA3, base dtype", "", "ms a step", "20-80 %", "ratio", "tokens/s", "saved MB", "peak MB"]]
    for case in results["training"]:
        for name, found in case["contenders"].items():
            table.append(
                [
                    f"{title(case)}, {case['rows']} rows of {case['length']}" if name == "base" else "",
                    NAMES[name],
                    *times(found),
                    f"{found['saved_bytes'] / 1e6:.1f}",
                    f"{found['peak_bytes'] / 1e6:.1f}",
                ]
            )
    return table


def serving_table(results: dict) -> list[list[str]]:
    serving = results["serving"]
    table = [
        [
            f"{serving['rows']} rows, {len(serving['adapters']) - 1} adapters and none",
            "",
            "ms",
            "20-80 %",
            "ratio",
            "tokens/s",
        ]
    ]
    for phase, contenders in serving["phases"].items():
        for name, found in contenders.items():
            table.append([phase if name == "base" else "", NAMES[name], *times(found)])
    return table


def times(found: dict) -> list[str]:
    low, middle, high = (1e3 * found["seconds"][point] for point in ("p20", "median", "p80"))
    return [
        f"{middle:.1f}",
        f"{low:.1f}-{high:.1f}",
        f"{found['ratio']['median']:.2f}",
        f"{found['tokens_per_s']:,.0f}",
    ]


def title(case: dict) -> str:
    return f"{case['method']}, {case['base_dtype']}"


def adapters_table(results: dict) -> list[list[str]]:
    table = [["Text", "", "parameters", "steps", "seconds", "loss before", "loss after", "change"]]
    return table + [
        [
            found["part"],
            found["method"],
            f"{found['parameters']:,}",
            str(found["steps"]),
            f"{found['seconds']:.1f}",
            f"{found['held_out_loss_before']:.3f}",
            f"{found['held_out_loss']:.3f}",
            f"{100 * (found['held_out_loss'] / found['held_out_loss_before'] - 1):+.1f} %",
        ]
        for found in results["adapters"]
    ]


def checks_table(results: dict) -> list[list[str]]:
    return [["Check", "", "measured", "limit", "meaning"]] + [
        [
            check["name"],
            "passed" if check["passed"] else "FAILED",
            f"{check['measured']:.3g}",
            f"{check['limit']:.3g}",
            check["meaning"],
        ]
        for check in results["checks"]
    ]


def summary(results: dict) -> str:
    """For the console."""
    found = adapters_table(results), training_table(results), serving_table(results)
    aligned = [tables.table(head, rows, right=range(2, len(head))) for head, *rows in found]
    return "\n\n".join([*aligned, headline(results)])


# --- plots -----------------------------------------------------------------------------------------------------------


def bars(panels: list[tuple[str, dict]], value, spread, unit: str, text: str) -> str:
    """A panel for each case, a bar for each of its contenders; `value` and `spread` read a contender's figures."""
    figure, axes = drawing(len(panels), 0.5 + 0.36 * len(panels[0][1]))
    for axis, (name, contenders) in zip(axes, panels):
        values = [value(found) for found in contenders.values()]
        axis.barh(range(len(values)), values, height=0.62, color=[COLOURS[each] for each in contenders])
        for row, (found, middle) in enumerate(zip(contenders.values(), values)):
            low, high = spread(found)
            if low < high:
                axis.plot((low, high), (row, row), color=COLOURS["ink"], linewidth=1)
            at = max(high, middle), row
            axis.annotate(f"{middle:,.0f}", at, xytext=(4, 0), textcoords="offset points", va="center")
        axis.set_yticks(range(len(values)), [NAMES[each] for each in contenders] if axis is axes[0] else [])
        axis.invert_yaxis()
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.set_xlim(0, 1.25 * max(spread(found)[1] for found in contenders.values()))
        axis.set_title(name, loc="left")
        axis.set_xlabel(unit)
        axis.tick_params(axis="y", length=0)
    return svg(figure, text)


def curves(panels: dict[str, list[tuple]], unit: str, text: str) -> str:
    """A panel for each title, of lines (label, values, colour, width)."""
    figure, axes = drawing(len(panels), 2.4)
    for axis, (name, lines) in zip(axes, panels.items()):
        for label, values, colour, width in lines:
            axis.plot(range(1, len(values) + 1), values, label=label, color=COLOURS[colour], linewidth=width)
        axis.set_title(name, loc="left")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    if len(panels[name]) > 1:
        axes[0].legend(frameon=False)
    axes[0].set_ylabel(unit)
    return svg(figure, text)


def smooth(losses: list[float]) -> list[float]:
    return [statistics.fmean(losses[max(0, step - SMOOTHED) : step]) for step in range(1, len(losses) + 1)]


def adaptation(results: dict) -> str:
    parts = list(dict.fromkeys(found["part"] for found in results["adapters"]))
    figure, (axis,) = drawing(1, 0.6 + 0.4 * len(parts))
    for row, part in enumerate(parts):
        found = {each["method"]: each["held_out_loss"] for each in results["adapters"] if each["part"] == part}
        before = next(each["held_out_loss_before"] for each in results["adapters"] if each["part"] == part)
        axis.plot((min(found.values()), before), (row, row), color=COLOURS["faint"], linewidth=1, zorder=0)
        axis.scatter(before, row, marker="|", s=120, color=COLOURS["ink"], label="" if row else "base model")
        for method, loss in found.items():
            colour, marker = METHODS[method]
            axis.scatter(loss, row, marker=marker, s=36, color=COLOURS[colour], label="" if row else f"with {method}")
    axis.set_yticks(range(len(parts)), parts)
    axis.invert_yaxis()
    axis.margins(y=0.3)
    axis.set_xlabel("held-out loss, nats per token (less is better)")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(
        figure, "Held-out loss of each text with the base model, with LoRA and with IA3; the figures stand below."
    )


def drawing(panels: int, height: float):
    """A figure and `panels` axes, at most four side by side; `height` of each row, in inches."""
    rows = (panels + 3) // 4
    figure = Figure(figsize=(9, height * rows), layout="constrained")
    axes = figure.subplots(rows, min(panels, 4), squeeze=False).flatten()
    for empty in axes[panels:]:
        empty.remove()
    return figure, axes[:panels]


STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), COLOURS["ink"]),
    **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), COLOURS["faint"]),
}


def svg(figure: Figure, text: str) -> str:
    """A figure as inline SVG in the page's fonts and colours; `text` says what it shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)  # names that would stand twice on the page; nothing refers to them
    drawn = re.sub(r'font: ([\d.]+px)[^;"]*', r"font-size: \1", drawn)
    for name, colour in COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name.replace(' ', '-')})")
    label = html.escape(text, quote=True)
    return re.sub(r'width="[^"]*" height="[^"]*"', "", drawn, count=1).replace(
        "<svg", f'<svg role="img" aria-label="{label}"', 1
    )


# --- page ------------------------------------------------------------------------------------------------------------


def page(results: dict) -> str:
    with matplotlib.rc_context(STYLE):
        body = "\n".join(sections(results))
    return PAGE.replace("{{title}}", "pyfastpeft: demo report").replace("{{body}}", body)


def sections(results: dict):
    base, settings, serving = results["base"], results["settings"], results["serving"]
    parts = list(dict.fromkeys(found["part"] for found in results["adapters"]))
    yield f"<h1>pyfastpeft on this machine</h1><p class=lead>{html.escape(headline(results))}</p>"
    yield paragraph(
        f"Measured on {results['machine']['title']}, with the {results['backend']} backend. "
        f"The model: {base['name']}, {base['type']} of "
        f"{base['parameters'] / 1e6:.1f} million parameters. LoRA of rank {settings['rank']} with dropout "
        f"{settings['dropout']}, adapters in float32. The demo took {results['seconds']:.0f} s and at most "
        f"{results['peak_resident_bytes'] / 1e9:.1f} GB of memory."
    )

    yield "<h2>A training step</h2>"
    panels = [(title(case), case["contenders"]) for case in results["training"]]
    yield chart(
        bars(
            panels,
            lambda found: 1e3 * found["seconds"]["median"],
            lambda found: (1e3 * found["seconds"]["p20"], 1e3 * found["seconds"]["p80"]),
            "ms a step (less is better)",
            "Time of a training step for each contender; the figures stand in the table below.",
        ),
        "Median time of a step, line: 20th to 80th percentile. Forward, backward and AdamW; on the bare base model, "
        "forward and backward to its input embeddings, which is what any adapter in all layers needs at least.",
    )
    yield chart(
        bars(
            panels,
            lambda found: found["saved_bytes"] / 1e6,
            lambda found: 2 * (found["saved_bytes"] / 1e6,),
            "MB kept (less is better)",
            "Memory kept for the backward pass by each contender; the figures stand in the table below.",
        ),
        "What the forward pass keeps for the backward pass, each tensor's memory counted once, parameters not counted.",
    )
    yield grid(training_table(results))
    yield paragraph(
        "Ratio: to the bare base model in the same round, the median over rounds. Contenders take turns, so that "
        "whatever else the machine does meets all of them. Peak: most memory that tensors of one step hold at a time, "
        "above what was there before."
    )

    yield "<h2>Serving a mixed batch</h2>"
    yield chart(
        bars(
            list(serving["phases"].items()),
            lambda found: found["tokens_per_s"],
            lambda found: 2 * (found["tokens_per_s"],),
            "tokens/s (more is better)",
            "Tokens per second of each contender in both phases; the figures stand in the table below.",
        ),
        f"{serving['rows']} rows in turn through {', '.join(serving['adapters'])}. Prefill: one pass over "
        f"{serving['length']} tokens a row. Decode: {serving['new_tokens']} tokens generated for each row. The bare "
        "base model takes the same rows without adapters.",
    )
    yield grid(serving_table(results))

    yield "<h2>What the adapters learned</h2>"
    yield chart(adaptation(results), "Loss on text that was kept from training: every eighth row of each text.")
    yield grid(adapters_table(results))
    yield chart(
        curves(
            {
                part: [
                    (found["method"], smooth(found["losses"]), METHODS[found["method"]][0], 1.5)
                    for found in results["adapters"]
                    if found["part"] == part
                ]
                for part in parts
            },
            "loss, nats per token",
            "Training loss of each adapter over its steps.",
        ),
        f"Training loss of each adapter, as the mean of {SMOOTHED} steps; LoRA and IA3 see the same batches.",
    )
    if "losses" in base:
        lines = [("", base["losses"], "ink", 1)]
        yield chart(
            curves({"base model": lines}, "loss, nats per token", "Training loss of the base model, falling."),
            f"Training loss of the base model; after {len(base['losses'])} steps {base['held_out_loss']:.3f} on "
            "held-out text.",
        )
    yield samples(results["samples"])

    yield "<h2>Checks against PEFT</h2>"
    yield chart(
        curves(
            {
                method: [("PEFT", found["peft"], "peft", 7), ("pyfastpeft", found["ours"], "ours", 2.5)]
                for method, found in results["curves"].items()
            },
            "loss, nats per token",
            "Loss curves of PEFT and pyfastpeft from the same start on the same batches; they lie on each other.",
        ),
        "Both from the same start on the same batches, dropout off: the two draw their masks differently.",
    )
    yield grid(checks_table(results))
    yield f"<p><strong>{html.escape(verdict(results))}</strong></p>"


def paragraph(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def chart(drawn: str, caption: str) -> str:
    return f"<figure><div>{drawn}</div><figcaption>{html.escape(caption)}</figcaption></figure>"


def grid(table: list[list[str]]) -> str:
    head, *rows = ([html.escape(cell) for cell in row] for row in table)
    lines = ["".join(f"<th scope=col>{cell}</th>" for cell in head)]
    for first, *others in rows:
        start = f"<th scope=row>{first}</th>"
        lines.append(start + "".join(f"<td>{cell}</td>" for cell in others))
    body = "".join(f"<tr{' class=first' if row[0] else ''}>{line}</tr>" for row, line in zip(rows, lines[1:]))
    return f"<div class=scroll tabindex=0><table><thead><tr>{lines[0]}</tr></thead><tbody>{body}</tbody></table></div>"


def samples(found: list[dict]) -> str:
    shown = "".join(
        f"<div><dt>{html.escape(sample['adapter'])}</dt>"
        f"<dd><pre><span>{html.escape(sample['prompt'])}</span>{html.escape(sample['continued'])}</pre></dd></div>"
        for sample in found
    )
    return f"<p>Held-out text (faint) continued by the base model and by an adapter:</p><dl>{shown}</dl>"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{title}}</title>
<style>
:root {
  --paper: #ffffff; --ink: #1b1f24; --faint: #69727d; --line: #d9dee4; --band: #f5f7f9;
  --base: #8a94a0; --peft: #c2670c; --ours: #1f6feb; --one-at-a-time: #2a9d8f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --ink: #e6e9ed; --faint: #98a2ae; --line: #333a43; --band: #1c2026;
    --base: #77828f; --peft: #f0a04b; --ours: #6ea8fe; --one-at-a-time: #4fc3b5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 60rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 system-ui, sans-serif;
}
h1 { margin: 0 0 .75rem; font-size: 1.7rem; line-height: 1.2; }
h2 { margin: 3rem 0 .75rem; font-size: 1.25rem; }
.lead { font-size: 1.15rem; }
p, figcaption { max-width: 46rem; }
figure { margin: 1.25rem 0; }
figure div, .scroll { overflow-x: auto; }
figure svg { display: block; width: 100%; min-width: 34rem; height: auto; font-family: inherit; }
figcaption { margin-top: .35rem; color: var(--faint); font-size: .875rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: right; vertical-align: top; white-space: nowrap; font-weight: normal; }
th:first-child, td:nth-child(2), th:nth-child(2), td:nth-child(5):last-child { text-align: left; }
th:nth-child(5):last-child { text-align: left; }
td:nth-child(5):last-child { white-space: normal; min-width: 18rem; }
thead th { border-bottom: 1px solid var(--faint); color: var(--faint); }
tr.first th, tr.first td { border-top: 1px solid var(--line); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
pre {
  margin: 0; padding: .75rem; border-radius: .375rem; white-space: pre-wrap; overflow-wrap: anywhere;
  background: var(--band); font: .8125rem/1.45 ui-monospace, monospace;
}
pre span { color: var(--faint); }
</style>
<main>
{{body}}
</main>
</html>
"""
