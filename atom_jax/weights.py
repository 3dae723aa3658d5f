"""What each scheme stores for a linear: its arrays on disk, and the weight they make in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from atom_jax.config import QuantConfig
from atom_jax.errors import AtomError
from pallas_kernels.qarrays import PACK_TILE, QuantizedWeight, TwoLevelWeight, WeightOnlyInt4, num_tiles

Specs = dict[str, jax.ShapeDtypeStruct]

_spec = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a scheme stores a quantized linear.

    Attributes:
      weight: the type in memory; its arrays have the names of the stored ones.
      specs: shape and dtype of each stored array, from rows N, channels K and group size. Scales are
        bfloat16 on disk and float32 in memory. Orbax stores no empty arrays, so these are left out.
      grouped: whether channels are in groups at all.
    """

    weight: type
    specs: Callable[[int, int, int, QuantConfig], Specs]
    grouped: bool = True

    def stored(self, shape: tuple[int, int], quantization: QuantConfig) -> Specs:
        """What is on disk of a linear [N, K]; AtomError if its K does not suit the groups."""
        group_size = self._group_size(shape[1], quantization)
        specs = self.specs(*shape, group_size, quantization)
        return {name: spec for name, spec in specs.items() if 0 not in spec.shape}

    def revive(
        self, stored: Mapping[str, np.ndarray], shape: tuple[int, int], quantization: QuantConfig
    ) -> Any:
        """The weight, or stack of weights, on the default device.

        Args:
          stored: the arrays of ``stored``, perhaps with leading dimensions.
          shape: [N, K].
        """
        group_size = self._group_size(shape[1], quantization)
        specs = self.specs(*shape, group_size, quantization)
        lead = stored["scales"].shape[: -len(specs["scales"].shape)]
        arrays = {}
        for name, spec in specs.items():
            value = stored[name] if name in stored else np.zeros((*lead, *spec.shape), spec.dtype)
            arrays[name] = jnp.asarray(value.astype(np.float32) if value.dtype == jnp.bfloat16 else value)
        return self.weight(**arrays, group_size=group_size)

    def _group_size(self, channels: int, quantization: QuantConfig) -> int:
        if not self.grouped:
            return 0
        body = channels - quantization.num_outliers
        group_size = quantization.group_size or body
        if body < 1 or body % group_size:
            raise AtomError(
                f"{channels} input channels are not {quantization.num_outliers} outliers and whole groups of "
                f"{quantization.group_size or 'at least one channel'}"
            )
        return group_size


def _groups_and_tail(rows: int, channels: int, group_size: int, quantization: QuantConfig) -> Specs:
    """``QuantizedWeight``: INT4 groups, then the outliers."""
    body = channels - quantization.num_outliers
    return {
        "packed": _spec((rows, num_tiles(body) * PACK_TILE // 2), jnp.int8),
        "outliers": _spec((rows, quantization.num_outliers), jnp.int8),
        "scales": _spec((body // group_size + 1, rows), jnp.bfloat16),
    }


def _tail_alone(rows: int, channels: int, group_size: int, quantization: QuantConfig) -> Specs:
    """``QuantizedWeight`` without groups: plain INT8."""
    return {
        "packed": _spec((rows, 0), jnp.int8),
        "outliers": _spec((rows, channels), jnp.int8),
        "scales": _spec((1, rows), jnp.bfloat16),
    }


def _groups(rows: int, channels: int, group_size: int) -> Specs:
    return {
        "packed": _spec((rows, num_tiles(channels) * PACK_TILE // 2), jnp.int8),
        "zeros": _spec((channels // group_size, rows), jnp.int8),
    }


def _weight_only(rows: int, channels: int, group_size: int, quantization: QuantConfig) -> Specs:
    """``WeightOnlyInt4``."""
    scales = _spec((channels // group_size, rows), jnp.bfloat16)
    return _groups(rows, channels, group_size) | {"scales": scales}


def _two_levels(rows: int, channels: int, group_size: int, quantization: QuantConfig) -> Specs:
    """``TwoLevelWeight``."""
    scales = {
        "scales": _spec((rows,), jnp.bfloat16),
        "group_scales": _spec((channels // group_size, rows), jnp.int8),
    }
    return _groups(rows, channels, group_size) | scales


# bf16 is missing: its linears are arrays.
FORMATS: dict[str, WeightFormat] = {
    "w4a4kv4": WeightFormat(QuantizedWeight, _groups_and_tail),
    "w4a8kv4": WeightFormat(TwoLevelWeight, _two_levels),
    "w4a16": WeightFormat(WeightOnlyInt4, _weight_only),
    "w8a8": WeightFormat(QuantizedWeight, _tail_alone, grouped=False),
}
