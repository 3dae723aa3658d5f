"""Refines the rounding of all layers that were quantized; an interrupted run can be continued."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32

from atom_jax.checkpoint import (
    layer_specs,
    load_layer,
    load_shared,
    stored_form,
    write_layer,
)
from atom_jax.config import ModelConfig
from atom_jax.embedding import head_table
from atom_jax.errors import AtomError
from atom_jax.progress import Progress, StageProgress
from atom_jax.schemes import PackedWeight
from atom_jax.structure import LINEARS, num_weights
from convert.calibrate.self_sampling import SEQUENCE_LENGTH
from convert.calibrate.statistics import on_device
from convert.float_model import read_layer, read_shared
from convert.quantize_model import targets_file
from convert.recipe import REFINE_MOST_WEIGHTS, REFINE_STEPS, Recipe
from convert.refine.divergence import Head
from convert.refine.latent import make_latent
from convert.refine.low_rank import LayerFactors
from convert.refine.simulate import input_formats
from convert.refine.train import Problem, RefinedLayer, Schedule, TrainingState, residual_bytes, start, train
from convert.schemes import METHODS
from convert.sink import exact_sink
from convert.sources import Source
from convert.streaming import Windows, embed, run_in_place, run_windows
from convert.workspace import Workspace

_STATE, _TEACHER = "refine.npz", "teacher.npy"
# Of so many windows one is held out.
_HELD_OUT_EVERY = 16


def default_steps(config: ModelConfig, scheme: str) -> int:
    """Number of steps that suit a model by default: 0 for a model that would take hours on a CPU, or INT8."""
    if not METHODS[scheme].refined:
        return 0
    return REFINE_STEPS if num_weights(config) <= REFINE_MOST_WEIGHTS else 0


def refine_model(
    source: Source,
    recipe: Recipe,
    tokens: Int32[np.ndarray, "windows seq"],
    workspace: Workspace,
    progress: StageProgress,
) -> dict[str, Any]:
    """Trains the rounding of the layers that ``quantize_model`` wrote, and writes them again.

    Args:
      source: the float model.
      recipe: its ``refine`` is the number of steps.
      tokens: token ids of the windows to train on, and to choose the best state by; long ones are cut.
      workspace: where the checkpoint and the state of the run are.
      progress: called with (stage, done, total).

    Returns:
      For the accuracy card: the number of steps, the divergence of the held-out windows from the float model
      at the start and at each check, and the bytes that a step keeps for its gradients.
    """
    config = source.config.replace(format=recipe.format)
    schedule = Schedule(steps=recipe.refine)
    tokens = short_windows(tokens)
    states = workspace.read_array(_TEACHER)
    if states is None:
        states = float_states(source, tokens, functools.partial(progress, "run the float model"))
        workspace.write_array(_TEACHER, states)
    problem = _problem(source, config, tokens, states, held_out(len(tokens)), workspace)
    state = start(problem, schedule)
    kept = workspace.read_arrays(_STATE)
    if kept is not None:
        state = _restored(state, kept)
    state = train(
        problem,
        schedule,
        state,
        checked=lambda state: workspace.write_arrays(_STATE, _arrays(state)),
        progress=functools.partial(progress, "refine"),
    )
    specs = layer_specs(config)
    first = jnp.asarray(problem.embed(tokens[:, :1])[:, 0])
    for index, (layer, factors) in enumerate(zip(problem.layers, state.best, strict=True)):
        params = layer.others | rounded_weights(layer, factors)
        own = config.of_layer(index)
        if recipe.exact_sink and recipe.format.center_keys:
            params["k_mean"] = exact_sink(params, first, config=own)
            first = run_windows(params, first[:, None], config=own)[:, 0]
        write_layer(workspace.checkpoint, index, stored_form(params, specs), config)
        progress("write", index + 1, config.num_layers)
    return {
        "steps": schedule.steps,
        "held_out_windows": len(problem.held_out),
        "held_out_divergence": [float(value) for value in state.measured],
        "residual_bytes": residual_bytes(problem, schedule),
    }


@jax.jit
def rounded_weights(layer: RefinedLayer, factors: LayerFactors) -> dict[str, PackedWeight]:
    """The quantized weights of a layer, by the names of parameters."""
    return {f"{name}_proj": layer.latents[name].rounded(own.change) for name, own in factors.items()}


def float_states(source: Source, tokens: Int32[np.ndarray, "windows seq"], progress: Progress) -> Windows:
    """The float model's residual stream after its last layer, for all windows."""
    config = source.config
    x = embed(read_shared(source)["embedding"], tokens)
    for layer in range(config.num_layers):
        run_in_place(on_device(read_layer(source, layer)), x, config.of_layer(layer))
        progress(layer + 1, config.num_layers)
    return x


