"""The checkpoint on disk: the names of its parts, and how each is written, read back and checked.

A checkpoint is a folder::

    config.json          ModelConfig and the version of this layout
    quantization.json    the accuracy card (written by the converter)
    tokenizer/           tokenizer.json and its settings (``atom_jax.tokenizer``)
    params/shared        Orbax: embedding, norm, lm_head
    params/layers/0000   Orbax, one item for each layer, because a conversion writes one layer at a time

A checkpoint of several shards (``Format.shards``) has an item of each shard in the place of each of these,
whose names end with ``.0-of-8`` to ``.7-of-8``, so that a device reads no more than its part.

Packed weights are stored packed. Their scales are stored as bfloat16, without loss, because the converter
chooses scales that bfloat16 can represent. Matrices that are not quantized are bfloat16, vectors float32.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from atom_jax.blocks import Linear
from atom_jax.checkpoint_versions import FORMAT_VERSION, upgraded
from atom_jax.collectives import Group
from atom_jax.config import ModelConfig
from atom_jax.embedding import Embedding, round_table
from atom_jax.errors import AtomError
from atom_jax.files import read_json
from atom_jax.kernel_check import check_kernels
from atom_jax.llama import Params, make_params
from atom_jax.orbax_items import StoredParams, StoredSpecs, read_tree, write_tree
from atom_jax.schemes import SCHEMES, w8a8
from atom_jax.sharded import ShardedParams, abstract_shards, local_devices, make_group, shard_params
from atom_jax.shards import SpecsOf, cut, join
from atom_jax.structure import LINEARS, index_shapes, vector_shapes
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

_spec = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded checkpoint: everything that ``generate`` and ``forward`` need.

    Attributes:
      path: folder of the checkpoint.
      config: configuration of the model.
      params: parameters as ``make_params`` returns them, or divided among devices.
    """

    path: Path
    config: ModelConfig
    params: Params

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The transformers tokenizer, with the chat template if the model has one."""
        return load_tokenizer(self.path)


def linear_spec(linear: Linear, config: ModelConfig) -> StoredSpecs | jax.ShapeDtypeStruct:
    """Spec of a stored linear [N, K], or [blocks, N, K / blocks].

    Raises:
      AtomError: its input channels, or those of a block, are not outliers plus whole groups.
    """
    rows, channels = linear.shape(config)
    blocks, weight = linear.blocks(config), SCHEMES[config.format.scheme].weight
    shape = (rows, channels // blocks)
    spec = _spec(shape, jnp.bfloat16) if weight is None else weight.stored(shape, config.format)
    if blocks == 1:
        return spec
    return jax.tree.map(lambda block: _spec((blocks, *block.shape), block.dtype), spec)


def layer_specs(config: ModelConfig) -> StoredSpecs:
    """Shape and dtype of every array that is stored for one layer."""
    specs: StoredSpecs = {linear.weight: linear_spec(linear, config) for linear in LINEARS}
    specs |= {name: _spec(shape, jnp.float32) for name, shape in vector_shapes(config).items()}
    return specs | {name: _spec(shape, jnp.int32) for name, shape in index_shapes(config).items()}


def shared_specs(config: ModelConfig) -> StoredSpecs:
    """Shape and dtype of every array that is stored outside the layers."""
    shape = (config.vocab_size, config.hidden_size)
    in_int8 = config.format.head_bits == 8
    table = _INT8_ROWS.stored(shape, config.format) if in_int8 else _spec(shape, jnp.bfloat16)
    specs: StoredSpecs = {"embedding": table, "norm": _spec((config.hidden_size,), jnp.float32)}
    return specs if config.tie_word_embeddings else specs | {"lm_head": table}


def layer_path(checkpoint: Path, layer: int, shard: int = 0, shards: int = 1) -> Path:
    """The folder in which a layer, or a shard of it, is stored."""
    return checkpoint / "params" / "layers" / f"{layer:04d}{_suffix(shard, shards)}"


def shared_path(checkpoint: Path, shard: int = 0, shards: int = 1) -> Path:
    """The folder in which everything outside the layers, or a shard of it, is stored."""
    return checkpoint / "params" / f"shared{_suffix(shard, shards)}"


def _suffix(shard: int, shards: int) -> str:
    return "" if shards == 1 else f".{shard}-of-{shards}"


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


def write_layer(checkpoint: Path, layer: int, tree: StoredParams, config: ModelConfig) -> None:
    """Writes a layer, in the form of ``layer_specs``, as the items of its shards.

    Raises:
      WriteError: an item cannot be written.
    """
    _write(functools.partial(layer_path, checkpoint, layer), tree, config, layer_specs)


def write_shared(checkpoint: Path, tree: StoredParams, config: ModelConfig) -> None:
    """Writes what is outside the layers, in the form of ``shared_specs``; as ``write_layer``."""
    _write(functools.partial(shared_path, checkpoint), tree, config, shared_specs)


def _write(path: Callable[..., Path], tree: StoredParams, config: ModelConfig, specs: SpecsOf) -> None:
    shards = config.format.shards
    for shard, part in enumerate([tree] if shards == 1 else cut(tree, config, specs)):
        write_tree(path(shard, shards), part)


def read_layer_part(
    checkpoint: Path, layer: int, config: ModelConfig, part: int = 0, parts: int = 1
) -> StoredParams:
    """One of ``parts`` parts of a layer, as ``layer_specs`` of the part describes it; reads only its shards.

    Raises:
      AtomError: an item is missing, damaged or does not fit the configuration.
    """
    return _read(functools.partial(layer_path, checkpoint, layer), config, layer_specs, part, parts)


def read_shared_part(checkpoint: Path, config: ModelConfig, part: int = 0, parts: int = 1) -> StoredParams:
    """What ``shared_specs`` describes of one part; as ``read_layer_part``."""
    return _read(functools.partial(shared_path, checkpoint), config, shared_specs, part, parts)


def _read(
    path: Callable[..., Path], config: ModelConfig, specs: SpecsOf, part: int, parts: int
) -> StoredParams:
    shards = config.format.shards
    whole, own = config if parts == 1 else config.part(parts), config.part(shards)
    if shards == 1:
        return read_tree(path(), specs(config))
    mine = range(part * shards // parts, (part + 1) * shards // parts)
    trees = [read_tree(path(shard, shards), specs(own)) for shard in mine]
    return join(trees, whole, own, specs)


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
        config.part(config.format.shards)
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
    weight, linears = SCHEMES[config.format.scheme].weight, {linear.weight: linear for linear in LINEARS}

    def revive(name: str, value: Any) -> Any:
        if weight is not None and isinstance(value, Mapping):
            rows, channels = linears[name].shape(config)
            return weight.revive(value, (rows, channels // linears[name].blocks(config)), config.format)
        return jnp.asarray(value)

    return {name: revive(name, value) for name, value in tree.items()}


def load_layer(checkpoint: Path, layer: int, config: ModelConfig) -> dict[str, Any]:
    """The ``layer_params`` of one layer of a checkpoint of this configuration."""
    return layer_params(read_layer_part(checkpoint, layer, config), config)


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


def load_shared(checkpoint: Path, config: ModelConfig, dtype: jnp.dtype) -> dict[str, Any]:
    """The ``shared_params`` of a checkpoint of this configuration."""
    return shared_params(read_shared_part(checkpoint, config), config, dtype)


def default_dtype() -> jnp.dtype:
    """Dtype of activations: float32 on a CPU, which has no bfloat16 arithmetic, and bfloat16 elsewhere."""
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16


def load(
    path: str | Path,
    *,
    dtype: jnp.dtype | None = None,
    mesh: Mesh | None = None,
    fixed_order: bool | None = None,
) -> Model:
    """Loads a converted checkpoint. Needs neither torch nor the original model.

    On a GPU for which there are kernels, the kernels are first compared with the reference in separate
    processes, once for each kind of device and each version (docs/doctor.md). A kernel that fails is named
    in a RuntimeWarning and not used.

    Args:
      path: folder written by ``atom-jax convert``.
      dtype: dtype of activations and of a cache that is not quantized; None for ``default_dtype()``.
      mesh: the devices among which the model is divided, with one axis; their number divides the checkpoint's
        shards. A process reads the shards of its own devices only. None for the default device.
      fixed_order: whether sums over devices have a fixed order, so that any number of devices gives the same
        bits (``atom_jax.collectives``); None for yes on CPUs and no elsewhere. Only with a mesh.

    Raises:
      AtomError: the folder is not a checkpoint, a part of it is missing, damaged or does not fit the
        configuration, or it does not run on so many devices.
    """
    path = Path(path)
    config = read_config(path)
    if (message := check_kernels()) is not None:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    dtype = default_dtype() if dtype is None else dtype
    if mesh is None:
        return Model(path, config, _load_part(path, config, dtype))
    group = make_group(mesh, fixed_order)
    config.part(group.size)

    def parts() -> Iterator[nnx.State]:
        for part, device in enumerate(group.mesh.devices):
            if device in local_devices(group):
                with jax.default_device(device):
                    params = _load_part(path, config, dtype, part, group.size)
                yield params

    return Model(path, config, shard_params(parts(), group))


def _load_part(
    path: Path, config: ModelConfig, dtype: jnp.dtype, part: int | None = None, parts: int = 1
) -> nnx.State:
    """The parameters of one of ``parts`` parts of the model, on the default device.

    With a number ``part`` they have the leading axis of ``ShardedParams``; None means all of the model.
    """
    own = config if parts == 1 else config.part(parts)
    stacked = jax.tree.map(lambda spec: np.empty((own.num_layers, *spec.shape), spec.dtype), layer_specs(own))
    for layer in range(own.num_layers):
        tree = read_layer_part(path, layer, config, part or 0, parts)
        jax.tree.map(lambda stack, value, layer=layer: stack.__setitem__(layer, value), stacked, tree)
    shared = read_shared_part(path, config, part or 0, parts)
    if part is not None:  # on the host, where a view is enough
        stacked, shared = jax.tree.map(lambda array: array[None], (stacked, shared))
    tree = shared_params(shared, own, dtype)
    # Popped one by one, so that no more than one parameter is in host and device memory at the same time.
    layers = {name: layer_params({name: stacked.pop(name)}, own)[name] for name in list(stacked)}
    return make_params(own, {**tree, "layers": layers})


def abstract_params(config: ModelConfig, dtype: jnp.dtype = jnp.bfloat16) -> nnx.State:
    """Shapes of the params that ``load`` returns for ``config``; reads no file and allocates no arrays."""

    def build(shared: StoredParams, layers: StoredParams) -> nnx.State:
        tree = shared_params(shared, config, dtype)
        return make_params(config, {**tree, "layers": layer_params(layers, config)})

    layers = jax.tree.map(
        lambda spec: jax.ShapeDtypeStruct((config.num_layers, *spec.shape), spec.dtype), layer_specs(config)
    )
    return jax.eval_shape(build, shared_specs(config), layers)


def abstract_sharded(config: ModelConfig, group: Group, dtype: jnp.dtype = jnp.bfloat16) -> ShardedParams:
    """Shapes and shardings of the params that ``load`` returns for a mesh; reads and allocates nothing.

    Raises:
      AtomError: the model, or its checkpoint, does not run on so many devices.
    """
    return abstract_shards(abstract_params(config.part(group.size), dtype), group)
