"""Calls of every op at the shapes of real models, with which kernels are compiled, checked and timed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from pallas_kernels.devices import REFERENCE
from pallas_kernels.dispatch import AnyCall, cost, record_choices, use_implementation
from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.kv_append.api import kv_append
from pallas_kernels.norm_quantize.api import norm_quantize
from pallas_kernels.paged_attention.api import paged_attention
from pallas_kernels.qarrays import (
    PACK_TILE,
    ActivationFormat,
    PagedKVCache,
    QuantizedActivation,
    QuantizedWeight,
    pack_int4,
)
from pallas_kernels.quantize.api import quantize
from pallas_kernels.roofline import Cost
from pallas_kernels.silu_quantize.api import silu_quantize
from pallas_kernels.verification.shapes import DECODE_ROWS, MODELS, PREFILL_ROWS, SHAPES, LayerShape

PAGE_SIZE = 64
CLIP_A = 0.9
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """One jittable call of an op: ``function(*inputs(key))``.

    Attributes:
      op: of ``pallas_kernels``.
      model, shape: what a reader sees, e.g. "Llama-3-8B" and "qkv_proj M=16".
      inputs: makes random arguments from a key; ``jax.eval_shape`` of it gives their shapes without memory.
      donated: positions of arguments that the function updates in place.
    """

    op: str
    model: str
    shape: str
    function: Callable[..., PyTree]
    inputs: Callable[[Key[Array, ""]], tuple[PyTree, ...]]
    donated: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op} {self.model} {self.shape}"

    @property
    def abstract_inputs(self) -> tuple[PyTree, ...]:
        return jax.eval_shape(self.inputs, jax.eval_shape(lambda: jax.random.key(0)))

    @property
    def call(self) -> AnyCall:
        """The op's ``Call``, with shapes in place of arrays."""

        def traced(*inputs: PyTree) -> PyTree:  # a new function each time: a cached trace records nothing
            return self.function(*inputs)

        with use_implementation(REFERENCE), record_choices() as choices:
            jax.eval_shape(traced, *self.abstract_inputs)
        (choice,) = choices
        return jax.tree.map(_shape, choice.call)

    @property
    def cost(self) -> Cost:
        """The least that one call must move and multiply."""
        return cost(self.op, self.call)


def _shape(leaf: PyTree) -> PyTree:
    """The shape and dtype of an array; anything else stays as it is."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if isinstance(leaf, jax.Array) else leaf


def random_weight(key: Key[Array, ""], n: int, k: int, group_size: int, num_outliers: int) -> QuantizedWeight:
    """A weight of random integers, with all values that the format allows; padding is zero."""
    body, scale_rows = k - num_outliers, ActivationFormat(group_size, num_outliers).num_groups(k) + 1
    keys = jax.random.split(key, 3)
    values = jax.random.randint(keys[0], (n, body), -8, 8, jnp.int8)
    packed = pack_int4(jnp.pad(values, ((0, 0), (0, -body % PACK_TILE))), PACK_TILE)
    outliers = jax.random.randint(keys[1], (n, num_outliers), -127, 128, jnp.int8)
    scales = jax.random.uniform(keys[2], (scale_rows, n), minval=0.5, maxval=1.5) / (5 * k**0.5)
    return QuantizedWeight(packed, outliers, _smaller_tail_scales(scales), group_size)


def _smaller_tail_scales(scales: Float[Array, "groups_and_tail n"]) -> Float[Array, "groups_and_tail n"]:
    """Makes the tail's scales smaller: else almost all of a product would come from its INT8 values."""
    return scales.at[-1].multiply(7 / 127)


def random_activation(
    key: Key[Array, ""], rows: int, k: int, group_size: int, num_outliers: int
) -> QuantizedActivation:
    """An activation of random integers, with all values that the format allows, and of realistic scales."""
    scale_rows = ActivationFormat(group_size, num_outliers).num_groups(k) + 1
    keys = jax.random.split(key, 3)
    return QuantizedActivation(
        jax.random.randint(keys[0], (rows, k - num_outliers), -8, 8, jnp.int8),
        jax.random.randint(keys[1], (rows, num_outliers), -127, 128, jnp.int8),
        _smaller_tail_scales(jax.random.uniform(keys[2], (scale_rows, rows), minval=0.05, maxval=0.5)),
        group_size,
    )


