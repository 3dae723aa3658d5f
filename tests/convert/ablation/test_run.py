"""The ablation: its numbers are those of checkpoints, and it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from atom_jax.structure import linear_shapes
from atom_jax_cli import app
from convert.ablation import run
from convert.ablation.plot import PLOT_FILE, can_plot, plot
from convert.ablation.results import RESULTS_FILE, table
from convert.ablation.run import AblationOptions, ablate
from convert.ablation.simulation import run_simulated, simulate_layer
from convert.ablation.steps import AblationStep, recipes
from convert.float_model import read_layer
from convert.pipeline import ConvertOptions, convert
from convert.quantize_layer import quantize_on_windows
from convert.recipe import make_recipe
from convert.refine_model import default_steps
from convert.sources import open_source
from convert.streaming import run_windows
from tests.convert.ablation.short import GROUPS, STEPS, rows
from tests.convert.jobs import contents
from tests.convert.tiny import fails, save_tiny

ABOUT = ("label", "after", "branch", "paper", "ratio", "change")  # what the report adds to a row
MEASURED = ["float", "simulated", "stored", "rotated"]


@pytest.fixture(scope="module")
def folder(source: Path, options: AblationOptions, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ablation."""
    out = tmp_path_factory.mktemp("ablation")
    ablate(source, out, options, steps=STEPS)
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RESULTS_FILE).read_text())


# The numbers.


@pytest.mark.slow
def test_perplexity_is_that_of_the_checkpoint(
    source: Path, options: AblationOptions, report: dict[str, Any], tmp_path: Path
) -> None:
    for name in ("stored", "rotated"):
        row = rows(report)[name]
        card = convert(
            source,
            tmp_path / name,
            ConvertOptions(
                make_recipe(**row["recipe"]),
                calibration=options.calibration,
                calibration_tokens=256,
                eval_text=options.texts[0],
                eval_tokens=300,
            ),
        )
        assert row["perplexity"]["text.txt"] == pytest.approx(card["perplexity"]["after"], rel=1e-4)
        before = rows(report)["float"]["perplexity"]["text.txt"]
        assert before == pytest.approx(card["perplexity"]["before"], rel=1e-4)
        stored = contents(tmp_path / name)["params"]
        assert row["bytes"] == sum(array.nbytes for array in jax.tree.leaves(stored))


