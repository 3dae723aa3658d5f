"""The source for weights in safetensors files: one file, or shards."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes  # noqa: F401  (registers bfloat16 with NumPy, which safetensors looks up by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError, one_line
from convert.sources import folder as hf
from convert.sources.base import (
    TensorInfo,
    check_tensors,
    digest,
    finite_float32,
    known,
    refuse_pointer,
    untie,
)
from convert.sources.layout import WeightFiles

_DTYPE_NAMES = ("F64", "F32", "F16", "BF16")
_COMPARED_AT_ONCE = 1 << 22  # number of values, to bound memory


class SafetensorsSource:
    """A folder of safetensors files, as a ``Source``.

    A file is opened for one tensor at a time and read with pread. It is not mapped, because the pages of a
    mapped file count as resident memory, and in the end a conversion would hold the whole checkpoint.
    """

    def __init__(self, folder: Path, weights: WeightFiles) -> None:
        """Reads configuration and headers; checks that every tensor exists with the right shape and dtype.

        Raises:
          AtomError: see ``open_source``.
        """
        self._folder = folder
        self.config: ModelConfig = hf.load_config(folder)
        found = hf.collect(folder, weights, _header)
        self._files = sorted({info.file for info in found.values()})
        self.config, untied = untie(self.config, found, _equal)
        self.notes = (*hf.notes(folder, self._files), *untied)
        self._infos = check_tensors(self.config, found, where=folder, dtypes=_DTYPE_NAMES)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in self._infos.items()}

    def tensor(self, name: str) -> np.ndarray:
        info = known(self._infos, name, where=self._folder)
        try:
            with safe_open(info.file, framework="np", backend="pread") as file:
                array = file.get_tensor(info.name)
        except (SafetensorError, OSError) as error:
            raise AtomError(f"{info} cannot be read: {one_line(error)}") from error
        return finite_float32(array, info)

    def write_tokenizer(self, out: Path) -> None:
        hf.write_tokenizer(self._folder, self.config, out)

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return digest([*hf.config_files(self._folder), *self._files])


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two matrices hold the same values, a block of rows at a time."""
    if one.dtype not in _DTYPE_NAMES:
        return False  # check_tensors raises the error
    rows = max(1, _COMPARED_AT_ONCE // max(1, one.shape[-1]))
    try:
        with (
            safe_open(one.file, framework="np", backend="pread") as a,
            safe_open(other.file, framework="np", backend="pread") as b,
        ):
            parts = a.get_slice(one.name), b.get_slice(other.name)
            return all(
                np.array_equal(*(part[start : min(start + rows, one.shape[0])] for part in parts))
                for start in range(0, one.shape[0], rows)
            )
    except (SafetensorError, OSError) as error:
        raise AtomError(f"{one} cannot be read: {one_line(error)}") from error


def _header(path: Path) -> dict[str, TensorInfo]:
    """The tensors in ``path``, by name. The library checks their offsets against the size of the file."""
    refuse_pointer(path)
    try:
        with safe_open(path, framework="np", backend="pread") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: TensorInfo(name, path, part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (SafetensorError, OSError) as error:
        raise AtomError(f"{path}: is not a complete safetensors file: {one_line(error)}") from error
