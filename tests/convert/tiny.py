"""Tiny checkpoints for tests: Hugging Face folders and GGUF files, made without torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from atom_jax.errors import AtomError
from convert.sources.architectures import expected_tensors, parse_config

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
SPECIAL = ("<|bos|>", "<|eos|>", "<|turn|>")
MERGES = (("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("Ġ", "a"), ("1", "2"))
CHAT_TEMPLATE = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"


@contextlib.contextmanager
def fails(*parts: Any) -> Iterator[None]:
    """Expects an AtomError of one line that contains all ``parts``."""
    with pytest.raises(AtomError) as caught:
        yield
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message, message


def tiny_vocabulary() -> list[str]:
    """Special tokens, the 256 bytes of byte-level BPE, and the results of MERGES."""
    return [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in MERGES)]


def tiny_config(family: str = "llama", **overrides: Any) -> dict[str, Any]:
    """A config.json with 2 layers; an override of None takes the key out."""
    config: dict[str, Any] = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": len(tiny_vocabulary()),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **({"sliding_window": 4096} if family == "mistral" else {}),
        **overrides,
    }
    return {key: value for key, value in config.items() if value is not None}


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for ``config``: name -> array of its expected shape."""
    rng = np.random.default_rng(seed)
    shapes = expected_tensors(parse_config(config, where="tiny"))
    return {
        name: (rng.normal(0, 0.1, shape) + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }


def save_tiny(
    tmp_path: Path, family: str = "llama", *, seed: int = 0, shards: int = 1, **overrides: Any
) -> Path:
    """Writes a Hugging Face folder (config, safetensors, tokenizer) and returns it.

    Args:
      tmp_path: the folder is made inside it.
      family: a key of FAMILIES.
      seed: of the weights.
      shards: how many safetensors files; more than one come with an index.
      **overrides: changes of config.json (None removes a key).
    """
    folder = tmp_path / f"{family}-{shards}"
    folder.mkdir(parents=True)
    config = tiny_config(family, **overrides)
    write_json(folder / "config.json", config)
    save_weights(folder, tiny_tensors(config, seed), shards=shards)
    save_tokenizer(folder)
    return folder


def save_weights(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for part in range(shards):
        name = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        some = dict(list(tensors.items())[part::shards])
        save_file(some, folder / name)
        weight_map.update(dict.fromkeys(some, name))
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def save_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(
        models.BPE(vocab={t: i for i, t in enumerate(tiny_vocabulary())}, merges=list(MERGES))
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[1],
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data), encoding="utf-8")


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
}


def to_gguf(arch: str, tensors: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """``tensors`` named and, for Llama's Q and K rows, permuted as llama.cpp's converter does it."""
    renamed = {}
    for name, array in tensors.items():
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        if arch == "llama" and heads:
            halves = array.reshape(config[heads], 2, -1, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        for ours, theirs in GGUF_NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = array
    return renamed


def save_gguf(
    path: Path,
    arch: str,
    tensors: dict[str, np.ndarray],
    config: dict[str, Any],
    *,
    metadata: dict[str, Any] | None = None,
    raw: dict[str, GGMLQuantizationType] | None = None,
    split_max_tensors: int = 0,
) -> Path:
    """Writes ``tensors`` (GGUF names) with the metadata of ``config`` and a tokenizer.

    Args:
      metadata: extra keys, or other values for keys; None removes one.
      raw: tensors that are quantized bytes of this type already.
      split_max_tensors: of each part; 0 for one file. Parts have names of their own beside ``path``.
    """
    keys: dict[str, Any] = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.dimension_count": config["head_dim"],
        "rope.freq_base": config["rope_theta"],
    }
    vocabulary = tiny_vocabulary()
    keys = {f"{arch}.{key}": value for key, value in keys.items()} | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary,
        "tokenizer.ggml.token_type": [
            int(TokenType.CONTROL if token in SPECIAL else TokenType.NORMAL) for token in vocabulary
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in MERGES],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }
    writer = GGUFWriter(path, arch, split_max_tensors=split_max_tensors)
    for key, value in (keys | (metadata or {})).items():
        add = {
            bool: writer.add_bool,
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
        }
        if value is not None:
            add.get(type(value), writer.add_array)(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array, raw_dtype=(raw or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
