"""A model that is divided among the devices of a mesh: its parameters, its cache, and its two functions.

Every device runs the ordinary ``Llama`` on its part (``ModelConfig.part``): kernels see its heads, its inner
channels and its rows of the vocabulary. Parameters carry a leading axis of devices, whatever they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Float32, Int32

from atom_jax.collectives import AXIS, Group, all_gather
from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.kv_cache import PAGE_SIZE, init_cache
from atom_jax.llama import Llama, Params, merge
from pallas_kernels import PagedKVCache

Tree = TypeVar("Tree")

_REPLICATED = PartitionSpec()
_DEVICES = PartitionSpec(AXIS)
_HEADS = PartitionSpec(None, None, AXIS)


@partial(jax.tree_util.register_dataclass, data_fields=["state"], meta_fields=["group"])
@dataclasses.dataclass(frozen=True)
class ShardedParams:
    """Parameters of a model on the devices of a group.

    Attributes:
      state: as ``llama.make_params`` returns it for a part, each array with a leading axis of devices.
      group: the devices, in the order of the parts.
    """

    state: nnx.State
    group: Group

    def merge(self, config: ModelConfig) -> ShardedLlama:
        return ShardedLlama(self, config)


@dataclasses.dataclass(frozen=True)
class ShardedLlama:
    """``Llama`` on the devices of a group; arguments and results are on all of them, the cache is divided.

    Attributes:
      params: of the parts.
      config: configuration of the whole model.
    """

    params: ShardedParams
    config: ModelConfig

    @property
    def dtype(self) -> jnp.dtype:
        """As ``Llama.dtype``."""
        return merge(self.params.state, self.config).dtype

    def new_cache(self, batch: int, max_length: int, page_size: int = PAGE_SIZE) -> PagedKVCache:
        """As ``Llama.new_cache``; its heads are to be divided among the devices (``cache_specs``)."""
        parts = self.params.group.size
        return init_cache(self.config, batch, max_length, page_size=page_size, dtype=self.dtype, parts=parts)

    def hidden(
        self, tokens: Int32[Array, "batch seq"], positions: Int32[Array, "batch seq"], cache: PagedKVCache
    ) -> tuple[Float[Array, "batch seq hidden"], PagedKVCache]:
        """As ``Llama.hidden``."""
        return self.observed(tokens, positions, cache, lambda x: None)[:2]

    def observed(
        self,
        tokens: Int32[Array, "batch seq"],
        positions: Int32[Array, "batch seq"],
        cache: PagedKVCache,
        observe: Callable[[Float[Array, "m hidden"]], Any],
    ) -> tuple[Float[Array, "batch seq hidden"], PagedKVCache, Any]:
        """As ``Llama.observed``."""
        tokens = jnp.clip(tokens, 0, self.config.vocab_size - 1)
        specs = cache_specs(cache)

        def run(model: Llama, tokens: Array, positions: Array, cache: PagedKVCache) -> Any:
            return model.observed(tokens, positions, cache, observe, self.params.group)

        on_parts = self._on_parts(run, (_REPLICATED, _REPLICATED, specs), (_REPLICATED, specs, _REPLICATED))
        return on_parts(tokens, positions, cache)

    def logits(self, hidden: Float[Array, "*lead hidden"]) -> Float32[Array, "*lead vocab"]:
        """As ``Llama.logits``: each device computes those of its rows of the head, then all get all."""

        def run(model: Llama, hidden: Array) -> Array:
            return all_gather(model.logits(hidden), axis=hidden.ndim - 1)

        logits = self._on_parts(run, (_REPLICATED,), _REPLICATED)(hidden)
        return logits[..., : self.config.vocab_size]

    def _on_parts(
        self, run: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """``run``, called on each device with its part of the model and its parts of the arguments."""
        part = self.config.part(self.params.group.size)

        def on_device(state: nnx.State, *args: Any) -> Any:
            own = jax.tree.map(lambda array: array.reshape(array.shape[1:]), state)
            return run(merge(own, part), *args)

        # A result is the same on all devices by construction, which the checker of ``shard_map`` cannot see.
        sharded = jax.shard_map(
            on_device,
            mesh=self.params.group.mesh,
            in_specs=(_DEVICES, *in_specs),
            out_specs=out_specs,
            check_vma=False,
        )
        return partial(sharded, self.params.state)


def make_group(mesh: Mesh, fixed_order: bool | None = None) -> Group:
    """The devices of a mesh as a tensor-parallel group.

    Args:
      mesh: with one axis, of any name.
      fixed_order: whether sums over devices have a fixed order (``atom_jax.collectives``); None for yes on
        CPUs and no elsewhere.

    Raises:
      AtomError: the mesh has more than one axis.
    """
    if len(mesh.axis_names) != 1:
        raise AtomError(f"a mesh with one axis expected, found axes {mesh.axis_names}")
    devices = mesh.devices.reshape(-1)
    order = devices[0].platform == "cpu" if fixed_order is None else fixed_order
    return Group(Mesh(devices, (AXIS,), axis_types=(AxisType.Auto,)), order)


def first_devices(count: int) -> Mesh:
    """A mesh of the first ``count`` devices; AtomError if there are fewer."""
    devices = jax.devices()
    if not 1 <= count <= len(devices):
        platform = devices[0].platform
        remedy = f"; JAX_NUM_CPU_DEVICES={count} divides a CPU" if platform == "cpu" else ""
        raise AtomError(f"{count} devices wanted, found {len(devices)} ({platform}){remedy}")
    return Mesh(np.asarray(devices[:count]), (AXIS,))


def local_devices(group: Group) -> list[Any]:
    """The devices of the group that belong to this process."""
    return [device for device in group.mesh.devices if device.process_index == jax.process_index()]


def shard_params(parts: Iterable[nnx.State], group: Group) -> ShardedParams:
    """The parameters of a group from those of its parts.

    Args:
      parts: the part of each of ``local_devices(group)``, which is on that device already. Its arrays have
        the leading axis, of length 1.
      group: the devices.
    """
    placed = [
        jax.tree.map(lambda array, device=device: jax.device_put(array, device), state)  # commits it
        for device, state in zip(local_devices(group), parts, strict=True)
    ]
    sharding = NamedSharding(group.mesh, _DEVICES)

    def assemble(*arrays: jax.Array) -> jax.Array:
        shape = (group.size, *arrays[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, list(arrays))

    return ShardedParams(jax.tree.map(assemble, *placed), group)


def abstract_shards(part: nnx.State, group: Group) -> ShardedParams:
    """As ``shard_params``, of shapes alone.

    Args:
      part: the shapes of the part of one device, which are those of all of them.
      group: the devices, which need not be there (``jax.experimental.topologies``).
    """
    sharding = NamedSharding(group.mesh, _DEVICES)

    def on_all(spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((group.size, *spec.shape), spec.dtype, sharding=sharding)

    return ShardedParams(jax.tree.map(on_all, part), group)


def on_devices(make: Callable[[], Tree], params: Params) -> Tree:
    """What ``make`` returns, where parameters are: caches divided by heads, all else on every device."""
    if not isinstance(params, ShardedParams):
        return make()
    shardings = jax.tree.map(lambda spec: spec.sharding, abstract_on_devices(make, params.group))
    return jax.jit(make, out_shardings=shardings)()


def abstract_on_devices(make: Callable[[], Tree], group: Group) -> Tree:
    """Shapes of what ``on_devices`` returns for parameters on the devices of ``group``, with shardings."""

    def is_cache(node: Any) -> bool:
        return isinstance(node, PagedKVCache)

    shapes = jax.eval_shape(make)
    specs = jax.tree.map(
        lambda node: cache_specs(node) if is_cache(node) else _REPLICATED, shapes, is_leaf=is_cache
    )
    # A spec is a leaf of this tree, though JAX takes it for a tuple.
    return jax.tree.map(
        lambda spec, shape: jax.ShapeDtypeStruct(
            shape.shape, shape.dtype, sharding=NamedSharding(group.mesh, spec)
        ),
        specs,
        shapes,
        is_leaf=lambda node: isinstance(node, PartitionSpec),
    )


def replicated(tree: Tree, params: Params) -> Tree:
    """Arrays and random keys that are the same in all processes, on every device that has parameters."""
    if not isinstance(params, ShardedParams):
        return tree
    sharding = NamedSharding(params.group.mesh, _REPLICATED)

    def place(x: Any) -> jax.Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(place(jax.random.key_data(x)), impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, tree)


def sums_in_order(params: Params) -> bool:
    """Whether the order of float sums over devices does not depend on the batch."""
    return not isinstance(params, ShardedParams) or params.group.fixed_order


def num_parts(params: Params) -> int:
    """The number of devices among which the model is divided."""
    return params.group.size if isinstance(params, ShardedParams) else 1


def cache_specs(cache: PagedKVCache) -> PagedKVCache:
    """How a cache is divided: each device has the pages of its heads, and all block tables."""
    specs = jax.tree.map(lambda _: _HEADS, cache)
    return dataclasses.replace(specs, block_tables=_REPLICATED)
