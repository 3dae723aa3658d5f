"""Quantized arrays: the registered pytrees every op exchanges, and the packing they share.

Packing rule, the same everywhere: a tile of T consecutive 4-bit values becomes T/2 bytes; byte j of
the tile holds value j in its low nibble and value j + T/2 in its high nibble. Two masks therefore
unpack a register into two runs of consecutive channels. Weights use tiles of ``PACK_TILE`` input
channels, whatever the group size, a last tile that the body does not fill being padded with zeros; KV
pages use one tile a head (T = head_dim), so that the two channels RoPE rotates together share a byte.
``jnp.int4`` never crosses an API: checkpoints would store a byte for each value.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Generic, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float16, Float32, Int8, Int32, Shaped, UInt8

PACK_TILE = 128
Weight = TypeVar("Weight")


def num_tiles(body: int) -> int:
    """Number of packing tiles that hold ``body`` weight channels."""
    return -(-body // PACK_TILE)


def pack_int4(values: Int8[Array, "*lead channels"], tile: int) -> Int8[Array, "*lead half"]:
    """Packs 4-bit values (signed or not, only the low four bits count) along the last axis.

    Args:
      values: the number of channels must be a multiple of ``tile``.
      tile: channels a tile, even.
    """
    *lead, channels = values.shape
    if tile % 2 or channels % tile:
        raise ValueError(f"cannot pack {channels} channels in tiles of {tile}")
    low, high = jnp.split(values.astype(jnp.int8).reshape(*lead, channels // tile, 2, tile // 2), 2, axis=-2)
    return ((low & 0x0F) | jnp.left_shift(high, 4)).reshape(*lead, channels // 2)


def unpack_nibbles(
    packed: Int8[Array, "*lead half"], tile: int
) -> tuple[Int8[Array, "*lead tiles halftile"], Int8[Array, "*lead tiles halftile"]]:
    """The signed values of the low and of the high nibbles: the two halves of every tile."""
    tiles = packed.reshape(*packed.shape[:-1], -1, tile // 2)
    return jnp.left_shift(tiles, 4) >> 4, tiles >> 4


def unpack_int4(packed: Int8[Array, "*lead half"], tile: int) -> Int8[Array, "*lead channels"]:
    """Inverse of ``pack_int4`` for signed values."""
    low, high = unpack_nibbles(packed, tile)
    return jnp.stack([low, high], axis=-2).reshape(*packed.shape[:-1], -1)


@dataclasses.dataclass(frozen=True)
class ActivationFormat:
    """How an activation row is quantized: groups of ``group_size``, then ``num_outliers`` in INT8.

    ``clip`` shrinks the range of the INT4 groups (paper section 4.2), not of the outliers. With
    ``group_size`` 0 there are no groups and every channel is an outlier: plain per-token INT8.
    """

    group_size: int
    num_outliers: int
    clip: float = 1.0

    def num_groups(self, channels: int) -> int:
        """Groups in a row of ``channels``; raises ValueError if they do not fill it exactly."""
        body = channels - self.num_outliers
        if self.group_size == 0 and body == 0 < channels:
            return 0
        if self.group_size <= 0 or body <= 0 or self.num_outliers < 0 or body % self.group_size:
            raise ValueError(
                f"{channels} channels are not {self.num_outliers} outliers plus whole groups of "
                f"{self.group_size}"
            )
        return body // self.group_size

    def stored_bytes(self, rows: int, channels: int) -> int:
        """Bytes of a quantized activation [rows, channels]: one a channel, a float32 scale a group."""
        return rows * (channels + 4 * (self.num_groups(channels) + 1))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "outliers", "scales"],
    meta_fields=["group_size"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """Weight [N, K] of a linear: INT4 body in groups, INT8 tail (paper sections 4.1 and 4.2).

    The last ``num_outliers`` input channels are the tail. Invariants: body = num_groups * group_size,
    K = body + num_outliers, packed.shape[-1] * 2 = body rounded up to PACK_TILE. A stack of layers
    carries leading dimensions on every field. A weight without groups has group_size 0, packed [N, 0] and
    one row of scales: it is plain INT8 with a scale for each output channel (w8a8).

    Attributes:
      packed: the body, two values a byte (see the module's packing rule).
      outliers: the tail, one value a byte.
      scales: group-major; row g < num_groups scales group g, the last row scales the tail. Every value
        is exactly representable in bfloat16, its storage type on disk.
    """

    packed: Int8[Array, "*lead n halfbody"]
    outliers: Int8[Array, "*lead n num_outliers"]
    scales: Float32[Array, "*lead groups_and_tail n"]
    group_size: int

    @property
    def num_outliers(self) -> int:
        return self.outliers.shape[-1]

    @property
    def num_groups(self) -> int:
        return self.scales.shape[-2] - 1

    @property
    def body(self) -> int:
        return self.num_groups * self.group_size

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight represented, [*lead, N, K]."""
        return (*self.packed.shape[:-1], self.body + self.num_outliers)

    def activation_format(self, clip: float) -> ActivationFormat:
        """The format of the activations this weight multiplies."""
        return ActivationFormat(self.group_size, self.num_outliers, clip)

    def dequantize(self) -> Float32[Array, "*lead n k"]:
        """The float weight represented, input channels in stored (reordered) order."""
        body = unpack_int4(self.packed, PACK_TILE)[..., : self.body].astype(jnp.float32)
        scales = jnp.swapaxes(self.scales, -1, -2)
        body = body * jnp.repeat(scales[..., :-1], self.group_size, axis=-1)
        return jnp.concatenate([body, self.outliers.astype(jnp.float32) * scales[..., -1:]], axis=-1)


class GroupedWeight:
    """What weights of asymmetric groups without a tail have in common: rows of packed values, zero points."""

    packed: Int8[Array, "*lead n bytes"]
    zeros: Int8[Array, "*lead groups n"]
    group_size: int

    @property
    def num_groups(self) -> int:
        return self.zeros.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight represented, [*lead, N, K]."""
        return (*self.packed.shape[:-1], self.num_groups * self.group_size)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "zeros"],
    meta_fields=["group_size"],
)
@dataclasses.dataclass(frozen=True)
class WeightOnlyInt4(GroupedWeight):
    """Weight [N, K] in asymmetric INT4 groups, multiplied with a float activation (w4a16).

    w = (q - zero) * scale with -8 <= q, zero <= 7: the signed nibbles of the packing rule, that is the
    unsigned 0..15 of the literature less 8. Invariants: K = num_groups * group_size, packed.shape[-1] * 2 = K
    rounded up to PACK_TILE. A stack of layers carries leading dimensions on every field.

    Attributes:
      packed: two values a byte.
      scales: exactly representable in bfloat16, their type on disk.
      zeros: the integer that stands for 0.
    """

    packed: Int8[Array, "*lead n halfk"]
    scales: Float32[Array, "*lead groups n"]
    zeros: Int8[Array, "*lead groups n"]
    group_size: int

    def dequantize(self) -> Float32[Array, "*lead n k"]:
        """The float weight represented."""
        values = _less_zeros(self.packed, self.zeros, self.group_size).astype(jnp.float32)
        return values * per_channel(self.scales, self.group_size)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "group_scales", "zeros"],
    meta_fields=["group_size"],
)
@dataclasses.dataclass(frozen=True)
class TwoLevelWeight(GroupedWeight):
    """Weight [N, K] in INT4 groups whose dequantized values are INT8 (w4a8kv4).

    Progressive group quantization of QServe (arXiv 2405.04532, section 4.1):

    w8 = (q - zero) * group_scale is an integer, w = w8 * scale. A whole row of w8 accumulates in int32 with
    an INT8 activation, and one float scale for each output channel applies to the sum. Invariants:
    -8 <= q, zero <= 7, group_scale >= 1, -128 <= w8 <= 127 (the converter never uses a q that would leave
    INT8); K = num_groups * group_size, packed.shape[-1] * 2 = K rounded up to PACK_TILE. A stack of layers
    carries leading dimensions on every field.

    Attributes:
      packed: two values a byte.
      scales: of the output channels, exactly representable in bfloat16, their type on disk.
      group_scales: of the groups, integers.
      zeros: the integer that stands for 0.
    """

    packed: Int8[Array, "*lead n halfk"]
    scales: Float32[Array, "*lead n"]
    group_scales: Int8[Array, "*lead groups n"]
    zeros: Int8[Array, "*lead groups n"]
    group_size: int

    def activation_format(self, clip: float) -> ActivationFormat:
        """Per-token INT8, which is not clipped."""
        return ActivationFormat(0, self.shape[-1])

    def dequantize_int8(self) -> Int8[Array, "*lead n k"]:
        """The first level: what is multiplied with INT8 activations."""
        values = _less_zeros(self.packed, self.zeros, self.group_size)
        return values * per_channel(self.group_scales, self.group_size)

    def dequantize(self) -> Float32[Array, "*lead n k"]:
        """The float weight represented."""
        return self.dequantize_int8().astype(jnp.float32) * self.scales[..., None]


@partial(jax.tree_util.register_dataclass, data_fields=["stack", "layer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LayerOf(Generic[Weight]):
    """The weight of one layer, not cut out of the stack of all: XLA would copy it for a native kernel.

    Attributes:
      stack: a weight whose arrays have a leading axis of layers.
      layer: index of the layer.
    """

    stack: Weight
    layer: Int32[Array, ""]

    def cut(self) -> Weight:
        """The weight, with arrays of its own."""
        return jax.tree.map(lambda array: at_layer(array, self.layer), self.stack)


def at_layer(stack: Shaped[Array, "layers *shape"], layer: Int32[Array, ""]) -> Shaped[Array, "*shape"]:
    """The array of one layer. To allow for a negative index would cost a GPU time in each layer."""
    return lax.dynamic_index_in_dim(stack, layer, keepdims=False, allow_negative_indices=False)


def like(weight: Weight | LayerOf[Weight]) -> Weight:
    """The weight, with shapes and types in the place of arrays where it is one of a stack."""
    if not isinstance(weight, LayerOf):
        return weight
    shapes: Weight = jax.eval_shape(weight.cut)
    return shapes


def per_channel(values: Shaped[Array, "*lead groups n"], group_size: int) -> Shaped[Array, "*lead n k"]:
    """A value of each group as the value of each of its channels."""
    return jnp.repeat(jnp.swapaxes(values, -1, -2), group_size, axis=-1)


def _less_zeros(
    packed: Int8[Array, "*lead n halfk"], zeros: Int8[Array, "*lead groups n"], group_size: int
) -> Int8[Array, "*lead n k"]:
    zeros = per_channel(zeros, group_size)
    return unpack_int4(packed, PACK_TILE)[..., : zeros.shape[-1]] - zeros


@partial(
    jax.tree_util.register_dataclass, data_fields=["body", "outliers", "scales"], meta_fields=["group_size"]
)
@dataclasses.dataclass(frozen=True)
class QuantizedActivation:
    """Activation [M, K], quantized at run time by the operator that produced it (paper section 4.3).

    Attributes:
      body: INT4 values, one a byte: Hopper multiplies them as INT8 and they never reach the disk.
      outliers: INT8 tail; all channels where group_size is 0.
      scales: group-major like the weight's; the last row scales the tail.
    """

    body: Int8[Array, "m body"]
    outliers: Int8[Array, "m num_outliers"]
    scales: Float32[Array, "groups_and_tail m"]
    group_size: int

    def dequantize(self) -> Float32[Array, "m k"]:
        """The float activation represented."""
        scales = self.scales.T
        body = self.body.astype(jnp.float32) * jnp.repeat(scales[:, :-1], self.group_size, axis=-1)
        return jnp.concatenate([body, self.outliers.astype(jnp.float32) * scales[:, -1:]], axis=-1)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["k_pages", "v_pages", "k_scales", "v_scales", "block_tables"],
    meta_fields=["kv_rope"],
)
@dataclasses.dataclass(frozen=True)
class PagedKVCache:
    """Keys and values of all layers in pages of ``page_size`` tokens.

    With INT4 pages ``half`` = head_dim / 2 bytes hold one head of one token, unsigned and asymmetric
    (paper section 4.4): x = (q - zero) * scale. With floating-point pages (the bf16 baseline) the last
    axis is head_dim and the scales are None.

    Attributes:
      k_pages, v_pages: token-major within a page, keys rotated already if ``kv_rope`` is "post".
      k_scales, v_scales: for each token of a page, first the scale of each of a head's ``kv_groups`` groups,
        then their zero points (0..15). One group is the whole head, two are its halves: the channels of the
        low and of the high nibbles. float16 as in the paper; XLA on a CPU also updates it in place, which it
        does not do for bfloat16.
      block_tables: page of each block of ``page_size`` positions of each sequence.
      kv_rope: whether keys are stored before ("pre") or after ("post") RoPE.
    """

    k_pages: (
        UInt8[Array, "layers pages kv_heads page_size half"]
        | Float[Array, "layers pages kv_heads page_size head_dim"]
    )
    v_pages: (
        UInt8[Array, "layers pages kv_heads page_size half"]
        | Float[Array, "layers pages kv_heads page_size head_dim"]
    )
    k_scales: Float16[Array, "layers pages kv_heads scales_and_zeros page_size"] | None
    v_scales: Float16[Array, "layers pages kv_heads scales_and_zeros page_size"] | None
    block_tables: Int32[Array, "batch blocks"]
    kv_rope: str

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[3]

    @property
    def num_kv_heads(self) -> int:
        return self.k_pages.shape[2]

    @property
    def head_dim(self) -> int:
        return self.k_pages.shape[4] * (1 if self.k_scales is None else 2)

    @property
    def kv_groups(self) -> int:
        """Groups a quantized head is cut into, 1 or 2; 0 for float pages."""
        return 0 if self.k_scales is None else self.k_scales.shape[3] // 2

    @property
    def max_length(self) -> int:
        """Positions a sequence can hold."""
        return self.block_tables.shape[1] * self.page_size

    @property
    def quantized(self) -> bool:
        return self.k_scales is not None

    def slots(self, positions: Int32[Array, "batch seq"]) -> Int32[Array, "batch*seq"]:
        """Slot (page * page_size + offset) of each token; a negative position (padding) gives -1."""
        blocks = jnp.clip(positions // self.page_size, 0, self.block_tables.shape[1] - 1)
        pages = jnp.take_along_axis(self.block_tables, blocks, axis=1)
        slots = pages * self.page_size + positions % self.page_size
        return jnp.where((positions >= 0) & (positions < self.max_length), slots, -1).reshape(-1)


def init_paged_kv_cache(
    *,
    num_layers: int,
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    block_tables: Int32[Array, "batch blocks"],
    kv_bits: int,
    kv_rope: str,
    dtype: jnp.dtype,
    kv_groups: int = 1,
) -> PagedKVCache:
    """An empty cache; ``dtype`` matters when ``kv_bits`` is 16, ``kv_groups`` when it is 4."""
    lead = (num_layers, num_pages, num_kv_heads)
    if kv_bits == 16:
        pages = lambda: jnp.zeros((*lead, page_size, head_dim), dtype)  # noqa: E731
        return PagedKVCache(pages(), pages(), None, None, block_tables, kv_rope)
    if kv_bits != 4 or head_dim % 2 or kv_groups not in (1, 2):
        raise ValueError(
            f"no {kv_bits}-bit cache for head_dim {head_dim} in {kv_groups} groups: "
            "4 bits (even head_dim) in 1 or 2 groups, or 16 bits"
        )
    pages = lambda: jnp.zeros((*lead, page_size, head_dim // 2), jnp.uint8)  # noqa: E731
    scales = lambda: jnp.zeros((*lead, 2 * kv_groups, page_size), jnp.float16)  # noqa: E731
    return PagedKVCache(pages(), pages(), scales(), scales(), block_tables, kv_rope)
