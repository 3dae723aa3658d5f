"""Faults put into the PTX of a real kernel: the emulator must notice each, whatever the seed."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import mosaic_sm90
from pallas_kernels.grouped_matmul.call import Call
from pallas_kernels.grouped_matmul.config import MatmulConfig
from tests.pallas_kernels import bridge, oracle
from tests.pallas_kernels.mosaic.support import needs_cuda_compiler
from tests.pallas_kernels.mosaic.test_grouped_matmul import random_operands
from tests.pallas_kernels.ptx.compiled import Compiled
from tests.pallas_kernels.ptx.emulate import emulated
from tests.pallas_kernels.ptx.errors import (
    BarrierFault,
    Deadlock,
    EmulationError,
    MemoryFault,
    Race,
    RegisterFault,
)

pytestmark = needs_cuda_compiler

PLAIN = MatmulConfig(block_m=16, warpgroups=2, num_stages=2, split_k=1)
SPLIT = MatmulConfig(
    block_m=16, warpgroups=1, num_stages=2, split_k=2
)  # CTAs add up what each computed of a row
SHARED = MatmulConfig(
    block_m=16, warpgroups=1, num_stages=2, sharers=2
)  # CTAs load activations for each other

SEEDS = (0, 1, 2)
TOLERANCE = 1e-6
OPERANDS = random_operands(16, 128, 640, 128, 128)
EXPECTED = oracle.grouped_matmul(*OPERANDS)


@functools.cache
def compiled(config: MatmulConfig) -> list[Compiled]:
    """The kernel of ``config``, empty until it is first run."""
    return []


def emulate(config: MatmulConfig, seed: int, change: Callable[[str], str] | None = None) -> float:
    """Runs the kernel; returns the relative error of the result."""
    x, w = OPERANDS
    with emulated(seed, change_ptx=change, compiled=compiled(config)):
        y = mosaic_sm90.run(Call(bridge.activation(x), bridge.weight(w), out_dtype=jnp.float32), config)
    return oracle.relative_error(np.asarray(y), EXPECTED)


@pytest.mark.parametrize("config", [PLAIN, SPLIT, SHARED], ids=["plain", "split", "shared"])
def test_without_a_fault_all_is_well(config):
    for seed in SEEDS:
        assert emulate(config, seed) < TOLERANCE


def nth(pattern: str, number: int, to: str) -> Callable[[str], str]:
    """Replaces the ``number``-th match."""

    def change(text: str) -> str:
        found = list(re.finditer(pattern, text))[number]
        return text[: found.start()] + found.expand(to) + text[found.end() :]

    return change


def every(pattern: str, to: str) -> Callable[[str], str]:
    return lambda text: re.sub(pattern, to, text)


def add_to(use: str, more: int) -> Callable[[str], str]:
    """Adds to every constant from which a register comes that the pattern ``use`` finds."""

    def change(text: str) -> str:
        for register in sorted(set(re.findall(use, text))):
            constant = rf"(mov\.b32\s+{register}, |add\.s32\s+{register}, %r\d+, )(\d+);"
            text = re.sub(constant, lambda found: f"{found[1]}{int(found[2]) + more};", text)
        return text

    return change


WAIT = r"mbarrier\.try_wait\.parity\.shared\.b64 P1, [^;]*;"
NO_WAIT = "setp.eq.b32 P1, 1, 1;"
EXPECTED_BYTES = r"mbarrier\.arrive\.expect_tx\.shared\.b64 %rd\d+, \[[^\]]*\], (%r\d+);"
TILE = r"cp\.async\.bulk\.tensor\.4d\.shared::cluster\.global\.mbarrier::complete_tx::bytes \[(%r\d+)\]"

FAULTS: dict[str, tuple[MatmulConfig, Callable[[str], str], tuple[type[EmulationError], ...]]] = {
    "no fence.proxy.async before the TMA store": (
        PLAIN,
        every(r"fence\.proxy\.async[^;]*;", ""),
        (MemoryFault,),
    ),
    "no barrier before the TMA store": (PLAIN, nth(r"bar\.sync %r\d+, 128;", -2, ""), (MemoryFault, Race)),
    "no wgmma.wait_group": (PLAIN, every(r"wgmma\.wait_group[^;]*;", ""), (RegisterFault,)),
    "wgmma.wait_group 1 in place of 0": (
        PLAIN,
        every(r"(wgmma\.wait_group\.sync\.aligned\s+)0", r"\g<1>1"),
        (RegisterFault,),
    ),
    "no wgmma.fence": (PLAIN, every(r"wgmma\.fence[^;]*;", ""), (RegisterFault,)),
    "no wait for a filled slot": (PLAIN, nth(WAIT, 1, NO_WAIT), (MemoryFault, Race)),
    "no wait for a released slot": (PLAIN, nth(WAIT, 0, NO_WAIT), (MemoryFault, Race, BarrierFault)),
    "no release of a slot": (
        PLAIN,
        nth(r"mbarrier\.arrive\.release\.cta\.shared::cta\.b64 _, \[%r\d+\], 1;", -1, ""),
        (Deadlock,),
    ),
    "a byte expected that does not come": (PLAIN, add_to(EXPECTED_BYTES, 1), (Deadlock, BarrierFault)),
    "a tile 64 bytes further": (PLAIN, add_to(TILE, 64), (MemoryFault,)),
    "a tile over another": (PLAIN, add_to(TILE, 1024), (MemoryFault, Race)),
    "another swizzle in the descriptor": (
        PLAIN,
        every(r"-9223371899415822336", "4611686155866341376"),
        (MemoryFault, Race),
    ),
    "no wait for the TMA store": (PLAIN, every(r"cp\.async\.bulk\.wait_group[^;]*;", ""), (BarrierFault,)),
    "no wait for the other CTA's sums": (SPLIT, nth(WAIT, -1, NO_WAIT), (MemoryFault, Race)),
    "no barrier of the cluster at the start": (
        SPLIT,
        every(r"barrier\.cluster\.(arrive\.relaxed|wait)\.aligned;", ""),
        (BarrierFault, MemoryFault),
    ),
    "no wait for the other CTA's release": (SHARED, nth(WAIT, 1, NO_WAIT), (MemoryFault, Race)),
    "multicast to itself only": (
        SHARED,
        every(r"(multicast::cluster \[[^;]*, )%rs\d+;", r"\g<1>1;"),
        (Deadlock,),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_noticed(name):
    config, change, errors = FAULTS[name]

    def changed(text: str) -> str:
        result = change(text)
        assert result != text, "nothing to change"
        return result

    for seed in SEEDS:
        with pytest.raises(errors, match="grouped_matmul"):
            emulate(config, seed, changed)


@pytest.mark.parametrize("opcode", [r"add\.s64", r"add\.s32", r"and\.b32", r"mul\.f32"])
def test_wrong_constants_are_noticed_or_change_the_result(opcode):
    """Four constants of each kind, spread over the kernel, of which a bit is flipped.

    Some change nothing: of a slot that never comes up, or of an index whose low bits do not count.
    """
    noticed = 0
    places = np.linspace(0, 0.99, 4)
    for place in places:

        def changed(text: str, place: float = place) -> str:
            found = list(re.finditer(rf"{opcode}\s+%r\w*\d+, %r\w*\d+, (?:0f)?([0-9A-F]+);", text))
            one = found[int(place * len(found))]
            base = 16 if "f32" in opcode else 10
            wrong = int(one[1], base) ^ (1 << 22 if base == 16 else 32)
            shown = f"{wrong:08X}" if base == 16 else str(wrong)
            return text[: one.start(1)] + shown + text[one.end(1) :]

        try:
            noticed += emulate(PLAIN, 0, changed) > TOLERANCE
        except EmulationError:
            noticed += 1
    assert noticed >= len(places) - 1
