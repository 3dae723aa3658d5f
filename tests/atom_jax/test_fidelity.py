"""KL divergence, agreement and layer noise equal a direct computation in float64; orders are recovered."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import atom_jax
from atom_jax import compare, perplexity, preset
from atom_jax.blocks import make_step
from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.fidelity import Fidelity, compare_texts, match_channels
from atom_jax.kv_cache import init_cache
from atom_jax.llama import Layer, make_params, merge
from atom_jax.structure import linear_shapes, vector_shapes
from convert.passes.reorder import permute_ends, permute_residual
from tests.atom_jax.models import TINY_GROUPS, tiny_config, tiny_params, tiny_tree

SEQ = 40
IDS = np.random.default_rng(0).integers(0, 160, 3 * SEQ + 11)
CONFIG = tiny_config()


@pytest.fixture(scope="module")
def params() -> nnx.State:
    return tiny_params(CONFIG)


@pytest.fixture(scope="module")
def noisy() -> nnx.State:
    """The same model with other layers: its embedding and head are those of ``params``."""
    return make_params(CONFIG, changed_tree())


def changed_tree() -> dict[str, Any]:
    tree, rng = tiny_tree(CONFIG), np.random.default_rng(5)
    tree["layers"] = {
        name: (value + rng.normal(0, 0.02, value.shape)).astype(np.float32)
        for name, value in tree["layers"].items()
    }
    return tree


@functools.partial(jax.jit, static_argnames=("config",))
def _run(params: nnx.State, window: jax.Array, *, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    model = merge(params, config)
    positions = jnp.arange(window.size, dtype=jnp.int32)[None]
    cache = init_cache(config, 1, window.size, dtype=jnp.float32)
    step = make_step(positions, cache, config)
    x, seen = model.embedding.get_value().rows(window), []
    names = (*linear_shapes(config), *vector_shapes(config))
    for index in range(config.num_layers):
        stacks = {name: model.layers.param(name) for name in names}
        layer = Layer(config, jax.tree.map(lambda stack, index=index: stack[index], stacks))
        x, cache = layer(x, cache, jnp.int32(index), step)
        seen.append(x)
    logits, _ = atom_jax.forward(
        params,
        window[None],
        positions,
        init_cache(config, 1, window.size, dtype=jnp.float32),
        config=config,
    )
    return logits[0], jnp.stack(seen)


def run(params: nnx.State, window: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Logits of one window, and the residual stream after each layer, without scan and padding."""
    logits, seen = _run(params, jnp.asarray(window, jnp.int32), config=config)
    return np.asarray(logits, np.float64), np.asarray(seen, np.float64)


def expected(
    a: tuple[nnx.State, ModelConfig], b: tuple[nnx.State, ModelConfig], ids: np.ndarray, order: np.ndarray
) -> dict[str, Any]:
    """All the numbers in float64, from the definitions."""
    nll_a, nll_b, kl, agreed = [], [], [], []
    energies = np.zeros((a[1].num_layers, 2))
    for start in range(0, len(ids), SEQ):
        window = ids[start : start + SEQ].astype(np.int32)
        if len(window) < 2:
            continue
        (logits_a, stream_a), (logits_b, stream_b) = run(a[0], window, a[1]), run(b[0], window, b[1])
        p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (logits_a[:-1], logits_b[:-1]))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        row = np.arange(len(window) - 1)
        nll_a += (-np.log(p[row, window[1:]])).tolist()
        nll_b += (-np.log(q[row, window[1:]])).tolist()
        kl += (p * np.log(p / q)).sum(-1).tolist()
        agreed += (p.argmax(-1) == q.argmax(-1)).tolist()
        energies[:, 0] += (stream_a[:, 1:] ** 2).sum((1, 2))
        energies[:, 1] += ((stream_b[:, 1:, order] - stream_a[:, 1:]) ** 2).sum((1, 2))
    return {
        "perplexity_a": math.exp(np.mean(nll_a)),
        "perplexity_b": math.exp(np.mean(nll_b)),
        "kl_divergence": np.mean(kl),
        "top1_agreement": np.mean(agreed),
        "layer_snr_db": tuple(10 * np.log10(energies[:, 0] / energies[:, 1])),
        "tokens": len(kl),
    }


def assert_equal(result: Fidelity, want: dict[str, Any]) -> None:
    assert result.layer_snr_db is not None
    for name, value in want.items():
        assert getattr(result, name) == pytest.approx(value, rel=2e-4), name
    assert 0 < result.top1_agreement < 1  # or the test would prove little


