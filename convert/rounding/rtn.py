"""Rounds a weight to nearest, without error compensation, to the format with INT8 outlier channels."""

from __future__ import annotations

import numpy as np
from jaxtyping import Array, Float32

from convert.groups import check_groups
from pallas_kernels import rounding
from pallas_kernels.qarrays import QuantizedWeight


def quantize_weight(
    weight: Float32[Array | np.ndarray, "n k"],
    *,
    group_size: int | None,
    num_outliers: int,
    clip_w: float | None,
) -> QuantizedWeight:
    """``pallas_kernels.rounding.quantize_weight`` with the same arguments, but the converter's errors.

    Raises:
      AtomError: the channels that are not outliers are not whole groups (see ``check_groups``).
    """
    group_size = check_groups("weight", weight.shape[1], group_size, num_outliers)
    return rounding.quantize_weight(weight, group_size=group_size, num_outliers=num_outliers, clip_w=clip_w)
