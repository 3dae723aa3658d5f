"""How a weight gets into a scheme: the settings of the recipe that matter to it, and the rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from jaxtyping import Array, Float32

from atom_jax.schemes import PackedWeight

if TYPE_CHECKING:
    from convert.recipe import Recipe


@dataclasses.dataclass(frozen=True)
class Method:
    """The converter's part of a scheme; each is a module of this package, whose ``METHOD`` it is.

    Attributes:
      quantize: ``(weight [N, K], hessian [K, K], recipe)``, returns the weight as the scheme stores it. The
        Hessian is the mean of x x^T over the weight's inputs x, None without calibration. Raises AtomError
        where the weight's channels do not suit the groups. None for a scheme whose linears stay floats.
      unused: settings of ``Recipe`` that the scheme has no use for, and the one value they have in it.
    """

    quantize: Callable[[Float32[Array, "n k"], Float32[Array, "k k"] | None, Recipe], PackedWeight] | None
    unused: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Of schemes whose weights have no outliers: grids that are searched for each group, or no clipping at all.
ORDER_KEPT: dict[str, Any] = {"clip_w": 1.0, "reorder": "none", "migrate": False}
