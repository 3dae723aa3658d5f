"""Calls at the shapes of real layers, of which some clusters are executed and compared with the reference.

A whole call would take hours; what is compared is what the clusters that ran have written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import (
    PACK_TILE,
    PagedKVCache,
    QuantizedWeight,
    grouped_matmul,
    paged_attention,
    use_implementation,
)
from pallas_kernels.prefill_attention import flash, mosaic_sm90
from pallas_kernels.prefill_attention.gather import gather
from pallas_kernels.qarrays import unpack_int4
from pallas_kernels.rounding import dequantize_kv
from pallas_kernels.verification import cases, compare
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.execute import inputs_of
from pallas_kernels.verification.shapes import MODELS
from tests.cuda import support
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.ptx import emulate
from tests.pallas_kernels.ptx.emulate import Run

SEEDS = (0, 1)
# Pages that the sequences of an attention case share: 128 long ones of their own would not fit.
_POOL_KEYS = 1024


class Sample(NamedTuple):
    """What was executed of one call.

    Attributes:
      runs: the launches, one for each seed.
      error: relative norm of the difference, or the share of integers that are off by one.
      limit: that the error must not exceed.
    """

    runs: list[Run]
    error: float
    limit: float


def sample(case: Case, clusters: int = 2) -> list[Sample]:
    """Executes ``clusters`` of each launch of the case, in two orders, and compares; one sample a kernel."""
    return {
        "grouped_matmul": _matmul,
        "norm_quantize": _quantizer,
        "quantize": _quantizer,
        "silu_quantize": _quantizer,
        "kv_append": _append,
        "paged_attention": _decode,
        "prefill_attention": _prefill,
    }[case.op](case, clusters)


def _execute(call: Callable[[], Any], clusters: emulate.Clusters) -> tuple[Any, list[Run]]:
    with emulate.emulated(SEEDS, clusters=clusters) as runs:
        result = jax.tree.map(np.asarray, call())
    return result, runs


def _matmul(case: Case, clusters: int) -> list[Sample]:
    """Against the oracle in float64, in float32."""
    shape_x, shape_w = case.abstract_inputs
    (m, body), num_outliers, n = shape_x.body.shape, shape_x.outliers.shape[1], shape_w.outliers.shape[0]
    rng = np.random.default_rng(m + n + body)

    def scales(columns: int) -> np.ndarray:
        values = rng.uniform(0.5, 1.5, (shape_x.scales.shape[0], columns)).astype(np.float32)
        values[-1] *= 7 / 127 if body else 1  # else almost all of a product would come from the tail
        return values

    padding = -body % PACK_TILE  # zeros, in the upper nibbles of the last tile
    assert padding in (0, PACK_TILE // 2)
    packed = rng.integers(-128, 128, (n, (body + padding) // 2), np.int8)
    packed[:, packed.shape[1] - padding :] &= 15
    outliers = rng.integers(-127, 128, (n, num_outliers), np.int8)
    x_scales, w_scales, group_size = scales(m), scales(n), shape_w.group_size
    body_values = rng.integers(-8, 8, (m, body), np.int8)
    x = oracle.Quantized(
        body_values, rng.integers(-127, 128, (m, num_outliers), np.int8), x_scales, group_size
    )
    w = QuantizedWeight(jnp.asarray(packed), jnp.asarray(outliers), jnp.asarray(w_scales), group_size)
    on_device = bridge.activation(x), w
    y, runs = _execute(lambda: grouped_matmul(*on_device, out_dtype=jnp.float32), clusters)
    written = runs[0].written_outputs[0][:m]
    rows, columns = np.flatnonzero(written.any(1)), np.flatnonzero(written.any(0))
    chosen = written[np.ix_(rows, columns)]
    integers = np.asarray(unpack_int4(jnp.asarray(packed[columns]), PACK_TILE))
    integers = integers.reshape(len(columns), -1)[:, :body]
    expected = oracle.grouped_matmul(
        oracle.Quantized(x.body[rows], x.outliers[rows], x_scales[:, rows], group_size),
        oracle.Quantized(integers, outliers[columns], w_scales[:, columns], group_size),
    )
    error = oracle.relative_error(y[np.ix_(rows, columns)][chosen], expected[chosen])
    return [Sample(runs, error, 1e-6)]


def _quantizer(case: Case, clusters: int) -> list[Sample]:
    """Scales to some units in the last place; integers equal, behind a norm or an exponential nearly so."""
    x, *rest = inputs_of(case, support.key_of(case.name))
    result, runs = _execute(lambda: case.function(x, *rest), None if len(x) == 1 else clusters)
    body, scales, *outliers = runs[0].written_outputs  # in the kernel's order
    rows = np.flatnonzero(body.reshape(len(x), -1).any(1))
    with use_implementation("reference"):
        expected = jax.jit(case.function)(x[rows], *rest)
    exact = case.op == "quantize"
    actual, wanted, chosen = result.scales[:, rows], np.asarray(expected.scales), scales[:, rows]
    np.testing.assert_allclose(actual[chosen], wanted[chosen], rtol=0 if exact else compare.SCALES)
    differing = count = 0
    for name, written in zip(("body", "outliers"), (body, *outliers), strict=False):
        actual, wanted = getattr(result, name)[rows], np.asarray(getattr(expected, name))
        chosen = written.reshape(len(x), -1)[rows]
        difference = np.abs(actual[chosen].astype(int) - wanted[chosen])
        assert difference.max(initial=0) <= 1, name
        differing, count = differing + (difference > 0).sum(), count + difference.size
    return [Sample(runs, differing / count, 0.0 if exact else max(3 / count, compare.OFF_BY_ONE))]


def _append(case: Case, clusters: int) -> list[Sample]:
    """The cache as the reference leaves it when it appends the tokens whose CTAs ran; the queries' error."""
    qkv, cache, layer, slots, *rest = inputs_of(case, support.key_of(case.name))
    (q, written), runs = _execute(
        lambda: case.function(qkv, jax.tree.map(jnp.copy, cache), layer, slots, *rest), clusters
    )
    tokens = runs[0].written_outputs[0].reshape(len(qkv), -1).all(1)
    assert tokens.sum() == min(len(qkv), clusters)
    angles, others = [x[tokens] for x in rest[:2]], rest[2:]
    inputs = (qkv[tokens], cache, layer, slots[tokens], *angles, *others)
    with use_implementation("reference"):
        expected = jax.jit(case.function)(*inputs)
    actual = (jnp.asarray(q[tokens]), jax.tree.map(jnp.asarray, written))
    compare.check_result(case, inputs, actual, expected)
    return [Sample(runs, compare.relative_norm(actual[0], expected[0]), compare.QUERIES)]


