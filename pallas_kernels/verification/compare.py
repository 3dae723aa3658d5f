"""How far a kernel's result may be from the reference's, and how they are compared.

The reference runs on the same GPU with float32 products (XLA's default there is TF32). Nothing here needs a
GPU; tests/bench checks the comparisons themselves on a CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from pallas_kernels.qarrays import PagedKVCache, QuantizedActivation
from pallas_kernels.verification.cases import Case

# Relative norm of the difference. Both sides accumulate in float32 and round the result to bfloat16, by at
# most 2**-9 = 2e-3 and 1.1e-3 in the mean. Sums in another order differ by 1e-6, which moves one output in
# some thousands to the next bfloat16: 1e-4 in norm.
MATMUL = 1e-3
# The queries are rotated in float32, with operations in another order: as above.
QUERIES = 1e-3
# The kernel multiplies INT4 values with weights rounded to float16 (5e-4) and both sides round the output.
DECODE_INT4 = 5e-3
# Both sides multiply bfloat16 pages with weights that are rounded to bfloat16, relative to maxima of their
# own.
DECODE_BF16 = 8e-3
# Prefill rounds the dequantized keys and values, and the weights, to bfloat16: 2e-3 each, and the output.
PREFILL = 1.2e-2
# Relative error of scales of the results of a square root or an exponential: some units in the last place.
SCALES = 3e-6
# Share of integers that may be off by one. With such scales, x / scale is so near to a half that it is
# rounded to the other side for at most 2 * 127 * 3e-6 of the INT8 values (a few hundredths of all values) and
# 2 * 8 * 3e-6 of the INT4 values.
OFF_BY_ONE = 2e-4


def require(condition: bool | Array, message: str) -> None:
    """Raises AssertionError with ``message``; unlike an assert statement also where Python optimizes (-O)."""
    if not condition:
        raise AssertionError(message)


def check_result(case: Case, inputs: tuple[PyTree, ...], actual: PyTree, expected: PyTree) -> None:
    """Asserts that ``actual`` is as near to ``expected`` as it must be for the op of ``case``."""
    same_structure(actual, expected)
    match case.op:
        case "grouped_matmul":
            close(actual, expected, MATMUL)
        case "quantize":  # both sides quantize the same floats: all integers must be equal
            same_bits(actual, expected)
        case "norm_quantize" | "silu_quantize":
            if isinstance(actual, tuple):  # with the residual stream: a sum that is rounded once
                (actual, stream), (expected, expected_stream) = actual, expected
                same_bits(stream, expected_stream)
            nearly_same_activation(actual, expected)
        case "kv_append":
            check_append(inputs, actual, expected)
        case "paged_attention":
            close(actual, expected, DECODE_INT4 if inputs[1].quantized else DECODE_BF16)
        case "prefill_attention":
            close(actual, expected, PREFILL)
        case _:
            raise ValueError(f"no comparison for {case.op}")


def bits(x: Array) -> np.ndarray:
    """The bytes of ``x``: NaN equals itself."""
    return np.asarray(x).reshape(-1).view(np.uint8)


def same_structure(actual: PyTree, expected: PyTree) -> None:
    """Both have the same pytree structure, shapes and types."""
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, str(x.dtype)), tree)  # noqa: E731
    found, wanted = describe(actual), describe(expected)
    require(found == wanted, f"the result is {found}, not {wanted}")


def same_bits(actual: PyTree, expected: PyTree) -> None:
    """Every array of two pytrees is the same, bit for bit."""
    for first, second in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(bits(first), bits(second))


def relative_norm(actual: Array, expected: Array) -> float:
    """||actual - expected|| / ||expected|| in float32; NaN where either has one."""
    a, e = actual.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm((a - e).reshape(-1)) / jnp.linalg.norm(e.reshape(-1)))


def close(actual: Array, expected: Array, tolerance: float) -> None:
    """Relative norm below ``tolerance``, and no single element far off: a norm over millions hides one.

    The allowed error of an element grows with the norm of its row (the last axis), if that is larger than the
    average: a query that sees few keys has outputs, and errors, many times as large as one that averages
    thousands.
    """
    infinite = int((~jnp.isfinite(actual)).sum())
    require(infinite == 0, f"{infinite} elements are not finite")
    error = relative_norm(actual, expected)
    require(error < tolerance, f"relative norm of the error {error:.2e}, allowed {tolerance:.0e}")
    a, e = actual.astype(jnp.float32), expected.astype(jnp.float32)
    rms = jnp.sqrt(jnp.maximum(jnp.mean(jnp.square(e)), jnp.mean(jnp.square(e), axis=-1, keepdims=True)))
    # Normally distributed errors stay within 8 standard deviations; 2**-7 is two units in the last place.
    allowed = 8 * tolerance * rms + 2**-7 * jnp.abs(e)
    wrong = jnp.abs(a - e) > allowed
    count = int(wrong.sum())
    where = tuple(int(i) for i in np.unravel_index(int(jnp.argmax(jnp.abs(a - e) - allowed)), a.shape))
    require(count == 0, f"{count} elements far off, e.g. {where} {float(a[where])}, not {float(e[where])}")


def few_off_by_one(actual: Array, expected: Array) -> None:
    """Integers are equal, except for a share of OFF_BY_ONE that are off by one."""
    difference = jnp.abs(actual.astype(jnp.int32) - expected.astype(jnp.int32))
    largest, count = int(difference.max(initial=0)), int((difference > 0).sum())
    require(largest <= 1, f"{int((difference > 1).sum())} integers off by up to {largest}")
    allowed = max(3, OFF_BY_ONE * difference.size)
    require(count <= allowed, f"{count} of {difference.size} integers differ")


def nearly_same_activation(actual: QuantizedActivation, expected: QuantizedActivation) -> None:
    """All integers except a few are equal, and all scales except for some units in the last place."""
    np.testing.assert_allclose(actual.scales, expected.scales, rtol=SCALES)
    few_off_by_one(actual.body, expected.body)
    few_off_by_one(actual.outliers, expected.outliers)


def check_append(inputs: tuple[PyTree, ...], actual: PyTree, expected: PyTree) -> None:
    """Compares the queries, the parts of pages that must not change, and the parts that were written."""
    _, before, layer, slots, *_ = inputs
    (q, cache), (expected_q, expected_cache) = actual, expected
    close(q, expected_q, QUERIES)
    np.testing.assert_array_equal(cache.block_tables, before.block_tables)
    pages, offsets = slots // before.page_size, slots % before.page_size
    for name in ("k_pages", "v_pages", "k_scales", "v_scales"):
        old, new, wanted = (getattr(c, name) for c in (before, cache, expected_cache))
        if old is None:
            continue
        # Tokens of a page are its last axis in scales, the one before in pages.
        new, wanted, old = (x if name.endswith("scales") else x.swapaxes(-1, -2) for x in (new, wanted, old))
        untouched = jnp.ones(old.shape, bool).at[layer, pages, :, :, offsets].set(False)
        kept, given = (bits(jnp.where(untouched, x, 0)) for x in (new, old))
        np.testing.assert_array_equal(kept, given, err_msg=f"untouched {name}")
        written, wanted = (x[layer, pages, :, :, offsets] for x in (new, wanted))
        check_written(name, written, wanted, before)


def check_written(name: str, written: Array, wanted: Array, cache: PagedKVCache) -> None:
    """What was stored for the new tokens [tokens, heads, rows].

    Values are quantized from the same floats and must be equal bit for bit. Keys are results of RoPE and, in
    some models, of a norm.
    """
    if name.startswith("v"):
        same_bits(written, wanted)
    elif not cache.quantized:
        close(written, wanted, QUERIES)
    elif name == "k_pages":
        for nibbles in (lambda x: x & 15, lambda x: x >> 4):
            few_keys_differ(nibbles(written), nibbles(wanted), off_by=1)
    else:
        scales, zeros = jnp.split(written, 2, axis=-1)
        wanted_scales, wanted_zeros = jnp.split(wanted, 2, axis=-1)
        few_keys_differ(zeros, wanted_zeros, off_by=1)
        few_keys_differ(scales, wanted_scales, off_by=2**-7 * wanted_scales)


def few_keys_differ(actual: Array, expected: Array, off_by: float | Array) -> None:
    """All are equal, except for 1 in 100 that differ by at most ``off_by``.

    The compiler may contract the operations of RoPE differently: float32 values differ in their last bit, and
    about one in 2**15 is rounded to another bfloat16, which is 2**-8 away. If that is the maximum or minimum
    of a group (1 group in 10,000), the group's scale changes as much, and with it 3 in 100 of its integers.
    """
    difference = jnp.abs(actual.astype(jnp.float32) - expected.astype(jnp.float32))
    require((difference <= off_by).all(), f"keys off by up to {float(difference.max())}")
    count = int((difference > 0).sum())
    require(count <= max(3, difference.size // 100), f"{count} of {difference.size} differ")
