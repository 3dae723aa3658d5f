"""The page pool: reference counts, the prefix cache, eviction."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from atom_jax.engine.pages import NO_PAGE, PagePool, extend_hashes

PAGE = 4


def hashes(tokens: list[int]) -> list[bytes]:
    out: list[bytes] = []
    extend_hashes(out, tokens, PAGE)
    return out


def test_a_hash_stands_for_the_whole_prefix() -> None:
    one, other = hashes([1, 2, 3, 4, 5, 6, 7, 8, 9]), hashes([0, 2, 3, 4, 5, 6, 7, 8])
    assert len(one) == len(other) == 2  # full pages only
    assert not set(one) & set(other)  # the second pages hold the same tokens
    assert hashes([1, 2, 3, 4, 5, 6, 7, 0])[0] == one[0]


def test_hashes_extended_bit_by_bit_are_those_of_the_whole() -> None:
    tokens = list(range(23))
    grown: list[bytes] = []
    for length in range(24):
        extend_hashes(grown, tokens[:length], PAGE)
    assert grown == hashes(tokens)


def test_what_is_released_is_found_again_and_evicted_last_page_first() -> None:
    pool, digests = PagePool(3), hashes(list(range(12)))
    pages = pool.allocate(3)
    for page, digest in zip(pages, digests, strict=True):
        pool.publish(page, digest)
    pool.release(pages)
    assert pool.available == 3
    assert pool.match(digests) == pages
    assert pool.allocate(1) == [pages[2]]  # a prefix is of use without its end
    assert pool.match(digests) == pages[:2]


def test_the_least_recently_used_prefix_is_evicted() -> None:
    pool, old, new = PagePool(2), hashes([1] * PAGE), hashes([2] * PAGE)
    for digest in (old[0], new[0]):
        (page,) = pool.allocate(1)
        pool.publish(page, digest)
        pool.release([page])
    pool.take(pool.match(old))  # used again: now the other one is the older
    pool.release(pool.match(old))
    pool.allocate(1)
    assert pool.match(old) and not pool.match(new)


def test_a_shared_page_is_free_when_its_last_user_is_gone() -> None:
    pool, digests = PagePool(2), hashes([1] * PAGE)
    pages = pool.allocate(1)
    pool.publish(pages[0], digests[0])
    pool.take(pages)
    pool.release(pages)
    assert pool.available == 1 and pool.users(pages[0]) == 1
    pool.release(pages)
    assert pool.available == 2


def test_of_two_pages_that_hold_the_same_one_is_known() -> None:
    pool, digests = PagePool(2), hashes([1] * PAGE)
    first, second = pool.allocate(2)
    pool.publish(first, digests[0])
    pool.publish(second, digests[0])
    pool.release([first, second])
    assert pool.match(digests) == [first]
    assert pool.allocate(1) == [second]  # free, not cached


@hypothesis.given(
    known=st.lists(st.booleans(), max_size=12),
    in_sight=st.one_of(st.none(), st.integers(1, 13)),
    unit=st.integers(1, 4),
)
def test_the_longest_prefix_whose_pages_in_sight_are_known(
    known: list[bool], in_sight: int | None, unit: int
) -> None:
    digests = hashes(list(range(PAGE * len(known))))
    pool = PagePool(max(len(known), 1))
    pages = pool.allocate(len(known))
    for page, digest, there in zip(pages, digests, known, strict=True):
        if there:
            pool.publish(page, digest)

    def first_seen(length: int) -> int:
        return 0 if in_sight is None else max(length - in_sight, 0)

    lengths = [n for n in range(0, len(known) + 1, unit) if all(known[first_seen(n) : n])]
    longest = max(lengths)
    first = first_seen(longest)
    assert pool.match(digests, in_sight=in_sight, unit=unit) == [NO_PAGE] * first + pages[first:longest]


def test_more_than_there_is() -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="3 pages wanted, 2 available"):
        pool.allocate(3)
    assert pool.available == 2


@hypothesis.given(st.integers(0, 2**32), st.integers(1, 12))
def test_no_page_is_lost_or_given_twice(seed: int, num_pages: int) -> None:
    rng = np.random.default_rng(seed)
    pool, held = PagePool(num_pages), []
    for _ in range(200):
        if held and rng.random() < 0.5:
            pages, _ = held.pop(rng.integers(len(held)))
            pool.release(pages)
        else:
            tokens = [int(rng.integers(2)) for _ in range(PAGE * int(rng.integers(1, 4)))]
            digests = hashes(tokens)
            found = pool.match(digests)
            needed = len(digests) - len(found)
            if needed + pool.unused(found) > pool.available:
                continue
            pool.take(found)
            pages = found + pool.allocate(needed)
            for page, digest in zip(pages, digests, strict=True):
                pool.publish(page, digest)
            held.append((pages, digests))
        users = [sum(page in pages for pages, _ in held) for page in range(num_pages)]
        assert users == [pool.users(page) for page in range(num_pages)]
        assert pool.available == users.count(0)
    for _, digests in held:  # what is in use is never evicted
        assert len(pool.match(digests)) == len(digests)
