"""Tries the tile configurations an op offers and writes the winners to pallas_kernels/tuning/.

An implementation takes part if its module has, besides what ``pallas_kernels.dispatch`` asks for,

* ``candidates(*arguments) -> Sequence[Config]``: configurations worth trying for these canonical arguments
  (shapes suffice);
* ``run_with(config, *arguments)``: ``run`` with a chosen configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

import pallas_kernels
from bench import record
from bench.costs import cost
from bench.gpu.timing import Clock, jax_program, make_sets, num_sets
from pallas_kernels import dispatch, use_implementation
from pallas_kernels.verification.cases import Case

IMPLEMENTATION = "mosaic_sm90"
TUNING = Path(pallas_kernels.__file__).parent / "tuning"


def winners(device_kind: str) -> Path:
    """The file of a GPU's winners, e.g. pallas_kernels/tuning/h100.json."""
    return TUNING / f"{record.gpu_results(device_kind).name}.json"


def tunable(case: Case) -> Any:
    """The module that runs ``case``; None if it takes no part."""
    name = f"pallas_kernels.{case.op}.{IMPLEMENTATION}"
    if importlib.util.find_spec(name) is None:
        return None
    module = importlib.import_module(name)
    return module if hasattr(module, "candidates") and hasattr(module, "run_with") else None


@contextlib.contextmanager
def forced(module: Any, config: Any) -> Iterator[None]:
    """Within it ``module.run``, and so every call traced, uses ``config``."""
    original = module.run
    module.run = lambda *arguments: module.run_with(config, *arguments)
    try:
        yield
    finally:
        module.run = original


def candidates(case: Case, module: Any) -> tuple[Any, list[Any]]:
    """What ``case`` runs with now, and what else its op suggests."""
    with use_implementation(IMPLEMENTATION), dispatch.record_choices() as choices:
        jax.eval_shape(lambda *arguments: case.call(*arguments), *case.abstract_inputs)
    choice = choices[0]
    others = [config for config in module.candidates(*choice.arguments) if config != choice.configuration]
    return choice.configuration, others


def measure(case: Case, module: Any, config: Any, clock: Clock, sets: list[Any]) -> dict[str, Any]:
    """Seconds of a call of ``case`` with ``config``, or the error."""
    tried: dict[str, Any] = {"config": dataclasses.asdict(config)}
    feedback = case.donated[0] if case.donated else None
    try:
        with use_implementation(IMPLEMENTATION), forced(module, config):
            program = jax_program(case.call, sets, feedback=feedback)
        timing = clock.measure(program)
    except Exception as error:  # e.g. more shared memory than there is: another candidate will do
        return tried | {"error": f"{type(error).__name__}: {error}"[:300]}
    return tried | {"seconds": timing.seconds}


def sweep_cases(selected: Sequence[Case], clock: Clock, budget: float, out: Path) -> None:
    """Measures all candidates of each case for at most ``budget`` seconds and writes ``out`` after each."""
    deadline = time.monotonic() + budget
    entries: list[dict[str, Any]] = []
    environment = record.environment()
    taking_part = [(case, module) for case in selected if (module := tunable(case)) is not None]
    ops = sorted({case.op for case in selected} - {case.op for case, _ in taking_part})
    print(f"{len(taking_part)} cases to tune; without candidates: {', '.join(ops) or 'none'}")
    for case, module in taking_part:
        if time.monotonic() > deadline:
            break
        default, others = candidates(case, module)
        sets = make_sets(case.inputs, num_sets(cost(case).bytes))
        tried = []
        for config in (default, *others):
            if time.monotonic() > deadline:
                break
            tried.append(measure(case, module, config, clock, sets))
        timed = [entry for entry in tried if "seconds" in entry]
        if timed:
            winner = min(timed, key=lambda entry: entry["seconds"])
            entries.append(
                {"op": case.op, "model": case.model, "shape": case.shape, "winner": winner, "tried": tried}
            )
            record.write_json(out, {"environment": environment, "entries": entries})
            print(f"{case.name}: {winner['seconds'] * 1e6:.1f} us with {winner['config']}", flush=True)
        elif tried:
            print(f"{case.name}: no configuration ran; {tried[0]['error']}", flush=True)
