"""What every source of weights has in common: the protocol, and the checks done on any file format."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError, one_line
from atom_jax.files import read_json
from convert.sources.architectures import expected_tensors


class Source(Protocol):
    """A float checkpoint, whatever its file format.

    Names are the Hugging Face ones ("model.layers.0.self_attn.q_proj.weight").

    Attributes:
      config: the architecture; its quantization is left at the default (bf16).
      shapes: every tensor of the model, in the order of the model. Tensors that the model does not use
        (rotary tables, an ``lm_head.weight`` that equals the tied embedding) are left out.
      notes: what was decided where the files leave a choice, each one line for the user.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as float32, C-contiguous, in memory of its own; nothing of it stays mapped or cached.

        Raises:
          AtomError: there is no such tensor, or the file no longer gives it, or it holds NaN or infinity.
        """
        ...

    def write_tokenizer(self, out: Path) -> None:
        """Writes tokenizer.json, tokenizer_config.json and what belongs to them into the folder ``out``."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the contents of the weight files and the configuration."""
        ...


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its header says about it; as a string, the start of an error message."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.file}: tensor {self.name} {list(self.shape)}"


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def untie(
    config: ModelConfig, found: Mapping[str, TensorInfo], equal: Callable[[TensorInfo, TensorInfo], bool]
) -> tuple[ModelConfig, list[str]]:
    """``config``, untied where the checkpoint has an lm_head that is not its embedding, and a note of that.

    Args:
      config: as config.json says.
      found: every tensor in its files, by the names of the model.
      equal: whether two matrices of the same shape and dtype hold the same values.
    """
    head, embedding = found.get(HEAD), found.get(EMBEDDING)
    if not config.tie_word_embeddings or head is None or embedding is None:
        return config, []
    comparable = len(head.shape) == 2 and (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if comparable and equal(head, embedding):
        return config, []
    note = (
        f"{head.file}: {head.name} differs from {embedding.name}, so they are not tied, although config.json "
        "ties them"
    )
    return config.replace(tie_word_embeddings=False), [note]


_EXPERT = re.compile(r"(^|[._])(experts?|block_sparse_moe|router|exps|gate_inp)([._]|$)")
_ADAPTER = re.compile(r"(^|\.)(lora_\w+|base_layer|modules_to_save|ia3_\w+|oft_\w+|hada_\w+)(\.|$)")
# What wrappers of modules add to names: data parallelism, torch.compile, FSDP, activation checkpointing.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
_EMBEDDING = "embed_tokens.weight"
# What stands before the embedding: in a model with its head, in one without, in a module that holds one.
_PREFIXES = ("model.", "", "model.model.")
_IN_LAYER = re.compile(r"model\.layers\.(\d+)\.(self_attn|mlp)\.\w+_(proj|norm)\.(weight|bias)")


def check_tensors(
    config: ModelConfig,
    found: Mapping[str, TensorInfo],
    *,
    where: Path,
    dtypes: Collection[str] | None = None,
) -> dict[str, TensorInfo]:
    """The tensors of ``found`` that ``config`` needs, in the order of the model.

    Tensors that it does not need are dropped, unless leaving them out would change what the model computes:
    experts, and biases or norms inside a layer that the configuration does not have.

    Args:
      config: what the checkpoint says it is.
      found: every tensor in its files, by the names of the model.
      where: file or folder to name when a tensor is missing.
      dtypes: the dtypes that can be read; None leaves that check to the caller.

    Raises:
      AtomError: a tensor is missing, or has another shape or dtype than it must, or cannot be left out.
    """
    expected = expected_tensors(config)
    for name in found.keys() - expected.keys():
        _reject_meaningful_extra(config, name, found[name])
    for name, shape in expected.items():
        if name not in found:
            raise AtomError(f"{where}: tensor {name} {list(shape)} is missing")
        info = found[name]
        if info.shape != shape:
            raise AtomError(f"{info} has the wrong shape, expected {list(shape)}")
        if dtypes is not None and info.dtype not in dtypes:
            raise AtomError(f"{info} has dtype {info.dtype}, expected one of {', '.join(dtypes)}")
    return {name: found[name] for name in expected}


def canonical_names(found: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """``found`` by the names of a ``...ForCausalLM``, whatever module it was saved from.

    Names of wrappers are taken out, and names are completed (a ``LlamaModel`` calls "layers.0..." what a
    ``LlamaForCausalLM`` calls "model.layers.0...") or shortened by the prefix that the embedding has. A
    ``TensorInfo`` keeps the name in the file.

    Raises:
      AtomError: two tensors come to have the same name.
    """
    bare = {name: ".".join(part for part in name.split(".") if part not in _WRAPPERS) for name in found}
    prefix = next((prefix for prefix in _PREFIXES if prefix + _EMBEDDING in bare.values()), "model.")
    names: dict[str, TensorInfo] = {}
    for original, name in bare.items():
        if prefix == "" and not name.startswith("lm_head."):
            name = f"model.{name}"
        elif prefix == "model.model.":
            name = name.removeprefix("model.")
        if name in names:
            raise AtomError(f"{found[original]} is the same as tensor {names[name].name}: save one of them")
        names[name] = found[original]
    return names


def _reject_meaningful_extra(config: ModelConfig, name: str, info: TensorInfo) -> None:
    if _ADAPTER.search(name):
        raise AtomError(
            f"{info} belongs to an adapter that is not merged; merge it with PEFT (merge_and_unload) first"
        )
    if _EXPERT.search(name):
        raise AtomError(f"{info} belongs to a mixture of experts: not supported")
    match = _IN_LAYER.fullmatch(name)
    if match and int(match[1]) < config.num_layers:
        raise AtomError(f"{info} has no place in a {config.architecture} with this configuration")


def finite_float32(array: np.ndarray, info: TensorInfo) -> np.ndarray:
    """``array`` as float32, C-contiguous; copied only where its dtype or layout ask for it.

    Raises:
      AtomError: its shape is not the one in ``info``, or it holds NaN or infinity (a float64 that float32
        cannot hold counts as infinity).
    """
    if array.shape != info.shape:
        raise AtomError(f"{info} was read with shape {list(array.shape)}")
    with np.errstate(over="ignore", invalid="ignore"):
        array = np.ascontiguousarray(array, dtype=np.float32)
    bad = array.size - int(np.count_nonzero(np.isfinite(array)))
    if bad:
        raise AtomError(f"{info} holds NaN or infinity in {bad} of its values")
    return array


def known(infos: Mapping[str, TensorInfo], name: str, *, where: Path) -> TensorInfo:
    """``infos[name]``, or the AtomError that a wrong name deserves."""
    if name not in infos:
        raise AtomError(f"{where}: there is no tensor {name}")
    return infos[name]


_POINTER = b"version https://git-lfs.github.com/spec/"


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; AtomError also for a pointer in the place of the file."""
    refuse_pointer(path)
    return read_json(path)


def refuse_pointer(path: Path) -> None:
    """Raises AtomError where ``path`` is what git leaves in place of a large file that was not fetched."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except OSError:
        return  # whoever reads the file says why it cannot be read
    if start == _POINTER:
        raise AtomError(f"{path}: is a Git LFS pointer and not the file itself; fetch it with 'git lfs pull'")


def digest(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over the contents of ``files`` in the order given, streamed."""
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise AtomError(f"{path}: cannot be read: {one_line(error)}") from error
    return total.hexdigest()
