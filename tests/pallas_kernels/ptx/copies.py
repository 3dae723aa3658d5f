"""Asynchronous copies: TMA, bulk copies and ``st.async``. The machine finishes them when it likes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.pallas_kernels.ptx.barriers import MBarrier, signalled
from tests.pallas_kernels.ptx.errors import BarrierFault, MemoryFault
from tests.pallas_kernels.ptx.instructions import RETRY, Execute, addresses, immediate, instruction, value
from tests.pallas_kernels.ptx.memory import RANK_BITS, SHARED_BASE
from tests.pallas_kernels.ptx.parse import Coordinates, Instruction
from tests.pallas_kernels.ptx.races import Copy

if TYPE_CHECKING:
    from tests.pallas_kernels.ptx.code import Code
    from tests.pallas_kernels.ptx.tensor_map import TensorMap
    from tests.pallas_kernels.ptx.threads import CTA, Warp

_LOCAL = (1 << RANK_BITS) - 1


@dataclasses.dataclass
class Pending:
    """A copy under way; ``finish`` does it.

    Attributes:
      waited: a store whose shared memory its warp knows to be free again.
      reads, writes: a store's accesses to shared and to global memory, for those who wait for it.
    """

    text: str
    finish: Callable[[], None]
    done: bool = False
    waited: bool = False
    reads: Copy | None = None
    writes: Copy | None = None


def _signalling(w: Warp, barrier: MBarrier) -> Copy:
    """Accesses of a copy whose end this phase of ``barrier`` tells."""
    return w.actor.copy(w.machine.events.new(barrier.component, barrier.phase + 1))


@instruction(
    r"st\.async(?:\.weak)?(?:\.cluster)?\.shared::cluster\.mbarrier::complete_tx::bytes\.[bsu](32|64)"
)
def _st_async(i: Instruction, code: Code, bits: str) -> Execute:
    width = int(bits) // 8
    address, get = addresses(i.operands[0], code), value(i.operands[1], 8 * width, code)
    where = addresses(i.operands[2], code)

    def run(w: Warp) -> None:
        cluster, lanes = w.cta.cluster, np.flatnonzero(w.mask)
        at, values, signals = address(w)[lanes], get(w)[lanes], where(w)[lanes]
        for rank in np.unique(at >> RANK_BITS):
            mine = at >> RANK_BITS == rank
            cta, _ = cluster.cta_at(int(at[mine][0]), w.cta)
            if any(cluster.cta_at(int(b), w.cta)[0] is not cta for b in signals[mine]):
                raise BarrierFault("st.async to one CTA, its mbarrier in another")
            offsets = cta.shared.offsets(at[mine] & _LOCAL, width, width)
            spread = offsets[:, None] + np.arange(width)
            contents = np.ascontiguousarray(values[mine]).view(np.uint8).reshape(-1, width)
            barriers = [signalled(w, cta, int(b)) for b in signals[mine]]
            for barrier in dict.fromkeys(barriers):
                rows = np.array([b is barrier for b in barriers])
                cta.shared.start_write(_signalling(w, barrier), spread[rows])

            def finish(
                cta: CTA = cta, to: np.ndarray = spread, what: np.ndarray = contents, signal: Any = barriers
            ) -> None:
                cta.shared.end_write(to, what)
                for barrier in signal:
                    barrier.received(width)

            cluster.start(f"st.async of {w.actor.name}, line {i.line}", finish)

    return run


def _bulk_size(count: int) -> int:
    if count % 16 or count == 0:
        raise MemoryFault(f"a bulk copy of {count} bytes: a multiple of 16 expected")
    return count


@instruction(r"cp\.async\.bulk\.shared::(?:cta|cluster)\.global\.mbarrier::complete_tx::bytes")
def _bulk_load(i: Instruction, code: Code) -> Execute:
    address, source = addresses(i.operands[0], code), addresses(i.operands[1], code)
    size, where = value(i.operands[2], 32, code), addresses(i.operands[3], code)

    def run(w: Warp) -> None:
        memory = w.machine.memory
        for lane in np.flatnonzero(w.mask):
            count, start = _bulk_size(int(size(w)[lane])), int(source(w)[lane])
            cta, to = w.cta.cluster.cta_at(int(address(w)[lane]), w.cta)
            offsets = cta.shared.offsets(np.array([to]), count, 16)[0] + np.arange(count)
            memory.at(np.array([start]), count, 16)
            barrier = signalled(w, cta, int(where(w)[lane]))
            copy, addresses_ = _signalling(w, barrier), start + np.arange(count)
            cta.shared.start_write(copy, offsets)

            def finish(
                cta: CTA = cta,
                to: np.ndarray = offsets,
                source: np.ndarray = addresses_,
                barrier: MBarrier = barrier,
                copy: Copy = copy,
            ) -> None:
                cta.shared.end_write(to, memory.read_bytes(copy, source))
                barrier.received(len(source))

            w.cta.cluster.start(f"bulk copy of {w.actor.name}, line {i.line}", finish)

    return run


@instruction(r"cp\.async\.bulk\.global\.shared::cta\.bulk_group")
def _bulk_store(i: Instruction, code: Code) -> Execute:
    to, source = addresses(i.operands[0], code), addresses(i.operands[1], code)
    size = value(i.operands[2], 32, code)

    def run(w: Warp) -> None:
        for lane in np.flatnonzero(w.mask):
            count, start = _bulk_size(int(size(w)[lane])), int(to(w)[lane])
            offsets = w.cta.shared.offsets(source(w)[lane : lane + 1], count, 16)[0] + np.arange(count)
            w.machine.memory.at(np.array([start]), count, 16)
            _start_store(w, i, int(lane), offsets, start + np.arange(count))

    return run


def _start_store(w: Warp, i: Instruction, lane: int, offsets: np.ndarray, to: np.ndarray) -> None:
    """Copies the bytes at ``offsets`` of shared memory to the addresses ``to``, but for negative ones."""
    reads, writes = w.actor.copy(), w.actor.copy()
    contents = w.cta.shared.start_read(reads, offsets, lane)

    def finish() -> None:
        w.cta.shared.end_read(offsets)
        exists = to >= 0
        if exists.any():
            w.machine.memory.write_bytes(writes, to[exists], contents[exists])

    pending = w.cta.cluster.start(f"bulk store of {w.actor.name}, line {i.line}", finish)
    pending.reads, pending.writes = reads, writes
    w.copies.append((lane, pending))


def _tensor_map(w: Warp, address: int) -> TensorMap:
    if address not in w.machine.tensor_maps:
        raise MemoryFault(f"no tensor map at {address:#x}")
    return w.machine.tensor_maps[address]


def _tensor(operand: Any, rank: str, code: Code) -> Callable[[Warp, int], tuple[TensorMap, list[int]]]:
    """Reads tensor map and coordinates of a lane."""
    if not isinstance(operand, Coordinates) or len(operand.items) != int(rank):
        raise ValueError(f"a tensor map and {rank} coordinates expected")
    tensor, starts = value(operand.base, 64, code), [value(c, 32, code) for c in operand.items]

    def read(w: Warp, lane: int) -> tuple[TensorMap, list[int]]:
        start = [int(get(w).view(np.int32)[lane]) for get in starts]
        return _tensor_map(w, int(tensor(w)[lane])), start

    return read


def _box_offsets(cta: CTA, address: int, tensor_map: TensorMap) -> np.ndarray:
    cta.shared.offsets(np.array([address]), tensor_map.box_bytes, 16)
    return tensor_map.shared_addresses(address) - SHARED_BASE


_LOAD = (
    r"cp\.async\.bulk\.tensor\.([1-5])d\.shared::(?:cta|cluster)\.global(?:\.tile)?"
    r"\.mbarrier::complete_tx::bytes"
)


@instruction(_LOAD + r"(\.multicast::cluster)?")
def _tensor_load(i: Instruction, code: Code, rank: str, multicast: str | None) -> Execute:
    address, tensor = addresses(i.operands[0], code), _tensor(i.operands[1], rank, code)
    where, mask = addresses(i.operands[2], code), None
    if multicast:
        mask = value(i.operands[3], 16, code)
    elif len(i.operands) > 3:
        raise ValueError("three operands expected")

    def run(w: Warp) -> None:
        cluster = w.cta.cluster
        for lane in np.flatnonzero(w.mask):
            tensor_map, start = tensor(w, int(lane))
            source, exists = tensor_map.global_addresses(start)
            cta, to = cluster.cta_at(int(address(w)[lane]), w.cta)
            ctas = [cta]
            if mask is not None:
                bits = int(mask(w)[lane])
                if bits >> len(cluster.ctas) or not bits:
                    raise MemoryFault(f"multicast to {bits:#b} in a cluster of {len(cluster.ctas)}")
                ctas = [cta for cta in cluster.ctas if bits >> cta.rank & 1]
            for cta in ctas:
                cta.check_running()
                offsets = _box_offsets(cta, to, tensor_map)
                barrier = signalled(w, cta, int(where(w)[lane]))
                copy = _signalling(w, barrier)
                cta.shared.start_write(copy, offsets)
                _start_load(w, i, cta, offsets, source, exists, barrier, copy)

    return run


def _start_load(
    w: Warp,
    i: Instruction,
    cta: CTA,
    offsets: np.ndarray,
    source: np.ndarray,
    exists: np.ndarray,
    barrier: MBarrier,
    copy: Copy,
) -> None:
    def finish() -> None:
        contents = np.zeros(offsets.shape, np.uint8)
        if exists.any():
            contents[exists] = w.machine.memory.read_bytes(copy, source[exists])
        cta.shared.end_write(offsets, contents)
        barrier.received(contents.size)

    w.cta.cluster.start(f"TMA load of {w.actor.name}, line {i.line}", finish)


@instruction(r"cp\.async\.bulk\.tensor\.([1-5])d\.global\.shared::cta(?:\.tile)?\.bulk_group")
def _tensor_store(i: Instruction, code: Code, rank: str) -> Execute:
    source, tensor = addresses(i.operands[1], code), _tensor(i.operands[0], rank, code)

    def run(w: Warp) -> None:
        for lane in np.flatnonzero(w.mask):
            tensor_map, start = tensor(w, int(lane))
            to, exists = tensor_map.global_addresses(start)
            offsets = _box_offsets(w.cta, int(source(w)[lane]), tensor_map)
            _start_store(w, i, int(lane), offsets, np.where(exists, to, -1))

    return run


@instruction(r"cp\.async\.bulk\.commit_group")
def _commit(i: Instruction, code: Code) -> Execute:
    def run(w: Warp) -> None:
        # A lane without copies commits an empty group: nothing to keep, as all groups of a warp are its one
        # lane's that copies.
        w.groups.append([pending for lane, pending in w.copies if w.mask[lane]])
        w.copies = [(lane, pending) for lane, pending in w.copies if not w.mask[lane]]

    return run


@instruction(r"cp\.async\.bulk\.wait_group(\.read)?")
def _wait(i: Instruction, code: Code, read: str | None) -> Execute:
    keep = immediate(i.operands[0])

    def run(w: Warp) -> Any:
        groups = w.groups[: max(0, len(w.groups) - keep)]
        must = [pending for group in groups for pending in group]
        if not all(pending.done for pending in must):
            w.wait(lambda: all(pending.done for pending in must), lambda: "its bulk stores")
            return RETRY
        for pending in must:
            assert pending.reads is not None and pending.writes is not None
            w.actor.waited(pending.reads)
            if not read:
                w.actor.waited(pending.writes)
            pending.waited = True
        if not read:
            w.groups = w.groups[len(groups) :]
        return None

    return run
