"""Warps, CTAs and clusters, and the order in which they run.

A warp runs until it must wait; which warp is next, and when an asynchronous copy happens, is drawn from a seed.
Diverged lanes run lowest instruction first, so that they meet again. Clusters run one after another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANES
from tests.pallas_kernels.ptx.barriers import MBarrier, NamedBarrier
from tests.pallas_kernels.ptx.code import PARAMETERS, code_of
from tests.pallas_kernels.ptx.copies import Pending
from tests.pallas_kernels.ptx.errors import (
    BarrierFault,
    Deadlock,
    Divergence,
    EmulationError,
    LaunchError,
    MemoryFault,
    RegisterFault,
)
from tests.pallas_kernels.ptx.instructions import CONTINUE, RETRY
from tests.pallas_kernels.ptx.memory import IN_FLIGHT, RANK_BITS, SHARED_BASE, Global, Shared
from tests.pallas_kernels.ptx.parse import Kernel
from tests.pallas_kernels.ptx.races import Actor, Clocks, Events, Place, Shadow
from tests.pallas_kernels.ptx.tensor_core import TensorCore
from tests.pallas_kernels.ptx.tensor_map import TensorMap

MAX_SHARED_BYTES, MAX_THREADS, MAX_CTAS_OF_CLUSTER = 232_448, 1024, 8


@dataclasses.dataclass(frozen=True)
class Launch:
    """What the host hands to the driver.

    Attributes:
      grid: CTAs in x, y and z; a multiple of ``cluster``.
      shared_bytes: of dynamic shared memory.
      parameters: of the kernel: an integer, or {offset: TensorMap} of a block of tensor maps.
    """

    grid: tuple[int, int, int]
    cluster: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    parameters: tuple[int | dict[int, TensorMap], ...]


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
            raise MemoryFault(f"{self.name} exits while asynchronous copies of its shared memory are under way")


class Warp:
    """32 threads: registers, the lanes that are active, and what it has started.

    Attributes:
      R: registers by number: 32 unsigned integers or bools; None: nothing yet, or an accumulator in flight.
      S: special registers by name.
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
        """The lanes ``taken`` go on at ``target``, the others at ``following``; returns where to go on now."""
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


