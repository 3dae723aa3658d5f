"""Models with sliding windows: pages that no layer sees any more are given back, and no answer changes."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import atom_jax
from atom_jax.checkpoint import Model
from atom_jax.config import preset
from atom_jax.engine import Engine, EngineConfig, RequestParams
from tests.atom_jax.models import TINY_GROUPS, tiny_config, tiny_params
from tests.convert.tiny import tiny_vocabulary

# Six programs; two sequences of the full length have 16 pages.
SIZES = EngineConfig(num_pages=12, page_size=8, max_num_seqs=2, max_model_len=64, token_budget=10)
GREEDY = RequestParams(max_new_tokens=24, ignore_eos=True)
LENGTHS = [5, 40, 17, 33, 24]


def make_model(folder: Path, windows: tuple[int | None, ...]) -> Model:
    config = tiny_config(vocab_size=len(tiny_vocabulary()), windows=windows)
    return Model(folder, config, tiny_params(config))


def make_prompts(model: Model, lengths: list[int]) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(3, model.config.vocab_size, length).tolist() for length in lengths]


def generated(model: Model, prompts: list[list[int]], count: int) -> list[list[int]]:
    """The same answers from a cache in which every page stays."""
    tokens = np.zeros((len(prompts), max(map(len, prompts))), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    endless = model.config.replace(eos_token_ids=())
    lengths = np.array([len(prompt) for prompt in prompts])
    out = atom_jax.generate(model.params, tokens, lengths, config=endless, max_new_tokens=count)
    return np.asarray(out.tokens).tolist()


def serve(engine: Engine, prompts: list[list[int]]) -> tuple[list[list[int]], int]:
    """Answers to prompts that arrive together, and the most pages that were in use."""
    for number, prompt in enumerate(prompts):
        engine.add(str(number), prompt, GREEDY)
    answers: list[list[int]] = [[] for _ in prompts]
    used = 0
    while engine.has_work:
        for output in engine.step():
            answers[int(output.request_id)] += output.token_ids
        stats = engine.stats()
        used = max(used, stats.num_pages - stats.free_pages)
    return answers, used


@pytest.mark.parametrize("prefix_caching", [True, False])
@pytest.mark.parametrize("windows", [(20, 9), pytest.param((7, 7), marks=pytest.mark.slow)])
def test_answers_are_those_of_a_cache_that_keeps_all(
    folder: Path, windows: tuple[int, ...], prefix_caching: bool
) -> None:
    """Others have the freed pages by then: five sequences of 29 to 64 tokens share 12 pages."""
    model = make_model(folder, windows)
    prompts = make_prompts(model, LENGTHS)
    engine = Engine(model, dataclasses.replace(SIZES, prefix_caching=prefix_caching))
    answers, _ = serve(engine, prompts)
    assert answers == generated(model, prompts, 24)
    again, _ = serve(engine, prompts[-1:])  # what the prefix cache still has is of use
    assert again == answers[-1:]
    assert (engine.stats().cached_tokens > 0) == prefix_caching
    assert engine.stats().free_pages == 12


@pytest.mark.parametrize(("windows", "used"), [((20, 9), 4), ((None, 9), 7), ((), 7)])
def test_pages_go_only_where_every_layer_has_a_window(
    folder: Path, windows: tuple[int | None, ...], used: int
) -> None:
    """A prompt of 30 tokens and 23 of its answer are 7 pages; 20 positions touch 4."""
    model = make_model(folder, windows)
    prompts = make_prompts(model, [30])
    engine = Engine(model, SIZES)
    answers, most = serve(engine, prompts)
    assert answers == generated(model, prompts, 24)
    assert most == used


@pytest.mark.slow
def test_a_request_may_be_longer_than_the_cache(folder: Path) -> None:
    """A prompt of 90 tokens and its answer in 6 pages of 8; without a window, the cache is the limit."""
    small = dataclasses.replace(SIZES, num_pages=6, max_model_len=128)
    model = make_model(folder, (20, 9))
    prompts = make_prompts(model, [90, 71, 3])
    answers, _ = serve(Engine(model, small), prompts)
    assert answers == generated(model, prompts, 24)
    for windows in ((), (None, 9), (64, 9)):
        assert Engine(make_model(folder, windows), small).max_model_len == 48


def test_cache_of_the_default_size_holds_the_windows(folder: Path) -> None:
    """Of two sequences: 20 positions and 10 tokens of a step lie in 5 pages of 8, 128 tokens in 16."""
    default = dataclasses.replace(SIZES, num_pages=None, max_model_len=128)
    for windows, pages in (((20, 9), 5), ((None, 9), 16), ((), 16), ((250, 9), 16)):
        assert Engine(make_model(folder, windows), default).stats().num_pages == 2 * pages


@pytest.mark.slow
def test_four_bits_bit_for_bit_whatever_is_served_beside(folder: Path) -> None:
    """With keys that are rotated when they are read, where the table names any page before the window."""
    quantization = preset("w4a4kv4", **TINY_GROUPS, kv_rope="pre", center_keys=False)
    config = tiny_config(quantization, vocab_size=len(tiny_vocabulary()), windows=(20, 9))
    model = Model(folder, config, tiny_params(config))
    sizes = dataclasses.replace(SIZES, deterministic=True)
    prompts = make_prompts(model, LENGTHS)
    params = dataclasses.replace(GREEDY, logprobs=0)
    alone = [Engine(model, sizes).generate([prompt], params)[0] for prompt in prompts]
    engine = Engine(model, sizes)
    assert engine.generate(prompts, params) == alone
    assert engine.generate(prompts[-1:], params) == alone[-1:]
    assert engine.stats().cached_tokens > 0
