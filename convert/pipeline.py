"""The whole conversion: opens the source, calibrates, quantizes layer by layer, writes the checkpoint."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from atom_jax.checkpoint import (
    CARD_FILE,
    TOKENIZER_FOLDER,
    stored_shared,
    write_config,
    write_shared,
)
from atom_jax.errors import AtomError
from atom_jax.progress import StageProgress
from atom_jax.schemes import SCHEMES
from atom_jax.text import encode, read_text
from convert import groups
from convert.calibrate.texts import Calibration, load_calibration, load_training
from convert.card import Card, make_card, read_card, versions, write_card
from convert.float_model import read_shared
from convert.groups import choose_groups, with_shards
from convert.measure import checkpoint_perplexity, source_perplexity
from convert.passes.order import ResidualOrder, permute_shared, residual_order
from convert.passes.outliers import about_outliers, candidates, outlier_errors
from convert.passes.rotate import Rotated
from convert.quantize_layer import check_recipe, needs_calibration
from convert.quantize_model import quantize_model
from convert.recipe import Recipe
from convert.refine_model import check_windows, default_steps, refine_model
from convert.shards import about_shards, check_division, default_shards
from convert.sources import Source, open_source
from convert.stage_clock import StageClock
from convert.streaming import Windows, embed
from convert.workspace import Workspace, open_workspace, remove_workspace


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """The options of a conversion.

    Attributes:
      recipe: what to do to the model, see ``convert.recipe.make_recipe``.
      calibration: a text or JSONL file, a data set id, or ``calibrate.texts.SAMPLED``; None takes built-in
        English and text sampled from the model.
      calibration_tokens: number of tokens to calibrate on, rounded down to whole windows. A refinement of the
        rounding uses ``calibrate.texts.TRAINING_TOKENS`` of the same text, or as many as it has.
      seed: seed of the sampled text.
      eval_text: text file on which perplexity is measured before and after, for the accuracy card; None for
        no measurement.
      eval_tokens: number of tokens of ``eval_text`` to use, from its start.
      revision: branch, tag or commit of a model on the Hub.
      auto_outliers: whether the number of outliers is measured (``convert.passes.outliers``); the recipe's
        number is then ignored.
      flexible: names in ``CHOOSABLE`` of the settings that the user did not choose. If group size and number
        of outliers of the recipe do not suit every linear of the model, others are chosen; "refine" is chosen
        by the size of the model and the scheme (``convert.refine_model.default_steps``), and "shards" by the
        size of the model (``convert.shards.default_shards``).

    Raises:
      AtomError: ``auto_outliers`` is set for a scheme without outliers.
    """

    recipe: Recipe
    calibration: str | None = None
    calibration_tokens: int = 8192
    seed: int = 0
    eval_text: Path | None = None
    eval_tokens: int = 8192
    revision: str | None = None
    auto_outliers: bool = False
    flexible: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        scheme = self.recipe.format.scheme
        if self.auto_outliers and not SCHEMES[scheme].has("num_outliers"):
            raise AtomError(f"{scheme} has no setting num_outliers; leave it out")

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe's settings by name; the number of outliers is "auto" if it is measured."""
        settings = self.recipe.settings()
        return settings | {"num_outliers": "auto"} if self.auto_outliers else settings


# The settings that can be chosen for a model.
CHOOSABLE = groups.CHOOSABLE | {"refine", "shards"}


