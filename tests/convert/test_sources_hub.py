import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from convert.sources import hub, open_source
from tests.convert.tiny import fails, save_tiny

ID = "some-org/some-model"
INDEX = "model.safetensors.index.json"


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


def test_torch_weights_where_there_is_nothing_else(tmp_path):
    files = [
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "optimizer.bin",
        "config.json",
    ]
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": files[0], "b": "*", "c": "elsewhere.py"}}))
    fetched = []

    def fetch(names):
        fetched.append(names)
        return tmp_path

    assert hub.wanted_files(files, ID, fetch) == [*files[:2], "config.json"]
    assert fetched == [["pytorch_model.bin.index.json"]]


@pytest.mark.parametrize(
    ("weights", "others"),
    [
        (["weights.safetensors"], []),
        (
            ["llama-00001-of-00002.safetensors", "llama-00002-of-00002.safetensors"],
            ["adapter_model.safetensors"],
        ),
        (
            ["model-00001-of-00001.safetensors"],
            ["consolidated.safetensors", "model.fp16-00001-of-00001.safetensors"],
        ),
        (["llama-1-of-1.bin"], ["training_args.bin", "sub/pytorch_model.bin"]),
    ],
)
def test_weights_with_other_names(weights, others):
    files = ["config.json", *weights, *others]
    assert hub.wanted_files(files, ID, lambda names: pytest.fail("no index")) == ["config.json", *weights]


def test_shards_with_other_names_in_an_index(monkeypatch, tmp_path):
    folder = save_tiny(tmp_path, shards=2)
    names = [f"part-{number}.safetensors" for number in (1, 2)]
    index = json.loads((folder / INDEX).read_text())
    for old, new in zip(sorted(set(index["weight_map"].values())), names, strict=True):
        (folder / old).rename(folder / new)
        index["weight_map"] = {k: new if v == old else v for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps(index))
    files = ["config.json", INDEX, *names, "part-3.safetensors"]
    asked = fake_hub(monkeypatch, files, folder)
    assert open_source(ID).config.num_layers == 2
    assert asked == [("abc", [INDEX]), ("abc", ["config.json", INDEX, *names])]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin", "adapter_config.json"])
def test_adapter(monkeypatch, name):
    fake_hub(monkeypatch, ["README.md", name])
    with fails(ID, "adapter", name, "merge_and_unload"):
        open_source(ID)


@pytest.mark.parametrize(
    ("url", "revision"),
    [
        (f"https://huggingface.co/{ID}", None),
        (f"http://www.huggingface.co/{ID}/", None),
        (f"huggingface.co/{ID}", None),
        (f"hf.co/{ID}?library=transformers#usage", None),
        (f"hf://{ID}", None),
        (f"https://huggingface.co/{ID}/tree/main", "main"),
        (f"https://huggingface.co/{ID}/tree/refs%2Fpr%2F3", "refs/pr/3"),
    ],
)
def test_urls(monkeypatch, tmp_path, url, revision):
    asked = []
    folder = save_tiny(tmp_path)

    def download(repo_id, asked_revision):
        asked.append((repo_id, asked_revision))
        return folder

    monkeypatch.setattr(hub, "download", download)
    assert open_source(url).config.num_layers == 2
    assert asked == [(ID, revision)]
    open_source(url, revision=revision or "v2")
    assert asked[1] == (ID, revision or "v2")
    if revision:
        with fails(url, "another revision", "v2"):
            open_source(url, revision="v2")


@pytest.mark.parametrize(
    ("url", "parts"),
    [
        (f"https://example.org/{ID}", ["no URL of the Hugging Face Hub"]),
        (f"file:///{ID}", ["no URL of the Hugging Face Hub"]),
        (f"https://huggingface.co.example.org/{ID}", ["no URL of the Hugging Face Hub"]),
        ("https://huggingface.co/gpt2", ["URL of a model"]),
        ("https://huggingface.co/datasets/org/name", ["URL of a model"]),
        (f"https://huggingface.co/{ID}/tree/main/sub", ["points into", f"huggingface.co/{ID}"]),
        (f"https://huggingface.co/{ID}/resolve/main/model.gguf", ["points into"]),
        ("https://huggingface.co/../..", ["URL of a model"]),
    ],
)
def test_urls_of_something_else(url, parts):
    with fails(url, *parts):
        open_source(url)


COMMITS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(tmp_path):
    """A model in the Hub's cache as huggingface_hub leaves it: two snapshots, of links into the blobs."""
    repo = tmp_path / "models--some-org--some-model"
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs" / "pr").mkdir(parents=True)
    (repo / "refs" / "main").write_text(COMMITS[1])
    (repo / "refs" / "pr" / "1").write_text(COMMITS[0])
    for layers, commit in enumerate(COMMITS, 1):
        source = save_tiny(tmp_path / commit, num_hidden_layers=layers, shards=2)
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for file in source.iterdir():
            file.rename(repo / "blobs" / f"{layers}{file.name}")
            (snapshot / file.name).symlink_to(f"../../blobs/{layers}{file.name}")
    return repo


@pytest.mark.parametrize(
    ("revision", "layers"), [(None, 2), ("main", 2), ("pr/1", 1), (COMMITS[0], 1), ("aaaa", 1)]
)
def test_cache_folder(cache, tmp_path, revision, layers):
    source = open_source(cache, revision=revision)
    assert source.config.num_layers == layers
    assert source.tensor("model.norm.weight").shape == (64,)
    source.write_tokenizer(tmp_path / "tokenizer")
    snapshot = cache / "snapshots" / COMMITS[layers - 1]
    assert open_source(snapshot).fingerprint() == source.fingerprint()


def test_cache_folder_without_what_is_asked_for(cache):
    for revision in ("v9", "", "../../../x", "../blobs"):
        with fails(cache, "was not downloaded"):
            open_source(cache, revision=revision or "/etc/hostname")
    (cache.parent / "elsewhere").write_text(COMMITS[0])
    with fails(cache, "was not downloaded"):
        open_source(cache, revision="../../elsewhere")
    (cache / "refs" / "main").write_text("../..")
    with fails(cache, "2 snapshots", "--revision"):
        open_source(cache)


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
