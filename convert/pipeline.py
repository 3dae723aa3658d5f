"""The conversion from end to end: source, calibration, order, quantization layer by layer, checkpoint."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32

from atom_jax.checkpoint import (
    CARD_FILE,
    TOKENIZER_FOLDER,
    layer_params,
    layer_path,
    layer_specs,
    read_tree,
    shared_path,
    shared_specs,
    stored_form,
    write_config,
    write_tree,
)
from atom_jax.config import ModelConfig, QuantConfig
from atom_jax.errors import AtomError
from atom_jax.perplexity import PerplexityResult
from atom_jax.schemes import SCHEMES
from atom_jax.text import encode, read_text
from convert.calibrate.statistics import on_device
from convert.calibrate.texts import SEQ_LEN, load_calibration
from convert.card import Card, make_card, read_card, versions, write_card
from convert.float_model import read_layer, read_shared
from convert.groups import choose_groups
from convert.passes.order import permute_shared, residual_order
from convert.passes.outliers import BUDGET, candidates, choose_outliers, outlier_errors, with_outliers
from convert.passes.reorder import permute_residual
from convert.passes.rotate import Rotated
from convert.quantize_layer import check_config, needs_calibration, quantize_on_windows
from convert.sources import Source, open_source
from convert.streaming import Report, advance, embed, streamed_perplexity
from convert.workspace import Workspace, open_workspace, remove_workspace

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True)
class ConvertOptions:
    """What to make of a model.

    Attributes:
      quantization: the recipe, see ``atom_jax.preset``.
      calibration: a text or JSONL file, a data set id, or ``calibration.SAMPLED``; None takes built-in
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

    quantization: QuantConfig
    calibration: str | None = None
    calibration_tokens: int = 8192
    seed: int = 0
    eval_text: Path | None = None
    eval_tokens: int = 8192
    revision: str | None = None
    auto_outliers: bool = False
    flexible: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        scheme = self.quantization.scheme
        if self.auto_outliers and not SCHEMES[scheme].has("num_outliers"):
            raise AtomError(f"{scheme} has no setting num_outliers; leave it out")

    @property
    def recipe(self) -> dict[str, Any]:
        """The recipe as it was asked for, or chosen for the model."""
        recipe = dataclasses.asdict(self.quantization)
        return recipe | {"num_outliers": "auto"} if self.auto_outliers else recipe