def convert(
    src: str | Path, out: str | Path, options: ConvertOptions, progress: StageProgress | None = None
) -> Card:
    """Converts a float checkpoint into an Atom-JAX checkpoint, with one layer in memory at a time.

    ``out`` appears when it is complete, or not at all. If a conversion was killed, a call with the same
    arguments continues it and gives the same checkpoint. If ``out`` is complete, its card is returned.

    Args:
      src: folder, file, Hub id or URL, see ``convert.sources.open_source``.
      out: folder to create; it may exist if it is empty.
      options: the options of the conversion.
      progress: called with (stage, done, total).

    Returns:
      The accuracy card, which is also written into ``out``.

    Raises:
      AtomError: the source, an option or a text cannot be used, or ``out`` exists and is not empty. Nothing
        is left behind.
      WriteError: a file cannot be written, e.g. because the disk is full. The finished part is kept, as
        after a kill, so that the conversion can be continued.
    """
    out = Path(out).absolute()
    source = open_source(src, revision=options.revision)
    if options.recipe.rotate:
        source = Rotated(source)
    options = _with_choices(source, options)
    if options.auto_outliers:
        candidates(source.config.replace(format=options.recipe.format))
    else:
        check_recipe(source.config, options.recipe)
    clock = StageClock(progress or (lambda stage, done, total: None))
    job = _job(source, options)
    if (out / CARD_FILE).exists() and read_card(out).get("job") == job:
        remove_workspace(out)
        return read_card(out)
    with open_workspace(out, job) as workspace:
        card = _convert(source, options, job, workspace, clock)
        workspace.publish()
    return card


def _convert(
    source: Source,
    options: ConvertOptions,
    job: dict[str, Any],
    workspace: Workspace,
    clock: StageClock,
) -> Card:
    """Writes the checkpoint into the workspace; each step reuses what an earlier run of it has finished."""
    recipe, outliers, calibration, progress = options.recipe, None, None, clock.report
    tokenizer = workspace.checkpoint / TOKENIZER_FOLDER
    tokenizer.mkdir(parents=True, exist_ok=True)
    source.write_tokenizer(tokenizer)
    # Read first, so that an unusable text is reported before the conversion and not after it.
    eval_tokens = None if options.eval_text is None else _eval_tokens(options.eval_text, options, tokenizer)
    if options.auto_outliers:
        calibration = _calibration(source, options, workspace, progress)
        outliers = _outliers(source, recipe, calibration, workspace, progress)
        recipe = recipe.replace(num_outliers=outliers["chosen"])
    if needs_calibration(recipe):
        calibration = calibration or _calibration(source, options, workspace, progress)
    else:
        calibration = None
    training = None
    if recipe.refine:
        training = _calibration(source, options, workspace, progress, training=True)
        check_windows(training.tokens)
    windows, order = _write_shared(source, recipe, calibration, workspace, progress)
    stage = "quantize" if recipe.format.quantizes_linears else "write"
    errors = quantize_model(source, recipe, windows, order, workspace, functools.partial(progress, stage))
    refinement = None
    if training is not None:
        refined = refine_model(source, recipe, training.tokens, workspace, progress)
        refinement = {"text": training.about, **refined}
    config = source.config.replace(format=recipe.format)
    before = after = None
    if eval_tokens is not None:
        before = source_perplexity(source, eval_tokens, functools.partial(progress, "perplexity before"))
        after = checkpoint_perplexity(
            workspace.checkpoint, config, eval_tokens, functools.partial(progress, "perplexity after")
        )
    card = make_card(
        job,
        calibration=None if calibration is None else calibration.about,
        outliers=outliers,
        relative_error=errors,
        refinement=refinement,
        shards=about_shards(config),
        before=before,
        after=after,
        seconds=None if workspace.resumed else clock.seconds(),
        notes=source.notes,
    )
    write_config(workspace.checkpoint, config)
    write_card(workspace.checkpoint, card)
    return card


def _with_choices(source: Source, options: ConvertOptions) -> ConvertOptions:
    """The options with the flexible settings chosen for the model."""
    recipe = options.recipe
    config, measured = source.config.replace(format=recipe.format), options.auto_outliers
    if "shards" in options.flexible:
        config = with_shards(config, default_shards(config, options.flexible, measured_outliers=measured))
    check_division(config)
    format = choose_groups(config, options.flexible, measured_outliers=measured)
    recipe = dataclasses.replace(recipe, format=format)
    if "refine" in options.flexible:
        recipe = recipe.replace(refine=default_steps(source.config, recipe.format.scheme))
    return dataclasses.replace(options, recipe=recipe)


