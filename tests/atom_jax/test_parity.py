"""The float model gives the logits and the greedy tokens of transformers' PyTorch models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.generation import generate
from atom_jax.kv_cache import init_cache
from atom_jax.llama import forward
from convert.demo.smollm2 import smollm2_gguf
from convert.float_model import load_float
from convert.sources import open_source
from tests.atom_jax.hf import hf_logits, make_hf, torch, transformers
from tests.atom_jax.models import ragged_prompts, relative_error

LENGTHS = [100, 37, 1]  # far enough for every RoPE rule below to matter
NEW_TOKENS = 12
# "Once upon a time, a small robot that lived in the mountains decided to"
SMOLLM2_PROMPT = [6403, 1980, 253, 655, 28, 253, 1165, 8085, 338, 4161, 281, 260, 8718, 4041, 288]
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}  # the longest sequence below has all of its positions
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4}),
    "llama3-tied": ("Llama", {"tie_word_embeddings": True, "rope_theta": 500000.0}),
    "rope-llama3": ("Llama", {"rope_scaling": LLAMA3}),
    "rope-linear": ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}, "head_dim": 24}),
    "rope-yarn": ("Llama", {"rope_scaling": YARN}),
    "rope-yarn-qwen3": ("Qwen3", {"rope_scaling": {**YARN, "truncate": False}, "head_dim": 32}),
    "rope-dynamic": ("Qwen2", {"rope_scaling": DYNAMIC, "max_position_embeddings": 112}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 32}),
    "mistral-window": ("Mistral", {"sliding_window": 16}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True, "rope_theta": 1e6}),
    "qwen2-window": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 24,
            "max_window_layers": 1,
        },
    ),
    "qwen2-layer-types": (
        "Qwen2",
        {
            "num_hidden_layers": 3,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32, "rms_norm_eps": 1e-6}),
    "qwen3-bias": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
}

WINDOWS = {
    "mistral-window": (16, 16),
    "qwen2-window": (None, 24, 24),
    "qwen2-layer-types": (5, None, 5),
}

# Goes through both libraries' ``generate`` too, which compiles for seconds and is the same code for all.
GENERATED = ("qwen2", "mistral-window")


def prefill_and_decode(
    params: Any, config: Any, tokens: np.ndarray, lengths: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of the prompts, and ``count`` greedy tokens made by ``forward`` one at a time."""
    cache = init_cache(config, len(lengths), tokens.shape[1] + count, dtype=jnp.float32)
    columns = np.arange(tokens.shape[1])
    positions = jnp.asarray(np.where(columns < lengths[:, None], columns, -1), jnp.int32)
    prompt_logits, cache = forward(params, jnp.asarray(tokens), positions, cache, config=config)
    prompt_logits = np.asarray(prompt_logits)
    chosen = [prompt_logits[np.arange(len(lengths)), lengths - 1].argmax(-1)]
    while len(chosen) < count:
        step = jnp.asarray(lengths + len(chosen) - 1, jnp.int32)[:, None]
        token = jnp.asarray(chosen[-1], jnp.int32)[:, None]
        logits, cache = forward(params, token, step, cache, config=config)
        chosen.append(np.asarray(logits)[:, 0].argmax(-1))
    return prompt_logits, np.stack(chosen, axis=1)


