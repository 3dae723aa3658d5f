"""Simulates the paper's ablation step "outliers in FP16" (section 4.1) in floating point.

No scheme can store this format and no kernel supports it. The channels of weights and activations that are
not outliers are rounded to INT4 as usual and converted back to float, the outlier channels stay as they are,
and XLA multiplies floats. Only the ablation uses this, to show what INT8 outliers cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from atom_jax.config import Format, ModelConfig
from atom_jax.structure import linear_shapes
from convert.calibrate.statistics import layer_statistics
from convert.float_model import FloatParams
from convert.quantize_layer import prepare_layer
from convert.recipe import Recipe
from convert.rounding.rtn import quantize_weight
from convert.streaming import Windows, run_layer
from pallas_kernels import ActivationFormat, quantize


def simulate_layer(
    tree: FloatParams,
    windows: Windows,
    *,
    config: ModelConfig,
    recipe: Recipe,
) -> dict[str, Any]:
    """A float layer whose weights are rounded to INT4, to nearest, except for their outlier channels.

    Arguments are those of ``convert.quantize_layer.quantize_on_windows``. The result is for
    ``run_simulated``.
    """
    order_alone = recipe.replace(migrate=False, smooth_keys=0.0, center_keys=False, rotate_inner=False)
    statistics = layer_statistics(tree, windows, config, with_inputs=False)
    layer, _ = prepare_layer(dict(tree), statistics, config, order_alone)
    for name, (_, channels) in linear_shapes(config).items():
        body = channels - recipe.format.num_outliers
        stored = quantize_weight(
            layer[name][:, :body],
            group_size=recipe.format.group_size,
            num_outliers=0,
            clip_w=recipe.clip_w,
        )
        layer[name] = np.concatenate([np.asarray(stored.dequantize()), layer[name][:, body:]], axis=1)
    return {name: jnp.asarray(value) for name, value in layer.items()}


@functools.partial(jax.jit, static_argnames=("config",))
def run_simulated(
    params: Mapping[str, Array], x: Float32[Array, "batch seq hidden"], *, config: ModelConfig
) -> Float32[Array, "batch seq hidden"]:
    """``convert.streaming.run_windows`` for a layer of ``simulate_layer``, with rounded inputs of linears."""

    def on_rounded(name: str, inputs: Array, product: Callable[[Array], Array]) -> Array:
        return product(_round_body(inputs, params.get(f"{name}_indices"), config.format))

    return run_layer(params, x, config, on_rounded)


def _round_body(
    x: Float32[Array, "m k"], indices: Int32[Array, " k"] | None, format: Format
) -> Float32[Array, "m k"]:
    """``x`` gathered by ``indices`` if given, then rounded to INT4 except for the outlier channels."""
    ordered = x if indices is None else jnp.take(x, indices, axis=-1)
    body = x.shape[-1] - format.num_outliers
    fmt = ActivationFormat(format.group_size or body, 0, format.clip_a)
    return jnp.concatenate([quantize(ordered[:, :body], fmt).dequantize(), ordered[:, body:]], axis=-1)
