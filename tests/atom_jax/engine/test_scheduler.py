"""The scheduler on a simulated device: random traffic, and each rule on its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from atom_jax.engine.config import EngineConfig
from atom_jax.engine.pages import NO_PAGE
from atom_jax.engine.scheduler import most_pages
from atom_jax.engine.sequence import SequenceState
from tests.atom_jax.engine.device import EOS, VOCABULARY, Server, answer

MAX_LENGTH = 40


def server(window: int | None = None, **settings: Any) -> Server:
    """Pages of 4 tokens, chunks of 16, four sequences at once, few pages."""
    defaults = {"num_pages": 14, "page_size": 4, "max_num_seqs": 4, "token_budget": 20}
    return Server(EngineConfig(**{**defaults, **settings}), MAX_LENGTH, window)


def drain(served: Server, limit: int = 2000) -> None:
    for _ in range(limit):
        if not served.busy:
            return
        served.step()
    raise AssertionError(f"not done after {limit} steps")


def answered(sequence: SequenceState) -> list[int]:
    return sequence.tokens[sequence.prompt_tokens :]


class Traffic:
    """Random requests, many of which begin alike, and aborts.

    Prompts end in 1 to ``most_own`` tokens that are not shared. ``grammars`` is the share of requests that
    have a grammar, ``scored`` of those that ask for the log-probabilities of their prompts.
    """

    def __init__(
        self, served: Server, seed: int, most_own: int = 5, grammars: float = 0.0, scored: float = 0.0
    ) -> None:
        self.grammars, self.scored = grammars, scored
        self.served, self.rng, self.most_own = served, np.random.default_rng(seed), most_own
        self.prefixes = [list(self.rng.integers(1, VOCABULARY, 24)) for _ in range(3)]
        self.prompts: dict[int, list[int]] = {}
        self.aborted: set[int] = set()

    def arrive(self) -> None:
        rng = self.rng
        shared = self.prefixes[rng.integers(3)][: rng.integers(0, 25)]
        own = rng.integers(1, VOCABULARY, rng.integers(1, self.most_own + 1))
        prompt = [int(token) for token in (*shared, *own)]
        new = int(rng.integers(1, self.served.max_model_len - len(prompt) + 1))
        scored = rng.random() < self.scored
        if scored and rng.random() < 0.5:
            new = 0
        sequence = self.served.add(prompt, new, grammar=rng.random() < self.grammars, scored=scored)
        self.prompts[sequence.arrival] = prompt

    def abort(self) -> None:
        scheduler = self.served.scheduler
        candidates = (*scheduler.running, *scheduler.waiting)
        if candidates:
            sequence = candidates[self.rng.integers(len(candidates))]
            scheduler.remove(sequence)
            self.aborted.add(sequence.arrival)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for _ in range(self.rng.poisson(0.2)):
                self.arrive()
            if self.rng.random() < 0.03:
                self.abort()
            self.served.step()
        drain(self.served)

    def check(self) -> None:
        """Everyone got the right answer, in turn, and all pages came back."""
        served = self.served
        assert {s.arrival for s in served.ended} | self.aborted == set(self.prompts)
        for sequence in served.ended:
            prompt = self.prompts[sequence.arrival]
            assert answered(sequence) == answer(prompt, sequence.params.max_new_tokens)
            wanted = [] if sequence.params.prompt_logprobs is None else list(range(len(prompt) - 1))
            assert served.scored[sequence] == wanted, "each once and in order"
        assert served.admitted == sorted(served.admitted)
        pool = served.scheduler.pool
        assert pool.available == pool.num_pages


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
@hypothesis.given(
    seed=st.integers(0, 2**32),
    more=st.integers(0, 30),
    window=st.one_of(st.none(), st.integers(2, MAX_LENGTH + 1)),
)
@hypothesis.settings(max_examples=20)
def test_random_traffic(
    deterministic: bool, prefix_caching: bool, seed: int, more: int, window: int | None
) -> None:
    """With no pages, or a few, more than the longest request has at a time."""
    settings = {"deterministic": deterministic, "prefix_caching": prefix_caching}
    least = 10 if window is None else min(10, most_pages(window, 16, 4))
    served = server(window, num_pages=least + more, **settings)
    traffic = Traffic(served, seed)
    traffic.run(120)
    traffic.check()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("prefix_caching", [False, True])
@hypothesis.given(
    seed=st.integers(0, 2**32),
    more=st.integers(0, 30),
    window=st.one_of(st.none(), st.integers(2, MAX_LENGTH + 1)),
    grammars=st.sampled_from([0.0, 0.5, 1.0]),
    scored=st.sampled_from([0.0, 0.5, 1.0]),
)
@hypothesis.settings(max_examples=20)
def test_random_traffic_with_chunks_of_any_length_grammars_and_scored_prompts(
    deterministic: bool,
    prefix_caching: bool,
    seed: int,
    more: int,
    window: int | None,
    grammars: float,
    scored: float,
) -> None:
    """Beside decoding a chunk may have another length in every step."""
    least = 10 if window is None else min(10, most_pages(window, 16, 4))
    settings = {"deterministic": deterministic, "prefix_caching": prefix_caching}
    served = server(window, num_pages=least + more, **settings)
    widths = np.random.default_rng(seed)
    served = dataclasses.replace(
        served, prefill_limit=lambda rows: int(widths.choice(served.buckets.prefill_widths))
    )
    traffic = Traffic(served, seed, grammars=grammars, scored=scored)
    traffic.run(120)
    traffic.check()


@pytest.mark.parametrize("deterministic", [False, True])
@hypothesis.given(seed=st.integers(0, 2**32), window=st.integers(2, 60), more=st.integers(0, 4))
@hypothesis.settings(max_examples=20)
def test_with_a_window_the_cache_is_smaller_than_a_request(
    deterministic: bool, seed: int, window: int, more: int
) -> None:
    num_pages = most_pages(window, 16, 4) + more
    config = EngineConfig(
        num_pages=num_pages, page_size=4, max_num_seqs=4, token_budget=20, deterministic=deterministic
    )
    traffic = Traffic(Server(config, 160, window), seed, most_own=100)
    traffic.run(120)
    traffic.check()


@pytest.mark.parametrize(("window", "num_pages"), [(None, 14), (12, 10), (16, 9), (24, 14)])
def test_random_traffic_for_thousands_of_steps_meets_everything(window: int | None, num_pages: int) -> None:
    served = server(window, num_pages=num_pages)
    traffic = Traffic(served, 0)
    traffic.run(3000)
    traffic.check()
    assert served.scheduler.preemptions > 20
    assert sum((s.cached_tokens or 0) > 0 for s in served.ended) > 100
    assert len(traffic.aborted) > 20
    early = [s for s in served.ended if len(answered(s)) < s.params.max_new_tokens]
    assert early and all(answered(s)[-1] == EOS for s in early)  # surplus tokens were dropped


def test_decode_goes_on_while_a_long_prompt_is_prefilled_in_chunks() -> None:
    served = server(num_pages=40)
    first = served.add([1, 2, 3], 30)
    served.step()
    served.add(list(range(1, 36)), 5)
    for expected in (16, 16, 3):
        plan = served.step()
        assert [piece.sequence for piece in plan.decode] == [first]
        assert [piece.count for piece in plan.prefill] == [expected]


def test_chunks_are_short_while_something_decodes() -> None:
    """Nothing else is: the chunk of a prompt that comes alone, and in deterministic mode."""
    for deterministic, expected in ((False, [4] * 8 + [3]), (True, [16, 16, 3])):
        served = dataclasses.replace(
            server(num_pages=40, deterministic=deterministic),
            prefill_limit=lambda rows: 4 if rows == 1 else 16,
        )
        first = served.add([1, 2, 3], 30)
        served.add(list(range(1, 36)), 5)
        assert [piece.count for piece in served.step().prefill] == [3]
        for count in expected:
            plan = served.step()
            assert [piece.sequence for piece in plan.decode] == [first]
            assert [piece.count for piece in plan.prefill] == [count]
    served = dataclasses.replace(server(num_pages=40), prefill_limit=lambda rows: 4)
    served.add(list(range(1, 36)), 5)
    assert [[piece.count for piece in served.step().prefill] for _ in range(3)] == [[16], [16], [3]]


def test_short_prompts_share_a_program_long_ones_do_not() -> None:
    served = server(num_pages=40)
    for first, length in enumerate((4, 3, 2, 20, 1), start=1):
        served.add([first] * length, 5)
    assert [piece.count for piece in served.step().prefill] == [4, 3, 2]
    assert [piece.count for piece in served.step().prefill] == [16]
    served.step()


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    served = server(num_pages=10, max_num_seqs=4)
    served.add([1] * 30, 2)  # 8 of 10 pages
    drained = served.add([2] * 12, 2)  # does not fit beside it
    small = served.add([3], 2)  # would
    served.step()
    served.step()
    assert [s.arrival for s in served.scheduler.waiting] == [drained.arrival, small.arrival]


def test_the_last_to_arrive_is_preempted_and_goes_on_where_it_was() -> None:
    prompts = [[token] * 8 for token in range(1, 40) if len(answer([token] * 8, 20)) == 20][:3]
    served = server(num_pages=10, prefix_caching=False)
    sequences = [served.add(prompt, 20) for prompt in prompts]
    preempted = set()
    while served.busy:
        served.step()
        preempted |= {sequence.arrival for sequence in served.scheduler.waiting if answered(sequence)}
    assert 2 in preempted and 0 not in preempted
    for prompt, sequence in zip(prompts, sequences, strict=True):
        assert answered(sequence) == answer(prompt, 20)


def test_a_repeated_prompt_computes_its_last_token_only() -> None:
    served = server(num_pages=20)
    prompt = list(range(1, 17))
    served.add(prompt, 2)
    drain(served)
    again = served.add([*prompt, 30], 2)
    (piece,) = served.step().prefill
    assert (piece.start, piece.count, again.cached_tokens) == (16, 1, 16)
    same = served.add(prompt, 2)
    served.step()
    assert same.cached_tokens == 12  # the last token is computed for its logits, and its page with it


def test_answers_are_cached_too_up_to_the_last_full_page() -> None:
    prompt = next([token] * 10 for token in range(1, 40) if len(answer([token] * 10, 11)) == 11)
    served = server(num_pages=20)
    first = served.add(prompt, 11)
    drain(served)
    turn = served.add([*first.tokens, 5, 6], 2)
    served.step()
    assert turn.cached_tokens == 20  # the last of 21 tokens was never computed


def test_a_prompt_that_was_aborted_between_chunks_is_cached_as_far_as_it_was_computed() -> None:
    served = server(num_pages=20)
    prompt = list(range(1, 31))
    aborted = served.add(prompt, 2)
    served.step()
    served.scheduler.remove(aborted)
    again = served.add(prompt, 2)
    drain(served)
    assert again.cached_tokens == 16
    assert answered(again) == answer(prompt, 2)


def test_deterministic_reuses_whole_chunks_of_prompts() -> None:
    served = server(num_pages=30, deterministic=True)
    served.add(list(range(1, 31)), 2)
    drain(served)
    again = served.add(list(range(1, 31)), 2)
    served.step()
    assert again.cached_tokens == 16


def test_an_abort_frees_pages_at_once_and_what_arrives_for_it_is_dropped() -> None:
    served = server()
    sequence = served.add([1] * 9, 10)
    served.step()
    served.step()
    assert sequence.in_flight and served.scheduler.pool.available < 14
    served.scheduler.remove(sequence)
    assert served.scheduler.pool.available == 14
    drain(served)
    assert served.ended == []


def test_pages_of_an_ended_sequence_go_to_another_while_its_surplus_step_is_in_flight() -> None:
    """The surplus write comes before the new owner's: the device runs programs in order of dispatch."""
    prompt = next([i, j] for i in range(1, 40) for j in range(1, 40) if answer([i, j], 4)[1:2] == [EOS])
    served = server(num_pages=2, prefix_caching=False)
    first = served.add(prompt, 6)
    page: int | None = None
    while not first.ended:
        page = first.pages[0] if first.pages else page
        served.step()
    surplus, _ = served.pending[0][0]  # dispatched before the end was known
    assert surplus.sequence is first
    second = served.add([9] * 6, 3)
    served.step()
    assert page in second.pages
    drain(served)
    assert answered(second) == answer([9] * 6, 3)


