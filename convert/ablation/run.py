"""Runs an ablation: quantizes a model by the recipe of each step and measures its perplexity."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64, Int32

from atom_jax.checkpoint import (
    layer_specs,
    load_layer,
    shared_params,
    shared_specs,
    stored_shared,
    write_shared,
)
from atom_jax.config import Format, ModelConfig, preset
from atom_jax.errors import AtomError
from atom_jax.perplexity import exp_of_mean, make_windows
from atom_jax.progress import StageProgress
from atom_jax.stored_size import bits_per_weight, stored_bytes
from atom_jax.structure import linear_shapes
from convert.ablation.results import Results, Row, WindowsName, report_of
from convert.ablation.simulation import run_simulated, simulate_layer
from convert.ablation.steps import AblationStep, make_steps, recipes
from convert.calibrate.statistics import on_device
from convert.calibrate.texts import (
    TRAINING_TOKENS,
    Calibration,
    load_calibration,
    load_training,
    window_length,
)
from convert.card import versions
from convert.float_model import FloatParams, read_layer, read_shared
from convert.groups import CHOOSABLE, choose_groups
from convert.passes.order import ResidualOrder, permute_shared, residual_order
from convert.passes.reorder import permute_residual
from convert.passes.rotate import Rotated
from convert.pipeline import calibration_job
from convert.quantize_layer import check_recipe, needs_calibration, quantize_on_windows
from convert.quantize_model import quantize_model
from convert.recipe import Recipe
from convert.refine_model import check_windows, default_steps, refine_model
from convert.sources import Source, open_source
from convert.streaming import Params, Windows, batches, embed, residual_nll, run_windows
from convert.texts import load_texts
from convert.workspace import open_workspace, remove_workspace

# For each text, by its name, the summed negative log-likelihood (nats) of each window.
TextLosses = dict[str, Float64[np.ndarray, " windows"]]


@dataclasses.dataclass(frozen=True)
class AblationOptions:
    """The options that all steps share. Fields that ``ConvertOptions`` has too mean the same as there.

    Attributes:
      group_size: group size of the steps that have groups; None to choose one that suits the model.
      num_outliers: number of outliers of the steps that have them; None to choose one that suits the model.
      fast: whether to leave out the step that refines the rounding. There is none either for a model that
        the converter does not refine by default (``convert.refine_model.default_steps``).
      texts: files on which to measure perplexity; if empty, the reported texts of ``convert.texts`` are used.
      eval_tokens: number of tokens of each text to use, from its start.
    """

    group_size: int | None = None
    num_outliers: int | None = None
    calibration: str | None = None
    calibration_tokens: int = 8192
    seed: int = 0
    fast: bool = False
    texts: tuple[Path, ...] = ()
    eval_tokens: int = 4096
    revision: str | None = None


def ablate(
    src: str | Path,
    out: str | Path,
    options: AblationOptions,
    progress: StageProgress | None = None,
    steps: Sequence[AblationStep] | None = None,
) -> dict[str, Any]:
    """Measures every step and writes ``out/ablation.json`` after each; an interrupted run can be continued.

    A step's perplexity is that of the checkpoint that ``convert`` makes with the same recipe, calibration
    text and seed. No checkpoint is written, and one layer is in memory at a time, unless the recipe refines
    the rounding: then ``out`` has the workspace of a conversion while the step runs.

    Args:
      src: folder, file, Hub id or URL, see ``convert.sources.open_source``.
      out: folder for the results; created if it does not exist.
      options: the options that all steps share.
      progress: called with (stage, done, total).
      steps: the steps; None for those of ``make_steps``.

    Returns:
      What is in ``ablation.json``, see ``convert.ablation.results.report_of``.

    Raises:
      AtomError: the source, an option or a text cannot be used, or ``out`` holds the ablation of something
        else.
    """
    source = open_source(src, revision=options.revision)
    if steps is None:
        refine = 0 if options.fast else default_steps(source.config, Format.scheme)
        steps = make_steps(*groups(source.config, options), refine)
    wanted = recipes(steps)
    misfits = _misfits(source.config, steps, wanted)
    with tempfile.TemporaryDirectory(prefix="atom-jax-ablation-") as tokenizer:
        source.write_tokenizer(Path(tokenizer))
        texts = load_texts(options.texts, Path(tokenizer), options.eval_tokens)
        job = _job(source, options, texts)
        results = Results(Path(out), job)
        run = _Ablation(source, options, texts, Path(tokenizer), results, progress or (lambda *_: None))
        for step in steps:
            recipe = wanted[step.name]
            if step.name not in misfits and results.get(step, recipe) is None:
                results.put(run.measure(step, recipe))
    report = report_of(job, steps, wanted, results, misfits)
    results.write_report(report)
    return report


def groups(config: ModelConfig, options: AblationOptions) -> tuple[int, int]:
    """Group size and number of outliers: those in ``options``, or else values that suit every linear."""
    asked = {name: getattr(options, name) for name in CHOOSABLE}
    given = {name: value for name, value in asked.items() if value is not None}
    format = choose_groups(config.replace(format=preset("w4a4kv4", **given)), CHOOSABLE - given.keys())
    assert format.group_size is not None
    return format.group_size, format.num_outliers


def _misfits(config: ModelConfig, steps: Sequence[AblationStep], wanted: dict[str, Recipe]) -> dict[str, str]:
    """Why branches do not suit the model, by name; AtomError if a step that is no branch does not suit it."""
    found = {}
    for step in steps:
        try:
            check_recipe(config, wanted[step.name])
        except AtomError as error:
            if not step.branch:
                raise
            found[step.name] = str(error)
    return found


def _job(source: Source, options: AblationOptions, texts: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything that a row depends on besides its recipe."""
    calibration = calibration_job(options.calibration, options.calibration_tokens, options.seed)
    return {
        "architecture": source.config.architecture,
        "source_sha256": source.fingerprint(),
        "calibration": calibration,
        "training": calibration | {"tokens": TRAINING_TOKENS},  # of steps that refine
        "texts": {
            name: {
                "tokens": tokens.size,
                "sha256": hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest(),
                "scored": (_eval_windows(tokens, source.config)[1] - 1).tolist(),
            }
            for name, tokens in texts.items()
        },
        "versions": versions(),
    }


