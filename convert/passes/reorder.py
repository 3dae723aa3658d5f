"""Putting the hottest input channels of every linear last (paper section 4.1), folded into the weights.

The INT8 tail of a linear is its last input channels, so these must be the ones of largest energy (the
diagonal of X^T X). Permuting them costs nothing at run time where the producer of the channels is permuted
alike: the residual stream through the norms and every matrix that reads or writes it, the MLP's inner
channels through gate and up, attention's output through whole heads and, within a kv head, through v_proj.

A layer is a dict of arrays in float32 (any float type works), fused projections as [out, in]:

    input_norm [H]   post_attention_norm [H]   optional q_norm, k_norm [head_dim]
    qkv_proj [q + 2 kv, H] (rows of q, then k, then v)    o_proj [H, q]
    gate_up_proj [2 I, H] (rows of gate, then up)         down_proj [H, I]
    optional qkv_bias, o_bias, gate_up_bias, down_bias, of as many values as their projection has rows

A permutation lists, for each new place, the old one: ``new = old[perm]``. No function changes its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
from jaxtyping import Float, Int, Int32

from atom_jax.config import ModelConfig
from atom_jax.errors import AtomError
from atom_jax.structure import LINEARS
from convert.float_model import FloatParams

# Along the last axis: norms, and the linears behind them.
_READS_RESIDUAL = [
    name for linear in LINEARS if linear.reads_residual for name in (linear.producer, linear.weight)
]
# Along the first axis.
_WRITES_RESIDUAL = [name for linear in LINEARS if linear.residual for name in (linear.weight, linear.bias)]


def energy_order(energy: Float[np.ndarray, "k"]) -> Int32[np.ndarray, "k"]:
    """The permutation that sorts by ascending energy; equal ones keep their order.

    Raises:
      AtomError: an energy is NaN.
    """
    if np.isnan(energy).any():
        raise AtomError(f"the energy of {int(np.isnan(energy).sum())} of {energy.size} channels is NaN")
    return np.argsort(energy, kind="stable").astype(np.int32)


def permute_inputs(
    weight: Float[np.ndarray, "*rows k"], perm: Int[np.ndarray, "k"]
) -> Float[np.ndarray, "*rows k"]:
    """Reorders input channels only: ``reorder="per_layer"``, where the activation is gathered at run time.

    Raises:
      AtomError: ``perm`` is not a permutation of the input channels.
    """
    _check_permutation(perm, weight.shape[-1])
    return weight[..., perm]


def permute_ends(
    embedding: Float[np.ndarray, "v h"],
    final_norm: Float[np.ndarray, "h"],
    lm_head: Float[np.ndarray, "v h"] | None,
    perm: Int[np.ndarray, "h"],
) -> tuple[Float[np.ndarray, "v h"], Float[np.ndarray, "h"], Float[np.ndarray, "v h"] | None]:
    """Reorders the residual stream outside the layers; ``lm_head`` is None where it is the embedding.

    Raises:
      AtomError: ``perm`` is not a permutation of the hidden size.
    """
    head = None if lm_head is None else permute_inputs(lm_head, perm)
    return permute_inputs(embedding, perm), permute_inputs(final_norm, perm), head


def permute_residual(layer: Mapping[str, np.ndarray], perm: Int[np.ndarray, "h"]) -> FloatParams:
    """Reorders the residual stream: what reads it and what writes it.

    Raises:
      AtomError: ``perm`` is not a permutation of the hidden size.
    """
    _check_permutation(perm, layer["input_norm"].shape[0])
    changed = {name: layer[name][..., perm] for name in _READS_RESIDUAL}
    changed |= {name: layer[name][perm] for name in _WRITES_RESIDUAL if name in layer}
    return {**layer, **changed}


def permute_mlp(layer: Mapping[str, np.ndarray], perm: Int[np.ndarray, "i"]) -> FloatParams:
    """Reorders the input channels of down_proj, and the rows of gate and up that produce them.

    Raises:
      AtomError: ``perm`` is not a permutation of the intermediate size.
    """
    inner = layer["down_proj"].shape[1]
    _check_permutation(perm, inner)
    rows = np.concatenate([perm, inner + perm])
    changed = {"down_proj": layer["down_proj"][:, perm]}
    changed |= {name: layer[name][rows] for name in ("gate_up_proj", "gate_up_bias") if name in layer}
    return {**layer, **changed}


@dataclasses.dataclass(frozen=True, eq=False)
class HeadOrder:
    """A reordering of attention heads that keeps every query head with its kv head.

    Attributes:
      kv_heads: for each new place of a kv head, the old one.
      q_heads: the same for query heads; those of one kv head stay together, at its place.
      channels: for each new place of a kv head, the order of its v channels.
    """

    kv_heads: Int32[np.ndarray, "kv_heads"]
    q_heads: Int32[np.ndarray, "heads"]
    channels: Int32[np.ndarray, "kv_heads head_dim"]

    @property
    def kv_rows(self) -> Int[np.ndarray, "kv"]:
        """The permutation of k_proj's rows. Their order within a head is RoPE's and stays."""
        return _rows(self.kv_heads, np.arange(self.channels.shape[1]))

    @property
    def q_rows(self) -> Int[np.ndarray, "q"]:
        """The permutation of q_proj's rows; the order within a head stays."""
        return _rows(self.q_heads, np.arange(self.channels.shape[1]))

    @property
    def v_rows(self) -> Int[np.ndarray, "kv"]:
        """The permutation of v_proj's rows."""
        return _rows(self.kv_heads, self.channels)

    @property
    def input_perm(self) -> Int[np.ndarray, "q"]:
        """The permutation of o_proj's input channels (and so of its Hessian)."""
        group = len(self.q_heads) // len(self.kv_heads)
        return _rows(self.q_heads, np.repeat(self.channels, group, axis=0))


