"""What an op must move and multiply, and the least time that a device needs for it.

Each op's ``call.py`` counts the ``Cost`` of a call from shapes alone; nothing here is measured.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """Work of one call: every input read once, every output written once.

    Attributes:
      bytes: read from and written to GPU memory.
      int8_ops: tensor core operations on INT8; a multiply-add counts as two.
      bf16_ops: the same on bfloat16.
    """

    bytes: int
    int8_ops: int = 0
    bf16_ops: int = 0


@dataclasses.dataclass(frozen=True)
class PeakRates:
    """The highest rates of a GPU by its data sheet."""

    name: str
    bytes_per_second: float
    int8_ops_per_second: float
    bf16_ops_per_second: float


# Data sheet of the H200 SXM: dense rates, no sparsity. Real kernels reach about 90% of the bandwidth and 80%
# of the tensor core's rate.
H200 = PeakRates("NVIDIA H200", 4.8e12, 1979e12, 989e12)


def seconds(cost: Cost, device: PeakRates) -> float:
    """The roofline time: memory and tensor cores work at their peak rates, and at the same time.

    INT8 and bfloat16 products share the tensor cores, so their times add up.
    """
    memory = cost.bytes / device.bytes_per_second
    compute = cost.int8_ops / device.int8_ops_per_second + cost.bf16_ops / device.bf16_ops_per_second
    return max(memory, compute)
