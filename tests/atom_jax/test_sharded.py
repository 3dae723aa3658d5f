"""Checkpoints of several shards, and models divided among devices (of one CPU: see tests/conftest.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import atom_jax
from atom_jax import checkpoint, orbax_items
from atom_jax.checkpoint import Model, layer_specs, shared_specs
from atom_jax.config import ModelConfig, preset
from atom_jax.engine import Engine, EngineConfig, RequestParams
from atom_jax.errors import AtomError
from atom_jax.llama import forward, merge
from atom_jax.schemes import SCHEMES
from atom_jax.scoring import score
from atom_jax.sharded import ShardedParams, first_devices
from atom_jax.shards import cut, join
from pallas_kernels import PagedKVCache
from tests.atom_jax.models import tiny_config
from tests.atom_jax.sharded_models import random_stored, sharded_config, write_sharded

PROMPT = np.asarray([[3, 141, 59, 26, 5], [35, 89, 79, 32, 3], [8, 4, 6, 2, 6], [4, 3, 3, 8, 3]], np.int32)
POSITIONS = np.broadcast_to(np.arange(PROMPT.shape[1], dtype=np.int32), PROMPT.shape)


def logits_of_prompt(model: Model) -> tuple[jax.Array, PagedKVCache]:
    """Logits of all tokens of the prompt, and the cache with them."""
    cache = merge(model.params, model.config).new_cache(len(PROMPT), 64)
    return forward(model.params, PROMPT, POSITIONS, cache, config=model.config)


def logits(model: Model) -> list[np.ndarray]:
    """Logits of a prompt, and of a token after it."""
    prompt, cache = logits_of_prompt(model)
    last, _ = forward(model.params, PROMPT[:, :1], POSITIONS[:, -1:] + 1, cache, config=model.config)
    return [np.asarray(prompt), np.asarray(last)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four kv heads among eight shards, and a vocabulary that is no multiple of eight."""
    config = sharded_config("w4a4kv4", 8, vocab_size=157)
    return write_sharded(tmp_path_factory.mktemp("sharded"), config)


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[np.ndarray]:
    """The logits of the checkpoint on one device."""
    return logits(atom_jax.load(folder))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_same_bits_on_any_number_of_devices(devices: int, folder: Path, alone: list[np.ndarray]) -> None:
    model = atom_jax.load(folder, mesh=first_devices(devices))
    assert isinstance(model.params, ShardedParams)
    for found, expected in zip(logits(model), alone, strict=True):
        assert expected.std() > 0.1
        np.testing.assert_array_equal(found, expected)


def test_sums_of_the_library_differ_by_rounding_only(folder: Path, alone: list[np.ndarray]) -> None:
    model = atom_jax.load(folder, mesh=first_devices(4), fixed_order=False)
    for found, expected in zip(logits(model), alone, strict=True):
        assert np.linalg.norm(found - expected) < 1e-3 * np.linalg.norm(expected)


def scattered(model: Model) -> Model:
    """The model, whose devices keep the residual stream of their share of the tokens from two tokens on."""
    assert isinstance(model.params, ShardedParams)
    group = dataclasses.replace(model.params.group, scatter_from=2)
    return dataclasses.replace(model, params=dataclasses.replace(model.params, group=group))


@pytest.mark.parametrize("fixed_order", [True, False])
def test_same_bits_with_the_residual_stream_divided_by_tokens(fixed_order: bool, folder: Path) -> None:
    """20 tokens on four devices: sums are scattered, and rows are gathered after they were rounded."""
    model = atom_jax.load(folder, mesh=first_devices(4), fixed_order=fixed_order)
    text = str(jax.make_jaxpr(lambda: logits_of_prompt(scattered(model)))())
    assert ("reduce_scatter" in text) != fixed_order and "all_gather" in text
    jax.tree.map(np.testing.assert_array_equal, logits(scattered(model)), logits(model))


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("scheme", [*SCHEMES, "w4a4kv4 with gathered inputs"])
def test_all_schemes_at_all_degrees(scheme: str, kv_heads: int, tmp_path: Path) -> None:
    name, _, gather = scheme.partition(" ")
    config = sharded_config(name, 8, num_kv_heads=kv_heads, tie_word_embeddings=kv_heads == 1)
    if gather:
        config = config.replace(format=dataclasses.replace(config.format, gather_inputs=True))
    write_sharded(tmp_path, config)
    expected = logits(atom_jax.load(tmp_path))
    assert expected[0].std() > 0.05
    for devices in (2, 4, 8):
        model = atom_jax.load(tmp_path, mesh=first_devices(devices))
        jax.tree.map(np.testing.assert_array_equal, logits(model), expected)
        if devices == 4:
            jax.tree.map(np.testing.assert_array_equal, logits(scattered(model)), expected)


