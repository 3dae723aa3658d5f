"""A device that computes no model: it runs plans on pages that remember which prefix was written to them."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from atom_jax.engine.buckets import make_buckets
from atom_jax.engine.config import EngineConfig
from atom_jax.engine.request_params import RequestParams
from atom_jax.engine.scheduler import Piece, Plan, Scheduler, most_pages
from atom_jax.engine.sequence import SequenceState

EOS = 0
VOCABULARY = 40


def extended(prefix: int, token: int) -> int:
    """Stands for the keys and values of ``token`` after ``prefix``: another number for any other history."""
    return hash((prefix, token))


def chosen(prefix: int) -> int:
    """The next token; a model's greedy choice."""
    return hash((prefix, -7)) % VOCABULARY


def answer(prompt: Sequence[int], max_new_tokens: int) -> list[int]:
    """What a prompt must be answered with, whatever happens on the way."""
    prefix, out = 0, []
    for token in prompt:
        prefix = extended(prefix, token)
    while len(out) < max_new_tokens and EOS not in out:
        out.append(chosen(prefix))
        prefix = extended(prefix, out[-1])
    return out


class _Anything:
    """A grammar that is not asked: the scheduler looks only at whether there is one."""

    ended = False

    def mask(self) -> np.ndarray:
        raise AssertionError

    def accept(self, token: int) -> None:
        raise AssertionError


ANYTHING = _Anything()


