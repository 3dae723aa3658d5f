"""Permutations of channels that move the input channels with the most energy last (paper section 4.1).

The last input channels of a linear are its outliers, stored in INT8, so they should be the channels with the
most energy (the diagonal of X^T X). A permutation of input channels has no run-time cost if the operation
that produces the channels is permuted in the same way: for the residual stream, the norms and every matrix
that reads or writes it; for the MLP's inner channels, the rows of gate and up; for the attention output,
whole heads and, within a kv head, the rows of v_proj.

A layer is a dict of float32 arrays (any float type works), with fused projections as [out, in]:

    input_norm [H]   post_attention_norm [H]   optional q_norm, k_norm [head_dim]
    qkv_proj [q + 2 kv, H] (rows of q, then k, then v)    o_proj [H, q]
    gate_up_proj [2 I, H] (rows of gate, then up)         down_proj [H, I]
    optional qkv_bias, o_bias, gate_up_bias, down_bias, of as many values as their projection has rows

A permutation lists the old index for each new index: ``new = old[perm]``. No function changes its input.
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

# Parameters whose last axis is the residual stream: norms, and the linears that read their output.
_READS_RESIDUAL = [
    name for linear in LINEARS if linear.reads_residual for name in (linear.producer, linear.weight)
]
# Parameters whose first axis is the residual stream: linears that write it, and their biases.
_WRITES_RESIDUAL = [name for linear in LINEARS if linear.residual for name in (linear.weight, linear.bias)]


def energy_order(energy: Float[np.ndarray, "k"]) -> Int32[np.ndarray, "k"]:
    """The permutation that sorts channels by ascending energy; channels with equal energy keep their order.

    Raises:
      AtomError: an energy is NaN.
    """
    if np.isnan(energy).any():
        raise AtomError(f"the energy of {int(np.isnan(energy).sum())} of {energy.size} channels is NaN")
    return np.argsort(energy, kind="stable").astype(np.int32)


def permute_inputs(
    weight: Float[np.ndarray, "*rows k"], perm: Int[np.ndarray, "k"]
) -> Float[np.ndarray, "*rows k"]:
    """Reorders only the input channels of a weight (or of a norm or embedding, along the last axis).

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
    """Reorders the residual stream outside the layers; ``lm_head`` is None if it is tied to the embedding.

    Raises:
      AtomError: ``perm`` is not a permutation of the hidden size.
    """
    head = None if lm_head is None else permute_inputs(lm_head, perm)
    return permute_inputs(embedding, perm), permute_inputs(final_norm, perm), head


def permute_residual(layer: Mapping[str, np.ndarray], perm: Int[np.ndarray, "h"]) -> FloatParams:
    """Reorders the residual stream of a layer, in all parameters that read or write it.

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


def deal(order: Int32[np.ndarray, "k"], blocks: int) -> Int32[np.ndarray, "k"]:
    """An order of channels or heads, dealt among ``blocks``: each ascends, and all get equally large ones.

    Args:
      order: the permutation that sorts by ascending energy; its size must be a multiple of ``blocks``.
      blocks: number of blocks; with one the order is returned as it is.

    Returns:
      The permutation in which the blocks follow one another.
    """
    return order.reshape(-1, blocks).T.reshape(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class HeadOrder:
    """A reordering of attention heads that keeps every query head with its kv head.

    Attributes:
      kv_heads: for each new index of a kv head, the old one.
      q_heads: for each new index of a query head, the old one. The query heads of a kv head stay together.
      channels: for each new index of a kv head, the permutation of its v channels.
    """

    kv_heads: Int32[np.ndarray, "kv_heads"]
    q_heads: Int32[np.ndarray, "heads"]
    channels: Int32[np.ndarray, "kv_heads head_dim"]

    @property
    def kv_rows(self) -> Int[np.ndarray, "kv"]:
        """The permutation of k_proj's rows. The order within a head is kept, because RoPE depends on it."""
        return _rows(self.kv_heads, np.arange(self.channels.shape[1]))

    @property
    def q_rows(self) -> Int[np.ndarray, "q"]:
        """The permutation of q_proj's rows; the order within a head is kept."""
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


def head_order(
    energy: Float[np.ndarray, "q"], num_heads: int, num_kv_heads: int, blocks: int = 1
) -> HeadOrder:
    """The order that moves o_proj's input channels with the most energy as near to the end as heads allow.

    A group is a kv head with its query heads. Within a group, query heads are sorted by ascending energy.
    Groups are sorted by the energy of their largest query head, because that of the last group comes to the
    very end. A v channel is shared by all query heads of its group, so the channels are
    sorted by the sum of their energies over these heads.

    If o_proj is stored in blocks, the groups are dealt among them (``deal``), so that the head with the most
    energy of each block comes last in it. Where there are more blocks than kv heads, the query heads of a kv
    head are dealt among its neighbouring blocks.

    Args:
      energy: energy of each input channel of o_proj, with heads in the original order.
      num_heads: number of query heads.
      num_kv_heads: number of kv heads.
      blocks: number of blocks of o_proj (``ModelConfig.indivisible`` tells which numbers suit the heads).

    Raises:
      AtomError: the numbers do not divide each other, or an energy is NaN.
    """
    if num_heads % num_kv_heads or energy.size % num_heads:
        raise AtomError(
            f"{energy.size} channels are not {num_heads} equal query heads shared by {num_kv_heads} kv heads"
        )
    group = num_heads // num_kv_heads
    by_head = energy.reshape(num_kv_heads, group, -1)
    head_energy = by_head.sum(axis=2)
    kv_heads = deal(energy_order(head_energy.max(axis=1)), min(blocks, num_kv_heads))
    sharing = max(1, blocks // num_kv_heads)  # blocks that have query heads of the same kv head
    q_heads = [kv * group + deal(energy_order(head_energy[kv]), sharing) for kv in kv_heads]
    channels = [energy_order(by_head[kv].sum(axis=0)) for kv in kv_heads]
    return HeadOrder(kv_heads, np.concatenate(q_heads).astype(np.int32), np.stack(channels))


def permute_heads(layer: Mapping[str, np.ndarray], order: HeadOrder, config: ModelConfig) -> FloatParams:
    """Reorders heads, and v channels within each kv head, in the rows of q, k, v and the columns of o_proj.

    Raises:
      AtomError: ``order`` does not suit the heads of ``config``, or separates query heads from their kv head.
    """
    _check_heads(order, config)
    q, kv = config.q_size, config.kv_size
    rows = np.concatenate([order.q_rows, q + order.kv_rows, q + kv + order.v_rows])
    changed = {"o_proj": layer["o_proj"][:, order.input_perm]}
    changed |= {name: layer[name][rows] for name in ("qkv_proj", "qkv_bias") if name in layer}
    return {**layer, **changed}


def _rows(heads: Int[np.ndarray, "heads"], channels: Int[np.ndarray, "*heads head_dim"]) -> np.ndarray:
    """The permutation of rows that reorders heads by ``heads``, and channels in each head by ``channels``."""
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
