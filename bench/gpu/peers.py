"""The best alternatives to each op, in XLA and in torch, on bfloat16 and INT8: what a user would run instead.

A peer computes the same as the case, on its own random inputs of the same sizes, which are not in the GPU's
cache either:

* ``grouped_matmul``: cuBLAS in bfloat16, called by XLA and by torch, and ``torch._int_mm`` on INT8 (which
  takes more than 16 rows and multiples of 8). These multiply by weights that are 4 and 2 times larger.
* ``paged_attention``: attention on contiguous bfloat16 keys and values, by cuDNN (``jax.nn``) and by torch.
* ``prefill_attention``: the same; cuDNN's causal mask would start at the first key, so it attends to all of
  them, which are up to a seventh more pairs. torch masks.
* the others: the reference, compiled by XLA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench.gpu.timing import Program, jax_program, make_sets, num_sets
from pallas_kernels import use_implementation
from pallas_kernels.verification.cases import Case


class Peer(NamedTuple):
    """An alternative; ``program`` builds its inputs and compiles it."""

    name: str
    program: Callable[[], Program]


class Attention(NamedTuple):
    """Shapes of one attention on contiguous keys and values."""

    batch: int
    seq: int
    heads: int
    head_dim: int
    kv_heads: int
    keys: int

    @property
    def bytes(self) -> int:
        """Bytes of queries, keys, values and outputs in bfloat16."""
        return 2 * 2 * self.batch * self.head_dim * (self.seq * self.heads + self.keys * self.kv_heads)


MATMUL_BF16 = ("XLA bf16", "torch bf16")
ATTENTION_BF16 = ("cuDNN bf16", "torch SDPA bf16")


def peers(case: Case, torch: ModuleType | None) -> Iterator[Peer]:
    """The peers of ``case``; only those in XLA if ``torch`` is None."""
    if case.op == "grouped_matmul":
        x, w = case.abstract_inputs
        m, (n, k) = x.body.shape[0], w.shape
        yield Peer("XLA bf16", lambda: _xla_matmul(m, n, k))
        if torch is not None:
            yield Peer("torch bf16", lambda: _torch_matmul(torch, m, n, k))
            if m > 16 and all(size % 8 == 0 for size in (m, n, k)):
                yield Peer("torch INT8", lambda: _torch_int8_matmul(torch, m, n, k))
    elif case.op in ("paged_attention", "prefill_attention"):
        q, cache, *_ = case.abstract_inputs
        batch, seq, heads, head_dim = q.shape
        shape = Attention(batch, seq, heads, head_dim, cache.num_kv_heads, cache.max_length)
        yield Peer("cuDNN bf16", lambda: _xla_attention(shape))
        if torch is not None:
            yield Peer("torch SDPA bf16", lambda: _torch_attention(torch, shape))
    else:
        yield Peer("XLA reference", lambda: _reference(case))


def _normal(key: jax.Array, *shapes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(key, len(shapes))
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True))


def _xla_matmul(m: int, n: int, k: int) -> Program:
    count = num_sets(2 * (m * k + n * k + m * n))
    sets = make_sets(lambda key: _normal(key, (m, k), (n, k)), count)
    return jax_program(lambda x, w: jnp.dot(x, w.T), sets)


def _xla_attention(shape: Attention) -> Program:
    queries = (shape.batch, shape.seq, shape.heads, shape.head_dim)
    cached = (shape.batch, shape.keys, shape.kv_heads, shape.head_dim)
    sets = make_sets(lambda key: _normal(key, queries, cached, cached), num_sets(shape.bytes))
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    attend = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, implementation=implementation)  # noqa: E731
    return jax_program(attend, sets)


def _reference(case: Case) -> Program:
    with use_implementation("reference"):
        sets = make_sets(case.inputs, num_sets(case.cost.bytes))
        return jax_program(case.function, sets, together=False)


def _torch_program(torch: Any, call: Callable[..., Any], sets: Sequence[tuple[Any, ...]]) -> Program:
    def launch() -> None:
        with torch.inference_mode():
            for arguments in sets:
                call(*arguments)

    def wait(_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return Program(launch, wait, len(sets))


def _torch_device(torch: Any) -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _torch_sets(
    torch: Any, bytes_per_call: int, *shapes: tuple[int, ...], dtype: Any = None
) -> list[tuple[Any, ...]]:
    def make(shape: tuple[int, ...]) -> Any:
        if dtype is not None:
            return torch.randint(-127, 128, shape, dtype=dtype, device=_torch_device(torch))
        return torch.randn(shape, dtype=torch.bfloat16, device=_torch_device(torch))

    return [tuple(make(shape) for shape in shapes) for _ in range(num_sets(bytes_per_call))]


def _torch_matmul(torch: Any, m: int, n: int, k: int) -> Program:
    sets = _torch_sets(torch, 2 * (m * k + n * k + m * n), (m, k), (n, k))
    return _torch_program(torch, lambda x, w: torch.mm(x, w.T), sets)


def _torch_int8_matmul(torch: Any, m: int, n: int, k: int) -> Program:
    sets = _torch_sets(torch, m * k + n * k + 4 * m * n, (m, k), (n, k), dtype=torch.int8)
    return _torch_program(torch, lambda x, w: torch._int_mm(x, w.T), sets)


def _torch_attention(torch: Any, shape: Attention) -> Program:
    from torch.nn.attention.bias import causal_lower_right

    queries = (shape.batch, shape.heads, shape.seq, shape.head_dim)
    cached = (shape.batch, shape.kv_heads, shape.keys, shape.head_dim)
    sets = _torch_sets(torch, shape.bytes, queries, cached, cached)
    mask = causal_lower_right(shape.seq, shape.keys) if shape.seq > 1 else None

    def attend(q: Any, k: Any, v: Any) -> Any:
        attention = torch.nn.functional.scaled_dot_product_attention
        return attention(q, k, v, attn_mask=mask, enable_gqa=shape.heads != shape.kv_heads)

    return _torch_program(torch, attend, sets)
