"""What this CPU can do at most: how fast memory is read, and how fast INT8 products are added up."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from pallas_kernels.native.dot_products import DOT_PRODUCTS
from pallas_kernels.native.instruction_sets import available
from pallas_kernels.native.memory import I32, I64, Builder, Value, instruction
from pallas_kernels.native.vectors import INTS, broadcast

# Much more than a cache holds.
_BYTES_OF_A_THREAD = 2**28
# So many sums that are independent of each other hide the latency of the instruction, and fit the registers.
_SUMS = 12
_LOOPS = 50_000_000
_ROUNDS = 5
# Instruction sets with one instruction for 64 products or 32; its name.
DOT_INSTRUCTIONS = {"avx512_vnni": "vpdpbusd of 64 bytes", "avx_vnni": "vpdpbusd of 32 bytes"}


@njit(nogil=True)
def _exclusive_or(words: np.ndarray) -> np.int64:
    found = np.int64(0)
    for word in words:
        found ^= word
    return found


def dot_products(instructions: str) -> Any:
    """A function of Numba: ``run(loops, unsigned, signed)`` adds 4 products to every lane of so many sums.

    It returns lane 0 of all sums together: ``loops * _SUMS * 4 * unsigned * signed`` for small bytes.
    """
    multiply = DOT_PRODUCTS[instructions]

    @instruction(types.int64(types.int64, types.int64, types.int64))
    def run(builder: Builder, loops: Value, unsigned: Value, signed: Value) -> Value:
        fours = [
            broadcast(
                builder,
                builder.mul(builder.trunc(builder.and_(x, I64(255)), I32), ir.Constant(I32, 0x01010101)),
                INTS,
            )
            for x in (unsigned, signed)
        ]
        before, body, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
        builder.branch(body)
        builder.position_at_end(body)
        count, *sums = (builder.phi(kind) for kind in (I64, *[INTS] * _SUMS))
        results = [multiply(builder, total, *fours) for total in sums]
        left = builder.sub(count, I64(1))
        for phi, first, next_one in zip(
            (count, *sums), (loops, *[ir.Constant(INTS, [0] * 16)] * _SUMS), (left, *results), strict=True
        ):
            phi.add_incoming(first, before)
            phi.add_incoming(next_one, body)
        builder.cbranch(builder.icmp_signed(">", left, I64(0)), body, after)
        builder.position_at_end(after)
        total = results[0]
        for each in results[1:]:
            total = builder.add(total, each)
        return builder.sext(builder.extract_element(total, I32(0)), I64)

    @njit(nogil=True)
    def function(loops: int, unsigned: int, signed: int) -> int:
        return run(loops, unsigned, signed)

    return function


def _fastest(work: Callable[[int], Any], threads: int) -> float:
    """Seconds of the fastest of some rounds of ``work``, in as many threads at once, of which none shares."""
    times = []
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))  # compiles
        for _ in range(_ROUNDS):
            started = time.perf_counter()
            list(pool.map(work, range(threads)))
            times.append(time.perf_counter() - started)
    return min(times)


def measure() -> dict[str, Any]:
    """The limits, of as many threads as this process may have cores.

    Returns:
      "threads"; "read_bytes_per_second": a sum (exclusive or) over memory that no cache holds;
      "dot_instruction" and "dot_ops_per_second": the best instruction for INT8 products and its rate from
      registers, a multiplication and an addition counted as two; None where the CPU has no such instruction.
    """
    threads = len(os.sched_getaffinity(0))
    arrays = [np.ones(_BYTES_OF_A_THREAD // 8, np.int64) for _ in range(threads)]
    read = threads * _BYTES_OF_A_THREAD / _fastest(lambda index: _exclusive_or(arrays[index]), threads)
    instructions = available()[0]
    name, rate = DOT_INSTRUCTIONS.get(instructions), None
    if name is not None:
        function = dot_products(instructions)
        seconds = _fastest(lambda index: function(_LOOPS, 1, index), threads)
        rate = threads * _LOOPS * _SUMS * 64 * 2 / seconds
    return {
        "threads": threads,
        "read_bytes_per_second": read,
        "dot_instruction": name,
        "dot_ops_per_second": rate,
    }


def larger(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Of two measurements of one machine: the larger of each rate."""
    return {
        name: max(value, other[name]) if name.endswith("_per_second") and value is not None else value
        for name, value in one.items()
    }