def test_three_devices(tmp_path: Path) -> None:
    """A number that is no power of two: the order of the sums is fixed, too."""
    write_sharded(tmp_path, sharded_config("bf16", 3, num_heads=3, num_kv_heads=3, intermediate_size=96))
    expected = logits(atom_jax.load(tmp_path))
    found = logits(atom_jax.load(tmp_path, mesh=first_devices(3)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Model]:
    """One checkpoint, on one device and on two."""
    folder = write_sharded(tmp_path_factory.mktemp("two"), sharded_config("bf16", 2))
    return atom_jax.load(folder), atom_jax.load(folder, mesh=first_devices(2))


def test_engine_answers_alike(models: tuple[Model, Model]) -> None:
    def answers(model: Model) -> list[Any]:
        sizes = EngineConfig(max_num_seqs=2, num_pages=16, page_size=16, max_model_len=64, token_budget=32)
        engine = Engine(model, sizes)
        prompts = [[5, 9, 2], list(range(1, 25)), [7]]
        params = RequestParams(max_new_tokens=6, seed=3, logprobs=2)
        return [(answer.token_ids, answer.logprobs) for answer in engine.generate(prompts, params)]

    first, second = map(answers, models)
    assert first == second


def test_functions_on_a_divided_model(models: tuple[Model, Model]) -> None:
    """``generate``, ``stream``, ``perplexity`` and ``score`` give what they give on one device."""

    def results(model: Model) -> list[Any]:
        params, config = model.params, model.config
        arguments = (params, PROMPT, np.asarray([5, 3, 1, 4]))
        more = {"config": config, "max_new_tokens": 4}
        tokens = atom_jax.generate(*arguments, **more).tokens
        steps = np.stack([token for token, _ in atom_jax.stream(*arguments, **more)], axis=1)
        text = atom_jax.perplexity(params, list(range(40)), config=config, seq_len=16)
        pairs = score(params, [((1, 2, 3), (4, 5))], config=config)
        return [np.asarray(tokens), steps, text.perplexity, pairs]

    first, second = map(results, models)
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_part_reads_its_own_shards_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = orbax_items.read_tree

    def recorded(path: Path, specs: Any) -> Any:
        read.append(path.name)
        return original(path, specs)

    monkeypatch.setattr(checkpoint, "read_tree", recorded)
    config = checkpoint.read_config(folder)
    checkpoint.read_layer_part(folder, 1, config, part=3, parts=4)
    checkpoint.read_shared_part(folder, config, part=0, parts=8)
    assert read == ["0001.6-of-8", "0001.7-of-8", "shared.0-of-8"]


def test_cache_and_weights_are_divided(folder: Path) -> None:
    """Each device holds an eighth of what is split, and one of the four kv heads."""
    model = atom_jax.load(folder, mesh=first_devices(8))
    whole = merge(model.params, model.config).new_cache(1, 64)
    assert whole.num_kv_heads == 8
    assert isinstance(model.params, ShardedParams)
    weight = nnx.to_pure_dict(model.params.state)["layers"]["o_proj"]
    assert weight.packed.shape[:3] == (8, model.config.num_layers, model.config.hidden_size)
    for leaf in jax.tree.leaves(model.params):
        assert [shard.data.shape[0] for shard in leaf.addressable_shards] == [1] * 8


@st.composite
def divisions(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A configuration of some shards, and a number of parts that it can run on."""
    shards = draw(st.sampled_from([2, 3, 4, 6, 8]))
    parts = draw(st.sampled_from([n for n in range(1, shards + 1) if shards % n == 0]))
    kv_heads = draw(st.sampled_from([n for n in range(1, 2 * shards + 1) if not (n % shards and shards % n)]))
    assume(not (kv_heads % parts and parts % kv_heads))
    heads = np.lcm(kv_heads, shards) * draw(st.integers(1, 2))
    format = dataclasses.replace(
        draw(
            st.sampled_from(
                [
                    preset("bf16"),
                    preset("w8a8"),
                    preset("w4a4kv4", group_size=32, num_outliers=32),
                    preset("w4a8kv4", group_size=32),
                ]
            )
        ),
        shards=shards,
    )
    return tiny_config(
        format,
        vocab_size=draw(st.integers(2 * shards, 50)),
        num_heads=int(heads),
        num_kv_heads=kv_heads,
        head_dim=64,
        intermediate_size=64 * shards * draw(st.integers(1, 2)),
        tie_word_embeddings=draw(st.booleans()),
        mlp_bias=True,
    ), parts


@settings(max_examples=40)
@given(divisions())
def test_parts_are_joined_as_they_were_cut(division: tuple[ModelConfig, int]) -> None:
    config, parts = division
    shards = config.format.shards
    shard = config.part(shards)
    for specs in (layer_specs, shared_specs):
        tree = random_stored(specs(config), 0)
        pieces = cut(tree, config, specs)
        for piece in pieces:
            assert jax.tree.map(jnp.shape, piece) == jax.tree.map(lambda spec: spec.shape, specs(shard))
        jax.tree.map(np.testing.assert_array_equal, join(pieces, config, shard, specs), tree)
        # Parts that are joined from shards are those that would be cut for so many devices.
        each = shards // parts
        own = config.part(parts)
        joined = [join(pieces[each * part : each * (part + 1)], own, shard, specs) for part in range(parts)]
        if parts == 1:
            continue
        for part in joined:
            assert jax.tree.map(jnp.shape, part) == jax.tree.map(lambda spec: spec.shape, specs(own))
        again = [piece for part in joined for piece in cut(part, own, specs)]
        if specs is layer_specs:  # the vocabulary of a part is padded
            jax.tree.map(np.testing.assert_array_equal, again, pieces)


def test_parts_have_the_rows_of_their_heads() -> None:
    config = sharded_config("bf16", 4)
    tree = random_stored(layer_specs(config), 0)
    q, k, v = np.split(tree["qkv_proj"], [config.q_size, config.q_size + config.kv_size])
    second = cut(tree, config, layer_specs)[1]
    expected = np.concatenate([q[128:256], k[64:128], v[64:128]])  # two heads of 64 channels, one kv head
    np.testing.assert_array_equal(second["qkv_proj"], expected)
    gate, up = np.split(tree["gate_up_proj"], 2)
    np.testing.assert_array_equal(second["gate_up_proj"], np.concatenate([gate[128:256], up[128:256]]))


@pytest.mark.parametrize(
    ("shards", "devices", "message"),
    [
        (1, 2, "a checkpoint of 1 shards does not run on 2 devices; .* --shards 2"),
        (2, 4, "a checkpoint of 2 shards does not run on 4 devices"),
    ],
)
def test_too_many_devices(shards: int, devices: int, message: str, tmp_path: Path) -> None:
    write_sharded(tmp_path, sharded_config("bf16", shards))
    with pytest.raises(AtomError, match=message):
        atom_jax.load(tmp_path, mesh=first_devices(devices))


def test_bad_devices(folder: Path) -> None:
    with pytest.raises(AtomError, match="9 devices wanted, found 8"):
        first_devices(9)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 4), ("a", "b"))
    with pytest.raises(AtomError, match="a mesh with one axis expected"):
        atom_jax.load(folder, mesh=mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 6, "num_kv_heads": 2}, "divided into 4 parts: 6 heads"),
        ({"num_heads": 12, "num_kv_heads": 3}, "divided into 4 parts: 3 kv heads"),
        ({"intermediate_size": 98}, "divided into 4 parts: 98 inner channels"),
    ],
)
def test_models_that_cannot_be_divided(changes: dict[str, int], message: str) -> None:
    config = sharded_config("bf16", 4, **changes)
    with pytest.raises(AtomError, match=message):
        config.part(4)


def test_a_missing_shard_is_named(folder: Path, tmp_path: Path) -> None:
    config = sharded_config("bf16", 2)
    write_sharded(tmp_path, config)
    path = checkpoint.layer_path(tmp_path, 1, 1, 2)
    path.rename(tmp_path / "away")
    with pytest.raises(AtomError, match=r"0001\.1-of-2: missing from the checkpoint"):
        atom_jax.load(tmp_path)
