"""Answers whose next token must be one of those that the host allows, among others that are free."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from atom_jax.checkpoint import Model
from atom_jax.engine import Engine, EngineConfig, Output, RequestParams
from atom_jax.errors import AtomError
from atom_jax.sampling import SamplingParams, mask_words
from tests.convert.tiny import fails

SIZES = EngineConfig(num_pages=9, page_size=16, max_num_seqs=4, max_model_len=64, token_budget=36)
VOCABULARY = 265


def packed(tokens: list[int]) -> np.ndarray:
    """A mask that allows ``tokens``."""
    words = np.zeros(mask_words(VOCABULARY), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words


@dataclasses.dataclass(frozen=True)
class Rule:
    """A grammar by a function of the answer so far: the tokens that may follow, or None at the end."""

    following: Callable[[tuple[int, ...]], list[int] | None]

    def start(self) -> State:
        return State(self)


class State:
    def __init__(self, rule: Rule) -> None:
        self.rule, self.answer = rule, ()

    def mask(self) -> np.ndarray:
        return packed(self.rule.following(self.answer) or [])

    def accept(self, token: int) -> None:
        allowed = self.rule.following(self.answer)
        assert allowed is not None and token in allowed, "a token that was not allowed"
        self.answer += (token,)

    @property
    def ended(self) -> bool:
        return self.rule.following(self.answer) is None


EVEN = Rule(lambda answer: list(range(4, VOCABULARY, 2)))
# After a token come only those around it, so that a mask depends on the token before.
NEAR = Rule(lambda answer: [t for t in range(3, VOCABULARY) if not answer or 0 < abs(t - answer[-1]) < 9])
SETS = [[7, 8, 9], [100], [30, 200, 264], [5, 6]]
SEQUENCE = Rule(lambda answer: SETS[len(answer)] if len(answer) < len(SETS) else None)
FREE = RequestParams(14, ignore_eos=True)


def prompts_of(count: int) -> list[list[int]]:
    rng = np.random.default_rng(3)
    beginning = rng.integers(3, VOCABULARY, 20).tolist()
    return [[*beginning, *rng.integers(3, VOCABULARY, 1 + n % 5).tolist()] for n in range(count)]


@pytest.mark.parametrize("deterministic", [False, True])
def test_masks_hold_beside_free_answers_with_preemption_and_penalties(
    model: Model, deterministic: bool
) -> None:
    drawn = SamplingParams(temperature=1.5, frequency_penalty=1.0, repetition_penalty=1.2)
    params = [
        RequestParams(30, sampling, seed=number, ignore_eos=True, grammar=grammar)
        for number, (grammar, sampling) in enumerate(
            (grammar, sampling)
            for grammar in (EVEN, None, NEAR, SEQUENCE)
            for sampling in (SamplingParams(), drawn, dataclasses.replace(drawn, temperature=0.0))
        )
    ]
    prompts = prompts_of(len(params))
    config = dataclasses.replace(SIZES, deterministic=deterministic)
    alone = [Engine(model, config).generate([each], p)[0] for each, p in zip(prompts, params, strict=True)]
    engine = Engine(model, dataclasses.replace(config, num_pages=6))
    assert engine.generate(prompts, params) == alone
    assert engine.stats().preemptions > 0
    for answer, each in zip(alone, params, strict=True):
        if each.grammar is None:
            assert any(token % 2 for token in answer.token_ids)
            continue
        state = each.grammar.start()
        for token in answer.token_ids:
            state.accept(token)  # raises if it was not allowed
        assert (len(answer.token_ids), answer.finish_reason) == (
            (4, "stop") if state.ended else (30, "length")
        )
    assert len({answer.token_ids for answer in alone}) == len(alone)


def test_others_decode_in_every_step(model: Model) -> None:
    engine = Engine(model, SIZES)
    for name, grammar in (("free", None), ("bound", EVEN)):
        engine.add(name, prompts_of(1)[0], dataclasses.replace(FREE, grammar=grammar))
    steps: list[list[str]] = []
    while engine.has_work:
        steps.append([output.request_id for output in engine.step()])
    free = [number for number, names in enumerate(steps) if "free" in names]
    bound = [number for number, names in enumerate(steps) if "bound" in names]
    assert np.diff(free).tolist() == [1] * 13
    assert np.diff(bound).tolist() == [2] * 13


def outputs_of(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_a_grammar_that_fails_ends_its_own_answer(model: Model) -> None:
    def fail(answer: tuple[int, ...]) -> list[int]:
        if len(answer) == 3:
            raise RuntimeError("the library is out of memory")
        return [4, 5]

    engine = Engine(model, SIZES)
    dead_end = Rule(lambda answer: [4] if len(answer) < 2 else [])
    for name, grammar in (("fails", Rule(fail)), ("dead end", dead_end), ("free", None)):
        engine.add(name, [5, 6, 7], dataclasses.replace(FREE, grammar=grammar))
    last = {output.request_id: output for output in outputs_of(engine)}
    reasons = {name: (output.finish_reason, output.completion_tokens) for name, output in last.items()}
    assert reasons == {"fails": ("abort", 3), "dead end": ("abort", 2), "free": ("length", 14)}
    assert engine.stats().free_pages == 9


def test_a_grammar_without_a_first_token_is_refused(model: Model) -> None:
    engine = Engine(model, SIZES)
    with fails("allows no token"):
        engine.add("a", [4], RequestParams(grammar=Rule(lambda answer: [])))
    assert not engine.has_work


def test_a_token_that_ends_the_answer_is_not_offered_to_the_grammar(model: Model) -> None:
    def only_eos(answer: tuple[int, ...]) -> list[int]:
        if answer:
            raise AtomError("asked after the end")
        return [9]

    (answer,) = Engine(model, SIZES).generate(
        [[4, 5]], RequestParams(5, stop_ids=(9,), grammar=Rule(only_eos))
    )
    assert (answer.token_ids, answer.finish_reason) == ((9,), "stop")


def test_a_mask_may_be_shorter_or_longer_than_the_vocabulary(model: Model) -> None:
    class Other(State):
        def __init__(self, size: int) -> None:
            self.size = size

        def mask(self) -> np.ndarray:
            return np.full(self.size, -1, np.int32)

        def accept(self, token: int) -> None:
            assert token < 32 * self.size

        @property
        def ended(self) -> bool:
            return False

    class Sized:
        def __init__(self, size: int) -> None:
            self.size = size

        def start(self) -> Other:
            return Other(self.size)

    params = [dataclasses.replace(FREE, grammar=Sized(size)) for size in (2, 9, 20)]
    engine = Engine(model, SIZES)
    short, exact, longer = engine.generate([[4, 5, 6]] * 3, params)
    assert all(token < 64 for token in short.token_ids)
    assert exact == longer == engine.generate([[4, 5, 6]], FREE)[0]
