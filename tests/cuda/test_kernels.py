"""Every kernel against the reference at the shapes of Llama-3-8B, on fresh random inputs."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.verification import cases, compare, execute
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.shapes import MODELS
from tests.cuda import support

MODEL = "Llama-3-8B"


def selected() -> Iterator[Case]:
    """Every op, decode and prefill."""
    for rows in (16, 4096, 1):
        yield from (cases.matmul(MODEL, linear, rows) for linear in MODELS[MODEL].linears)
        yield cases.matmul(MODEL, "down_proj", rows, bits=8)
    for batch, kv_bits in ((128, 4), (16, 4), (1, 4), (128, 16)):
        yield cases.attention(MODEL, batch, 1, 2048, kv_bits)
    yield cases.attention(MODEL, 1, 512, 2048)
    for rows in (4096, 16, 1):
        yield from (cases.norm(MODEL, rows), cases.attention_output(MODEL, rows))
        yield from (cases.silu(MODEL, rows, rotate=rotate) for rotate in (True, False))
        yield cases.append(MODEL, rows)
    yield cases.append(MODEL, 128, kv_bits=16)
    yield from (cases.matmul(MODEL, "qkv_proj", rows) for rows in (64, 128, 256))


CASES = list(selected())


@pytest.mark.parametrize("case", CASES, ids=[case.name.replace(" ", "-") for case in CASES])
def test_kernel_equals_the_reference(case: Case):
    support.check_case(case)


@pytest.mark.parametrize(("linear", "rows"), [("qkv_proj", 16), ("o_proj", 256)])
def test_stacked_weights_in_a_scan(linear: str, rows: int):
    """As the model calls it: layers' weights in one array, of which the kernel reads a slice."""
    case, layers = cases.matmul(MODEL, linear, rows), 3

    def inputs(key):
        x, _ = case.inputs(key)
        return x, jax.vmap(lambda key: case.inputs(key)[1])(jax.random.split(key, layers))

    def call(x, stacked):
        return jax.lax.scan(lambda _, weight: (None, case.function(x, weight)), None, stacked)[1]

    support.check_case(Case(case.op, case.model, f"{case.shape} in a scan", call, inputs))


def test_cache_carried_through_a_scan():
    """As the model calls them: both layers append to one cache, updated in place, and attend to it."""
    layer, batch, length = MODELS[MODEL], 16, 256
    append = cases.append(MODEL, batch)

    def inputs(key):
        first, second = jax.random.split(key)
        qkv, _, _, _, cos, sin, *_ = append.inputs(first)
        cache = cases.random_cache(second, layer, batch, length, 4)
        return qkv, cache, jnp.full((batch, 1), length - 1, jnp.int32), cos, sin

    def call(qkv, cache, positions, cos, sin):
        attend = cases.attention(MODEL, batch, 1, length).function

        def body(cache, index):
            slots = cache.slots(positions)
            q, cache = append.function(qkv, cache, index, slots, cos, sin, None, None, None)
            return cache, attend(q[:, None], cache, index, positions)

        cache, outputs = jax.lax.scan(body, cache, jnp.arange(2, dtype=jnp.int32))
        return outputs, cache

    case = Case("paged_attention", MODEL, "append and attend in a scan", call, inputs, donated=(1,))
    given = execute.inputs_of(case, support.key_of(case.name))
    expected, expected_cache = execute.reference_on_cpu(case, given)
    execute.poison((expected, expected_cache))
    actual, cache = execute.compiled(case, support.KERNELS)(*given)
    compare.close(actual, expected, compare.DECODE_INT4)
    compare.same_bits(cache.v_pages, expected_cache.v_pages)
    # A key of a layer may have rounded differently (see compare.few_keys_differ).
    changed = (cache.k_pages != expected_cache.k_pages).sum()
    assert int(changed) <= 2 * batch * layer.num_kv_heads * layer.head_dim // 2 // 100
