"""The roofline plot and the table of a kernel benchmark, for the documentation.

    python -m bench.plot_kernels [RESULT.json] [--docs FOLDER]

Reads what ``bench.kernels`` wrote; writes gpu_results.md and, with matplotlib (``pip install .[bench]``),
gpu_roofline.svg. Points are cases of Llama-3-8B, lines the copy bandwidth and the bfloat16 matmul rate of the
same run: INT8 products may lie above the second.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.gpu.targets import Row
from bench.markdown import table_row
from bench.record import DOCS

MODEL = "Llama-3-8B"
PLOT = "gpu_roofline.svg"
PAGE_NAME = "gpu_results.md"


def operations(row: Row) -> int:
    """Tensor core operations of a call."""
    return row["int8_ops"] + row["bf16_ops"]


def measured(result: dict[str, Any]) -> list[Row]:
    """The rows that have a time."""
    return [row for row in result["results"]["cases"] if "seconds" in row]


def page_text(result: dict[str, Any], plotted: bool) -> str:
    """The page: device and versions, targets, cases with a time, cases that failed or were not reached."""
    where, found = result["environment"], result["results"]
    gpu, rates = where.get("gpu") or {}, found["ceilings"]
    lines = [
        "# How fast are the kernels?",
        "",
        f"{gpu.get('name', where['device'])}, driver {gpu.get('driver_version', 'unknown')}, "
        f"jax {where['versions']['jax']}, torch {found['torch']}, commit {where['commit']}. Written by "
        "`python -m bench.plot_kernels` from the JSON of `make gpu`; [gpu.md](gpu.md) says how it is done.",
        "",
        f"In the same run: copy {rates['bytes_per_second'] / 1e12:.2f} TB/s (both directions), "
        f"bfloat16 matmul {rates['bf16_ops_per_second'] / 1e12:.0f} TFLOP/s. Clock: {found['clock']}.",
        "",
    ]
    if plotted:
        lines += [f"![Roofline of {MODEL}]({PLOT})", ""]
    lines += [
        "## Targets",
        "",
        "| Target | Case | Of copy | Required | Speedup | Required | Met |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    for entry in found["targets"]:
        shares = [_percent(entry[key]) for key in ("of_copy", "of_copy_required")]
        ratios = [_ratio(entry[key]) for key in ("speedup", "speedup_required")]
        met = {True: "yes", False: "no", None: "not measured"}[entry["met"]]
        lines.append(table_row(entry["target"], entry["case"], *shares, *ratios, met))
    lines += [
        "",
        "## Cases",
        "",
        "| Case | µs | TB/s | Of copy | TOP/s | Best peer | Speedup |",
        "|---|---:|---:|---:|---:|---|---:|",
    ]
    for row in measured(result):
        numbers = f"{row['seconds'] * 1e6:.1f}", f"{row['tb_per_second']:.2f}", _percent(row["of_copy"])
        tops = f"{row['tops']:.0f}" if operations(row) else ""
        peer = row.get("best_peer", "none ran")
        lines.append(table_row(row["case"], *numbers, tops, peer, _ratio(row.get("speedup"))))
    failed = [row for row in found["cases"] if "error" in row]
    if failed:
        lines += ["", "Failed:", "", *(f"- {row['case']}: {row['error']}" for row in failed)]
    if found["skipped"]:
        lines += ["", f"Not reached in time: {len(found['skipped'])} cases."]
    return "\n".join(lines) + "\n"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}x"


def plot(result: dict[str, Any], path: Path) -> None:
    """Operations per second over operations per byte, logarithmic, one color an op."""
    # By name: an optional library, absent where types are checked.
    pyplot: Any = importlib.import_module("matplotlib.pyplot")
    rates = result["results"]["ceilings"]
    figure, axes = pyplot.subplots(figsize=(9, 5.5))
    rows = [row for row in measured(result) if row["model"] == MODEL and operations(row)]
    intensities = [operations(row) / row["bytes"] for row in rows]
    ends = [min(intensities, default=1) / 2, max(intensities, default=1e4) * 2]
    corner = rates["bf16_ops_per_second"] / rates["bytes_per_second"]
    edges = sorted({*ends, min(max(corner, ends[0]), ends[1])})
    roof = [min(x * rates["bytes_per_second"], rates["bf16_ops_per_second"]) / 1e12 for x in edges]
    axes.plot(edges, roof, color="black", label="measured copy bandwidth, bf16 matmul")
    for op in sorted({row["op"] for row in rows}):
        points = [(x, row["tops"]) for x, row in zip(intensities, rows, strict=True) if row["op"] == op]
        axes.scatter(*zip(*points, strict=True), label=op)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="operations per byte",
        ylabel="10¹² operations per second",
        title=f"{MODEL} on {result['environment']['device']}",
    )
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main(
    result: Annotated[Path, typer.Argument(help="JSON of bench.kernels.")],
    docs: Annotated[Path, typer.Option(help="Where to write.")] = DOCS,
) -> None:
    """Writes the page, and the plot if matplotlib is there."""
    found = json.loads(result.read_text())
    plotted = importlib.util.find_spec("matplotlib") is not None
    if plotted:
        plot(found, docs / PLOT)
    else:
        print("no plot: matplotlib is not installed (pip install .[bench])")
    (docs / PAGE_NAME).write_text(page_text(found, plotted), encoding="utf-8")
    print(docs / PAGE_NAME)


if __name__ == "__main__":
    typer.run(main)