def head_order(energy: Float[np.ndarray, "q"], num_heads: int, num_kv_heads: int) -> HeadOrder:
    """The order that brings the hottest channels of o_proj's input as near to the end as heads allow.

    The query head of most energy ends last in its group, and its group last; groups are compared by their
    hottest query head, as it is the one that comes to lie in the tail. A v channel is shared by the query
    heads of its group, so channels are sorted by the sum over them.

    Args:
      energy: of each input channel of o_proj, query heads in the original order.

    Raises:
      AtomError: the sizes do not divide, or an energy is NaN.
    """
    if num_heads % num_kv_heads or energy.size % num_heads:
        raise AtomError(
            f"{energy.size} channels are not {num_heads} equal query heads shared by {num_kv_heads} kv heads"
        )
    group = num_heads // num_kv_heads
    by_head = energy.reshape(num_kv_heads, group, -1)
    head_energy = by_head.sum(axis=2)
    kv_heads = energy_order(head_energy.max(axis=1))
    q_heads = [kv * group + energy_order(head_energy[kv]) for kv in kv_heads]
    channels = [energy_order(by_head[kv].sum(axis=0)) for kv in kv_heads]
    return HeadOrder(kv_heads, np.concatenate(q_heads).astype(np.int32), np.stack(channels))


def permute_heads(layer: Mapping[str, np.ndarray], order: HeadOrder, config: ModelConfig) -> FloatParams:
    """Reorders heads, and v channels within a kv head, through q, k, v and the columns of o_proj.

    Raises:
      AtomError: ``order`` is not one of ``config``'s heads, or separates a query head from its kv head.
    """
    _check_heads(order, config)
    q, kv = config.q_size, config.kv_size
    rows = np.concatenate([order.q_rows, q + order.kv_rows, q + kv + order.v_rows])
    changed = {"o_proj": layer["o_proj"][:, order.input_perm]}
    changed |= {name: layer[name][rows] for name in ("qkv_proj", "qkv_bias") if name in layer}
    return {**layer, **changed}


def _rows(heads: Int[np.ndarray, "heads"], channels: Int[np.ndarray, "*heads head_dim"]) -> np.ndarray:
    """The permutation of rows for heads in this order, each with its channels in that order."""
    return (heads[:, None] * channels.shape[-1] + channels).reshape(-1)


def _check_permutation(perm: np.ndarray, size: int) -> None:
    if perm.shape != (size,) or not np.array_equal(np.sort(perm), np.arange(size)):
        raise AtomError(
            f"expected a permutation of {size} channels, found other values or shape {list(perm.shape)}"
        )


def _check_heads(order: HeadOrder, config: ModelConfig) -> None:
    _check_permutation(order.kv_heads, config.num_kv_heads)
    _check_permutation(order.q_heads, config.num_heads)
    if order.channels.shape != (config.num_kv_heads, config.head_dim):
        raise AtomError(
            f"expected the order of v channels [{config.num_kv_heads}, {config.head_dim}], "
            f"found {list(order.channels.shape)}"
        )
    for channels in order.channels:
        _check_permutation(channels, config.head_dim)
    group = config.num_heads // config.num_kv_heads
    if not np.array_equal(order.q_heads // group, np.repeat(order.kv_heads, group)):
        raise AtomError("the order of heads separates query heads from their kv head")
