"""Speed of every kernel on this GPU, beside the best alternatives, in one run.

    python -m bench.kernels             # all cases that fit the time, those with targets first
    python -m bench.kernels --sweep     # tile configurations instead; winners to pallas_kernels/tuning/
    python -m bench.kernels --smoke     # the reference on tiny shapes, on any device: tests this program

``bench.gpu.timing`` says how time is measured, ``bench.gpu.peers`` what the kernels are compared with,
``bench.gpu.targets`` what is required. The JSON file is rewritten after every case. If a case or a peer
fails, its error is written there and the run goes on.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import jax
import typer
from rich.console import Console
from rich.table import Table

from bench import record
from bench.gpu import progress, targets
from bench.gpu.ceilings import Ceilings, measure_ceilings
from bench.gpu.peers import peers
from bench.gpu.sweep import sweep_cases
from bench.gpu.timing import Clock, jax_program, make_clock, make_sets, num_sets
from pallas_kernels import dispatch, use_implementation
from pallas_kernels.tuning import winners
from pallas_kernels.verification import cases
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.execute import device_lost


def ordered(all_cases: Iterable[Case]) -> list[Case]:
    """Cases with targets first, then others of Llama-3-8B, then the rest; calls of equal shapes only once."""

    def rank(case: Case) -> int:
        if targets.has_target(case.op, case.model, case.shape):
            return 0
        return 1 if case.model == "Llama-3-8B" else 2

    unique: dict[str, Case] = {}
    for case in sorted(all_cases, key=rank):
        unique.setdefault(f"{case.op} {case.abstract_inputs}", case)
    return list(unique.values())


def smoke_cases() -> list[Case]:
    """Every op at shapes that a CPU runs in a moment."""
    model = "SmolLM2-135M"
    return [
        cases.matmul(model, "o_proj", 16),
        cases.matmul(model, "o_proj", 32),
        cases.norm(model, 8),
        cases.attention_output(model, 8),
        cases.silu(model, 8),
        cases.append(model, 8),
        cases.attention(model, 2, 1, 128),
        cases.attention(model, 1, 8, 128),
    ]


def identity(case: Case) -> dict[str, Any]:
    """The fields that identify a case in the result."""
    return {"case": case.name, "op": case.op, "model": case.model, "shape": case.shape}


def describe_error(error: BaseException) -> str:
    """The type and the message of an error, at most 500 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def measure_case(case: Case, clock: Clock, ceilings: Ceilings, implementation: str) -> dict[str, Any]:
    """One row of the result, without peers. If anything failed, it has "error" instead of times."""
    row: dict[str, Any] = {**identity(case), "implementation": implementation}
    feedback = case.donated[0] if case.donated else None
    try:
        work = case.cost
        row |= dataclasses.asdict(work)
        sets = make_sets(case.inputs, num_sets(work.bytes))
        with use_implementation(implementation), dispatch.record_choices() as choices:
            program = jax_program(case.function, sets, feedback=feedback)
        row["configuration"] = _configuration_json(choices[0].config)
        timing = clock.measure(program)
    except Exception as error:  # of any kind: it is written into the result, and the run goes on
        return row | {"error": describe_error(error)}
    operations = work.int8_ops + work.bf16_ops
    return row | {
        **dataclasses.asdict(timing),
        "tb_per_second": work.bytes / timing.seconds / 1e12,
        "tops": operations / timing.seconds / 1e12,
        "of_copy": work.bytes / timing.seconds / ceilings.bytes_per_second,
        "of_bf16_matmul": operations / timing.seconds / ceilings.bf16_ops_per_second,
    }


def _configuration_json(configuration: Any) -> Any:
    if dataclasses.is_dataclass(configuration) and not isinstance(configuration, type):
        return dataclasses.asdict(configuration)
    return None if configuration is None else repr(configuration)


def measure_peers(case: Case, clock: Clock, torch: ModuleType | None) -> dict[str, dict[str, Any]]:
    """Times, or the error, of each peer of ``case``."""
    rows: dict[str, dict[str, Any]] = {}
    for peer in peers(case, torch):
        try:
            rows[peer.name] = dataclasses.asdict(clock.measure(peer.program()))
        except Exception as error:
            rows[peer.name] = {"error": describe_error(error)}
    return rows


def best_peer(row: dict[str, Any]) -> dict[str, Any]:
    """The fastest peer of a row, and how many times as fast as it the kernel is."""
    timed = {name: peer["seconds"] for name, peer in row["peers"].items() if "seconds" in peer}
    if not timed or "seconds" not in row:
        return {}
    name = min(timed, key=lambda name: timed[name])
    return {"best_peer": name, "speedup": timed[name] / row["seconds"]}


def import_torch() -> tuple[ModuleType | None, str]:
    """torch, or None if it is not installed or cannot use the GPU; and its version, or why it is not used."""
    try:
        torch = importlib.import_module("torch")
    except Exception as error:  # a broken installation raises OSError and others
        return None, f"not used: {describe_error(error)}"
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return None, f"not used: torch {torch.__version__} sees no GPU"
    return torch, str(torch.__version__)


