"""The calls by which a kernel is judged on a user's GPU: few, small ones first, in all forms of every op."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
from jaxtyping import Array, Key

from pallas_kernels.verification import cases, variants
from pallas_kernels.verification.cases import Case
from pallas_kernels.verification.shapes import TINY

Size = Literal["small", "real"]

_MODEL = "Llama-3-8B"


@dataclasses.dataclass(frozen=True)
class Check:
    """One call.

    Attributes:
      size: "small" is a few CTAs of a few thousand instructions, with fewer rows than a tile has; "real" is a
        layer of Llama-3-8B.
    """

    case: Case
    size: Size

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def op(self) -> str:
        return self.case.op

    @property
    def key(self) -> Key[Array, ""]:
        """Makes the inputs: the same in every run, so that a verdict can be repeated."""
        return jax.random.key(zlib.crc32(self.name.encode()))


def _small() -> Iterator[Case]:
    yield cases.norm(TINY, 5)
    yield variants.reordered_norm(3, 256)
    yield cases.attention_output(TINY, 5)
    yield variants.reordered(3, 256)
    for rotate in (False, True):
        yield cases.silu(TINY, 5, rotate=rotate)
    yield cases.matmul(TINY, "o_proj", 5)
    yield variants.epilogue(5, 192, 352, 32, 96)
    yield cases.matmul(TINY, "o_proj", 5, bits=8)
    for kv_bits in (4, 16):
        yield cases.append(TINY, 5, kv_bits)
    # Five pages, of which the last one is not full, are split over two CTAs; two pages are not split.
    yield cases.attention(TINY, 1, 1, 300, kv_bits=4)
    yield cases.attention(TINY, 1, 1, 100, kv_bits=16)
    for kv_bits in (4, 16):
        yield cases.attention(TINY, 1, 5, 100, kv_bits)
    yield variants.one_scale(TINY, 1, 5, 100, "pre")
    # The window begins in the middle of a page; pages before that page are not read.
    yield variants.windowed(TINY, 1, 1, 300, 100)
    yield variants.windowed(TINY, 1, 5, 200, 100)


def _real() -> Iterator[Case]:
    """Decode and prefill, for the ops in which they differ."""
    for bits in (4, 8):
        yield cases.matmul(_MODEL, "down_proj", 16, bits)
        yield cases.matmul(_MODEL, "qkv_proj", 512, bits)
    for kv_bits in (4, 16):
        yield cases.attention(_MODEL, 16, 1, 1000, kv_bits)
    yield cases.attention(_MODEL, 1, 512, 1000)
    yield cases.append(_MODEL, 64)
    yield cases.norm(_MODEL, 512)
    yield cases.attention_output(_MODEL, 512)
    yield cases.silu(_MODEL, 512)


@functools.cache
def all_checks() -> Mapping[str, Check]:
    """By name, in the order in which they run."""
    small = [Check(case, "small") for case in _small()]
    return {check.name: check for check in (*small, *(Check(case, "real") for case in _real()))}
