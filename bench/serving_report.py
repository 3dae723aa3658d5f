"""What the benchmarks of the engine and the server found, for the documentation.

    python -m bench.serving_report [--docs FOLDER]

Reads what ``bench.engine``, ``bench.serving`` and ``bench.soak`` saved in bench/results, as far as it is
there. Writes their tables into serving.md and server.md and, with matplotlib (``pip install .[bench]``), the
plot of throughput against latency: serving.svg.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.engine import CONCURRENT, DECODE_BATCH, LONG_PROMPT
from bench.markdown import table_row, with_table
from bench.record import DOCS, RESULTS, machine

PLOT = "serving.svg"
SavedResult = dict[str, Any]


def engine_table(found: SavedResult) -> str:
    """Of the engine's three figures: target, and what was measured."""
    host, batching, prefix = found["results"]["figures"]
    step = min(each["step"] for each in host["ms"])
    computed = min(each["host_cpu"] for each in host["ms"])
    rates = [batching[f"{which}_tokens_per_second"] for which in ("at_once", "one_by_one")]
    times = [min(prefix[f"seconds_{which}"]) for which in ("new", "repeated")]
    rows = [
        ("", "Target", "Measured"),
        ("---", "---:", "---:"),
        (
            f"Host time that the device waits for, of a decode step of {DECODE_BATCH} sequences "
            f"({step:.0f} ms)",
            "< 5%",
            f"{host['value']:.1f}%",
        ),
        (
            "Everything that the engine's thread computes in such a step",
            "",
            f"{computed:.1f} ms, {computed / step:.1%}",
        ),
        (
            f"Throughput of {CONCURRENT} requests at once ({rates[0]:.1f} tokens/s), over one by one "
            f"({rates[1]:.1f} tokens/s)",
            "3x",
            f"{batching['value']:.1f}x",
        ),
        (
            f"Time to first token of {LONG_PROMPT:,} tokens ({times[0]:.1f} s), over the same prompt again "
            f"({times[1]:.2f} s)",
            "5x",
            f"{prefix['value']:.1f}x",
        ),
    ]
    rounds = len(host["ms"])
    return _text(f"{_where(found)} Each figure is from the fastest of {rounds} rounds.", rows)


def serving_table(found: SavedResult, *, plotted: bool) -> str:
    """Throughput and latency of each scheme under each load, and the throughput over the first scheme's."""
    asked = found["settings"]
    first_scheme = found["results"][0]["scheme"]
    base = {
        row["load"]: row["tokens_per_second"] for row in found["results"] if row["scheme"] == first_scheme
    }
    lengths = asked["dataset"] or f"log-normal prompts, totals up to {asked['max_total']} tokens"
    rows = [
        (
            *("Scheme", "Cache pages", "Load", "Tokens/s", f"Over {first_scheme}", "Running"),
            *("First token, s", "Each later one, ms", "Gap, p99 / worst, ms"),
        ),
        ("---", "---:", "---", "---:", "---:", "---:", "---:", "---:", "---:"),
    ]
    for row in found["results"]:
        first, later = row["ttft_seconds"].values(), row["tpot_seconds"].values()
        rows.append(
            (
                row["scheme"],
                str(row["num_pages"]),
                row["load"],
                f"{row['tokens_per_second']:.1f}",
                f"{row['tokens_per_second'] / base[row['load']]:.2f}x" if row["load"] in base else "",
                f"{row['mean_running']:.1f}",
                " / ".join(f"{value:.1f}" for value in first),
                " / ".join(f"{1e3 * value:.0f}" for value in later),
                # Not in results that were saved before gaps were measured.
                " / ".join(f"{1e3 * value:.0f}" for value in row.get("gap_seconds", {}).values()),
            )
        )
    weights = {row["scheme"]: row["weight_bytes"] / 1e9 for row in found["results"]}
    head = (
        f"{_where(found)} {asked['requests']} requests ({lengths}); {asked['memory_gb']:g} GB for weights "
        f"({', '.join(f'{scheme} {size:.2f} GB' for scheme, size in weights.items())}) and cache. "
        "Latencies are p50 / p95 / p99."
    )
    image = f"\n![Throughput over latency]({PLOT})\n" if plotted else ""
    return _text(head, rows) + image