class AttentionInputs(NamedTuple):
    """Arguments of ``paged_attention``."""

    q: Float[Array, "batch seq heads head_dim"]
    cache: PagedKVCache
    layer: Int32[Array, ""]
    positions: Int32[Array, "batch seq"]


def _attention_inputs(case: Case) -> AttentionInputs:
    abstract_q, abstract_cache, *_, abstract_positions = case.abstract_inputs
    key = support.key_of(case.name)
    kv_bits = 4 if abstract_cache.quantized else 16
    cache = cases.random_cache(key, MODELS[case.model], 1, _POOL_KEYS, kv_bits)
    pages = cache.k_pages.shape[1]
    tables = jax.random.randint(key, abstract_cache.block_tables.shape, 0, pages, jnp.int32)
    keys, seq = abstract_cache.max_length, abstract_q.shape[1]
    positions = jnp.broadcast_to(jnp.arange(keys - seq, keys, dtype=jnp.int32), abstract_positions.shape)
    q = jax.random.normal(key, abstract_q.shape, abstract_q.dtype)
    return AttentionInputs(q, dataclasses.replace(cache, block_tables=tables), jnp.int32(1), positions)


def _decode(case: Case, clusters: int) -> list[Sample]:
    """Some kv heads of one sequence, with all their splits."""
    q, cache, layer, positions = _attention_inputs(case)
    sequence, heads = len(q) // 2, min(clusters, cache.num_kv_heads)
    out, runs = _execute(
        lambda: paged_attention(q, cache, layer=layer, positions=positions),
        lambda origin: origin[0] == sequence and origin[1] < heads,  # then the split, or the channels
    )
    kernels = [[run for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)]
    queries = heads * q.shape[2] // cache.num_kv_heads
    written = runs[-1].written_outputs[0].reshape(out.shape)
    assert written[sequence, 0, :queries].all() and written.sum() == written[sequence, 0, :queries].size
    chosen = slice(sequence, sequence + 1)
    one = dataclasses.replace(cache, block_tables=cache.block_tables[chosen])
    with use_implementation("reference"), jax.default_matmul_precision("highest"):
        expected = np.asarray(paged_attention(q[chosen], one, layer=layer, positions=positions[chosen]))
    error = float(oracle.relative_error(out[sequence, 0, :queries], expected[0, 0, :queries]))
    limit = compare.DECODE_INT4 if cache.quantized else compare.DECODE_BF16
    return [Sample(of_kernel, error, limit) for of_kernel in kernels]


