"""Measures what the passes and the rounding need to know of the inputs of a layer's linears."""

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

# Number of tokens whose inputs are kept to search how scales migrate and how keys are equalized. It is small,
# because each candidate of the migration multiplies the inputs of these tokens by the weight of a linear.
_SEARCH_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class LayerStatistics:
    """Statistics of the inputs of a layer's linears, with channels in the order that the layer has now.

    Attributes:
      hessians: for each linear the mean of x x^T over its inputs x, float32 [K, K].
      inputs: for each linear its inputs on some tokens, float32 [tokens, K]; empty if the recipe does not
        need them (``needs_inputs``).
    """

    hessians: dict[str, Array]
    inputs: dict[str, Array]

    def energy(self, name: str) -> np.ndarray:
        """Energy [K] of the input channels of the linear ``name``: the diagonal of its Hessian."""
        return np.diagonal(np.asarray(self.hessians[name]))

    def permuted(self, perms: Mapping[str, np.ndarray]) -> LayerStatistics:
        """The statistics with the input channels of some linears permuted: ``new = old[perm]``."""
        hessians, inputs = dict(self.hessians), dict(self.inputs)
        for name, perm in perms.items():
            hessians[name] = hessians[name][jnp.asarray(perm)][:, jnp.asarray(perm)]
            if name in inputs:
                inputs[name] = inputs[name][..., jnp.asarray(perm)]
        return LayerStatistics(hessians, inputs)

    def divided(self, factors: Mapping[str, np.ndarray]) -> LayerStatistics:
        """The statistics of the inputs divided by ``factors`` [K], which must be given for every linear."""
        return LayerStatistics(
            {
                name: hessian / np.outer(factors[name], factors[name])
                for name, hessian in self.hessians.items()
            },
            {name: x / factors[name] for name, x in self.inputs.items()},
        )


def on_device(tree: FloatParams) -> dict[str, jax.Array]:
    """The arrays of a float layer on the default device."""
    return {name: jnp.asarray(value) for name, value in tree.items()}


def mean_hessians(params: Params, windows: Windows, config: ModelConfig) -> PerLinear:
    """The mean of x x^T over the inputs x of each linear of a float layer (see ``add_windows_to_hessians``).

    Args:
      params: parameters of the layer, on the device.
      windows: the residual stream before the layer.
      config: configuration of the float layer.

    Returns:
      For each linear a float32 array [K, K].
    """
    totals = {name: jnp.zeros((size, size)) for name, size in projections(config).items()}
    for batch in batches(windows):
        totals = add_windows_to_hessians(params, batch, totals, config=config)
        # It is faster to wait: XLA's CPU threads spin, and programs that run at the same time slow each other
        # down.
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
      tree: the float layer.
      windows: the residual stream before the layer.
      config: configuration of the float layer.
      with_inputs: whether to keep the inputs of about ``_SEARCH_TOKENS`` tokens, too.
    """
    params, inputs = on_device(tree), {}
    if with_inputs:
        some = windows[: max(1, _SEARCH_TOKENS // windows.shape[1])]
        inputs = projection_inputs(params, some, config=config)
    return LayerStatistics(mean_hessians(params, windows, config), inputs)