def lasting(length: int, max_new_tokens: int) -> list[int]:
    """A prompt whose answer does not end early."""
    found = ([token] * length for token in range(1, VOCABULARY))
    return next(prompt for prompt in found if len(answer(prompt, max_new_tokens)) == max_new_tokens)


def test_pages_before_the_window_go_to_others() -> None:
    """Of a long answer, no more is kept than the window; with caching it stays known until it is wanted."""
    prompt = lasting(4, 36)
    served = server(window=8, num_pages=10)
    sequence = served.add(prompt, 36)
    held = []
    while served.busy:
        served.step()
        held.append(served.scheduler.pool.num_pages - served.scheduler.pool.available)
    assert max(held) == 3  # 8 positions touch three pages of 4
    assert answered(sequence) == answer(prompt, 36)


def test_a_window_lets_more_sequences_run() -> None:
    """Four answers of 40 tokens have a page of 10 taken away without a window, and none with one."""
    prompt = lasting(4, 36)
    for window, preempted in ((None, True), (8, False)):
        served = server(window=window, num_pages=13, prefix_caching=False)
        for _ in range(4):
            served.add(prompt, 36)
        drain(served)
        assert (served.scheduler.preemptions > 0) == preempted
        assert all(answered(sequence) == answer(prompt, 36) for sequence in served.ended)


