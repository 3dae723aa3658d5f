"""Which shapes are compiled, and which of them serves what."""

from __future__ import annotations

import itertools

import pytest

from atom_jax.engine.buckets import Buckets, make_buckets
from atom_jax.engine.config import EngineConfig
from tests.convert.tiny import fails

CONFIGS = {
    "default": (EngineConfig(), 4096),
    "short": (EngineConfig(), 100),
    "deterministic": (EngineConfig(deterministic=True), 2048),
    "small pages": (EngineConfig(page_size=8, max_num_seqs=3, token_budget=45), 250),
    "one": (EngineConfig(page_size=16, max_num_seqs=1, token_budget=17), 16),
}


@pytest.fixture(params=CONFIGS)
def case(request: pytest.FixtureRequest) -> tuple[EngineConfig, int, Buckets]:
    config, max_model_len = CONFIGS[request.param]
    return config, max_model_len, make_buckets(config, max_model_len)


def test_whatever_is_asked_for_is_one_of_the_shapes(case: tuple[EngineConfig, int, Buckets]) -> None:
    config, max_model_len, buckets = case
    shapes = set(buckets.shapes())
    for blocks in range(1, -(-max_model_len // config.page_size) + 1):
        for rows in range(1, config.max_num_seqs + 1):
            shape = buckets.decode(rows, blocks)
            assert shape in shapes and shape.rows >= rows and shape.blocks >= blocks
        for tokens in range(1, buckets.chunk + 1):
            for rows in range(1, buckets.prefill_rows(buckets.width(tokens)) + 1):
                shape = buckets.prefill(rows, tokens, blocks)
                assert shape in shapes and shape.width >= tokens and shape.rows >= rows


def test_a_full_step_is_within_the_budget(case: tuple[EngineConfig, int, Buckets]) -> None:
    config, _, buckets = case
    largest = max(buckets.prefill_rows(width) * width for width in buckets.prefill_widths)
    assert largest + config.max_num_seqs <= config.token_budget
    assert buckets.chunk % config.page_size == 0


def test_there_are_few() -> None:
    assert len(list(make_buckets(EngineConfig(), 4096).shapes())) == 36
    assert len(list(make_buckets(EngineConfig(), 4096, one_table=True).shapes())) == 9


def test_tables_grow_by_at_most_two(case: tuple[EngineConfig, int, Buckets]) -> None:
    """Or there is one, where its size costs nothing."""
    config, max_model_len, buckets = case
    for tables in (buckets.decode_blocks, buckets.prefill_blocks):
        assert all(larger <= 2 * smaller for smaller, larger in itertools.pairwise(tables))
    one = make_buckets(config, max_model_len, one_table=True)
    longest = -(-max_model_len // config.page_size)
    assert one.decode_blocks == one.prefill_blocks == (longest,)


def test_deterministic_decodes_with_one_shape_and_prefills_prompts_alone() -> None:
    shapes = list(make_buckets(EngineConfig(deterministic=True), 4096).shapes())
    assert [shape for shape in shapes if shape.width == 1] == [(32, 1, 64)]
    assert {shape.rows for shape in shapes if shape.width > 1} == {1}


def test_budget_too_small() -> None:
    with fails("token_budget 95", 96):
        make_buckets(EngineConfig(token_budget=95), 4096)
