"""Plans what a step computes: which sequences decode, which prompts are prefilled, which lose their pages.

This file knows nothing of the device.

Requests are served in order of arrival: every running sequence arrived before every waiting one. Decoding
comes before prefill. When there are not enough pages, the sequence that arrived last gives up its pages
(it is preempted): it goes to the head of the queue and is computed again later.

A step may be planned before the tokens of the previous step are known to the host. They are on the device,
where the next step needs them. But the host learns only then that an answer has ended. The ended sequence may
be part of a step that is dispatched already, and that step writes to a page that is free by now. This does no
harm: programs run in the order in which they were dispatched, so the next sequence that gets the page
overwrites it afterwards.

A sequence with a grammar waits until the host knows its last token, and decodes in every second step at most.
The others do not wait for it.

If every layer has a sliding window, a sequence gives back the pages that lie before the window of its next
query, and gets the pages for its prompt chunk by chunk. Another program of the same step may write to a page
that was given back, because all programs that read its old contents were dispatched earlier.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterator, Set

from atom_jax.engine.buckets import Buckets
from atom_jax.engine.pages import NO_PAGE, PagePool, extend_hashes
from atom_jax.engine.sequence import SequenceState


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one row of a program computes: ``count`` tokens of ``sequence`` from position ``start`` on.

    Attributes:
      chooses: whether the row chooses the next new token of the sequence. False where the token after the
        piece is known already, because it belongs to the prompt or to an answer that is computed again.
      index: index in the answer of the token after the piece.
      scored: positions of the piece for which the log-probability of the prompt's next token is wanted.
    """

    sequence: SequenceState
    start: int
    count: int
    chooses: bool
    index: int
    scored: range = range(0)

    @property
    def ends_prompt(self) -> bool:
        """Whether the last token of the prompt is computed."""
        return self.start < self.sequence.prompt_tokens <= self.start + self.count


