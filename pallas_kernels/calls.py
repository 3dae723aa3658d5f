"""One traced call of an op in words and in work: what ``dispatch.record_choices`` recorded, for people."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from pallas_kernels.dispatch import Choice
from pallas_kernels.grouped_matmul.cost import cost as grouped_matmul_cost
from pallas_kernels.kv_append.cost import cost as kv_append_cost
from pallas_kernels.norm_quantize.cost import cost as norm_quantize_cost
from pallas_kernels.paged_attention.cost import cost as paged_attention_cost
from pallas_kernels.prefill_attention.cost import cost as prefill_attention_cost
from pallas_kernels.quantize.cost import cost as quantize_cost
from pallas_kernels.roofline import Cost
from pallas_kernels.silu_quantize.cost import cost as silu_quantize_cost
from pallas_kernels.two_level_matmul.cost import cost as two_level_matmul_cost
from pallas_kernels.weight_only_matmul.cost import cost as weight_only_matmul_cost


def cost(call: Choice, *, window: int | None = None) -> Cost:
    """The least the call must move and multiply.

    Args:
      window: of the layer, if it has a sliding one: to the op, it is data.

    Raises:
      ValueError: the op has no cost model.
    """
    known = {"window": window} if call.op in _ATTENTION else {}
    return _COSTS[_known(call.op)](*call.arguments, **known)


def describe(call: Choice, *, window: int | None = None) -> str:
    """The shape of the call, e.g. "M=64 N=6144 K=4096"; ``window`` as for ``cost``."""
    shape = _SHAPES[_known(call.op)](*call.arguments)
    return shape if window is None or call.op not in _ATTENTION else f"{shape} window={window}"


def _known(op: str) -> str:
    if op not in _COSTS:
        raise ValueError(f"no cost model of {op}; there is one of {', '.join(_COSTS)}")
    return op


def _grouped_matmul(x: Any, w: Any, bias: Any, residual: Any, out_dtype: Any) -> Cost:
    n, k = w.shape
    return grouped_matmul_cost(
        x.outliers.shape[0], n, k, w.group_size, w.num_outliers, out_bytes=jnp.dtype(out_dtype).itemsize
    )


def _two_level_matmul(x: Any, w: Any, bias: Any, residual: Any, out_dtype: Any) -> Cost:
    n, k = w.shape
    return two_level_matmul_cost(
        x.outliers.shape[0], n, k, w.group_size, out_bytes=jnp.dtype(out_dtype).itemsize
    )


def _weight_only_matmul(x: Any, w: Any, bias: Any, residual: Any, out_dtype: Any) -> Cost:
    n, k = w.shape
    out_bytes = jnp.dtype(out_dtype).itemsize
    return weight_only_matmul_cost(x.shape[0], n, k, w.group_size, x.dtype.itemsize, out_bytes)


def _norm_quantize(x: Any, weight: Any, residual: Any, indices: Any, eps: float, fmt: Any) -> Cost:
    rows, channels = x.shape
    return norm_quantize_cost(
        rows,
        channels,
        fmt,
        residual=residual is not None,
        reorder=indices is not None,
        in_bytes=x.dtype.itemsize,
        weight_bytes=weight.dtype.itemsize,
    )


def _quantize(x: Any, fmt: Any, indices: Any) -> Cost:
    rows, channels = x.shape
    return quantize_cost(rows, channels, fmt, in_bytes=x.dtype.itemsize, reorder=indices is not None)


def _silu_quantize(gate_up: Any, fmt: Any) -> Cost:
    rows, columns = gate_up.shape
    return silu_quantize_cost(rows, columns // 2, fmt, in_bytes=gate_up.dtype.itemsize)


def _kv_append(
    qkv: Any,
    cache: Any,
    layer: Any,
    slots: Any,
    cos: Any,
    sin: Any,
    heads: int,
    q_norm: Any,
    k_norm: Any,
    k_mean: Any,
    eps: float,
) -> Cost:
    return kv_append_cost(
        qkv.shape[0],
        heads,
        cache.num_kv_heads,
        cache.head_dim,
        cache.kv_groups,
        row_bytes=qkv.dtype.itemsize,
        page_bytes=cache.k_pages.dtype.itemsize,
        mean_bytes=0 if k_mean is None else k_mean.dtype.itemsize,
    )


def _paged_attention(q: Any, cache: Any, *_: Any, window: int | None) -> Cost:
    batch, _, num_heads, head_dim = q.shape
    kv_bits = 4 if cache.quantized else 16
    return paged_attention_cost(
        batch, num_heads, cache.num_kv_heads, head_dim, cache.max_length, kv_bits, cache.kv_groups, window
    )


def _prefill_attention(q: Any, cache: Any, *_: Any, window: int | None) -> Cost:
    batch, seq, num_heads, head_dim = q.shape
    return prefill_attention_cost(
        batch,
        seq,
        cache.max_length,
        num_heads,
        cache.num_kv_heads,
        head_dim,
        cache.kv_groups,
        page_bytes=cache.k_pages.dtype.itemsize,
        window=window,
    )


def _attention_shape(q: Any, cache: Any, *_: Any) -> str:
    batch, seq, num_heads, head_dim = q.shape
    heads = f"heads={num_heads}/{cache.num_kv_heads}x{head_dim}"
    return f"batch={batch} queries={seq} keys={cache.max_length} {heads}"


def _quantized_matmul_shape(x: Any, w: Any, *_: Any) -> str:
    return f"M={x.outliers.shape[0]} N={w.shape[0]} K={w.shape[1]}"


_ATTENTION = ("paged_attention", "prefill_attention")
_COSTS = {
    "grouped_matmul": _grouped_matmul,
    "two_level_matmul": _two_level_matmul,
    "weight_only_matmul": _weight_only_matmul,
    "norm_quantize": _norm_quantize,
    "quantize": _quantize,
    "silu_quantize": _silu_quantize,
    "kv_append": _kv_append,
    "paged_attention": _paged_attention,
    "prefill_attention": _prefill_attention,
}
_SHAPES = {
    "grouped_matmul": _quantized_matmul_shape,
    "two_level_matmul": _quantized_matmul_shape,
    "weight_only_matmul": lambda x, w, *_: f"M={x.shape[0]} N={w.shape[0]} K={w.shape[1]}",
    "norm_quantize": lambda x, *_: f"M={x.shape[0]} K={x.shape[1]}",
    "quantize": lambda x, *_: f"M={x.shape[0]} K={x.shape[1]}",
    "silu_quantize": lambda gate_up, *_: f"M={gate_up.shape[0]} K={gate_up.shape[1] // 2}",
    "kv_append": lambda qkv, cache, *_: f"M={qkv.shape[0]} kv_heads={cache.num_kv_heads}x{cache.head_dim}",
    "paged_attention": _attention_shape,
    "prefill_attention": _attention_shape,
}