def _prefill(case: Case, clusters: int) -> list[Sample]:
    """Both kernels on inputs of their own: what some clusters gather is not what some others attend to."""
    q, cache, layer, positions = _attention_inputs(case)
    config = mosaic_sm90.configs(case.call)[0]
    return [_flash(q, cache, positions, config), _gathered(cache, layer, positions, config, clusters)]


def _gathered(
    cache: PagedKVCache, layer: Array, positions: Array, config: flash.FlashConfig, clusters: int
) -> Sample:
    how = {"block_m": config.block_m, "step_keys": config.block_n, "num_keys": cache.max_length}
    found, runs = _execute(lambda: gather(cache, layer, positions, None, None, **how), clusters)
    for name, values, written in zip("kv", found, runs[0].written_outputs, strict=True):
        # [batch, blocks, kv heads, tokens, ...]
        pages = getattr(cache, f"{name}_pages")[layer, cache.block_tables]
        if cache.quantized:
            scales = getattr(cache, f"{name}_scales")[layer, cache.block_tables].swapaxes(-1, -2)
            pages = dequantize_kv(pages, *jnp.split(scales, 2, axis=-1))
        expected = np.asarray(pages.swapaxes(2, 3).reshape(values.shape).astype(values.dtype))
        assert written.any()
        np.testing.assert_array_equal(values[written], expected[written])
    return Sample(runs, 0.0, 0.0)


def _flash(q: Array, cache: PagedKVCache, positions: Array, config: flash.FlashConfig) -> Sample:
    """One tile of queries of one head, against softmax in float64."""
    rng = np.random.default_rng(q.shape[1])
    batch, _, num_heads, head_dim = q.shape
    shape = (batch, cache.max_length, cache.num_kv_heads, head_dim)
    k, v = (jnp.asarray(rng.normal(size=shape), q.dtype) for _ in range(2))
    out, runs = _execute(lambda: flash.flash_attention(q, k, v, positions, None, config), 1)
    (written,) = runs[0].written_outputs
    (head,), rows = np.flatnonzero(written.any((0, 1, 3))), np.flatnonzero(written.any((0, 2, 3)))
    assert len(rows) == config.block_m
    kv_head = head * cache.num_kv_heads // num_heads
    parts = (q[0, rows, head], k[0, :, kv_head], v[0, :, kv_head])
    queries, keys, values = (np.asarray(part, np.float64) for part in parts)
    scores = queries @ keys.T * head_dim**-0.5
    scores = np.where(np.arange(len(keys)) <= np.asarray(positions)[0, rows, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    expected = weights @ values / weights.sum(1, keepdims=True)
    return Sample(runs, oracle.relative_error(out[0, rows, head], expected), compare.PREFILL)
