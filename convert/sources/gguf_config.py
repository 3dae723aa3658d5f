"""Translates GGUF metadata and tensor names to those of a Hugging Face checkpoint."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from atom_jax.errors import AtomError
from convert.sources.gguf_file import GGUFFile
from convert.sources.gguf_tokenizer import NO_TOKEN, STOP_TOKENS
from convert.sources.rope_rules import yarn_scale

# Mistral models also have the architecture "llama" in GGUF; ``_window`` recognizes those with a window.
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
# For these architectures RoPE in llama.cpp rotates neighbouring channels, so the rows of q and k are stored
# in another order.
PERMUTED = ("llama",)

_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "expert_count": "num_local_experts",
}
_OUTSIDE_LAYERS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")  # end of text, of turn, of message
_YARN_KEYS = {
    "factor": "factor",
    "original_context_length": "original_max_position_embeddings",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}
# Keys of rope.scaling with values that have no effect.
_NEUTRAL = (
    ("attn_factor", 1.0),
    ("yarn_attn_factor", 1.0),
    ("yarn_ext_factor", 1.0),
    ("yarn_ext_factor", -1.0),
)
# The frequency rule of Llama 3.1, 3.2 and 3.3; only the factor differs between them (8 and 32).
_LLAMA3_FACTORS = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown name is returned unchanged."""
    match = _LAYER_NAME.fullmatch(name)
    if match and match[2] in _LAYER_NAMES:
        return f"model.layers.{int(match[1])}.{_LAYER_NAMES[match[2]]}.{match[3]}"
    stem, _, suffix = name.rpartition(".")
    return f"{_OUTSIDE_LAYERS[stem]}.{suffix}" if stem in _OUTSIDE_LAYERS else name


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The ``config.json`` of the model in ``file``, for ``parse_config``.

    Raises:
      AtomError: the architecture is not supported, or the file uses a feature that config.json cannot
        express.
    """
    if file.metadata.get("general.type") == "adapter":
        raise AtomError(
            f"{file.path}: is an adapter (LoRA), not a model; merge it into its base model first "
            "(llama-export-lora) and convert the result"
        )
    arch = file.metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in ARCHITECTURES:
        raise AtomError(
            f"{file.path}: architecture {arch!r:.60} is not supported; supported: {', '.join(ARCHITECTURES)}"
        )
    own = {key.removeprefix(f"{arch}."): value for key, value in file.metadata.items()}
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        **{name: _decimal(own[key]) for key, name in _KEYS.items() if key in own},
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
    }
    # If the key is missing, GGUF has one kv head for each query head.
    config.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if arch == "qwen3":
        config.setdefault("head_dim", _even_share(config))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None:
        config["vocab_size"] = embedding.shape[0]
    config["bos_token_id"] = _token_id(own, "bos_token_id")
    config["eos_token_id"] = [_token_id(own, key) for key in _STOP_KEYS] + _stop_tokens(own)
    _reject_unsupported(file, own, config)
    config |= _window(file, arch, own, config)
    config["rope_parameters"] = _rope(file, own, config)
    return config


def _token_id(own: dict[str, Any], key: str) -> Any:
    value = own.get(f"tokenizer.ggml.{key}")
    return None if value in NO_TOKEN else value


def _stop_tokens(own: dict[str, Any]) -> list[int]:
    """Ids of the tokens that end a text or a turn by their name, because many files have no key for them."""
    tokens = own.get("tokenizer.ggml.tokens")
    return (
        [index for index, token in enumerate(tokens) if token in STOP_TOKENS]
        if isinstance(tokens, list)
        else []
    )


def _even_share(config: dict[str, Any]) -> Any:
    """hidden_size / heads; None if the metadata are not such numbers (``parse_config`` raises the error)."""
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 else None


def _decimal(value: Any) -> Any:
    """The shortest decimal number that rounds to a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _reject_unsupported(file: GGUFFile, own: dict[str, Any], config: dict[str, Any]) -> None:
    head_dim = config.get("head_dim") or _even_share(config)
    if head_dim is None:
        return  # parse_config raises the error for the unusable metadata
    if own.get("attention.value_length", head_dim) != head_dim:
        raise AtomError(
            f"{file.path}: attention.value_length {own['attention.value_length']} differs from the "
            f"head dimension {head_dim}: not supported"
        )
    if own.get("rope.dimension_count", head_dim) != head_dim:
        raise AtomError(
            f"{file.path}: rope.dimension_count {own['rope.dimension_count']} differs from the "
            f"head dimension {head_dim}: partial rotary embeddings are not supported"
        )


