"""Tile sizes of the Hopper ``grouped_matmul`` and how they follow from the shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from pallas_kernels.mosaic import MAX_SMEM_BYTES, NUM_SMS
from pallas_kernels.qarrays import PACK_TILE

# Output channels of one warpgroup's wgmma, and bytes of each output channel's weights in one pipeline step.
WGMMA_CHANNELS = 64
STEP_BYTES = 64
# The number of warpgroups that there are registers for, by ``block_m``; 4 for others.
_MAX_WARPGROUPS = {64: 2, 128: 2}
_MAX_CANDIDATES = 12

# Bytes a clock, for ``_decode_clocks``. The rate of memory and the constants below are fitted to the times of
# 60 configurations of decode calls of Llama-3-8B on an H100 at 1.75 GHz. The rates of L2 and of an SM are
# estimates.
_MEMORY_BYTES = 1200
_L2_BYTES = 3300
_SM_BYTES = 40
# Clocks from the arrival of a step's data until its sum is done, for one warpgroup alone; and clocks more a
# token.
_STEP_LATENCY, _TOKEN_LATENCY = 180, 8
# Clocks of a CTA's launch, of its first bytes and of its epilogue. In a cluster, clocks of its start and of
# the exchange of partial sums, and bytes a clock of that exchange.
_CTA_CLOCKS = 4500
_EXCHANGE_CLOCKS = 1200
_EXCHANGE_BYTES = 20


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How one call is cut.

    Attributes:
      block_m: tokens of a CTA's output tile.
      warpgroups: consumer warpgroups of a CTA, each with ``WGMMA_CHANNELS`` output channels of its own.
      num_stages: pipeline steps in flight.
      split_k: CTAs of a cluster that compute one output tile, each for its part of the input channels.
      sharers: CTAs of a cluster with neighbouring output channels and the same tokens, which they load
        together.
    """

    block_m: int
    warpgroups: int
    num_stages: int
    split_k: int = 1
    sharers: int = 1

    @property
    def block_n(self) -> int:
        """Output channels of a CTA's output tile."""
        return self.warpgroups * WGMMA_CHANNELS

    @property
    def reduced_m(self) -> int:
        """Tokens of the output tile that one CTA finishes after the exchange; all of them if split_k is 1."""
        return max(8, self.block_m >> (self.split_k.bit_length() - 1))

    @property
    def stage_bytes(self) -> int:
        """Bytes of a pipeline step with groups of 128: weights and tokens, and a scale for each of them."""
        return self.block_n * (STEP_BYTES + 4) + self.block_m * (PACK_TILE + 4)

    @property
    def smem_bytes(self) -> int:
        """The most shared memory a CTA may need: groups of 32, and output and residual of different types."""
        scales = 3 * 4 * (self.block_n + self.block_m)
        output_and_residual = (2 + 4) * self.block_n * self.reduced_m
        exchanged = 4 * self.block_n * self.block_m if self.split_k > 1 else 0
        return self.num_stages * (self.stage_bytes + scales) + output_and_residual + exchanged + 4096


