"""Happens-before of accesses to memory: finds races whatever the order in which warps happen to run.

Every warp has a vector clock: how much it has been told, by barriers, of what each other warp did and of the
phases of each mbarrier. An ``Event`` is a number for "this warp (or mbarrier) at this time". A byte remembers
the event of its last write and of each warp's last read. An access is a race if it conflicts with one its
warp was not told of. Warps of different clusters are never told of each other.

Lanes of one warp know of each other what they did before the last instruction that all of them executed
together (``.sync``). Clocks are those of whole warps: that one lane waits for an mbarrier in place of the
others, or arrives for them, is taken for enough. Writing the value that is there already is no conflict:
replicated layouts do that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NoReturn

import numpy as np

from tests.pallas_kernels.ptx.errors import Race

# When what nobody has waited for was done.
NEVER = 2**31 - 1
# Mbarriers of a CTA at most.
_MBARRIERS = 64
# In place of a lane: several.
_MANY = 255


class Events:
    """Who did something (a component of the clocks) and when, by number; 0 is what the host did before."""

    def __init__(self) -> None:
        self.owner, self.time = np.zeros(1024, np.int32), np.zeros(1024, np.int32)
        self.count = 1
        self.cluster_start = 1  # the first of the cluster that runs now

    def new(self, owner: int, time: int) -> int:
        if self.count == len(self.owner):
            self.owner, self.time = (np.concatenate([x, np.zeros_like(x)]) for x in (self.owner, self.time))
        self.owner[self.count], self.time[self.count] = owner, time
        self.count += 1
        return self.count - 1


class Clocks:
    """The components of a cluster's clocks: its warps, then its mbarriers.

    A clock has them twice: what is known of accesses, then what is known of the initialization of mbarriers,
    which ``fence.mbarrier_init`` and a relaxed barrier of the cluster tell of and nothing else.
    """

    def __init__(self, ctas: int, warps: int):
        self.components = ctas * (warps + _MBARRIERS)
        self._next = ctas * warps

    def zero(self) -> np.ndarray:
        return np.zeros(2 * self.components, np.int32)

    def of_mbarrier(self) -> int:
        if self._next == self.components:
            raise Race(f"more than {_MBARRIERS} mbarriers in a CTA: no clocks for them")
        self._next += 1
        return self._next - 1


class Actor:
    """A warp, as far as accesses to memory go: its clock, and the event of what it does now."""

    asynchronous = False

    def __init__(self, component: int, clocks: Clocks, events: Events, name: str):
        self.component, self.name = component, name
        self._clocks, self._events = clocks, events
        self.clock = clocks.zero()
        self.clock[component] = 1
        self.synced_at = events.count  # its events from here on are not known to its other lanes
        self._event = 0

    @property
    def event(self) -> int:
        if not self._event:
            self._event = self._events.new(self.component, int(self.clock[self.component]))
        return self._event

    def sync_lanes(self) -> None:
        """The lanes know of each other's accesses."""
        self.synced_at, self._event = self._events.count, 0

    def release(self, into: np.ndarray) -> None:
        """Tells those who acquire ``into`` of everything until now."""
        np.maximum(into, self.clock, out=into)
        self.advance()

    def acquire(self, clock: np.ndarray) -> None:
        np.maximum(self.clock, clock, out=self.clock)

    def advance(self) -> None:
        self.clock[self.component] += 1
        self._event = 0

    def fence_inits(self) -> None:
        """From now on ``release_inits`` tells of the mbarriers known to be initialized."""
        half = self._clocks.components
        np.maximum(self.clock[half:], self.clock[:half], out=self.clock[half:])
        self.advance()

    def release_inits(self, into: np.ndarray) -> None:
        """Tells of initialized mbarriers and of nothing else."""
        half = self._clocks.components
        np.maximum(into[half:], self.clock[half:], out=into[half:])

    def knows_init(self, component: int, time: int) -> bool:
        half = self._clocks.components
        return bool(self.clock[component] >= time or self.clock[half + component] >= time)

    def copy(self, event: int | None = None) -> Copy:
        """A copy that it starts now; ``event`` tells that it is done, or ``waited``."""
        event = self._events.new(self.component, NEVER) if event is None else event
        return Copy(self.clock.copy(), event, self.component, self.synced_at, f"a copy of {self.name}")

    def waited(self, copy: Copy) -> None:
        """It knows that ``copy`` is done, and may tell."""
        self._events.time[copy.event] = self.clock[self.component]


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """Asynchronous accesses: what was known when they started, and the event by which others know of them."""

    clock: np.ndarray
    event: int
    component: int
    synced_at: int
    name: str

    @property
    def asynchronous(self) -> bool:
        return True