def random_cache(
    key: Key[Array, ""], layer: LayerShape, batch: int, length: int, kv_bits: int, num_layers: int = 2
) -> PagedKVCache:
    """A full cache whose pages are in random order."""
    num_blocks = -(-length // PAGE_SIZE)
    keys = jax.random.split(key, 5)
    lead = (num_layers, batch * num_blocks, layer.num_kv_heads)
    tables = jax.random.permutation(keys[4], batch * num_blocks).astype(jnp.int32).reshape(batch, num_blocks)
    if kv_bits == 16:
        pages = [jax.random.normal(k, (*lead, PAGE_SIZE, layer.head_dim), jnp.bfloat16) for k in keys[:2]]
        return PagedKVCache(pages[0], pages[1], None, None, tables, "post")
    pages = [jax.random.bits(k, (*lead, PAGE_SIZE, layer.head_dim // 2), jnp.uint8) for k in keys[:2]]

    def scales(key: Key[Array, ""]) -> Array:
        groups = (*lead, layer.kv_groups, PAGE_SIZE)
        first, second = jax.random.split(key)
        scale = jax.random.uniform(first, groups, minval=0.1, maxval=0.3)
        zero = jax.random.randint(second, groups, 5, 11).astype(jnp.float32)
        return jnp.concatenate([scale, zero], axis=-2).astype(jnp.float16)

    return PagedKVCache(pages[0], pages[1], scales(keys[2]), scales(keys[3]), tables, "post")


def matmul(model: str, linear: str, rows: int, bits: int = 4) -> Case:
    """A linear in 4 bits with outliers (w4a4kv4), or all in 8 bits (w8a8)."""
    layer = SHAPES[model]
    n, k = layer.linears[linear]
    fmt = (layer.group_size, layer.num_outliers) if bits == 4 else (0, k)

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        first, second = jax.random.split(key)
        return random_activation(first, rows, k, *fmt), random_weight(second, n, k, *fmt)

    shape = f"{linear} {n}x{k} M={rows}" + (" 8-bit" if bits == 8 else "")
    return Case("grouped_matmul", model, shape, grouped_matmul, inputs)


def norm(model: str, rows: int) -> Case:
    """RMSNorm of the residual stream, quantized."""
    layer = SHAPES[model]
    channels = layer.hidden_size
    fmt = ActivationFormat(layer.group_size, layer.num_outliers, CLIP_A)

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        first, second = jax.random.split(key)
        weight = jax.random.uniform(second, (channels,), minval=0.5, maxval=1.5)
        return jax.random.normal(first, (rows, channels), jnp.bfloat16), weight

    # The second result is the residual stream, here the input; the model does not use it either.
    call = lambda x, weight: norm_quantize(x, weight, eps=EPS, fmt=fmt)[0]  # noqa: E731
    return Case("norm_quantize", model, f"K={channels} M={rows}", call, inputs)


def attention_output(model: str, rows: int) -> Case:
    """The input of o_proj, quantized."""
    layer = SHAPES[model]
    channels = layer.num_heads * layer.head_dim
    fmt = ActivationFormat(layer.group_size, layer.num_outliers, CLIP_A)
    inputs = lambda key: (jax.random.normal(key, (rows, channels), jnp.bfloat16),)  # noqa: E731
    return Case("quantize", model, f"K={channels} M={rows}", lambda x: quantize(x, fmt), inputs)


def silu(model: str, rows: int, *, rotate: bool = True) -> Case:
    """The input of down_proj, quantized, by default with rotated groups, as w4a4kv4 has it."""
    layer = SHAPES[model]
    channels = layer.intermediate_size
    fmt = ActivationFormat(layer.group_size, layer.num_outliers, CLIP_A)
    inputs = lambda key: (jax.random.normal(key, (rows, 2 * channels), jnp.bfloat16),)  # noqa: E731
    shape = f"K={channels}{' rotated' * rotate} M={rows}"
    return Case("silu_quantize", model, shape, lambda x: silu_quantize(x, fmt, rotate=rotate), inputs)


def append(model: str, rows: int, kv_bits: int = 4) -> Case:
    """New tokens for a cache of INT4 pages, whose keys are centered, or of bfloat16 pages."""
    layer = SHAPES[model]
    length = 2 * PAGE_SIZE

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        keys = jax.random.split(key, 5)
        width = (layer.num_heads + 2 * layer.num_kv_heads) * layer.head_dim
        angle = jax.random.uniform(keys[1], (rows, layer.head_dim // 2), maxval=2 * jnp.pi)
        pages = -(-rows // length)
        slots = jax.random.permutation(keys[2], pages * length)[:rows].astype(jnp.int32)
        norms = [jnp.ones((layer.head_dim,), jnp.float32)] * 2 if layer.qk_norm else [None, None]
        mean = jax.random.normal(keys[4], (layer.num_kv_heads, layer.head_dim)) if kv_bits == 4 else None
        return (
            jax.random.normal(keys[0], (rows, width), jnp.bfloat16),
            random_cache(keys[3], layer, pages, length, kv_bits),
            jnp.int32(1),
            slots,
            jnp.cos(angle),
            jnp.sin(angle),
            *norms,
            mean,
        )

    def call(qkv, cache, index, slots, cos, sin, q_norm, k_norm, k_mean):
        return kv_append(
            qkv,
            cache,
            layer=index,
            slots=slots,
            cos=cos,
            sin=sin,
            num_heads=layer.num_heads,
            q_norm=q_norm,
            k_norm=k_norm,
            k_mean=k_mean,
            eps=EPS,
        )

    return Case("kv_append", model, f"M={rows} {kv_bits}-bit", call, inputs, donated=(1,))


def attention(model: str, batch: int, seq: int, length: int, kv_bits: int = 4) -> Case:
    """Decode (seq 1) or a prefill chunk; the last query is at the last of ``length`` cached positions."""
    layer = SHAPES[model]

    def inputs(key: Key[Array, ""]) -> tuple[PyTree, ...]:
        first, second = jax.random.split(key)
        positions = jnp.broadcast_to(jnp.arange(length - seq, length, dtype=jnp.int32), (batch, seq))
        q = jax.random.normal(first, (batch, seq, layer.num_heads, layer.head_dim), jnp.bfloat16)
        return q, random_cache(second, layer, batch, length, kv_bits), jnp.int32(1), positions

    def call(q, cache, index, positions):
        return paged_attention(q, cache, layer=index, positions=positions)

    op = "paged_attention" if seq == 1 else "prefill_attention"
    shape = f"batch={batch} queries={seq} keys={length} {kv_bits}-bit"
    return Case(op, model, shape, call, inputs)


def all_cases() -> Iterator[Case]:
    """Every op at every model's shapes, decode and prefill."""
    for model, layer in MODELS.items():
        for rows in (*DECODE_ROWS, *PREFILL_ROWS):
            for linear in layer.linears:
                yield matmul(model, linear, rows)
        for rows in (16, 4096):
            for linear in layer.linears:
                yield matmul(model, linear, rows, bits=8)
        for rows in (*DECODE_ROWS, *PREFILL_ROWS):
            yield from (norm(model, rows), attention_output(model, rows), silu(model, rows))
            yield append(model, rows)
        yield append(model, DECODE_ROWS[-1], kv_bits=16)
        for batch in DECODE_ROWS:
            yield attention(model, batch, 1, 2048)
        yield attention(model, DECODE_ROWS[-1], 1, 2048, kv_bits=16)
        yield attention(model, 1, 512, 2048)
