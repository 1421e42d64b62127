"""Turns results into Markdown tables and a plot.

    python -m benchmarks.report RESULTS.json ... [--into README.md] [--plot FILE.png]

RESULTS are what `python -m benchmarks` and `python -m benchmarks.figures` wrote. `--into` replaces what stands between
<!-- benchmark table start --> and <!-- benchmark table end -->. Without it the tables are printed, and after them every
entry of the suite with its GFLOP/s, GB/s and memory.
"""

import argparse
import json
import re
from pathlib import Path

from benchmarks.machine import title

START, END = "<!-- benchmark table start -->", "<!-- benchmark table end -->"
MEANING = {
    "lora_linear": "LoRA on a linear layer, base included",
    "ia3_linear": "IA3 on a linear layer, base included",
    "multi_lora": "Batched multi-LoRA, the adapter part alone (base + adapters over base is 1 + the ratio)",
    "multi_lora_linear": "Batched multi-LoRA on a linear layer, base included",
    "lora_delta_": "LoRA on a given output, the adapter part alone (base + adapter over base is 1 + the ratio)",
    "dora_linear": "DoRA on a linear layer, base included",
    "bottleneck": "Bottleneck adapters, the adapter part alone (base + adapter over base is 1 + the ratio)",
}


# --- Markdown --------------------------------------------------------------------------------------------------------


def markdown(results: dict) -> str:
    """What a JSON file comes to: figures against their limits, or the suite's ratios."""
    return figures_table(results) if "figures" in results else suite_tables(results)


def suite_tables(results: dict) -> str:
    """For every op and dtype the ratios to base."""
    parts = [f"Measured on {title(results['machine_info'])}."]
    for (op, dtype), rows in by_op(results).items():
        names = provider_order(rows)
        table = [["shape", "base", *(name for name in names if name != "base")]]
        for label, entries in rows.items():
            best = min((shown_ratio(entry) for name, entry in entries.items() if name != "base"), default=0.0)
            cells = [f"{seconds(entries['base']) * 1e3:.3g} ms"] if "base" in entries else ["-"]
            cells += [ratio_cell(entries.get(name), best) for name in names if name != "base"]
            table.append([label, *cells])
        parts.append(f"**{MEANING[op]}, {dtype}**: time over the base layer's, median (20th-80th percentile)")
        parts.append(grid(table))
    return "\n\n".join(parts)


def by_op(results: dict) -> dict[tuple[str, str], dict[str, dict[str, dict]]]:
    """(op, dtype) -> label of the case -> provider -> entry."""
    tables = {}
    for benchmark in results["benchmarks"]:
        entry = benchmark["extra_info"]
        rows = tables.setdefault((entry["op"], entry["dtype"]), {})
        rows.setdefault(entry["label"], {})[entry["provider"]] = entry
    return dict(sorted(tables.items(), key=lambda item: list(MEANING).index(item[0][0])))


def provider_order(rows: dict[str, dict[str, dict]]) -> list[str]:
    """Providers in the order in which they first appear, ours last."""
    found = {name: entry["ours"] for entries in rows.values() for name, entry in entries.items()}
    return sorted(found, key=found.get)


def seconds(entry: dict) -> float:
    return entry["seconds"]["median"]


def shown_ratio(entry: dict) -> float:
    return round(entry["ratio_to_base"]["median"], 2)


def ratio_cell(entry: dict | None, best: float) -> str:
    if entry is None:
        return "-"
    ratio = entry["ratio_to_base"]
    cell = f"{ratio['median']:.2f} ({ratio['p20']:.2f}-{ratio['p80']:.2f})"
    return f"**{cell}**" if shown_ratio(entry) == best else cell


def full_table(results: dict) -> list[list[str]]:
    """Every entry with its rates and its memory."""
    table = [["case", "provider", "ms", "GFLOP/s", "GB/s", "kept for backward, MB", "peak, MB", "rounds"]]
    for benchmark in results["benchmarks"]:
        entry = benchmark["extra_info"]
        numbers = (seconds(entry) * 1e3, entry["gflop_per_s"], entry["gb_per_s"])
        memory = (entry["saved_bytes"] / 1e6, entry["peak_bytes"] / 1e6)
        cells = [f"{number:.3g}" for number in (*numbers, *memory)]
        table.append([benchmark["group"], entry["provider"], *cells, str(entry["rounds"])])
    return table


def figures_table(results: dict) -> str:
    rows = [figure_row(entry).split("|") for entry in results["figures"]]
    head = ["figure", "needed", "measured: median (20th-80th percentile)", "met?"]
    return f"Measured on {title(results['machine_info'])}.\n\n" + grid([head, *rows])


