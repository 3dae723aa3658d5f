"""A conversion that is killed at any moment goes on when it is started again, to the same checkpoint."""

from __future__ import annotations

import dataclasses
import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

from atom_jax.errors import AtomError
from convert import pipeline, quantize_model, refine_model, workspace
from convert.pipeline import convert
from convert.recipe import Recipe, make_recipe
from convert.workspace import Workspace, partial_path
from tests.convert.jobs import ATOM, assert_same, contents, save_text, tiny_options
from tests.convert.tiny import fails, save_tiny

ROOT = Path(__file__).parents[2]


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the program catches it. Real signals are in the tests below."""


class Steps:
    """Everything a conversion does to the disk, in order; ``kill_before`` is the step not to reach."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.kill_before: int | None = None
        for owner, name in (
            (pipeline, "write_shared"),
            (pipeline, "write_config"),
            (pipeline, "write_card"),
            (Workspace, "write_json"),
            (Workspace, "write_array"),
            (Workspace, "write_arrays"),
            (workspace.os, "replace"),
            (workspace.os, "rename"),
            (workspace.shutil, "rmtree"),
            (Path, "unlink"),
        ):
            monkeypatch.setattr(owner, name, self._counted(name, getattr(owner, name)))

    def run(self, job: Callable[[], Any], kill_before: int | None = None) -> list[str]:
        """The steps of ``job``; it is killed before the given one."""
        self.seen, self.kill_before = [], kill_before
        if kill_before is None:
            job()
        else:
            with pytest.raises(Killed):
                job()
        return self.seen

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            paths = [str(arg) for arg in args if isinstance(arg, (str, Path))]
            # What Orbax does, in its own threads, is left to the test with a real signal.
            inside_orbax = name != "write_shared" and any("/params/" in path for path in paths)
            ours = name.startswith("write_") or any(".partial" in path for path in paths)
            if ours and not inside_orbax:
                if len(self.seen) == self.kill_before:
                    raise Killed
                self.seen.append(f"{name} {Path(paths[-1]).name}")
            return function(*args, **kwargs)

        return counted


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("resume")
    text = save_text(folder / "text.txt")
    recipe = ATOM.replace(refine=2)
    return save_tiny(folder), tiny_options(text, recipe=recipe, eval_text=text, eval_tokens=300)


