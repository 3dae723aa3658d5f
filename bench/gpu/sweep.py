"""Tries the configurations that an op's kernel offers and writes the winners to pallas_kernels/tuning/."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import record
from bench.gpu.timing import Clock, jax_program, make_sets, num_sets
from pallas_kernels import dispatch, use_implementation
from pallas_kernels.verification.cases import Case

IMPLEMENTATION = "mosaic_sm90"


def configs(case: Case) -> list[Any]:
    """The configurations of the kernel of ``case``, the default first; none if there is no kernel."""
    return dispatch.configs(case.op, IMPLEMENTATION, case.call)


def measure_config(case: Case, config: Any, clock: Clock, sets: list[Any]) -> dict[str, Any]:
    """Seconds of a call of ``case`` with ``config``, or the error."""
    tried: dict[str, Any] = {"config": dataclasses.asdict(config)}
    feedback = case.donated[0] if case.donated else None
    try:
        with use_implementation(IMPLEMENTATION, config=config):
            program = jax_program(case.function, sets, feedback=feedback)
        timing = clock.measure(program)
    except Exception as error:  # e.g. too much shared memory: other configurations are tried
        return tried | {"error": f"{type(error).__name__}: {error}"[:300]}
    return tried | {"seconds": timing.seconds}


def sweep_cases(selected: Sequence[Case], clock: Clock, budget: float, out: Path) -> None:
    """Measures all configurations of the cases, within ``budget`` seconds; writes ``out`` after each case.

    Cases with only one configuration are left out.
    """
    deadline = time.monotonic() + budget
    entries: list[dict[str, Any]] = []
    environment = record.environment()
    offered = [(case, configs(case)) for case in selected]
    taking_part = [(case, found) for case, found in offered if len(found) > 1]
    ops = sorted({case.op for case in selected} - {case.op for case, _ in taking_part})
    print(f"{len(taking_part)} cases to tune; with nothing to choose from: {', '.join(ops) or 'none'}")
    for case, found in taking_part:
        if time.monotonic() > deadline:
            break
        sets = make_sets(case.inputs, num_sets(case.cost.bytes))
        tried = []
        for config in found:
            if time.monotonic() > deadline:
                break
            tried.append(measure_config(case, config, clock, sets))
        timed = [entry for entry in tried if "seconds" in entry]
        if timed:
            shape = dispatch.describe(case.op, case.call)
            winner = min(timed, key=lambda entry: entry["seconds"])
            entries.append(
                {"op": case.op, "model": case.model, "shape": shape, "winner": winner, "tried": tried}
            )
            record.write_json(out, {"environment": environment, "entries": entries})
            print(f"{case.name}: {winner['seconds'] * 1e6:.1f} us with {winner['config']}", flush=True)
        elif tried:
            print(f"{case.name}: no configuration ran; {tried[0]['error']}", flush=True)
