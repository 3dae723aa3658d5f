"""The embedding table, which is also the weight of the head if the two are tied."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int32

from atom_jax.collectives import AXIS, Group
from pallas_kernels import QuantizedWeight, quantize_int8
from pallas_kernels.nn import rounded

# Float rows, or INT8 rows with one scale each (``Format.head_bits``).
Table = Float[Array, "vocab hidden"] | QuantizedWeight


@partial(jax.tree_util.register_dataclass, data_fields=["table"], meta_fields=["dtype"])
@dataclasses.dataclass(frozen=True)
class Embedding:
    """A vector of each token of the vocabulary.

    Attributes:
      table: the vectors as they are stored, a row each.
      dtype: dtype in which ``rows`` returns them, which is that of the residual stream.
    """

    table: Table
    dtype: jnp.dtype

    def rows(self, tokens: Int32[Array, " m"], group: Group | None = None) -> Float[Array, "m hidden"]:
        """The vectors of ``tokens``; ids beyond the vocabulary count as the last one.

        Each device of a ``group`` has an equal part of the table, in order.
        """
        if group is None:
            return self._rows(tokens)
        size = self.table.shape[0]
        local = tokens - lax.axis_index(AXIS) * size
        mine = (local >= 0) & (local < size)
        # All terms but one are zero, so the sum is exact.
        return lax.psum(jnp.where(mine[:, None], self._rows(local), 0), AXIS)

    def _rows(self, tokens: Int32[Array, " m"]) -> Float[Array, "m hidden"]:
        if not isinstance(self.table, QuantizedWeight):
            return jnp.take(self.table, tokens, axis=0, mode="clip").astype(self.dtype)
        values = jnp.take(self.table.outliers, tokens, axis=0, mode="clip").astype(jnp.float32)
        scales = jnp.take(self.table.scales[0], tokens, mode="clip")
        return (values * scales[:, None]).astype(self.dtype)


def head_table(shared: Mapping[str, Any]) -> Table:
    """The weight of the head among the parameters outside the layers: "lm_head", or the embedding's table."""
    head = shared.get("lm_head", shared["embedding"])
    return head.table if isinstance(head, Embedding) else head


@jax.jit
def round_table(table: Float[Array | np.ndarray, "vocab hidden"]) -> QuantizedWeight:
    """The table in INT8. It is rounded to bfloat16 first, which makes it that of a bfloat16 checkpoint."""
    return quantize_int8(rounded(jnp.asarray(table, jnp.float32), jnp.dtype(jnp.bfloat16)))