def _job(source: Source, options: ConvertOptions) -> dict[str, Any]:
    """Everything that the checkpoint depends on, as JSON data."""
    job: dict[str, Any] = {
        "architecture": source.config.architecture,
        "source_sha256": source.fingerprint(),
        "recipe": options.settings,
        "versions": versions(),
    }
    if options.flexible:
        job["chosen"] = {name: options.recipe.settings()[name] for name in options.flexible}
    if options.auto_outliers or needs_calibration(options.recipe):
        job["calibration"] = calibration_job(options.calibration, options.calibration_tokens, options.seed)
    if options.eval_text is not None:
        job["eval"] = {
            "text": options.eval_text.name,
            "sha256": _text_hash(options.eval_text),
            "tokens": options.eval_tokens,
        }
    return job


def calibration_job(calibration: str | None, num_tokens: int, seed: int) -> dict[str, Any]:
    """Everything besides the source that the calibration windows depend on; see ``ConvertOptions``."""
    file = Path(calibration) if calibration else None
    return {
        "text": calibration,
        "file_sha256": _text_hash(file) if file is not None and file.exists() else None,
        "tokens": num_tokens,
        "seed": seed,
    }


def _text_hash(path: Path) -> str:
    return hashlib.sha256(read_text(path).encode()).hexdigest()


def _eval_tokens(text: Path, options: ConvertOptions, tokenizer: Path) -> Int32[np.ndarray, " tokens"]:
    tokens = encode(tokenizer, read_text(text))[: options.eval_tokens]
    if tokens.size < 2:
        raise AtomError(f"{text}: fewer than two tokens to measure perplexity on")
    return tokens


def _calibration(
    source: Source,
    options: ConvertOptions,
    workspace: Workspace,
    progress: StageProgress,
    *,
    training: bool = False,
) -> Calibration:
    """The calibration windows, or those to train on; made once and kept in the workspace."""
    name = "training" if training else "calibration"
    tokens, about = workspace.read_array(f"{name}.npy"), workspace.read_json(f"{name}.json")
    if tokens is not None and about is not None:
        return Calibration(tokens, about["kind"], about["name"])
    calibrating = functools.partial(load_calibration, num_tokens=options.calibration_tokens)
    load = load_training if training else calibrating
    calibration = load(
        source,
        workspace.checkpoint / TOKENIZER_FOLDER,
        options.calibration,
        seed=options.seed,
        progress=functools.partial(progress, f"sample {name} text"),
    )
    workspace.write_array(f"{name}.npy", calibration.tokens)
    workspace.write_json(f"{name}.json", calibration.about)
    return calibration


def _outliers(
    source: Source, recipe: Recipe, calibration: Calibration, workspace: Workspace, progress: StageProgress
) -> dict[str, Any]:
    """The number of outliers and its errors, for the card; measured once and kept in the workspace."""
    outliers = workspace.read_json("outliers.json")
    if outliers is None:
        embedding = read_shared(source)["embedding"]
        measuring = functools.partial(progress, "choose number of outliers")
        outliers = about_outliers(outlier_errors(source, recipe, embedding, calibration.tokens, measuring))
        workspace.write_json("outliers.json", outliers)
    return outliers


def _write_shared(
    source: Source,
    recipe: Recipe,
    calibration: Calibration | None,
    workspace: Workspace,
    progress: StageProgress,
) -> tuple[Windows, ResidualOrder | None]:
    """Writes the parameters outside the layers, in the order of the residual stream.

    Returns:
      The residual stream of the calibration windows before the first layer (no windows without calibration),
      and the order of its channels that all layers share (None unless ``reorder="folded"``). The order is
      measured once and kept in the workspace.
    """
    shared = read_shared(source)
    if calibration is None:
        windows, order = np.zeros((0, 1, source.config.hidden_size), np.float32), None
    else:
        windows, order = embed(shared["embedding"], calibration.tokens), None
        if recipe.reorder == "folded":
            order = workspace.read_array("residual_order.npy")
            if order is None:
                measuring = functools.partial(progress, "measure outliers")
                order = residual_order(source, shared["embedding"], calibration.tokens, measuring)
                workspace.write_array("residual_order.npy", order)
    if order is not None:
        shared = permute_shared(shared, order)
        windows = np.ascontiguousarray(windows[..., order])
    config = source.config.replace(format=recipe.format)
    write_shared(workspace.checkpoint, stored_shared(shared, config), config)
    return windows, order
