"""The contract of the quantized ops in NumPy: loops, float64, own packing; it imports nothing it judges.

Scales (``max(amax * f32(clip), 1e-5) * f32(1 / 7)``) and the products with their reciprocals are float32, as
documented, so that integers can be compared bit for bit. Everything else is float64, compared by norm.
"""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np

BF16 = ml_dtypes.bfloat16
F32, F64 = np.float32, np.float64
WEIGHT_TILE = 128


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Norm of the difference over the norm of ``expected``; NaN and infinity never pass for small."""
    actual, expected = np.asarray(actual, F64), np.asarray(expected, F64)
    assert actual.shape == expected.shape
    error = np.linalg.norm(actual - expected) / max(float(np.linalg.norm(expected)), 1e-30)
    return float(error) if np.isfinite(error) else np.inf


def product_error(actual: np.ndarray, expected: np.ndarray, x: np.ndarray, w: np.ndarray) -> float:
    """The norm of the error of ``x @ w.T``, relative to that of the product of their absolute values.

    Few sums of numbers that cancel may be far smaller than the numbers, so that their relative error says
    nothing.
    """
    magnitude = np.abs(x).astype(np.float64) @ np.abs(w).astype(np.float64).T
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(magnitude))


def pack(values: np.ndarray, tile: int) -> np.ndarray:
    """Byte j of a tile: value j in the low nibble, value j + tile/2 in the high one."""
    out = np.zeros((*values.shape[:-1], values.shape[-1] // 2), np.uint8)
    for start in range(0, values.shape[-1], tile):
        for j in range(tile // 2):
            low, high = values[..., start + j].astype(int), values[..., start + j + tile // 2].astype(int)
            out[..., start // 2 + j] = (low & 15) | ((high & 15) << 4)
    return out


def pack_weight(body: np.ndarray) -> np.ndarray:
    """Tiles of 128 input channels, the last one padded with zeros."""
    n, channels = body.shape
    padded = np.zeros((n, -(-channels // WEIGHT_TILE) * WEIGHT_TILE), np.int64)
    padded[:, :channels] = body
    return pack(padded, WEIGHT_TILE).view(np.int8)


class Quantized(NamedTuple):
    """Rows [R, K] (an activation's tokens, a weight's output channels) with group-major scales [G + 1, R]."""

    body: np.ndarray
    outliers: np.ndarray
    scales: np.ndarray
    group_size: int

    def dequantize(self) -> np.ndarray:
        rows, body = self.body.shape
        out = np.zeros((rows, body + self.outliers.shape[1]))
        for channel in range(body):
            out[:, channel] = self.body[:, channel] * self.scales[channel // self.group_size].astype(F64)
        out[:, body:] = self.outliers * self.scales[-1].astype(F64)[:, None]
        return out


def _scale(amax: np.ndarray, clip: float, bound: int) -> np.ndarray:
    return np.maximum(amax.astype(F32) * F32(clip), F32(1e-5)) * F32(1.0 / bound)


def _round_clip(x: np.ndarray, scale: np.ndarray, bound: int) -> np.ndarray:
    return np.clip(np.rint(x.astype(F32) * (F32(1) / scale.astype(F32))), -bound - 1, bound).astype(np.int8)


def quantize(x: np.ndarray, group_size: int, num_outliers: int, clip: float) -> Quantized:
    """INT4 groups, then an INT8 tail, of every row."""
    x = x.astype(F32)
    rows, channels = x.shape
    body = channels - num_outliers
    groups = body // group_size if body else 0
    q = np.zeros((rows, body), np.int8)
    scales = np.zeros((groups + 1, rows), F32)
    for group in range(groups):
        span = slice(group * group_size, (group + 1) * group_size)
        scales[group] = _scale(np.abs(x[:, span]).max(axis=1), clip, 7)
        q[:, span] = _round_clip(x[:, span], scales[group][:, None], 7)
    tail = x[:, body:]
    scales[-1] = _scale(np.abs(tail).max(axis=1, initial=0), 1.0, 127)
    return Quantized(q, _round_clip(tail, scales[-1][:, None], 127), scales, group_size)


def grouped_matmul(x: Quantized, w: Quantized) -> np.ndarray:
    """Integer products per group, scaled and summed in float64."""
    size, body = x.group_size, x.body.shape[1]
    y = np.zeros((x.body.shape[0], w.body.shape[0]))
    for g, start in enumerate(range(0, body, size) if body else ()):
        dot = (
            x.body[:, start : start + size].astype(np.int64)
            @ w.body[:, start : start + size].astype(np.int64).T
        )
        y += np.outer(x.scales[g].astype(F64), w.scales[g].astype(F64)) * dot
    dot = x.outliers.astype(np.int64) @ w.outliers.astype(np.int64).T
    return y + np.outer(x.scales[-1].astype(F64), w.scales[-1].astype(F64)) * dot


class Int4(NamedTuple):
    """Integers -8..7 [N, K] with a zero point and a scale of each group and row, [G, N].

    ``channel_scales`` [N] makes it a weight of two levels: then ``scales`` are integers.
    """

    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_size: int
    channel_scales: np.ndarray | None = None

    def level_one(self) -> np.ndarray:
        """(q - zero) * scale of the group, channel by channel: integers if the weight has two levels."""
        rows, channels = self.values.shape
        out = np.zeros((rows, channels))
        for channel in range(channels):
            group = channel // self.group_size
            q = self.values[:, channel].astype(F64) - self.zeros[group].astype(F64)
            out[:, channel] = q * self.scales[group].astype(F64)
        return out

    def dequantize(self) -> np.ndarray:
        channel = 1.0 if self.channel_scales is None else self.channel_scales.astype(F64)[:, None]
        return self.level_one() * channel


def two_level_matmul(x: Quantized, w: Int4) -> np.ndarray:
    """One integer sum over the whole row, then the two scales in float64."""
    assert w.channel_scales is not None and x.body.shape[1] == 0
    total = x.outliers.astype(np.int64) @ w.level_one().astype(np.int64).T
    return np.outer(x.scales[-1].astype(F64), w.channel_scales.astype(F64)) * total


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    x = x.astype(F64)
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight.astype(F64)


def silu_mul(gate_up: np.ndarray) -> np.ndarray:
    gate, up = np.split(gate_up.astype(F64), 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


def hadamard_matrix(size: int) -> np.ndarray:
    """Sylvester's matrix: 1, or -1 where the numbers of row and column have an odd number of common bits."""
    return np.array([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])


