"""Compiles every kernel for an H200, without one, and tabulates what its machine code says.

    make kernels-report

Writes docs/kernels.md. Nothing in it is measured on a GPU: registers, shared memory and spills are the
assembler's, instructions are counted in its output, times are computed from them and from data sheets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax

from bench.aot.compile import CompiledKernel, compile_for_h200
from bench.record import DOCS
from pallas_kernels.dispatch import record_choices
from pallas_kernels.grouped_matmul.config import STEP_BYTES
from pallas_kernels.mosaic import NUM_SMS
from pallas_kernels.qarrays import num_tiles
from pallas_kernels.roofline import H200, seconds
from pallas_kernels.verification import cases
from pallas_kernels.verification.shapes import MODELS
from tests.pallas_kernels.mosaic.samples import sample

PAGE = DOCS / "kernels.md"
# An SM issues one instruction a clock for each of its four quarters; the clock under load is about this.
_ISSUE_SLOTS, _CLOCK_HZ = 4, 1.75e9
# The instruction by which a kernel's main loop is found. Kernels that are not listed here have no main loop.
_MAIN_LOOP = {"grouped_matmul": "IGMMA", "paged_attention": "HMMA", "flash_attention": "HGMMA"}
_INTRO = """\
# Which GPU kernels are there, and what does their machine code look like?

Every hot op has a Pallas Mosaic GPU kernel for Hopper (`pallas_kernels/<op>/mosaic_sm90.py`). `auto` takes it
on a GPU of compute capability 9.0 where it supports the call, else the reference (CPUs have
[kernels of their own](cpu_kernels.md)); `atom-jax explain
CKPT` prints what would run a checkpoint and with which tiles; `use_implementation("mosaic_sm90")` insists.

This page is written by `make kernels-report`, which compiles each kernel for an H200 on a machine without a
GPU (jax {jax}), and executes a part of it in an emulator. Registers, shared memory and spills are the
assembler's; instructions are counted in the disassembly. *Executed* are the CTAs whose PTX was run, in two
orders that gave equal bits, and how far their results are from the reference's in relative norm, or the share
of integers that are off by one; "equal" means every bit. *Roofline* is the time the call needs at the data
sheet's 4.8 TB/s, 1979 TOP/s INT8 and 989 TFLOP/s bfloat16; *issue* is the time in which {sms} SMs issue the
counted instructions, one a clock and quarter at 1.75 GHz. **None of it is a measurement on a GPU**: `make
gpu` makes those (see [gpu.md](gpu.md)).

`make test-kernels` compiles and executes kernels of all these shapes, and asserts besides that nothing
spills, uses local memory or serializes wgmma; CI runs it with jax 0.11.2. What this proves, what it does not,
and what was checked with which version is in [testing.md](testing.md).

A shape that models share is listed under the first of them.

`silu_quantize` is listed with rotated groups, as w4a4kv4 has it, and for Llama-3-8B without. In groups of 128
the rotation costs a value 7 additions and 4 shuffles, in groups of 64 it costs 6 and 3. At 4096 tokens the
instructions then take about as long as the memory of an H200, and less than that of an H100 (3.35 TB/s), and
the two overlap. The rotation has not been timed on a GPU.

