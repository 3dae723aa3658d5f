"""Reads a GGUF file, single or split: metadata, tensor table, and dequantized tensors one by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from atom_jax.errors import AtomError, one_line
from convert.sources.base import refuse_pointer
from convert.sources.layout import shard_set

_CHUNK_BYTES = 1 << 24  # tensors are dequantized in pieces of this size: it takes several times their memory


class _CheckedReader(GGUFReader):
    """A ``GGUFReader`` that raises ValueError instead of reading past the end of the file.

    The library takes slices of the file. In a truncated file, or one with wrong lengths, these are empty, and
    the library fails much later, or loops over a wrong length. Plain arrays instead of slices of
    ``np.memmap`` also make parsing a vocabulary several times faster.
    """

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray:
        kind = np.dtype(dtype)
        offset, count = int(offset), int(count)
        end = offset + kind.itemsize * count
        if end > self.data.size:
            raise ValueError(f"it ends after {self.data.size} bytes, but {end} are needed")
        if (override_order or self.byte_order) == "S":
            kind = kind.newbyteorder("S")
        return np.frombuffer(self.data, dtype=kind, count=count, offset=offset)


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """One entry of the tensor table.

    Attributes:
      file: the file, or the part of a split file, that contains the tensor.
      kind: type of the tensor.
      shape: shape in PyTorch's order ([out, in]), which is the reverse of GGUF's.
      offset: position of the tensor in the file, in bytes.
    """

    file: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which is a whole number of quantization blocks."""
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.shape[-1] // block * size


@dataclasses.dataclass(frozen=True)
class GGUFFile:
    """The parsed header of a GGUF file. The file is not mapped; ``read`` reads a tensor from it.

    Attributes:
      path: the file, or the first part of a split file, which has the metadata.
      parts: all files, in order.
      metadata: the metadata by key.
      tensors: the tensor table, by name.
    """

    path: Path
    parts: tuple[Path, ...]
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]

    @classmethod
    def open(cls, path: Path) -> GGUFFile:
        """Parses the header of ``path`` or, where it is a part of a split file, of all parts.

        Raises:
          AtomError: a file is not a GGUF file, is damaged or truncated, or has a tensor of a type that cannot
            be dequantized; or a part is missing or belongs to another file.
        """
        parts = shard_set(path)
        found = [_parse(part) for part in parts]
        _check_parts(parts, [metadata for metadata, _ in found])
        metadata, tensors = found[0][0], dict[str, GGUFTensor]()
        for part, (_, more) in zip(parts, found, strict=True):
            for name in sorted(tensors.keys() & more.keys()):
                raise AtomError(f"{part}: tensor {name} is in {tensors[name].file.name}, too")
            tensors.update(more)
        total = metadata.get("split.tensors.count", len(tensors))
        if len(parts) > 1 and total != len(tensors):
            raise AtomError(f"{parts[0]}: its parts hold {len(tensors)} tensors, expected {total!r:.40}")
        return cls(parts[0], tuple(parts), metadata, tensors)

    def read(self, name: str) -> np.ndarray:
        """The dequantized tensor ``name`` as a float32 array of its ``shape``, which owns its memory.

        Raises:
          AtomError: the tensor can no longer be read.
        """
        tensor = self.tensors[name]
        rows = math.prod(tensor.shape[:-1])
        out = np.empty((rows, tensor.shape[-1]), np.float32)
        step = max(1, _CHUNK_BYTES // (4 * tensor.shape[-1]))
        try:
            with tensor.file.open("rb") as file:
                file.seek(tensor.offset)
                for start in range(0, rows, step):
                    block = out[start : start + step]
                    raw = np.fromfile(file, np.uint8, len(block) * tensor.row_bytes)
                    if raw.size < len(block) * tensor.row_bytes:
                        raise OSError("the file has become shorter")
                    block[:] = _dequantize(raw.reshape(len(block), tensor.row_bytes), tensor.kind)
        except OSError as error:
            raise AtomError(
                f"{tensor.file}: tensor {name} {list(tensor.shape)} cannot be read: {one_line(error)}"
            ) from error
        return out.reshape(tensor.shape)


def _parse(path: Path) -> tuple[dict[str, Any], dict[str, GGUFTensor]]:
    """Metadata and tensor table of one file, checked against its size; errors as in ``GGUFFile.open``."""
    refuse_pointer(path)
    try:
        reader = _CheckedReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            item.name: GGUFTensor(
                path,
                item.tensor_type,
                tuple(int(size) for size in reversed(item.shape)),
                int(item.data_offset),
            )
            for item in reader.tensors
        }
        size, swapped = reader.data.size, reader.byte_order == "S"
    except Exception as error:  # a damaged header can make the reader raise anything
        raise AtomError(f"{path}: is not a complete GGUF file: {one_line(error)}") from error
    if swapped:
        raise AtomError(f"{path}: is a big-endian GGUF file: not supported")
    for name, tensor in tensors.items():
        _check(path, name, tensor, size)
    return metadata, tensors


def _check_parts(parts: Sequence[Path], metadata: Sequence[Mapping[str, Any]]) -> None:
    """AtomError unless the metadata and the names agree: parts of one split file in order, or one file."""
    for number, (part, found) in enumerate(zip(parts, metadata, strict=True)):
        count = found.get("split.count", 1) or 1  # a merged file has 0
        if count != len(parts):
            raise AtomError(
                f"{part}: split.count is {count!r:.40}, but by its name it is one of {len(parts)} files; the "
                "parts of a split GGUF must have their names, NAME-00001-of-0000N.gguf"
            )
        if len(parts) > 1 and found.get("split.no") != number:
            raise AtomError(f"{part}: split.no is {found.get('split.no')!r:.40}, expected {number}")


def _dequantize(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Dequantizes rows of bytes to rows of float32; float64, which the library lacks, stays float64."""
    if kind == GGMLQuantizationType.F64:
        return raw.view(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):  # reported later, with the tensor's name
        return dequantize(raw, kind)


def _check(path: Path, name: str, tensor: GGUFTensor, file_size: int) -> None:
    """AtomError if ``tensor`` is empty, is not completely inside the file or cannot be dequantized."""
    where = f"{path}: tensor {name} {list(tensor.shape)}"
    if not tensor.shape or min(tensor.shape) < 1:
        raise AtomError(f"{where} is empty")
    block, size = GGML_QUANT_SIZES[tensor.kind]
    if tensor.shape[-1] % block:
        raise AtomError(f"{where} has rows that are not whole {tensor.kind.name} blocks of {block}")
    if tensor.offset + math.prod(tensor.shape[:-1]) * tensor.row_bytes > file_size:
        raise AtomError(f"{where} lies beyond the end of the file")
    try:
        _dequantize(np.zeros((1, size), np.uint8), tensor.kind)
    except NotImplementedError as error:
        raise AtomError(f"{where} has type {tensor.kind.name}, which cannot be dequantized") from error