@dataclasses.dataclass
class Server:
    """A scheduler with this device, and results that come one step late, as in the engine.

    ``window``: the positions that a query sees, itself included; at least 2, since a token on the device is
    known by what was written just before it.
    """

    config: EngineConfig
    max_model_len: int
    window: int | None = None
    prefill_limit: Callable[[int], int] | None = None

    def __post_init__(self) -> None:
        assert self.config.num_pages is not None
        self.buckets = make_buckets(self.config, self.max_model_len)
        self.scheduler = Scheduler(
            num_pages=self.config.num_pages,
            page_size=self.config.page_size,
            max_num_seqs=self.config.max_num_seqs,
            buckets=self.buckets,
            window=self.window,
            prefix_caching=self.config.prefix_caching,
            deterministic=self.config.deterministic,
            prefill_limit=self._limit if self.prefill_limit else None,
        )
        self.limit: int | None = None  # of the step that is planned
        self.contents = np.zeros((self.config.num_pages, self.config.page_size), object)
        self.last_tokens = [0] * self.config.max_num_seqs
        self.pending: deque[list[tuple[Piece, int]]] = deque()
        self.scored: dict[SequenceState, list[int]] = {}  # positions in the order of their results
        self.slots: dict[SequenceState, int] = {}
        self.ended: list[SequenceState] = []
        self.admitted: list[int] = []
        self.arrivals = 0

    def add(
        self, prompt: Sequence[int], max_new_tokens: int, grammar: bool = False, scored: bool = False
    ) -> SequenceState:
        params = RequestParams(max_new_tokens=max_new_tokens, prompt_logprobs=0 if scored else None)
        sequence = SequenceState(str(self.arrivals), params, self.arrivals, list(prompt), len(prompt))
        sequence.token_mask = ANYTHING if grammar else None
        self.arrivals += 1
        self.scheduler.add(sequence)
        return sequence

    def _limit(self, decode_rows: int) -> int:
        assert self.prefill_limit is not None
        self.limit = self.prefill_limit(decode_rows)
        return self.limit

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self.pending)

    def step(self) -> Plan:
        """Dispatches one step and reads the one before."""
        before = {sequence.arrival for sequence in self.scheduler.running}
        self.limit = None
        plan = self.scheduler.schedule()
        self.check(plan)
        new = sorted({s.arrival for s in self.scheduler.running} - before - set(self.admitted))
        self.admitted += new
        if plan.pieces:
            self.pending.append(self.run(plan))
        if self.pending and (len(self.pending) > 1 or not plan.pieces):
            self.read()
        return plan

    def run(self, plan: Plan) -> list[tuple[Piece, int]]:
        """What the device does, in the order of dispatch; the host sees it later.

        Returns:
          The pieces, and the token after each.
        """
        results = []
        for piece in plan.pieces:
            sequence, size = piece.sequence, self.config.page_size
            known = sequence.tokens[piece.start : piece.start + piece.count]
            if not known:
                known = [self.last_tokens[sequence.slot]]
            assert len(known) == piece.count
            prefix = 0
            seen = 0 if self.window is None else piece.start + 1 - self.window
            for position, token in enumerate(sequence.tokens[: piece.start]):
                prefix = extended(prefix, token)
                if position >= seen:  # what attention reads
                    page = sequence.pages[position // size]
                    assert page >= 0 and self.contents[page, position % size] == prefix
            if piece.start > len(sequence.tokens):
                page, offset = divmod(piece.start - 1, size)
                assert sequence.pages[page] >= 0
                prefix = self.contents[sequence.pages[page], offset]
            for position, token in enumerate(known, start=piece.start):
                page = sequence.pages[position // size]
                assert self.scheduler.pool.users(page) == 1, "a shared page is written"
                prefix = extended(prefix, token)
                self.contents[page, position % size] = prefix
            if piece.chooses:
                self.last_tokens[sequence.slot] = chosen(prefix)
            results.append((piece, chosen(prefix)))
        return results

    def read(self) -> None:
        for piece, token in self.pending.popleft():
            sequence = piece.sequence
            if sequence.ended:
                continue
            self.scored.setdefault(sequence, []).extend(piece.scored)
            if piece.ends_prompt and not sequence.params.max_new_tokens:
                self.scheduler.remove(sequence)
                self.ended.append(sequence)
            if not piece.chooses:
                continue
            self.scheduler.receive(sequence, token)
            generated = len(sequence.tokens) - sequence.prompt_tokens
            if token == EOS or generated == sequence.params.max_new_tokens:
                self.scheduler.remove(sequence)
                self.ended.append(sequence)

    def check(self, plan: Plan) -> None:
        """The invariants of a step."""
        scheduler, pool = self.scheduler, self.scheduler.pool
        tokens = sum(piece.count for piece in plan.pieces)
        assert tokens <= self.config.token_budget
        assert len(plan.decode) <= self.config.max_num_seqs
        assert all(piece.count == 1 for piece in plan.decode)
        limited = self.limit is not None
        assert limited == (
            bool(plan.decode) and self.prefill_limit is not None and not self.config.deterministic
        )
        if self.limit is not None and plan.prefill:
            shape = self.buckets.prefill(len(plan.prefill), max(piece.count for piece in plan.prefill), 1)
            assert shape.rows * shape.width <= self.limit
        if self.config.deterministic:
            for piece in plan.prefill:
                end = piece.start + piece.count
                assert end % self.buckets.chunk == 0 or end == piece.sequence.prefill_until
        for piece in plan.pieces:
            assert all(piece.start <= position < piece.start + piece.count for position in piece.scored)
            if piece.sequence.token_mask is not None and piece.chooses:
                assert piece.start + piece.count == len(piece.sequence.tokens), "its mask is not known"
        for sequence in plan.admitted:
            assert sequence.slot >= 0 and not sequence.in_flight - sum(
                piece.chooses for piece in plan.pieces if piece.sequence is sequence
            ), "the host does not know its tokens"
        self.slots = {s: slot for s, slot in self.slots.items() if s.slot == slot}
        self.slots |= {sequence: sequence.slot for sequence in plan.admitted}
        assert set(self.slots) == set(scheduler.running), "admitted without a word"
        if plan.prefill:
            width = self.buckets.width(max(piece.count for piece in plan.prefill))
            assert len(plan.prefill) <= self.buckets.prefill_rows(width)
        sequences = [piece.sequence for piece in plan.pieces]
        assert len({id(sequence) for sequence in sequences}) == len(sequences)
        for sequence in sequences:
            assert sequence.slot >= 0 and not sequence.ended
            assert sequence.generated <= sequence.params.max_new_tokens

        order = [s.arrival for s in (*scheduler.running, *scheduler.waiting)]
        assert order == sorted(order), "first come, first served"
        assert len({s.slot for s in scheduler.running}) == len(scheduler.running) <= self.config.max_num_seqs
        users = [sum(page in s.pages for s in scheduler.running) for page in range(pool.num_pages)]
        assert users == [pool.users(page) for page in range(pool.num_pages)]
        assert pool.available == users.count(0)
        assert not any(s.pages for s in scheduler.waiting)
        if self.window is not None:
            for piece in plan.pieces:
                held = sum(page >= 0 for page in piece.sequence.pages)
                assert held <= most_pages(self.window, piece.count, self.config.page_size)