@dataclasses.dataclass(frozen=True)
class Plan:
    """A step: at most one decode program and one prefill program. Empty: no such program.

    Attributes:
      decode: the rows of the decode program.
      prefill: the rows of the prefill program.
      admitted: the sequences that were given a slot in this step. The host knows all their tokens.
    """

    decode: tuple[Piece, ...]
    prefill: tuple[Piece, ...]
    admitted: tuple[SequenceState, ...] = ()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The rows of both programs."""
        return self.decode + self.prefill


def most_pages(window: int, tokens: int, page_size: int) -> int:
    """The most pages that a sequence has at a time if every layer has a sliding window.

    Args:
      window: how many positions a query sees.
      tokens: how many tokens of the sequence a step computes.
      page_size: tokens in a page.
    """
    positions = window - 1 + tokens
    return -(-(positions - 1) // page_size) + 1  # the first position may be anywhere in its page


class Scheduler:
    """The queue, the running sequences and their pages.

    Args:
      window: how many positions a query sees in the layer that sees the most; None if a layer sees all.
      num_pages, page_size, max_num_seqs, prefix_caching, deterministic: as in ``EngineConfig``.
      buckets: the shapes of the programs.
      prefill_limit: the most tokens of prompts in a step that decodes so many sequences; one of the widths of
        prefill programs. None: always ``buckets.chunk``, as in deterministic mode.

    Attributes:
      pool: the pages.
      waiting: the queue, in order of arrival.
      running: the sequences that have a slot, in order of arrival.
      preemptions: how many times a running sequence was sent back to the queue.
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
        prefill_limit: Callable[[int], int] | None = None,
    ) -> None:
        self.pool = PagePool(num_pages)
        self.waiting: deque[SequenceState] = deque()
        self.running: list[SequenceState] = []
        self.preemptions = 0
        self._page_size = page_size
        self._buckets = buckets
        self._window = window
        self._prefix_caching = prefix_caching
        self._deterministic = deterministic
        self._prefill_limit = prefill_limit
        self._slots = list(range(max_num_seqs - 1, -1, -1))
        self._admitted: list[SequenceState] = []

    def pages(self, positions: int) -> int:
        """Number of pages that hold ``positions`` positions."""
        return -(-positions // self._page_size)

    def add(self, sequence: SequenceState) -> None:
        """Adds a sequence to the queue. Its ``arrival`` must be higher than that of all earlier ones."""
        self.waiting.append(sequence)

    def remove(self, sequence: SequenceState) -> None:
        """Ends a running or waiting sequence. The prefix cache keeps its full pages."""
        sequence.ended = True
        if sequence.slot < 0:
            self.waiting.remove(sequence)
        else:
            self._publish(sequence)
            self._vacate(sequence)

    def receive(self, sequence: SequenceState, token: int) -> None:
        """Takes the token that a dispatched piece with ``chooses`` has chosen."""
        sequence.in_flight -= 1
        sequence.tokens.append(token)

    def schedule(self) -> Plan:
        """Plans the next step. Afterwards the state of all sequences is as if the step had run already."""
        self._admitted.clear()
        decode = tuple(self._decode())
        limit = self._buckets.chunk
        if decode and self._prefill_limit is not None and not self._deterministic:
            limit = self._prefill_limit(len(decode))
        prefill = tuple(self._prefill({piece.sequence for piece in decode}, limit))
        plan = Plan(decode, prefill, tuple(each for each in self._admitted if each.slot >= 0))
        for piece in plan.pieces:
            self._publish(piece.sequence)
        return plan

    def _decode(self) -> Iterator[Piece]:
        # The oldest first. A sequence that ``_grow`` preempts comes later in the list, and has no slot then.
        for sequence in list(self.running):
            started = sequence.slot >= 0 and sequence.computed >= sequence.prefill_until
            wanted = sequence.generated < sequence.params.max_new_tokens
            if sequence.token_mask is not None and sequence.in_flight:
                continue  # which tokens may follow is known when the host knows the last one
            if started and wanted and self._grow(sequence, 1, frozenset()):
                yield self._advance(sequence, 1)

    def _grow(self, sequence: SequenceState, count: int, planned: Set[SequenceState]) -> bool:
        """Gives the sequence the pages for its next ``count`` positions.

        If there are not enough, the running sequence that arrived last is preempted; it may be this one.

        Args:
          sequence: a running one.
          count: number of positions.
          planned: sequences that are part of this step already, so they must keep their pages.

        Returns:
          False if the sequence cannot have the pages in this step.
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
        """Releases the pages that no later query of the sequence sees (sliding windows)."""
        if self._window is None:
            return
        seen = max(sequence.computed + 1 - self._window, 0) // self._page_size
        if seen > sequence.out_of_sight:
            self.pool.release(sequence.pages[sequence.out_of_sight : seen])
            sequence.pages[:seen] = [NO_PAGE] * seen
            sequence.out_of_sight = seen

    def _prefill(self, decoding: Set[SequenceState], limit: int) -> Iterator[Piece]:
        """The next chunks of the oldest prompts that are not computed yet, as many as share a program.

        Args:
          decoding: sequences that decode in this step.
          limit: the most tokens, padding included; one of the widths of prefill programs.
        """
        begun = deque(sequence for sequence in self.running if sequence.computed < sequence.prefill_until)
        rows = width = 0
        while rows == 0 or rows < min(self._buckets.prefill_rows(width), limit // width):
            if begun:
                sequence, found = begun.popleft(), None
                if sequence.slot < 0:  # it was preempted a moment ago, for an older sequence
                    continue
                start, until = sequence.computed, sequence.prefill_until
            elif self._head_may_start():
                sequence = self.waiting[0]
                found = self._match(sequence)
                start, until = len(found) * self._page_size, self._prefill_end(sequence)
            else:
                return
            # Prompts are cut at multiples of ``limit``, wherever the first uncached token is. In
            # deterministic mode the limit is always ``chunk``. So all chunks but the first are the same with
            # and without the prefix cache.
            count = min(until, (start // limit + 1) * limit) - start
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
        """Whether there are a slot and enough pages for the sequence at the head of the queue."""
        # After a preemption the host may not know the last tokens yet; they come with the next results.
        if not self.waiting or not self._slots or self.waiting[0].in_flight:
            return False
        head = self.waiting[0]
        found = self._match(head)
        held = _held(found)
        needed = self._needed(self._prefill_end(head), len(found), len(held)) + self.pool.unused(held)
        # Pages are reserved for the chunks of other prompts that are still to come, and one page for each
        # running sequence. Otherwise a sequence might be admitted and preempted again and again, and what was
        # computed of it would be lost each time.
        reserved = len(self.running)
        for sequence in self.running:
            if sequence.computed < sequence.prefill_until:
                blocks = len(sequence.pages)
                reserved += self._needed(sequence.prefill_until, blocks, blocks - sequence.out_of_sight)
        return needed + reserved <= self.pool.available

    def _needed(self, until: int, blocks: int, held: int) -> int:
        """How many more pages a prompt needs.

        Args:
          until: number of positions of the prompt.
          blocks: how many of its pages have their place in ``SequenceState.pages`` already.
          held: how many of those are real pages and not NO_PAGE.
        """
        needed = self.pages(until) - blocks
        if self._window is None:
            return needed
        return min(needed, max(most_pages(self._window, self._buckets.chunk, self._page_size) - held, 0))

    def _admit(self, sequence: SequenceState, found: list[int]) -> None:
        """Moves the head of the queue to the running sequences, with a slot and the pages ``found``."""
        self.waiting.popleft()
        self.running.append(sequence)
        self._admitted.append(sequence)
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
        """The position at which the computation in chunks ends.

        An answer that is computed again after a preemption is computed in chunks like the prompt. In
        deterministic mode it is computed token by token, as it was the first time.
        """
        return sequence.prompt_tokens if self._deterministic else len(sequence.tokens)

    def _match(self, sequence: SequenceState) -> list[int]:
        """The cached pages of the beginning of the sequence; NO_PAGE for those the next query does not see.

        Never all tokens: the last one is always computed, because its logits are needed. And no token whose
        logits are needed for the log-probabilities of the prompt.
        """
        if not self._prefix_caching:
            return []
        extend_hashes(sequence.hashes, sequence.tokens, self._page_size)
        most = self._prefill_end(sequence) - 1
        if sequence.scored < _to_score(sequence):
            most = sequence.scored
        hashes = sequence.hashes[: most // self._page_size]
        in_sight = None if self._window is None else max(self.pages(self._window - 1), 1)
        return self.pool.match(hashes, in_sight=in_sight, unit=self._cache_unit)

    @property
    def _cache_unit(self) -> int:
        """Number of pages that are cached and found together: in deterministic mode those of a whole chunk.

        Then the rest of a prompt is cut into the same chunks, whether its beginning was cached or not.
        """
        return self._buckets.chunk // self._page_size if self._deterministic else 1

    def _publish(self, sequence: SequenceState) -> None:
        """Lets other sequences use the full pages of this one whose tokens are known.

        They are computed, or will be before any program that is dispatched from now on.
        """
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
        """The piece of the next ``count`` tokens, which are counted as computed from now on."""
        start = sequence.computed
        sequence.computed += count
        chooses = sequence.computed == sequence.total and sequence.params.max_new_tokens > 0
        index = sequence.computed - sequence.prompt_tokens
        sequence.in_flight += chooses
        scored = range(sequence.scored, min(sequence.computed, _to_score(sequence)))
        sequence.scored += len(scored)
        return Piece(sequence, start, count, chooses, index, scored)

    def _vacate(self, sequence: SequenceState) -> None:
        """Takes the pages and the slot from a running sequence."""
        self.running.remove(sequence)
        self.pool.release(_held(sequence.pages))
        self._slots.append(sequence.slot)
        sequence.pages = []
        sequence.out_of_sight = 0
        sequence.slot = -1
        sequence.computed = 0


def _to_score(sequence: SequenceState) -> int:
    """For how many positions the log-probability of the prompt's next token is wanted."""
    return 0 if sequence.params.prompt_logprobs is None else sequence.prompt_tokens - 1


def _held(pages: list[int]) -> list[int]:
    """``pages`` without NO_PAGE."""
    return [page for page in pages if page != NO_PAGE]
