"""The source for GGUF files (llama.cpp), whose tensors are dequantized."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from atom_jax.config import ModelConfig
from convert.sources import gguf_config, gguf_tokenizer
from convert.sources.architectures import parse_config
from convert.sources.base import TensorInfo, check_tensors, digest, finite_float32, known
from convert.sources.gguf_file import GGUFFile


class GGUFSource:
    """A GGUF file, single or split, as a ``Source``; any tensor type that the ``gguf`` package can read."""

    def __init__(self, path: Path) -> None:
        """Reads the metadata and the tensor table, and checks that every tensor exists with the right shape.

        Raises:
          AtomError: see ``open_source``.
        """
        self._file = GGUFFile.open(path)
        self._permuted = self._file.metadata.get("general.architecture") in gguf_config.PERMUTED
        self.config: ModelConfig = parse_config(gguf_config.hf_config(self._file), where=str(path))
        self._gguf_names = {gguf_config.hf_name(name): name for name in self._file.tensors}
        found = {
            name: TensorInfo(name, tensor.file, tensor.kind.name, tensor.shape)
            for name, original in self._gguf_names.items()
            for tensor in (self._file.tensors[original],)
        }
        self._infos = check_tensors(self.config, found, where=path)
        self.notes: tuple[str, ...] = ()
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in self._infos.items()}

    def tensor(self, name: str) -> np.ndarray:
        info = known(self._infos, name, where=self._file.path)
        array = finite_float32(self._file.read(self._gguf_names[name]), info)
        heads = {"q_proj": self.config.num_heads, "k_proj": self.config.num_kv_heads}
        part = name.split(".")[-2]
        return unpermute(array, heads[part]) if self._permuted and part in heads else array

    def write_tokenizer(self, out: Path) -> None:
        gguf_tokenizer.write_tokenizer(self._file.metadata, out, where=str(self._file.path))

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return digest(self._file.parts)


def unpermute(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads * head_dim, ...] from llama.cpp's order back to Hugging Face's.

    RoPE in llama.cpp rotates the channels 2i and 2i+1 of a head together; in Hugging Face i and
    i + head_dim/2.
    """
    pairs = array.reshape(heads, -1, 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