def soak_table(found: SavedResult) -> str:
    """What was sent, and what was checked."""
    result, model = found["results"], found["results"]["model"]
    kinds = sorted(result["requests"].items(), key=lambda each: -each[1])
    memory = [result["resident_bytes"][at] / 1e6 for at in (len(result["resident_bytes"]) // 2, -1)]
    before, after = map(round, result["free_pages"])
    batch = result["batch"]
    kills = ", ".join(map(str, batch["results_at_kills"]))
    rows = [
        ("", ""),
        ("---", "---"),
        ("Model", f"{model['scheme']}, {model['layers']} layers, {model['hidden_size']} channels"),
        (
            f"{sum(result['requests'].values()):,} requests from {result['clients']} clients",
            ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in kinds),
        ),
        ("Answers that differ from the one alone, or have the wrong status", str(len(result["wrong"]))),
        ("Free pages before and after", f"{before}, {after}"),
        ("Preemptions", f"{result['preemptions']:.0f}"),
        ("Prompt tokens from the prefix cache", f"{result['prefix_cache_hit_ratio']:.0%}"),
        ("Memory halfway and at the end", f"{memory[0]:.0f} MB, {memory[1]:.0f} MB"),
        ("Exit status after SIGTERM", str(result["exit_status"])),
        (f"Batch of {batch['requests']}, killed with so many results", kills),
        ("Lost, repeated, wrong", f"{batch['lost']}, {batch['repeated']}, {batch['wrong']}"),
    ]
    return _text(_where(found), rows)


def _where(found: SavedResult) -> str:
    where = found["environment"]
    return (
        f"{machine(where)}, load {where['load_before']:.1f} before, jax {where['versions']['jax']}, "
        f"commit {where['commit']}."
    )


def _text(head: str, rows: list[tuple[str, ...]]) -> str:
    return "\n".join([head, "", *(table_row(*cells) for cells in rows)]) + "\n"


def plot(found: SavedResult, path: Path) -> None:
    """Throughput over the median latencies, a color for each scheme; closed loops are joined by a line."""
    # By name: an optional library, absent where types are checked. No pyplot: it would look for a display.
    figures: Any = importlib.import_module("matplotlib.figure")
    importlib.import_module("matplotlib").rcParams["svg.hashsalt"] = PLOT  # the same figures, the same bytes
    figure = figures.Figure(figsize=(10, 4.2))
    panels = figure.subplots(1, 2, sharey=True)
    latencies = (
        ("ttft_seconds", 1, "seconds to the first token (median)", "log"),
        ("tpot_seconds", 1e3, "milliseconds for each later token (median)", "linear"),
    )
    for axes, (key, unit, label, scale) in zip(panels, latencies, strict=True):
        for color, scheme in enumerate(dict.fromkeys(row["scheme"] for row in found["results"])):
            rows = [row for row in found["results"] if row["scheme"] == scheme]
            points = [(unit * row[key]["p50"], row["tokens_per_second"]) for row in rows]
            loops = [
                point for point, row in zip(points, rows, strict=True) if row["load"].endswith("clients")
            ]
            axes.scatter(*zip(*points, strict=True), color=f"C{color}", label=scheme)
            if loops:
                axes.plot(*zip(*loops, strict=True), color=f"C{color}")
            for point, row in zip(points, rows, strict=True):
                axes.annotate(row["load"], point, fontsize=7, xytext=(4, 4), textcoords="offset points")
        axes.set(xlabel=label, xscale=scale)
        axes.margins(x=0.25, y=0.1)
        axes.grid(alpha=0.3)
    panels[0].set_ylim(bottom=0)
    panels[0].set(ylabel="tokens per second")
    panels[0].legend(loc="lower right")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main(
    results: Annotated[Path, typer.Option(help="Where the JSON files are.")] = RESULTS,
    docs: Annotated[Path, typer.Option(help="Where to write.")] = DOCS,
) -> None:
    """Writes the tables and, with matplotlib, the plot."""
    plotted = importlib.util.find_spec("matplotlib") is not None
    tables: dict[str, tuple[str, Callable[[SavedResult], str]]] = {
        "engine": ("serving.md", engine_table),
        "serving": ("serving.md", lambda found: serving_table(found, plotted=plotted)),
        "soak": ("server.md", soak_table),
    }
    for name, (file, table) in tables.items():
        result, page = results / f"{name}.json", docs / file
        if not result.exists():
            print(f"{result.name} is not there: run python -m bench.{name}")
            continue
        found = json.loads(result.read_text())
        if name == "serving" and plotted:
            plot(found, docs / PLOT)
        elif name == "serving":
            print("no plot: matplotlib is not installed (pip install .[bench])")
        text = with_table(page.read_text(encoding="utf-8"), name, table(found))
        page.write_text(text, encoding="utf-8")
        print(f"{page}: table of bench.{name}")


if __name__ == "__main__":
    typer.run(main)
