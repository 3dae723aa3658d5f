"""Folding a permutation into the weights leaves what a decoder layer computes unchanged."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from convert.float_model import FloatParams
from convert.passes.reorder import (
    HeadOrder,
    energy_order,
    head_order,
    permute_ends,
    permute_heads,
    permute_inputs,
    permute_mlp,
    permute_residual,
)

TOKENS = 6


def rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-5) * weight


def rotate(x: np.ndarray) -> np.ndarray:
    """RoPE in the half-split form; x [tokens, heads, head_dim]."""
    half = x.shape[-1] // 2
    angles = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(half) / half)
    low, high = x[..., :half], x[..., half:]
    return np.concatenate(
        [low * np.cos(angles) - high * np.sin(angles), high * np.cos(angles) + low * np.sin(angles)], axis=-1
    )


def linear(layer: FloatParams, name: str, x: np.ndarray) -> np.ndarray:
    return x @ layer[f"{name}_proj"].T + layer.get(f"{name}_bias", np.zeros(1, x.dtype))


def attention_output(layer: FloatParams, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The input of o_proj, [tokens, q]."""
    qkv = linear(layer, "qkv", rms_norm(x, layer["input_norm"]))
    q, k, v = np.split(qkv, [config.q_size, config.q_size + config.kv_size], axis=-1)
    q, k, v = (part.reshape(len(x), -1, config.head_dim) for part in (q, k, v))
    if "q_norm" in layer:
        q, k = rms_norm(q, layer["q_norm"]), rms_norm(k, layer["k_norm"])
    group = config.num_heads // config.num_kv_heads
    k, v = np.repeat(rotate(k), group, axis=1), np.repeat(v, group, axis=1)
    logits = np.einsum("qhd,khd->hqk", rotate(q), k) / np.sqrt(config.head_dim)
    logits = np.where(np.tri(len(x), dtype=bool), logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)


def decoder(layer: FloatParams, x: np.ndarray, config: ModelConfig) -> np.ndarray:
    x = x + linear(layer, "o", attention_output(layer, x, config))
    gate, up = np.split(linear(layer, "gate_up", rms_norm(x, layer["post_attention_norm"])), 2, axis=-1)
    return x + linear(layer, "down", gate / (1 + np.exp(-gate)) * up)


@dataclasses.dataclass(frozen=True)
class Case:
    config: ModelConfig
    seed: int
    dtype: type

    def layer(self) -> FloatParams:
        c, rng = self.config, np.random.default_rng(self.seed)
        qkv, inner = c.q_size + 2 * c.kv_size, c.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "input_norm": (c.hidden_size,),
            "qkv_proj": (qkv, c.hidden_size),
            "o_proj": (c.hidden_size, c.q_size),
            "post_attention_norm": (c.hidden_size,),
            "gate_up_proj": (2 * inner, c.hidden_size),
            "down_proj": (c.hidden_size, inner),
        }
        if c.qkv_bias:
            shapes["qkv_bias"] = (qkv,)
        if c.o_bias:
            shapes["o_bias"] = (c.hidden_size,)
        if c.mlp_bias:
            shapes |= {"gate_up_bias": (2 * inner,), "down_bias": (c.hidden_size,)}
        if c.qk_norm:
            shapes |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
        return {
            name: (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(self.dtype)
            for name, shape in shapes.items()
        }

    def inputs(self) -> np.ndarray:
        rng = np.random.default_rng(self.seed + 1)
        return rng.standard_normal((TOKENS, self.config.hidden_size))

    def permutation(self, size: int) -> np.ndarray:
        return np.random.default_rng(self.seed + 2).permutation(size).astype(np.int32)


def assert_close(result: np.ndarray, expected: np.ndarray) -> None:
    """In float64 whatever the layer's type: permuting moves values and rounds nothing."""
    assert result.dtype == expected.dtype == np.float64
    assert np.linalg.norm(result - expected) < 1e-10 * np.linalg.norm(expected)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.integers(1, 4))
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=11,
        hidden_size=draw(st.sampled_from([8, 24])),
        intermediate_size=draw(st.sampled_from([16, 40])),
        num_layers=1,
        num_heads=kv_heads * draw(st.integers(1, 3)),
        num_kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8])),
        max_position_embeddings=32,
        qkv_bias=draw(st.booleans()),
        o_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )
    return Case(config, draw(st.integers(0, 2**31)), draw(st.sampled_from([np.float32, np.float64])))


def assert_pure(before: FloatParams, after: FloatParams, case: Case) -> None:
    """The layer given is as it was, and the new one has arrays of the same names, shapes and types."""
    assert before.keys() == after.keys()
    for name, value in case.layer().items():
        np.testing.assert_array_equal(before[name], value)
        assert (after[name].shape, after[name].dtype) == (value.shape, value.dtype)


@given(case=cases())
def test_residual_permutation_permutes_the_output(case: Case) -> None:
    layer, x = case.layer(), case.inputs()
    perm = case.permutation(case.config.hidden_size)
    folded = permute_residual(layer, perm)
    assert_close(decoder(folded, x[:, perm], case.config), decoder(layer, x, case.config)[:, perm])
    assert_pure(layer, folded, case)


