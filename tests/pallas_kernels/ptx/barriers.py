"""Barriers of a CTA and of a cluster, mbarriers, and fences."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANES
from tests.pallas_kernels.ptx.errors import BarrierFault
from tests.pallas_kernels.ptx.instructions import (
    CONTINUE,
    RETRY,
    Execute,
    addresses,
    instruction,
    registers,
    value,
)
from tests.pallas_kernels.ptx.memory import BARRIER, RANK_BITS, SHARED_BASE, UNSIGNED
from tests.pallas_kernels.ptx.parse import Instruction, Register
from tests.pallas_kernels.ptx.races import Actor, Clocks

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.code import Code
    from tests.pallas_kernels.ptx.threads import Warp

_MAX_COUNT = (1 << 20) - 1  # of an mbarrier's arrivals and of its bytes


@dataclasses.dataclass
class NamedBarrier:
    """A barrier of a CTA (``bar.sync``): who is there, and the clocks of those who were."""

    threads: int
    arriving: np.ndarray
    arrived: np.ndarray
    there: int = 0
    generation: int = 0


class MBarrier:
    """An mbarrier object: arrivals and bytes that are missing in its phase (PTX ISA, 9.7.13.15)."""

    def __init__(self, expected: int, by: Actor, clocks: Clocks):
        self.expected = self.pending = expected
        self.missing_bytes = self.phase = 0
        self.fenced = False
        self.initialized = (by.component, int(by.clock[by.component]))
        # Its place in clocks; the clock of those who arrived in this phase, and until the last.
        self.component = clocks.of_mbarrier()
        self.arriving, self.arrived = clocks.zero(), clocks.zero()

    def check_known(self, by: Actor) -> None:
        """Fails unless ``by`` can know that this mbarrier is initialized."""
        if not by.knows_init(*self.initialized):
            raise BarrierFault("an mbarrier is used with no barrier since its initialization")

    def check_fenced(self) -> None:
        """Fails unless other CTAs and copies may know of it."""
        if not self.fenced:
            raise BarrierFault("an mbarrier whose initialization was not fenced is signalled from elsewhere")

    def __str__(self) -> str:
        missing = f"{self.pending} of {self.expected} arrivals and {self.missing_bytes} bytes missing"
        return f"in phase {self.phase} with {missing}"

    def arrive(self, count: int, more_bytes: int = 0) -> None:
        """``count`` arrivals, and so many bytes to wait for."""
        self.pending -= count
        if self.pending < 0:
            raise BarrierFault(f"more arrivals at an mbarrier than the {self.expected} it expects")
        self._count(more_bytes)

    def received(self, count: int) -> None:
        """So many bytes have come."""
        self._count(-count)

    def _count(self, more_bytes: int) -> None:
        self.missing_bytes += more_bytes
        if abs(self.missing_bytes) > _MAX_COUNT:
            raise BarrierFault(f"an mbarrier misses {self.missing_bytes} bytes, more than it can count")
        if self.pending == 0 and self.missing_bytes == 0:
            self.phase, self.pending = self.phase + 1, self.expected
            self.arrived = self.arriving.copy()
            self.arrived[self.component] = self.phase


def signalled(w: Warp, cta: Any, address: int) -> MBarrier:
    """The mbarrier of ``cta`` that a copy of ``w`` will signal."""
    barrier = cta.mbarrier(address & ((1 << RANK_BITS) - 1))
    barrier.check_known(w.actor)
    barrier.check_fenced()
    return barrier


@instruction(r"(?:bar|barrier)\.sync(?:\.aligned)?")
def _bar_sync(i: Instruction, code: Code) -> Execute:
    number = value(i.operands[0], 32, code)
    count = value(i.operands[1], 32, code) if len(i.operands) > 1 else None
    every = code.kernel.threads

    def run(w: Warp) -> Any:
        w.together()
        key, threads = int(number(w)[0]), int(count(w)[0]) if count else every
        if key > 15 or threads % LANES or not 0 < threads <= every:
            raise BarrierFault(f"barrier {key} of {threads} threads, in a CTA of {every}")
        clocks = w.cta.cluster.clocks
        bar = w.cta.bars.setdefault(key, NamedBarrier(threads, clocks.zero(), clocks.zero()))
        if bar.there and bar.threads != threads:
            raise BarrierFault(f"barrier {key} of {threads} threads, but others said {bar.threads}")
        bar.threads = threads
        bar.there += LANES
        w.actor.release(bar.arriving)
        if bar.there == threads:
            bar.there = 0
            bar.generation += 1
            bar.arrived, bar.arriving = bar.arriving, clocks.zero()
            w.actor.acquire(bar.arrived)
            return None
        generation = bar.generation

        def passed() -> bool:
            if bar.generation == generation:
                return False
            w.actor.acquire(bar.arrived)
            return True

        w.wait(passed, lambda: f"barrier {key}, with {bar.there} of {threads} threads there")
        return CONTINUE

    return run


@instruction(r"barrier\.cluster\.arrive(\.relaxed|\.release)?\.aligned")
def _cluster_arrive(i: Instruction, code: Code, order: str | None) -> Execute:
    def run(w: Warp) -> None:
        w.together()
        cluster = w.cta.cluster
        if w.arrived_at_cluster:
            raise BarrierFault("arrives twice at the barrier of the cluster without waiting")
        w.cluster_generation, w.arrived_at_cluster = cluster.generation, True
        cluster.there += LANES
        if order == ".relaxed":
            w.actor.release_inits(cluster.arriving)
        else:
            w.actor.release(cluster.arriving)
        if cluster.there == cluster.threads:
            cluster.there = 0
            cluster.generation += 1
            cluster.arrived, cluster.arriving = cluster.arriving, cluster.clocks.zero()

    return run


@instruction(r"barrier\.cluster\.wait(?:\.acquire)?\.aligned")
def _cluster_wait(i: Instruction, code: Code) -> Execute:
    def run(w: Warp) -> Any:
        w.together()
        cluster = w.cta.cluster
        if not w.arrived_at_cluster:
            raise BarrierFault("waits for the barrier of the cluster without having arrived")
        if cluster.generation > w.cluster_generation:
            w.actor.acquire(cluster.arrived)
            w.arrived_at_cluster = False
            return None
        w.wait(
            lambda: cluster.generation > w.cluster_generation,
            lambda: f"the barrier of the cluster, with {cluster.there} of {cluster.threads} threads there",
        )
        return RETRY

    return run


@instruction(r"mbarrier\.init\.shared(?:::cta)?\.b64")
def _mbarrier_init(i: Instruction, code: Code) -> Execute:
    address, count = addresses(i.operands[0], code), value(i.operands[1], 32, code)

    def run(w: Warp) -> None:
        shared = w.cta.shared
        for lane in np.flatnonzero(w.mask):
            at, expected = int(address(w)[lane]), int(count(w)[lane])
            shared.offsets(np.array([at]), 8, 8)
            if at in w.cta.mbarriers:
                raise BarrierFault("an mbarrier is initialized twice")
            if not 1 <= expected <= _MAX_COUNT:
                raise BarrierFault(f"an mbarrier of {expected} arrivals")
            start = at - SHARED_BASE
            if shared.flags[start : start + 8].any():
                raise BarrierFault("an mbarrier where data is")
            shared.flags[start : start + 8] = BARRIER
            w.cta.mbarriers[at] = MBarrier(expected, w.actor, w.cta.cluster.clocks)

    return run


@instruction(r"fence\.mbarrier_init\.release\.cluster")
def _fence_init(i: Instruction, code: Code) -> Execute:
    def run(w: Warp) -> None:
        for barrier in w.cta.mbarriers.values():
            barrier.fenced |= w.actor.knows_init(*barrier.initialized)
        w.actor.fence_inits()

    return run


@instruction(r"fence\.proxy\.async(?:\.shared::cta)?")
def _fence_proxy(i: Instruction, code: Code) -> Execute:
    def run(w: Warp) -> None:
        lanes = np.flatnonzero(w.mask)
        for place in w.unfenced:
            w.cta.shared.fence(place, lanes)
        if w.full:
            w.unfenced.clear()

    return run


_ARRIVE = (
    r"mbarrier\.arrive(\.expect_tx)?(?:\.release)?(?:\.(?:cta|cluster))?\.shared(?:::(?:cta|cluster))?\.b64"
)


@instruction(_ARRIVE)
def _mbarrier_arrive(i: Instruction, code: Code, expect: str | None) -> Execute:
    to, where, *rest = i.operands
    address = addresses(where, code)
    argument = value(rest[0], 32, code) if rest else None
    state = registers(to, 64)[0] if isinstance(to, Register) else None
    if (expect and argument is None) or (state is None and getattr(to, "name", "") != "_"):
        raise ValueError("a state (or _), an address and a count expected")

    def run(w: Warp) -> None:
        at = address(w)
        counts = argument(w) if argument else None
        for lane in np.flatnonzero(w.mask):
            cta, local = w.cta.cluster.cta_at(int(at[lane]), w.cta)
            barrier = cta.mbarrier(local)
            barrier.check_known(w.actor)
            if cta is not w.cta:
                barrier.check_fenced()
            np.maximum(barrier.arriving, w.actor.clock, out=barrier.arriving)
            count = 1 if counts is None else int(counts[lane])
            barrier.arrive(*(1, count) if expect else (count,))
        w.actor.advance()
        if state is not None:
            w.set(state, np.zeros(LANES, np.uint64))

    return run


@instruction(r"mbarrier\.try_wait\.parity\.shared(?:::cta)?\.b64")
def _try_wait(i: Instruction, code: Code) -> Execute:
    to, where, parity, *_ = i.operands
    [to], address, wanted_parity = registers(to, 1), addresses(where, code), value(parity, 32, code)

    def run(w: Warp) -> Any:
        at, parities, done = address(w), wanted_parity(w), np.zeros(LANES, bool)
        lanes = np.flatnonzero(w.mask)
        barriers = {int(a): w.cta.mbarrier(int(a)) for a in np.unique(at[lanes])}
        for barrier in barriers.values():
            barrier.check_known(w.actor)
        for lane in lanes if len(barriers) > 1 or np.ptp(parities[lanes]) else lanes[:1]:
            done[lane] = barriers[int(at[lane])].phase & 1 != int(parities[lane])
        if len(barriers) == 1 and not np.ptp(parities[lanes]):
            done[lanes] = done[lanes[0]]
        if not done[lanes].any() and w.machine.rng.random() < 0.9:
            first, wanted = barriers[int(at[lanes[0]])], int(parities[lanes[0]])
            w.wait(
                lambda: first.phase & 1 != wanted,
                lambda: f"mbarrier {int(at[lanes[0]]) - SHARED_BASE:#x}, parity {wanted}, {first}",
            )
            return RETRY
        for address_ in np.unique(at[lanes][done[lanes]]):
            w.actor.acquire(barriers[int(address_)].arrived)
        w.set(to, done)  # a timeout, if nothing is done: allowed at any time

    return run


@instruction(r"mapa\.shared::cluster\.u(32|64)")
def _mapa(i: Instruction, code: Code, bits: str) -> Execute:
    to, source, rank = i.operands
    width = int(bits)
    [to] = registers(to, width)
    get, target = value(source, width, code), value(rank, 32, code)

    def run(w: Warp) -> None:
        ranks, size = target(w), len(w.cta.cluster.ctas)
        if (ranks[w.mask] >= size).any():
            raise BarrierFault(f"mapa to rank {ranks[w.mask].max()} of {size}")
        above = (ranks.astype(np.uint64) + np.uint64(1)) << np.uint64(RANK_BITS)
        w.set(to, (get(w) | above).astype(UNSIGNED[width // 8]))

    return run
