"""What a folder in the Hugging Face layout holds beside the weights: configuration, index, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from convert.architectures import parse_config, with_generation_config
from convert.sources.base import TensorInfo, one_line, read_json
from convert.sources.layout import WeightFiles

CONFIG_FILES = ("config.json", "generation_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def load_config(folder: Path) -> ModelConfig:
    """The configuration in ``folder``: config.json, and the end-of-sequence ids of generation_config.json.

    Raises:
      AtomError: config.json is missing or unusable, or generation_config.json is there and unusable.
    """
    path, generation = (folder / name for name in CONFIG_FILES)
    if not path.is_file():
        raise AtomError(f"{folder}: there is no config.json beside the weights")
    config = parse_config(read_json(path), where=str(path))
    if generation.is_file():
        config = with_generation_config(config, read_json(generation), where=str(generation))
    return config


def config_files(folder: Path) -> list[Path]:
    """The configuration files that ``folder`` has, in a fixed order."""
    return [folder / name for name in CONFIG_FILES if (folder / name).is_file()]


def collect(
    folder: Path, weights: WeightFiles, describe: Callable[[Path], Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """Every tensor in the weight files of ``folder``, by its name there.

    Args:
      folder: where the files are.
      weights: which they are.
      describe: gives the tensors of one file.

    Raises:
      AtomError: a file cannot be read, or does not hold what the index says; without an index, two files hold
        a tensor of the same name.
    """
    infos: dict[str, TensorInfo] = {}
    if weights.index is not None:
        index = folder / weights.index
        for file, tensors in shards(index).items():
            found = describe(folder / file)
            check_shard(index, folder / file, tensors, found)
            infos.update({name: found[name] for name in tensors})
        return infos
    for file in weights.files:
        found = describe(folder / file)
        for name in sorted(infos.keys() & found.keys()):
            raise AtomError(f"{found[name]} is in {infos[name].file.name}, too, and there is no index")
        infos.update(found)
    return infos


def shards(index: Path) -> dict[str, list[str]]:
    """The tensors that ``*.index.json`` places in each shard: file name -> tensor names.

    The names come from the checkpoint and are not trusted: a shard is a file of the index's own folder.

    Raises:
      AtomError: see ``placed``; or a shard is missing.
    """
    files = placed(index)
    for file, tensors in files.items():
        if not (index.parent / file).is_file():
            raise AtomError(f"{index}: shard {file} is missing; it holds {tensors[0]} and others")
    return files


def placed(index: Path) -> dict[str, list[str]]:
    """What ``shards`` returns, whether the shards are there or not.

    Raises:
      AtomError: the index is malformed, or names a file outside its folder.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise AtomError(f"{index}: weight_map must be an object that maps tensors to files")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            raise AtomError(f"{index}: tensor {tensor} is placed in {file!r:.80}: not a file of this folder")
        files.setdefault(file, []).append(tensor)
    return files


def _is_plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and not any(character in name for character in "/\\:\0")


def check_shard(index: Path, shard: Path, tensors: list[str], found: Any) -> None:
    """Raises AtomError where ``shard`` lacks one of the ``tensors`` that ``index`` places in it."""
    for name in tensors:
        if name not in found:
            raise AtomError(f"{shard}: tensor {name} is missing; {index.name} says that it is here")


def write_tokenizer(folder: Path, config: ModelConfig, out: Path) -> None:
    """Copies the tokenizer of ``folder`` to ``out``; one without tokenizer.json is converted by transformers.

    Raises:
      AtomError: there is no tokenizer, or it cannot be converted.
    """
    out.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        _convert_slow_tokenizer(folder, out)
        return
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    if not (folder / "tokenizer_config.json").is_file():
        _write_minimal_config(config, out)


def _convert_slow_tokenizer(folder: Path, out: Path) -> None:
    try:
        from transformers import AutoTokenizer

        # trust_remote_code stays off: a checkpoint must not run code of its own.
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
        tokenizer.save_pretrained(out)
    except Exception as error:  # whatever a third-party tokenizer file can provoke
        raise AtomError(f"{folder}: no tokenizer.json, and none can be made: {one_line(error)}") from error
    if not (out / "tokenizer.json").is_file():
        raise AtomError(f"{folder}: no tokenizer.json, and its tokenizer cannot be saved as one")


def _write_minimal_config(config: ModelConfig, out: Path) -> None:
    """tokenizer_config.json for a bare tokenizer.json, with the special tokens that the model names."""
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    except Exception as error:  # tokenizers raises a bare Exception
        raise AtomError(f"{out / 'tokenizer.json'}: is not a tokenizer: {one_line(error)}") from error
    ids = {"bos_token": config.bos_token_id, "eos_token": next(iter(config.eos_token_ids), None)}
    tokens = {key: tokenizer.id_to_token(value) for key, value in ids.items() if value is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
        **{key: token for key, token in tokens.items() if token is not None},
    }
    write_json(out / "tokenizer_config.json", settings)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes ``data`` as readable JSON."""
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
