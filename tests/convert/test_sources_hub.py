from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from convert.sources import hub, open_source
from tests.convert.tiny import fails, save_tiny

ID = "some-org/some-model"


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def test_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with fails(ID, "Hub cannot be reached", "local folder"):
        open_source(ID)
    with fails(f"{ID}@v2", "Hub cannot be reached"):
        open_source(ID, revision="v2")


def fake_hub(monkeypatch, files, folder=None):
    """Stands in for the Hub: a model with these ``files``; returns the patterns asked for in downloads."""
    asked = []

    def info(self, repo_id, *, revision, timeout):
        return SimpleNamespace(sha="abc", siblings=[SimpleNamespace(rfilename=name) for name in files])

    def download(repo_id, *, revision, allow_patterns):
        asked.append((revision, sorted(allow_patterns)))
        if folder is None:
            raise ConnectionError("line one\nline two")
        return str(folder)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return asked


def test_safetensors_are_preferred(monkeypatch, tmp_path):
    folder = save_tiny(tmp_path)
    files = [
        "config.json",
        "tokenizer.json",
        "README.md",
        "code.py",
        "pytorch_model.bin",
        "model.safetensors",
    ]
    asked = fake_hub(monkeypatch, [*files, "consolidated.safetensors", "onnx/model.safetensors"], folder)
    source = open_source(ID)
    assert asked == [("abc", ["config.json", "model.safetensors", "tokenizer.json"])]
    assert source.config.num_layers == 2


def test_torch_weights_where_there_is_nothing_else():
    files = [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "optimizer.bin",
        "config.json",
    ]
    assert hub.wanted_files(files, ID) == [*files[:2], "config.json"]


def test_nothing_usable(monkeypatch):
    fake_hub(monkeypatch, ["config.json", "model-Q4_K_M.gguf"])
    with fails(ID, "neither", "gguf"):
        open_source(ID)


def test_download_that_fails(monkeypatch):
    fake_hub(monkeypatch, ["config.json", "model.safetensors"])
    with fails(ID, "download", "line one line two"):
        open_source(ID)


def test_what_is_an_id():
    assert hub.is_repo_id("HuggingFaceTB/SmolLM2-135M")
    for text in ("gpt2", "./a/b", "../a", "a/b/c", "/a/b", "a/../b", "a/b\n", "a/", "https://host/a"):
        assert not hub.is_repo_id(text)
    with fails("a/b/c", "no such file or folder"):
        open_source(Path("a/b/c"))
