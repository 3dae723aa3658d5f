"""Every op at the shapes of real layers: its machine code, and what some clusters compute when executed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from pallas_kernels.verification import cases
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.shapes import MODELS
from tests.pallas_kernels.mosaic.samples import Sample, sample
from tests.pallas_kernels.mosaic.support import (
    TMA_STORE,
    check_machine_code,
    needs_cuda_compiler,
    needs_updates_in_place,
)

pytestmark = needs_cuda_compiler

# Opcodes of each kernel; "A|B": one of the two.
CONTAINS = {
    "grouped_matmul": ("IGMMA", "UTMALDG", "UTMASTG"),
    "quantize_rows": ("UTMALDG|UBLKCP", TMA_STORE),
    "quantize": ("UTMALDG|UBLKCP", TMA_STORE),
    "silu_quantize": ("UTMALDG|UBLKCP", TMA_STORE),
    "kv_append": ("UTMALDG", TMA_STORE),
    "paged_attention": ("HMMA", "LDSM", "MOVM", "UTMALDG"),
    "paged_attention_combine": (TMA_STORE,),
    "flash_attention": ("HGMMA", "UTMALDG", "UTMASTG"),
    "gather_pages": ("UTMALDG", TMA_STORE),
}
# Least share of the instructions that the clusters execute. In decoding, a split without pages skips to
# constants; of the quantizers of parts of a row, only those of a single row were all executed.
COVERAGE = {"paged_attention": 0.93}
ONE_ROW = ("quantize", "silu_quantize")
# Of what takes longest the other models' layers are for the nightly run, and rows like others.
IN_CI = ("SmolLM2-135M", "Llama-3-8B")


def real_cases() -> Iterator[Case]:
    """Every op of every model, decode and prefill, INT4 and what else there is."""
    for model, layer in MODELS.items():
        for linear in layer.linears:
            for rows in (16, 64, 4096):
                yield cases.matmul(model, linear, rows)
            if model == "Llama-3-8B":
                yield from (cases.matmul(model, linear, rows) for rows in (1, 32, 128))
                yield from (cases.matmul(model, linear, rows, bits=8) for rows in (1, 16, 64, 4096))
        for rows in (1, 64, 4096):
            yield from (cases.norm(model, rows), cases.attention_output(model, rows), cases.silu(model, rows))
            if model == "Llama-3-8B":
                yield cases.silu(model, rows, rotate=False)
            for kv_bits in (4, 16):
                yield cases.append(model, rows, kv_bits)
        for kv_bits in (4, 16):
            yield cases.attention(model, 1, 1, 512, kv_bits)
            yield cases.attention(model, 128, 1, 2048, kv_bits)
            yield cases.attention(model, 1, 512, 2048, kv_bits)


# Models share shapes; each call is executed once.
CASES = {f"{case.op} {case.shape} {case.abstract_inputs}": case for case in reversed([*real_cases()])}


def parameter(case: Case) -> Any:
    marks = [needs_updates_in_place] if case.op == "kv_append" else []
    long = case.op in ("grouped_matmul", "prefill_attention") or case.shape.endswith("16-bit")
    repeated = case.shape.endswith(("M=32", "M=128", "M=4096 8-bit"))
    if repeated or (long and case.model not in IN_CI):
        marks.append(pytest.mark.nightly)
    return pytest.param(case, id=case.name, marks=marks)


@pytest.mark.parametrize("case", [*map(parameter, reversed(CASES.values()))])
def test_executed(case: Case):
    for kernel in sample(case, clusters=1 if case.op == "grouped_matmul" else 2):
        check_kernel(case, kernel)


def check_kernel(case: Case, kernel: Sample) -> None:
    run = kernel.runs[0]
    check_machine_code(run.machine, CONTAINS[run.name])
    if run.name == "grouped_matmul" and "8-bit" in case.shape and run.machine.instructions is not None:
        loop = run.machine.instructions.main_loop("IGMMA")  # one accumulator: nothing is rescaled in it
        assert loop is not None and not loop.counts["I2FP"], loop
    if run.name not in ONE_ROW or case.shape.endswith("M=1"):
        covered = np.any([each.covered for each in kernel.runs], axis=0).mean()
        assert covered >= COVERAGE.get(run.name, 0.99), (
            f"{run.name}: {covered:.1%} of the instructions executed"
        )
    assert kernel.error <= kernel.limit, f"{run.name}: error {kernel.error:.1e}, allowed {kernel.limit:.1e}"