def hf_greedy(model: Any, tokens: np.ndarray, count: int) -> list[int]:
    prompt = torch.from_numpy(tokens)[None].long()
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=count, pad_token_id=0
    )
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", VARIANTS)
def test_family_matches_transformers(name: str, tmp_path: Path) -> None:
    model = make_hf(*VARIANTS[name])
    model.save_pretrained(tmp_path)
    config, params = load_float(open_source(tmp_path))
    tokens, lengths = ragged_prompts(LENGTHS, config.vocab_size)
    logits, greedy = prefill_and_decode(params, config, tokens, lengths, NEW_TOKENS)
    for row, length in enumerate(lengths):
        prompt = tokens[row, :length]
        expected = hf_logits(model, np.concatenate([prompt, greedy[row]]))
        assert relative_error(logits[row, :length], expected[:length]) < 1e-5
        # Each token is the one transformers would have chosen after those before it.
        assert greedy[row].tolist() == expected[length - 1 : -1].argmax(-1).tolist()
    if name not in GENERATED:
        return
    out, counts = generate(params, tokens, lengths, config=config, max_new_tokens=NEW_TOKENS)
    assert counts.tolist() == [NEW_TOKENS] * len(LENGTHS)
    for row, length in enumerate(lengths):
        assert out[row].tolist() == hf_greedy(model, tokens[row, :length], NEW_TOKENS)


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("name", WINDOWS)
def test_windows_in_chunks_match_transformers(name: str, chunk: int, tmp_path: Path) -> None:
    """Pieces that begin and end inside a window, as long as one, and longer than all; pages of 8 tokens."""
    model = make_hf(*VARIANTS[name])
    model.save_pretrained(tmp_path)
    config, params = load_float(open_source(tmp_path))
    assert config.windows == WINDOWS[name]
    tokens, _ = ragged_prompts([70], config.vocab_size)
    cache, logits = init_cache(config, 1, 70, page_size=8, dtype=jnp.float32), []
    for start in range(0, 70, chunk):
        piece = jnp.asarray(tokens[:, start : start + chunk])
        positions = start + jnp.arange(piece.shape[1], dtype=jnp.int32)[None]
        new, cache = forward(params, piece, positions, cache, config=config)
        logits.append(np.asarray(new[0]))
    assert relative_error(np.concatenate(logits), hf_logits(model, tokens[0])) < 1e-5


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_matter_at_these_positions(name: str) -> None:
    family, overrides = VARIANTS[name]
    full = {**overrides, "sliding_window": None, "layer_types": None}
    windowed, unwindowed = make_hf(family, overrides), make_hf(family, full)
    tokens, _ = ragged_prompts(LENGTHS, 160)
    assert relative_error(hf_logits(windowed, tokens[0]), hf_logits(unwindowed, tokens[0])) > 0.1


@pytest.mark.parametrize("name", ["rope-llama3", "rope-linear", "rope-yarn", "rope-yarn-qwen3"])
def test_rope_scaling_matters_at_these_positions(name: str) -> None:
    """Otherwise the parity above would not tell one rule from another."""
    family, overrides = VARIANTS[name]
    unscaled = {key: value for key, value in overrides.items() if key != "rope_scaling"}
    scaled, plain = make_hf(family, overrides), make_hf(family, unscaled)
    tokens, _ = ragged_prompts(LENGTHS, 160)
    assert relative_error(hf_logits(scaled, tokens[0]), hf_logits(plain, tokens[0])) > 0.1


@pytest.mark.smollm2
def test_smollm2_matches_transformers() -> None:
    source = open_source(smollm2_gguf())
    config, params = load_float(source)
    hf_config = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_theta=config.rope.theta,
        tie_word_embeddings=True,
        eos_token_id=list(config.eos_token_ids),
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(hf_config).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(hf_config)
    state = {name: torch.from_numpy(source.tensor(name)) for name in source.shapes}
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    assert (missing, unexpected) == (["lm_head.weight"], [])

    tokens = np.asarray([SMOLLM2_PROMPT], np.int32)
    lengths = np.asarray([tokens.shape[1]])
    positions = jnp.arange(tokens.shape[1])[None]
    cache = init_cache(config, 1, tokens.shape[1], dtype=jnp.float32)
    logits, _ = forward(params, jnp.asarray(tokens), positions, cache, config=config)
    assert relative_error(logits[0], hf_logits(model, tokens[0])) < 1e-4
    out, counts = generate(params, tokens, lengths, config=config, max_new_tokens=20)
    expected = hf_greedy(model, tokens[0], 20)
    assert out[0, : counts[0]].tolist() == expected