@dataclasses.dataclass(slots=True)
class Place:
    """Aligned pieces of memory: ``units[i]`` numbers one of ``size`` bytes, which ``lanes[i]`` accesses."""

    size: int
    units: np.ndarray
    lanes: np.ndarray | None = None

    def of(self, array: np.ndarray) -> np.ndarray:
        """[units, size] elements of ``array``, one per byte of memory."""
        return array.reshape(-1, self.size)[self.units]

    def remember_lanes(self, array: np.ndarray, recent: np.ndarray | None) -> None:
        """Writes ``lanes`` into ``array``; _MANY where two lanes meet, or ``recent`` ones of another lane."""
        assert self.lanes is not None
        lanes, rows = self.lanes[:, None], array.reshape(-1, self.size)
        met = None if recent is None else recent & (rows[self.units] != lanes)
        rows[self.units] = lanes
        several = rows[self.units] != lanes
        if met is not None:
            several |= met
        if several.any():
            array[(self.units[:, None] * self.size + np.arange(self.size))[several]] = _MANY

    def offset(self, wrong: np.ndarray) -> int:
        """Of the first byte of ``wrong`` [units, size]."""
        at, byte = np.argwhere(wrong.reshape(len(self.units), self.size))[0]
        return int(self.units[at]) * self.size + int(byte)