def test_a_prefix_is_found_by_what_is_in_sight_alone() -> None:
    prompt = list(range(1, 33))
    served = server(window=8, num_pages=12)
    served.add(prompt, 1)
    drain(served)
    # The least recently used pages are forgotten: the first two, which left the window during prefill.
    pool = served.scheduler.pool
    pool.release(pool.allocate(6))
    again = served.add([*prompt, 39], 2)
    (piece,) = served.step().prefill
    assert (piece.start, piece.count, again.cached_tokens) == (32, 1, 32)
    assert again.pages[:6] == [NO_PAGE] * 6 and NO_PAGE not in again.pages[6:]
    drain(served)
    assert answered(again) == answer([*prompt, 39], 2)


def test_a_shared_page_before_one_window_stays_with_who_sees_it() -> None:
    """The first to leave it releases its own reference only."""
    prompt = lasting(13, 20)
    served = server(window=8, num_pages=14)
    first = served.add(prompt, 20)
    served.step()
    second = served.add(prompt, 2)
    while second.cached_tokens is None:
        served.step()
    shared = second.pages[2]
    assert second.cached_tokens == 12 and first.pages[2] == shared
    assert served.scheduler.pool.users(shared) == 2
    drain(served)
    assert answered(first) == answer(prompt, 20) and answered(second) == answer(prompt, 2)
    assert served.scheduler.pool.available == 14


def test_with_preemption_and_determinism_a_window_computes_the_same_again() -> None:
    prompts = [[token] * 8 for token in range(1, VOCABULARY) if len(answer([token] * 8, 24)) == 24][:3]
    for deterministic in (False, True):
        served = server(window=20, num_pages=11, deterministic=deterministic)
        sequences = [served.add(prompt, 24) for prompt in prompts]
        drain(served)
        assert served.scheduler.preemptions > 0
        for prompt, sequence in zip(prompts, sequences, strict=True):
            assert answered(sequence) == answer(prompt, 24)
