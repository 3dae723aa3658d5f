"""Reads the files of a Hugging Face folder other than the weights: configuration, index, tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.generation_defaults import GENERATION_FILE, write_sampling_settings
from convert.sources.architectures import parse_config, with_generation_config
from convert.sources.base import TensorInfo, canonical_names, read_settings
from convert.sources.layout import WeightFiles, unused_weights
from convert.sources.rope_rules import rope_notes
from convert.sources.tokenizer_files import TOKENIZER_FILES, folder_tokenizer, stop_token_id, tokenizer_file
from convert.sources.tokenizer_writer import write_tokenizer_files

CONFIG_FILES = ("config.json", GENERATION_FILE)


def load_config(folder: Path) -> ModelConfig:
    """The configuration in ``folder``: config.json, with every end-of-sequence id that the folder names.

    The end-of-sequence ids are those of config.json, generation_config.json and the tokenizer, in this order.

    Raises:
      AtomError: config.json is missing or unusable, or generation_config.json or the tokenizer exists but is
        unusable.
    """
    path, generation = (folder / name for name in CONFIG_FILES)
    if not path.is_file():
        raise AtomError(f"{folder}: there is no config.json beside the weights")
    config = parse_config(read_settings(path), where=str(path))
    if generation.is_file():
        config = with_generation_config(config, read_settings(generation), where=str(generation))
    stop = stop_token_id(folder, config) if tokenizer_file(folder) else None
    if stop is not None:
        config = config.replace(eos_token_ids=tuple(dict.fromkeys((*config.eos_token_ids, stop))))
    return config


def config_files(folder: Path) -> list[Path]:
    """The configuration and tokenizer files that ``folder`` has, in a fixed order."""
    names = (*CONFIG_FILES, *TOKENIZER_FILES)
    return [folder / name for name in names if (folder / name).is_file()]


def notes(folder: Path, taken: list[Path]) -> tuple[str, ...]:
    """The notes for ``Source.notes``: which RoPE rule is used, and which weight files are not.

    Args:
      folder: folder of the checkpoint.
      taken: the weight files that are read.
    """
    path = folder / CONFIG_FILES[0]
    said = rope_notes(read_settings(path), str(path))
    others = unused_weights([path.name for path in folder.iterdir()], [path.name for path in taken])
    if others:
        used = taken[0].name if len(taken) == 1 else f"{taken[0].name} and {len(taken) - 1} more"
        left = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        said.append(f"{folder}: weights are read from {used}; not used: {left}")
    return tuple(said)


def collect(
    folder: Path, weights: WeightFiles, describe: Callable[[Path], Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """Every tensor in the weight files of ``folder``, by its canonical name (see ``canonical_names``).

    Args:
      folder: folder of the checkpoint.
      weights: the weight files in it.
      describe: returns the tensors of one file, by their names in the file.

    Raises:
      AtomError: a file cannot be read, or does not hold what the index says; two tensors have the same name.
    """
    infos: dict[str, TensorInfo] = {}
    if weights.index is not None:
        index = folder / weights.index
        for file, tensors in shards(index).items():
            found = describe(folder / file)
            check_shard(index, folder / file, tensors, found)
            infos.update({name: found[name] for name in tensors})
    for file in weights.files:  # empty if there is an index
        found = describe(folder / file)
        for name in sorted(infos.keys() & found.keys()):
            raise AtomError(f"{found[name]} is in {infos[name].file.name}, too, and there is no index")
        infos.update(found)
    return canonical_names(infos)


def shards(index: Path) -> dict[str, list[str]]:
    """The tensors in each shard according to ``*.index.json``, as a dict from file name to tensor names.

    The file names come from the checkpoint and are not trusted: only files in the folder of the index are
    accepted.

    Raises:
      AtomError: a shard is missing, or as in ``placed``.
    """
    files = placed(index)
    for file, tensors in files.items():
        if not (index.parent / file).is_file():
            raise AtomError(f"{index}: shard {file} is missing; it holds {tensors[0]} and others")
    return files


def placed(index: Path) -> dict[str, list[str]]:
    """Like ``shards``, but does not check that the shards exist.

    Raises:
      AtomError: the index is malformed, or names a file outside its folder.
    """
    weight_map = read_settings(index).get("weight_map")
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
    """AtomError if one of the ``tensors`` that ``index`` places in ``shard`` is not in ``found``."""
    for name in tensors:
        if name not in found:
            raise AtomError(f"{shard}: tensor {name} is missing; {index.name} says that it is here")


def write_tokenizer(folder: Path, config: ModelConfig, out: Path) -> None:
    """Writes the tokenizer of ``folder`` into the folder ``out`` (``convert.sources.tokenizer_files``).

    What generation_config.json says about sampling goes with it.

    Raises:
      AtomError: there is no tokenizer, or a file cannot be used.
    """
    tokenizer, settings = folder_tokenizer(folder, config)
    write_tokenizer_files(tokenizer, settings, out, where=str(tokenizer_file(folder)))
    generation = folder / CONFIG_FILES[1]
    data = read_settings(generation) if generation.is_file() else {}
    write_sampling_settings(data, out, where=str(generation))
