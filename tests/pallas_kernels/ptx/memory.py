"""Memory with a shadow: what was written, by whom it may be read, and what is on its way.

Global memory is a set of buffers with nothing between them. Shared memory belongs to a CTA; ``flags`` and
``readers`` are its shadow, a byte for each byte, beside the clocks of ``races``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tests.pallas_kernels.ptx.errors import MemoryFault, Race
from tests.pallas_kernels.ptx.races import Actor, Copy, Events, Place, Shadow

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# Flags of a byte of shared memory.
WRITTEN, UNFENCED, IN_FLIGHT, BARRIER = 1, 2, 4, 8
_NOT_PLAIN = WRITTEN | IN_FLIGHT | BARRIER
# Addresses: the number of a buffer above, a multiple of what XLA aligns to below.
_BUFFER_BITS, _FIRST = 36, 256
# The system keeps the first KB of shared memory; a shared::cluster address has the CTA's rank + 1 above.
SHARED_BASE, RANK_BITS = 1024, 24


def _repeat(flag: int, size: int) -> int:
    return int.from_bytes(bytes([flag] * size), "little")


def _padded(size: int) -> int:
    return -(-size // 16) * 16


class Buffer:
    """An array in global memory.

    Args:
      content: its bytes before the launch; None: ``size`` bytes of ``fill`` that nobody wrote.
      writable: the kernel may write it.
    """

    def __init__(
        self, name: str, base: int, content: np.ndarray | None, size: int, writable: bool, fill: int = 0xFF
    ):
        self.name, self.base, self.size, self.writable = name, base, size, writable
        self.data = np.full(_padded(size), fill, np.uint8)
        self.written = np.zeros_like(self.data)
        if content is not None:
            self.data[:size] = content.reshape(-1).view(np.uint8)
            self.written[:size] = 1
        self.shadow: Shadow | None = None  # of what is writable, once the machine is there


class Global:
    """Buffers at addresses of their own."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def add(
        self, name: str, content: np.ndarray | None, size: int, writable: bool, fill: int = 0xFF
    ) -> Buffer:
        base = (len(self.buffers) + 1 << _BUFFER_BITS) + _FIRST
        self.buffers.append(Buffer(name, base, content, size, writable, fill))
        return self.buffers[-1]

    def watch(self, readers: tuple[int, int], events: Events, name_of: Callable[[int], str]) -> None:
        """Looks for races from here on."""
        for buffer in self.buffers:
            if buffer.writable:

                def where(offset: int, name: str = buffer.name) -> str:
                    return f"byte {offset:#x} of {name}"

                buffer.shadow = Shadow(len(buffer.data), readers, events, where, name_of)

    def next_cluster(self) -> None:
        for buffer in self.buffers:
            if buffer.shadow is not None:
                buffer.shadow.next_cluster()

    def at(self, addresses: np.ndarray, size: int, align: int) -> tuple[Buffer, np.ndarray]:
        """The one buffer that all addresses are in, and the offsets."""
        number = int(addresses[0]) >> _BUFFER_BITS
        if not 1 <= number <= len(self.buffers):
            raise MemoryFault(f"global address {int(addresses[0]):#x} is in no buffer")
        buffer = self.buffers[number - 1]
        offsets = addresses.astype(np.int64) - buffer.base
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + size > buffer.size:
            raise MemoryFault(
                f"out of bounds: bytes {low}..{high + size} of {buffer.name}, of {buffer.size} bytes"
            )
        if (offsets & (align - 1)).any():
            bad = int(offsets[(offsets & (align - 1)) != 0][0])
            raise MemoryFault(f"an access of {align} bytes to {buffer.name} is misaligned, at {bad:#x}")
        return buffer, offsets

    def load(
        self, by: Actor | Copy | None, addresses: np.ndarray, lanes: np.ndarray | None, width: int, count: int
    ) -> np.ndarray:
        """[addresses, count] numbers of ``width`` bytes; ``by`` None: looks for no races."""
        size = width * count
        buffer, offsets = self.at(addresses, size, size)
        place = Place(size, offsets // size, lanes)
        if not place.of(buffer.written).all():
            raise MemoryFault(f"{buffer.name}: read of global memory that nobody wrote")
        if buffer.shadow is not None and by is not None:
            buffer.shadow.on_read(by, place)
        return place.of(buffer.data).view(UNSIGNED[width])

    def store(
        self, by: Actor | Copy, addresses: np.ndarray, lanes: np.ndarray | None, values: np.ndarray
    ) -> None:
        """Args:
        values: [addresses, count].
        """
        size = values.shape[1] * values.dtype.itemsize
        buffer, offsets = self.at(addresses, size, size)
        if not buffer.writable:
            raise MemoryFault(f"{buffer.name}: a store to an input")
        place, raw = Place(size, offsets // size, lanes), np.ascontiguousarray(values).view(np.uint8)
        changed = (place.of(buffer.data) != raw) | (place.of(buffer.written) == 0)
        buffer.data.reshape(-1, size)[place.units] = raw
        if (place.of(buffer.data) != raw).any():
            raise Race(f"lanes of {by.name} write different values to one address of {buffer.name}")
        if buffer.shadow is not None:
            buffer.shadow.on_write(by, place, changed)
        buffer.written.reshape(-1, size)[place.units] = 1

    def read_bytes(self, by: Actor | Copy, addresses: np.ndarray) -> np.ndarray:
        """By a copy."""
        return self.load(by, addresses.reshape(-1), None, 1, 1).reshape(addresses.shape)

    def write_bytes(self, by: Actor | Copy, addresses: np.ndarray, values: np.ndarray) -> None:
        """By a copy."""
        self.store(by, addresses.reshape(-1), None, values.reshape(-1, 1))


class Shared:
    """The shared memory of a CTA.

    Args:
      content: whatever was there before.
      may_be_unwritten: ordinary loads may read bytes that nobody wrote.
    """

    def __init__(self, size: int, name: str, content: np.ndarray, may_be_unwritten: bool):
        self.size, self.name, self.may_be_unwritten = size, name, may_be_unwritten
        self.data = content
        self.flags = np.zeros(len(content), np.uint8)
        self.readers = np.zeros(len(content), np.uint8)  # asynchronous reads under way
        self.shadow: Shadow

    def offsets(self, addresses: np.ndarray, size: int, align: int) -> np.ndarray:
        offsets = addresses.astype(np.int64) - SHARED_BASE
        low, high = int(offsets.min()), int(offsets.max())
        if low < 0 or high + size > self.size:
            raise MemoryFault(
                f"out of bounds: bytes {low}..{high + size} of {self.name}, of {self.size} bytes"
            )
        if align > 1 and (offsets & (align - 1)).any():
            bad = int(offsets[(offsets & (align - 1)) != 0][0])
            raise MemoryFault(f"an access of {align} bytes to {self.name} is misaligned, at {bad:#x}")
        return offsets

    def load(
        self, by: Actor | Copy, addresses: np.ndarray, lanes: np.ndarray | None, width: int, count: int
    ) -> np.ndarray:
        """[addresses, count] by ordinary instructions."""
        size = width * count
        place = Place(size, self.offsets(addresses, size, size) // size, lanes)
        flags = place.of(self.flags)
        if ((flags & _NOT_PLAIN) != WRITTEN).any() and (
            not self.may_be_unwritten or (flags & (IN_FLIGHT | BARRIER)).any()
        ):
            self._explain(place, "read")
        self.shadow.on_read(by, place)
        return place.of(self.data).view(UNSIGNED[width])

    def store(
        self, by: Actor | Copy, addresses: np.ndarray, lanes: np.ndarray | None, values: np.ndarray
    ) -> Place:
        """By ordinary instructions; returns what needs a fence before TMA or wgmma may read it."""
        size = values.shape[1] * values.dtype.itemsize
        place = Place(size, self.offsets(addresses, size, size) // size, lanes)
        flags = place.of(self.flags)
        if (flags & (IN_FLIGHT | BARRIER)).any() or place.of(self.readers).any():
            self._explain(place, "written")
        raw = np.ascontiguousarray(values).view(np.uint8)
        changed = (place.of(self.data) != raw) | ((flags & WRITTEN) == 0)
        self.data.reshape(-1, size)[place.units] = raw
        if (place.of(self.data) != raw).any():
            raise Race(f"lanes of {by.name} write different values to one address of {self.name}")
        self.shadow.on_write(by, place, changed)
        self.flags.reshape(-1, size)[place.units] = WRITTEN | UNFENCED
        return place

    def fence(self, place: Place, lanes: np.ndarray) -> None:
        """What ``lanes`` wrote at ``place`` may be read by TMA and wgmma."""
        units = place.units if place.lanes is None else place.units[np.isin(place.lanes, lanes)]
        self.flags.reshape(-1, place.size)[units] &= 255 - UNFENCED

    def start_read(self, by: Actor | Copy, offsets: np.ndarray, lane: int | None) -> np.ndarray:
        """By TMA or wgmma: the bytes must not change until ``end_read``."""
        place = _bytes(offsets, lane)
        if ((self.flags[offsets] & (_NOT_PLAIN | UNFENCED)) != WRITTEN).any():
            self._explain(place, "read asynchronously")
        self.shadow.on_read(by, place)
        self.readers[offsets] += 1
        return self.data[offsets]

    def end_read(self, offsets: np.ndarray) -> None:
        self.readers[offsets] -= 1

    def start_write(self, by: Actor | Copy, offsets: np.ndarray) -> None:
        """By a copy: nobody may touch the bytes until its mbarrier tells."""
        place = _bytes(offsets, None)
        if (self.flags[offsets] & (IN_FLIGHT | BARRIER)).any() or self.readers[offsets].any():
            self._explain(place, "written asynchronously")
        self.shadow.on_write(by, place)
        self.flags[offsets] = IN_FLIGHT

    def end_write(self, offsets: np.ndarray, values: np.ndarray) -> None:
        self.data[offsets] = values
        self.flags[offsets] = WRITTEN

    def _explain(self, place: Place, verb: str) -> None:
        flags, readers = place.of(self.flags), place.of(self.readers)
        for wrong, why in (
            (flags & IN_FLIGHT, "while an asynchronous copy into it is under way"),
            (flags & BARRIER, "where an mbarrier is"),
            (readers * (not verb.startswith("read")), "while TMA or wgmma may still read it"),
            ((flags & WRITTEN) == 0, "but nobody wrote it"),
            (flags & UNFENCED, "after an ordinary store without fence.proxy.async"),
        ):
            if wrong.any():
                raise MemoryFault(f"byte {place.offset(wrong != 0):#x} of {self.name} is {verb} {why}")
        raise MemoryFault(f"{self.name}: {verb}")


def _bytes(offsets: np.ndarray, lane: int | None) -> Place:
    flat = offsets.reshape(-1)
    return Place(1, flat, None if lane is None else np.full(len(flat), lane))