def _eval_windows(
    tokens: Int32[np.ndarray, " tokens"], config: ModelConfig
) -> tuple[Int32[np.ndarray, "windows seq"], Int32[np.ndarray, " windows"]]:
    return make_windows(tokens, config=config, seq_len=window_length(config), max_tokens=None)


@dataclasses.dataclass(frozen=True)
class _Ablation:
    """What the steps of one ablation share.

    Attributes:
      source: the float model.
      options: the options that all steps share.
      texts: token ids of each evaluation text, by name.
      tokenizer: folder with the tokenizer of the model.
      results: the folder of the ablation.
      progress: called with (stage, done, total).
      orders: cache of the order of the residual stream, by whether the model is rotated.
    """

    source: Source
    options: AblationOptions
    texts: dict[str, Int32[np.ndarray, " tokens"]]
    tokenizer: Path
    results: Results
    progress: StageProgress
    orders: dict[bool, ResidualOrder] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def calibration(self) -> Calibration:
        """The calibration windows, the same for all steps; stored with the results."""
        return self._load(
            "calibration", functools.partial(load_calibration, num_tokens=self.options.calibration_tokens)
        )

    @functools.cached_property
    def training(self) -> Calibration:
        """The windows that steps with a refinement train on; stored with the results."""
        return self._load("training", load_training)

    def _load(self, name: WindowsName, load: Callable[..., Calibration]) -> Calibration:
        kept = self.results.read_windows(name)
        if kept is not None:
            return kept
        windows = load(
            self.source,
            self.tokenizer,
            self.options.calibration,
            seed=self.options.seed,
            progress=functools.partial(self.progress, f"sample {name} text"),
        )
        self.results.write_windows(name, windows)
        return windows

    @functools.cached_property
    def eval_windows(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The windows of each evaluation text and their lengths, by the name of the text."""
        return {name: _eval_windows(tokens, self.source.config) for name, tokens in self.texts.items()}

    def measure(self, step: AblationStep, recipe: Recipe) -> Row:
        """Makes the layers of a step and runs the windows of all texts through each."""
        started = time.perf_counter()
        source = Rotated(self.source) if recipe.rotate else self.source
        config = source.config.replace(format=recipe.format)
        make = self._refined if recipe.refine else self._layer_by_layer
        try:
            nll = make(step, recipe, source)
        except AtomError as error:
            raise type(error)(f"step {step.name}: {error}") from error
        return Row(
            name=step.name,
            recipe=recipe.settings(),
            simulated=step.simulated,
            perplexity={
                name: exp_of_mean(sums.sum(), sum(self.results.scored[name]), f"step {step.name}")
                for name, sums in nll.items()
            },
            nll={name: sums.tolist() for name, sums in nll.items()},
            bits_per_weight=_bits_per_weight(config, simulated=step.simulated),
            bytes=stored_bytes(shared_specs(config)) + config.num_layers * stored_bytes(layer_specs(config)),
            seconds=time.perf_counter() - started,
        )

    def _layer_by_layer(self, step: AblationStep, recipe: Recipe, source: Source) -> TextLosses:
        """The losses of a step whose layers do not depend on later ones."""
        config = source.config.replace(format=recipe.format)
        shared, order, windows = self._start(source, recipe)

        def layers() -> Iterator[Params]:
            for layer in range(config.num_layers):
                tree = read_layer(source, layer)
                if order is not None:
                    tree = permute_residual(tree, order)
                try:
                    params = _layer_params(step, tree, windows, source.config.of_layer(layer), recipe)
                except AtomError as error:
                    raise AtomError(f"layer {layer}: {error}") from error
                yield params
                _run_layer(step, layer, params, windows, config)

        return self._losses(step, config, shared, layers())

    def _refined(self, step: AblationStep, recipe: Recipe, source: Source) -> TextLosses:
        """The losses of a step that trains all layers together, which a conversion does in its workspace."""
        training = self.training.tokens
        check_windows(training)
        config = source.config.replace(format=recipe.format)
        shared, order, windows = self._start(source, recipe)
        folder = self.results.folder / step.name
        with open_workspace(folder, self.results.job | {"recipe": recipe.settings()}) as workspace:
            write_shared(workspace.checkpoint, stored_shared(shared, config), config)
            quantize_model(
                source, recipe, windows, order, workspace, functools.partial(self.progress, "quantize")
            )
            refine_model(source, recipe, training, workspace, self.progress)
            layers = (load_layer(workspace.checkpoint, layer, config) for layer in range(config.num_layers))
            nll = self._losses(step, config, shared, layers)
        remove_workspace(folder)
        return nll

    def _losses(
        self, step: AblationStep, config: ModelConfig, shared: Params, layers: Iterable[Params]
    ) -> TextLosses:
        """Runs the windows of each text through the layers, all of them through one before the next.

        Args:
          step: the step.
          config: configuration of the quantized model.
          shared: embedding, norm and head, float32.
          layers: the parameters of each layer.
        """
        if config.format.quantizes_linears:  # rounded as in a checkpoint
            shared = shared_params(stored_shared(shared, config), config, jnp.dtype(jnp.float32))
        evaluated = {
            name: embed(shared["embedding"], windows) for name, (windows, _) in self.eval_windows.items()
        }
        for layer, params in enumerate(layers):
            for windows in evaluated.values():
                _run_layer(step, layer, params, windows, config)
            self.progress(step.name, layer + 1, config.num_layers)
        return {
            name: residual_nll(x, *self.eval_windows[name], shared, config=config)
            for name, x in evaluated.items()
        }

    def _start(self, source: Source, recipe: Recipe) -> tuple[FloatParams, ResidualOrder | None, Windows]:
        """What a step needs before its first layer.

        Returns:
          Embedding, norm and head; the order of the residual stream (None unless ``reorder="folded"``); and
          the residual stream of the calibration windows in this order (no windows without calibration).
        """
        shared = read_shared(source)
        if not needs_calibration(recipe):
            return shared, None, np.zeros((0, 1, source.config.hidden_size), np.float32)
        tokens = self.calibration.tokens
        windows = embed(shared["embedding"], tokens)
        if recipe.reorder != "folded":
            return shared, None, windows
        rotated = recipe.rotate
        if rotated not in self.orders:
            self.orders[rotated] = residual_order(
                source,
                shared["embedding"],
                tokens,
                lambda done, total: self.progress(
                    f"measure outliers{' after rotation' if rotated else ''}", done, total
                ),
            )
        order = self.orders[rotated]
        return permute_shared(shared, order), order, np.ascontiguousarray(windows[..., order])


def _run_layer(step: AblationStep, layer: int, params: Params, windows: Windows, config: ModelConfig) -> None:
    """Runs a layer over windows in place; AtomError if the output is not finite."""
    run = run_simulated if step.simulated else run_windows
    for batch in batches(windows):
        batch[...] = run(params, batch, config=config.of_layer(layer))
    if not np.isfinite(windows).all():
        raise AtomError(f"the output of layer {layer} is not finite")


def _layer_params(
    step: AblationStep, tree: FloatParams, windows: Windows, config: ModelConfig, recipe: Recipe
) -> dict[str, Any]:
    if step.simulated:
        return simulate_layer(tree, windows, config=config, recipe=recipe)
    if recipe.format.quantizes_linears:
        return quantize_on_windows(tree, windows, config=config, recipe=recipe).params
    return on_device(tree)


def _bits_per_weight(config: ModelConfig, *, simulated: bool) -> float:
    """As ``bits_per_weight``; in a simulated step an outlier has two bytes instead of one."""
    bits = bits_per_weight(config)
    if simulated:
        shapes = linear_shapes(config).values()
        outliers = sum(rows * config.format.num_outliers for rows, _ in shapes)
        bits += 8 * outliers / sum(math.prod(shape) for shape in shapes)
    return bits
