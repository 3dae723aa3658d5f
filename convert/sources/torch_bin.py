"""The source for weights in PyTorch pickles: pytorch_model.bin, or shards. torch is imported when needed."""

from __future__ import annotations

import functools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

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

_DTYPES = ("float64", "float32", "float16", "bfloat16")
# The keys under which training programs (Lightning, DeepSpeed and others) save the state dict.
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module")
MIN_TORCH = (2, 6)  # in older versions, weights_only could be bypassed (CVE-2025-32434)


class TorchSource:
    """A folder of PyTorch pickles, as a ``Source``.

    A shard is loaded again for each tensor. Loading takes only a few milliseconds, because it maps the file
    and unpickles only the names. A shard that stays open would keep every page that was read in memory.
    """

    def __init__(self, folder: Path, weights: WeightFiles) -> None:
        """Reads configuration and headers; checks that every tensor exists with the right shape and dtype.

        Raises:
          AtomError: see ``open_source``; also if torch is not installed or too old.
        """
        _import_torch(folder)
        self._folder = folder
        self.config: ModelConfig = hf.load_config(folder)
        found = hf.collect(folder, weights, _describe)
        self._files = sorted({info.file for info in found.values()})
        self.config, untied = untie(self.config, found, _equal)
        self.notes = (*hf.notes(folder, self._files), *untied)
        self._infos = check_tensors(self.config, found, where=folder, dtypes=_DTYPES)
        self.shapes: Mapping[str, tuple[int, ...]] = {name: info.shape for name, info in self._infos.items()}

    def tensor(self, name: str) -> np.ndarray:
        info = known(self._infos, name, where=self._folder)
        torch = _import_torch(self._folder)
        tensor = _load(info.file).get(info.name)
        if tensor is None:
            raise AtomError(f"{info} is no longer there")
        # copy, because otherwise a float32 tensor would stay in the mapped file
        tensor = tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        return finite_float32(tensor.numpy(), info)

    def write_tokenizer(self, out: Path) -> None:
        hf.write_tokenizer(self._folder, self.config, out)

    def fingerprint(self) -> str:
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        return digest([*hf.config_files(self._folder), *self._files])


def _import_torch(folder: Path) -> Any:
    try:
        import torch
    except ImportError as error:
        raise AtomError(
            f"{folder}: reading pytorch_model.bin needs torch; install it with pip install 'atom-jax[torch]'"
        ) from error
    if torch.__version__ < MIN_TORCH:  # pyright: ignore[reportOperatorIssue] (it compares with tuples)
        raise AtomError(
            f"{folder}: reading pytorch_model.bin safely needs torch >= {'.'.join(map(str, MIN_TORCH))}, "
            f"found {torch.__version__}"
        )
    return torch


def _equal(one: TensorInfo, other: TensorInfo) -> bool:
    """Whether two tensors hold the same values."""
    return bool((_load(one.file)[one.name] == _load(other.file)[other.name]).all())


def _describe(path: Path) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(name, path, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in _load(path).items()
    }


def _load(path: Path) -> dict[str, Any]:
    """The tensors of the state dict in ``path``, by name. No code is unpickled (weights_only).

    Raises:
      AtomError: the file is damaged, or holds neither a dict from names to tensors nor one such dict under a
        usual key.
    """
    torch = _import_torch(path.parent)
    refuse_pointer(path)
    try:
        # Files of torch before 1.6 are not zip files and cannot be mapped.
        mmap = zipfile.is_zipfile(path)
        state = torch.load(path, weights_only=True, mmap=mmap, map_location="cpu")
    except Exception as error:  # a damaged or malicious pickle can make torch raise anything
        raise AtomError(f"{path}: is not a plain tensor checkpoint: {_first_sentence(error)}") from error
    if not isinstance(state, dict):
        raise AtomError(f"{path}: is not a plain tensor checkpoint: it holds a {type(state).__name__}")
    state = _unwrapped(path, state)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise AtomError(f"{path}: is not a plain tensor checkpoint: {name!r:.80} is a {kind}")
        if value.layout != torch.strided or value.is_meta:
            raise AtomError(f"{path}: is not a plain tensor checkpoint: {name} has layout {value.layout}")
    return {name: value.detach() for name, value in state.items()}


def _unwrapped(path: Path, state: dict[Any, Any]) -> dict[Any, Any]:
    """The state dict: ``state`` itself or, if a training program saved it, one of its values."""
    keys = [key for key in _STATE_KEYS if isinstance(state.get(key), dict)]
    if len(keys) > 1:
        raise AtomError(f"{path}: holds several state dicts ({', '.join(keys)}); save one of them alone")
    return state[keys[0]] if keys else state


def _first_sentence(error: Exception) -> str:
    """The message without torch's advice on ``weights_only``, which explains how to turn the check off."""
    text = str(error)
    if "WeightsUnpickler error:" in text:
        text = text.split("WeightsUnpickler error:", 1)[1]
        text = text.split("Please use", 1)[0].split("\n\n", 1)[0]
    return one_line(Exception(text))
