"""The conversion from end to end: source, calibration, order, quantization layer by layer, checkpoint."""

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
    shared_path,
    shared_specs,
    stored_form,
    write_config,
    write_tree,
)
from atom_jax.errors import AtomError
from atom_jax.progress import StageProgress
from atom_jax.schemes import SCHEMES
from atom_jax.text import encode, read_text
from convert.calibrate.texts import Calibration, load_calibration
from convert.card import Card, make_card, read_card, versions, write_card
from convert.float_model import read_shared
from convert.groups import choose_groups
from convert.measure import checkpoint_perplexity, source_perplexity
from convert.passes.order import ResidualOrder, permute_shared, residual_order
from convert.passes.outliers import candidates, measure_outliers
from convert.passes.rotate import Rotated
from convert.quantize_layer import check_recipe, needs_calibration
from convert.quantize_model import quantize_model
from convert.recipe import Recipe
from convert.sources import Source, open_source
from convert.streaming import Windows, embed
from convert.workspace import Workspace, open_workspace, remove_workspace


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What to make of a model.

    Attributes:
      recipe: see ``convert.recipe.make_recipe``.
      calibration: a text or JSONL file, a data set id, or ``calibrate.texts.SAMPLED``; None takes built-in
        English and text sampled from the model.
      calibration_tokens: rounded down to whole windows.
      seed: of the sampled text.
      eval_text: file whose perplexity before and after goes into the accuracy card.
      eval_tokens: how many of its tokens, from the start.
      revision: of a model on the Hub.
      auto_outliers: how many outliers there are is measured (``passes.outliers``), whatever the recipe says.
      flexible: settings that nobody asked for, of ``convert.groups.CHOOSABLE``: where the recipe's do not
        suit every linear of the model, others are taken that do.

    Raises:
      AtomError: outliers are to be chosen, and the scheme has none.
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
        """The recipe's settings, as they were asked for or chosen for the model."""
        settings = self.recipe.settings()
        return settings | {"num_outliers": "auto"} if self.auto_outliers else settings


def convert(
    src: str | Path, out: str | Path, options: ConvertOptions, progress: StageProgress | None = None
) -> Card:
    """Converts a float checkpoint into an Atom-JAX one. One layer is in memory at a time.

    ``out`` appears whole or not at all. A conversion that was killed goes on where it was when called again
    with the same arguments, and ends in the same checkpoint; one that ended already is returned as it is.

    Args:
      src: what ``convert.sources.open_source`` takes.
      out: folder to make; an empty one may be there.
      options: the recipe and the texts.
      progress: called with (stage, done, total).

    Returns:
      The accuracy card, also in ``out``.

    Raises:
      AtomError: the source, an option or a text cannot be used, or ``out`` exists and is not empty. Nothing
        is left behind.
      WriteError: the disk is full, or the like; what is done is kept, as after a kill.
    """
    out = Path(out).absolute()
    source = open_source(src, revision=options.revision)
    if options.recipe.rotate:
        source = Rotated(source)
    options = _with_groups(source, options)
    if options.auto_outliers:
        candidates(source.config.replace(format=options.recipe.format))
    else:
        check_recipe(source.config, options.recipe)
    job = _job(source, options)
    if (out / CARD_FILE).exists() and read_card(out).get("job") == job:
        remove_workspace(out)
        return read_card(out)
    with open_workspace(out, job) as workspace:
        card = _convert(source, options, job, workspace, progress or (lambda stage, done, total: None))
        workspace.publish()
    return card


def _convert(
    source: Source,
    options: ConvertOptions,
    job: dict[str, Any],
    workspace: Workspace,
    progress: StageProgress,
) -> Card:
    """Writes all of the checkpoint into the workspace; each step finds what an earlier run did of it."""
    recipe, outliers, calibration = options.recipe, None, None
    tokenizer = workspace.checkpoint / TOKENIZER_FOLDER
    tokenizer.mkdir(parents=True, exist_ok=True)
    source.write_tokenizer(tokenizer)
    # Read first: a text that cannot be used must not cost a conversion.
    eval_tokens = None if options.eval_text is None else _eval_tokens(options.eval_text, options, tokenizer)
    if options.auto_outliers:
        calibration = _calibration(source, options, workspace, progress)
        outliers = _outliers(source, recipe, calibration, workspace, progress)
        recipe = recipe.replace(num_outliers=outliers["chosen"])
    if needs_calibration(recipe):
        calibration = calibration or _calibration(source, options, workspace, progress)
    else:
        calibration = None
    windows, order = _write_shared(source, recipe, calibration, workspace, progress)
    stage = "quantize" if recipe.format.quantizes_linears else "write"
    errors = quantize_model(source, recipe, windows, order, workspace, functools.partial(progress, stage))
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
        before=before,
        after=after,
        notes=source.notes,
    )
    write_config(workspace.checkpoint, config)
    write_card(workspace.checkpoint, card)
    return card


def _with_groups(source: Source, options: ConvertOptions) -> ConvertOptions:
    """The options with what is flexible in them chosen for the model."""
    recipe = options.recipe
    config = source.config.replace(format=recipe.format)
    format = choose_groups(config, options.flexible, measured_outliers=options.auto_outliers)
    return dataclasses.replace(options, recipe=dataclasses.replace(recipe, format=format))


def _job(source: Source, options: ConvertOptions) -> dict[str, Any]:
    """Everything the checkpoint depends on."""
    job: dict[str, Any] = {
        "architecture": source.config.architecture,
        "source_sha256": source.fingerprint(),
        "recipe": options.settings,
        "versions": versions(),
    }
    if options.flexible:
        job["chosen"] = {name: getattr(options.recipe.format, name) for name in options.flexible}
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
    """Everything the calibration windows of a source depend on; arguments as in ``ConvertOptions``."""
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
    source: Source, options: ConvertOptions, workspace: Workspace, progress: StageProgress
) -> Calibration:
    """The calibration windows; made once, then kept."""
    tokens, about = workspace.read_array("calibration.npy"), workspace.read_json("calibration.json")
    if tokens is not None and about is not None:
        return Calibration(tokens, about["kind"], about["name"])
    calibration = load_calibration(
        source,
        workspace.checkpoint / TOKENIZER_FOLDER,
        options.calibration,
        num_tokens=options.calibration_tokens,
        seed=options.seed,
        progress=functools.partial(progress, "sample calibration text"),
    )
    workspace.write_array("calibration.npy", calibration.tokens)
    workspace.write_json("calibration.json", calibration.about)
    return calibration


def _outliers(
    source: Source, recipe: Recipe, calibration: Calibration, workspace: Workspace, progress: StageProgress
) -> dict[str, Any]:
    """The number of outliers chosen, and what the card says about it; measured once, then kept."""
    outliers = workspace.read_json("outliers.json")
    if outliers is None:
        embedding = read_shared(source)["embedding"]
        measuring = functools.partial(progress, "choose number of outliers")
        outliers = measure_outliers(source, recipe, embedding, calibration.tokens, measuring)
        workspace.write_json("outliers.json", outliers)
    return outliers


def _write_shared(
    source: Source,
    recipe: Recipe,
    calibration: Calibration | None,
    workspace: Workspace,
    progress: StageProgress,
) -> tuple[Windows, ResidualOrder | None]:
    """Writes what is outside the layers; returns the residual stream before them, and its new order if any.

    The order is the one that all layers share (``reorder="folded"``): it is measured once, then kept.
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
    specs = shared_specs(source.config.replace(format=recipe.format))
    write_tree(shared_path(workspace.checkpoint), stored_form(shared, specs))
    return windows, order