"""


@dataclasses.dataclass(frozen=True)
class KernelRow:
    """One row of the table: one kernel of one case.

    Attributes:
      executed: CTAs that the emulator ran, and how far their results are from the reference's.
      loop: instructions of the main loop; None if there is none.
      bytes: that the call reads and writes.
      roofline_us: the time that the call needs by the data sheet.
      issue_us: the time that its instructions need to be issued.
    """

    case: cases.Case
    kernel: CompiledKernel
    executed: str
    loop: int | None
    bytes: int
    roofline_us: float
    issue_us: float


def report_cases() -> Iterator[cases.Case]:
    """A decode and a prefill shape of every op and model."""
    for model, layer in MODELS.items():
        for rows in (16, 64, 4096):
            for linear in layer.linears:
                yield cases.matmul(model, linear, rows)
        if model == "Llama-3-8B":  # w8a8
            for rows in (16, 4096):
                for linear in layer.linears:
                    yield cases.matmul(model, linear, rows, bits=8)
        for rows in (64, 4096):
            yield from (cases.norm(model, rows), cases.attention_output(model, rows), cases.silu(model, rows))
            if model == "Llama-3-8B":
                yield cases.silu(model, rows, rotate=False)
            yield cases.append(model, rows)
        for kv_bits in (4, 16):
            yield cases.attention(model, 128, 1, 2048, kv_bits)
        yield cases.attention(model, 1, 512, 2048)


def _trips(case: cases.Case, kernel: CompiledKernel, config: Any) -> int:
    """How often a warp of ``kernel`` runs its main loop."""
    layer = MODELS[case.model]
    match kernel.name:
        case "grouped_matmul":
            w = case.abstract_inputs[1]
            steps = num_tiles(w.body) + -(-w.num_outliers // STEP_BYTES)
            return -(-steps // config.split_k)
        case "paged_attention":
            batch, blocks = case.abstract_inputs[1].block_tables.shape
            assert kernel.ctas is not None
            return -(-batch * layer.num_kv_heads * blocks // kernel.ctas)
        case "flash_attention":
            q, cache, *_ = case.abstract_inputs
            return (cache.max_length - q.shape[1] // 2) // config.block_n
    return 1


def rows_of(case: cases.Case) -> list[KernelRow]:
    """Compiles the case and reads its kernels."""
    with record_choices() as choices:
        _, kernels = compile_for_h200(case.function, *case.abstract_inputs, donate_argnums=case.donated)
    work, samples = case.cost, {each.runs[0].name: each for each in sample(case)}
    rows = []
    for kernel in kernels:
        assert kernel.instructions is not None and kernel.ctas is not None, "no disassembler"
        opcode = _MAIN_LOOP.get(kernel.name)
        warps = kernel.threads // 32
        if opcode is None:
            loop, executed = None, kernel.instructions.counts.total()
        else:
            main_loop = kernel.instructions.main_loop(opcode)
            assert main_loop is not None, f"{kernel.name}: no loop has {opcode}"
            loop = main_loop.size
            executed = loop * _trips(case, kernel, choices[0].config)
            if kernel.name != "paged_attention":
                warps -= 4  # the producer warpgroup only copies
        issue = executed * warps * kernel.ctas / (_ISSUE_SLOTS * NUM_SMS * _CLOCK_HZ)
        (run, *_), error, _ = samples[kernel.name]
        checked = f"{run.ctas}, {f'{error:.0e}' if error else 'equal'}"
        roofline_us = 1e6 * seconds(work, H200)
        rows.append(KernelRow(case, kernel, checked, loop, work.bytes, roofline_us, 1e6 * issue))
    return rows


def table(rows: list[KernelRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| Model | Shape | Kernel | Registers | Spills | SMEM, KB | CTAs an SM | CTAs | Instructions "
        "| Main loop | Executed | MB | Roofline, µs | Issue, µs |",
        "|---|---|---|" + "---:|" * 11,
    ]
    for row in rows:
        kernel = row.kernel
        assert kernel.instructions is not None
        cells = (
            row.case.model,
            row.case.shape,
            kernel.name,
            kernel.registers,
            kernel.spill_bytes,
            round((kernel.smem_bytes or 0) / 1024),
            kernel.ctas_per_sm,
            kernel.ctas,
            kernel.instructions.counts.total(),
            row.loop or "",
            row.executed,
            f"{row.bytes / 1e6:.2f}",
            f"{row.roofline_us:.1f}",
            f"{row.issue_us:.1f}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compiles, and writes the page."""
    seen: dict[tuple[str, str], list[KernelRow]] = {}
    by_op: dict[str, list[KernelRow]] = {}
    for case in report_cases():
        # Models share layers' shapes; the same call is compiled once.
        key = (case.op, str((case.abstract_inputs, case.shape)))
        if key not in seen:
            print(case.name, flush=True)
            seen[key] = rows_of(case)
            by_op.setdefault(case.op, []).extend(seen[key])
    parts = [_INTRO.format(jax=jax.__version__, sms=NUM_SMS)]
    parts += [f"## {op}\n\n{table(rows)}\n\n" for op, rows in by_op.items()]
    PAGE.write_text("".join(parts).rstrip() + "\n")
    print(f"{sum(map(len, by_op.values()))} kernels: {PAGE}")


if __name__ == "__main__":
    main()