@pytest.mark.parametrize("count", [3 * SEQ + 11, 2 * SEQ + 1, 11])
def test_equals_float64(
    params: nnx.State, noisy: nnx.State, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full, short and one-token last windows, in batches of two of which the last may be half empty."""
    monkeypatch.setattr("atom_jax.fidelity._BATCH_TOKENS", 2 * SEQ)
    want = expected((params, CONFIG), (noisy, CONFIG), IDS[:count], np.arange(64))
    assert_equal(compare(params, noisy, IDS[:count], config_a=CONFIG, config_b=CONFIG, seq_len=SEQ), want)


@pytest.mark.slow
def test_quantized_against_float(params: nnx.State) -> None:
    # Without a mean of the keys, which would be drawn among the weights and leave other ones to the rest.
    config = tiny_config(preset("w4a4kv4", **TINY_GROUPS, center_keys=False))
    quantized = tiny_params(config)
    want = expected((params, CONFIG), (quantized, config), IDS[:SEQ], np.arange(64))
    result = compare(params, quantized, IDS[:SEQ], config_a=CONFIG, config_b=config, seq_len=SEQ)
    assert_equal(result, want)


def test_perplexities_are_those_of_perplexity(params: nnx.State, noisy: nnx.State) -> None:
    result = compare(params, noisy, IDS, config_a=CONFIG, config_b=CONFIG, seq_len=SEQ)
    for own, value in ((params, result.perplexity_a), (noisy, result.perplexity_b)):
        assert value == pytest.approx(perplexity(own, IDS, config=CONFIG, seq_len=SEQ).perplexity, rel=1e-5)


def test_a_model_is_itself(params: nnx.State) -> None:
    result = compare(params, params, IDS, config_a=CONFIG, config_b=CONFIG, seq_len=SEQ)
    assert (result.kl_divergence, result.top1_agreement) == (0.0, 1.0)
    assert result.layer_snr_db == (math.inf, math.inf)
    assert result.perplexity_a == result.perplexity_b


def test_reordered_residual_stream(params: nnx.State, noisy: nnx.State) -> None:
    """A permutation shared by all layers changes no number."""
    perm = np.random.default_rng(1).permutation(64)
    tree = changed_tree()
    embedding, norm, head = permute_ends(tree["embedding"], tree["norm"], tree["lm_head"], perm)
    layers = [
        permute_residual({name: value[index] for name, value in tree["layers"].items()}, perm)
        for index in range(CONFIG.num_layers)
    ]
    stacked = {name: np.stack([layer[name] for layer in layers]) for name in layers[0]}
    reordered = make_params(
        CONFIG, {"embedding": embedding, "norm": norm, "lm_head": head, "layers": stacked}
    )
    plain = compare(params, noisy, IDS, config_a=CONFIG, config_b=CONFIG, seq_len=SEQ)
    result = compare(params, reordered, IDS, config_a=CONFIG, config_b=CONFIG, seq_len=SEQ)
    assert result.layer_snr_db == pytest.approx(plain.layer_snr_db, rel=1e-4)
    assert result.kl_divergence == pytest.approx(plain.kl_divergence, rel=1e-3)


class TestResidualOrder:
    embedding = np.random.default_rng(2).normal(size=(50, 24)).astype(np.float32)

    def test_is_recovered(self) -> None:
        perm = np.random.default_rng(3).permutation(24)
        order = match_channels(self.embedding, self.embedding[:, perm])
        assert np.array_equal(self.embedding[:, perm][:, order], self.embedding)

    def test_stored_in_bfloat16(self) -> None:
        perm = np.random.default_rng(3).permutation(24)
        stored = jnp.asarray(self.embedding[:, perm], jnp.bfloat16)
        assert match_channels(self.embedding, stored).tolist() == np.argsort(perm).tolist()

    def test_equal_columns_in_place(self) -> None:
        embedding = self.embedding.copy()
        embedding[:, 3] = embedding[:, 4]
        assert match_channels(embedding, embedding).tolist() == list(range(24))

    def test_equal_columns_moved(self) -> None:
        embedding = self.embedding.copy()
        embedding[:, 3] = embedding[:, 4]
        with pytest.raises(AtomError, match="1 columns of the embedding equal an earlier one"):
            match_channels(embedding, embedding[:, ::-1])

    def test_other_embedding(self) -> None:
        other = self.embedding[:, ::-1].copy()
        other[0, 0] += 1
        other[7, 5] += 1
        with pytest.raises(AtomError, match="2 of 24 columns of one embedding are not in the other"):
            match_channels(self.embedding, other)


class TestNoLayers:
    """Models whose residual streams cannot be compared still have a KL divergence."""

    def test_other_number_of_layers(self, params: nnx.State) -> None:
        config = CONFIG.replace(num_layers=3)
        result = compare(
            params, tiny_params(config), IDS[:SEQ], config_a=CONFIG, config_b=config, seq_len=SEQ
        )
        assert result.layer_snr_db is None
        assert result.no_snr == "the models have 2 and 3 layers"
        assert result.kl_divergence > 0

    def test_other_model(self, params: nnx.State) -> None:
        other = tiny_params(CONFIG, seed=1)
        result = compare(params, other, IDS[:SEQ], config_a=CONFIG, config_b=CONFIG, seq_len=SEQ)
        assert result.layer_snr_db is None
        assert "64 of 64 columns" in str(result.no_snr)
        assert result.kl_divergence > 0

    def test_other_width(self, params: nnx.State) -> None:
        config = CONFIG.replace(hidden_size=32)
        other = tiny_params(config)
        result = compare(params, other, IDS[:SEQ], config_a=CONFIG, config_b=config, seq_len=SEQ)
        assert result.no_snr == "the embeddings are of shapes [160, 64] and [160, 32]"
        assert result.kl_divergence > 0


def test_max_tokens_and_progress(params: nnx.State, noisy: nnx.State) -> None:
    seen: list[tuple[int, int]] = []
    options: dict[str, Any] = {"config_a": CONFIG, "config_b": CONFIG, "seq_len": 256}
    ids = np.concatenate([IDS, IDS, IDS, IDS])
    limited = compare(params, noisy, ids, max_tokens=300, progress=lambda *done: seen.append(done), **options)
    assert seen == [(300, 300)]
    direct = compare(params, noisy, ids[:300], **options)
    assert (limited.kl_divergence, limited.tokens) == (direct.kl_divergence, 298)


@pytest.mark.parametrize(
    ("tokens", "changes", "message"),
    [
        ([1], {}, "at least two tokens are needed to measure perplexity, found 1"),
        ([1, 2, 160], {}, "token ids must be 0 to 159, found 1 to 160"),
        ([1, 2, 3], {"vocab_size": 161}, "the models have different vocabularies: 160 and 161 tokens"),
        ([1, 2, 3], {"max_position_embeddings": 8}, "window length must be 2 to 8, found 40"),
    ],
)
def test_errors(tokens: list[int], changes: dict[str, Any], message: str) -> None:
    params: Any = None  # not looked at before the arguments are
    with pytest.raises(AtomError) as caught:
        compare(params, params, tokens, config_a=CONFIG, config_b=CONFIG.replace(**changes), seq_len=SEQ)
    assert str(caught.value) == message


def test_output_that_overflows(params: nnx.State) -> None:
    tree = tiny_tree(CONFIG)
    tree["norm"] = tree["norm"] * np.float32(1e38)
    with pytest.raises(AtomError, match="the output of model B is not finite"):
        compare(
            params,
            make_params(CONFIG, tree),
            IDS[:SEQ],
            config_a=CONFIG,
            config_b=CONFIG,
            seq_len=SEQ,
        )


def test_sums_are_those_of_each_window(
    params: nnx.State, noisy: nnx.State, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of two, the last half empty: each window is the same as alone."""
    monkeypatch.setattr("atom_jax.fidelity._BATCH_TOKENS", 2 * SEQ)
    options: dict[str, Any] = {"config_a": CONFIG, "config_b": CONFIG, "seq_len": SEQ}
    result = compare(params, noisy, IDS[: 2 * SEQ + 11], **options)
    assert result.scored.tolist() == [SEQ - 1, SEQ - 1, 10]
    for index, start in enumerate(range(0, 2 * SEQ + 11, SEQ)):
        alone = compare(params, noisy, IDS[start : min(start + SEQ, 2 * SEQ + 11)], **options)
        for sums, want in zip(result.sums, alone.sums, strict=True):
            assert sums[index] == pytest.approx(want[0], rel=1e-5)


def test_several_texts(params: nnx.State, noisy: nnx.State) -> None:
    options: dict[str, Any] = {"config_a": CONFIG, "config_b": CONFIG, "seq_len": SEQ}
    texts = {"first": IDS[: 2 * SEQ], "second": IDS[SEQ:]}
    seen: list[tuple[str, int, int]] = []
    result = compare_texts(
        params, noisy, texts, max_tokens=70, progress=lambda *done: seen.append(done), **options
    )
    assert {name for name, *_ in seen} == set(texts) and ("second", 70, 70) in seen
    log_ratios = []
    for name, ids in texts.items():
        alone = compare(params, noisy, ids, max_tokens=70, **options)
        assert result.texts[name].kl_divergence == alone.kl_divergence
        ratio = alone.perplexity_b / alone.perplexity_a
        assert result.ratios.texts[name].value == pytest.approx(ratio)
        log_ratios.append(math.log(ratio))
    assert result.ratios.mean.value == pytest.approx(math.exp(np.mean(log_ratios)))
