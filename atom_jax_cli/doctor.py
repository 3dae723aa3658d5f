"""``atom-jax doctor``: whether Atom-JAX works on this machine."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from rich.table import Table

from atom_jax_cli.console import JsonOption, format_bytes, note, print_json, progress_bars, stdout
from atom_jax_cli.kernels import STAGE


def doctor(
    check: Annotated[
        bool, typer.Option(help="Run the GPU kernels; without, only what is known of them.")
    ] = True,
    seconds: Annotated[float, typer.Option(help="For the check of the kernels.", min=1)] = 60.0,
    json_output: JsonOption = False,
) -> None:
    """Show versions and device, check the GPU kernels on it, and say what would run.

    Ends with status 1 if a kernel fails or cannot be checked, or JAX does not use the GPU that is there.
    """
    # The child processes that check the kernels need the GPU's memory. JAX reads this when it is imported.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    from atom_jax.doctor import examine
    from pallas_kernels.verification.verify import Limits

    with progress_bars() as report:
        facts = examine(
            check=check,
            limits=Limits(total=seconds),
            announce=note,
            progress=lambda done, total: report(STAGE, done, total),
        )
    if json_output:
        print_json(facts)
    else:
        _show(facts)
    if not facts["ok"]:
        raise typer.Exit(1)


def _show(facts: dict[str, Any]) -> None:
    stdout.print(_pairs("versions", {k: v or "not installed" for k, v in facts["versions"].items()}))
    for number, gpu in enumerate(facts["gpus"]):
        stdout.print(_pairs(f"GPU {number}, as the driver says", gpu))
    if "device" in facts:
        stdout.print(_pairs("device, as JAX says", _device_rows(facts)))
        stdout.print(_ops(facts["ops"]))
        for reason in dict.fromkeys(op["reason"] for op in facts["ops"]):
            ops = dict.fromkeys(op["op"] for op in facts["ops"] if op["reason"] == reason)
            _say(f"  {', '.join(ops)}: {reason}")
        stdout.print(_schemes(facts["schemes"]))
        _say(f"  suggested: {facts['suggested']['scheme']}: {facts['suggested']['why']}")
        _show_kernels(facts)
    for problem in facts["problems"]:
        _say(f"problem: {problem}", style="red")


def _say(line: str, style: str | None = None) -> None:
    stdout.print(line, markup=False, highlight=False, soft_wrap=True, style=style)


def _pairs(title: str, facts: dict[str, Any]) -> Table:
    table = Table("", title=title, title_justify="left", show_header=False)
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, str(value))
    return table


def _device_rows(facts: dict[str, Any]) -> dict[str, Any]:
    device, cache = facts["device"], facts["compilation_cache"]
    memory = device["memory_bytes"]
    used = f"{cache['folder']} (used by {', '.join(cache['used_by'])})" if cache["folder"] else "turned off"
    return {
        "device": f"{device['kind']} ({device['platform']}), one of {device['count']}",
        "compute capability": device["compute_capability"] or "none: no CUDA device",
        "memory for JAX": "unknown" if memory is None else format_bytes(memory),
        "compiled programs": used,
    }


def _ops(ops: list[dict[str, Any]]) -> Table:
    from atom_jax.doctor import TYPICAL

    title = f"w4a4kv4, a layer and the head of {TYPICAL}"
    table = Table("step", "part", "op", "shape", "runs", title=title, title_justify="left")
    for op in ops:
        table.add_row(op["step"], op["part"], op["op"], op["shape"], op["implementation"])
    return table


def _schemes(schemes: dict[str, dict[str, list[str]]]) -> Table:
    table = Table("scheme", title="schemes, on the same layer and head", title_justify="left")
    for column in ("kernels", "reference"):
        table.add_column(column, overflow="fold")
    for scheme, ops in schemes.items():
        table.add_row(scheme, *(", ".join(ops[name]) or "-" for name in ("kernels", "reference")))
    return table


def _show_kernels(facts: dict[str, Any]) -> None:
    if facts["implementation"] is None:
        _say("GPU kernels: none applies to this device")
        return
    if not facts["verify"]:
        _say("ATOM_JAX_VERIFY=0: GPU kernels are used whatever their verdict")
    if not facts["kernels"]:
        _say("GPU kernels: not checked yet")
        return
    table = Table("kernel", "verdict", "calls", title=facts["implementation"], title_justify="left")
    table.add_column("why", overflow="fold")
    styles = {"good": "green", "failed": "red", "unchecked": "yellow"}
    for kernel in facts["kernels"]:
        outcome = kernel["outcome"]
        style = styles.get(outcome)
        shown = f"[{style}]{outcome}[/]" if style else outcome
        table.add_row(kernel["op"], shown, str(kernel["checks"]), _escaped(kernel["reason"]))
    stdout.print(table)
    _say(f"  kept in {facts['verdicts_file']}")


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
