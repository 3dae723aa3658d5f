"""The checkpoint on disk: the names of its parts, and how each is written, read back and checked.

A checkpoint is a folder::

    config.json          ModelConfig and the version of this layout
    quantization.json    the accuracy card (written by the converter)
    tokenizer/           tokenizer.json and its settings (``atom_jax.tokenizer``)
    params/shared        Orbax: embedding, norm, lm_head
    params/layers/0000   Orbax, one item for each layer, because a conversion writes one layer at a time

Packed weights are stored packed. Their scales are stored as bfloat16, without loss, because the converter
chooses scales that bfloat16 can represent. Matrices that are not quantized are bfloat16, vectors float32.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from atom_jax.checkpoint_versions import FORMAT_VERSION, upgraded
from atom_jax.config import ModelConfig
from atom_jax.embedding import Embedding, round_table
from atom_jax.errors import AtomError, WriteError, one_line
from atom_jax.files import read_json
from atom_jax.kernel_check import check_kernels
from atom_jax.llama import make_params
from atom_jax.schemes import SCHEMES, w8a8
from atom_jax.structure import index_shapes, linear_shapes, vector_shapes
from atom_jax.tokenizer import wrap_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CONFIG_FILE = "config.json"
CARD_FILE = "quantization.json"
TOKENIZER_FOLDER = "tokenizer"

# How an embedding and a head in INT8 are stored and multiplied.
_INT8_ROWS = w8a8.WEIGHT

_SIZES = frozenset(
    ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
)

# By the name of a parameter: its NumPy array, or for a quantized linear a dict of its arrays by name (see
# ``atom_jax.schemes``). ``StoredSpecs`` has a ``jax.ShapeDtypeStruct`` in the place of each array.
StoredParams = dict[str, Any]
StoredSpecs = dict[str, Any]

_spec = jax.ShapeDtypeStruct

# After a failed save: seconds without a change after which its threads count as ended, and the largest number
# of such waits.
_QUIET_SECONDS = 0.5
_MOST_WAITS = 120


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint: everything that ``generate`` and ``forward`` need.

    Attributes:
      path: folder of the checkpoint.
      config: configuration of the model.
      params: parameters on the default device, as ``make_params`` returns them.
    """

    path: Path
    config: ModelConfig
    params: nnx.State

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer, with the chat template if the model has one."""
        return load_tokenizer(self.path)


def linear_spec(shape: tuple[int, int], config: ModelConfig) -> StoredSpecs | jax.ShapeDtypeStruct:
    """Spec of a stored linear [N, K]; AtomError if its K is not outliers plus whole groups."""
    weight = SCHEMES[config.format.scheme].weight
    return _spec(shape, jnp.bfloat16) if weight is None else weight.stored(shape, config.format)


def layer_specs(config: ModelConfig) -> StoredSpecs:
    """Shape and dtype of every array that is stored for one layer."""
    specs: StoredSpecs = {name: linear_spec(shape, config) for name, shape in linear_shapes(config).items()}
    specs |= {name: _spec(shape, jnp.float32) for name, shape in vector_shapes(config).items()}
    return specs | {name: _spec(shape, jnp.int32) for name, shape in index_shapes(config).items()}


def shared_specs(config: ModelConfig) -> StoredSpecs:
    """Shape and dtype of every array that is stored outside the layers."""
    shape = (config.vocab_size, config.hidden_size)
    in_int8 = config.format.head_bits == 8
    table = _INT8_ROWS.stored(shape, config.format) if in_int8 else _spec(shape, jnp.bfloat16)
    specs: StoredSpecs = {"embedding": table, "norm": _spec((config.hidden_size,), jnp.float32)}
    return specs if config.tie_word_embeddings else specs | {"lm_head": table}


def layer_path(checkpoint: Path, layer: int) -> Path:
    """The folder in which a layer is stored."""
    return checkpoint / "params" / "layers" / f"{layer:04d}"


def shared_path(checkpoint: Path) -> Path:
    """The folder in which everything outside the layers is stored."""
    return checkpoint / "params" / "shared"


def stored_form(tree: Mapping[str, Any], specs: StoredSpecs) -> StoredParams:
    """Converts the arrays and quantized weights in ``tree`` to NumPy arrays of the stored types.

    Args:
      tree: parameters by name; names that are not in ``specs`` are ignored.
      specs: what is stored, from ``layer_specs`` or ``shared_specs``.
    """

    def store(value: Any, spec: Any) -> Any:
        if isinstance(spec, Mapping):
            return {name: store(getattr(value, name), spec[name]) for name in spec}
        return np.asarray(value).astype(spec.dtype)

    return {name: store(tree[name], spec) for name, spec in specs.items()}


def stored_shared(tree: Mapping[str, Any], config: ModelConfig) -> StoredParams:
    """Float parameters outside the layers as they are stored: the tables in INT8 if ``head_bits`` is 8."""
    specs = shared_specs(config)
    rounded = {name: round_table(tree[name]) for name, spec in specs.items() if isinstance(spec, Mapping)}
    return stored_form({**tree, **rounded}, specs)


def write_tree(path: Path, tree: StoredParams) -> None:
    """Writes one Orbax item. Afterwards ``path`` is complete, or does not exist.

    Raises:
      WriteError: the item cannot be written, e.g. because the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _silent_orbax(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tree, force=True)
    except Exception as error:  # Orbax and TensorStore raise many types where a write fails
        _remove_unfinished(path)
        raise WriteError(f"{path}: cannot be written: {_reason(error)}") from error


