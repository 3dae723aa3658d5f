"""Rotates the residual stream and the values of every head, at no run-time cost.

A rotation spreads an outlier channel over all channels, so that the scale of a group suits every channel in
it (QuaRot, arXiv 2404.00456, section 4; SpinQuant, arXiv 2405.16406, section 3.1). The result of the model is
unchanged if all weights that write or read the rotated channels are rotated in the same way:

- The residual stream becomes x R. The embedding, o_proj and down_proj write it; qkv, gate_up and lm_head read
  it. An RMSNorm without weights commutes with R, so the weights of each norm are first folded into the
  linears that read its output.
- The values of each head become v H. The rows of v_proj write them, and the columns of o_proj read them.
  Attention mixes tokens and not channels, and H is the same for all heads, so query heads can share kv heads.

The inner channels of the MLP and the keys are not rotated. An activation function or RoPE is between the
weights that write and read them, so a rotation would cost time for every token.

**Tied embeddings are untied.** The weights g of the last norm are between the residual stream and the head.
So the rotated head is ``E diag(g) R``, while the rotated embedding is ``E R``; they are equal only if all
values of g are 1. Untying is exact and costs no time (a step reads the head once and one row of the embedding
for each token), but the checkpoint holds two matrices.

R is the Kronecker product of a Hadamard matrix, whose size is the largest power of two that divides the
number of channels, and a Hartley matrix of the remaining odd size (whose entries are also of similar
magnitude), with random signs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from atom_jax.config import ModelConfig
from convert.sources import Source

_EMBEDDING, _LAST_NORM, _HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
# For each norm of a layer, the linears that read its output.
_READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
_WRITERS = ("self_attn.o_proj", "mlp.down_proj")


def rotate(x: Float32[np.ndarray, "*lead n"], seed: int = 0) -> Float32[np.ndarray, "*lead n"]:
    """``x @ R`` for the orthogonal matrix R [n, n] that ``seed`` determines.

    n can be any size; a row takes O(n (log n + m)) operations, where m is the odd part of n.
    """
    size = x.shape[-1]
    odd = size // (size & -size)
    signs = np.random.default_rng(seed).choice(np.array([-1.0, 1.0], np.float32), size)
    y = (x * signs).reshape(-1, odd) @ _hartley(odd)
    step = odd
    while step < size:
        pairs = y.reshape(-1, 2, step)
        y = np.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
        step *= 2
    return y.reshape(x.shape) * np.float32(1 / math.sqrt(size // odd))


def _hartley(size: int) -> Float32[np.ndarray, "n n"]:
    """The orthogonal, symmetric Hartley matrix (cos(a) + sin(a)) / sqrt(n) with a = 2 pi j k / n."""
    angle = 2 * np.pi / size * (np.outer(np.arange(size), np.arange(size)) % size)
    return ((np.cos(angle) + np.sin(angle)) / math.sqrt(size)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Rotated:
    """The source ``original``, rotated: an equivalent model with norms of ones and an untied head.

    The fingerprint is that of the original, because the recipe of a checkpoint says that it was rotated.

    Attributes:
      original: the source to rotate.
      seed: seed of the rotation's random signs.
    """

    original: Source
    seed: int = 0

    @property
    def config(self) -> ModelConfig:
        return self.original.config.replace(tie_word_embeddings=False)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {**self.original.shapes, _HEAD: self.original.shapes[_EMBEDDING]}

    @property
    def notes(self) -> tuple[str, ...]:
        return self.original.notes

    def tensor(self, name: str) -> np.ndarray:
        """One tensor of the rotated model. For a linear that reads a norm, the norm is read, too."""
        if name == _EMBEDDING:
            return self._turned(self.original.tensor(name))
        if name == _LAST_NORM:
            return np.ones(self.original.shapes[name], np.float32)
        if name == _HEAD:
            tied = self.original.config.tie_word_embeddings
            head = self.original.tensor(_EMBEDDING if tied else _HEAD)
            return self._turned(head * self.original.tensor(_LAST_NORM))
        return self._layer_tensor(name)

    def _layer_tensor(self, name: str) -> np.ndarray:
        layer, module, kind = _parts(name)
        if module in _READERS:
            return np.ones(self.original.shapes[name], np.float32)
        tensor = self.original.tensor(name)
        if kind == "weight":
            for norm, readers in _READERS.items():
                if module in readers:
                    tensor = self._turned(tensor * self.original.tensor(f"{layer}.{norm}.weight"))
            if module == "self_attn.o_proj":
                tensor = self._turned_heads(tensor)
        if module in _WRITERS:
            tensor = self._turned(tensor.T).T
        elif module == "self_attn.v_proj":
            tensor = self._turned_heads(tensor.T).T
        return np.ascontiguousarray(tensor)

    def write_tokenizer(self, out: Path) -> None:
        self.original.write_tokenizer(out)

    def fingerprint(self) -> str:
        return self.original.fingerprint()

    def _turned(self, x: Float32[np.ndarray, "*lead hidden"]) -> Float32[np.ndarray, "*lead hidden"]:
        return rotate(x, self.seed)

    def _turned_heads(self, x: Float32[np.ndarray, "*lead heads*head_dim"]) -> np.ndarray:
        heads = x.reshape(*x.shape[:-1], -1, self.original.config.head_dim)
        return rotate(heads, self.seed).reshape(x.shape)


def _parts(name: str) -> tuple[str, str, str]:
    """Splits a name, e.g. into ("model.layers.0", "self_attn.q_proj", "weight")."""
    module, _, kind = name.rpartition(".")
    model, layers, index, rest = module.split(".", 3)
    return f"{model}.{layers}.{index}", rest, kind
