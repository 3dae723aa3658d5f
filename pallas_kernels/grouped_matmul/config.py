"""Tile sizes of the Hopper ``grouped_matmul`` and how they follow from the shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable

from pallas_kernels.mosaic import MAX_SMEM_BYTES, NUM_SMS
from pallas_kernels.qarrays import PACK_TILE

# One warpgroup's wgmma covers this many output channels; one pipeline step this many bytes of each.
WGMMA_CHANNELS = 64
STEP_BYTES = 64
# As many warpgroups as there are registers for, by tokens (else 4).
_MOST_WARPGROUPS = {64: 2, 128: 2}
_MOST_CANDIDATES = 12

# Rates of ``_decode_clocks``, per clock. That of memory and the constants below fit 60 configurations of
# decode calls of Llama-3-8B, timed on an H100 at 1.75 GHz; those of L2 and of an SM are estimates.
_MEMORY_BYTES = 1200
_L2_BYTES = 3300
_SM_BYTES = 40
# From a step's data being there to its sum being done, for one warpgroup alone; each token adds to it.
_STEP_LATENCY, _TOKEN_LATENCY = 180, 8
# Launch, first bytes, epilogue; what a cluster adds: its start and the exchange of partial sums.
_CTA_CLOCKS = 4500
_EXCHANGE_CLOCKS = 1200
_EXCHANGE_BYTES = 20


@dataclasses.dataclass(frozen=True)
class Config:
    """How one call is cut.

    Attributes:
      block_m: tokens a CTA multiplies.
      warpgroups: consumer warpgroups a CTA, each with its own ``WGMMA_CHANNELS`` output channels.
      num_stages: pipeline steps in flight.
      split_k: CTAs of a cluster that share one output tile, each with its part of the input channels.
      sharers: CTAs of a cluster, next to each other in output channels, that load their tokens together.
    """

    block_m: int
    warpgroups: int
    num_stages: int
    split_k: int = 1
    sharers: int = 1

    @property
    def block_n(self) -> int:
        """Output channels of a CTA."""
        return self.warpgroups * WGMMA_CHANNELS

    @property
    def reduced_m(self) -> int:
        """Tokens of the output tile that one CTA of a cluster reduces: all of them without a split."""
        return max(8, self.block_m >> (self.split_k.bit_length() - 1))

    @property
    def stage_bytes(self) -> int:
        """Bytes of a pipeline step with groups of 128: weights, tokens, a row of scales of each."""
        return self.block_n * (STEP_BYTES + 4) + self.block_m * (PACK_TILE + 4)

    @property
    def smem_bytes(self) -> int:
        """Shared memory of a CTA at most: groups of 32, output and residual of different types."""
        scales = 3 * 4 * (self.block_n + self.block_m)
        tiles = (2 + 4) * self.block_n * self.reduced_m
        exchanged = 4 * self.block_n * self.block_m if self.split_k > 1 else 0
        return self.num_stages * (self.stage_bytes + scales) + tiles + exchanged + 4096


@functools.cache
def configs(m: int, n: int, k: int, group_size: int) -> tuple[Config, ...]:
    """The default for an activation [m, k] and a weight [n, k], and what else a sweep times.

    For decode these are the cheapest by estimate, for prefill those near the default.
    """
    block_m = _block_m(m, group_size)
    if m <= 128:
        return tuple(_decode(block_m, n, k)[:_MOST_CANDIDATES])
    near = [
        Config(size, warpgroups, num_stages, sharers=sharers)
        for size in (block_m, block_m // 2)
        for warpgroups in _warpgroups(n, range(2, min(_MOST_WARPGROUPS.get(size, 4), 3) + 1))
        for num_stages in (4, 6)
        for sharers in (1, 2, 4)
        if -(-n // (warpgroups * WGMMA_CHANNELS)) % sharers == 0
    ]
    fitting = [config for config in near if config.smem_bytes <= MAX_SMEM_BYTES]
    return tuple(dict.fromkeys((_prefill(n, block_m), *fitting)))


def _warpgroups(n: int, sizes: Iterable[int]) -> list[int]:
    """Those of the sizes, at most as many as there are output channels for.

    One more would not only be idle: with 64 output channels the compiler takes the index of its tile for
    that of the only tile there is, and two warpgroups would write to it.
    """
    return sorted({min(size, n // WGMMA_CHANNELS) for size in sizes})


def _block_m(m: int, group_size: int) -> int:
    """Rows a CTA multiplies."""
    # Smaller groups keep more operands in registers beside the accumulators.
    most = 128 if group_size == 128 else 64
    return next(size for size in (8, 16, 32, 64, 128) if min(m, most) <= size)


def _prefill(n: int, block_m: int) -> Config:
    """Bound by the tensor cores, if L2 keeps up.

    With groups of 128 a step of a CTA is 512 clocks of wgmma (two warpgroups of 256) and about 830 issue
    slots a scheduler, 200 of them the producer's, and takes about 1,300 clocks on an H100. Two CTAs that
    multicast their tokens are a tenth faster than four, which wait for each other more often.
    """
    (warpgroups,) = _warpgroups(n, [2])
    tiles = -(-n // (warpgroups * WGMMA_CHANNELS))
    sharers = 2 if tiles % 2 == 0 else 1
    return Config(block_m, warpgroups, num_stages=4, sharers=sharers)


def _decode(block_m: int, n: int, k: int) -> list[Config]:
    """Bound by the weights' bytes: all that fit, the cheapest first.

    Sharing tokens in a cluster, on top of a split, made every call slower that was tried on an H100.
    """
    found = [
        Config(block_m, warpgroups, num_stages, split_k)
        for warpgroups in _warpgroups(n, [2, _MOST_WARPGROUPS.get(block_m, 4)])
        for num_stages in (4, 8)
        for split_k in (4, 3, 2, 1, 6, 8)  # of equals the first: 4 splits with 4 stages were timed most
        if n % (warpgroups * WGMMA_CHANNELS) == 0 or split_k == 1
    ]
    fitting = [config for config in found if config.smem_bytes <= MAX_SMEM_BYTES]
    return sorted(fitting, key=lambda config: _decode_clocks(config, n, k))


def _decode_clocks(config: Config, n: int, k: int) -> float:
    """Estimated duration of a decode call."""
    ctas = -(-n // config.block_n) * config.split_k
    steps = -(-k // (PACK_TILE * config.split_k))
    # Registers: at most 64 Ki an SM, about 64 a thread and 4 more for every 8 tokens.
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