def _remove_unfinished(path: Path) -> None:
    """Removes the temporary folders that a failed save of ``path`` left beside it.

    Orbax raises the error as soon as one array cannot be written. Threads of TensorStore go on writing the
    other arrays, and create the folder again if it is removed. So this function removes the folders only
    when nothing changes any more, and returns when they have not been created again.
    """
    before = None
    for _ in range(_MOST_WAITS):
        found = _stored_files(path)
        if found == before:
            if not found:
                return
            for folder in _unfinished(path):
                shutil.rmtree(folder, ignore_errors=True)
        before = found
        time.sleep(_QUIET_SECONDS)


def _unfinished(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{glob.escape(path.name)}.orbax-checkpoint-tmp*"))


def _stored_files(path: Path) -> dict[Path, tuple[int, int]]:
    """Size and modification time of each file and folder that an unfinished save has written so far."""
    found = {}
    for unfinished in _unfinished(path):
        for folder, _, names in os.walk(unfinished):
            for file in (Path(folder), *(Path(folder) / name for name in names)):
                with contextlib.suppress(FileNotFoundError):  # a thread renamed it meanwhile
                    stat = file.stat()
                    found[file] = (stat.st_size, stat.st_mtime_ns)
    return found


def read_tree(path: Path, specs: StoredSpecs) -> StoredParams:
    """Reads one Orbax item as NumPy arrays and checks it against ``specs``.

    Raises:
      AtomError: the item is missing or unreadable, or a tensor in it has not the shape and dtype in
        ``specs``.
    """
    if not path.is_dir():
        raise AtomError(f"{path}: missing from the checkpoint")
    try:
        with _silent_orbax(), ocp.StandardCheckpointer() as checkpointer:
            tree = checkpointer.restore(path.absolute())
    except Exception as error:  # Orbax and TensorStore raise many types for a damaged file
        raise AtomError(f"{path}: not readable: {_reason(error)}") from error
    _check_tree(path, "", tree, specs)
    return tree


@contextlib.contextmanager
def _silent_orbax() -> Iterator[None]:
    """Turns off the log of Orbax in this context: its threads would print a traceback of every error.

    After an error, the threads of TensorStore print "Event loop is closed" while they end, which can be
    after this context. So after an error this message stays suppressed until the process ends.
    """
    logger = logging.getLogger("absl")
    level, hook = logger.level, sys.unraisablehook

    def print_others(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = print_others
    try:
        yield
        sys.unraisablehook = hook
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """The operating system's message if the error of TensorStore contains one, else the error's message."""
    said = re.search(r"([^:\[]+) \[os_error_code=", str(error))
    return said[1].strip() if said else one_line(error)


def _check_tree(path: Path, prefix: str, tree: Any, specs: StoredSpecs) -> None:
    found = set(tree) if isinstance(tree, Mapping) else set()
    if found != set(specs):
        under = prefix.removesuffix(".") or "the root"
        raise AtomError(f"{path}: expected {sorted(specs)} under {under}, found {sorted(map(str, found))}")
    for name, spec in specs.items():
        value, label = tree[name], f"{prefix}{name}"
        if isinstance(spec, dict):
            _check_tree(path, f"{label}.", value, spec)
        elif not hasattr(value, "shape") or value.shape != spec.shape or value.dtype != spec.dtype:
            dtype, shape = getattr(value, "dtype", type(value).__name__), list(getattr(value, "shape", ()))
            raise AtomError(
                f"{path}: tensor {label}: expected {spec.dtype}{list(spec.shape)}, found {dtype}{shape}"
            )


def write_config(checkpoint: Path, config: ModelConfig) -> None:
    """Writes config.json. Only a folder that has this file is read as a checkpoint."""
    data = {"format_version": FORMAT_VERSION, **config.to_json()}
    (checkpoint / CONFIG_FILE).write_text(json.dumps(data, indent=2) + "\n")


def read_config(checkpoint: Path) -> ModelConfig:
    """The configuration of a checkpoint folder.

    Raises:
      AtomError: the folder is not a checkpoint, is of an unknown version, or has an unusable configuration.
    """
    file = checkpoint / CONFIG_FILE
    if not file.exists():
        raise AtomError(f"{file}: no such file; is {checkpoint} a converted checkpoint?")
    data = read_json(file)
    version = data.pop("format_version", None)
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise AtomError(
            f"{file}: not an Atom-JAX checkpoint of version 1 to {FORMAT_VERSION} (found {version!r}); "
            "convert the original model with 'atom-jax convert'"
        )
    try:
        data = upgraded(data, version)
    except AtomError as error:
        raise AtomError(f"{file}: {error}") from error
    for name in _SIZES & data.keys():
        if type(data[name]) is not int or data[name] < 1:
            raise AtomError(f"{file}: {name} must be a positive integer, found {data[name]!r}")
    try:
        config = ModelConfig.from_json(data)
        layer_specs(config)
    except AtomError as error:
        raise AtomError(f"{file}: {error}") from error
    return config


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerFast:
    """The transformers tokenizer of a checkpoint; AtomError if it is missing or damaged."""
    folder = checkpoint / TOKENIZER_FOLDER
    if not folder.is_dir():
        raise AtomError(f"{folder}: the checkpoint has no tokenizer")
    return wrap_tokenizer(folder)


def layer_params(tree: StoredParams, config: ModelConfig) -> dict[str, Any]:
    """Stored parameters as those of ``llama.Layer``, on the default device.

    Args:
      tree: parameters of one layer, or of a stack of layers (every array has a leading layer axis).
      config: configuration of the model.
    """
    weight, shapes = SCHEMES[config.format.scheme].weight, linear_shapes(config)

    def revive(name: str, value: Any) -> Any:
        if weight is not None and isinstance(value, Mapping):
            return weight.revive(value, shapes[name], config.format)
        return jnp.asarray(value)

    return {name: revive(name, value) for name, value in tree.items()}


def load_layer(checkpoint: Path, layer: int, config: ModelConfig) -> dict[str, Any]:
    """The ``layer_params`` of one layer of a checkpoint of this configuration."""
    return layer_params(read_tree(layer_path(checkpoint, layer), layer_specs(config)), config)


def shared_params(tree: StoredParams, config: ModelConfig, dtype: jnp.dtype) -> dict[str, Any]:
    """Stored parameters outside the layers as those of ``llama.Llama``, on the default device.

    Args:
      tree: what ``shared_specs`` describes.
      config: configuration of the model.
      dtype: dtype of the residual stream.
    """
    shape = (config.vocab_size, config.hidden_size)

    def revive(value: Any) -> Any:
        in_int8 = isinstance(value, Mapping)
        return _INT8_ROWS.revive(value, shape, config.format) if in_int8 else jnp.asarray(value)

    params = {name: revive(value) for name, value in tree.items()}
    return {**params, "embedding": Embedding(params["embedding"], dtype)}


def default_dtype() -> jnp.dtype:
    """Dtype of activations: float32 on a CPU, which has no bfloat16 arithmetic, and bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def load(path: str | Path, *, dtype: jnp.dtype | None = None) -> Model:
    """Loads a converted checkpoint onto the default device. Needs neither torch nor the original model.

    On a GPU for which there are kernels, the kernels are first compared with the reference in separate
    processes, once for each kind of device and each version (docs/doctor.md). A kernel that fails is named
    in a RuntimeWarning and not used.

    Args:
      path: folder written by ``atom-jax convert``.
      dtype: dtype of activations and of a cache that is not quantized; None for ``default_dtype()``.

    Raises:
      AtomError: the folder is not a checkpoint, or a part of it is missing, damaged or does not fit the
        configuration.
    """
    path = Path(path)
    config = read_config(path)
    if (message := check_kernels()) is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    dtype = default_dtype() if dtype is None else dtype
    specs = layer_specs(config)
    stacked = jax.tree.map(lambda spec: np.empty((config.num_layers, *spec.shape), spec.dtype), specs)
    for layer in range(config.num_layers):
        tree = read_tree(layer_path(path, layer), specs)
        jax.tree.map(lambda stack, value, layer=layer: stack.__setitem__(layer, value), stacked, tree)
    tree = shared_params(read_tree(shared_path(path), shared_specs(config)), config, dtype)
    # Popped one by one, so that no more than one parameter is in host and device memory at the same time.
    layers = {name: layer_params({name: stacked.pop(name)}, config)[name] for name in list(stacked)}
    return Model(path, config, make_params(config, {**tree, "layers": layers}))


def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.bfloat16) -> nnx.State:
    """Shapes of the params that ``load`` returns for ``config``; reads no file and allocates no arrays."""

    def build(shared: StoredParams, layers: StoredParams) -> nnx.State:
        tree = shared_params(shared, config, dtype)
        return make_params(config, {**tree, "layers": layer_params(layers, config)})

    layers = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct((config.num_layers, *spec.shape), spec.dtype), layer_specs(config)
    )
    return jax.eval_shape(build, shared_specs(config), layers)
