"""Bad input through the command line: one line that names the culprit, status 2, and nothing left behind."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert.__main__ import app
from tests.convert.jobs import save_text
from tests.convert.tiny import (
    save_gguf,
    save_tiny,
    save_tokenizer,
    save_weights,
    tiny_config,
    tiny_tensors,
    to_gguf,
    write_json,
)

_PROGRESS = re.compile(r"━|^[\w ]+: [\d.]+ s$")
ROOT = Path(__file__).parents[2]
LAST = "model.layers.1.mlp.down_proj.weight"  # read last of all
FLOAT = ("--scheme", "bf16")
FITTING = ("--group-size", "32", "--num-outliers", "32")

# Writes a bad source into a folder that is there; returns the source and what the message must contain.
Make = Callable[[Path], tuple[Path, tuple[str, ...]]]


def truncated_safetensors(folder: Path) -> tuple[Path, tuple[str, ...]]:
    source = save_tiny(folder)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return source, (str(file), "not a complete safetensors file")


def missing_shard(folder: Path) -> tuple[Path, tuple[str, ...]]:
    source = save_tiny(folder, shards=3)
    (source / "model-00002-of-00003.safetensors").unlink()
    return source, ("model-00002-of-00003.safetensors", "missing")


def wrong_shape(folder: Path) -> tuple[Path, tuple[str, ...]]:
    source, config = save_tiny(folder), tiny_config()
    save_weights(source, {**tiny_tensors(config), LAST: np.zeros((64, 96), np.float32)})
    return source, (LAST, "[64, 96]", "expected [64, 128]")


def nan_in_the_last_layer(folder: Path) -> tuple[Path, tuple[str, ...]]:
    source, tensors = save_tiny(folder), tiny_tensors(tiny_config())
    tensors[LAST][3, 5] = np.nan
    save_weights(source, tensors)
    return source, (LAST, "NaN or infinity in 1 of its values")


def infinite_embedding(folder: Path) -> tuple[Path, tuple[str, ...]]:
    source, tensors = save_tiny(folder), tiny_tensors(tiny_config())
    tensors["model.embed_tokens.weight"][0] = np.inf
    save_weights(source, tensors)
    return source, ("model.embed_tokens.weight", "NaN or infinity in 64")


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


def malicious_pickle(folder: Path) -> tuple[Path, tuple[str, ...]]:
    source = folder / "pickle"
    source.mkdir()
    write_json(source / "config.json", tiny_config())
    save_tokenizer(source)
    with zipfile.ZipFile(source / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({LAST: Malicious()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    return source, (str(source / "pytorch_model.bin"),)


def cut_gguf(folder: Path) -> tuple[Path, tuple[str, ...]]:
    config = tiny_config()
    file = save_gguf(folder / "cut.gguf", "llama", to_gguf("llama", tiny_tensors(config), config), config)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file, (str(file),)


def nothing_there(folder: Path) -> tuple[Path, tuple[str, ...]]:
    return folder / "nowhere", ("nowhere", "no such file or folder")


@pytest.mark.parametrize(
    "make",
    [
        truncated_safetensors,
        missing_shard,
        wrong_shape,
        nan_in_the_last_layer,
        infinite_embedding,
        malicious_pickle,
        cut_gguf,
        nothing_there,
    ],
    ids=lambda make: make.__name__,
)
def test_bad_source(
    make: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source, says = make(tmp_path)
    check_in_process([str(source), "out", *FLOAT], says, capfd)
    check_nothing_left(tmp_path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--group-size", "128"), ("qkv_proj", "64 input channels", "try 32 outliers with groups of 32")),
        (("--num-outliers", "48"), ("qkv_proj", "64 input channels", "try 32 outliers with groups of 32")),
        (("--group-size", "48"), ("group size 48", "32, 64, 128")),
        (("--scheme", "w3a3"), ("w3a3", "w4a4kv4", "bf16")),
        ((*FITTING, "--calib", "missing.txt"), ("missing.txt",)),
        ((*FITTING, "--calib-tokens", "5"), ("5 calibration tokens", "128")),
        ((*FLOAT, "--eval-text", "missing.txt"), ("missing.txt",)),
        ((*FLOAT, "--revision", "main"), ("revision", "main")),
    ],
)
def test_bad_option(
    options: tuple[str, ...],
    says: tuple[str, ...],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    check_in_process([str(save_tiny(tmp_path)), "out", *options], says, capfd)
    check_nothing_left(tmp_path)


def test_folder_that_cannot_be_made(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("not a folder")
    check_in_process([str(save_tiny(tmp_path)), "file/out", *FLOAT], ("file",), capfd)
    assert (tmp_path / "file").read_text() == "not a folder"


def check_in_process(arguments: list[str], says: tuple[str, ...], capfd: pytest.CaptureFixture[str]) -> None:
    """Runs the command in this process, which has imported and compiled what it needs."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        app(arguments, prog_name="python -m convert")
    output = capfd.readouterr()
    check_error(ended.value.code, output.out, output.err, says)


def check_error(status: Any, out: str, err: str, says: tuple[str, ...]) -> None:
    lines = [line for line in err.splitlines() if not _PROGRESS.search(line)]
    assert status == 2 and out == "", (status, out, err)
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    for part in says:
        assert part in lines[0], lines[0]


def check_nothing_left(folder: Path) -> None:
    assert not [path for path in folder.iterdir() if path.name.startswith("out")]


def run_command(
    folder: Path, arguments: list[str], file_limit: int | None = None
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; no file may grow beyond ``file_limit`` kilobytes."""
    command = [sys.executable, "-m", "convert", *arguments]
    if file_limit is not None:
        # A write beyond the limit fails as on a full disk (Python ignores the signal).
        command = ["bash", "-c", f'ulimit -f {file_limit}; exec "$@"', "bash", *command]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_late_error_in_a_process_of_its_own(tmp_path: Path) -> None:
    source, says = nan_in_the_last_layer(tmp_path)
    result = run_command(tmp_path, [str(source), "out", *FLOAT])
    check_error(result.returncode, result.stdout, result.stderr, says)
    check_nothing_left(tmp_path)


def test_full_disk_at_first(tmp_path: Path) -> None:
    source = save_tiny(tmp_path, vocab_size=8000)
    result = run_command(tmp_path, [str(source), "out", *FLOAT], file_limit=200)
    # Orbax: the embedding
    check_error(result.returncode, result.stdout, result.stderr, ("params/shared", "File too large"))
    check_nothing_left(tmp_path)


@pytest.mark.slow
def test_full_disk_keeps_what_is_done(tmp_path: Path) -> None:
    """The same command goes on when there is space again: tests/convert/test_resume.py."""
    source = save_tiny(tmp_path)
    save_text(tmp_path / "text.txt", 20_000)
    options = [str(source), "out", *FITTING, "--no-gptq", "--calib", "text.txt"]
    result = run_command(tmp_path, options, file_limit=200)
    says = ("residual-0001.npy", "File too large", "out.partial: the same command goes on")
    check_error(result.returncode, result.stdout, result.stderr, says)
    assert (tmp_path / "out.partial").is_dir() and not (tmp_path / "out").exists()
