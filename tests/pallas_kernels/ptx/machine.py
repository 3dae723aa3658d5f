"""A launch, and the order in which its warps run.

A warp runs until it must wait; which warp is next, and when a copy happens, is drawn from a seed. Diverged
lanes run lowest instruction first, so that they meet again. Clusters run one after another.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from tests.pallas_kernels.ptx.arithmetic import LANES
from tests.pallas_kernels.ptx.code import PARAMETERS, code_of
from tests.pallas_kernels.ptx.copies import Pending
from tests.pallas_kernels.ptx.errors import BarrierFault, Deadlock, EmulationError, LaunchError, RegisterFault
from tests.pallas_kernels.ptx.memory import Global
from tests.pallas_kernels.ptx.parse import Kernel
from tests.pallas_kernels.ptx.races import Events
from tests.pallas_kernels.ptx.tensor_map import TensorMap
from tests.pallas_kernels.ptx.threads import Cluster, Warp

# How many clusters of a grid run, or which: told the first CTA of each. None: all.
Clusters = int | Callable[[tuple[int, int, int]], bool] | None
# Of a cluster's warps together, far above what any kernel needs.
MAX_INSTRUCTIONS = 20_000_000
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


class Machine:
    """Runs one launch of a kernel over ``memory``.

    Args:
      eager: how likely an asynchronous copy is done before the next warp runs; 0: only when all wait; None:
        drawn from the seed.
      may_be_unwritten: ordinary loads may read shared memory that nobody wrote: noise, by the seed.
      clusters: which of them run, the same for all seeds.

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
        clusters: Clusters = None,
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
        if isinstance(self.clusters, int):
            chosen = np.random.default_rng(0).permutation(len(origins))[: self.clusters]
            origins = [origins[i] for i in chosen]
        elif self.clusters is not None:
            origins = [origin for origin in origins if self.clusters(origin)]
        for i in self.rng.permutation(len(origins)):
            yield origins[i]

    def _run_cluster(self, cluster: Cluster) -> None:
        warps, pending, random = list(cluster.warps), cluster.pending, self.rng.random
        limit = self.executed + MAX_INSTRUCTIONS
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
                elif self.executed > limit:
                    where = f"{warp.actor.name} is at {self.where(warp.pc)}"
                    raise Deadlock(
                        f"{self.kernel.name}: no end after {MAX_INSTRUCTIONS} instructions: {where}"
                    )

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
