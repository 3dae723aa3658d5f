"""Which sequences use which pages of the cache, and what the pages of ended requests still hold.

A page is in one of three states:

* *used*: by one or more sequences; their number is its reference count;
* *cached*: no sequence uses it, but the hash of its contents is known, and a prompt that begins with the same
  tokens may use it again;
* *free*.

A full page never changes, because a sequence only appends tokens, and a page is published to other sequences
only after all its positions were filled. So sequences can share a page without a copy.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

# In a list of a sequence's pages, this stands for a page that no query sees any more (sliding windows).
NO_PAGE = -1


def extend_hashes(hashes: list[bytes], tokens: Sequence[int], page_size: int) -> None:
    """Appends to ``hashes`` the missing hashes of the full pages of ``tokens``.

    The hash of a page is computed from the page's tokens and the hash of the page before it. So it stands for
    all tokens from the beginning of the sequence to the end of the page.
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
        # Unused pages with a hash, the least recently used one first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Number of pages that ``allocate`` can give."""
        return len(self._free) + len(self._cached)

    def users(self, page: int) -> int:
        """How many sequences use the page."""
        return self._users[page]

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages, which then have one user each.

        Free pages are taken first, then cached ones, the least recently used first.

        Raises:
          ValueError: ``count`` is more than ``available``.
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
        """Finds the longest prefix of a sequence whose pages are cached or used. Does not take the pages.

        Args:
          hashes: of the sequence's pages, in order.
          in_sight: how many pages before a position its query sees, at least 1 (sliding windows). Only this
            many pages at the end of the prefix must exist. None: a query sees all pages.
          unit: the number of pages of the prefix is a multiple of this.

        Returns:
          The pages of the prefix, NO_PAGE for those that are not needed.
        """
        known = longest = 0
        for number, digest in enumerate(hashes, start=1):
            known = known + 1 if digest in self._page_of else 0  # known pages in a row, this one the last
            wanted = number if in_sight is None else min(number, in_sight)
            if known >= wanted and number % unit == 0:
                longest = number
        first = 0 if in_sight is None else max(longest - in_sight, 0)
        return [NO_PAGE] * first + [self._page_of[digest] for digest in hashes[first:longest]]

    def unused(self, pages: Iterable[int]) -> int:
        """How many of ``pages`` no sequence uses. If they are taken, ``available`` shrinks by this number."""
        return sum(self._users[page] == 0 for page in pages)

    def take(self, pages: Iterable[int]) -> None:
        """Adds a user to each page that ``match`` found."""
        for page in pages:
            if self._users[page] == 0:
                del self._cached[page]
            self._users[page] += 1

    def publish(self, page: int, digest: bytes) -> None:
        """Lets other sequences find a full page. If another page with this hash is known, nothing changes."""
        if digest not in self._page_of:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def release(self, pages: Sequence[int]) -> None:
        """Removes a user from each of a sequence's pages, which are given in order of positions.

        The last page of a sequence will be evicted first: the pages before it are useful without it, but it
        is of no use without them.
        """
        for page in reversed(pages):
            self._users[page] -= 1
            if self._users[page]:
                continue
            if page in self._hash_of:
                self._cached[page] = None
            else:
                self._free.append(page)