def earlier_rows(out: Path) -> list[dict[str, Any]]:
    """The rows of an interrupted run. The case during which it ended has a row with an error."""
    earlier = progress.interrupted(out)
    if earlier is None:
        return []
    rows, hung = earlier["results"]["cases"], earlier["results"][progress.RUNNING]
    if hung is not None and hung["case"] not in {row["case"] for row in rows}:
        rows.append(hung | {"error": "the process hung or died", "peers": {}})
    return rows


def run(
    selected: list[Case],
    out: Path,
    implementation: str,
    budget: float,
    *,
    resume: bool = False,
    smoke: bool = False,
) -> bool:
    """Measures ``selected`` for at most ``budget`` seconds; False if any case failed.

    A case that the time did not reach is listed as skipped.

    Args:
      resume: goes on where an earlier process that wrote ``out`` ended.

    Raises:
      typer.Exit: with progress.DEVICE_LOST, if a case left a GPU that cannot be used.
    """
    deadline = time.monotonic() + budget
    rows = earlier_rows(out) if resume else []
    done = {row["case"] for row in rows}
    clock = make_clock()
    torch, torch_said = import_torch()
    result: dict[str, Any] = {
        "clock": "kernels (CUPTI)" if clock.reason is None else f"wall: {clock.reason}",
        "torch": torch_said,
        "ceilings": None,
        "cases": rows,
        "targets": [],
        "skipped": [],
        progress.RUNNING: None,
    }
    environment = record.environment()
    save = lambda: record.write_json(out, {"environment": environment, "results": result})  # noqa: E731
    save()
    ceilings = measure_ceilings(clock, smoke=smoke)
    result["ceilings"] = dataclasses.asdict(ceilings)
    save()
    for case in selected:
        if case.name in done:
            continue
        if time.monotonic() > deadline:
            break
        result[progress.RUNNING] = identity(case)
        save()
        row = measure_case(case, clock, ceilings, implementation)
        row["peers"] = measure_peers(case, clock, torch)
        rows.append(row | best_peer(row))
        result["targets"], result[progress.RUNNING] = targets.check(rows), None
        save()
        said = f"{row['seconds'] * 1e6:9.1f} us" if "seconds" in row else f"FAILED {row['error'][:80]}"
        print(f"{said}  {case.name}", flush=True)
        errors = "error" in row or any("error" in peer for peer in row["peers"].values())
        if errors and device_lost():
            raise typer.Exit(progress.DEVICE_LOST)
    measured = {row["case"] for row in rows}
    result["skipped"] = [case.name for case in selected if case.name not in measured]
    save()
    show(result)
    return not any("error" in row for row in rows)


def _formatted(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def show(result: dict[str, Any]) -> None:
    """Prints the two tables of a result."""
    console = Console(width=150)
    table = Table("case", title=f"Kernels, clock: {result['clock']}", title_justify="left")
    for column in ("us", "TB/s", "of copy", "TOP/s", "best peer", "speedup"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in result["cases"]:
        if "error" in row:
            table.add_row(row["case"], "failed", *["-"] * 5)
            continue
        table.add_row(
            row["case"],
            _formatted(row["seconds"] * 1e6, ".1f"),
            _formatted(row["tb_per_second"], ".2f"),
            _formatted(row["of_copy"], ".0%"),
            _formatted(row["tops"], ".0f"),
            row.get("best_peer", "-"),
            _formatted(row.get("speedup"), ".2f"),
        )
    console.print(table)
    table = Table("target", "case", "of copy", "required", "speedup", "required", "met", title="Targets")
    for entry in result["targets"]:
        table.add_row(
            entry["target"],
            entry["case"],
            *(_formatted(entry[key], ".0%") for key in ("of_copy", "of_copy_required")),
            *(_formatted(entry[key], ".2f") for key in ("speedup", "speedup_required")),
            {True: "yes", False: "no", None: "not measured"}[entry["met"]],
        )
    console.print(table)
    if result["skipped"]:
        print(f"{len(result['skipped'])} cases were not reached in time")


def main(
    smoke: Annotated[bool, typer.Option(help="Tiny shapes with the reference, on any device.")] = False,
    sweep: Annotated[bool, typer.Option(help="Try tile configurations instead.")] = False,
    seconds: Annotated[float, typer.Option(help="After this no new case is begun.")] = 200.0,
    resume: Annotated[bool, typer.Option(help="Go on with an interrupted result.")] = False,
    select: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
    out: Annotated[Path | None, typer.Option(help="The result; by default of this GPU's folder.")] = None,
) -> None:
    """Measures, writes the JSON and prints the tables."""
    if not smoke and jax.default_backend() != "gpu":
        print(f"bench.kernels needs a CUDA GPU; JAX {jax.__version__} runs on {jax.default_backend()}")
        raise typer.Exit(2)
    found = smoke_cases() if smoke else ordered(cases.all_cases())
    selected = [case for case in found if select in case.name]
    if sweep:
        sweep_cases(selected, make_clock(), seconds, out or winners.path(jax.devices()[0].device_kind))
        return
    implementation = "reference" if smoke else "mosaic_sm90"
    out = out or record.gpu_results(jax.devices()[0].device_kind) / "kernels.json"
    if not run(selected, out, implementation, seconds, resume=resume, smoke=smoke):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