@pytest.fixture(scope="module")
def expected(job: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    convert(job[0], out, job[1])
    return contents(out)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


@pytest.mark.slow
def test_killed_before_every_step(
    job: tuple[Path, Any], expected: dict[str, Any], steps: Steps, tmp_path: Path
) -> None:
    all_steps = steps.run(lambda: convert(job[0], tmp_path / "out", job[1]))
    assert len(all_steps) > 25, all_steps
    published = all_steps.index("rename out")
    for moment in range(len(all_steps)):
        out = tmp_path / str(moment) / "out"
        steps.run(lambda out=out: convert(job[0], out, job[1]), kill_before=moment)
        assert out.exists() == (moment > published), all_steps[moment]
        steps.run(lambda out=out: convert(job[0], out, job[1]))
        assert_same(contents(out), expected)
        assert not partial_path(out).exists(), all_steps[moment]
        shutil.rmtree(out)


def test_killed_again_and_again(
    job: tuple[Path, Any], expected: dict[str, Any], steps: Steps, tmp_path: Path
) -> None:
    """Every run, but for the last, gets a few steps further; it starts with what the earlier ones left."""
    out = tmp_path / "out"
    runs, ended = 0, False
    while not ended:
        try:
            steps.run(lambda: convert(job[0], out, job[1]), kill_before=9)
        except pytest.fail.Exception:  # not killed: it came to its end
            ended = True
        runs += 1
        assert runs < 20
    assert runs > 2
    assert_same(contents(out), expected)
    assert not partial_path(out).exists()


def test_killed_after_publishing_and_out_removed(
    job: tuple[Path, Any], expected: dict[str, Any], steps: Steps, tmp_path: Path
) -> None:
    """What is left beside OUT says that all layers are done, but they were in OUT."""
    out = tmp_path / "out"
    published = steps.run(lambda: convert(job[0], out, job[1])).index("rename out")
    shutil.rmtree(out)
    steps.run(lambda: convert(job[0], out, job[1]), kill_before=published + 1)
    assert out.exists() and partial_path(out).exists()
    shutil.rmtree(out)
    steps.run(lambda: convert(job[0], out, job[1]))
    assert_same(contents(out), expected)
    assert not partial_path(out).exists()


def test_killed_while_an_error_cleans_up(
    job: tuple[Path, Any],
    expected: dict[str, Any],
    steps: Steps,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Half of the workspace is gone: none of it may be used."""
    out = tmp_path / "out"

    def fail(*args: Any) -> None:
        raise AtomError("something is wrong with the source")

    def remove_half(root: Path, **kwargs: Any) -> None:
        if root == partial_path(out):
            rmtree(root / "checkpoint" / "params" / "layers" / "0000")
            raise Killed
        rmtree(root, **kwargs)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_card", fail)
        patch.setattr(workspace.shutil, "rmtree", remove_half)
        with pytest.raises(Killed):
            convert(job[0], out, job[1])
    assert partial_path(out).exists() and not out.exists()
    convert(job[0], out, job[1])
    assert_same(contents(out), expected)
    assert not partial_path(out).exists()


@pytest.mark.parametrize(
    "kind",
    [
        "write_array",
        "write_arrays",
        "write_layer",
        "write_json",
        "write_config",
        "write_card",
    ],
)
def test_full_disk_once(
    kind: str,
    job: tuple[Path, Any],
    expected: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was done before the last write of each kind failed is not done again."""
    written: list[str] = []
    fail_at: int | None = None

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def write(*args: Any, **kwargs: Any) -> Any:
            nonlocal fail_at
            if len(written) == fail_at:
                fail_at = None
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written.append(name)
            return function(*args, **kwargs)

        return write

    for owner, names in (
        (Workspace, ("write_array", "write_arrays", "write_json")),
        (pipeline, ("write_shared", "write_config", "write_card")),
        (quantize_model, ("write_layer",)),
        (refine_model, ("write_layer",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
    convert(job[0], tmp_path / "whole", job[1])
    all_writes = list(written)
    written.clear()
    last = len(all_writes) - 1 - all_writes[::-1].index(kind)
    fail_at = last
    out = tmp_path / "out"
    with fails(os.strerror(errno.ENOSPC), partial_path(out), "the same command goes on"):
        convert(job[0], out, job[1])
    assert not out.exists() and partial_path(out).exists()
    written.clear()
    convert(job[0], out, job[1])
    assert len(written) < 0.6 * len(all_writes)  # all after the last file of JSON is the refinement
    assert_same(contents(out), expected)
    assert not partial_path(out).exists()


def test_full_disk_before_anything_is_done(
    job: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Workspace, "write_array", full)  # of the calibration
    with fails(os.strerror(errno.ENOSPC)):
        convert(job[0], tmp_path / "out", job[1])
    assert not list(tmp_path.iterdir())


def test_one_process_at_a_time(job: tuple[Path, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    kept: list[Path] = []

    def second(stage: str, done: int, total: int) -> None:
        if not kept:
            with fails(partial_path(out), "another process"):
                convert(job[0], out, job[1])
            kept.extend(partial_path(out).iterdir())

    convert(job[0], out, job[1], second)
    assert kept
    assert {path.name for path in out.parent.iterdir()} == {"out"}


_DRIVER = """
import os, pickle, signal, sys
import orbax.checkpoint as ocp
from convert import pipeline

moment, job = sys.argv[1:]
with open(job, "rb") as file:
    src, out, options = pickle.load(file)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def progress(stage, done, total):
    if moment == "sampling" and stage.startswith("sample") and done == 100:
        die()

if moment == "writing":  # the second layer; Orbax's threads are at it when save returns
    saves, save = [], ocp.StandardCheckpointer.save

    def save_and_die(*args, **kwargs):
        save(*args, **kwargs)
        saves.append(args)
        if len(saves) == 3:
            die()

    ocp.StandardCheckpointer.save = save_and_die
elif moment == "published":
    rename = os.rename

    def rename_and_die(old, new):
        rename(old, new)
        if new == out:
            die()

    os.rename = rename_and_die
pipeline.convert(src, out, options, progress)
"""


WITHOUT_GPTQ = dataclasses.replace(ATOM, gptq=False)  # spares the process most of the compilation


@pytest.mark.parametrize(
    ("moment", "recipe"),
    [
        pytest.param("sampling", ATOM, marks=pytest.mark.slow),
        pytest.param("writing", WITHOUT_GPTQ, marks=pytest.mark.slow),
        ("published", make_recipe("bf16")),
    ],
)
def test_sigkill(moment: str, recipe: Recipe, job: tuple[Path, Any], tmp_path: Path) -> None:
    source, out = job[0], tmp_path / "out"
    text = None if moment == "sampling" else Path(job[1].calibration)
    options = tiny_options(text, recipe=recipe)
    driver, arguments = tmp_path / "driver.py", tmp_path / "job.pickle"
    driver.write_text(_DRIVER)
    arguments.write_bytes(pickle.dumps((source, out, options)))
    killed = subprocess.run(
        [sys.executable, str(driver), moment, str(arguments)],
        # As many devices as here: the number decides how many threads share a sum, and so how it is rounded.
        env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(jax.device_count())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert out.exists() == (moment == "published") and partial_path(out).exists()
    convert(source, out, options)
    assert not partial_path(out).exists()
    convert(source, tmp_path / "uninterrupted", options)
    assert_same(contents(out), contents(tmp_path / "uninterrupted"))
