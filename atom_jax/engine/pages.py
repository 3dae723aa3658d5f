"""Which page of the cache belongs to whom, and what the pages of ended requests still hold.

A page is in one of three states: *used* (by one or more sequences: its reference count), *cached* (unused,
but what it holds is known by its hash, and a prompt that begins alike may take it) or *free*.

A full page never changes: sequences only append, and a page is published once every position of it belongs
to the prefix that its hash stands for. Sharing needs no copies for that reason.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

# In a list of the pages of blocks: of a block that no query sees any more (a sliding window).
NO_PAGE = -1


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Appends to ``hashes`` (one for each full page) those of the pages of ``tokens`` that it lacks.

    The hash of a page covers the whole prefix: it is that of the page's tokens and of the hash before.
    """
    for end in range((len(hashes) + 1) * page_size, len(tokens) + 1, page_size):
        digest = hashlib.blake2b(hashes[-1] if hashes else b"", digest_size=16)
        digest.update(np.asarray(tokens[end - page_size : end], np.int32).tobytes())
        hashes.append(digest.digest())


class PagePool:
    """The pages 0 to ``num_pages - 1``: allocation, reference counts, the prefix cache and its eviction."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._users = [0] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._hash_of: dict[int, bytes] = {}
        self._cached: OrderedDict[int, None] = OrderedDict()  # unused pages with a hash, least recent first

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can give."""
        return len(self._free) + len(self._cached)

    def users(self, page: int) -> int:
        """How many sequences use the page."""
        return self._users[page]

    def allocate(self, count: int) -> list[int]:
        """``count`` pages with one user each; the least recently used cached ones only if none is free.

        Raises:
          ValueError: more than ``available``.
        """
        if count > self.available:
            raise ValueError(f"{count} pages wanted, {self.available} available")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                del self._page_of[self._hash_of.pop(page)]
            self._users[page] = 1
            pages.append(page)
        return pages

    def match(self, hashes: Sequence[bytes], *, in_sight: int | None = None, unit: int = 1) -> list[int]:
        """The pages of the longest prefix that is cached or in use; they are not taken yet.

        Args:
          in_sight: so many of its last pages are all that what follows sees, at least one: the others need
            not be there, and are NO_PAGE. None: it sees all.
          unit: the prefix is of a multiple of so many pages.
        """
        known = longest = 0
        for number, digest in enumerate(hashes, start=1):
            known = known + 1 if digest in self._page_of else 0  # without a gap, up to this one
            wanted = number if in_sight is None else min(number, in_sight)
            if known >= wanted and number % unit == 0:
                longest = number
        first = 0 if in_sight is None else max(longest - in_sight, 0)
        return [NO_PAGE] * first + [self._page_of[digest] for digest in hashes[first:longest]]

    def unused(self, pages: Iterable[int]) -> int:
        """How many of ``pages`` nobody uses: taking them makes so many fewer available."""
        return sum(self._users[page] == 0 for page in pages)

    def take(self, pages: Iterable[int]) -> None:
        """Adds a user to each page that ``match`` found."""
        for page in pages:
            if self._users[page] == 0:
                del self._cached[page]
            self._users[page] += 1

    def publish(self, page: int, digest: bytes) -> None:
        """Makes a full page known; one of two pages that hold the same stays private."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Takes a user from each page of a sequence, given in its order.

        The last page of a sequence is evicted first: a prefix is of use without what follows it, not the
        other way round.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._hash_of:
                self._cached[page] = None
            else:
                self._free.append(page)
