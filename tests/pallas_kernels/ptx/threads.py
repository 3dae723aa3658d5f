"""Clusters, CTAs and warps: their memory, their barriers, and the lanes that are active."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANES
from tests.pallas_kernels.ptx.barriers import MBarrier, NamedBarrier
from tests.pallas_kernels.ptx.copies import Pending
from tests.pallas_kernels.ptx.errors import BarrierFault, Divergence, MemoryFault
from tests.pallas_kernels.ptx.instructions import CONTINUE, RETRY
from tests.pallas_kernels.ptx.memory import IN_FLIGHT, RANK_BITS, SHARED_BASE, Shared
from tests.pallas_kernels.ptx.races import Actor, Clocks, Place, Shadow
from tests.pallas_kernels.ptx.tensor_core import TensorCore

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.machine import Machine


# Of an SM, and of a thread.
_REGISTERS, _MAX_REGISTERS = 65_536, 256


class Cluster:
    """CTAs that run together, and the copies that are under way in them."""

    def __init__(self, machine: Machine, origin: tuple[int, int, int]):
        self.machine, self.pending = machine, list[Pending]()
        cx, cy, cz = machine.launch.cluster
        warps = machine.kernel.threads // LANES
        self.clocks = Clocks(cx * cy * cz, warps)
        self.arriving, self.arrived = self.clocks.zero(), self.clocks.zero()
        self.there = self.generation = 0
        self.ctas: list[CTA] = []
        for place in ((x, y, z) for z in range(cz) for y in range(cy) for x in range(cx)):
            self.ctas.append(CTA(self, len(self.ctas), origin, place))
        self.warps = [w for cta in self.ctas for w in cta.warps]

    def cta_at(self, address: int, own: CTA) -> tuple[CTA, int]:
        """The CTA of a shared::cluster address, and the address within it."""
        rank = address >> RANK_BITS
        if not 0 <= rank <= len(self.ctas):
            raise MemoryFault(f"out of bounds: {address:#x} is no shared memory of this cluster")
        cta = self.ctas[rank - 1] if rank else own
        cta.check_running()
        return cta, address & ((1 << RANK_BITS) - 1)

    def start(self, text: str, finish: Callable[[], None]) -> Pending:
        self.pending.append(Pending(text, finish))
        return self.pending[-1]

    @property
    def threads(self) -> int:
        return len(self.ctas) * self.machine.kernel.threads


class CTA:
    """Threads that share memory and barriers."""

    def __init__(
        self, cluster: Cluster, rank: int, origin: tuple[int, int, int], place: tuple[int, int, int]
    ):
        machine, launch = cluster.machine, cluster.machine.launch
        self.cluster, self.rank, self.exited = cluster, rank, False
        index = tuple(o + p for o, p in zip(origin, place, strict=True))
        self.name = f"CTA {index}"
        warps = machine.kernel.threads // LANES
        padded = -(-launch.shared_bytes // 16) * 16
        noise = machine.rng.integers(0, 256, padded, np.uint8)
        self.shared = Shared(
            launch.shared_bytes, f"shared memory of {self.name}", noise, machine.may_be_unwritten
        )
        self.shared.shadow = Shadow(
            padded,
            (rank * warps, (rank + 1) * warps),
            machine.events,
            lambda offset: f"byte {offset:#x} of {self.shared.name}",
            machine.name_of,
        )
        # Those of the CTA that no warp has. It starts with as many as the assembler can give each thread.
        self.free_registers = 0
        self.mbarriers: dict[int, MBarrier] = {}
        self.bars: dict[int, NamedBarrier] = {}
        special = {"cluster_ctarank": rank, "cluster_nctarank": math.prod(launch.cluster)}
        for k, axis in enumerate("xyz"):
            special |= {
                f"ctaid.{axis}": index[k],
                f"nctaid.{axis}": launch.grid[k],
                f"ntid.{axis}": launch.block[k],
                f"cluster_ctaid.{axis}": place[k],
                f"cluster_nctaid.{axis}": launch.cluster[k],
                f"clusterid.{axis}": index[k] // launch.cluster[k],
                f"nclusterid.{axis}": launch.grid[k] // launch.cluster[k],
            }
        registers = {name: np.full(LANES, number, np.uint32) for name, number in special.items()}
        self.warps = [Warp(self, index, registers) for index in range(warps)]

    def mbarrier(self, address: int) -> MBarrier:
        if address % 8:
            raise MemoryFault(f"an mbarrier is misaligned, at {address - SHARED_BASE:#x}")
        if address not in self.mbarriers:
            raise BarrierFault(f"no mbarrier was initialized at {address - SHARED_BASE:#x} of {self.name}")
        return self.mbarriers[address]

    def check_running(self) -> None:
        if self.exited:
            raise MemoryFault(f"access to the shared memory of {self.name}, which has exited")

    def warp_exited(self) -> None:
        if any(not w.exited for w in self.warps):
            return
        self.exited = True
        self.cluster.machine.unfinished.update(
            address - SHARED_BASE
            for address, barrier in self.mbarriers.items()
            if barrier.pending != barrier.expected or barrier.missing_bytes
        )
        if (self.shared.flags & IN_FLIGHT).any() or self.shared.readers.any():
            raise MemoryFault(
                f"{self.name} exits while asynchronous copies of its shared memory are under way"
            )


class Warp:
    """32 threads: registers, the lanes that are active, and what it has started.

    Attributes:
      R: registers by number: 32 unsigned integers or bools; None: nothing yet, or an accumulator in flight.
      S: special registers by name.
      registers: that each of its threads may use.
      mask: active lanes; ``full``: all of them; ``others``: where the other lanes are, (instruction, lanes).
    """

    def __init__(self, cta: CTA, index: int, special: dict[str, np.ndarray]):
        self.cta, self.index, self.machine = cta, index, cta.cluster.machine
        component = cta.rank * (self.machine.kernel.threads // LANES) + index
        self.actor = Actor(component, cta.cluster.clocks, self.machine.events, f"warp {index} of {cta.name}")
        self.R: list[Any] = [None] * self.machine.kernel.num_registers
        self.S = special | {
            "tid.x": np.arange(index * LANES, (index + 1) * LANES, dtype=np.uint32),
            "tid.y": np.zeros(LANES, np.uint32),
            "tid.z": np.zeros(LANES, np.uint32),
            "laneid": np.arange(LANES, dtype=np.uint32),
            "warpid": np.full(LANES, index, np.uint32),
        }
        self.registers = min(_MAX_REGISTERS, _REGISTERS // self.machine.kernel.threads // 8 * 8)
        self.pc = 0
        self.mask, self.full = np.ones(LANES, bool), True
        self.others: list[tuple[int, np.ndarray]] = []
        self.exited = False
        self.waiting: Callable[[], bool] | None = None
        self.why: Callable[[], str] = str
        self.unfenced: list[Place] = []  # stores that fence.proxy.async has not been executed for
        self.copies: list[tuple[int, Pending]] = []  # bulk stores not yet in a group, by lane
        self.groups: list[list[Pending]] = []
        self.cluster_generation, self.arrived_at_cluster = 0, False
        self.tensor_core = TensorCore(self)

    def set(self, register: int, value: np.ndarray) -> None:
        """Assigns a register of the active lanes."""
        if not self.full:
            old = self.R[register]
            value = np.where(self.mask, value, np.zeros_like(value) if old is None else old)
        self.R[register] = value

    def wait(self, condition: Callable[[], bool], why: Callable[[], str]) -> None:
        """Does not go on until ``condition``; ``why`` says what it waits for."""
        self.waiting, self.why = condition, why

    def together(self) -> None:
        """Of an instruction that all lanes execute together."""
        if not self.mask.all():
            raise Divergence(f"executed by lanes {np.flatnonzero(self.mask).tolist()} only")
        self.actor.sync_lanes()

    def branch(self, taken: np.ndarray, target: int, following: int) -> int:
        """The lanes ``taken`` go on at ``target``, the others at ``following``; returns where to go on."""
        if not taken.any():
            return following
        if (taken == self.mask).all():
            return target
        self.others.append((target, taken))
        self.mask = self.mask & ~taken
        return following

    def leave(self) -> None:
        """The active lanes exit."""
        if self.others:
            self.pc, self.mask = self.others.pop()
            self._regroup()
            return
        self.exited = True
        if self.copies or any(not pending.waited for group in self.groups for pending in group):
            raise BarrierFault("exits without having waited for its bulk stores")
        if self.tensor_core.open or self.tensor_core.groups:
            raise BarrierFault("exits without having waited for its wgmma")
        self.cta.warp_exited()

    def _regroup(self) -> None:
        lanes: dict[int, np.ndarray] = {}
        for pc, mask in [*self.others, (self.pc, self.mask)]:
            lanes[pc] = lanes[pc] | mask if pc in lanes else mask
        self.pc = min(lanes)
        self.mask = lanes.pop(self.pc)
        self.others = list(lanes.items())
        self.full = bool(self.mask.all())

    def run(self, budget: int) -> None:
        """At most ``budget`` steps, until it waits or exits."""
        steps, machine = self.machine.steps, self.machine
        while budget > 0 and not self.exited:
            execute, following = steps[self.pc]
            budget -= 1
            machine.executed += following - self.pc
            machine.covered[self.pc : following] = True
            result = execute(self)
            if result is None:
                self.pc = following
            elif result is RETRY:
                return
            elif result is CONTINUE:
                self.pc = following
                return
            else:
                self.pc = result
                if not self.exited and (self.others or not self.full):
                    self._regroup()
                continue
            if self.others:
                self._regroup()