@given(case=cases())
def test_mlp_permutation_changes_nothing(case: Case) -> None:
    layer, x = case.layer(), case.inputs()
    perm = case.permutation(case.config.intermediate_size)
    folded = permute_mlp(layer, perm)
    assert_close(decoder(folded, x, case.config), decoder(layer, x, case.config))
    np.testing.assert_array_equal(folded["down_proj"], layer["down_proj"][:, perm])
    assert_pure(layer, folded, case)


@given(case=cases())
def test_head_order_changes_only_the_order_of_o_proj_inputs(case: Case) -> None:
    layer, x, config = case.layer(), case.inputs(), case.config
    energy = (attention_output(layer, x, config) ** 2).sum(axis=0)
    order = head_order(energy, config.num_heads, config.num_kv_heads)
    folded = permute_heads(layer, order, config)
    assert_close(decoder(folded, x, config), decoder(layer, x, config))
    # Calibration statistics follow the same permutation.
    expected = attention_output(layer, x, config)[:, order.input_perm]
    assert_close(attention_output(folded, x, config), expected)
    assert_pure(layer, folded, case)


@given(case=cases())
def test_all_permutations_together(case: Case) -> None:
    layer, config = case.layer(), case.config
    rng = np.random.default_rng(case.seed + 3)
    energy = rng.random(config.q_size)
    perm = case.permutation(config.hidden_size)
    folded = permute_heads(layer, head_order(energy, config.num_heads, config.num_kv_heads), config)
    folded = permute_mlp(permute_residual(folded, perm), case.permutation(config.intermediate_size))
    embedding = rng.standard_normal((config.vocab_size, config.hidden_size))
    norm = rng.standard_normal(config.hidden_size)
    head = rng.standard_normal(embedding.shape)
    tokens = rng.integers(0, config.vocab_size, TOKENS)
    new_embedding, new_norm, new_head = permute_ends(embedding, norm, head, perm)
    assert new_head is not None
    logits = rms_norm(decoder(layer, embedding[tokens], config), norm) @ head.T
    assert_close(rms_norm(decoder(folded, new_embedding[tokens], config), new_norm) @ new_head.T, logits)
    assert permute_ends(embedding, norm, None, perm)[2] is None
    assert_pure(layer, folded, case)


@given(
    seed=st.integers(0, 2**31),
    num_kv_heads=st.integers(1, 5),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([2, 8]),
)
def test_head_order_is_valid_and_ascends(seed: int, num_kv_heads: int, group: int, head_dim: int) -> None:
    rng = np.random.default_rng(seed)
    num_heads = num_kv_heads * group
    energy = np.exp(4 * rng.standard_normal(num_heads * head_dim))
    order = head_order(energy, num_heads, num_kv_heads)
    for perm, size in ((order.kv_rows, len(order.kv_rows)), (order.q_rows, energy.size)):
        assert sorted(perm) == list(range(size))
    assert sorted(order.v_rows) == list(range(num_kv_heads * head_dim))
    assert sorted(order.input_perm) == list(range(energy.size))
    # Every query head reads the kv head at its place.
    np.testing.assert_array_equal(order.q_heads // group, np.repeat(order.kv_heads, group))
    heads = energy.reshape(num_heads, head_dim).sum(axis=1)
    assert order.q_heads[-1] == np.argmax(heads)
    by_group = heads[order.q_heads].reshape(num_kv_heads, group)
    assert (np.diff(by_group, axis=1) >= 0).all()
    assert (np.diff(by_group[:, -1]) >= 0).all()
    grouped = energy[order.input_perm].reshape(num_kv_heads, group, head_dim).sum(axis=1)
    assert (np.diff(grouped, axis=1) >= 0).all()


def test_energy_order_ascends_and_keeps_ties_in_order() -> None:
    perm = energy_order(np.array([3.0, 1.0, 2.0, 1.0, 0.0]))
    assert perm.dtype == np.int32
    assert perm.tolist() == [4, 1, 3, 2, 0]
    with pytest.raises(AtomError, match="1 of 2 channels is NaN"):
        energy_order(np.array([1.0, np.nan]))


def test_permute_inputs_takes_columns() -> None:
    weight = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(permute_inputs(weight, np.array([2, 0, 1])), [[2, 0, 1], [5, 3, 4]])


@pytest.mark.parametrize("perm", [[0, 1], [0, 0, 1], [1, 2, 3], [-1, 0, 1], [[0, 1, 2]]])
def test_what_is_no_permutation_is_an_error(perm: list) -> None:
    with pytest.raises(AtomError, match="permutation of 3 channels"):
        permute_inputs(np.zeros((2, 3)), np.array(perm))


def test_head_orders_that_do_not_fit_are_errors() -> None:
    with pytest.raises(AtomError, match="12 channels are not 5"):
        head_order(np.ones(12), 5, 1)
    config = ModelConfig("LlamaForCausalLM", 11, 8, 16, 1, 4, 2, 2, 32)
    layer = Case(config, 0, np.float64).layer()
    good = head_order(np.arange(8.0), 4, 2)
    apart = HeadOrder(good.kv_heads, good.q_heads[[0, 2, 1, 3]], good.channels)
    with pytest.raises(AtomError, match="separates"):
        permute_heads(layer, apart, config)
    with pytest.raises(AtomError, match="order of v channels"):
        permute_heads(layer, dataclasses.replace(good, channels=good.channels[:, :1]), config)
