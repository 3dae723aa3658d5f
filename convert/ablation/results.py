"""The results of an ablation on disk: rows that survive an interruption, and the report made from them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from atom_jax.errors import AtomError
from atom_jax.intervals import Estimate, perplexity_ratios
from convert.ablation.steps import FLOAT, PAPER_MODEL, AblationStep, bases
from convert.calibrate.texts import Calibration
from convert.recipe import Recipe

RESULTS_FILE = "ablation.json"
# The windows of text that steps are made from; each is in a file ``NAME.npy``.
WindowsName = Literal["calibration", "training"]


@dataclasses.dataclass(frozen=True)
class Row:
    """The measurements of one step.

    Attributes:
      name: name of the step.
      recipe: settings of its recipe, as ``make_recipe`` takes them.
      simulated: as ``AblationStep.simulated``.
      perplexity: perplexity on each text, by the name of the text.
      nll: summed negative log-likelihood (nats) of each window of each text.
      bits_per_weight: stored bits for each weight of the layers' linears, scales and padding included.
      bytes: size of all parameters in a checkpoint.
      seconds: time of the step.
    """

    name: str
    recipe: dict[str, Any]
    simulated: bool
    perplexity: dict[str, float]
    nll: dict[str, list[float]]
    bits_per_weight: float
    bytes: int
    seconds: float


class Results:
    """The folder of an ablation: ``ablation.json`` and the windows of calibration and training.

    A row is reused only if everything it depends on is the same: the job and the recipe.

    Args:
      folder: folder of the ablation; created if it does not exist.
      job: everything that all rows depend on, as JSON data.

    Raises:
      AtomError: the folder cannot be created or read, or holds the ablation of another job.
    """

    def __init__(self, folder: Path, job: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / RESULTS_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            self._data = {"job": job, "calibration": None, "training": None, "steps": []}
        except OSError as error:
            raise AtomError(f"{error.filename or folder}: {error.strerror or error}") from error
        except ValueError as error:
            raise AtomError(f"{self.path}: is not valid JSON: {error}; remove it") from error
        if self._data.get("job") != job:
            raise AtomError(
                f"{self.path}: is the ablation of another model, or with another text, option or version; "
                "remove it or choose another folder"
            )

    @property
    def job(self) -> dict[str, Any]:
        """Everything that all rows depend on."""
        return self._data["job"]

    @property
    def scored(self) -> dict[str, list[int]]:
        """For each text the number of scored tokens of each of its windows."""
        return {name: text["scored"] for name, text in self.job["texts"].items()}

    def get(self, step: AblationStep, recipe: Recipe) -> Row | None:
        """The row of a step; None if it has not been measured with this recipe."""
        for row in self._data["steps"]:
            same = row["name"] == step.name and row["simulated"] == step.simulated
            if same and row.get("recipe") == recipe.settings():
                return Row(**{field.name: row[field.name] for field in dataclasses.fields(Row)})
        return None

    def put(self, row: Row) -> None:
        """Adds a row, in place of an earlier row of the same name, and writes the file."""
        others = [other for other in self._data["steps"] if other["name"] != row.name]
        self._data["steps"] = [*others, dataclasses.asdict(row)]
        self._write(self._data)

    def write_report(self, report: dict[str, Any]) -> None:
        """Writes the result of ``report_of``, which contains the rows, so that later runs find them in it."""
        self._write(report)

    def about_windows(self, name: WindowsName) -> dict[str, Any] | None:
        """Kind, name, shape and hash of the windows; None if no step has needed them."""
        return self._data[name]

    def read_windows(self, name: WindowsName) -> Calibration | None:
        """The windows of an earlier run of this job; None if they are missing or were changed."""
        about, path = self._data[name], self._windows_path(name)
        if about is None or not path.exists():
            return None
        windows = Calibration(np.load(path, allow_pickle=False), about["kind"], about["name"])
        return windows if windows.sha256 == about["sha256"] else None

    def write_windows(self, name: WindowsName, windows: Calibration) -> None:
        np.save(self._windows_path(name), windows.tokens)
        self._data[name] = windows.about
        self._write(self._data)

    def _windows_path(self, name: WindowsName) -> Path:
        return self.folder / f"{name}.npy"

    def _write(self, data: dict[str, Any]) -> None:
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def report_of(
    job: dict[str, Any],
    steps: Sequence[AblationStep],
    wanted: Mapping[str, Recipe],
    results: Results,
    misfits: Mapping[str, str],
) -> dict[str, Any]:
    """The contents of ``ablation.json`` when all steps are measured.

    Args:
      job: everything that all rows depend on.
      steps: the steps in order.
      wanted: recipe of each step, by its name.
      results: the rows.
      misfits: for each step that is not possible for this model, the reason, by the step's name.

    Returns:
      A dict with ``job``; ``calibration`` and ``training``, about these windows; ``paper``, the model and the
      float perplexity of the paper's numbers; and ``steps``. Each step has the fields of its row; ``ratio``,
      its perplexity over that of the first step; and ``change``, its perplexity over that of the step named
      in ``after``. Both are ``atom_jax.intervals.Ratios``: the geometric mean over the texts and the ratio on
      each text, with intervals. A step that is not possible has ``error`` instead.
    """
    found = {step.name: results.get(step, wanted[step.name]) for step in steps}
    rows = []
    for step, base in zip(steps, bases(steps), strict=True):
        row, before, first = found[step.name], found.get(base or ""), found[steps[0].name]
        about = {
            "name": step.name,
            "label": step.label,
            "after": base,
            "branch": step.branch,
            "simulated": step.simulated,
            "paper": step.paper,
        }
        if row is None or first is None:
            rows.append(about | {"error": misfits[step.name]})
            continue
        change = None if before is None else perplexity_ratios(before.nll, row.nll, results.scored)
        rows.append(
            about
            | dataclasses.asdict(row)
            | {
                "ratio": dataclasses.asdict(perplexity_ratios(first.nll, row.nll, results.scored)),
                "change": None if change is None else dataclasses.asdict(change),
            }
        )
    return {
        "job": job,
        "calibration": results.about_windows("calibration"),
        "training": results.about_windows("training"),
        "paper": {"model": PAPER_MODEL, "float": FLOAT.paper},
        "steps": rows,
    }


def full_label(row: dict[str, Any]) -> str:
    """The label of a step for tables and plots: "+ ..." adds to the step before it, "or: ..." is a branch."""
    prefix = "" if row["after"] is None else "or: " if row["branch"] else "+ "
    return f"{prefix}{row['label']}{' (simulated)' if row['simulated'] else ''}"


def table(report: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The report as a table of text: the heading, and a row of cells for each step."""
    texts = list(report["job"]["texts"])
    paper = f"{report['paper']['model']} (paper)"
    heading = ["step", "x float", "95%", "change", *texts, "bits/weight", paper]
    rows = []
    for row in report["steps"]:
        if "error" in row:
            rows.append([full_label(row), f"not possible: {row['error']}"] + [""] * (len(heading) - 2))
            continue
        ratio, change = row["ratio"], row["change"]
        rows.append(
            [
                full_label(row),
                _number(ratio["mean"]["value"]),
                "" if change is None else _interval(Estimate(**ratio["mean"])),
                "" if change is None else _change(Estimate(**change["mean"])),
                *(_number(ratio["texts"][text]["value"]) for text in texts),
                f"{row['bits_per_weight']:.2f}",
                _paper(row, report["paper"]["float"]),
            ]
        )
    return heading, rows


def _paper(row: dict[str, Any], reference: float) -> str:
    return "" if row["paper"] is None else f"{row['paper']} ({_number(row['paper'] / reference, 3)}x)"


def _interval(ratio: Estimate) -> str:
    return "" if ratio.low is None or ratio.high is None else f"{_number(ratio.low)} to {_number(ratio.high)}"


def _change(ratio: Estimate) -> str:
    """The change in percent, or as a factor from 2 on; in brackets if no change is in its interval."""
    shown = f"{ratio.value - 1:+.1%}" if ratio.value < 2 else f"x{_number(ratio.value)}"
    return shown if ratio.excludes_one else f"({shown})"


def _number(value: float, digits: int = 4) -> str:
    """A number with so many digits, or all before the point if they are more: 1.236, 12.36, 123.6, 12360."""
    return f"{value:.{max(0, digits - len(str(int(value))))}f}"
