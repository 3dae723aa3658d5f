"""K-quants and i-quants: blocks made by hand, and what ggml's block layouts say that they mean.

The decoders here read one value at a time, as the layouts are described in ggml-common.h; those of the
``gguf`` package, which the converter uses, are vectorized. The i-quants that look values up in a grid use its
first three entries, whose values are known.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from convert.sources import open_source
from tests.convert.tiny import save_gguf, tiny_config, tiny_tensors, to_gguf

Decoder = Callable[[bytes], list[float]]
ROWS, COLUMNS = 64, 256
NONLINEAR = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The first entries of the grids.
GRID2 = ((8,) * 8, (43, *(8,) * 7), (25, 25, *(8,) * 6))
GRID3_XXS = ((4,) * 4, (20, 4, 4, 4), (36, 4, 4, 4))
GRID3_S = ((1,) * 4, (3, 1, 1, 1), (5, 1, 1, 1))
GRID1 = ((-1,) * 8, (1, *(-1,) * 7), (0, 0, *(-1,) * 6))


def half(data: bytes) -> float:
    return struct.unpack("<e", data)[0]


def q2_k(block: bytes) -> list[float]:
    scales, qs, d, dmin = block[:16], block[16:80], half(block[80:82]), half(block[82:84])
    values = []
    for i in range(256):
        part, within = divmod(i, 128)
        shift, byte = 2 * (within // 32), qs[32 * part + within % 32]
        scale = scales[i // 16]
        values.append(d * (scale & 15) * (byte >> shift & 3) - dmin * (scale >> 4))
    return values


def q3_k(block: bytes) -> list[float]:
    mask, qs, packed, d = block[:32], block[32:96], block[96:108], half(block[108:110])
    values = []
    for i in range(256):
        part, within = divmod(i, 128)
        low = qs[32 * part + within % 32] >> 2 * (within // 32) & 3
        high = mask[i % 32] >> i // 32 & 1
        n = i // 16
        scale = packed[n] & 15 if n < 8 else packed[n - 8] >> 4
        scale |= (packed[8 + n % 4] >> 2 * (n // 4) & 3) << 4
        values.append(d * (scale - 32) * (low - (0 if high else 4)))
    return values


def scale_and_min(packed: bytes, n: int) -> tuple[int, int]:
    """Of Q4_K and Q5_K: eight pairs of 6 bits in 12 bytes."""
    if n < 4:
        return packed[n] & 63, packed[n + 4] & 63
    return (
        packed[n + 4] & 15 | packed[n - 4] >> 6 << 4,
        packed[n + 4] >> 4 | packed[n] >> 6 << 4,
    )


def q4_k(block: bytes) -> list[float]:
    d, dmin, packed, qs = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    values = []
    for i in range(256):
        scale, least = scale_and_min(packed, i // 32)
        value = qs[32 * (i // 64) + i % 32] >> (4 if i % 64 >= 32 else 0) & 15
        values.append(d * scale * value - dmin * least)
    return values


def q5_k(block: bytes) -> list[float]:
    d, dmin, packed, high, qs = half(block[:2]), half(block[2:4]), block[4:16], block[16:48], block[48:]
    values = []
    for i in range(256):
        scale, least = scale_and_min(packed, i // 32)
        value = qs[32 * (i // 64) + i % 32] >> (4 if i % 64 >= 32 else 0) & 15
        value += 16 * (high[i % 32] >> i // 32 & 1)
        values.append(d * scale * value - dmin * least)
    return values


def q6_k(block: bytes) -> list[float]:
    low, high, d = block[:128], block[128:192], half(block[208:210])
    scales = struct.unpack("16b", block[192:208])
    values = []
    for i in range(256):
        part, within = divmod(i, 128)
        quarter, l = divmod(within, 32)
        value = low[64 * part + l + 32 * (quarter % 2)] >> (4 if quarter >= 2 else 0) & 15
        value |= (high[32 * part + l] >> 2 * quarter & 3) << 4
        values.append(d * scales[i // 16] * (value - 32))
    return values


def iq4_nl(block: bytes) -> list[float]:
    d, qs = half(block[:2]), block[2:]
    return [d * NONLINEAR[qs[i % 16] >> (4 if i >= 16 else 0) & 15] for i in range(32)]


def iq4_xs(block: bytes) -> list[float]:
    d, high, low, qs = half(block[:2]), int.from_bytes(block[2:4], "little"), block[4:8], block[8:]
    values = []
    for i in range(256):
        n, within = divmod(i, 32)
        scale = low[n // 2] >> 4 * (n % 2) & 15 | (high >> 2 * n & 3) << 4
        value = NONLINEAR[qs[16 * n + within % 16] >> (4 if within >= 16 else 0) & 15]
        values.append(d * (scale - 32) * value)
    return values


def signed(values: tuple[int, ...], signs: int) -> list[int]:
    return [-value if signs >> i & 1 else value for i, value in enumerate(values)]


def with_parity(signs: int) -> int:
    """Seven signs; the eighth makes their number even."""
    return signs | (bin(signs).count("1") % 2) << 7


def iq2_xxs(block: bytes) -> list[float]:
    d, values = half(block[:2]), []
    for n in range(8):
        part = block[2 + 8 * n :][:8]
        packed = int.from_bytes(part[4:], "little")
        for l in range(4):
            entry = signed(GRID2[part[l]], with_parity(packed >> 7 * l & 127))
            values += [d * (0.5 + (packed >> 28)) * 0.25 * value for value in entry]
    return values


def iq2_xs(block: bytes) -> list[float]:
    d, qs, scales, values = half(block[:2]), struct.unpack("<32H", block[2:66]), block[66:], []
    for n, packed in enumerate(qs):
        scale = scales[n // 4] >> (4 if n % 4 >= 2 else 0) & 15
        entry = signed(GRID2[packed & 511], with_parity(packed >> 9))
        values += [d * (0.5 + scale) * 0.25 * value for value in entry]
    return values


def iq2_s(block: bytes) -> list[float]:
    d, qs, signs, high, scales = half(block[:2]), block[2:34], block[34:66], block[66:74], block[74:]
    values = []
    for n in range(32):
        index = qs[n] | (high[n // 4] >> 2 * (n % 4) & 3) << 8
        scale = scales[n // 4] >> (4 if n % 4 >= 2 else 0) & 15
        values += [d * (0.5 + scale) * 0.25 * value for value in signed(GRID2[index], signs[n])]
    return values


def iq3_xxs(block: bytes) -> list[float]:
    d, qs, values = half(block[:2]), block[2:66], []
    for n in range(8):
        packed = int.from_bytes(block[66 + 4 * n :][:4], "little")
        for l in range(4):
            entry = GRID3_XXS[qs[8 * n + 2 * l]] + GRID3_XXS[qs[8 * n + 2 * l + 1]]
            signs = with_parity(packed >> 7 * l & 127)
            values += [d * (0.5 + (packed >> 28)) * 0.5 * value for value in signed(entry, signs)]
    return values


def iq3_s(block: bytes) -> list[float]:
    d, qs, high, signs, scales = half(block[:2]), block[2:66], block[66:74], block[74:106], block[106:]
    values = []
    for n in range(32):
        scale = scales[n // 8] >> (4 if n % 8 >= 4 else 0) & 15
        indices = [qs[m] | (high[m // 8] >> m % 8 & 1) << 8 for m in (2 * n, 2 * n + 1)]
        entry = GRID3_S[indices[0]] + GRID3_S[indices[1]]
        values += [d * (1 + 2 * scale) * value for value in signed(entry, signs[n])]
    return values


def iq1_s(block: bytes) -> list[float]:
    d, qs, high, values = half(block[:2]), block[2:34], struct.unpack("<8H", block[34:]), []
    for n in range(32):
        packed = high[n // 4]
        index = qs[n] | (packed >> 3 * (n % 4) & 7) << 8
        shift = -0.125 if packed & 0x8000 else 0.125
        values += [d * (2 * (packed >> 12 & 7) + 1) * (value + shift) for value in GRID1[index]]
    return values


def iq1_m(block: bytes) -> list[float]:
    qs, high, scales = block[:32], block[32:48], struct.unpack("<4H", block[48:])
    d = half(struct.pack("<H", sum((scale >> 12) << 4 * n for n, scale in enumerate(scales))))
    values = []
    for n in range(32):
        nibble = high[n // 2] >> 4 * (n % 2) & 15
        scale = scales[n // 8] >> 3 * (n // 2 % 4) & 7
        shift = -0.125 if nibble & 8 else 0.125
        values += [d * (2 * scale + 1) * (value + shift) for value in GRID1[qs[n] | (nibble & 7) << 8]]
    return values


# For each type the places of its float16 scales, and of what must stay an index of the first grid entries.
DECODERS: dict[str, tuple[Decoder, tuple[int, ...], tuple[range, ...]]] = {
    "Q2_K": (q2_k, (80, 82), ()),
    "Q3_K": (q3_k, (108,), ()),
    "Q4_K": (q4_k, (0, 2), ()),
    "Q5_K": (q5_k, (0, 2), ()),
    "Q6_K": (q6_k, (208,), ()),
    "IQ4_NL": (iq4_nl, (0,), ()),
    "IQ4_XS": (iq4_xs, (0,), ()),
    "IQ2_XXS": (iq2_xxs, (0,), tuple(range(2 + 8 * n, 6 + 8 * n) for n in range(8))),
    "IQ2_XS": (iq2_xs, (0,), (range(2, 66, 2),)),
    "IQ2_S": (iq2_s, (0,), (range(2, 34),)),
    "IQ3_XXS": (iq3_xxs, (0,), (range(2, 66),)),
    "IQ3_S": (iq3_s, (0,), (range(2, 66),)),
    "IQ1_S": (iq1_s, (0,), (range(2, 34),)),
    "IQ1_M": (iq1_m, (), (range(32),)),
}


def blocks_of(kind: str) -> np.ndarray:
    """Blocks whose bits are random where they may be: [ROWS, bytes of COLUMNS values]."""
    rng = np.random.default_rng(0)
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (ROWS * COLUMNS // values, size), np.uint8)
    _, floats, indices = DECODERS[kind]
    for place in floats:
        scales = rng.uniform(0.001, 0.1, len(blocks)).astype("<f2")
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    for place in itertools.chain(*indices):
        blocks[:, place] = rng.integers(0, 3, len(blocks))
    high = {"IQ2_XS": range(3, 66, 2), "IQ2_S": range(66, 74), "IQ3_S": range(66, 74)}.get(kind, range(0))
    for place in high:  # the upper bits of the indices
        blocks[:, place] &= 0xFE if kind == "IQ2_XS" else 0
    if kind == "IQ1_S":
        blocks.view("<u2")[:, 17:] &= 0xF000
    if kind == "IQ1_M":
        blocks[:, 32:48] &= 0x88
        scales = rng.uniform(0.001, 0.1, len(blocks)).astype("<f2").view("<u2")
        words = blocks.view("<u2")[:, 24:]
        words &= 0x0FFF
        words |= (scales[:, None] >> np.arange(4, dtype=np.uint16) * 4 & 15) << 12
    return blocks.reshape(ROWS, -1)


@pytest.mark.parametrize("kind", DECODERS)
def test_blocks(kind: str, tmp_path: Path) -> None:
    name, config = "blk.0.ffn_down.weight", tiny_config(intermediate_size=COLUMNS)
    blocks = blocks_of(kind)
    renamed = to_gguf("llama", tiny_tensors(config), config) | {name: blocks}
    raw = {name: GGMLQuantizationType[kind]}
    path = save_gguf(tmp_path / "tiny.gguf", "llama", renamed, config, raw=raw)
    got = open_source(path).tensor("model.layers.0.mlp.down_proj.weight")
    size = GGML_QUANT_SIZES[raw[name]][1]
    data = blocks.tobytes()
    want = [value for at in range(0, len(data), size) for value in DECODERS[kind][0](data[at : at + size])]
    assert np.unique(got).size > 100
    np.testing.assert_allclose(got, np.reshape(want, (ROWS, COLUMNS)), rtol=1e-5, atol=1e-5)