def figure_row(entry: dict) -> str:
    """figure | needed | measured | met? of one figure."""
    measured = entry["note"]
    if "median" in entry:
        numbers = tuple(f"{entry[key]:.3g}" for key in ("median", "p20", "p80"))
        measured = "{} {unit} ({}-{})".format(*numbers, unit=entry["unit"]) + (f"; {measured}" if measured else "")
    verdict = {True: "yes", False: "**no**", None: "does not apply"}[entry["met"]]
    return " | ".join((entry["figure"], entry["needed"], measured, verdict))


def grid(rows: list[list[str]]) -> str:
    """A Markdown table; the first row is its head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows)


def insert(text: str, tables: str) -> str:
    """`text` with `tables` between its markers. Raises ValueError where it has none."""
    if START not in text or END not in text:
        raise ValueError(f"found no {START} and {END} to put the tables between")
    pattern = re.compile(re.escape(START) + ".*?" + re.escape(END), re.DOTALL)
    return pattern.sub(lambda _: f"{START}\n\n{tables}\n\n{END}", text, count=1)


# --- plot ------------------------------------------------------------------------------------------------------------

COLOURS = {
    "peft": "#8c8c8c",
    "unfused": "#8c8c8c",
    "compile": "#c7a76c",
    "addmm": "#7f9fbf",
    "gather-bmm": "#b58bb0",
    "reference": "#9fc5a8",
    "cpu": "#d1495b",
    "triton": "#00798c",
    "cuda": "#d1495b",
}


def ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis, the finer the fewer decades it spans."""
    span = high / low
    steps = (1, 1.1, 1.2, 1.5, 2, 3, 5, 7) if span < 10 else (1, 2, 5) if span < 1000 else (1,)
    return [step * 10.0**decade for decade in range(-4, 5) for step in steps if low <= step * 10.0**decade <= high]


def plot(results: dict, path: Path) -> None:
    """One panel for every op and dtype: a row for every case, a dot for every provider at its ratio to base."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    tables = by_op(results)
    heights = [len(rows) + 1.5 for rows in tables.values()]
    size = 10, 0.42 * sum(heights) + 1.2
    figure = plt.figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(tables), height_ratios=heights, squeeze=False)
    families, kinds = {}, {}
    for panel, ((op, dtype), rows) in zip(panels[:, 0], tables.items()):
        for row, entries in enumerate(rows.values()):
            panel.axhspan(row - 0.5, row + 0.5, color="#f4f4f4" if row % 2 else "white", zorder=0)
            others = [(name, entry) for name, entry in entries.items() if name != "base"]
            for place, (name, entry) in enumerate(others):
                family, kind = name.rsplit("-", 1)
                ratio, y = entry["ratio_to_base"], row + 0.7 * ((place + 0.5) / len(others) - 0.5)
                colour = families.setdefault(family, COLOURS.get(family, "black"))
                kinds.setdefault(kind)
                panel.plot([ratio["p20"], ratio["p80"]], [y, y], color=colour, linewidth=1.2, zorder=2)
                face = colour if kind == "fp32" else "white"
                marker = "D" if entry["ours"] else "o"
                panel.plot(ratio["median"], y, marker, color=colour, markerfacecolor=face, markersize=5, zorder=3)
        panel.axvline(1, color="black", linewidth=0.8, zorder=1)
        panel.set_xscale("log")
        panel.xaxis.set_major_locator(FixedLocator(ticks(*panel.get_xlim())))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
        panel.set_yticks(range(len(rows)), rows, fontsize=8)
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
        panel.grid(axis="x", color="#dddddd", linewidth=0.6, zorder=1)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.set_title(f"{op}, {dtype}", loc="left", fontsize=10, fontweight="bold")
    panels[-1, 0].set_xlabel(
        "time over the base layer's (log scale); line: 20th to 80th percentile of rounds", fontsize=9
    )
    handles = [Line2D([], [], color=colour, marker="o", linestyle="", label=name) for name, colour in families.items()]
    for kind in kinds:
        face = "#555555" if kind == "fp32" else "white"
        label = f"{kind} adapters"
        handles.append(Line2D([], [], color="#555555", markerfacecolor=face, marker="o", linestyle="", label=label))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--into", type=Path, help="a Markdown file with the markers")
    parser.add_argument("--plot", type=Path, help="draw the suite's results (the last file that holds some)")
    options = parser.parse_args(arguments)
    loaded = [json.loads(path.read_text()) for path in options.results]
    suites = [results for results in loaded if results.get("benchmarks") and "figures" not in results]
    tables = "\n\n".join(map(markdown, loaded))
    if options.into:
        options.into.write_text(insert(options.into.read_text(), tables))
    else:
        print("\n\n".join([tables, *(grid(full_table(results)) for results in suites)]))
    if options.plot and suites:
        plot(suites[-1], options.plot)


if __name__ == "__main__":
    main()