@functools.cache
def candidates(m: int, n: int, k: int, group_size: int) -> tuple[MatmulConfig, ...]:
    """What a sweep times for an activation [m, k] and a weight [n, k], the default first.

    For decode these are the cheapest by estimate; for prefill, those that are similar to the default.
    """
    block_m = _block_m(m, group_size)
    if m <= 128:
        return tuple(_decode_candidates(block_m, n, k)[:_MAX_CANDIDATES])
    near = [
        MatmulConfig(size, warpgroups, num_stages, sharers=sharers)
        for size in (block_m, block_m // 2)
        for warpgroups in _warpgroups(n, range(2, min(_MAX_WARPGROUPS.get(size, 4), 3) + 1))
        for num_stages in (4, 6)
        for sharers in (1, 2, 4)
        if -(-n // (warpgroups * WGMMA_CHANNELS)) % sharers == 0
    ]
    fitting = [config for config in near if config.smem_bytes <= MAX_SMEM_BYTES]
    return tuple(dict.fromkeys((_prefill_default(n, block_m), *fitting)))


def _warpgroups(n: int, sizes: Iterable[int]) -> list[int]:
    """``sizes``, each limited to the number of warpgroups that there are output channels for.

    One warpgroup more would do harm. With 64 output channels the compiler assumes that the index of a tile is
    that of the only tile: two warpgroups would write to it.
    """
    return sorted({min(size, n // WGMMA_CHANNELS) for size in sizes})


def _block_m(m: int, group_size: int) -> int:
    """Tokens of a CTA's output tile."""
    # With smaller groups there are more operands in registers, beside the accumulators.
    most = 128 if group_size == 128 else 64
    return next(size for size in (8, 16, 32, 64, 128) if min(m, most) <= size)


def _prefill_default(n: int, block_m: int) -> MatmulConfig:
    """The default where the tensor cores are the limit, as long as L2 is fast enough.

    With groups of 128 a step of a CTA is 512 clocks of wgmma (two warpgroups of 256) and about 830 issue
    slots a scheduler, 200 of them the producer's, and takes about 1,300 clocks on an H100. Two CTAs that
    multicast their tokens are a tenth faster than four, which wait for each other more often.
    """
    (warpgroups,) = _warpgroups(n, [2])
    column_tiles = -(-n // (warpgroups * WGMMA_CHANNELS))
    sharers = 2 if column_tiles % 2 == 0 else 1
    return MatmulConfig(block_m, warpgroups, num_stages=4, sharers=sharers)


def _decode_candidates(block_m: int, n: int, k: int) -> list[MatmulConfig]:
    """Configurations where loading the weights is the limit: all that fit into an SM, the cheapest first.

    ``sharers`` is 1: together with ``split_k`` it made every call slower that was tried on an H100.
    """
    # Of equally cheap ones the first is taken: 4 splits with 4 stages were timed most.
    found = [
        MatmulConfig(block_m, warpgroups, num_stages, split_k)
        for warpgroups in _warpgroups(n, [2, _MAX_WARPGROUPS.get(block_m, 4)])
        for num_stages in (4, 8)
        for split_k in (4, 3, 2, 1, 6, 8)
        if n % (warpgroups * WGMMA_CHANNELS) == 0 or split_k == 1
    ]
    fitting = [config for config in found if config.smem_bytes <= MAX_SMEM_BYTES]
    return sorted(fitting, key=lambda config: _decode_clocks(config, n, k))


def _decode_clocks(config: MatmulConfig, n: int, k: int) -> float:
    """Estimated duration of a decode call, in clocks."""
    ctas = -(-n // config.block_n) * config.split_k
    steps = -(-k // (PACK_TILE * config.split_k))
    # An SM has 64 Ki registers; a thread needs about 64, and 4 more for every 8 tokens.
    registers = 128 * (config.warpgroups + 1) * (64 + config.block_m // 2)
    resident = max(1, min(MAX_SMEM_BYTES // config.smem_bytes, 65536 // registers))
    busiest = -(-ctas // NUM_SMS)
    issue = 100 + 3 * config.block_m // 2
    latency = _STEP_LATENCY + _TOKEN_LATENCY * max(16, config.block_m)
    together = min(busiest, resident) * config.warpgroups
    streaming = max(
        ctas * steps * config.block_n * (STEP_BYTES + 4) / _MEMORY_BYTES,
        ctas * steps * config.stage_bytes / _L2_BYTES,
        busiest * steps * config.stage_bytes / _SM_BYTES,
        busiest * steps * config.warpgroups * max(issue, (latency + issue) / together),
    )
    exchange = _EXCHANGE_CLOCKS + 4 * config.block_n * config.block_m / _EXCHANGE_BYTES
    rounds = -(-ctas // (NUM_SMS * resident))
    return streaming + rounds * (_CTA_CLOCKS + (exchange if config.split_k > 1 else 0))