def _window(file: GGUFFile, arch: str, own: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The keys of config.json for a sliding window, if any. A "llama" file with one is a Mistral model."""
    key = "attention.sliding_window"
    window, context = own.get(key, 0), config.get("max_position_embeddings")
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise AtomError(f"{file.path}: {key} must be an integer, at least 0, found {window!r:.40}")
    if window == 0 or (isinstance(context, int) and window >= context):  # no effect
        return {}
    if arch != "llama" or f"{key}_pattern" in own:
        raise AtomError(
            f"{file.path}: {key} {window} is shorter than the context {context}, and which layers have it is "
            "not read from GGUF files; convert the original checkpoint"
        )
    return {"architectures": ["MistralForCausalLM"], "sliding_window": window}


def _rope(file: GGUFFile, own: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The section ``rope_parameters`` of config.json."""
    theta = {"rope_theta": _decimal(own.get("rope.freq_base", 10000.0))}
    kind = own.get("rope.scaling.type", "linear" if "rope.scale_linear" in own else "none")
    scaling = _scaling(file, own, kind)
    if "rope_freqs.weight" in file.tensors:
        if kind not in ("none", "llama3"):
            raise AtomError(
                f"{file.path}: rope.scaling.type {kind!r:.40} beside rope_freqs.weight: not supported"
            )
        return {**theta, **_llama3(file, theta["rope_theta"], config)}
    if kind == "none":
        return {**theta, "rope_type": "default"}
    if kind == "yarn":
        return {**theta, **_yarn(scaling)}
    factor = own.get("rope.scaling.factor", own.get("rope.scale_linear"))
    return {**theta, "rope_type": kind, **({} if factor is None else {"factor": _decimal(factor)})}


def _yarn(scaling: dict[str, Any]) -> dict[str, Any]:
    """YaRN: llama.cpp computes it as transformers does, and multiplies by ``attn_factor``."""
    rules: dict[str, Any] = {"rope_type": "yarn"}
    rules |= {name: scaling[key] for key, name in _YARN_KEYS.items() if key in scaling}
    weight, factor = scaling.get("yarn_attn_factor", scaling.get("attn_factor", 1.0)), rules.get("factor")
    if weight != 1.0 and isinstance(weight, float) and isinstance(factor, float):
        rules["attention_factor"] = weight * yarn_scale(factor)
    return rules


def _scaling(file: GGUFFile, own: dict[str, Any], kind: Any) -> dict[str, Any]:
    """The values of ``rope.scaling.*`` by key; AtomError for a key that is not supported with this kind."""
    prefix = "rope.scaling."
    scaling = {
        key.removeprefix(prefix): _decimal(value) for key, value in own.items() if key.startswith(prefix)
    }
    known = {"type", "finetuned", *_YARN_KEYS}
    if kind == "yarn":
        known |= {"attn_factor", "yarn_attn_factor"}
    for key, value in scaling.items():
        if key not in known and (key, value) not in _NEUTRAL:
            raise AtomError(f"{file.path}: {prefix}{key} {value!r:.40} is not supported beside {kind!r:.40}")
    return scaling


def _llama3(file: GGUFFile, theta: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Recovers the parameters of Llama 3's RoPE rule from ``rope_freqs.weight``.

    That tensor has the divisor of each rotary frequency, from which the parameters do not follow in general.
    But all published models share the constants ``_LLAMA3_FACTORS``. So the rule is computed with these, and
    with the largest divisor as the factor; if it does not give the same divisors, that is an error.
    """
    tensor = file.tensors["rope_freqs.weight"]
    divisors = file.read("rope_freqs.weight")
    head_dim = config.get("head_dim") or _even_share(config)
    factor = _decimal(float(divisors.max()))
    usable = np.isfinite(divisors).all() and isinstance(theta, float) and theta > 0
    if usable and head_dim == 2 * divisors.size:
        if np.allclose(divisors, 1.0):
            return {"rope_type": "default"}
        if np.allclose(divisors, llama3_divisors(theta, head_dim, factor), rtol=1e-4):
            return {"rope_type": "llama3", "factor": factor, **_LLAMA3_FACTORS}
    raise AtomError(
        f"{file.path}: tensor rope_freqs.weight {list(tensor.shape)} is not Llama 3's frequency scaling "
        f"for rope_theta {theta} and head dimension {head_dim}: not supported"
    )


def llama3_divisors(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """The divisor of each of the ``head_dim / 2`` rotary frequencies (Llama 3.1 model card)."""
    low, high = _LLAMA3_FACTORS["low_freq_factor"], _LLAMA3_FACTORS["high_freq_factor"]
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = _LLAMA3_FACTORS["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / factor + smooth)