class Shadow:
    """Last accesses to each byte of a memory.

    Args:
      size: bytes, a multiple of 16.
      readers: components of the warps that may read it by themselves, [first, end).
      where: turns an offset into words.
      name_of: turns an event into words.
    """

    def __init__(
        self,
        size: int,
        readers: tuple[int, int],
        events: Events,
        where: Callable[[int], str],
        name_of: Callable[[int], str],
    ):
        self.first, self.end = readers
        self.events, self.where, self.name_of = events, where, name_of
        self.write, self.write_lane = np.zeros(size, np.int32), np.zeros(size, np.uint8)
        # A row for each reader, one for its copies each, one for all other copies.
        self.reads: np.ndarray | None = None
        self.read_lanes = np.zeros((0, size), np.uint8)
        self.foreign_reads: np.ndarray | None = None  # by clusters before

    def on_read(self, by: Actor | Copy, place: Place) -> None:
        ids = place.of(self.write)
        if ids.any():
            owners = self.events.owner[ids]
            told = self._told(by, ids, owners)
            if not told.all():
                self._race(place, ~told, ids, by, "reads", "written by")
            if place.lanes is not None:
                recent = (ids >= by.synced_at) & (owners == by.component)
                if recent.any():
                    lane = place.of(self.write_lane)
                    wrong = recent & (lane != place.lanes[:, None]) & (lane != _MANY)
                    if wrong.any():
                        self._lanes(place, wrong, lane, by, "reads", "written by")
        self._remember_read(by, place)

    def _remember_read(self, by: Actor | Copy, place: Place) -> None:
        readers = self.end - self.first
        if self.reads is None:
            self.reads = np.zeros((2 * readers + 1, len(self.write)), np.int32)
            self.read_lanes = np.zeros((readers, len(self.write)), np.uint8)
        row = by.component - self.first
        if not 0 <= row < readers:
            row = 2 * readers
        elif by.asynchronous:
            row += readers
        reads = self.reads[row]
        if place.lanes is not None and row < readers:
            recent = place.of(reads) >= by.synced_at
            place.remember_lanes(self.read_lanes[row], recent if recent.any() else None)
        reads.reshape(-1, place.size)[place.units] = by.event

    def on_write(self, by: Actor | Copy, place: Place, changed: np.ndarray | None = None) -> None:
        """Checks and remembers a write.

        Args:
          changed: [units, size] bytes whose value is another than before; None: all.
        """
        ids = place.of(self.write)
        changed = np.ones(ids.shape, bool) if changed is None else changed
        same_warp = None
        if ids.any():
            owners = self.events.owner[ids]
            wrong = changed & ~self._told(by, ids, owners)
            if wrong.any():
                self._race(place, wrong, ids, by, "overwrites", "written by")
            if place.lanes is not None:
                recent = (ids >= by.synced_at) & (owners == by.component)
                if recent.any():
                    same_warp = recent
                    lane = place.of(self.write_lane)
                    wrong = recent & changed & (lane != place.lanes[:, None])
                    if wrong.any():
                        self._lanes(place, wrong, lane, by, "overwrites", "written by")
        if self.reads is not None and changed.any():
            self._check_reads(by, place, changed)
        if place.lanes is not None:
            place.remember_lanes(self.write_lane, same_warp)
        self.write.reshape(-1, place.size)[place.units] = by.event

    def _told(self, by: Actor | Copy, ids: np.ndarray, owners: np.ndarray) -> np.ndarray:
        told = by.clock[owners] >= self.events.time[ids]
        if self.events.cluster_start > 1:
            told &= (ids >= self.events.cluster_start) | (ids == 0)
        return told

    def _check_reads(self, by: Actor | Copy, place: Place, changed: np.ndarray) -> None:
        assert self.reads is not None
        if self.foreign_reads is not None and (wrong := changed & place.of(self.foreign_reads)).any():
            raise Race(f"{by.name} overwrites {self.where(place.offset(wrong))}, read by another cluster")
        ids = self.reads.reshape(len(self.reads), -1, place.size)[:, place.units]
        if not ids.any():
            return
        # What it read itself is told to it, but for copies it has not waited for.
        wrong = changed & (by.clock[self.events.owner[ids]] < self.events.time[ids])
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            self._race(place, wrong[row], ids[row], by, "overwrites", "read by")
        row = by.component - self.first
        if place.lanes is not None and 0 <= row < self.end - self.first:
            recent = changed & (ids[row] >= by.synced_at)
            if recent.any():
                lane = place.of(self.read_lanes[row])
                recent &= lane != place.lanes[:, None]
                if recent.any():
                    self._lanes(place, recent, lane, by, "overwrites", "read by")

    def next_cluster(self) -> None:
        """What was read until now was read by another cluster."""
        if self.reads is not None:
            read = (self.reads != 0).any(0)
            self.foreign_reads = read if self.foreign_reads is None else self.foreign_reads | read
            self.reads[:] = 0

    def _race(
        self, place: Place, wrong: np.ndarray, ids: np.ndarray, by: Actor | Copy, verb: str, other: str
    ) -> NoReturn:
        event = int(ids.reshape(wrong.shape)[tuple(np.argwhere(wrong)[0])])
        where = self.where(place.offset(wrong))
        raise Race(f"{by.name} {verb} {where}, {other} {self.name_of(event)}, with no barrier between")

    def _lanes(
        self, place: Place, wrong: np.ndarray, lane: Any, by: Actor | Copy, verb: str, other: str
    ) -> NoReturn:
        at = tuple(np.argwhere(wrong)[0])
        assert place.lanes is not None
        who = "another lane" if lane[at] == _MANY else f"lane {lane[at]}"
        where = self.where(place.offset(wrong))
        raise Race(
            f"lane {place.lanes[at[0]]} of {by.name} {verb} {where}, {other} {who} with no .sync between"
        )
