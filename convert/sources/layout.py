"""Which files hold the weights of a model, judged by their names: in a folder, or in a list from the Hub."""

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
# Not the weights of a model: adapters, and what trainers leave beside them.
_OTHER = re.compile(r"(adapter|optimizer|scheduler|scaler|training_args|random_states|rng_state).*")
# By their names alone the weights of a model, in any format.
_WEIGHTS = re.compile(r".*\.(safetensors|gguf)|pytorch_model.*\.bin|consolidated.*\.pth")
# name-00001-of-00003.safetensors; what stands after the numbers is a variant ("fp16").
_SHARD = re.compile(r"(?P<stem>.*?)(?P<number>\d+)-of-(?P<count>\d+)(?P<rest>\D.*)")
_MOST_SHARDS = 10_000  # far above any real model


@dataclasses.dataclass(frozen=True)
class WeightFiles:
    """The weight files of one model, in one folder.

    Attributes:
      format: of all of them.
      index: the file that says which shards there are and what they hold, if there is one.
      files: their names, sorted; empty where there is an index.
    """

    format: FileFormat
    index: str | None
    files: tuple[str, ...]


def find_weights(names: Iterable[str], where: str) -> WeightFiles | None:
    """The weights among the ``names`` of a folder.

    Those that transformers takes come first, in its order: of safetensors, then of PyTorch, the usual name of
    a single file, then the usual index. Then, again by format, come those that it does not look for: the
    usual names of shards, the only index, whatever other weights there are.

    Args:
      names: of the files in the folder itself.
      where: what to call the folder in errors.

    Returns:
      None if there are no weights in either format.

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
    """The weights among the ``names`` of a folder that are not those ``taken``, sorted.

    A ``.bin`` or ``.pth`` counts only by a usual name: such files hold many other things.
    """
    return sorted(
        name for name in set(names) - set(taken) if _WEIGHTS.fullmatch(name) and not _OTHER.fullmatch(name)
    )


def reject_adapter(names: Iterable[str], where: str) -> None:
    """AtomError where ``names``, a folder without weights, are those of an adapter (LoRA)."""
    for name in sorted(names):
        if name == ADAPTER_CONFIG or name.startswith("adapter_model."):
            raise AtomError(
                f"{where}: holds an adapter ({name}) and no model; merge it into its base model with PEFT "
                "(merge_and_unload, then save_pretrained) and convert the result"
            )


def _find_unusual(names: Collection[str], kind: FileFormat, where: str) -> WeightFiles | None:
    """Weights in the format ``kind`` that transformers does not look for."""
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
        return None  # what llama.cpp leaves beside a model (imatrix.bin)
    if not files:
        return None
    _check_complete(files, where)
    return WeightFiles(kind, None, tuple(files))


def weights_of_file(path: Path) -> WeightFiles | None:
    """The weights to which the file at ``path`` belongs: itself, or all shards of its set.

    Returns:
      None if it is of neither format.

    Raises:
      AtomError: shards are missing.
    """
    for kind, suffix in _FILE_SUFFIXES.items():
        if path.name.endswith(suffix):
            return WeightFiles(kind, None, tuple(file.name for file in shard_set(path)))
    return None


def shard_set(path: Path) -> list[Path]:
    """All shards of the set to which the file at ``path`` belongs by its name, in order; else it alone.

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
    """AtomError where ``files`` are shards of several sets, or of one that is not complete."""
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
    """What the names of one set of shards have in common."""

    stem: str
    width: int
    count: int
    rest: str

    def name(self, number: int) -> str:
        return f"{self.stem}{number:0{self.width}}-of-{self.count:0{self.width}}{self.rest}"


def _shard(name: str) -> _Shards | None:
    """The set that a shard of this name belongs to; None for other names."""
    match = _SHARD.fullmatch(name)
    if match is None or not 1 <= int(match["number"]) <= int(match["count"]) <= _MOST_SHARDS:
        return None
    shards = _Shards(match["stem"], len(match["number"]), int(match["count"]), match["rest"])
    return shards if shards.name(int(match["number"])) == name else None