class Machine:
    """Runs one launch of a kernel over ``memory``.

    Args:
      eager: how likely an asynchronous copy is done before the next warp runs; 0: only when all wait; None:
        drawn from the seed.
      may_be_unwritten: ordinary loads may read shared memory that nobody wrote: noise, different for each seed.
      clusters: run only so many, the same for all seeds; None: all.

    Raises:
      LaunchError: the driver would refuse the launch.
    """

    def __init__(
        self,
        kernel: Kernel,
        launch: Launch,
        memory: Global,
        seed: int = 0,
        eager: float | None = None,
        may_be_unwritten: bool = False,
        clusters: int | None = None,
    ):
        self.kernel, self.launch, self.memory = kernel, launch, memory
        self.may_be_unwritten, self.clusters = may_be_unwritten, clusters
        self._check_launch()
        self.rng = np.random.default_rng(seed)
        self.eager = float(self.rng.choice([0, 0.1, 0.5])) if eager is None else eager
        self.elected = int(self.rng.integers(LANES))
        self.tensor_maps: dict[int, TensorMap] = {}
        end = max((offset + size for offset, size in kernel.parameters.values()), default=0)
        self.parameters = np.zeros(end + 8, np.uint8)
        for (offset, size), given in zip(kernel.parameters.values(), launch.parameters, strict=True):
            if isinstance(given, dict):
                self.tensor_maps |= {PARAMETERS + offset + at: found for at, found in given.items()}
            else:
                self.parameters[offset : offset + size] = np.array([given], np.uint64).view(np.uint8)[:size]
        self.executed, self.unfinished = 0, set[int]()  # instructions; mbarriers left within a phase
        self.covered = np.zeros(len(kernel.instructions), bool)
        self.code = code_of(kernel)
        self.steps = [*self.code.steps, (_end_of_kernel, len(kernel.instructions) + 1)]
        self.events = Events()
        self._cluster: Cluster | None = None
        warps = math.prod(launch.cluster) * kernel.threads // LANES
        memory.watch((0, warps), self.events, self.name_of)

    def _check_launch(self) -> None:
        launch, threads = self.launch, self.kernel.threads
        if launch.block != (threads, 1, 1) or threads > MAX_THREADS:
            raise LaunchError(f"block {launch.block}, but the kernel is for {threads} threads")
        if any(c < 1 or g < 1 or g % c for g, c in zip(launch.grid, launch.cluster, strict=True)):
            raise LaunchError(f"grid {launch.grid} is not made of clusters {launch.cluster}")
        if math.prod(launch.cluster) > MAX_CTAS_OF_CLUSTER:
            raise LaunchError(f"a cluster of {launch.cluster} CTAs, more than {MAX_CTAS_OF_CLUSTER}")
        if not 0 <= launch.shared_bytes <= MAX_SHARED_BYTES:
            raise LaunchError(f"{launch.shared_bytes} bytes of shared memory, of {MAX_SHARED_BYTES}")
        if len(launch.parameters) != len(self.kernel.parameters):
            given, expected = len(launch.parameters), len(self.kernel.parameters)
            raise LaunchError(f"{given} parameters for a kernel of {expected}")

    def name_of(self, event: int) -> str:
        """Who caused ``event``, in words."""
        if event < self.events.cluster_start:
            return "a cluster that no barrier orders with this one" if event else "the host"
        owner = int(self.events.owner[event])
        if self._cluster is not None and owner < len(self._cluster.warps):
            return self._cluster.warps[owner].actor.name
        return "an asynchronous copy it did not wait for"

    def run(self) -> None:
        """Runs all clusters, or some.

        Raises:
          EmulationError: what a GPU refuses, or what has no defined result.
        """
        for origin in self.chosen_clusters():
            self.events.cluster_start = self.events.count
            self._cluster = Cluster(self, origin)
            with np.errstate(all="ignore"):
                self._run_cluster(self._cluster)
            self.memory.next_cluster()

    def chosen_clusters(self) -> Iterator[tuple[int, int, int]]:
        """First CTAs of the clusters that run, in the seed's order."""
        (gx, gy, gz), (cx, cy, cz) = self.launch.grid, self.launch.cluster
        origins = [(x, y, z) for z in range(0, gz, cz) for y in range(0, gy, cy) for x in range(0, gx, cx)]
        if self.clusters is not None:
            chosen = np.random.default_rng(0).permutation(len(origins))[: self.clusters]
            origins = [origins[i] for i in chosen]
        for i in self.rng.permutation(len(origins)):
            yield origins[i]

    def _run_cluster(self, cluster: Cluster) -> None:
        warps, pending, random = list(cluster.warps), cluster.pending, self.rng.random
        while warps or pending:
            for w in warps:
                if w.waiting is not None and w.waiting():
                    w.waiting = None
            ready = [w for w in warps if w.waiting is None]
            if pending and (not ready or random() < self.eager):
                self._finish(pending.pop(int(random() * len(pending))))
            elif not ready:
                waits = "\n".join(f"  {w.actor.name} at {self.where(w.pc)}: {w.why()}" for w in warps)
                raise Deadlock(f"{self.kernel.name}: deadlock, all that are left wait:\n{waits}")
            else:
                warp = ready[int(random() * len(ready))]
                try:
                    warp.run(int(random() * 64) + 1)
                except (EmulationError, TypeError, AttributeError, ValueError) as error:
                    raise self._located(warp, error) from error
                if warp.exited:
                    warps.remove(warp)

    def _finish(self, copy: Pending) -> None:
        try:
            copy.finish()
        except EmulationError as error:
            raise type(error)(f"{self.kernel.name}: {copy.text}: {error}") from error
        copy.done = True

    def _located(self, warp: Warp, error: Exception) -> EmulationError:
        """``error`` with kernel, warp and instruction in its message."""
        if isinstance(error, EmulationError):
            kind, what = type(error), str(error)
        elif "NoneType" in str(error):
            kind, what = RegisterFault, "uses a register never written, or a wgmma accumulator in flight"
        else:
            kind, what = EmulationError, f"{type(error).__name__}: {error}"
        where = self.where(self.code.instruction_of(error, warp.pc))
        return kind(f"{self.kernel.name}: {warp.actor.name}: {where}: {what}")

    def where(self, pc: int) -> str:
        """Line, text and source of an instruction."""
        if pc >= len(self.kernel.instructions):
            return "the end"
        i = self.kernel.instructions[pc]
        return f"line {i.line} `{i.text}` ({i.source})" if i.source else f"line {i.line} `{i.text}`"


def _end_of_kernel(w: Warp) -> None:
    raise BarrierFault("goes past the end of the kernel without ret")
