"""The pass that turns input channels round, so that their largest values are negative.

INT4 has one more negative value than positive ones: -8 to 7. The scale of a group follows from its largest
magnitude, times ``clip_a``. With 7/8 of it a largest value that is negative is met exactly by -8, and one
that is positive is clipped. So each channel with a heavier positive side is multiplied by -1, and so is the
weight's column: the result of the layer is unchanged. Like the factors of ``convert.passes.migrate``, the
sign is folded into the operation that produces the channel, at no run-time cost.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float32

from atom_jax.config import ModelConfig
from convert.calibrate.statistics import LayerStatistics
from convert.float_model import FloatParams
from convert.passes.migrate import ChannelFactors, fold_factors
from convert.recipe import Recipe


def turn_channels(
    layer: FloatParams, statistics: LayerStatistics, *, config: ModelConfig, recipe: Recipe
) -> tuple[FloatParams, LayerStatistics]:
    """The pass: chooses the signs by the third moments of the inputs in ``statistics``, and folds them."""
    signs: ChannelFactors = {name: _signs(x) for name, x in statistics.inputs.items()}
    # The query heads of a kv head share its v channels, and so their signs.
    moments = _third_moments(statistics.inputs["o"]).reshape(config.num_kv_heads, -1, config.head_dim)
    shared = np.where(moments.sum(axis=1, keepdims=True) > 0, -1.0, 1.0).astype(np.float32)
    signs["o"] = np.broadcast_to(shared, moments.shape).reshape(-1)
    return fold_factors(layer, signs, config), statistics.divided(signs)


def _third_moments(inputs: Float32[Array, "tokens k"]) -> Float32[np.ndarray, " k"]:
    return np.mean(np.asarray(inputs) ** 3, axis=0)


def _signs(inputs: Float32[Array, "tokens k"]) -> Float32[np.ndarray, " k"]:
    return np.where(_third_moments(inputs) > 0, -1.0, 1.0).astype(np.float32)
