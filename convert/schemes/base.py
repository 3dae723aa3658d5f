"""The type that defines how the converter quantizes weights for a scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Array, Float32, Int

from atom_jax.schemes import PackedWeight

if TYPE_CHECKING:
    from convert.recipe import Recipe


Quantize = Callable[
    [Float32[Array, "n k"], Float32[Array, "k k"] | None, "Recipe", int],
    PackedWeight,
]


@dataclasses.dataclass(frozen=True)
class Method:
    """The converter's part of a scheme. Each module of this package defines one, as ``METHOD``.

    Attributes:
      quantize: called with ``(weight [N, K], hessian [K, K], recipe, blocks)``; returns the weight in the
        type of the scheme, or the stack of its blocks (``convert.channel_blocks``) if there are more than
        one. The Hessian is the mean of x x^T over the inputs x of the weight, or None without calibration.
        It raises AtomError if the input channels do not suit the groups. None for a scheme whose linears are
        not quantized.
      rounding_order: called with the Hessian, the recipe and the number of blocks; returns the channels in
        the order in which ``quantize`` rounds them with GPTQ. None for a scheme without GPTQ.
      refined: whether the rounding of a small model is refined by default
        (``convert.refine_model.default_steps``); False where it loses next to nothing.
      unused: the settings of ``Recipe`` that the scheme does not use, with the value that each must have.
    """

    quantize: Quantize | None
    rounding_order: Callable[[Float32[Array, "k k"], Recipe, int], Int[Array | np.ndarray, " k"]] | None = (
        None
    )
    refined: bool = True
    unused: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Unused settings of the schemes without outlier channels. The range of their weights is always searched for
# each group, or not clipped at all.
ORDER_KEPT: dict[str, Any] = {"clip_w": 1.0, "reorder": "none", "migrate": False}
