"""Winners of sweeps: files that agree with the ops, and who runs with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels import dispatch, use_implementation
from pallas_kernels.mosaic.quantize_rows import RowConfig
from pallas_kernels.tuning import winners
from pallas_kernels.verification import cases
from pallas_kernels.verification.cases import Case
from tests.pallas_kernels.verification.hopper import KERNEL, hopper

H100 = "NVIDIA H100 80GB HBM3"
FILES = sorted(winners.FOLDER.glob("*.json"))
CASE = cases.norm("Llama-3-8B", 16)


@pytest.mark.parametrize("file", FILES, ids=[file.stem for file in FILES])
def test_a_kept_winner_is_one_of_the_configurations_of_its_call(file: Path):
    entries = json.loads(file.read_text())["entries"]
    measured = {(entry["op"], entry["model"]) for entry in entries}
    calls: dict[tuple[str, str], Any] = {}
    for case in cases.all_cases():
        if (case.op, case.model) in measured:
            call = case.call
            calls[case.op, dispatch.describe(case.op, call)] = call
    for entry in entries:
        call = calls[entry["op"], entry["shape"]]
        offered = [dataclasses.asdict(config) for config in dispatch.configs(entry["op"], KERNEL, call)]
        assert entry["winner"]["config"] in offered, entry["shape"]


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An H100 whose sweep found that one step a row is best for one call."""
    winner = {"config": {"slabs_per_step": 1}, "seconds": 1e-6}
    entry = {"op": "norm_quantize", "shape": "M=16 K=4096", "winner": winner}
    environment = {"versions": {"jax": jax.__version__}}
    (tmp_path / "h100.json").write_text(json.dumps({"environment": environment, "entries": [entry]}))
    monkeypatch.setattr(winners, "FOLDER", tmp_path)
    return tmp_path


def chosen(case: Case, config: Any = None) -> Any:
    """What the kernel of a call would run with."""
    with use_implementation(KERNEL, config=config), dispatch.record_choices() as choices:
        jax.eval_shape(lambda *inputs: case.function(*inputs), *case.abstract_inputs)
    return choices[0].config


def test_a_winner_replaces_the_default_where_it_was_measured(tuned: Path):
    (default, *_) = dispatch.configs(CASE.op, KERNEL, CASE.call)
    assert default != RowConfig(slabs_per_step=1)
    with hopper(tuned, kind=H100):
        assert chosen(CASE) == RowConfig(slabs_per_step=1)
        assert chosen(cases.norm("Llama-3-8B", 64)) == default  # another call
        assert chosen(CASE, RowConfig(slabs_per_step=3)) == RowConfig(slabs_per_step=3)  # what was asked for
    with hopper(tuned, kind="NVIDIA H200"):
        assert chosen(CASE) == default  # another GPU
    assert chosen(CASE) == default  # a CPU that compiles for a GPU


def test_a_winner_that_is_not_offered_is_not_used(tuned: Path):
    text = (tuned / "h100.json").read_text()
    (tuned / "h100.json").write_text(text.replace('"slabs_per_step": 1', '"slabs_per_step": 77'))
    with hopper(tuned, kind=H100):
        assert chosen(CASE) == dispatch.configs(CASE.op, KERNEL, CASE.call)[0]


def test_a_winner_with_another_jax_is_not_used(tuned: Path):
    text = (tuned / "h100.json").read_text()
    (tuned / "h100.json").write_text(text.replace(jax.__version__, "0.1.0"))
    with hopper(tuned, kind=H100):
        assert chosen(CASE) == dispatch.configs(CASE.op, KERNEL, CASE.call)[0]


def test_a_configuration_of_another_op_is_an_error():
    with pytest.raises(dispatch.Unsupported, match="norm_quantize: mosaic_sm90 does not run with"):
        chosen(CASE, "tiles")
    with (
        use_implementation("reference", config=RowConfig(1)),
        pytest.raises(dispatch.Unsupported, match="reference does not run with"),
    ):
        jax.eval_shape(lambda *inputs: CASE.function(*inputs), *CASE.abstract_inputs)
