"""What ``bench.cpu_generate`` found, for README.md and docs/serving.md.

    python -m bench.cpu_report

Writes the tables into both pages.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from bench.markdown import table_row, with_table
from bench.record import DOCS, RESULTS

NAME = "cpu_generate"
Row = dict[str, Any]
# Kind, sequences and tokens of the prompt: what distinguishes measures.
Key = tuple[str, int, int]


def key(row: Row) -> Key:
    return row["kind"], row["batch"], row["prompt_tokens"]


def title(measure: Key) -> str:
    kind, batch, prompt_tokens = measure
    return f"Decode, {batch}" if kind == "decode" else f"Prefill, {prompt_tokens:,}"


def baselines(rows: list[Row]) -> dict[Key, float]:
    """Of each measure, the tokens per second of the faster llama.cpp; empty if it was not measured."""
    found: dict[Key, float] = {}
    for row in rows:
        if row["system"].startswith("llama.cpp"):
            found[key(row)] = max(found.get(key(row), 0.0), row["tokens_per_second"])
    return found


def speed_table(rows: list[Row]) -> list[str]:
    """Tokens per second of each system, and how many times llama.cpp's that is."""
    over = baselines(rows)
    measures = list(dict.fromkeys(map(key, rows)))
    lines = [
        table_row("Tokens per second", *map(title, measures)),
        table_row("---", *["---:"] * len(measures)),
    ]
    for system in dict.fromkeys(row["system"] for row in rows):
        speeds = {key(row): row["tokens_per_second"] for row in rows if row["system"] == system}
        cells = [
            f"{speeds[measure]:,.0f}" + (f" ({speeds[measure] / over[measure]:.2f}x)" if over else "")
            for measure in measures
        ]
        lines.append(table_row(system, *cells))
    return lines


def limits_table(found: dict[str, Any]) -> list[str]:
    """How near to the CPU's limits the integer models come, and what the second core brings."""
    rows, limits = found["rows"], found["limits"]
    measures = list(dict.fromkeys(map(key, rows)))
    lines = [table_row("", *map(title, measures)), table_row("---", *["---:"] * len(measures))]
    for share, what in (
        ("of_read", f"of {limits['read_bytes_per_second'] / 1e9:.1f} GB/s"),
        ("of_dot", f"of {(limits['dot_ops_per_second'] or 0) / 1e12:.2f} TOP/s"),
    ):
        for system in dict.fromkeys(row["system"] for row in rows if share in row):
            if found["systems"][system]["cores"] == limits["threads"]:
                shares = {key(row): row[share] for row in rows if row["system"] == system and share in row}
                cells = [f"{shares[each]:.0%}" if each in shares else "" for each in measures]
                lines.append(table_row(f"{system}, {what}", *cells))
    speeds = {(row["system"], key(row)): row["tokens_per_second"] for row in rows}
    for system, described in found["systems"].items():
        whole = system.removesuffix(", 1 core")
        if whole != system:
            cells = [f"{speeds[whole, each] / speeds[system, each]:.2f}x" for each in measures]
            cores = found["systems"][whole]["cores"]
            lines.append(table_row(f"{whole}, {cores} cores over {described['cores']}", *cells))
    return lines


def head(found: dict[str, Any], environment: dict[str, Any]) -> str:
    """What machine it was, and what the numbers are."""
    versions = environment["versions"]
    llama = next((ready for name, ready in found["systems"].items() if name.startswith("llama.cpp")), None)
    text = (
        f"{environment['cpu']}, {environment['cores']} cores, load {environment['load_before']:.1f} before, "
        f"jax {versions['jax']}, transformers {versions['transformers']}, "
    )
    if llama is not None:
        text += f"llama.cpp {llama['llama_cpp']}, "
    text += f"commit {environment['commit']}; the fastest of {len(found['seconds_of_rounds'])} rounds."
    return text + (" In parentheses: over the faster llama.cpp." if llama is not None else "")


def tables(saved: dict[str, Any]) -> dict[str, str]:
    """The text for README.md, and the longer one for docs/serving.md."""
    found = saved["results"]
    short = [head(found, saved["environment"]), "", *speed_table(found["rows"])]
    dot = found["limits"]["dot_instruction"]
    rate = f"; {dot} in registers: TOP/s, of multiplications and additions" if dot else ""
    limits = f"At most, of {found['limits']['threads']} threads: a read of memory that no cache holds{rate}."
    return {
        "README.md": "\n".join(short) + "\n",
        "docs/serving.md": "\n".join([*short, "", limits, "", *limits_table(found)]) + "\n",
    }


def main(
    results: Annotated[Path, typer.Option(help="Where the JSON file is.")] = RESULTS,
    root: Annotated[Path, typer.Option(help="The folder that has README.md and docs.")] = DOCS.parent,
) -> None:
    """Writes the tables."""
    saved = json.loads((results / f"{NAME}.json").read_text())
    for page, text in tables(saved).items():
        path = root / page
        path.write_text(with_table(path.read_text(encoding="utf-8"), NAME, text), encoding="utf-8")
        print(f"{path}: table of bench.{NAME}")


if __name__ == "__main__":
    typer.run(main)
