"""The protocol ``Source`` that all file formats implement, and the checks that they share."""

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
    """A float checkpoint in any file format.

    Tensors have their Hugging Face names ("model.layers.0.self_attn.q_proj.weight").

    Attributes:
      config: the architecture; its format is the default (bf16).
      shapes: name and shape of every tensor of the model, in the order of the model. Tensors that the model
        does not use (rotary tables, an ``lm_head.weight`` that equals the tied embedding) are left out.
      notes: decisions that were made where the files are ambiguous, each as one line for the user.
    """

    @property
    def config(self) -> ModelConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def tensor(self, name: str) -> np.ndarray:
        """One tensor as a C-contiguous float32 array. It owns its memory, and nothing stays mapped or cached.

        Raises:
          AtomError: there is no such tensor, it can no longer be read, or it holds NaN or infinity.
        """
        ...

    def write_tokenizer(self, out: Path) -> None:
        """Writes the tokenizer (tokenizer.json and tokenizer_config.json) into the folder ``out``."""
        ...

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the contents of the weight, configuration and tokenizer files."""
        ...


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """What the header of a file says about a tensor. ``str`` of it is the start of an error message.

    Attributes:
      name: name of the tensor in the file.
      file: the file that contains it.
      dtype: name of its dtype in the file format.
      shape: shape of the tensor.
    """

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
    """Unties the embeddings of ``config`` if the checkpoint has an lm_head that differs from the embedding.

    Args:
      config: the configuration that config.json gives.
      found: every tensor in the files, by its name in the model.
      equal: returns whether two matrices of the same shape and dtype have the same values.

    Returns:
      The configuration, and the notes for ``Source.notes``: one if it was untied, else none.
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
# Parts of names that come from wrappers of modules: data parallelism, torch.compile, FSDP, activation
# checkpointing.
_WRAPPERS = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
}
_EMBEDDING = "embed_tokens.weight"
# The prefix of the embedding's name in a model with a head, in a model without a head, and in a module that
# contains a model with a head.
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

    Other tensors are dropped, except those without which the model would give other results: adapters,
    experts, and biases or norms in a layer that the configuration does not have. They are errors.

    Args:
      config: configuration of the checkpoint.
      found: every tensor in the files, by its name in the model.
      where: file or folder to name in the error if a tensor is missing.
      dtypes: the dtypes that can be read; None to check no dtypes here.

    Raises:
      AtomError: a tensor is missing, has a wrong shape or dtype, or must not be dropped.
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
    """The tensors by their names in a ``...ForCausalLM``, whichever module they were saved from.

    The names of wrappers are removed. The prefix of the embedding's name tells whether "model." must be added
    to all names (a ``LlamaModel`` calls "layers.0..." what a ``LlamaForCausalLM`` calls "model.layers.0...")
    or removed once. A ``TensorInfo`` keeps the name in the file.

    Raises:
      AtomError: two tensors would get the same name.
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
    """``array`` as a C-contiguous float32 array, copied only if its dtype or layout requires it.

    Raises:
      AtomError: the shape is not that of ``info``, or the array holds NaN or infinity, including float64
        values that are too large for float32.
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
    """``infos[name]``; AtomError if there is no such tensor."""
    if name not in infos:
        raise AtomError(f"{where}: there is no tensor {name}")
    return infos[name]


_POINTER = b"version https://git-lfs.github.com/spec/"


def read_settings(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a checkpoint; AtomError also if the file is a Git LFS pointer."""
    refuse_pointer(path)
    return read_json(path)


def refuse_pointer(path: Path) -> None:
    """AtomError if ``path`` is a Git LFS pointer, which git leaves in place of a file it did not fetch."""
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except OSError:
        return  # the code that reads the file reports the error
    if start == _POINTER:
        raise AtomError(f"{path}: is a Git LFS pointer and not the file itself; fetch it with 'git lfs pull'")


def digest(files: Iterable[Path]) -> str:
    """SHA-256 (hex) over the contents of ``files`` in the given order; AtomError if one cannot be read."""
    total = hashlib.sha256()
    for path in files:
        try:
            with path.open("rb") as stream:
                total.update(hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise AtomError(f"{path}: cannot be read: {one_line(error)}") from error
    return total.hexdigest()
