"""No native kernel reads or writes outside of its buffers, at their start and at their end.

Each op is called once as usual, and the kernel call that it makes is then repeated with guard pages around
every buffer, where a fault ends the process.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    ActivationFormat,
    PagedKVCache,
    float_matmul,
    grouped_matmul,
    kv_append,
    norm_quantize,
    paged_attention,
    quantize,
    silu_quantize,
    two_level_matmul,
    use_implementation,
    weight_only_matmul,
)
from pallas_kernels.native.instruction_sets import available
from pallas_kernels.qarrays import LayerOf
from tests.pallas_kernels import bridge, oracle, test_grouped_matmul, test_int4_weights
from tests.pallas_kernels.native import call_frame, test_float_matmul
from tests.pallas_kernels.native.call_frame import KernelCall
from tests.pallas_kernels.native.test_quantize_rows import ROTATED_SHAPES, SHAPES, floats
from tests.pallas_kernels.test_ops import KERNELS

# A call of an op, whose arguments are there.
Run = Callable[[], Any]
HEAD_DIM, HEADS, KV_HEADS, LENGTHS = 64, 6, 2, [1, 33, 70]


def rows() -> Iterator[tuple[np.ndarray, ActivationFormat, jax.Array]]:
    """Rows, their format, and an order of channels with places that are not in the row."""
    for count, channels, group, outliers in SHAPES:
        order = np.random.default_rng(channels).integers(-2 * channels, 2 * channels, channels)
        fmt = ActivationFormat(group, outliers, 0.9)
        yield floats(count, channels), fmt, jnp.asarray(order, jnp.int32)


def quantize_runs() -> Iterator[Run]:
    for x, fmt, order in rows():
        for indices in (None, order):
            yield functools.partial(quantize, jnp.asarray(x), fmt, indices)


def norm_quantize_runs() -> Iterator[Run]:
    for x, fmt, order in rows():
        for residual in (None, jnp.asarray(x[::-1])):
            for indices in (None, order):
                options: dict[str, Any] = {"residual": residual, "indices": indices}
                weight = jnp.asarray(x[0])
                yield functools.partial(norm_quantize, jnp.asarray(x), weight, eps=1e-5, fmt=fmt, **options)


def silu_quantize_runs() -> Iterator[Run]:
    for x, fmt, _ in rows():
        yield functools.partial(silu_quantize, jnp.concatenate([x, x[:, ::-1]], 1), fmt)
    for count, channels, group, outliers in ROTATED_SHAPES:
        gate_up, fmt = jnp.asarray(floats(count, 2 * channels)), ActivationFormat(group, outliers, 0.9)
        yield functools.partial(silu_quantize, gate_up, fmt, rotate=True)


def matmul_runs(matmul: Callable[..., Any], x: Any, w: Any, m: int, n: int) -> Iterator[Run]:
    """Plain; with what can be added; and with the first and the last layer of a stack."""
    bias, residual = jnp.ones(n), jnp.ones((m, n))
    stack = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), w)
    for weight in (w, LayerOf(stack, jnp.int32(0)), LayerOf(stack, jnp.int32(2))):
        yield functools.partial(matmul, x, weight, out_dtype=jnp.float32)
    yield functools.partial(matmul, x, w, bias=bias, residual=residual, out_dtype=jnp.float32)


def float_matmul_runs() -> Iterator[Run]:
    for m, n, k in test_float_matmul.CASES:
        for dtype in (jnp.float32, jnp.bfloat16):
            x, w = test_float_matmul.operands(m, n, k, dtype)
            yield from matmul_runs(float_matmul, x, w, m, n)


def grouped_matmul_runs() -> Iterator[Run]:
    for m, n, k, group, outliers in test_grouped_matmul.CASES:
        if m * k < 60_000:  # the others have no other borders
            rng = np.random.default_rng(m + n + k)
            x, w = (bridge.random_quantized(rng, count, k, group, outliers) for count in (m, n))
            yield from matmul_runs(grouped_matmul, bridge.activation(x), bridge.weight(w), m, n)


def two_level_matmul_runs() -> Iterator[Run]:
    for m, n, k, group in test_int4_weights.CASES:
        rng = np.random.default_rng(m + n + k)
        x = bridge.activation(bridge.random_quantized(rng, m, k, 0, k))
        w = bridge.two_level(bridge.random_int4(rng, n, k, group, two_level=True))
        yield from matmul_runs(two_level_matmul, x, w, m, n)


def weight_only_matmul_runs() -> Iterator[Run]:
    for m, n, k, group in test_int4_weights.CASES:
        rng = np.random.default_rng(m + n + k)
        w = bridge.weight_only(bridge.random_int4(rng, n, k, group))
        yield from matmul_runs(weight_only_matmul, jnp.asarray(floats(m, k)), w, m, n)


def caches() -> Iterator[tuple[np.random.Generator, PagedKVCache]]:
    """Caches of which every page is used, the last one too."""
    for dtype, kv_rope in (("int4x2", "post"), ("int4", "pre"), ("float32", "pre"), ("bfloat16", "post")):
        for page_size in (1, 5, 16, 64):
            rng = np.random.default_rng(page_size)
            pages = sum(-(-length // page_size) for length in LENGTHS)
            tables = bridge.block_tables(rng, LENGTHS, -(-max(LENGTHS) // page_size), page_size, pages)
            shape = {"kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "page_size": page_size, "pages": pages}
            yield rng, bridge.cache(bridge.random_cache(rng, tables, kv_rope=kv_rope, dtype=dtype, **shape))


def attention_runs(seq: int) -> Iterator[Run]:
    """The last ``seq`` tokens of sequences, some of which have fewer: negative positions are padding."""
    for rng, cache in caches():
        tokens = [list(range(max(length - seq, 0), length)) for length in LENGTHS]
        positions = np.array([row + [-1] * (seq - len(row)) for row in tokens], np.int32)
        q = jnp.asarray(rng.normal(size=(len(LENGTHS), seq, HEADS, HEAD_DIM)), jnp.float32)
        key_rope = None
        if cache.kv_rope == "pre":
            key_rope = tuple(map(jnp.asarray, oracle.rope_table(np.arange(cache.max_length), HEAD_DIM)))
        for window in (None, jnp.int32(20)):
            options: dict[str, Any] = {"key_rope": key_rope, "window": window}
            layer, where = jnp.int32(1), jnp.asarray(positions)
            yield functools.partial(paged_attention, q, cache, layer=layer, positions=where, **options)


def kv_append_runs() -> Iterator[Run]:
    """Into the first and the last slot, and into slots that do not exist."""
    for rng, cache in caches():
        end = cache.k_pages.shape[1] * cache.page_size
        slots = jnp.asarray([0, end - 1, -1, end, end // 2, -end, 2**31 - 1, *range(1, 20)], jnp.int32)
        cos, sin = jnp.asarray(rng.normal(size=(2, len(slots), HEAD_DIM // 2)), jnp.float32)
        qkv = jnp.asarray(rng.normal(size=(len(slots), (HEADS + 2 * KV_HEADS) * HEAD_DIM)), jnp.float32)
        norm, mean = jnp.ones(HEAD_DIM), jnp.ones((KV_HEADS, HEAD_DIM))
        every: dict[str, Any] = {"q_norm": norm, "k_norm": norm}
        if cache.quantized and cache.kv_rope == "post":
            every["k_mean"] = mean
        for layer in (0, 1, -1, 2):
            for options in ({}, every):
                numbers: dict[str, Any] = {"layer": jnp.int32(layer), "slots": slots, "num_heads": HEADS}
                yield functools.partial(kv_append, qkv, cache, cos=cos, sin=sin, **numbers, **options)


RUNS: dict[str, Callable[[], Iterator[Run]]] = {
    "float_matmul": float_matmul_runs,
    "grouped_matmul": grouped_matmul_runs,
    "kv_append": kv_append_runs,
    "norm_quantize": norm_quantize_runs,
    "paged_attention": lambda: attention_runs(1),
    "prefill_attention": lambda: attention_runs(30),
    "quantize": quantize_runs,
    "silu_quantize": silu_quantize_runs,
    "two_level_matmul": two_level_matmul_runs,
    "weight_only_matmul": weight_only_matmul_runs,
}


@functools.cache
def kernel_calls(op: str) -> list[KernelCall]:
    """The kernel calls of an op, made by XLA."""
    with use_implementation("native_cpu"):
        return [call_frame.record(run) for run in RUNS[op]()]


def test_every_native_op_is_here():
    assert set(RUNS) == {op for op, name in KERNELS if name == "native_cpu"}


@pytest.mark.parametrize("at_end", [False, True], ids=["start", "end"])
@pytest.mark.parametrize("instructions", available())
@pytest.mark.parametrize("op", RUNS)
def test_nothing_outside_of_the_buffers_is_touched(op: str, instructions: str, at_end: bool):
    """Every byte of the results is written, too: they are those of XLA's call on the best instruction set."""
    calls = kernel_calls(op)
    assert calls
    for call in calls:
        found = call_frame.call(call, instructions, at_end=at_end)
        for actual, expected in zip(found, call.results, strict=True):
            assert actual.dtype == expected.dtype
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("op", RUNS)
def test_any_order_of_threads_gives_the_same(op: str):
    """Tasks that run at once, beside the caller, and after the kernel has returned."""
    call = max(kernel_calls(op), key=lambda call: call.sizes[0])
    assert call.sizes[0] > 1  # blocks
    late: list[call_frame.Task] = []
    for pool in (call_frame.inline, call_frame.on_a_thread, late.append):
        for num_threads in (1, 2, 100):  # 100 are more than there are blocks
            found = call_frame.call(call, available()[0], pool=pool, num_threads=num_threads)
            for actual, expected in zip(found, call.results, strict=True):
                np.testing.assert_array_equal(actual, expected)
    assert len(late) == 1 + min(100, call.sizes[0]) - 1
    for task in late:  # they find nothing to do, and the last one frees the memory of the job
        task()


@pytest.mark.parametrize("at_end", [False, True], ids=["start", "end"])
@pytest.mark.parametrize("what", ["read", "write"])
def test_the_guard_pages_are_seen(what: str, at_end: bool):
    """A read or a write one byte outside of a buffer ends the process; one inside does not."""
    script = f"""if True:
        import ctypes
        import numpy as np
        from tests.pallas_kernels.native.call_frame import Guarded
        guarded = Guarded(np.zeros(5, np.int8), at_end={at_end})
        for place in (0, 4, {5 if at_end else -1}):
            print("place", place, flush=True)
            byte = ctypes.c_char.from_address(guarded.address + place)
            if "{what}" == "read":
                byte.value
            else:
                byte.value = b"x"
    """
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.stdout.split("place")[1:] == [" 0\n", " 4\n", f" {5 if at_end else -1}\n"]
    assert ended.returncode == -signal.SIGSEGV
