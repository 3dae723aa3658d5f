"""What one step computes: who decodes, which chunks are prefilled, who loses its pages. No device here.

First come, first served: every running sequence arrived before every waiting one. Decoding goes before
prefill; when pages run out, the sequence that arrived last gives up its own and waits at the head of the
queue, to be computed again.

A step may be planned before the tokens of the step before it are known: they are on the device, which is
where the next step wants them. Only what the host alone can know comes late: that an answer has ended. Its
sequence may then be in a step that was dispatched already; that step writes to a page that is free by now.
It does no harm, because programs run in the order of dispatch, each on the pages that the one before
returned: whoever gets the page next overwrites it later.

Where every layer has a sliding window, a sequence gives back the pages before the window of its next query,
and takes those of its prompt chunk by chunk. A program of the same step may write to what was given back:
those that read it were dispatched before.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterator, Set

from atom_jax.engine.buckets import Buckets
from atom_jax.engine.pages import NO_PAGE, PagePool, extend_hashes
from atom_jax.engine.requests import SequenceState


@dataclasses.dataclass(frozen=True)
class Piece:
    """A row of a program: the tokens of ``sequence`` at ``start`` and the ``count - 1`` positions after it.

    Attributes:
      chooses: whether the token after them is new. If not, it is known (or not the sequence's next).
      index: of that token in the answer.
    """

    sequence: SequenceState
    start: int
    count: int
    chooses: bool
    index: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step: at most one program that decodes and one that prefills."""

    decode: tuple[Piece, ...]
    prefill: tuple[Piece, ...]

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """All rows."""
        return self.decode + self.prefill


def most_pages(window: int, tokens: int, page_size: int) -> int:
    """Pages that a sequence has at a time, at most, where a query sees ``window`` positions.

    Args:
      tokens: that a step computes of the sequence.
    """
    positions = window - 1 + tokens
    return -(-(positions - 1) // page_size) + 1  # wherever in a page they begin


class Scheduler:
    """The queue, the running sequences and their pages.

    Args:
      window: how many of the last positions a query sees in any layer; None where a layer sees all.
    """

    def __init__(
        self,
        *,
        num_pages: int,
        page_size: int,
        max_num_seqs: int,
        buckets: Buckets,
        window: int | None = None,
        prefix_caching: bool = True,
        deterministic: bool = False,
    ) -> None:
        self.pool = PagePool(num_pages)
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []  # in order of arrival, like the queue
        self.preemptions = 0
        self._page_size = page_size
        self._buckets = buckets
        self._window = window
        self._prefix_caching = prefix_caching
        self._deterministic = deterministic
        self._slots = list(range(max_num_seqs - 1, -1, -1))

    def pages(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self._page_size)

    def add(self, sequence: SequenceState) -> None:
        """Queues a sequence; those that arrive later must have a higher ``arrival``."""
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Ends a sequence, wherever it is; what its full pages hold stays known."""
        sequence.ended = True
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._publish(sequence)
            self._vacate(sequence)

    def receive(self, sequence: SequenceState, token: int) -> None:
        """Tells what a piece that ``chooses`` has chosen."""
        sequence.in_flight -= 1
        sequence.tokens.append(token)

    def schedule(self) -> Plan:
        """The next step. The state is then as if it had run already."""
        decode = tuple(self._decode())
        plan = Plan(decode, tuple(self._prefill({piece.sequence for piece in decode})))
        for piece in plan.pieces:
            self._publish(piece.sequence)
        return plan

    def _decode(self) -> Iterator[Piece]:
        for sequence in list(self.running):  # oldest first: who is preempted has not had its turn
            started = sequence.slot >= 0 and sequence.computed >= sequence.prefill_until
            wanted = sequence.generated < sequence.params.max_new_tokens
            if started and wanted and self._grow(sequence, 1, frozenset()):
                yield self._advance(sequence, 1)

    def _grow(self, sequence: SequenceState, count: int, planned: Set[SequenceState]) -> bool:
        """Sees to pages for the next ``count`` positions; False if the sequence must wait for them.

        The sequence that arrived last gives up its own: this one, maybe, but none of ``planned``.
        """
        self._give_back(sequence)
        while (missing := self.pages(sequence.computed + count) - len(sequence.pages)) > 0:
            if missing <= self.pool.available:
                sequence.pages += self.pool.allocate(missing)
                break
            victim = self.running[-1]
            if victim in planned:
                return False
            self._vacate(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        return True

    def _give_back(self, sequence: SequenceState) -> None:
        """Releases the pages that neither the next query of the sequence nor any later one sees."""
        if self._window is None:
            return
        seen = max(sequence.computed + 1 - self._window, 0) // self._page_size
        if seen > sequence.out_of_sight:
            self.pool.release(sequence.pages[sequence.out_of_sight : seen])
            sequence.pages[:seen] = [NO_PAGE] * seen
            sequence.out_of_sight = seen

    def _prefill(self, decoding: Set[SequenceState]) -> Iterator[Piece]:
        """Chunks of the oldest prompts that are not computed yet, as many as share a program."""
        begun = deque(sequence for sequence in self.running if sequence.computed < sequence.prefill_until)
        rows = width = 0
        while rows == 0 or rows < self._buckets.prefill_rows(width):
            if begun:
                sequence, found = begun.popleft(), None
                if sequence.slot < 0:  # an older one has taken its pages just now
                    continue
                start, until = sequence.computed, sequence.prefill_until
            elif self._head_may_start():
                sequence = self.waiting[0]
                found = self._match(sequence)
                start, until = len(found) * self._page_size, self._prefill_end(sequence)
            else:
                return
            # Cut at the same places whatever the start, so that whole chunks stay whole.
            count = min(until, (start // self._buckets.chunk + 1) * self._buckets.chunk) - start
            if rows == 0:
                width = self._buckets.width(count)
            elif count > width:
                return
            if found is not None:
                self._admit(sequence, found)
            if not self._grow(sequence, until - start if self._window is None else count, decoding):
                return
            rows += 1
            yield self._advance(sequence, count)

    def _head_may_start(self) -> bool:
        """Whether there is room for the head of the queue."""
        # The tokens of one that was preempted may be on the device still; they come with the next results.
        if not self.waiting or not self._slots or self.waiting[0].in_flight:
            return False
        head = self.waiting[0]
        found = self._match(head)
        held = _held(found)
        needed = self._needed(self._prefill_end(head), len(found), len(held)) + self.pool.unused(held)
        # What the chunks of others will take, and a page for each running sequence, is left: to admit and
        # preempt in turn would compute for nothing.
        left = len(self.running)
        for sequence in self.running:
            if sequence.computed < sequence.prefill_until:
                blocks = len(sequence.pages)
                left += self._needed(sequence.prefill_until, blocks, blocks - sequence.out_of_sight)
        return needed + left <= self.pool.available

    def _needed(self, until: int, blocks: int, held: int) -> int:
        """Pages that a prompt takes after its first ``blocks``, of which it holds ``held``."""
        needed = self.pages(until) - blocks
        if self._window is None:
            return needed
        return min(needed, max(most_pages(self._window, self._buckets.chunk, self._page_size) - held, 0))

    def _admit(self, sequence: SequenceState, found: list[int]) -> None:
        """Gives the head of the queue its slot and the pages that were found."""
        self.waiting.popleft()
        self.running.append(sequence)
        self.pool.take(_held(found))
        sequence.prefill_until = self._prefill_end(sequence)
        sequence.pages = found
        sequence.out_of_sight = len(found) - len(_held(found))
        sequence.slot = self._slots.pop()
        sequence.computed = len(found) * self._page_size
        sequence.published = len(found)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed

    def _prefill_end(self, sequence: SequenceState) -> int:
        """Where chunks end. An answer that is computed again is part of the prompt, unless bits count."""
        return sequence.prompt_tokens if self._deterministic else len(sequence.tokens)

    def _match(self, sequence: SequenceState) -> list[int]:
        """Cached pages of the sequence's beginning, NO_PAGE for those that the next query does not see.

        The last token is computed always, for its logits.
        """
        if not self._prefix_caching:
            return []
        extend_hashes(sequence.hashes, sequence.tokens, self._page_size)
        hashes = sequence.hashes[: (self._prefill_end(sequence) - 1) // self._page_size]
        in_sight = None if self._window is None else max(self.pages(self._window - 1), 1)
        return self.pool.match(hashes, in_sight=in_sight, unit=self._cache_unit)

    @property
    def _cache_unit(self) -> int:
        """Pages that are cached together: with whole chunks, who finds them cuts its prompt where all do."""
        return self._buckets.chunk // self._page_size if self._deterministic else 1

    def _publish(self, sequence: SequenceState) -> None:
        """Lets others use the full pages whose tokens are known and computed (or dispatched to be)."""
        if not self._prefix_caching:
            return
        known = sequence.prompt_tokens if self._deterministic else len(sequence.tokens)
        unit = self._cache_unit
        full = min(sequence.computed, known) // (unit * self._page_size) * unit
        if full > sequence.published:
            extend_hashes(sequence.hashes, sequence.tokens, self._page_size)
            for block in range(max(sequence.published, sequence.out_of_sight), full):
                self.pool.publish(sequence.pages[block], sequence.hashes[block])
            sequence.published = full

    def _advance(self, sequence: SequenceState, count: int) -> Piece:
        start = sequence.computed
        sequence.computed += count
        chooses = sequence.computed == sequence.total
        index = sequence.computed - sequence.prompt_tokens
        sequence.in_flight += chooses
        return Piece(sequence, start, count, chooses, index)

    def _vacate(self, sequence: SequenceState) -> None:
        """Takes a running sequence's pages and slot."""
        self.running.remove(sequence)
        self.pool.release(_held(sequence.pages))
        self._slots.append(sequence.slot)
        sequence.pages = []
        sequence.out_of_sight = 0
        sequence.slot = -1
        sequence.computed = 0


def _held(pages: list[int]) -> list[int]:
    """Those that are in sight."""
    return [page for page in pages if page != NO_PAGE]
