"""The commit that results are saved with."""

import subprocess
from pathlib import Path

import pytest

from bench import record


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of results in a repository of two committed files."""
    results = tmp_path / "bench" / "results"
    results.mkdir(parents=True)
    for file in (results / "a.json", tmp_path / "program.py"):
        file.write_text("1")
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        author = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *author, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(record, "RESULTS", results)
    monkeypatch.delenv("ATOM_JAX_COMMIT", raising=False)
    return results


def test_new_results_leave_the_commit_as_it_is(results: Path) -> None:
    commit = record.environment()["commit"]
    (results / "a.json").write_text("2")
    assert record.environment()["commit"] == commit and len(commit) >= 7


def test_another_program_is_marked(results: Path) -> None:
    commit = record.environment()["commit"]
    (results.parents[1] / "program.py").write_text("2")
    assert record.environment()["commit"] == f"{commit}-dirty"


def test_a_copy_without_history(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_JAX_COMMIT", "abc")
    assert record.environment()["commit"] == "abc"