def rotate_groups(x: np.ndarray, group_size: int, num_outliers: int) -> np.ndarray:
    """Each group of the body times Sylvester's matrix; the outliers as they are."""
    out, matrix = x.astype(F64), hadamard_matrix(group_size)
    for start in range(0, x.shape[1] - num_outliers, group_size):
        out[:, start : start + group_size] = x[:, start : start + group_size].astype(F64) @ matrix
    return out


def rope_table(positions: np.ndarray, head_dim: int, theta: float = 1e4) -> tuple[np.ndarray, np.ndarray]:
    """Float32 cos and sin, [*positions, head_dim / 2]."""
    angles = positions[..., None] * theta ** (-np.arange(head_dim // 2) * 2 / head_dim)
    return np.cos(angles).astype(F32), np.sin(angles).astype(F32)


def rope(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Rotates the pair (i, i + head_dim/2) of the last axis by the angle of row i of the table."""
    first, second = np.split(x.astype(F64), 2, axis=-1)
    cos, sin = cos.astype(F64), sin.astype(F64)
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def quantize_kv(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Asymmetric uint4 over the last axis: integers, float16 scale and zero point.

    DESIGN's formula with the range extended to zero, as the op documents (a vector of one sign would be cut
    otherwise), and the integers computed with the scale as stored.
    """
    x = x.astype(F32)
    low, high = np.minimum(x.min(-1), F32(0)), np.maximum(x.max(-1), F32(0))
    scale = np.minimum(np.maximum(high - low, F32(1e-5)) * F32(1 / 15), F32(65504)).astype(np.float16)
    inverse = F32(1) / scale.astype(F32)
    zero = np.clip(np.rint(-low * inverse), 0, 15)
    q = np.clip(np.rint(x * inverse[..., None]) + zero[..., None], 0, 15)
    return q.astype(np.uint8), scale, zero.astype(np.float16)


class Cache(NamedTuple):
    """Page arrays by name; INT4 pages are kept unpacked, [layers, pages, kv_heads, page_size, head_dim].

    Scales are [layers, pages, kv_heads, rows, page_size]: the scale of each of a head's equal parts (one or
    two), then their zero points.
    """

    k: np.ndarray
    v: np.ndarray
    k_scales: np.ndarray | None
    v_scales: np.ndarray | None
    block_tables: np.ndarray
    kv_rope: str

    @property
    def page_size(self) -> int:
        return self.k.shape[3]

    def packed(self) -> tuple[np.ndarray, np.ndarray]:
        """Pages as the op stores them: one packing tile a head."""
        if self.k_scales is None:
            return self.k, self.v
        return pack(self.k, self.k.shape[-1]), pack(self.v, self.v.shape[-1])

    def read(self, name: str, layer: int, sequence: int, head: int, position: int) -> np.ndarray:
        """One key or value of one token as floats, found through the block table."""
        pages, scales = (self.k, self.k_scales) if name == "k" else (self.v, self.v_scales)
        page, offset = self.block_tables[sequence, position // self.page_size], position % self.page_size
        row = pages[layer, page, head, offset].astype(F64)
        if scales is None:
            return row
        scale, zero = np.split(scales[layer, page, head, :, offset].astype(F64), 2)
        parts = zip(np.split(row, len(scale)), scale, zero, strict=True)
        return np.concatenate([(part - z) * s for part, s, z in parts])


def slots(block_tables: np.ndarray, page_size: int, positions: np.ndarray) -> np.ndarray:
    """Slot of every token; -1 for padding and for positions the table does not reach."""
    out = np.full(positions.shape, -1)
    for b, s in np.ndindex(*positions.shape):
        if 0 <= positions[b, s] < block_tables.shape[1] * page_size:
            block, offset = divmod(int(positions[b, s]), page_size)
            out[b, s] = block_tables[b, block] * page_size + offset
    return out.reshape(-1)


def split_heads(
    qkv: np.ndarray,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[np.ndarray, np.ndarray, float] | None,
    cos: np.ndarray,
    sin: np.ndarray,
    kv_rope: str,
    k_mean: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rotated queries, the keys as the cache stores them, values: float64, [tokens, heads, head_dim].

    With a mean, keys are rounded to the type of ``qkv`` before it comes off, as the op documents.
    """
    heads = qkv.astype(F64).reshape(len(qkv), num_heads + 2 * num_kv_heads, -1)
    q, k, v = np.split(heads, [num_heads, num_heads + num_kv_heads], axis=1)
    if norms is not None:
        q, k = rms_norm(q, norms[0], norms[2]), rms_norm(k, norms[1], norms[2])
    cos, sin = cos[:, None], sin[:, None]
    k = rope(k, cos, sin) if kv_rope == "post" else k
    if k_mean is not None:
        k = k.astype(qkv.dtype).astype(F64) - k_mean.astype(F64)
    return rope(q, cos, sin), k, v


def store(cache: Cache, k: np.ndarray, v: np.ndarray, layer: int, slots: np.ndarray) -> Cache:
    """The cache with keys and values [tokens, kv_heads, head_dim] written, those of negative slots not."""
    new = cache._replace(
        **{name: array.copy() for name, array in cache._asdict().items() if isinstance(array, np.ndarray)}
    )
    for token, slot in enumerate(slots):
        if slot < 0:
            continue
        page, offset = divmod(int(slot), cache.page_size)
        for head in range(k.shape[1]):
            for pages, scales, x in ((new.k, new.k_scales, k), (new.v, new.v_scales, v)):
                if scales is None:
                    pages[layer, page, head, offset] = x[token, head].astype(F32).astype(pages.dtype)
                else:
                    parts = np.split(x[token, head], scales.shape[3] // 2)
                    q, scale, zero = zip(*map(quantize_kv, parts), strict=True)
                    pages[layer, page, head, offset] = np.concatenate(q)
                    scales[layer, page, head, :, offset] = *scale, *zero
    return new


def attention(
    q: np.ndarray,
    cache: Cache,
    layer: int,
    positions: np.ndarray,
    theta: float = 1e4,
    window: int | None = None,
) -> np.ndarray:
    """Each query [batch, seq, heads, head_dim] against the keys at its own and earlier positions.

    With a window, against the last ``window`` of these keys.

    Rows of padding queries (negative positions) are left NaN: nothing may be compared to them.
    """
    q = q.astype(F64)
    batch, seq, num_heads, head_dim = q.shape
    out = np.full(q.shape, np.nan)
    repeat = num_heads // cache.k.shape[2]
    for b, kv_head in np.ndindex(batch, cache.k.shape[2]):
        length = int(positions[b].max()) + 1
        keys = [cache.read("k", layer, b, kv_head, t) for t in range(length)]
        values = [cache.read("v", layer, b, kv_head, t) for t in range(length)]
        if cache.kv_rope == "pre":
            keys = [rope(key, *rope_table(np.asarray(t), head_dim, theta)) for t, key in enumerate(keys)]
        for s, head in np.ndindex(seq, num_heads):
            visible = int(positions[b, s]) + 1
            if visible <= 0 or head // repeat != kv_head:
                continue
            seen = slice(0 if window is None else max(visible - window, 0), visible)
            scores = np.array(keys[seen]) @ q[b, s, head] / np.sqrt(head_dim)
            weights = np.exp(scores - scores.max())
            out[b, s, head] = weights @ np.array(values[seen]) / weights.sum()
    return out
