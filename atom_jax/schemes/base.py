"""The types that define a quantization scheme: its settings, how it stores a linear and multiplies it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float32

from atom_jax.errors import AtomError
from pallas_kernels.qarrays import PACK_TILE, ActivationFormat, num_tiles

if TYPE_CHECKING:
    from atom_jax.config import Format

# Shape and dtype of each array on disk, by its name.
WeightSpecs = dict[str, jax.ShapeDtypeStruct]


class PackedWeight(Protocol):
    """A quantized weight [N, K] of any scheme, or a stack of them: a pytree of integers and scales."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dequantize(self) -> Float32[Array, "*lead n k"]: ...


@dataclasses.dataclass(frozen=True)
class WeightFormat:
    """How a scheme stores a quantized linear.

    Attributes:
      pytree: type of the weight in memory; its arrays have the same names as the stored ones.
      specs: called with the number of rows N, of input channels K, the group size and the number of outliers;
        returns shape and dtype of each array. Scales are bfloat16 on disk and float32 in memory. Empty
        arrays are not stored, because Orbax does not support them.
      matmul: the op of ``pallas_kernels`` that multiplies by such a weight.
      activation: called with the weight and ``clip_a``; returns the format to which the input is quantized.
        None if the input stays in floating point.
      grouped: whether the input channels are divided into groups.
    """

    pytree: type
    specs: Callable[[int, int, int, int], WeightSpecs]
    matmul: Callable[..., jax.Array]
    activation: Callable[[Any, float], ActivationFormat] | None = None
    grouped: bool = True

    def stored(self, shape: tuple[int, int], format: Format) -> WeightSpecs:
        """Specs of the stored arrays of a linear [N, K]; AtomError if K is not outliers plus whole groups."""
        group_size = self._group_size(shape[1], format)
        specs = self.specs(*shape, group_size, format.num_outliers)
        return {name: spec for name, spec in specs.items() if 0 not in spec.shape}

    def revive(
        self, stored: Mapping[str, np.ndarray], shape: tuple[int, int], format: Format
    ) -> PackedWeight:
        """The weight, or a stack of weights, on the default device.

        Args:
          stored: the arrays on disk by name; those of a stack of weights have leading dimensions.
          shape: shape [N, K] of the linear.
          format: format of the checkpoint.
        """
        group_size = self._group_size(shape[1], format)
        specs = self.specs(*shape, group_size, format.num_outliers)
        lead = stored["scales"].shape[: -len(specs["scales"].shape)]
        arrays = {}
        for name, spec in specs.items():
            value = stored[name] if name in stored else np.zeros((*lead, *spec.shape), spec.dtype)
            arrays[name] = jnp.asarray(value.astype(np.float32) if value.dtype == jnp.bfloat16 else value)
        return self.pytree(**arrays, group_size=group_size)

    def _group_size(self, channels: int, format: Format) -> int:
        if not self.grouped:
            return 0
        body = channels - format.num_outliers
        group_size = format.group_size or body
        if body < 1 or body % group_size:
            raise AtomError(
                f"{channels} input channels are not {format.num_outliers} outliers and whole groups of "
                f"{format.group_size or 'at least one channel'}"
            )
        return group_size


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to store and multiply linears. Each module of this package defines one, as ``SCHEME``.

    Attributes:
      name: the name by which users choose the scheme.
      about: description in a few words, for help and error messages.
      weight: how a linear is stored and multiplied; None if linears are not quantized.
      unused: the settings of ``Format`` that the scheme does not use, with the value that each must have.
      defaults: default values of its settings that differ from those of ``Format``.
    """

    name: str
    about: str
    weight: WeightFormat | None
    unused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def has(self, setting: str) -> bool:
        """Whether the scheme uses the setting of this name."""
        return setting not in self.unused


# Unused settings of the schemes without outlier channels. If they quantize activations, it is with one scale
# for each token.
NO_OUTLIERS: dict[str, Any] = {
    "num_outliers": 0,
    "clip_a": 1.0,
    "rotate_inner": False,
    "gather_inputs": False,
}


def spec(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """The spec of one stored array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def int4_groups_with_zeros(rows: int, channels: int, group_size: int) -> WeightSpecs:
    """Specs of packed INT4 values (signed, -8 to 7) and of the zero point of each group and row."""
    return {
        "packed": spec((rows, num_tiles(channels) * PACK_TILE // 2), jnp.int8),
        "zeros": spec((channels // group_size, rows), jnp.int8),
    }
