"""Converts the demo's model to float, to naive 4 bits and to Atom's 4 bits, and measures each variant."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from atom_jax.checkpoint import CARD_FILE, CONFIG_FILE, TOKENIZER_FOLDER, load
from atom_jax.errors import AtomError, WriteError
from atom_jax.intervals import Ratios, perplexity_ratios
from atom_jax.perplexity import exp_of_mean, make_windows, windows_nll
from atom_jax.progress import StageProgress
from convert.card import Card, versions
from convert.demo.smollm2 import SHA256, smollm2_gguf
from convert.pipeline import ConvertOptions, convert
from convert.recipe import Recipe, make_recipe
from convert.texts import load_texts, text_digests
from convert.workspace import partial_path

EVAL_SEQ_LEN = 512
EVAL_TOKENS = 1024  # of each text
# Half of the converter's default, because calibration takes half of the demo's time, and fewer tokens cost
# little accuracy here.
CALIBRATION_TOKENS = 4096
_RESULTS_FILE = "results.json"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to store the model.

    Attributes:
      name: name of the variant, and of its folder.
      label: description for tables.
      recipe: recipe of the conversion.
    """

    name: str
    label: str
    recipe: Recipe


VARIANTS = (
    Variant("float", "float (bf16)", make_recipe("bf16")),
    Variant(
        "naive-w4a4",
        "naive W4A4",
        make_recipe(
            "w4a4kv4",
            group_size=None,
            num_outliers=0,
            clip_w=1.0,
            clip_a=1.0,
            gptq=False,
            reorder="none",
            migrate=False,
            center_keys=False,
            kv_bits=16,
        ),
    ),
    Variant("atom-w4a4kv4", "Atom W4A4KV4", make_recipe("w4a4kv4", group_size=64, num_outliers=64)),
)
ATOM = VARIANTS[-1].name


class TextLosses(NamedTuple):
    """How well a checkpoint predicts the evaluation texts.

    Attributes:
      nll: for each text the summed negative log-likelihood (nats) of each of its windows.
      scored: for each text the number of scored tokens of each window.
    """

    nll: dict[str, list[float]]
    scored: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is measured of one variant alone.

    Attributes:
      nll: as in ``TextLosses``.
      scored: as in ``TextLosses``.
      size: size of the checkpoint in bytes on disk.
      seconds: time of the conversion; None if an earlier, interrupted run did a part of it.
    """

    nll: dict[str, list[float]]
    scored: dict[str, list[int]]
    size: int
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class VariantResult:
    """The measurements of one variant.

    Attributes:
      name: name of the variant.
      label: description for tables.
      perplexity: perplexity on each evaluation text, by the name of the text.
      ratio: the perplexities over those of the first variant, the float model.
      tokens: number of scored tokens of all texts.
      size: size of the checkpoint in bytes on disk.
      seconds: time of the conversion; None if an earlier, interrupted run did a part of it.
    """

    name: str
    label: str
    perplexity: dict[str, float]
    ratio: Ratios
    tokens: int
    size: int
    seconds: float | None


def prepare(folder: Path, progress: StageProgress) -> list[VariantResult]:
    """Converts and measures all variants that have no result in ``folder`` yet.

    Args:
      folder: folder for the checkpoints, in folders named after the variants, and for the results.
      progress: called with (stage, done, total).

    Raises:
      AtomError: the model cannot be fetched, or ``folder`` cannot be written or has other contents.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = _Results(folder / _RESULTS_FILE)
    for variant in VARIANTS:
        if results.get(variant) is None or not (folder / variant.name / CONFIG_FILE).is_file():
            results.put(variant, _measure(variant, folder / variant.name, progress))
    measured = [Measured(**results.get(variant)) for variant in VARIANTS]
    return [_result(variant, own, measured[0]) for variant, own in zip(VARIANTS, measured, strict=True)]


def _result(variant: Variant, own: Measured, first: Measured) -> VariantResult:
    return VariantResult(
        name=variant.name,
        label=variant.label,
        perplexity={
            text: exp_of_mean(sum(nll), sum(own.scored[text]), variant.label) for text, nll in own.nll.items()
        },
        ratio=perplexity_ratios(first.nll, own.nll, own.scored),
        tokens=sum(sum(scored) for scored in own.scored.values()),
        size=own.size,
        seconds=own.seconds,
    )


class _Results:
    """The results on disk. Each has a key of all that it depends on, and is used only if the key matches."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._entries: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # ValueError: damaged; everything is measured again
            self._entries = {}

    @staticmethod
    def _key(variant: Variant) -> dict[str, Any]:
        tokens = {"calibration": CALIBRATION_TOKENS, "evaluation": EVAL_TOKENS, "window": EVAL_SEQ_LEN}
        return {
            "recipe": variant.recipe.settings(),
            "model": SHA256,
            "tokens": tokens,
            "texts": text_digests(),
            "versions": versions(),
        }

    def get(self, variant: Variant) -> Any:
        entry = self._entries.get(variant.name)
        return entry["result"] if entry is not None and entry["key"] == self._key(variant) else None

    def put(self, variant: Variant, result: Measured) -> None:
        self._entries[variant.name] = {"key": self._key(variant), "result": dataclasses.asdict(result)}
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self._entries, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self._path)


def _measure(variant: Variant, out: Path, progress: StageProgress) -> Measured:
    def report(stage: str, done: int, total: int) -> None:
        progress(f"{variant.name}: {stage}", done, total)

    report("fetch the model", 0, 1)
    gguf = smollm2_gguf()
    report("fetch the model", 1, 1)
    options = ConvertOptions(variant.recipe, calibration_tokens=CALIBRATION_TOKENS)
    seconds = _convert(gguf, out, options, report).get("seconds")  # older cards have none
    losses = text_losses(out, report)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return Measured(*losses, size, seconds and seconds["total"])


def text_losses(checkpoint: Path, progress: StageProgress) -> TextLosses:
    """Measures a checkpoint on the first ``EVAL_TOKENS`` tokens of each reported text."""
    model = load(checkpoint)
    found = TextLosses({}, {})
    for name, tokens in load_texts([], checkpoint / TOKENIZER_FOLDER, EVAL_TOKENS).items():
        windows, lengths = make_windows(
            tokens, config=model.config, seq_len=EVAL_SEQ_LEN, max_tokens=EVAL_TOKENS
        )
        found.nll[name] = windows_nll(
            model.params,
            windows,
            lengths,
            config=model.config,
            progress=functools.partial(progress, f"measure perplexity on {name}"),
        ).tolist()
        found.scored[name] = (lengths - 1).tolist()
    return found


def _convert(gguf: Path, out: Path, options: ConvertOptions, progress: StageProgress) -> Card:
    """Converts; replaces a checkpoint or an unfinished conversion in ``out`` that has another job.

    Returns:
      The accuracy card.
    """
    try:
        return convert(gguf, out, options, progress)
    except WriteError:
        raise
    except AtomError:
        # Only folders that a conversion wrote are removed, because the user can choose any folder.
        old = [out] if (out / CARD_FILE).is_file() else []
        old += [partial_path(out)] if (partial_path(out) / "work" / "job.json").is_file() else []
        if not old:
            raise
        for path in old:
            shutil.rmtree(path)
        return convert(gguf, out, options, progress)
