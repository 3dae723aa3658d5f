"""What the calibration windows tell of a layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from atom_jax.config import ModelConfig
from convert.float_model import FloatParams
from convert.streaming import (
    Params,
    PerLinear,
    Windows,
    add_windows_to_hessians,
    batches,
    projection_inputs,
    projections,
)

# Tokens on which is searched how scales migrate (each candidate multiplies them by all linears) and how keys
# are evened out.
_SEARCH_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """What calibration knows of the inputs of a layer's projections, in the order of the layer's channels.

    Attributes:
      hessians: mean of x x^T over the inputs x of each projection.
      inputs: themselves, on some tokens; empty if the recipe has no use for them (``needs_inputs``).
    """

    hessians: dict[str, Array]
    inputs: dict[str, Array]

    def energy(self, name: str) -> np.ndarray:
        """Of each input channel of a projection."""
        return np.diagonal(np.asarray(self.hessians[name]))

    def permuted(self, perms: Mapping[str, np.ndarray]) -> LayerStatistics:
        """With the channels of some projections in another order."""
        hessians, inputs = dict(self.hessians), dict(self.inputs)
        for name, perm in perms.items():
            hessians[name] = hessians[name][jnp.asarray(perm)][:, jnp.asarray(perm)]
            if name in inputs:
                inputs[name] = inputs[name][..., jnp.asarray(perm)]
        return LayerStatistics(hessians, inputs)

    def divided(self, factors: Mapping[str, np.ndarray]) -> LayerStatistics:
        """With each channel divided by its factor."""
        return LayerStatistics(
            {
                name: hessian / np.outer(factors[name], factors[name])
                for name, hessian in self.hessians.items()
            },
            {name: x / factors[name] for name, x in self.inputs.items()},
        )


def on_device(tree: FloatParams) -> dict[str, jax.Array]:
    """The float layer as JAX arrays."""
    return {name: jnp.asarray(value) for name, value in tree.items()}


def mean_hessians(params: Params, windows: Windows, config: ModelConfig) -> PerLinear:
    """Mean of x x^T over the inputs x of each projection of a float layer (see ``add_windows_to_hessians``).

    Args:
      params: of the layer, on the device.
      windows: the residual stream before the layer.
      config: of the float layer.
    """
    totals = {name: jnp.zeros((size, size)) for name, size in projections(config).items()}
    for batch in batches(windows):
        totals = add_windows_to_hessians(params, batch, totals, config=config)
        # Waiting is faster: XLA's CPU threads spin, and programs in flight together slow each other.
        jax.block_until_ready(totals)
    num_tokens = windows.shape[0] * windows.shape[1]
    return {name: total / num_tokens for name, total in totals.items()}


def layer_statistics(
    tree: FloatParams,
    windows: Windows,
    config: ModelConfig,
    *,
    with_inputs: bool,
) -> LayerStatistics:
    """The statistics of a float layer.

    Args:
      windows: the residual stream before the layer.
      config: of the float layer.
      with_inputs: also of single tokens, of ``_SEARCH_TOKENS`` of them.
    """
    params, inputs = on_device(tree), {}
    if with_inputs:
        some = windows[: max(1, _SEARCH_TOKENS // windows.shape[1])]
        inputs = projection_inputs(params, some, config=config)
    return LayerStatistics(mean_hessians(params, windows, config), inputs)