def convert(
    src: str | Path, out: str | Path, options: ConvertOptions, progress: Progress | None = None
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
    report = progress or (lambda stage, done, total: None)
    out = Path(out).absolute()
    source = open_source(src, revision=options.revision)
    if options.quantization.rotate:
        source = Rotated(source)
    options = _with_groups(source, options)
    config = source.config.replace(quantization=options.quantization)
    if options.auto_outliers:
        candidates(config)
    else:
        check_config(config)
    job = _job(source, options)
    if (out / CARD_FILE).exists() and read_card(out).get("job") == job:
        remove_workspace(out)
        return read_card(out)
    with open_workspace(out, job) as workspace:
        source.write_tokenizer(_made(workspace.checkpoint / TOKENIZER_FOLDER))
        conversion = _Conversion(source, config, options, workspace, report)
        eval_tokens = conversion.eval_tokens()
        outliers = None
        if options.auto_outliers:
            outliers = conversion.outliers()
            conversion = dataclasses.replace(conversion, config=with_outliers(config, outliers["chosen"]))
        card = conversion.run(job, eval_tokens, outliers)
        write_config(workspace.checkpoint, conversion.config)
        write_card(workspace.checkpoint, card)
        workspace.publish()
    return card


def _with_groups(source: Source, options: ConvertOptions) -> ConvertOptions:
    """The options with what is flexible in them chosen for the model."""
    config = source.config.replace(quantization=options.quantization)
    quantization = choose_groups(config, options.flexible, measured_outliers=options.auto_outliers)
    return dataclasses.replace(options, quantization=quantization)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _job(source: Source, options: ConvertOptions) -> dict[str, Any]:
    """Everything the checkpoint depends on."""
    job: dict[str, Any] = {
        "architecture": source.config.architecture,
        "source_sha256": source.fingerprint(),
        "recipe": options.recipe,
        "versions": versions(),
    }
    if options.flexible:
        job["chosen"] = {name: getattr(options.quantization, name) for name in options.flexible}
    config = source.config.replace(quantization=options.quantization)
    if options.auto_outliers or needs_calibration(config):
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


@dataclasses.dataclass(frozen=True)
class _Conversion:
    """The steps of one conversion and what they share."""

    source: Source
    config: ModelConfig
    options: ConvertOptions
    workspace: Workspace
    report: Progress

    def run(
        self,
        job: dict[str, Any],
        eval_tokens: Int32[np.ndarray, " tokens"] | None,
        outliers: dict[str, Any] | None,
    ) -> Card:
        shared = read_shared(self.source)
        calibration = None
        if needs_calibration(self.config):
            calibration, tokens = self._calibration()
            order = self._residual_order(shared["embedding"], tokens)
            windows = embed(shared["embedding"], tokens)
        else:
            order, windows = None, np.zeros((0, 1, self.config.hidden_size), np.float32)
        if order is not None:
            shared = permute_shared(shared, order)
            windows = np.ascontiguousarray(windows[..., order])
        write_tree(shared_path(self.workspace.checkpoint), stored_form(shared, shared_specs(self.config)))
        del shared
        errors = self._quantize(windows, order)
        before = after = None
        if eval_tokens is not None:
            before = self._perplexity("perplexity before", eval_tokens, original=True)
            after = self._perplexity("perplexity after", eval_tokens, original=False)
        return make_card(
            job,
            calibration=calibration,
            outliers=outliers,
            relative_error=errors,
            before=before,
            after=after,
            notes=self.source.notes,
        )

    def _stage(self, stage: str) -> Report:
        return lambda done, total: self.report(stage, done, total)

    def eval_tokens(self) -> Int32[np.ndarray, " tokens"] | None:
        """Read first: a text that cannot be used must not cost a conversion."""
        if self.options.eval_text is None:
            return None
        tokens = encode(self.workspace.checkpoint / TOKENIZER_FOLDER, read_text(self.options.eval_text))
        tokens = tokens[: self.options.eval_tokens]
        if tokens.size < 2:
            raise AtomError(f"{self.options.eval_text}: fewer than two tokens to measure perplexity on")
        return tokens

    def outliers(self) -> dict[str, Any]:
        """The number of outliers chosen, and what the card says about it; measured once, then kept."""
        about = self.workspace.read_json("outliers.json")
        if about is not None:
            return about
        _, tokens = self._calibration()
        errors = outlier_errors(
            self.source,
            self.config.quantization,
            read_shared(self.source)["embedding"],
            tokens,
            self._stage("choose number of outliers"),
        )
        about = {
            "chosen": choose_outliers(errors),
            "budget": BUDGET,
            "relative_error": {str(number): error for number, error in errors.items()},
        }
        self.workspace.write_json("outliers.json", about)
        return about

    def _calibration(self) -> tuple[dict[str, Any], Int32[np.ndarray, "windows seq"]]:
        """The calibration tokens, and what the card says about them; made once, then kept."""
        tokens, about = (
            self.workspace.read_array("calibration.npy"),
            self.workspace.read_json("calibration.json"),
        )
        if tokens is not None and about is not None:
            return about, tokens
        calibration = load_calibration(
            self.source,
            self.workspace.checkpoint / TOKENIZER_FOLDER,
            self.options.calibration,
            num_tokens=self.options.calibration_tokens,
            seed=self.options.seed,
            report=self._stage("sample calibration text"),
        )
        about = {
            "kind": calibration.kind,
            "name": calibration.name,
            "windows": list(calibration.tokens.shape),
            "sha256": calibration.sha256,
        }
        self.workspace.write_array("calibration.npy", calibration.tokens)
        self.workspace.write_json("calibration.json", about)
        return about, calibration.tokens

    def _residual_order(
        self, embedding: Float32[np.ndarray, "vocab hidden"], tokens: Int32[np.ndarray, "windows seq"]
    ) -> Int32[np.ndarray, " hidden"] | None:
        """The one order of the residual stream all layers share (folded), by their mean relative energy."""
        if self.config.quantization.reorder != "folded":
            return None
        order = self.workspace.read_array("residual_order.npy")
        if order is not None:
            return order
        order = residual_order(self.source, embedding, tokens, self._stage("measure outliers"))
        self.workspace.write_array("residual_order.npy", order)
        return order

    def _quantize(
        self, windows: Float32[np.ndarray, "windows seq hidden"], order: Int32[np.ndarray, " hidden"] | None
    ) -> list[dict[str, float]]:
        """Quantizes and writes each layer; ``windows`` is the residual stream before the first, updated.

        The state after a layer is that layer's files and the residual stream: an interrupted run goes on
        after the last layer for which both are there.
        """
        config, workspace = self.config, self.workspace
        state: dict[str, Any] = workspace.read_json("state.json") or {"layers": 0, "errors": []}
        errors, first = state["errors"], state["layers"]
        if first and windows.size:
            saved = workspace.read_array(f"residual-{first:04d}.npy")
            assert saved is not None, "the state is written after the array it names"
            windows = saved
        for layer in range(first, config.num_layers):
            tree = read_layer(self.source, layer)
            if order is not None:
                tree = permute_residual(tree, order)
            if config.quantization.quantizes_linears:
                params, layer_errors = self._quantize_layer(layer, tree, windows)
                errors.append(layer_errors)
            else:
                params = tree
            write_tree(layer_path(workspace.checkpoint, layer), stored_form(params, layer_specs(config)))
            if windows.size:
                advance(params, windows, config.of_layer(layer))
                if not np.isfinite(windows).all():
                    raise AtomError(f"layer {layer}: the output of the quantized layer is not finite")
                workspace.write_array(f"residual-{layer + 1:04d}.npy", windows)
            workspace.write_json("state.json", {"layers": layer + 1, "errors": errors})
            workspace.path(f"residual-{layer:04d}.npy").unlink(missing_ok=True)
            self.report(
                "quantize" if config.quantization.quantizes_linears else "write", layer + 1, config.num_layers
            )
        return errors

    def _quantize_layer(
        self, layer: int, tree: dict[str, np.ndarray], windows: Float32[np.ndarray, "windows seq hidden"]
    ) -> tuple[dict[str, Any], dict[str, float]]:
        try:
            return quantize_on_windows(
                tree,
                windows,
                float_config=self.source.config.of_layer(layer),
                config=self.config.of_layer(layer),
            )
        except AtomError as error:
            raise AtomError(f"layer {layer}: {error}") from error

    def _perplexity(
        self, stage: str, tokens: Int32[np.ndarray, " tokens"], *, original: bool
    ) -> PerplexityResult:
        """Of the source, or else of the checkpoint just written."""
        config = self.source.config if original else self.config
        checkpoint, specs = self.workspace.checkpoint, layer_specs(config)
        if original:
            shared = read_shared(self.source)
        else:
            stored = read_tree(shared_path(checkpoint), shared_specs(config))
            shared = {name: value.astype(np.float32) for name, value in stored.items()}

        def layers() -> Iterator[dict[str, Any]]:
            for layer in range(config.num_layers):
                if original:
                    yield on_device(read_layer(self.source, layer))
                else:
                    yield layer_params(read_tree(layer_path(checkpoint, layer), specs), config, jnp.float32)

        seq_len = min(SEQ_LEN, config.max_position_embeddings)
        return streamed_perplexity(
            layers, shared, tokens, config=config, seq_len=seq_len, report=self._stage(stage)
        )
