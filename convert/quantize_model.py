"""Quantizes and writes all layers, one in memory at a time; an interrupted run can be continued."""

from __future__ import annotations

from typing import Any

import numpy as np

from atom_jax.checkpoint import layer_specs, stored_form, write_layer
from atom_jax.errors import AtomError
from atom_jax.progress import Progress
from convert.channel_blocks import stack_blocks
from convert.float_model import read_layer
from convert.passes.order import ResidualOrder
from convert.passes.reorder import permute_residual
from convert.quantize_layer import quantize_on_windows
from convert.recipe import Recipe
from convert.sources import Source
from convert.streaming import Windows, run_in_place
from convert.workspace import Workspace

_STATE = "layers.json"


def quantize_model(
    source: Source,
    recipe: Recipe,
    windows: Windows,
    order: ResidualOrder | None,
    workspace: Workspace,
    progress: Progress,
) -> list[dict[str, float]]:
    """Writes the layers of the checkpoint, not quantized if the recipe quantizes no linears.

    After each layer its files and the residual stream are in the workspace. An interrupted run continues
    after the last layer for which both were written.

    Args:
      source: the float model.
      recipe: what to do to each layer.
      windows: the residual stream of the calibration windows before the first layer, in ``order``; updated
        in place. No windows if the recipe needs no calibration.
      order: order of the channels of the residual stream; None to keep the order of the source.
      workspace: where the checkpoint and the state of the run are written.
      progress: called with (layers done, layers in all).

    Returns:
      For each layer the relative errors of its linears, see ``convert.quantize_layer.quantize_layer``; empty
      if no linears are quantized.

    Raises:
      AtomError: a layer cannot be quantized; the message names it.
    """
    num_layers = source.config.num_layers
    config = source.config.replace(format=recipe.format)
    state: dict[str, Any] = workspace.read_json(_STATE) or {"done": 0, "errors": []}
    errors, first = state["errors"], state["done"]
    if first and windows.size:
        saved = workspace.read_array(_residual_file(first))
        assert saved is not None, "the state is written after the array it names"
        windows = saved
    for layer in range(first, num_layers):
        tree = read_layer(source, layer)
        params: dict[str, Any] = tree if order is None else permute_residual(tree, order)
        if recipe.format.quantizes_linears:
            try:
                params, layer_errors, targets = quantize_on_windows(
                    params, windows, config=source.config.of_layer(layer), recipe=recipe
                )
            except AtomError as error:
                raise AtomError(f"layer {layer}: {error}") from error
            errors.append(layer_errors)
            if targets:
                workspace.write_arrays(targets_file(layer), targets)
        else:
            params = stack_blocks(params, config)
        write_layer(workspace.checkpoint, layer, stored_form(params, layer_specs(config)), config)
        if windows.size:
            run_in_place(params, windows, config.of_layer(layer))
            if not np.isfinite(windows).all():
                raise AtomError(f"layer {layer}: the output of the quantized layer is not finite")
            workspace.write_array(_residual_file(layer + 1), windows)
        workspace.write_json(_STATE, {"done": layer + 1, "errors": errors})
        workspace.path(_residual_file(layer)).unlink(missing_ok=True)
        progress(layer + 1, num_layers)
    return errors


def targets_file(layer: int) -> str:
    """Where the workspace has the float weights that were rounded, for ``convert.refine``."""
    return f"targets-{layer:04d}.npz"


def _residual_file(layers_done: int) -> str:
    return f"residual-{layers_done:04d}.npy"