def test_report(report: dict[str, Any], options: AblationOptions) -> None:
    found = rows(report)
    assert list(found) == [step.name for step in STEPS]
    for name in MEASURED:
        row, base = found[name], found.get(found[name]["after"] or "")
        assert row["perplexity"].keys() == {"text.txt", "other.txt"}
        assert row["ratio"]["texts"].keys() == row["perplexity"].keys()
        for text, perplexity in row["perplexity"].items():
            scored = report["job"]["texts"][text]["scored"]
            assert len(row["nll"][text]) == len(scored) and sum(scored) == 300 - len(scored)
            assert perplexity == pytest.approx(math.exp(sum(row["nll"][text]) / sum(scored)))
            over_float = perplexity / found["float"]["perplexity"][text]
            assert row["ratio"]["texts"][text]["value"] == pytest.approx(over_float)
            if base is not None:
                over_base = perplexity / base["perplexity"][text]
                assert row["change"]["texts"][text]["value"] == pytest.approx(over_base)
        values = [text["value"] for text in row["ratio"]["texts"].values()]
        mean = row["ratio"]["mean"]
        assert mean["value"] == pytest.approx(math.sqrt(math.prod(values)))
        assert mean["low"] <= mean["value"] <= mean["high"]
    assert found["float"]["change"] is None
    assert (found["stored"]["after"], found["rotated"]["after"]) == ("simulated", "stored")
    assert [name for name, row in found.items() if row["simulated"]] == ["simulated"]
    assert found["float"]["bits_per_weight"] == 16
    assert 4 < found["stored"]["bits_per_weight"] < found["simulated"]["bits_per_weight"] < 16
    assert found["rotated"]["bytes"] > found["stored"]["bytes"]  # its head is no longer the embedding
    assert "128" in found["misfit"]["error"] and "perplexity" not in found["misfit"]
    assert report["calibration"]["name"] == Path(options.calibration or "").name
    assert report["job"]["texts"]["text.txt"]["tokens"] == 300


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama", {"attention_bias": True}), ("qwen3", {}), ("mistral", {"sliding_window": 8})],
)
def test_simulation_differs_from_what_is_stored_by_the_rounding_of_outliers(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    opened = open_source(save_tiny(tmp_path, family, **overrides))
    tree, config = read_layer(opened, 0), opened.config.of_layer(0)
    windows = np.random.default_rng(0).normal(size=(2, 64, 64)).astype(np.float32)
    expected = np.asarray(run_windows(tree, windows, config=config))
    recipe = recipes(STEPS)["simulated"].replace(rotate_inner=False)
    quantized = config.replace(format=recipe.format)
    simulated = simulate_layer(tree, windows, config=config, recipe=recipe)
    stored = quantize_on_windows(tree, windows, config=config, recipe=recipe).params
    assert simulated.keys() == stored.keys() >= linear_shapes(config).keys()
    one = np.asarray(run_simulated(simulated, jnp.asarray(windows), config=quantized)) - expected
    other = np.asarray(run_windows(stored, windows, config=quantized)) - expected
    size = np.linalg.norm(expected - windows)
    assert 0.02 < np.linalg.norm(one) / size < 0.3
    # Where INT8 moves a value, an INT4 rounding after it may flip; unrelated errors would be at 1.4.
    assert 0 < np.linalg.norm(one - other) < 0.5 * np.linalg.norm(one)


def test_table(report: dict[str, Any]) -> None:
    heading, cells = table(report)
    assert heading[:6] == ["step", "x float", "95%", "change", "text.txt", "other.txt"]
    assert heading[-1] == "Llama-7B (paper)"
    assert [row[0] for row in cells] == [
        "float",
        "+ 32 outliers in FP16 (simulated)",
        "+ outliers in INT8",
        "or: rotated",
        "or: groups of 128",
    ]
    assert cells[1][-1] == "11.34 (2.00x)"
    assert cells[0][1:4] == ["1.000", "", ""]
    assert " to " in cells[2][2]
    change = cells[2][3].strip("()")
    assert change.endswith("%") and change[0] in "+-"
    assert cells[4][1].startswith("not possible:")
    assert {len(row) for row in cells} == {len(heading)}


def test_plot(report: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot(report, tmp_path / PLOT_FILE)
    assert (tmp_path / PLOT_FILE).read_bytes().startswith(b"\x89PNG")


# Going on.


def test_nothing_is_measured_twice(
    source: Path, options: AblationOptions, report: dict[str, Any], folder: Path
) -> None:
    stages: list[str] = []
    assert ablate(source, folder, options, lambda stage, *_: stages.append(stage), steps=STEPS) == report
    assert not stages


def test_interrupted_run_goes_on(
    source: Path, options: AblationOptions, report: dict[str, Any], tmp_path: Path
) -> None:
    stages: list[str] = []

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("stored", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ablate(source, tmp_path, options, interrupt, steps=STEPS)
    kept = json.loads((tmp_path / RESULTS_FILE).read_text())["steps"]
    assert [row["name"] for row in kept] == ["float", "simulated"]
    # Another recipe of a finished step: only that step is measured again.
    changed = (STEPS[0], dataclasses.replace(STEPS[1], changes={**GROUPS, "clip_w": 0.7}), *STEPS[2:])
    other = ablate(source, tmp_path, options, lambda stage, *_: stages.append(stage), steps=changed[:2])
    assert set(stages) == {"simulated"}
    assert rows(other)["float"] == kept[0] | {key: rows(other)["float"][key] for key in ABOUT}
    stages.clear()
    again = ablate(source, tmp_path, options, lambda stage, *_: stages.append(stage), steps=STEPS)
    assert set(stages) == {"simulated", "stored", "measure outliers after rotation", "rotated"}
    for name in MEASURED:
        assert rows(again)[name]["perplexity"] == rows(report)[name]["perplexity"]


def test_another_job_is_refused(source: Path, options: AblationOptions, folder: Path) -> None:
    before = (folder / RESULTS_FILE).read_text()
    for other in (
        dataclasses.replace(options, eval_tokens=200),
        dataclasses.replace(options, calibration_tokens=128),
        dataclasses.replace(options, texts=options.texts[:1]),
    ):
        with fails(folder / RESULTS_FILE, "another text"):
            ablate(source, folder, other, steps=STEPS)
    assert (folder / RESULTS_FILE).read_text() == before


# What is refused.


def test_groups_that_suit_where_none_are_asked_for(source: Path) -> None:
    config = open_source(source).config
    assert run.groups(config, AblationOptions()) == (64, 0)
    assert run.groups(config, AblationOptions(num_outliers=32)) == (32, 32)
    assert run.groups(config, AblationOptions(group_size=128, num_outliers=128)) == (128, 128)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"group_size": 128}, ("qkv_proj", "64 input channels")),
        ({"calibration_tokens": 64, "group_size": 32, "num_outliers": 32}, ("64 calibration tokens",)),
        ({"texts": ("missing.txt",), "group_size": 32, "num_outliers": 32}, ("missing.txt", "No such file")),
        ({"texts": ("a/x.txt", "b/x.txt"), "group_size": 32, "num_outliers": 32}, ("b/x.txt", "rename")),
        ({"texts": ("short.txt",), "group_size": 32, "num_outliers": 32}, ("short.txt", "fewer than two")),
    ],
)
def test_bad_options(changes: dict[str, Any], says: tuple[str, ...], source: Path, tmp_path: Path) -> None:
    for name in ("a/x.txt", "b/x.txt", "short.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("12" if name == "short.txt" else "in the inn")
    texts = tuple(tmp_path / name for name in changes.get("texts", ("a/x.txt",)))
    with fails(*says):
        ablate(source, tmp_path / "out", AblationOptions(**{**changes, "texts": texts}), steps=None)


def test_folder_that_cannot_be_used(source: Path, options: AblationOptions, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with fails(tmp_path / "file", "exists"):
        ablate(source, tmp_path / "file", options, steps=STEPS)
    (tmp_path / RESULTS_FILE).write_text("{")
    with fails(tmp_path / RESULTS_FILE, "remove it"):
        ablate(source, tmp_path, options, steps=STEPS)


# The command.


def test_command(source: Path, options: AblationOptions, tmp_path: Path, monkeypatch: Any) -> None:
    asked = []

    def first_step(*arguments: int) -> tuple[AblationStep, ...]:
        asked.append(arguments)
        return STEPS[:1]

    monkeypatch.setattr(run, "make_steps", first_step)
    text, out = options.texts[0], tmp_path / "out"
    args = ["ablate", str(source), str(out), "--text", str(text), "--eval-tokens", "300"]
    result = CliRunner().invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.output
    got = json.loads(result.stdout)
    assert got == json.loads((out / RESULTS_FILE).read_text())
    assert math.isfinite(got["steps"][0]["perplexity"]["text.txt"])
    assert (out / PLOT_FILE).exists() == can_plot()
    assert f"written: {out / RESULTS_FILE}" in result.stderr

    monkeypatch.setattr("convert.ablation.plot.can_plot", lambda: False)
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0, shown.output
    assert "Llama-7B (paper)" in shown.stdout and "…" not in shown.stdout
    assert "1.000" in shown.stdout
    assert "pip install 'atom-jax[bench]'" in shown.stderr

    assert CliRunner().invoke(app, [*args, "--fast", "--group-size", "32"]).exit_code == 0
    refine = default_steps(open_source(source).config, "w4a4kv4")
    assert refine > 0
    assert asked == [(64, 0, refine), (64, 0, refine), (32, 0, 0)]

    refused = CliRunner().invoke(app, [*args, "--text", str(tmp_path / "no.txt")])
    assert refused.exit_code == 2 and "no.txt" in refused.stderr
