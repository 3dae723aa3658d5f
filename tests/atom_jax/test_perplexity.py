"""Perplexity equals a direct computation with transformers, and what has none is an error."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atom_jax import compare
from atom_jax.errors import AtomError
from atom_jax.generation import PREFILL_CHUNK
from atom_jax.llama import make_params
from atom_jax.perplexity import perplexity
from convert import streaming
from convert.float_model import load_float
from convert.sources import open_source
from convert.streaming import streamed_perplexity
from tests.atom_jax.hf import hf_logits, make_hf
from tests.atom_jax.models import tiny_config, tiny_params, tiny_tree

SEQ = 50
IDS = np.random.default_rng(0).integers(0, 160, 3 * SEQ + 7)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    folder: Path = tmp_path_factory.mktemp("perplexity")
    model = make_hf("Llama", {})
    model.save_pretrained(folder)
    return model, *load_float(open_source(folder))


def reference(model: Any, ids: np.ndarray, seq_len: int) -> tuple[float, int]:
    """exp of the mean cross-entropy (float64) of all tokens but the first of each window; their number."""
    losses: list[float] = []
    for start in range(0, len(ids), seq_len):
        window = ids[start : start + seq_len].astype(np.int32)
        if len(window) < 2:
            continue
        logits = hf_logits(model, window)[:-1].astype(np.float64)
        peak = logits.max(-1)
        log_sum = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak
        losses += (log_sum - logits[np.arange(len(window) - 1), window[1:]]).tolist()
    return math.exp(np.mean(losses)), len(losses)


@pytest.mark.parametrize("count", [3 * SEQ + 7, 2 * SEQ, 2 * SEQ + 1, SEQ - 1, 2])
def test_equals_transformers(models: tuple[Any, Any, Any], count: int) -> None:
    """A short last window counts, unless it has only one token; windows do not see each other."""
    model, config, params = models
    result = perplexity(params, IDS[:count], config=config, seq_len=SEQ)
    expected, scored = reference(model, IDS[:count], SEQ)
    assert result.tokens == scored
    # Of a mean loss of many nats, the relative error of the perplexity is that many times larger.
    assert math.log(result.perplexity) == pytest.approx(math.log(expected), rel=1e-6)
    assert result.seconds >= 0


def test_max_tokens_and_progress(models: tuple[Any, Any, Any]) -> None:
    _, config, params = models
    seen: list[tuple[int, int]] = []

    def note(done: int, total: int) -> None:
        seen.append((done, total))

    limited = perplexity(params, IDS, config=config, seq_len=SEQ, max_tokens=120, progress=note)
    direct = perplexity(params, IDS[:120].tolist(), config=config, seq_len=SEQ)
    assert (limited.perplexity, limited.tokens) == (direct.perplexity, direct.tokens)
    assert seen == [(50, 120), (100, 120), (120, 120)]


def test_more_rows_than_one_piece_of_the_head(models: tuple[Any, Any, Any]) -> None:
    """Logits exist for 128 rows at a time; a window of 150 takes two pieces, the second filled up."""
    model, config, params = models
    result = perplexity(params, IDS[:150], config=config, seq_len=150)
    assert result.perplexity == pytest.approx(reference(model, IDS[:150], 150)[0], rel=1e-5)


def test_windows_longer_than_a_chunk(tmp_path: Path) -> None:
    """They are computed in chunks of prefill, here one and a part of another."""
    count = PREFILL_CHUNK + 70
    model = make_hf("Llama", {"max_position_embeddings": 1024})
    model.save_pretrained(tmp_path)
    config, params = load_float(open_source(tmp_path))
    ids = np.random.default_rng(1).integers(0, 160, count + 30)
    result = perplexity(params, ids, config=config, seq_len=count)
    expected, scored = reference(model, ids, count)
    assert (result.tokens, result.perplexity) == (scored, pytest.approx(expected, rel=1e-5))


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (1e5, "the mean loss of the model is [0-9]{4,} nats"),
        (np.nan, "the output of the model is not finite"),
    ],
)
def test_no_perplexity(scale: float, message: str) -> None:
    """Beyond exp(709) there is no float64, and of no number no perplexity."""
    config = tiny_config()
    tree = tiny_tree(config)
    params = make_params(config, {**tree, "lm_head": tree["lm_head"] * scale})
    with pytest.raises(AtomError, match=message):
        perplexity(params, IDS, config=config, seq_len=SEQ)
    with pytest.raises(AtomError, match=message.replace("the model", "model B")):
        compare(tiny_params(config), params, IDS, config_a=config, config_b=config, seq_len=SEQ)
    layers = [{name: value[layer] for name, value in tree["layers"].items()} for layer in range(2)]
    shared = {name: value for name, value in tree.items() if name != "layers"}
    shared["lm_head"] = shared["lm_head"] * scale
    with pytest.raises(AtomError, match=message.replace("the model", config.architecture)):
        streamed_perplexity(lambda: layers, shared, IDS, config=config, seq_len=SEQ)


@pytest.mark.parametrize("windows", [(), (5, 5), (None, 9)])
def test_streamed_perplexity_of_a_text_of_any_length(
    windows: tuple[int | None, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The residual stream of a part of the text is in memory; the value is that of the whole."""
    config = tiny_config(windows=windows)
    tree = tiny_tree(config)
    layers = [{name: value[layer] for name, value in tree["layers"].items()} for layer in range(2)]
    shared = {name: value for name, value in tree.items() if name != "layers"}
    sizes: list[int] = []
    reports: list[tuple[int, int]] = []

    def measure() -> Any:
        return streamed_perplexity(
            lambda: layers,
            shared,
            IDS,
            config=config,
            seq_len=SEQ,
            progress=lambda done, total: reports.append((done, total)),
        )

    whole = measure()
    assert reports == [(1, 2), (2, 2)]
    reports.clear()
    monkeypatch.setattr(streaming, "_RESIDUAL_TOKENS", 2 * SEQ + 1)
    plain = streaming.embed

    def embed(embedding: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        sizes.append(tokens.size)
        return plain(embedding, tokens)

    monkeypatch.setattr(streaming, "embed", embed)
    parts = measure()
    assert sizes == [2 * SEQ, 2 * SEQ]
    assert reports == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert parts.tokens == whole.tokens
    assert parts.perplexity == pytest.approx(whole.perplexity, rel=1e-6)
    direct = perplexity(tiny_params(config), IDS, config=config, seq_len=SEQ)
    assert parts.perplexity == pytest.approx(direct.perplexity, rel=1e-5)
    if windows:
        full = perplexity(tiny_params(config), IDS, config=config.replace(windows=()), seq_len=SEQ)
        assert parts.perplexity != pytest.approx(full.perplexity, rel=1e-3)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([1], {}, "at least two tokens are needed to measure perplexity, found 1"),
        ([], {}, "at least two tokens are needed to measure perplexity, found 0"),
        ([1, 2, 3], {"max_tokens": 1}, "at least two tokens are needed to measure perplexity, found 1"),
        ([1, 2, 3], {"max_tokens": -1}, "max_tokens must be positive, found -1"),
        ([1, 2, 3], {"seq_len": 1}, "window length must be 2 to 256, found 1"),
        ([1, 2, 3], {"seq_len": 257}, "window length must be 2 to 256, found 257"),
        ([1, 160, 3], {}, "token ids must be 0 to 159, found 1 to 160"),
        ([1, -1, 3], {}, "token ids must be 0 to 159, found -1 to 3"),
    ],
)
def test_errors(tokens: list[int], options: dict[str, Any], message: str) -> None:
    params: Any = None  # not looked at before the arguments are
    with pytest.raises(AtomError) as caught:
        perplexity(params, tokens, config=tiny_config(), **{"seq_len": 16, **options})
    assert str(caught.value) == message
