"""Tensor maps: which bytes of global and of shared memory a tensor copy moves."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from tests.pallas_kernels.ptx.errors import LaunchError, MemoryFault


@dataclasses.dataclass(frozen=True)
class TensorMap:
    """A CUtensorMap.

    Attributes:
      base: address of the tensor.
      sizes: innermost dimension first, like all that follow.
      strides: bytes.
      box: elements that one copy moves.
      swizzle: bytes of a row in which 16-byte chunks are exchanged; 0: none.
    """

    base: int
    element_bytes: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    @property
    def box_bytes(self) -> int:
        return math.prod(self.box) * self.element_bytes

    @property
    def row_bytes(self) -> int:
        return self.box[0] * self.element_bytes

    def check(self) -> None:
        """What cuTensorMapEncodeTiled demands (CUDA driver API).

        Raises:
          LaunchError: it would refuse.
        """
        problems = [
            (not 1 <= len(self.sizes) <= 5, f"rank {len(self.sizes)}"),
            (self.base % 16, "base not aligned to 16 bytes"),
            (any(not 1 <= s <= 2**32 for s in self.sizes), f"sizes {self.sizes}"),
            (any(s % 16 or not 0 <= s < 2**40 for s in self.strides[1:]), f"strides {self.strides}"),
            (any(not 1 <= b <= 256 for b in self.box), f"box {self.box}"),
            (self.row_bytes % 16, f"rows of {self.row_bytes} bytes in the box"),
            (self.swizzle not in (0, 32, 64, 128), f"swizzle {self.swizzle}"),
            (
                self.swizzle and self.row_bytes > self.swizzle,
                f"rows of {self.row_bytes} bytes in the box, swizzled in {self.swizzle}",
            ),
            (self.strides[0] != self.element_bytes, "the innermost dimension is not contiguous"),
        ]
        for wrong, what in problems:
            if wrong:
                raise LaunchError(f"tensor map: {what}: {self}")

    def global_addresses(self, start: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Addresses [rows, row_bytes] of the box at the coordinates ``start``, and which of them exist."""
        if len(start) != len(self.sizes):
            raise MemoryFault(f"{len(start)} coordinates for {self}")
        inner = start[0] * self.element_bytes + np.arange(self.row_bytes)
        inside = (inner >= 0) & (inner < self.sizes[0] * self.element_bytes)
        rows, exists = np.zeros(1, np.int64), np.ones(1, bool)
        for at, extent, stride, count in zip(
            start[1:], self.sizes[1:], self.strides[1:], self.box[1:], strict=True
        ):
            index = at + np.arange(count)
            rows = (index[:, None] * stride + rows).reshape(-1)
            exists = (((index >= 0) & (index < extent))[:, None] & exists).reshape(-1)
        return self.base + rows[:, None] + inner, exists[:, None] & inside

    def shared_addresses(self, start: int) -> np.ndarray:
        """Addresses [rows, row_bytes] in shared memory of a box at ``start``."""
        if start % (8 * self.swizzle or 128):
            raise MemoryFault(f"a tile swizzled in {self.swizzle} bytes is misaligned, at {start:#x}")
        if self.swizzle and self.row_bytes != self.swizzle:
            raise MemoryFault(f"not supported: rows of {self.row_bytes} bytes swizzled in {self.swizzle}")
        return swizzled(start + np.arange(self.box_bytes), self.swizzle).reshape(-1, self.row_bytes)


def swizzled(addresses: np.ndarray, swizzle: int) -> np.ndarray:
    """Where the hardware puts what belongs at ``addresses``: 16-byte chunks exchanged by higher bits."""
    if not swizzle:
        return addresses
    return addresses ^ (((addresses >> 7) & (swizzle // 16 - 1)) << 4)
