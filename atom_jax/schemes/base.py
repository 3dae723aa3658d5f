"""What a scheme is: the settings it has, what it stores of a linear, and how that is multiplied."""

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

# Name -> shape and dtype of an array on disk.
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
      pytree: the type in memory; its arrays have the names of the stored ones.
      specs: shape and dtype of each stored array, from rows N, channels K, group size and outliers. Scales
        are bfloat16 on disk and float32 in memory. Orbax stores no empty arrays, so these are left out.
      matmul: the op of ``pallas_kernels`` that multiplies with it.
      activation: how its input is quantized, from the weight and ``clip_a``; None: not at all.
      grouped: whether channels are in groups at all.
    """

    pytree: type
    specs: Callable[[int, int, int, int], WeightSpecs]
    matmul: Callable[..., jax.Array]
    activation: Callable[[Any, float], ActivationFormat] | None = None
    grouped: bool = True

    def stored(self, shape: tuple[int, int], format: Format) -> WeightSpecs:
        """What is on disk of a linear [N, K]; AtomError if its K does not suit the groups."""
        group_size = self._group_size(shape[1], format)
        specs = self.specs(*shape, group_size, format.num_outliers)
        return {name: spec for name, spec in specs.items() if 0 not in spec.shape}

    def revive(
        self, stored: Mapping[str, np.ndarray], shape: tuple[int, int], format: Format
    ) -> PackedWeight:
        """The weight, or stack of weights, on the default device.

        Args:
          stored: the arrays of ``stored``, perhaps with leading dimensions.
          shape: [N, K].
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
    """One way to store and multiply linears; each is a module of this package, whose ``SCHEME`` it is.

    Attributes:
      name: what a user writes.
      about: in a few words, for help and error messages.
      weight: of a linear; None where linears stay floats and nothing is calibrated.
      unused: settings of ``Format`` that it has no use for, and the one value they have in it.
      defaults: of its settings, where they are not those of ``Format``.
    """

    name: str
    about: str
    weight: WeightFormat | None
    unused: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def has(self, setting: str) -> bool:
        """Whether the setting changes anything in it."""
        return setting not in self.unused


# Of schemes that keep no outliers and quantize activations, if at all, one scale a token.
NO_OUTLIERS: dict[str, Any] = {"num_outliers": 0, "clip_a": 1.0, "gather_inputs": False}


def spec(shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """One stored array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def int4_groups_with_zeros(rows: int, channels: int, group_size: int) -> WeightSpecs:
    """Packed unsigned INT4 values and the zero point of each group."""
    return {
        "packed": spec((rows, num_tiles(channels) * PACK_TILE // 2), jnp.int8),
        "zeros": spec((channels // group_size, rows), jnp.int8),
    }
