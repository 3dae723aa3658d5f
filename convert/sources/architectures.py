"""The supported architectures: turns a Hugging Face ``config.json`` into a ``ModelConfig`` and tensor shapes.

Nothing in a ``config.json`` is trusted. The type and range of every value that affects the model's output are
checked, and a feature that Atom-JAX does not support is an error that names it. If, for example, chunked
attention were silently converted to full attention, the model would be wrong only on long prompts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from convert.sources.rope_rules import rope_config

MAX_LAYERS = 4096  # far above any real model; keeps a nonsensical config.json from exhausting memory


@dataclasses.dataclass(frozen=True)
class Family:
    """The properties of an architecture, and which of them depend on ``config.json``.

    Attributes:
      attention_bias: which projections have a bias: "never" none, "qkv" always q, k and v but not o, "config"
        all of q, k, v and o if the key ``attention_bias`` is true.
      mlp_bias: whether the key ``mlp_bias`` is read; if not, the MLP has no biases.
      qk_norm: whether queries and keys have an RMSNorm over head_dim.
      default_kv_heads: whether a missing ``num_key_value_heads`` means one kv head for each query head
        (Llama 1); if not, the key is required.
      windows: which layers have a sliding window: "never", "all" or "config" (by the keys
        ``use_sliding_window``, and ``layer_types`` or ``max_window_layers``).
    """

    attention_bias: str = "never"
    mlp_bias: bool = False
    qk_norm: bool = False
    default_kv_heads: bool = False
    windows: str = "never"


FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(attention_bias="config", mlp_bias=True, default_kv_heads=True),
    "MistralForCausalLM": Family(windows="all"),
    "Qwen2ForCausalLM": Family(attention_bias="qkv", windows="config"),
    "Qwen3ForCausalLM": Family(attention_bias="config", qk_norm=True, windows="config"),
}
# Architecture names of models that were saved without a head; they convert if the head is tied to the
# embedding.
HEADLESS = {name.replace("ForCausalLM", "Model"): name for name in FAMILIES}
# The architecture by "model_type", for a config.json without "architectures".
MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_EXPERT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
# The values that transformers uses if the keys are missing.
_DEFAULT_WINDOW = 4096
_DEFAULT_MAX_WINDOW_LAYERS = 28
_FULL, _SLIDING = "full_attention", "sliding_attention"
_REQUIRED = object()


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads values from a JSON object and checks their types; errors name the file and the key.

    Attributes:
      data: the JSON object.
      where: what to call the file in error messages.
      prefix: the keys of the enclosing objects, for error messages, e.g. "rope_scaling.".
    """

    data: dict[str, Any]
    where: str
    prefix: str = ""

    def fail(self, key: str, problem: str) -> AtomError:
        return AtomError(f"{self.where}: {self.prefix}{key} {problem}")

    def _get(self, key: str, default: Any) -> Any:
        if key in self.data:
            return self.data[key]
        if default is _REQUIRED:
            raise self.fail(key, "is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1) -> int:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"must be an integer, found {_show(value)}")
        if value < minimum:
            raise self.fail(key, f"must be at least {minimum}, found {value}")
        return value

    def optional_integer(self, key: str, default: int | None = None) -> int | None:
        return None if self._get(key, default) is None else self.integer(key, default)

    def positive(self, key: str, default: Any = _REQUIRED) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.fail(key, f"must be a number, found {_show(value)}")
        try:
            number = float(value)
        except OverflowError:  # an integer with more than 308 digits
            number = math.inf
        if not (math.isfinite(number) and number > 0):
            raise self.fail(key, f"must be positive and finite, found {_show(value)}")
        return number

    def boolean(self, key: str) -> bool:
        """The value; False if the key is missing or null, as in transformers."""
        value = self._get(key, None)
        if value is None:
            return False
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, found {_show(value)}")
        return value

    def string(self, key: str, default: Any = _REQUIRED) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.fail(key, f"must be a string, found {_show(value)}")
        return value

    def section(self, key: str) -> _Reader | None:
        """A reader of the JSON object under ``key``; None if the key is missing or null."""
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(key, f"must be an object, found {_show(value)}")
        return _Reader(value, self.where, f"{self.prefix}{key}.")


def _show(value: Any) -> str:
    """``value`` as JSON-like text, short enough for a one-line message."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a huge integer"
    return f"{text[:57]}..." if len(text) > 60 else text


def parse_config(hf: dict[str, Any], *, where: str) -> ModelConfig:
    """The ``ModelConfig`` that a Hugging Face ``config.json`` describes.

    Args:
      hf: the parsed JSON object. RoPE can have the keys of transformers 4 (``rope_theta``, ``rope_scaling``)
        or of transformers 5 (``rope_parameters``); if both are present, those of version 4 are used, as in
        transformers.
      where: what to call the file in error messages.

    Raises:
      AtomError: a key is missing or has an unusable value, or Atom-JAX does not support the model.
    """
    if not isinstance(hf, dict):
        raise AtomError(f"{where}: must hold a JSON object, found {_show(hf)}")
    reader = _Reader(hf, where)
    architecture = _architecture(reader)
    family = FAMILIES[architecture]
    _reject_unsupported(reader)
    max_positions = reader.integer("max_position_embeddings")
    num_heads = reader.integer("num_attention_heads")
    num_kv_heads = _num_kv_heads(reader, family, num_heads)
    num_layers = reader.integer("num_hidden_layers")
    if num_layers > MAX_LAYERS:
        raise reader.fail("num_hidden_layers", f"must be at most {MAX_LAYERS}, found {_show(num_layers)}")
    vocab_size = reader.integer("vocab_size")
    hidden_size = reader.integer("hidden_size")
    bias = reader.boolean("attention_bias") if family.attention_bias == "config" else False
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(reader, family, hidden_size, num_heads),
        max_position_embeddings=max_positions,
        rms_norm_eps=reader.positive("rms_norm_eps"),
        rope=rope_config(reader, max_positions),
        tie_word_embeddings=reader.boolean("tie_word_embeddings"),
        qkv_bias=bias or family.attention_bias == "qkv",
        o_bias=bias,
        mlp_bias=family.mlp_bias and reader.boolean("mlp_bias"),
        qk_norm=family.qk_norm,
        windows=_windows(reader, family, num_layers, max_positions),
        bos_token_id=next(iter(_token_ids(reader, "bos_token_id", vocab_size)), None),
        eos_token_ids=_token_ids(reader, "eos_token_id", vocab_size),
    )


def with_generation_config(config: ModelConfig, generation: dict[str, Any], *, where: str) -> ModelConfig:
    """``config`` with the end-of-sequence ids of ``generation_config.json`` added after its own.

    Chat models often name the end-of-turn token only in that file, and without it generation does not stop.
    """
    extra = _token_ids(_Reader(generation, where), "eos_token_id", config.vocab_size)
    return config.replace(eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + extra)))


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a checkpoint of ``config`` must have, in the order of the model.

    Projections are [out, in], as in PyTorch. ``lm_head.weight`` is left out if it is tied to the embedding.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    layer: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    projections = {
        "self_attn.q_proj": (config.q_size, hidden, config.qkv_bias),
        "self_attn.k_proj": (config.kv_size, hidden, config.qkv_bias),
        "self_attn.v_proj": (config.kv_size, hidden, config.qkv_bias),
        "self_attn.o_proj": (hidden, config.q_size, config.o_bias),
        "mlp.gate_proj": (inner, hidden, config.mlp_bias),
        "mlp.up_proj": (inner, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, inner, config.mlp_bias),
    }
    for name, (rows, columns, bias) in projections.items():
        layer[f"{name}.weight"] = (rows, columns)
        if bias:
            layer[f"{name}.bias"] = (rows,)
    if config.qk_norm:
        layer["self_attn.q_norm.weight"] = layer["self_attn.k_norm.weight"] = (config.head_dim,)
    layer["post_attention_layernorm.weight"] = (hidden,)

    tensors: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        tensors.update({f"model.layers.{index}.{name}": shape for name, shape in layer.items()})
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors["lm_head.weight"] = (config.vocab_size, hidden)
    return tensors


def _architecture(reader: _Reader) -> str:
    names = reader.data.get("architectures")
    if names is None:
        model_type = reader.string("model_type")
        names = [MODEL_TYPES.get(model_type, model_type)]
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise reader.fail("architectures", f"must be a list of one name, found {_show(names)}")
    for key in _EXPERT_KEYS:  # checked first, so that the error for Mixtral gives the reason
        if reader.data.get(key) is not None and reader.integer(key, minimum=0) > 0:
            raise reader.fail(
                key, f"is {reader.data[key]}: mixtures of experts ({names[0]}) are not supported"
            )
    name = HEADLESS.get(names[0], names[0])
    if name not in FAMILIES:
        raise AtomError(
            f"{reader.where}: architecture {_show(names[0])} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return name


def _reject_unsupported(reader: _Reader) -> None:
    for key in ("quantization_config", "compression_config"):
        if reader.data.get(key) is not None:
            raise reader.fail(key, "is present: it is quantized already; convert the float original")
    activation = reader.string("hidden_act", "silu")
    if activation != "silu":
        raise reader.fail("hidden_act", f"{_show(activation)} is not supported; supported: 'silu'")


def _windows(reader: _Reader, family: Family, num_layers: int, max_positions: int) -> tuple[int | None, ...]:
    """The sliding window of each layer, read as in transformers; empty if no layer has one that matters."""
    if family.windows == "all":  # transformers ignores the other keys here
        window = reader.optional_integer("sliding_window", _DEFAULT_WINDOW)
        windows = (window,) * num_layers
    else:
        used = reader.boolean("use_sliding_window")
        if used and family.windows == "never":
            raise reader.fail("use_sliding_window", "true is not supported for this architecture")
        window = reader.optional_integer("sliding_window", _DEFAULT_WINDOW) if used else None
        first = num_layers
        if window is not None:
            first = reader.integer("max_window_layers", _DEFAULT_MAX_WINDOW_LAYERS, minimum=0)
        kinds = _layer_types(reader, num_layers)
        if kinds is None:
            kinds = [_SLIDING if layer >= first else _FULL for layer in range(num_layers)]
        if window is None and _SLIDING in kinds:
            raise reader.fail("layer_types", f"names {_SLIDING!r}, but no sliding_window is in use")
        windows = tuple(window if kind == _SLIDING else None for kind in kinds)
    # A window that is as long as the context has no effect.
    windows = tuple(None if window is None or window >= max_positions else window for window in windows)
    return windows if any(windows) else ()


def _layer_types(reader: _Reader, num_layers: int) -> list[str] | None:
    """The kind of attention of each layer; None if the configuration has no ``layer_types``."""
    kinds = reader.data.get("layer_types")
    if kinds is None:
        return None
    if not isinstance(kinds, list):
        raise reader.fail("layer_types", f"must be a list, found {_show(kinds)}")
    for kind in kinds:
        if kind not in (_FULL, _SLIDING):
            supported = f"supported: {_FULL!r}, {_SLIDING!r}"
            raise reader.fail("layer_types", f"names {_show(kind)}, which is not supported; {supported}")
    if len(kinds) != num_layers:
        raise reader.fail("layer_types", f"names {len(kinds)} layers, num_hidden_layers is {num_layers}")
    return kinds


def _num_kv_heads(reader: _Reader, family: Family, num_heads: int) -> int:
    default = num_heads if family.default_kv_heads else _REQUIRED
    null = "num_key_value_heads" in reader.data and reader.data["num_key_value_heads"] is None
    num_kv_heads = num_heads if null else reader.integer("num_key_value_heads", default)
    if num_heads % num_kv_heads:
        raise reader.fail(
            "num_attention_heads", f"{num_heads} is no multiple of num_key_value_heads {num_kv_heads}"
        )
    return num_kv_heads


def _head_dim(reader: _Reader, family: Family, hidden_size: int, num_heads: int) -> int:
    head_dim = reader.integer("head_dim") if family.qk_norm else reader.optional_integer("head_dim")
    if head_dim is None:
        if hidden_size % num_heads:
            raise reader.fail(
                "hidden_size", f"{hidden_size} is no multiple of num_attention_heads {num_heads}"
            )
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise reader.fail("head_dim", f"must be even for rotary embeddings, found {head_dim}")
    return head_dim


def _token_ids(reader: _Reader, key: str, vocab_size: int) -> tuple[int, ...]:
    """The token ids under ``key``, which can be an id, a list of ids or missing; null and -1 are left out."""
    value = reader.data.get(key)
    ids = [token_id for token_id in (value if isinstance(value, list) else [value]) if token_id is not None]
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise reader.fail(key, f"must be an integer or a list of integers, found {_show(value)}")
        if not -1 <= token_id < vocab_size:
            raise reader.fail(key, f"{_show(token_id)} is outside the vocabulary of {vocab_size}")
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id != -1))
