"""Rounds a weight to nearest, without error compensation, to the format with INT8 outlier channels."""

from __future__ import annotations

from functools import partial

import numpy as np
from jaxtyping import Array, Float32

from convert.channel_blocks import per_block
from convert.groups import check_groups
from pallas_kernels import rounding
from pallas_kernels.qarrays import QuantizedWeight


def quantize_weight(
    weight: Float32[Array | np.ndarray, "n k"],
    *,
    group_size: int | None,
    num_outliers: int,
    clip_w: float | None,
    blocks: int = 1,
) -> QuantizedWeight:
    """``pallas_kernels.rounding.quantize_weight`` with the same arguments, but the converter's errors.

    With more than one of ``blocks`` (``convert.channel_blocks``) it is a stack, [blocks, N, K / blocks].

    Raises:
      AtomError: the channels that are not outliers are not whole groups (see ``check_groups``).
    """
    group_size = check_groups("weight", weight.shape[1] // blocks, group_size, num_outliers)
    quantize = partial(
        rounding.quantize_weight, group_size=group_size, num_outliers=num_outliers, clip_w=clip_w
    )
    return per_block(quantize, weight, blocks)
