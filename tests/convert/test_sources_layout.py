"""Checkpoints whose files or tensors are not named, or not placed, as transformers does it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from convert.sources import open_source
from convert.sources.layout import find_weights
from tests.convert.tiny import fails, save_tiny, save_weights, tiny_config, tiny_tensors, write_json

Q = "model.layers.1.self_attn.q_proj.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny(tmp_path)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return save_tiny(tmp_path, shards=3)


def check_exact(source: Path, **overrides: Any) -> None:
    opened, want = open_source(source), tiny_tensors(tiny_config(**overrides))
    assert list(opened.shapes) == list(want)
    for name, array in want.items():
        np.testing.assert_array_equal(opened.tensor(name), array, err_msg=name)


# Files.


def rename(folder: Path, new: str) -> list[Path]:
    """Gives the shards of ``folder`` names like ``new`` (with {number}), and takes the index away."""
    (folder / INDEX).unlink()
    files = sorted(folder.glob("*.safetensors"))
    return [file.rename(folder / new.format(number=number)) for number, file in enumerate(files, 1)]


@pytest.mark.parametrize(
    "name",
    [
        "model-{number:05}-of-00003.safetensors",
        "llama-3-{number:05}-of-00003.safetensors",
        "model-{number:05}-of-00003.fp16.safetensors",
        "{number}-of-3.safetensors",
        "part{number}.safetensors",
    ],
)
def test_shards_without_index(sharded: Path, name: str) -> None:
    files = rename(sharded, name)
    check_exact(sharded)
    if "-of-" in name:
        check_exact(files[1])
        files[2].unlink()
        with fails(sharded, files[2].name, "missing"):
            open_source(sharded)
        with fails(files[1], "one of 3 shards", files[2].name):
            open_source(files[1])


def test_index_with_another_name(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "model.fp16.safetensors.index.json")
    index = json.loads((sharded / "model.fp16.safetensors.index.json").read_text())
    for old in sorted(set(index["weight_map"].values())):
        (sharded / old).rename(sharded / f"fp16.{old}")
    index["weight_map"] = {name: f"fp16.{file}" for name, file in index["weight_map"].items()}
    write_json(sharded / "model.fp16.safetensors.index.json", index)
    check_exact(sharded)


def test_the_usual_shards_come_first(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    save_file({"other": np.ones(3)}, sharded / "consolidated.safetensors")
    save_file({"other": np.ones(3)}, sharded / "model.fp16-00001-of-00001.safetensors")
    check_exact(sharded)


ORDER = (
    "model.safetensors",
    INDEX,
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model-00001-of-00001.safetensors",
    "model.fp16.safetensors.index.json",
    "other.safetensors",
    "pytorch_model-00001-of-00001.bin",
    "pytorch_model.fp16.bin.index.json",
    "other.bin",
)


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_order_of_sets(first: int) -> None:
    """The first four are what transformers looks for, in its order."""
    found = find_weights(reversed(ORDER[first:]), "folder")
    assert found is not None
    assert (found.index or found.files[0]) == ORDER[first]


def test_shards_without_index_come_after_what_transformers_finds(sharded: Path) -> None:
    torch = pytest.importorskip("torch")
    (sharded / INDEX).unlink()
    other = tiny_tensors(tiny_config(), seed=3)
    torch.save(
        {name: torch.from_numpy(array) for name, array in other.items()}, sharded / "pytorch_model.bin"
    )
    source = open_source(sharded)
    np.testing.assert_array_equal(source.tensor(Q), other[Q])
    (note,) = source.notes
    assert "read from pytorch_model.bin; not used: model-00001-of-00003.safetensors" in note


def test_what_is_no_weights_is_not_called_unused(folder: Path) -> None:
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "training_args.bin", "imatrix.bin"):
        (folder / name).write_bytes(b"not looked at")
    assert open_source(folder).notes == ()
    (folder / "model-q4.gguf").write_bytes(b"not looked at")
    (note,) = open_source(folder).notes
    assert "read from model.safetensors; not used: model-q4.gguf" in note


def test_two_sets_of_shards(sharded: Path) -> None:
    for file in rename(sharded, "one-{number}-of-3.safetensors"):
        shutil.copy(file, file.with_name(file.name.replace("one", "two")))
    with fails(sharded, "several sets", "one-1-of-3.safetensors", "two-1-of-3.safetensors"):
        open_source(sharded)
    check_exact(sharded / "two-2-of-3.safetensors")


def test_a_tensor_in_two_files_without_index(sharded: Path) -> None:
    files = rename(sharded, "part{number}.safetensors")
    save_file({Q: np.ones((64, 64), np.float32)}, sharded / "part9.safetensors")
    with fails(sharded / "part9.safetensors", Q, "too", "no index") as _:
        open_source(sharded)
    assert len(files) == 3


def test_one_file(folder: Path, tmp_path: Path) -> None:
    file = (folder / "model.safetensors").rename(folder / "weights.safetensors")
    check_exact(file)
    check_exact(folder)
    save_file({"other": np.ones(3)}, folder / "model.safetensors")
    check_exact(file)  # and not the other
    alone = tmp_path / "alone.safetensors"
    shutil.copy(file, alone)
    with fails(tmp_path, "no config.json beside the weights"):
        open_source(alone)
    other = folder / "config.json"
    with fails(other, "no .safetensors, .bin or .gguf file"):
        open_source(other)


def test_links_to_blobs(sharded: Path, tmp_path: Path) -> None:
    """As in a Hub cache. What must not leave the folder is a path in an index."""
    snapshot, blobs = tmp_path / "snapshot", tmp_path / "blobs"
    snapshot.mkdir()
    shutil.copytree(sharded, blobs)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../blobs/{file.name}")
    check_exact(snapshot)
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"][Q] = "../blobs/model-00001-of-00003.safetensors"
    (snapshot / INDEX).unlink()
    write_json(snapshot / INDEX, index)
    with fails(snapshot / INDEX, Q, "not a file of this folder"):
        open_source(snapshot)


# Adapters.


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_model.bin"])
def test_adapter_beside_the_model(sharded: Path, name: str) -> None:
    (sharded / name).write_bytes(b"not looked at")
    write_json(sharded / "adapter_config.json", {"base_model_name_or_path": "a/b"})
    check_exact(sharded)
    (sharded / INDEX).unlink()
    check_exact(sharded)


@pytest.mark.parametrize(
    "names",
    [["adapter_model.safetensors"], ["adapter_model.bin", "training_args.bin"], ["adapter_config.json"]],
)
def test_adapter_alone(folder: Path, names: list[str]) -> None:
    (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_bytes(b"not looked at")
    for given in (folder, folder / names[0]):
        with fails(folder, names[0], "adapter", "merge_and_unload"):
            open_source(given)


LORA = "model.layers.1.self_attn.q_proj.lora_A.default.weight"


@pytest.mark.parametrize("name", [LORA, f"base_model.model.{LORA}"])
def test_adapter_inside_the_model(folder: Path, name: str) -> None:
    """Leaving it out would convert the base model without a word."""
    save_weights(folder, tiny_tensors(tiny_config()) | {name: np.ones((8, 64), np.float32)})
    with fails(folder, name, "[8, 64]", "adapter that is not merged"):
        open_source(folder)
    renamed = {
        name.replace("q_proj.", "q_proj.base_layer."): array
        for name, array in tiny_tensors(tiny_config()).items()
    }
    save_weights(folder, renamed)
    with fails("base_layer", "adapter that is not merged"):
        open_source(folder)


# Names of tensors.


def compiled(name: str) -> str:
    return name.replace("self_attn.", "_orig_mod.self_attn.").replace(
        "mlp.", "mlp._checkpoint_wrapped_module."
    )


@pytest.mark.parametrize(
    "spell",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"_fsdp_wrapped_module.{name}",
        lambda name: f"model.{name}",
        compiled,
        lambda name: f"module.{compiled(name)}",
        lambda name: name.removeprefix("model."),
        lambda name: f"module.{name.removeprefix('model.')}",
    ],
)
@pytest.mark.parametrize("shards", [1, 2])
def test_names_of_wrappers(tmp_path: Path, spell: Callable[[str], str], shards: int) -> None:
    folder = save_tiny(tmp_path, shards=shards)
    save_weights(
        folder, {spell(name): array for name, array in tiny_tensors(tiny_config()).items()}, shards=shards
    )
    check_exact(folder)


def test_a_model_without_its_head(tmp_path: Path) -> None:
    """As ``LlamaModel.save_pretrained`` writes it: it is whole where the head is the embedding."""
    for tied in (True, False):
        config = tiny_config(tie_word_embeddings=tied)
        folder = save_tiny(tmp_path / str(tied), tie_word_embeddings=tied, architectures=["LlamaModel"])
        tensors = {name.removeprefix("model."): array for name, array in tiny_tensors(config).items()}
        tensors.pop("lm_head.weight", None)
        save_weights(folder, tensors)
        if tied:
            check_exact(folder, tie_word_embeddings=True)
            assert open_source(folder).config.architecture == "LlamaForCausalLM"
        else:
            with fails(folder, "lm_head.weight [265, 64] is missing"):
                open_source(folder)


def test_transformers_writes_a_model_without_its_head(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = tiny_config(tie_word_embeddings=True)
    del settings["architectures"], settings["model_type"]
    torch.manual_seed(0)
    model = transformers.LlamaModel(transformers.LlamaConfig(**settings))
    model.save_pretrained(tmp_path)
    source = open_source(tmp_path)
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(source.tensor(f"model.{name}"), tensor.numpy())


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_tied_embeddings_under_other_names(tmp_path: Path, same: bool) -> None:
    folder, tensors = save_tiny(tmp_path, tie_word_embeddings=True), tiny_tensors(tiny_config())
    if same:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    save_weights(folder, {f"module.{name}": array for name, array in tensors.items()})
    source = open_source(folder)
    assert source.config.tie_word_embeddings == same
    if not same:
        np.testing.assert_array_equal(source.tensor("lm_head.weight"), tensors["lm_head.weight"])
        (note,) = source.notes
        assert "module.lm_head.weight differs from module.model.embed_tokens.weight" in note


def test_two_names_for_one_tensor(folder: Path) -> None:
    save_weights(folder, tiny_tensors(tiny_config()) | {f"module.{Q}": np.ones((64, 64), np.float32)})
    with fails(folder, f"module.{Q}", f"the same as tensor {Q}"):
        open_source(folder)


def test_errors_have_the_name_in_the_file(folder: Path) -> None:
    tensors = {f"module.{name}": array for name, array in tiny_tensors(tiny_config()).items()}
    save_weights(folder, tensors | {f"module.{Q}": np.full((64, 64), np.nan, np.float32)})
    with fails(folder / "model.safetensors", f"module.{Q}", "NaN"):
        open_source(folder).tensor(Q)
    save_weights(folder, tensors | {f"module.{Q}": np.ones((64, 32), np.float32)})
    with fails(folder, f"module.{Q}", "[64, 32]", "expected [64, 64]"):
        open_source(folder)
    bias = f"module.{Q.replace('weight', 'bias')}"
    save_weights(folder, tensors | {bias: np.ones(64, np.float32)})
    with fails(folder, bias, "no place"):
        open_source(folder)
