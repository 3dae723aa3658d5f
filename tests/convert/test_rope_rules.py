"""RoPE rules of config.json give the frequencies and the attention factor of transformers."""

from __future__ import annotations

import copy
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from atom_jax.rope import rope_frequencies, rope_table
from convert.sources import open_source
from convert.sources.architectures import parse_config
from tests.convert.tiny import FAMILIES, fails, save_gguf, save_tiny, tiny_config, tiny_tensors, to_gguf

WHERE = "some/config.json"
LENGTH = 128  # of the tiny configuration
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
RULES: dict[str, dict[str, Any]] = {
    "yarn": {"rope_scaling": YARN},
    "yarn, old spelling": {"rope_scaling": {**YARN, "rope_type": None, "type": "yarn", "finetuned": True}},
    "yarn, theta inside": {"rope_theta": None, "rope_parameters": {**YARN, "rope_theta": 1e6}},
    "yarn, whole context": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "yarn, betas": {"rope_scaling": {**YARN, "beta_fast": 8, "beta_slow": 2.0}},
    "yarn, zero betas": {"rope_scaling": {**YARN, "beta_fast": 0, "beta_slow": None}},
    "yarn, not truncated": {"rope_scaling": {**YARN, "truncate": False}},
    "yarn, attention factor": {"rope_scaling": {**YARN, "attention_factor": 0.5}},
    "yarn, mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    "yarn, one mscale": {"rope_scaling": {**YARN, "mscale": 0.7, "mscale_all_dim": 0}},
    "yarn, null factor": {"rope_scaling": {**YARN, "factor": None}},
    "yarn, factor 1": {"rope_scaling": {**YARN, "factor": 1.0}},
    "yarn, length outside": {"rope_scaling": YARN, "original_max_position_embeddings": 16},
    "yarn, huge betas": {"rope_scaling": {**YARN, "beta_fast": 1000.0, "beta_slow": 999.0}},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "dynamic, theta inside": {"rope_parameters": {"rope_theta": 1e6, "rope_type": "dynamic", "factor": 4}},
    "llama3": {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": 32}},
    "llama3, whole context": {"rope_scaling": LLAMA3},
    "yarn beside default": {"rope_theta": None, "rope_scaling": YARN, "rope_parameters": PLAIN},
    "yarn beside default, theta outside": {"rope_theta": 5e5, "rope_scaling": YARN, "rope_parameters": PLAIN},
    "yarn with theta beside default": {"rope_scaling": {**YARN, "rope_theta": 5e5}, "rope_parameters": PLAIN},
    "linear beside llama3": {
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "rope_parameters": {**LLAMA3, "rope_theta": 5e5},
    },
    "empty beside yarn": {"rope_scaling": {}, "rope_parameters": {**YARN, "rope_theta": 5e5}},
}  # fmt: skip


def settings_of(family: str, rules: dict[str, Any]) -> dict[str, Any]:
    rules = copy.deepcopy(rules)
    for section in rules.values():
        if isinstance(section, dict) and section.get("rope_type", "") is None:
            del section["rope_type"]
    return tiny_config(family, **rules)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", RULES)
def test_rule_is_that_of_transformers(name: str, family: str) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    settings = settings_of(family, RULES[name])
    ours = parse_config(settings, where=WHERE).rope

    prefix = FAMILIES[family].removesuffix("ForCausalLM")
    config = getattr(transformers, f"{prefix}Config").from_dict(copy.deepcopy(settings))
    module = getattr(transformers.models, family)
    rotary = getattr(getattr(module, f"modeling_{family}"), f"{prefix}RotaryEmbedding")(config)
    np.testing.assert_allclose(rope_frequencies(ours, 16), rotary.inv_freq.numpy(), rtol=2e-6)
    assert ours.attention_factor == pytest.approx(rotary.attention_scaling, rel=1e-12)

    # Whatever the length is, up to the longest that is possible, and however it is reached.
    for length in (1, 32, LENGTH):
        positions = np.arange(length)
        cos, sin = rotary(torch.zeros(1), torch.from_numpy(positions)[None])
        for table, expected in zip(rope_table(jnp.asarray(positions), ours, 16), (cos, sin), strict=True):
            np.testing.assert_allclose(table, expected[0, :, :8].numpy(), atol=2e-5)


def test_dynamic_ntk_would_change_longer_sequences() -> None:
    """Otherwise the test above would prove nothing of it: the limit is what makes the rules equal."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig.from_dict(settings_of("llama", RULES["dynamic"]))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    before = rotary.inv_freq.clone()
    rotary(torch.zeros(1), torch.arange(LENGTH)[None])
    assert torch.equal(rotary.inv_freq, before)
    rotary(torch.zeros(1), torch.arange(LENGTH + 1)[None])
    assert not torch.equal(rotary.inv_freq, before)


@pytest.mark.parametrize(
    ("rules", "parts"),
    [
        ({"rope_type": "longrope", "factor": 2.0}, ["rope_scaling.rope_type", "'longrope'", "yarn"]),
        ({"rope_type": "proportional", "factor": 2.0}, ["'proportional'"]),
        ({"type": "ntk", "factor": 2.0}, ["rope_scaling.type", "'ntk'"]),
        ({"rope_type": None, "factor": 2.0}, ["rope_scaling.rope_type"]),
        ({**YARN, "alpha": 1000.0}, ["rope_scaling.alpha", "1000"]),
        ({"rope_type": "default", "mrope_section": [1, 2]}, ["rope_scaling.mrope_section"]),
        ({"rope_type": "yarn"}, ["rope_scaling.factor", "missing"]),
        ({"rope_type": "dynamic"}, ["rope_scaling.factor", "missing"]),
        ({**YARN, "factor": 0.5}, ["rope_scaling.factor", "at least 1"]),
        ({**YARN, "beta_fast": 1.0, "beta_slow": 2.0}, ["beta_fast", "beta_slow"]),
        ({**YARN, "attention_factor": -1.0}, ["attention_factor", "-1"]),
        ({**YARN, "mscale": "x", "mscale_all_dim": 1.0}, ["mscale", "'x'"]),
        ({**YARN, "truncate": "no"}, ["truncate", "'no'"]),
        ({**YARN, "original_max_position_embeddings": 0}, ["original_max_position_embeddings"]),
        ({**YARN, "rope_theta": 1.0}, ["rope_theta", "above 1"]),
    ],
)
def test_unusable_rule_is_named(rules: dict[str, Any], parts: list[str]) -> None:
    with fails(WHERE, *parts):
        parse_config(tiny_config(rope_scaling=rules, rope_parameters=PLAIN), where=WHERE)


def test_which_section_is_used_is_said(tmp_path: Any) -> None:
    both = save_tiny(tmp_path / "a", rope_theta=None, rope_scaling=YARN, rope_parameters=PLAIN)
    (note,) = open_source(both).notes
    assert all(
        part in note for part in ("config.json", "rope_scaling", "rope_parameters", "10000", "1000000.0")
    )
    assert open_source(save_tiny(tmp_path / "b", rope_scaling=YARN)).notes == ()
    same = save_tiny(tmp_path / "c", rope_scaling=YARN, rope_parameters=YARN)
    assert open_source(same).notes == ()


GGUF_YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 32,
}


@pytest.mark.parametrize(
    ("metadata", "rules"),
    [
        ({}, {}),
        ({"llama.rope.scaling.finetuned": True}, {}),
        ({"llama.rope.scaling.yarn_beta_fast": 8.0}, {"beta_fast": 8.0}),
        ({"llama.rope.scaling.yarn_beta_slow": 2.0}, {"beta_slow": 2.0}),
        ({"llama.rope.scaling.attn_factor": 0.5}, {"attention_factor": 0.5 * (0.1 * np.log(4.0) + 1)}),
        ({"llama.rope.scaling.yarn_ext_factor": 1.0}, {}),
    ],
)  # fmt: skip
def test_yarn_in_gguf(metadata: dict[str, Any], rules: dict[str, Any], tmp_path: Any) -> None:
    config = tiny_config()
    file = save_gguf(
        tmp_path / "yarn.gguf",
        "llama",
        to_gguf("llama", tiny_tensors(config), config),
        config,
        metadata=GGUF_YARN | metadata,
    )
    expected = parse_config(tiny_config(rope_scaling={**YARN, **rules}), where=WHERE)
    assert open_source(file).config.rope == expected.rope


@pytest.mark.parametrize("kind", ["yarn", "linear", "none"])
@pytest.mark.parametrize("key", ["yarn_log_multiplier", "alpha", "something_new"])
def test_unknown_rule_in_gguf(key: str, kind: str, tmp_path: Any) -> None:
    config = tiny_config()
    tensors = to_gguf("llama", tiny_tensors(config), config)
    metadata = {**GGUF_YARN, "llama.rope.scaling.type": kind, f"llama.rope.scaling.{key}": 0.1}
    file = save_gguf(tmp_path / "yarn.gguf", "llama", tensors, config, metadata=metadata)
    with fails(file, f"rope.scaling.{key}"):
        open_source(file)
