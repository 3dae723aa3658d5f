"""Reads the RoPE rule of a Hugging Face ``config.json``, with transformers' precedence and defaults."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

from atom_jax.config import RopeConfig

if TYPE_CHECKING:
    from convert.sources.architectures import _Reader as Reader

_ROPE_KEYS = frozenset(
    (
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
        *("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "finetuned",  # only describes the training
    )
)


def rope_section(hf: dict[str, Any]) -> str:
    """The key of ``hf`` with the RoPE rule: ``rope_scaling`` unless it is empty, as in transformers."""
    return "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"


def rope_notes(hf: dict[str, Any], where: str) -> list[str]:
    """A note for the user about which rule is used, if ``hf`` has two different rules; else an empty list."""
    scaling, parameters = hf.get("rope_scaling"), hf.get("rope_parameters")
    if not (isinstance(scaling, dict) and isinstance(parameters, dict) and scaling and parameters):
        return []
    notes = [f"{where}: rope_scaling is used and rope_parameters beside it is not, as in transformers"]
    theta = hf.get("rope_theta") or 10000.0
    if "rope_theta" not in scaling and parameters.get("rope_theta", theta) != theta:
        notes[0] += (
            f"; so rope_theta is {theta:g} and not {parameters['rope_theta']}: put it into rope_scaling"
        )
    return [] if scaling == parameters else notes


def rope_config(reader: Reader, max_positions: int) -> RopeConfig:
    """The RoPE configuration from ``rope_scaling``, or else ``rope_parameters``, and ``rope_theta``.

    Args:
      reader: reader of config.json.
      max_positions: the model's ``max_position_embeddings``.

    Raises:
      AtomError: a key has an unusable value, or is unknown, or the rule is not supported.
    """
    rules = reader.section(rope_section(reader.data)) or dataclasses.replace(reader, data={})
    for part in (reader, rules):
        fraction = part.data.get("partial_rotary_factor")
        if fraction is not None and part.positive("partial_rotary_factor") != 1.0:
            raise part.fail("partial_rotary_factor", f"{fraction} is not supported; only 1 is")
    theta = (rules if rules.data.get("rope_theta") is not None else reader).positive("rope_theta", 10000.0)
    key = "type" if "rope_type" not in rules.data and "type" in rules.data else "rope_type"
    bare = key not in rules.data and (not rules.data or "rope_theta" in rules.data)
    kind = "default" if bare else rules.string(key)
    makers = {"default": _plain, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
    if kind not in makers:
        raise rules.fail(key, f"{kind!r:.60} is not supported; supported: {', '.join(makers)}")
    for name, value in rules.data.items():
        if name not in _ROPE_KEYS and value is not None:
            raise rules.fail(name, f"is no setting of RoPE that is known, found {value!r:.60}")
    return makers[kind](reader, rules, theta, max_positions)


def _original_length(reader: Reader, rules: Reader, max_positions: int) -> int:
    """The context length before extension; a value outside the section has precedence, as in transformers."""
    name = "original_max_position_embeddings"
    parts = (part for part in (reader, rules) if part.data.get(name) is not None)
    return next((part.integer(name) for part in parts), max_positions)


def _factor(rules: Reader) -> float:
    factor = rules.positive("factor")
    if factor < 1.0:
        raise rules.fail("factor", f"must be at least 1, found {factor}")
    return factor


def _plain(reader: Reader, rules: Reader, theta: float, max_positions: int) -> RopeConfig:
    return RopeConfig(theta=theta)


def _linear(reader: Reader, rules: Reader, theta: float, max_positions: int) -> RopeConfig:
    return RopeConfig(theta=theta, scaling="linear", factor=_factor(rules))


def _dynamic(reader: Reader, rules: Reader, theta: float, max_positions: int) -> RopeConfig:
    """Dynamic NTK is the plain rule up to ``max_position_embeddings``.

    It changes the frequencies only for longer sequences, which are not supported here.
    """
    _factor(rules)
    return RopeConfig(theta=theta)


def _llama3(reader: Reader, rules: Reader, theta: float, max_positions: int) -> RopeConfig:
    low, high = rules.positive("low_freq_factor"), rules.positive("high_freq_factor")
    if low >= high:
        raise rules.fail("low_freq_factor", f"must be smaller than high_freq_factor, found {low} and {high}")
    return RopeConfig(
        theta=theta,
        scaling="llama3",
        factor=_factor(rules),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_original_length(reader, rules, max_positions),
    )


def _yarn(reader: Reader, rules: Reader, theta: float, max_positions: int) -> RopeConfig:
    original = _original_length(reader, rules, max_positions)
    if "factor" in rules.data and rules.data["factor"] is None:  # as in DeepSeek's configurations
        factor = max_positions / original
    else:
        factor = _factor(rules)

    def optional(key: str) -> float | None:
        """The number under ``key``; None if it is missing, null or 0."""
        return rules.positive(key) if rules.data.get(key) else None

    fast, slow = optional("beta_fast") or 32.0, optional("beta_slow") or 1.0
    if fast < slow:
        raise rules.fail("beta_fast", f"must be at least beta_slow, found {fast} and {slow}")
    if theta <= 1.0:
        raise rules.fail("rope_theta", f"must be above 1 for yarn, found {theta}")
    if rules.data.get("attention_factor") is not None:
        attention = rules.positive("attention_factor")
    else:
        scale, all_dim = optional("mscale"), optional("mscale_all_dim")
        attention = yarn_scale(factor, scale) / yarn_scale(factor, all_dim) if scale and all_dim else None
    return RopeConfig(
        theta=theta,
        scaling="yarn",
        factor=factor,
        original_max_position_embeddings=original,
        beta_fast=fast,
        beta_slow=slow,
        yarn_truncate=rules.data.get("truncate") is None or rules.boolean("truncate"),
        attention_factor=yarn_scale(factor) if attention is None else attention,
    )


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """YaRN's attention factor for a context that is ``factor`` times as long (equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0
