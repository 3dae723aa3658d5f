"""Finds the weight files of a model by their names, in a folder or in a list of files from the Hub."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from atom_jax.errors import AtomError

SAFETENSORS_INDEX, SAFETENSORS_SINGLE = "model.safetensors.index.json", "model.safetensors"
TORCH_INDEX, TORCH_SINGLE = "pytorch_model.bin.index.json", "pytorch_model.bin"
ADAPTER_CONFIG = "adapter_config.json"

FileFormat = Literal["safetensors", "torch"]
_FILE_SUFFIXES: dict[FileFormat, str] = {"safetensors": ".safetensors", "torch": ".bin"}
_INDEXES: dict[FileFormat, str] = {"safetensors": SAFETENSORS_INDEX, "torch": TORCH_INDEX}
_SINGLES: dict[FileFormat, str] = {"safetensors": SAFETENSORS_SINGLE, "torch": TORCH_SINGLE}
# Files that are not the weights of a model: adapters, and other files that training programs write.
_OTHER = re.compile(r"(adapter|optimizer|scheduler|scaler|training_args|random_states|rng_state).*")
# Files that are certainly weights of a model by their names, in any format.
_WEIGHTS = re.compile(r".*\.(safetensors|gguf)|pytorch_model.*\.bin|consolidated.*\.pth")
# E.g. name-00001-of-00003.safetensors. There can be a variant between the numbers and the suffix ("fp16").
_SHARD = re.compile(r"(?P<stem>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<rest>\D.*)")
_MOST_SHARDS = 10_000  # far above any real model


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weight files of one model, in one folder.

    Attributes:
      format: format of all files.
      index: name of the file that lists the shards and the tensors in each; None if there is none.
      files: names of the weight files, sorted; empty if there is an index.
    """

    format: FileFormat
    index: str | None
    files: tuple[str, ...]


def find_weights(names: Iterable[str], where: str) -> WeightFiles | None:
    """Chooses the weight files of a model among the files of a folder.

    First it looks for the files that transformers loads, in the same order: for safetensors and then for
    PyTorch, the usual name of a single file, then the usual index. If there are none, it looks for files that
    transformers does not find, again first for safetensors: shards with the usual names, then an index if it
    is the only one, then any other weight files.

    Args:
      names: names of the files in the folder, without those in sub-folders.
      where: what to call the folder in error messages.

    Returns:
      The weight files; None if there are none in either format.

    Raises:
      AtomError: shards are missing, or there are several sets of shards.
    """
    names = set(names)
    for kind in _FILE_SUFFIXES:
        if _SINGLES[kind] in names:
            return WeightFiles(kind, None, (_SINGLES[kind],))
        if _INDEXES[kind] in names:
            return WeightFiles(kind, _INDEXES[kind], ())
    for kind in _FILE_SUFFIXES:
        found = _find_unusual(names, kind, where)
        if found is not None:
            return found
    return None


def unused_weights(names: Iterable[str], taken: Collection[str]) -> list[str]:
    """The weight files among the ``names`` of a folder that are not in ``taken``, sorted.

    A ``.bin`` or ``.pth`` file counts only if it has a usual name, because such files can hold other data.
    """
    return sorted(
        name for name in set(names) - set(taken) if _WEIGHTS.fullmatch(name) and not _OTHER.fullmatch(name)
    )


def reject_adapter(names: Iterable[str], where: str) -> None:
    """AtomError if ``names``, the files of a folder without weights, are those of an adapter (LoRA)."""
    for name in sorted(names):
        if name == ADAPTER_CONFIG or name.startswith("adapter_model."):
            raise AtomError(
                f"{where}: holds an adapter ({name}) and no model; merge it into its base model with PEFT "
                "(merge_and_unload, then save_pretrained) and convert the result"
            )


def _find_unusual(names: Collection[str], kind: FileFormat, where: str) -> WeightFiles | None:
    """Weight files in the format ``kind`` with names that transformers does not look for; None if none."""
    suffix = _FILE_SUFFIXES[kind]
    weights = sorted(name for name in names if name.endswith(suffix) and not _OTHER.fullmatch(name))
    indexes = sorted(name for name in names if name.endswith(f"{suffix}.index.json"))
    stem = _SINGLES[kind].removesuffix(suffix)
    usual = re.compile(rf"{re.escape(stem)}-\d+-of-\d+{re.escape(suffix)}")
    shards = [name for name in weights if usual.fullmatch(name)]
    if not shards and len(indexes) == 1:
        return WeightFiles(kind, indexes[0], ())
    files = shards or weights
    if kind == "torch" and not shards and any(name.endswith(".gguf") for name in names):
        return None  # the .bin is a file of llama.cpp (imatrix.bin)
    if not files:
        return None
    _check_complete(files, where)
    return WeightFiles(kind, None, tuple(files))


def weights_of_file(path: Path) -> WeightFiles | None:
    """The weight files to which the file at ``path`` belongs: the file alone, or all shards of its set.

    Returns:
      The weight files; None if the suffix is that of neither format.

    Raises:
      AtomError: shards are missing.
    """
    for kind, suffix in _FILE_SUFFIXES.items():
        if path.name.endswith(suffix):
            return WeightFiles(kind, None, tuple(file.name for file in shard_set(path)))
    return None


def shard_set(path: Path) -> list[Path]:
    """All shards of the set to which ``path`` belongs by its name, in order; else ``path`` alone.

    Raises:
      AtomError: shards are missing.
    """
    shard = _shard(path.name)
    if shard is None:
        return [path]
    files = [path.with_name(shard.name(number)) for number in range(1, shard.count + 1)]
    for file in files:
        if not file.is_file():
            raise AtomError(f"{path}: is one of {shard.count} shards, of which {file.name} is missing")
    return files


def _check_complete(files: Collection[str], where: str) -> None:
    """AtomError if ``files`` are shards of several sets, or of a set that is not complete."""
    numbers: dict[_Shards, set[int]] = {}
    for name in files:
        if (match := _SHARD.fullmatch(name)) and (shard := _shard(name)):
            numbers.setdefault(shard, set()).add(int(match["number"]))
    if len(numbers) > 1:
        first, second = (shard.name(1) for shard in list(numbers)[:2])
        raise AtomError(
            f"{where}: holds several sets of weights ({first} and {second}) and no index that says which to "
            "take; give one of the files"
        )
    for shard, there in numbers.items():
        missing = sorted(set(range(1, shard.count + 1)) - there)
        if missing:
            raise AtomError(f"{where}: shard {shard.name(missing[0])} is missing")


@dataclasses.dataclass(frozen=True)
class _Shards:
    """A set of shards, given by what their names have in common.

    Attributes:
      stem: the part of the names before the numbers.
      width: number of digits of the numbers.
      count: number of shards.
      rest: the part of the names after the numbers.
    """

    stem: str
    width: int
    count: int
    rest: str

    def name(self, number: int) -> str:
        return f"{self.stem}{number:0{self.width}}-of-{self.count:0{self.width}}{self.rest}"


def _shard(name: str) -> _Shards | None:
    """The set of shards that a file of this name belongs to; None if it is not the name of a shard."""
    match = _SHARD.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= _MOST_SHARDS:
        return None
    shards = _Shards(match["stem"], len(match["number"]), int(match["count"]), match["rest"])
    return shards if shards.name(int(match["number"])) == name else None