def short_windows(tokens: Int32[np.ndarray, "windows seq"]) -> Int32[np.ndarray, "pieces length"]:
    """The windows cut into pieces as long as sampled text: attention over longer ones would take more time.

    What is left at the end of a window is not used.
    """
    length = min(SEQUENCE_LENGTH, tokens.shape[1])
    return tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)


def check_windows(tokens: Int32[np.ndarray, "windows seq"]) -> None:
    """AtomError if there are fewer than two windows: one to train on, and one to choose the best state by."""
    if (found := len(short_windows(tokens))) < 2:
        raise AtomError(
            f"a refinement needs at least two windows of calibration text, found {found}: "
            "give more text, or leave the refinement out (--fast)"
        )


def held_out(num_windows: int) -> list[int]:
    """The indices of the windows that are not trained on, at least one.

    They are drawn at random, always the same: kinds of text alternate, and evenly spread windows would all be
    of one kind.
    """
    drawn = np.random.default_rng(0).permutation(num_windows)
    return sorted(drawn[: max(1, num_windows // _HELD_OUT_EVERY)].tolist())


def _problem(
    source: Source,
    config: ModelConfig,
    tokens: Int32[np.ndarray, "windows seq"],
    states: Windows,
    held_out: list[int],
    workspace: Workspace,
) -> Problem:
    shared = load_shared(workspace.checkpoint, config, jnp.dtype(jnp.float32))
    floats = read_shared(source)
    layers = [_read_layer(layer, config, workspace) for layer in range(config.num_layers)]
    weights = {linear.weight: layers[0].latents[linear.name].quantized for linear in LINEARS}
    return Problem(
        layers=layers,
        configs=[config.of_layer(layer) for layer in range(config.num_layers)],
        formats=input_formats(weights, config),
        embed=functools.partial(embed, shared["embedding"]),
        student=Head(jnp.asarray(shared["norm"]), _as_float(head_table(shared)), config.rms_norm_eps),
        teacher=Head(jnp.asarray(floats["norm"]), _as_float(head_table(floats)), config.rms_norm_eps),
        tokens=tokens,
        teacher_states=states,
        held_out=held_out,
    )


def _as_float(table: Any) -> jax.Array:
    return jnp.asarray(table.dequantize() if hasattr(table, "dequantize") else table, jnp.float32)


def _read_layer(layer: int, config: ModelConfig, workspace: Workspace) -> RefinedLayer:
    params = load_layer(workspace.checkpoint, layer, config)
    targets = workspace.read_arrays(targets_file(layer))
    assert targets is not None, "quantize_model writes them if the recipe refines"
    latents = {
        linear.name: make_latent(params.pop(linear.weight), targets[linear.weight]) for linear in LINEARS
    }
    return RefinedLayer(latents, params)


def _arrays(state: TrainingState) -> dict[str, np.ndarray]:
    leaves = jax.tree.leaves((state.layers, state.best))
    arrays = {f"{index:05d}": np.asarray(leaf) for index, leaf in enumerate(leaves)}
    return arrays | {"measured": np.asarray(state.measured), "step": np.asarray(state.step)}


def _restored(like: TrainingState, arrays: dict[str, np.ndarray]) -> TrainingState:
    leaves, structure = jax.tree.flatten((like.layers, like.best))
    layers, best = jax.tree.unflatten(
        structure, [jnp.asarray(arrays[f"{index:05d}"]) for index in range(len(leaves))]
    )
    return TrainingState(layers, best, list(arrays["measured"]), int(arrays["step"]))
