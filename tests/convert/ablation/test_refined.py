"""A step that refines the rounding has the layers of a conversion, and goes on where it was."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from atom_jax.checkpoint import layer_path, layer_specs
from atom_jax.orbax_items import read_tree
from convert.ablation.results import RESULTS_FILE
from convert.ablation.run import AblationOptions, ablate
from convert.ablation.steps import FLOAT, AblationStep, recipes
from convert.calibrate.texts import TRAINING_TOKENS
from convert.pipeline import ConvertOptions, convert
from convert.recipe import make_recipe
from convert.sources import open_source
from convert.workspace import partial_path
from tests.convert.ablation.short import GROUPS, rows
from tests.convert.jobs import assert_same, contents, save_text
from tests.convert.tiny import fails

REFINED = (
    FLOAT,
    AblationStep("plain", "not refined", GROUPS | {"reorder": "folded"}),
    AblationStep("refined", "rounding refined", {"refine": 2}),
)


class Finished(NamedTuple):
    """A finished ablation.

    Attributes:
      folder: where its results are.
      report: what it returned.
      layers: the layers of its last step, as they were stored when its perplexity was measured.
      stages: the stages that it reported.
    """

    folder: Path
    report: dict[str, Any]
    layers: list[Any]
    stages: set[str]


@pytest.fixture(scope="module")
def finished(source: Path, options: AblationOptions, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    out, layers, stages = tmp_path_factory.mktemp("refined"), [], set()
    checkpoint = partial_path(out / "refined") / "checkpoint"
    config = open_source(source).config.replace(format=recipes(REFINED)["refined"].format)

    def watch(stage: str, done: int, total: int) -> None:
        stages.add(stage)
        if stage == "refined":
            layers.append(read_tree(layer_path(checkpoint, done - 1), layer_specs(config)))

    return Finished(out, ablate(source, out, options, watch, steps=REFINED), layers, stages)


@pytest.mark.slow
def test_refined_layers_are_those_of_the_checkpoint(
    source: Path, options: AblationOptions, finished: Finished, tmp_path: Path
) -> None:
    report = finished.report
    row = rows(report)["refined"]
    card = convert(
        source,
        tmp_path / "out",
        ConvertOptions(
            make_recipe(**row["recipe"]),
            calibration=options.calibration,
            calibration_tokens=options.calibration_tokens,
            eval_text=options.texts[0],
            eval_tokens=options.eval_tokens,
        ),
    )
    stored = contents(tmp_path / "out")["params"]
    assert_same({"params": finished.layers}, {"params": stored["layers"]})
    assert row["perplexity"]["text.txt"] == pytest.approx(card["perplexity"]["after"], rel=1e-4)
    assert row["bytes"] == rows(report)["plain"]["bytes"]
    assert row["nll"] != rows(report)["plain"]["nll"]
    assert (row["after"], row["recipe"]["refine"]) == ("plain", 2)
    # The text that it trained on is in the report and the folder. Nothing else is left of its workspace.
    assert card["refinement"] is not None
    assert report["training"] == card["refinement"]["text"]
    assert report["job"]["training"] == report["job"]["calibration"] | {"tokens": TRAINING_TOKENS}
    folder = finished.folder
    assert np.load(folder / "training.npy").shape == tuple(report["training"]["windows"])
    assert {path.name for path in folder.iterdir()} == {RESULTS_FILE, "calibration.npy", "training.npy"}


@pytest.mark.slow
def test_interrupted_refinement_goes_on(
    source: Path, options: AblationOptions, finished: Finished, tmp_path: Path
) -> None:
    stages: list[str] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("write", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(source, tmp_path, options, interrupt, steps=REFINED)
    again = ablate(source, tmp_path, options, lambda stage, *_: stages.append(stage), steps=REFINED)
    assert set(stages) == {"measure outliers", "write", "refined"}  # nothing is quantized or trained again
    assert finished.stages > {"quantize", "run the float model", "refine", *stages}
    assert rows(again)["refined"]["nll"] == rows(finished.report)["refined"]["nll"]
    assert not partial_path(tmp_path / "refined").exists()


def test_too_little_text_to_train_on(source: Path, options: AblationOptions, tmp_path: Path) -> None:
    text = save_text(tmp_path / "short.txt", 200)
    short = dataclasses.replace(options, calibration=str(text), calibration_tokens=128)
    with fails("step refined", "at least two windows", "--fast"):
        ablate(source, tmp_path / "out", short, steps=REFINED)
    again = ablate(source, tmp_path / "out", short, steps=REFINED[:-1])
    assert list(rows(again)) == ["float", "plain"]
